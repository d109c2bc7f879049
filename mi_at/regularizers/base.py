"""The interface of an added loss term, and the views of a batch that a loss reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.functional import random
from mi_at.functional.distributed import gather
from mi_at.optim import Optimisation


class Views:
    """The outputs of a network on the views of a batch: one lazy forward per view, in the order they are asked for.

    The order matters (batch-norm statistics depend on it), and views are never concatenated into one forward.
    What is returned belongs to the global batch: with several processes the other shards' outputs are gathered,
    detached, so that a loss has the same value everywhere and the gradient of its own shard.

    Args:
        net: the classifier; forwards run under the autocast state at construction.
        batch: `batch.x` is the view "clean"; `batch.views` holds the others.
        taps: names of the network's taps that the loss reads.
        seed: of the noise of stochastic layers, drawn by (seed, view, epoch, batch, place in the global batch).
        ids: [b] int64 that it is drawn by instead of the places.
    """

    def __init__(
        self, net: nn.Module, batch: Batch, taps: tuple[str, ...] = (), *, seed: int = 0, ids: Tensor | None = None
    ) -> None:
        self.net, self.batch, self.seed, self._tap_names, self._ids = net, batch, seed, taps, ids
        device = batch.x.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._logits: dict[str, Tensor] = {}
        self._taps: dict[str, dict[str, Tensor]] = {}
        self._y: Tensor | None = None

    @property
    def y(self) -> Tensor:
        """[B] int64 labels of the global batch."""
        if self._y is None:
            self._y = self._gather(self.batch.y)
        return self._y

    def images(self, view: str = "clean") -> Tensor:
        """[b, C, H, W] images of a view, own shard."""
        return self.batch.x if view == "clean" else self.batch.views[view]

    def logits(self, view: str) -> Tensor:
        """[B, K] float32 logits of a view."""
        if view not in self._logits:
            device, dtype, enabled = self._autocast
            noise = random.key(self.seed, f"forward {view}", self.batch.epoch, self.batch.batch_idx)
            place = torch.arange(len(self.batch), device=self.batch.y.device) + self.batch.offset
            place = place if self._ids is None else self._ids
            with random.keyed(place, noise), torch.autocast(device, dtype=dtype, enabled=enabled):
                if self._tap_names:
                    net: Any = self.net  # a Classifier; Defense.attach has checked its taps
                    logits, taps = net.forward_taps(self.images(view), self._tap_names)
                    self._taps[view] = {name: self._gather(tap.float()) for name, tap in taps.items()}
                else:
                    logits = self.net(self.images(view))
            self._logits[view] = self._gather(logits.float() if logits.dtype.itemsize < 4 else logits)
        return self._logits[view]

    def tap(self, view: str, name: str) -> Tensor:
        """[B, ...] float32 output of a tap on a view, from the same forward as its logits."""
        self.logits(view)
        return self._taps[view][name]

    def computed(self) -> Mapping[str, Tensor]:
        """Logits of the views forwarded so far."""
        return self._logits

    def _gather(self, shard: Tensor) -> Tensor:
        return gather(shard, self.batch.global_size or None)


class TrainingRule(Protocol):
    """What callbacks may ask of a defense (`mi_at.defenses.base.Defense`)."""

    net: nn.Module
    optimisation: Optimisation | None
    undo_before_hooks: list[Callable[[], None]]

    @property
    def needed_taps(self) -> tuple[str, ...]:
        """Taps that the loss reads."""

    def all_adversaries(self, batch: Batch) -> dict[str, Inner]:
        """Inner maximisations of a training batch."""

    def selection_adversaries(self, batch: Batch) -> dict[str, Inner]:
        """Inner maximisations of a validation batch."""

    def all_terms(self, views: Views) -> dict[str, Tensor]:
        """The loss by term."""

    def scaled(self, epochs: float) -> int:
        """Epochs of the paper in this run."""


@dataclass(frozen=True)
class Context:
    """What a regularizer's hooks may use.

    Attributes:
        net: the classifier.
        epoch: epochs finished so far.
        scaled: a number of epochs of the paper -> of this run.
        train_batches: (batch_size, augment) -> one pass over the training set, in a random order of the epoch.
        draw_per_class: n -> a batch of n random training samples of each class.
        attack: (objective, batch) -> x_adv of the batch's images, with the run's own attack budget.
    """

    net: nn.Module
    epoch: int
    scaled: Callable[[float], int]
    train_batches: Callable[[int, bool], Iterator[Batch]]
    draw_per_class: Callable[[int], Batch]
    attack: Callable[[Objective | Inner, Batch], Tensor]


class Regularizer(nn.Module):
    """A term added to any defense's loss. State lives in buffers or extra state and travels in the checkpoint."""

    taps: tuple[str, ...] = ()
    """Names of the network's taps that `terms` reads."""
    coupled: str = ""
    """Name of a term that is computed over the batch rather than per sample, if there is one."""
    own_views: tuple[str, ...] = ()
    """Names of the views that its `adversaries` make; no two terms of a run may make the same."""
    needs_adversarial: bool = False
    """Whether `terms` reads the view "adversarial"; a defense without one then gets one, on the cross-entropy."""

    def adapt(self, net: nn.Module) -> None:
        """Called once with the network, also where it is only loaded: check it, make state of its size, add masks.

        Raises:
            ValueError: a network that the term cannot work with.
        """

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        """Further inner maximisations this term needs, by view name; none by default."""
        return {}

    def terms(self, views: Views) -> dict[str, Tensor]:
        """Named, signed and weighted scalar terms (nats where they are information)."""
        raise NotImplementedError

    def on_fit_start(self, ctx: Context) -> None:
        """Called once before training; not after a resume."""

    def after_step(self, ctx: Context, batch: Batch) -> None:
        """Called after every optimiser step, on the updated weights."""

    def on_epoch_end(self, ctx: Context) -> None:
        """Called after every epoch, before validation."""

    def readings(self) -> dict[str, Tensor]:
        """Scalars of the batch that `terms` saw last, logged beside the terms and no part of the loss."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Plain values worth recording beside a result."""
        return {}

    def alternatives(self) -> dict[str, dict[str, Any]]:
        """Other ways to serve the trained weights, each evaluated and recorded too: what it is -> the options of it."""
        return {}
