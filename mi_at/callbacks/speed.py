"""How fast training is and how much of it is the attack; between readings nothing waits for the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.data.batch import Batch


class Speed(Callback):
    """Log `speed/images_per_second` and `speed/attack_share`, every n steps and at the end of an epoch.

    Images are those of the global batch. The attack's share is its time over the wall time of the steps since
    the last reading, in [0, 1]. Loading data counts; validation and what happens between epochs do not. On a
    GPU a reading waits for the device, as does the start of a validation.

    Args:
        adversarial_examples: the callback that runs the attack and keeps its time.
        every_n_steps: steps between readings; what `trainer.log_every_n_steps` is, so that each reaches the
            loggers.

    Raises:
        ValueError: every_n_steps < 1.
    """

    def __init__(self, adversarial_examples: AdversarialExamples, *, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: expected 1 or more")
        self.adversarial_examples, self.every_n_steps = adversarial_examples, every_n_steps
        self._images, self._seconds = 0, 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was counted before."""
        self._take(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock where a run was resumed within an epoch, which does not start again."""
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and read every n steps."""
        self._images += batch.global_size
        if trainer.global_step % self.every_n_steps == 0:
            self._stop(pl_module)
            self._log(pl_module, on_step=True)
            self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again, if the epoch goes on."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.is_last_batch:
            self._start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what the last reading left over."""
        self._stop(pl_module)
        self._log(pl_module, on_step=False)

    def _start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def _stop(self, pl_module: LightningModule) -> None:
        if self._since is not None:
            if pl_module.device.type == "cuda":  # steps still queued there belong to this stretch
                torch.cuda.synchronize(pl_module.device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def _take(self, pl_module: LightningModule) -> tuple[int, float, float]:
        """Images, seconds, and seconds in the attack since the last call."""
        self._stop(pl_module)
        taken = self._images, self._seconds, self.adversarial_examples.take_seconds()
        self._images, self._seconds = 0, 0.0
        return taken

    def _log(self, pl_module: LightningModule, *, on_step: bool) -> None:
        images, seconds, attack = self._take(pl_module)
        if not images or not seconds:
            return
        values = {
            "speed/images_per_second": images / seconds,
            "speed/attack_share": min(1.0, attack / seconds),
        }
        pl_module.log_dict(values, on_step=on_step, on_epoch=not on_step, batch_size=1)
