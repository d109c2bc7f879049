"""One progress bar over the whole training in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

LINES = 40  # a long training prints about so many
SECONDS, STEPS = 0.5, 20  # between two looks at the loss; the steps where looking waits for a GPU
FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}, {remaining} left]"


class Progress(ProgressBar):
    """What is done, how well, and how long it takes: epoch, loss, clean and robust accuracy on validation.

    The loss is the mean over the epoch so far; accuracies are in percent, of the last validation. The time
    left includes validations, in proportion.

    Args:
        stream: where to; standard error by default, so that tables on standard output stay clean.
    """

    def __init__(self, *, stream: TextIO | None = None) -> None:
        super().__init__()
        self._enabled = True
        self._given = stream
        self._bar: Any = None
        self._stream: TextIO = sys.stderr
        self._total: float = math.inf
        self._loss: Tensor | None = None
        self._steps = 0
        self._started = self._looked = 0.0
        self._looked_at = 0
        self._accuracies = ""
        self._validated = -1

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning asks for it on all processes but the first."""
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar; Lightning's own signature."""
        if self._bar is not None:
            self._bar.write(sep.join(map(str, args)), file=self._stream)
        elif self._enabled:
            print(*args, sep=sep, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where the run stands."""
        if not self._enabled:
            return
        self._stream = self._given or sys.stderr
        self._total = trainer.estimated_stepping_batches
        self._begin_epoch()
        if self._stream.isatty():
            total = None if math.isinf(self._total) else int(self._total)
            wide = _columns(self._stream) > 0
            self._bar = tqdm(
                total=total,
                initial=trainer.global_step,
                desc=self._epoch(trainer),
                file=self._stream,
                bar_format=FORMAT if total else None,
                dynamic_ncols=wide,
                ncols=None if wide else 80,  # tqdm shows nothing in a terminal that says it has no columns
                mininterval=SECONDS,
                smoothing=0,  # the mean speed, so that validations are in the time left
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch, and start its mean and its clock."""
        self._begin_epoch()
        self._describe(self._epoch(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on; look at the loss now and then."""
        if not self._enabled:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
            self._steps += 1
        if self._bar is not None:
            if self._due(trainer):
                self._bar.set_postfix_str(self._status(trainer, self._accuracies), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the bar stands still."""
        self._describe(f"{self._epoch(trainer)}, validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the accuracies."""
        metrics = trainer.callback_metrics
        read = {name: metrics.get(f"val/{name}") for name in ("clean", "robust")}
        self._accuracies = "  ".join(f"{name} {value:.1f}" for name, value in read.items() if value is not None)
        self._validated = trainer.current_epoch
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(trainer, self._accuracies), refresh=False)
        self._describe(self._epoch(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line, where there is no bar."""
        if not self._enabled or self._bar is not None or not self._prints(trainer):
            return
        accuracies = self._accuracies if self._validated == trainer.current_epoch else ""
        seconds = f"{time.monotonic() - self._started:.1f} s"
        parts = [self._epoch(trainer), self._status(trainer, accuracies), seconds]
        self._stream.write("  ".join(part for part in parts if part) + "\n")
        self._stream.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar where it stopped; what follows starts on a line of its own."""
        self._close()

    def _begin_epoch(self) -> None:
        self._loss, self._steps, self._started = None, 0, time.monotonic()

    def _epoch(self, trainer: Trainer) -> str:
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        return f"epoch {trainer.current_epoch + 1}{of}"

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=True)

    def _due(self, trainer: Trainer) -> bool:
        """Whether it is time to look; on a GPU looking waits for it, and is rarer."""
        now, step = time.monotonic(), trainer.global_step
        waits = self._loss is not None and self._loss.device.type != "cpu"
        if now - self._looked < SECONDS or (waits and step - self._looked_at < STEPS):
            return False
        self._looked, self._looked_at = now, step
        return True

    def _status(self, trainer: Trainer, accuracies: str) -> str:
        parts = [accuracies] if accuracies else []
        if self._loss is not None:
            # Lightning divides the loss by accumulated batches; a defense multiplies it by the processes.
            scale = trainer.accumulate_grad_batches / trainer.world_size / self._steps
            parts.insert(0, f"loss {float(self._loss) * scale:.3f}")
        return "  ".join(parts)

    def _prints(self, trainer: Trainer) -> bool:
        """The first epoch, the last, and between them so many that about `LINES` are printed."""
        epochs = self._total / max(1.0, trainer.num_training_batches / trainer.accumulate_grad_batches)
        finished = trainer.current_epoch + 1
        stride = 1 if math.isinf(epochs) else max(1, math.ceil(epochs / LINES))
        last = trainer.should_stop or trainer.global_step >= self._total
        return finished == 1 or finished % stride == 0 or last

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 0 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0
