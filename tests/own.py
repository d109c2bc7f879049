"""What a user may write: a network, a regularizer and a callback of one's own, for tests of the commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mi_at.regularizers.base import Regularizer, Views
from mi_at.results.loggers import MetricsFile


class DropoutNet(nn.Module):
    """Batch norm and dropout: a forward in train mode depends on the batch and on torch's random state."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(8 * image_size**2, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Planted(Regularizer):
    """A term that is not a number in one step, counted from 0; its counter travels in the checkpoint."""

    def __init__(self, *, at_step: int) -> None:
        super().__init__()
        self.at_step = at_step
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def terms(self, views: Views) -> dict[str, Tensor]:
        value = views.logits("clean").sum() * 0.0
        bad = self.steps == self.at_step
        self.steps += 1
        return {"planted": torch.where(bad, value + torch.nan, value)}


class Interrupt(Callback):
    """Sends this process a signal at a point of the run that the environment names; without it, does nothing.

    INTERRUPT=KILL:train_batch_end:5 is SIGKILL when that hook runs with 5 finished steps, KILL:log_step:5 when the row
    numbered 5 is to be written, KILL:log_epoch:5 when the epoch's values are to be added to it.
    """

    def __init__(self) -> None:
        name, self._hook, self._step = (os.environ.get("INTERRUPT") or "::").split(":")
        self._signal = getattr(signal, f"SIG{name}", None)
        if self._hook.startswith("log_"):
            self._watch(MetricsFile.log_metrics)

    def _watch(self, log_metrics: Callable[..., None]) -> None:
        def log(file: MetricsFile, metrics: Mapping[str, Any], step: int | None = None) -> None:
            if str(step) == self._step and self._hook == ("log_epoch" if "train/clean" in metrics else "log_step"):
                os.kill(os.getpid(), self._signal or 0)
            log_metrics(file, metrics, step)

        MetricsFile.log_metrics = log  # type: ignore[method-assign]

    def _reach(self, hook: str, trainer: Trainer) -> None:
        if self._signal is not None and hook == self._hook and trainer.global_step == int(self._step):
            os.kill(os.getpid(), self._signal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reach("train_batch_start", trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._reach("train_batch_end", trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._reach("validation_batch_start", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reach("train_epoch_end", trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reach("train_epoch_start", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._reach("save_checkpoint", trainer)


class Broken(Callback):
    """Fails as a mistake in the code would."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("broken on purpose")
