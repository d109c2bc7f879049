"""What every defense shares: the training step, logging, the watch for non-finite losses, and the optimiser.

A defense adds what its paper adds: `adversaries` (what is maximised) and `loss` (what is minimised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.eot import seeded
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.functional.distributed import alone, own_shard, rank, world_size
from mi_at.optim import Optimisation
from mi_at.regularizers.base import Context, Regularizer, Views

ADVERSARIAL = "adversarial"
ACCURACIES = ("clean", "robust")
"""Logged in training beside the terms of the loss, which must not be called so."""
SELECTION_ATTACKS = ("cross_entropy", "margin")
READING = "reading/"
AFTER_TRAINING = 10**9
"""An epoch in which every schedule of a weight has run its course."""


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names the step and the term."""


@contextmanager
def _naming(term: str, batch: Batch) -> Iterator[None]:
    """Say of which term, and when, an error speaks."""
    try:
        yield
    except ValueError as error:
        when = "" if batch.epoch == AFTER_TRAINING else f" in epoch {batch.epoch + 1}, batch {batch.batch_idx + 1}"
        raise ValueError(f"{term}{when}: {error}") from error


class Defense(LightningModule):
    """A training rule for a classifier.

    A subclass takes its own hyper-parameters in `__init__`; the network, the optimiser and added terms come with
    `attach`, so that a method's file holds the method alone.

    Attributes:
        net: the classifier, logits out.
        regularizers: added terms by name.
        optimisation: optimiser and schedule.
        inspect_every: steps between two readings of the terms' shares and of the non-finite note; 0: never.
        context: epochs finished so far -> what regularizers' hooks may use.
        config: the run's resolved configuration as plain values; it travels in the checkpoint.
    """

    taps: tuple[str, ...] = ()
    coupled: str = ""
    """Name of a term that is computed over the batch rather than per sample, if the method has one."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = nn.Identity()
        self.regularizers = nn.ModuleDict()
        self.optimisation: Optimisation | None = None
        self.inspect_every = 50
        self.config: dict[str, Any] = {}
        self.context: Callable[[int], Context] | None = None
        self.undo_before_hooks: list[Callable[[], None]] = []
        self.fit_started = False
        self._as_of: int | None = None
        self._term_names: list[str] = []
        self._non_finite: Tensor | None = None
        self._history: list[tuple[int, Tensor]] = []
        self._history_names: list[str] = []
        # torchmetrics' check for NaN would wait for the device at every update.
        self._accuracy = {f"train/{name}": MeanMetric(nan_strategy="disable") for name in ACCURACIES}
        self._selection = {name: MeanMetric(nan_strategy="disable") for name in ("clean", *SELECTION_ATTACKS, "robust")}

    def attach(
        self,
        net: nn.Module,
        *,
        optimisation: Optimisation | None = None,
        regularizers: Mapping[str, Regularizer] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Defense:
        """Give the defense its network and what trains it.

        Args:
            net: a classifier [B, C, H, W] in [0, 1] -> logits [B, K].
            optimisation: optimiser and schedule; None where the module is only evaluated.
            regularizers: added terms by name.
            config: resolved configuration, plain values.

        Returns:
            The defense itself.

        Raises:
            ValueError: a tap that the network does not have (the message lists its taps), a network that the
                method or a term cannot work with, or two terms that make the same view.
        """
        self.net, self.optimisation, self.config = net, optimisation, dict(config or {})
        self.regularizers = nn.ModuleDict(dict(regularizers or {}))
        makers: dict[str, str] = {}
        for name, term in self.added_terms().items():
            for view in term.own_views:
                if view in makers:
                    raise ValueError(f"{makers[view]} and {name} both make the view {view!r}: choose one of them")
                makers[view] = name
        self.adapt(net)
        for term in self.added_terms().values():
            term.adapt(net)
        known = getattr(net, "tap_names", ())
        for tap in self.needed_taps:
            if tap not in known:
                raise ValueError(f"the network has no tap {tap!r}; its taps are {', '.join(known) or 'none'}")
        return self

    @property
    def needed_taps(self) -> tuple[str, ...]:
        """Taps that the defense and its regularizers read, each once."""
        wanted = [*self.taps, *(tap for term in self.added_terms().values() for tap in term.taps)]
        return tuple(dict.fromkeys(wanted))

    def coupled_terms(self) -> str:
        """Names of the terms that are computed over the batch; empty where every term is a mean over samples."""
        return ", ".join(filter(None, [self.coupled, *(term.coupled for term in self.added_terms().values())]))

    def added_terms(self) -> dict[str, Regularizer]:
        """The regularizers by name, typed."""
        return {name: term for name, term in self.regularizers.items() if isinstance(term, Regularizer)}

    # What a method defines.

    def adapt(self, net: nn.Module) -> None:
        """Called once with the network, also where it is only loaded: a method adds its own layers here.

        Raises:
            ValueError: a network that the method cannot work with.
        """

    def after_step(self, batch: Batch) -> None:
        """Called after every optimiser step, on the updated weights, without gradients."""

    def take_as_searched(self, batch: Batch) -> None:
        """Called before the loss of views that an attack on the loss made, not the method's own search."""

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """The inner maximisations of a batch by view name.

        Args:
            batch: clean images and labels, own shard.

        Returns:
            View name -> an objective, or an `Inner` with the method's own start, mode or search.
        """
        raise NotImplementedError

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Named, signed and weighted terms of the global batch, and "loss", their sum."""
        raise NotImplementedError

    # What the shared machinery asks.

    def all_adversaries(self, batch: Batch) -> dict[str, Inner]:
        """The defense's and its regularizers' inner maximisations."""
        wanted = dict(self.adversaries(batch))
        for term in self.added_terms().values():
            for view, objective in term.adversaries(self.net, batch).items():
                if view in wanted:
                    raise ValueError(f"two inner maximisations are called {view!r}: give one another name")
                wanted[view] = objective
        if ADVERSARIAL not in wanted and any(term.needs_adversarial for term in self.added_terms().values()):
            wanted[ADVERSARIAL] = Inner(objectives.cross_entropy(self.net, batch.y))
        return {view: inner if isinstance(inner, Inner) else Inner(inner) for view, inner in wanted.items()}

    def selection_adversaries(self, batch: Batch) -> dict[str, Inner]:
        """Inner maximisations of validation: a checkpoint is chosen by the worst of cross-entropy and margin."""
        return {
            "cross_entropy": Inner(objectives.cross_entropy(self.net, batch.y)),
            "margin": Inner(objectives.margin(self.net, batch.y, kappa=50.0)),
        }

    def all_terms(self, views: Views) -> dict[str, Tensor]:
        """The loss of the defense plus its regularizers, in float32 or better, by term."""
        with torch.autocast(views.batch.x.device.type, enabled=False):
            with _naming(type(self).__name__, views.batch):
                terms = dict(self.loss(views))
            if "loss" not in terms:
                raise ValueError(
                    f"{type(self).__name__}.loss returned {', '.join(terms) or 'nothing'}: expected 'loss' among them, "
                    "the sum of the terms"
                )
            for name, regularizer in self.added_terms().items():
                with _naming(name, views.batch):
                    added = regularizer.terms(views)
                for key, value in added.items():
                    terms[key if key == name else f"{name}/{key}"] = value
                    terms["loss"] = terms["loss"] + value
        if taken := sorted(terms.keys() & set(ACCURACIES)):
            raise ValueError(
                f"a term of the loss is called {taken[0]!r}, as a logged accuracy is: give it another name"
            )
        return terms

    def training_objective(self, x: Tensor, y: Tensor, index: Tensor) -> Objective:
        """The whole training loss of a batch as a function of its adversarial images: what an adaptive attack raises.

        x_adv stands for every view that training crafts; where it crafts none (ce, vib), for the clean images. The
        network, masks, centroids and estimators are as they are served, in eval mode, the weights' schedules at their
        end; noise is keyed by (seed, view, index) and the same at every call. Nothing of the defense changes: neither
        state, nor what it notes or logs, nor torch's random state. Batches of other processes play no part.

        Args:
            x: [B, C, H, W] float in [0, 1], the clean images.
            y: [B] int64.
            index: [B] int64, the images' places in their data set.

        Returns:
            x_adv [B, C, H, W] -> scalar, in float32 or better; differentiable.

        Raises:
            ValueError: images, labels and indices of different number; later, a single image under a kernel term.
        """
        # Lightning's loops may hand over inference tensors, which cannot enter a graph.
        x, y, index = (t.clone() if t.is_inference() else t for t in (x.detach(), y, index))
        clean = Batch(x=x, y=y, index=index, epoch=AFTER_TRAINING, batch_idx=1)
        with self._as_served():
            crafted = tuple(self.all_adversaries(clean))

        def loss(x_adv: Tensor) -> Tensor:
            images = x if crafted else x_adv
            views = dict.fromkeys(crafted, x_adv)
            batch = Batch(x=images, y=y, index=index, views=views, epoch=AFTER_TRAINING, batch_idx=1)
            with self._as_served():
                self.take_as_searched(batch)
                seen = Views(self.net, batch, self.needed_taps, seed=self.config.get("seed", 0), ids=index)
                total = self.all_terms(seen)["loss"]
            return total + 0 * x_adv.sum()  # a loss that does not see x_adv has a gradient too

        return loss

    @property
    def current_epoch(self) -> int:
        """Lightning's; in `training_objective`, after training."""
        return super().current_epoch if self._as_of is None else self._as_of

    @contextmanager
    def _as_served(self) -> Iterator[None]:
        """Eval mode, frozen, one process, a random state of its own; whatever the block changes is undone."""
        served = set(self.net.modules())
        held = [(module, dict(module.__dict__)) for module in self.modules()]
        with alone(), seeded(0):
            try:
                for module, state in held:
                    if module in served:  # in eval mode a network writes to no buffer of its own
                        continue
                    # What the block writes into, it writes into copies.
                    copies = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
                    buffers = {k: v if v is None else v.clone() for k, v in state["_buffers"].items()}
                    module.__dict__.update(copies, _buffers=buffers)
                self._as_of = AFTER_TRAINING
                with attacking(self):
                    yield
            finally:
                for module, state in held:
                    module.__dict__.clear()
                    module.__dict__.update(state)

    def readings(self) -> dict[str, Tensor]:
        """Scalars of the last batch, logged beside the terms and no part of the loss: the regularizers'."""
        terms = self.added_terms().items()
        return {f"{name}/{key}": value for name, term in terms for key, value in term.readings().items()}

    def scaled(self, epochs: float) -> int:
        """A number of epochs of the paper in this run (`Optimisation.scaled`)."""
        return self.optimisation.scaled(epochs) if self.optimisation else round(epochs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the global batch, scaled so that averaging gradients over processes sums them."""
        views = Views(self.net, batch, self.needed_taps, seed=self.config.get("seed", 0))
        terms = self.all_terms(views)
        self._note_non_finite(terms)
        self._log_terms(terms, views)
        return terms["loss"] * world_size()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Clean accuracy, and accuracy under each selection attack and under the worst of them."""
        self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation; published numbers come from `mi_at.evaluation`."""
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of this validation, in percent of the whole split on every process."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies of this test, in percent of the whole split on every process."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over the network's parameters, its schedule stepped once an epoch."""
        if self.optimisation is None:
            raise ValueError("the defense has no optimiser: pass optimisation= to attach()")
        optimizer = self.optimisation.optimizer(self.trained_parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.optimisation.scheduler(optimizer)}

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves: the network's parameters."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def optimizer_step(self, *args: Any, **options: Any) -> None:  # Lightning's own signature, passed through
        """Step, undo what was done to the weights for this step only, then let the regularizers see the result."""
        super().optimizer_step(*args, **options)
        while self.undo_before_hooks:
            self.undo_before_hooks.pop()()
        with torch.no_grad():
            self.after_step(self._batch)
            if self.context is not None:
                for term in self.added_terms().values():
                    term.after_step(self.context(self.current_epoch), self._batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch for the hooks after the step."""
        self._batch = batch

    def on_fit_start(self) -> None:
        """Prepare the metrics and, once in a run, the regularizers."""
        for metric in (*self._accuracy.values(), *self._selection.values()):
            metric.to(self.device)
        if not self.fit_started and self.context is not None:
            for term in self.added_terms().values():
                term.on_fit_start(self.context(self.current_epoch))
        self.fit_started = True

    def on_train_epoch_end(self) -> None:
        """Training accuracies, the regularizers' epoch hook, and the non-finite note."""
        self.check_finite()
        for name, metric in self._accuracy.items():
            if metric.update_count:
                self.log(name, 100 * metric.compute(), batch_size=1)
                metric.reset()
        if self.context is not None:
            for term in self.added_terms().values():
                term.on_epoch_end(self.context(self.current_epoch + 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save a network whose loss was not finite; put the configuration and RNG states in."""
        self.check_finite()
        history = {"names": self._history_names, "steps": [step for step, _ in self._history]}
        if self._history:
            history["values"] = torch.stack([row for _, row in self._history]).cpu()
        accuracies = {}  # of the epoch so far, where this is the middle of one
        for name, metric in self._accuracy.items():
            if metric.update_count:
                sums = torch.stack([metric.mean_value, metric.weight])
                if world_size() > 1:
                    dist.all_reduce(sums)
                accuracies[name] = sums.cpu()
        checkpoint["mi_at"] = {
            "config": self.config,
            "fit_started": self.fit_started,
            "terms": history,
            "accuracies": accuracies,
        }
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` put in; RNG states are set when training starts."""
        self.fit_started = checkpoint["mi_at"]["fit_started"]
        history = checkpoint["mi_at"]["terms"]
        self._history_names = history["names"]
        rows = history["values"].to(self.device) if history["steps"] else ()
        self._history = list(zip(history["steps"], rows, strict=True))
        for name, sums in checkpoint["mi_at"].get("accuracies", {}).items():
            metric = self._accuracy[name]
            metric.update(0.0)  # so that it counts as updated
            # The sums are those of all processes: one of them takes them.
            metric.mean_value, metric.weight = (sums if rank() == 0 else torch.zeros_like(sums)).to(metric.device)
        self._rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        """Set the RNG states of a resumed run, as late as possible: nothing draws between here and the first batch."""
        rng = self.__dict__.pop("_rng", None)
        if rng is not None:
            torch.set_rng_state(rng["cpu"].cpu())
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)

    def check_finite(self) -> None:
        """Read the note of the first non-finite term; the only place that waits for the device.

        Raises:
            NonFiniteLossError: naming the step and the term.
        """
        if self._non_finite is None:
            return
        step, term = (int(v) for v in self._non_finite)
        if step >= 0:
            raise NonFiniteLossError(
                f"the term {self._term_names[term]!r} of the loss was not finite at step {step}; the last checkpoint "
                "is from before. Lower optim.lr or the term's weight, or clip gradients (trainer.gradient_clip_val=1)."
            )

    def _note_non_finite(self, terms: Mapping[str, Tensor]) -> None:
        self._term_names = sorted(terms, key="loss".__eq__)  # the sum last: the first bad one is to blame
        values = torch.stack([terms[name].detach().float() for name in self._term_names])
        bad = ~values.isfinite()
        now = torch.stack([torch.full_like(bad[0], self.global_step, dtype=torch.int64), bad.int().argmax()])
        if self._non_finite is None:
            self._non_finite = torch.full_like(now, -1)
        first = bad.any() & (self._non_finite[0] < 0)
        self._non_finite = torch.where(first, now, self._non_finite)

    def _log_terms(self, terms: Mapping[str, Tensor], views: Views) -> None:
        inspecting = bool(self.inspect_every) and self.global_step % self.inspect_every == 0
        logits = {view: own_shard(values.detach()) for view, values in views.computed().items()}
        if inspecting and "clean" not in logits:  # a method that never looks at clean images: once in a while
            with attacking(self.net):
                logits["clean"] = objectives.frozen_logits(self.net, views.batch.x)
        for view, name in (("clean", "train/clean"), (ADVERSARIAL, "train/robust")):
            if view in logits:
                self._accuracy[name].update((logits[view].argmax(dim=1) == views.batch.y).float())
        if self._trainer is None:
            return
        size = len(views.y)
        for name, value in terms.items():
            # Not in the progress bar: Lightning would read it from the device after every batch.
            self.log(f"train/{name}", value.detach(), batch_size=size)
        for name, value in self.readings().items():
            self.log(f"train/{name}", value.detach().float(), batch_size=size)
        if inspecting:
            self.check_finite()
            if len(terms) > 2:  # two terms and their sum
                shares = self.term_shares(terms)
                for logger in self.loggers:  # log_dict would repeat them in every row until the next reading
                    logger.log_metrics({name: float(share) for name, share in shares.items()}, self.global_step)
                readings = {f"{READING}{name}": value.detach() for name, value in self.readings().items()}
                row = {name: value.float() for name, value in (shares | readings).items()}
                self._history.append((self.global_step, torch.stack(list(row.values()))))
                self._history_names = list(row)

    def term_shares(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term's share of the loss, |term| / sum of |terms|, and its gradient norm over that of the loss.

        Args:
            terms: as `all_terms` returns them, graph intact.

        Returns:
            `share/<term>` in [0, 1] and `gradient/<term>` >= 0, scalars.
        """
        named = {name: value for name, value in terms.items() if name != "loss"}
        total = torch.stack([value.detach().abs() for value in named.values()]).sum()
        norms = {name: self._gradient_norm(value) for name, value in terms.items()}
        shares = {f"share/{name}": value.detach().abs() / total for name, value in named.items()}
        return shares | {f"gradient/{name}": norms[name] / norms["loss"] for name in named}

    def term_history(self) -> dict[str, dict[str, float]]:
        """Smallest, mean and largest share and gradient ratio of each term over training: is one inert?

        Returns:
            `share/<term>` and `gradient/<term>` -> {"min", "mean", "max"}; empty where the loss has one term.
        """
        return {name: row for name, row in self._summary().items() if not name.startswith(READING)}

    def reading_history(self) -> dict[str, dict[str, float]]:
        """Smallest, mean and largest of what the regularizers read at the same steps, such as estimates in nats.

        Returns:
            `<regularizer>/<reading>` -> {"min", "mean", "max"}.
        """
        rows = self._summary().items()
        return {name.removeprefix(READING): row for name, row in rows if name.startswith(READING)}

    def settings(self) -> dict[str, dict[str, Any]]:
        """What the regularizers made of their options, by name: plain values worth recording beside a result."""
        found = {name: term.settings() for name, term in self.added_terms().items()}
        return {name: values for name, values in found.items() if values}

    def _summary(self) -> dict[str, dict[str, float]]:
        if not self._history:
            return {}
        values = torch.stack([row for _, row in self._history]).cpu().double()
        columns = dict(zip(self._history_names, values.T, strict=True))
        return {
            name: {"min": float(v.min()), "mean": float(v.mean()), "max": float(v.max())} for name, v in columns.items()
        }

    def _gradient_norm(self, value: Tensor) -> Tensor:
        parameters = self.trained_parameters()
        if not value.requires_grad:
            return value.new_zeros(())
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        if world_size() > 1:
            dist.all_reduce(flat)
        return torch.linalg.vector_norm(flat)

    def _score(self, batch: Batch) -> None:
        correct = self.net(batch.x).argmax(dim=1) == batch.y
        worst = correct
        self._selection["clean"].update(correct.float())
        for name in SELECTION_ATTACKS:
            under_attack = (self.net(batch.views[name]).argmax(dim=1) == batch.y) & correct
            self._selection[name].update(under_attack.float())
            worst = worst & under_attack
        self._selection["robust"].update(worst.float())

    def _log_scores(self, split: str) -> None:
        for name, metric in self._selection.items():
            self.log(f"{split}/{name}", 100 * metric.compute(), prog_bar=name in ("clean", "robust"), batch_size=1)
            metric.reset()


def require_non_negative(**values: float) -> None:
    """Range check of weights.

    Raises:
        ValueError: naming the first value below 0 or not finite.

    Example:
        >>> require_non_negative(beta=-1.0)
        Traceback (most recent call last):
        ValueError: defense.beta=-1.0: expected 0 or more
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"defense.{name}={value}: expected 0 or more")


def require_one_of(choices: tuple[str, ...], **values: str) -> None:
    """Check of named options.

    Raises:
        ValueError: naming the value and the choices.

    Example:
        >>> require_one_of(("mean", "sum"), mae_reduction="max")
        Traceback (most recent call last):
        ValueError: defense.mae_reduction='max': expected one of mean, sum
    """
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"defense.{name}={value!r}: expected one of {', '.join(choices)}")
