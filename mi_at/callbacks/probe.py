"""An evaluation recorded every epoch: attacks of one's choice on the validation images, during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric

from mi_at.attacks.autoattack import forked_rng
from mi_at.attacks.contexts import attacking
from mi_at.callbacks.lines import add_line
from mi_at.data.batch import Batch
from mi_at.metrics.clusters import NormalizedCMI
from mi_at.regularizers.base import TrainingRule

CLEAN = "clean"


class Probe(Callback):
    """Run evaluation attacks on the validation split and log `probe/<name>`, in percent that stay right.

    It works inside Lightning's validation, where the weights are those that are served: where averaging is
    on, the averaged ones, whatever the order of the callbacks. Only images that are right when clean are
    attacked; the others count as wrong. Training is not disturbed: same bits with a probe as without.

    Each time a line goes to probe.jsonl in the run folder: {"epoch": finished epochs, "step": finished steps,
    "clean": ..., "<name>": ...}, with `ncmi` also "clean ncmi" and "<name> ncmi", None where nothing separates. A
    resumed run replaces the lines of what it does again.

    Args:
        attacks: by name; called as attack(net, x, y, ids=, seed=) -> adversarial images.
        folder: the run folder.
        every_n_epochs: finished epochs between recordings; the last epoch has one in any case.
        seed: of the attacks' noise.
        ncmi: record the NCMI of the outputs too (robust NCMI, Figure 9); every image is attacked for it.

    Raises:
        ValueError: no attacks, one named "clean", or every_n_epochs < 1; when training starts, no validation
            split.
    """

    def __init__(
        self,
        attacks: Mapping[str, Callable[..., Tensor]],
        *,
        folder: str | Path,
        every_n_epochs: int = 1,
        seed: int = 0,
        ncmi: bool = False,
    ) -> None:
        if not attacks or CLEAN in attacks:
            raise ValueError(
                f"probe={list(attacks)}: expected one attack or more, none named {CLEAN!r} (that is always recorded)"
            )
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: expected 1 or more")
        self.attacks, self.path = dict(attacks), Path(folder) / "probe.jsonl"
        self.every_n_epochs, self.seed = every_n_epochs, seed
        self.ncmi = ncmi
        self._right = {name: MeanMetric() for name in (CLEAN, *self.attacks)}
        self._clusters: dict[str, NormalizedCMI] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to record what will never be measured."""
        every_epoch = trainer.check_val_every_n_epoch == 1  # otherwise the loader may not have been asked for yet
        if not trainer.enable_validation or (every_epoch and not any(trainer.num_val_batches)):
            raise ValueError(
                f"probe={list(self.attacks)} runs on the validation split, and there is none: set dataset.val_size"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        for metric in self._right.values():
            metric.to(pl_module.device).reset()
        self._clusters = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack one batch."""
        if not self._due(trainer):
            return
        net = cast(TrainingRule, pl_module).net
        with attacking(net), forked_rng():
            right = self._judge(CLEAN, net, batch.x, batch.y)
            self._right[CLEAN].update(right.float())
            wanted = torch.ones_like(right) if self.ncmi else right
            x, y, ids = batch.x[wanted], batch.y[wanted], batch.index[wanted]
            for name, attack in self.attacks.items():
                stays = torch.zeros_like(right)
                if len(y):
                    torch.manual_seed(self.seed)  # of attacks that draw from the global state
                    with attacking(net):  # again: an attack may leave another mode behind
                        x_adv = attack(net, x, y, ids=ids, seed=self.seed)
                    stays[wanted] = self._judge(name, net, x_adv, y)
                self._right[name].update((stays & right).float())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies over all processes, and write them down."""
        if not self._due(trainer):
            return
        values = {name: 100 * metric.compute() for name, metric in self._right.items()}
        clusters = {f"{name} ncmi": metric.compute() for name, metric in self._clusters.items()}
        pl_module.log_dict(
            {f"probe/{name}": value.float() for name, value in {**values, **clusters}.items()}, batch_size=1
        )
        if trainer.is_global_zero:
            numbers = {name: round(float(value), 4) for name, value in values.items()}
            line = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **numbers}
            add_line(self.path, {**line, **{name: _finite(value) for name, value in clusters.items()}})

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return False
        finished = trainer.current_epoch + 1
        return finished % self.every_n_epochs == 0 or finished == trainer.max_epochs

    @torch.no_grad()
    def _judge(self, name: str, net: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Which are right; where NCMI is wanted, the outputs are taken in."""
        logits: Tensor = net(x)
        if self.ncmi:
            if name not in self._clusters:
                self._clusters[name] = NormalizedCMI(num_classes=logits.shape[1]).to(logits.device)
            self._clusters[name].update(logits.double().softmax(dim=1), y)
        return logits.argmax(dim=1) == y


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None
