"""Checkpoints that survive a crash: `best` by validation, `last` to resume from, and epochs to keep."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from mi_at.regularizers.base import TrainingRule

INTERRUPTED = 143
"""Exit status after a preemption signal, with `last.ckpt` saved: 128 + SIGTERM, as shells report it."""
BY_HAND = 130
"""The same after Ctrl-C: 128 + SIGINT."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, and load nothing but tensors and plain data."""

    HELD = ".held"
    """Ending of a checkpoint that does not count yet."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write beside the target, then rename over it.

        Raises:
            OSError: a full disk or an unwritable folder; the previous file is intact.
        """
        target = Path(path)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            target = target.with_name(target.name.removesuffix(self.HELD))
            kept = "the previous one is intact" if target.exists() else "there was none before"
            # torch reports a full disk as a RuntimeError of its own, in the context of what happened.
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"could not save {target}: {why}; {kept}. Free space or choose another run_dir=") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; pickled code is refused."""
        return dict(super().load_checkpoint(path, map_location, weights_only=True))


class Best(ModelCheckpoint):
    """`best.ckpt`: highest robust accuracy on validation, the worst of the selection attacks, on the weights served.

    It is written at the end of a validation: at the end of the epoch an average of the weights has already moved on.

    Attributes:
        last_score: of the last validation, in percent; None before the first.
    """

    last_score: float | None = None

    def __init__(self, folder: str | Path) -> None:
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor="val/robust",
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and note the score."""
        if (score := trainer.callback_metrics.get("val/robust")) is not None:
            self.last_score = float(score)
        super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the last score."""
        return {**super().state_dict(), "last_score": self.last_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score back, also in a run folder that was moved."""
        state_dict = dict(state_dict)
        self.last_score = state_dict.pop("last_score", None)
        here = str(Path(str(self.dirpath)) / "best.ckpt")
        paths = {name: here for name in ("best_model_path", "kth_best_model_path") if state_dict[name]}
        scores = {here: state_dict["best_model_score"]} if state_dict["best_k_models"] else {}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": scores})


class Last(Checkpoint):
    """`last.ckpt`: after every epoch and every n steps; what a run resumes from.

    Within an epoch it is written after a step that is not the epoch's last: there the epoch's end follows anyway, and
    Lightning could not tell afterwards whether validation had run.

    Lightning logs a step, or an epoch, after the hook in which it can be saved. What is written there counts from the
    next hook on: a run that is killed between the two resumes from the file before, and its metrics lack no row.

    Args:
        folder: the run folder.
        every_n_steps: also within an epoch; 0: only at its end.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int = 200) -> None:
        self.path, self.every_n_steps = Path(folder) / "last.ckpt", every_n_steps
        self._held: Path | None = None

    def save(self, trainer: Trainer) -> None:
        """Write a file that does not count yet."""
        held = self.path.with_name(f"{self.path.name}{AtomicCheckpointIO.HELD}")
        trainer.save_checkpoint(held)
        self._held = held if trainer.is_global_zero else None

    def release(self) -> None:
        """Let what was written count."""
        if self._held is not None:
            self._held.replace(self.path)
            self._held = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch before is logged."""
        self.release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The step before is logged."""
        self.release()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch."""
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch."""
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is logged."""
        self.release()


class KeepEpochs(Checkpoint):
    """`epoch_076.ckpt` and so on: the weights after chosen epochs, counted from 1 in the paper's run.

    Args:
        folder: the run folder.
        epochs: finished epochs to keep; scaled as milestones are.
    """

    def __init__(self, folder: str | Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = Path(folder), tuple(epochs)
        if any(epoch < 1 for epoch in self.epochs):
            raise ValueError(f"keep_epochs={list(epochs)}: epochs are counted from 1")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this epoch is kept."""
        finished = trainer.current_epoch + 1
        for epoch in self.epochs:
            if cast(TrainingRule, pl_module).scaled(epoch) == finished:
                trainer.save_checkpoint(self.folder / f"epoch_{epoch:03d}.ckpt")


class Preemption(Callback):
    """On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 save `last.ckpt` after the step in progress and exit with status 143.

    After Ctrl-C the status is 130, as shells have it, and a second one ends the run at once. Who listened before the
    run did is told then: submitit puts its job back into Slurm's queue.

    It leaves one hook later than it saves, so that what belongs to the step or the epoch is logged and done.

    Args:
        last: the callback whose file is written; it saves the ends of epochs itself.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, last: Last) -> None:
        self.last = last
        self._received: signal.Signals | None = None
        self._leaving = False
        self._previous: dict[signal.Signals, Any] = {}
        self._outer: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note who listens, before Lightning does."""
        self._outer = {number: signal.getsignal(number) for number in self.SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; in place of Lightning's own handlers, which it installs before and which communicate."""
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, if the last epoch ended so."""
        self._leave(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, if the last step ended so."""
        self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if a signal has come; processes agree every ten steps."""
        if trainer.is_last_batch or (trainer.world_size > 1 and batch_idx % 10):  # an epoch's end is saved anyway
            return
        if self._agreed(trainer):
            self.last.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after a step."""
        self._agreed(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening; before Lightning takes its own handlers back, or they would swallow later signals."""
        self._restore()
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._restore()

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self._received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            print("\ninterrupted: saving after this step; once more to end at once", file=sys.stderr, flush=True)

    def _agreed(self, trainer: Trainer) -> bool:
        self._leaving = trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)
        return self._leaving

    def _leave(self, trainer: Trainer) -> None:
        if not self._leaving:
            return
        self.last.release()
        if trainer.is_global_zero:
            print(f"preempted: saved {self.last.path}; continue with resume=true", flush=True)
        status = INTERRUPTED if self._received != signal.SIGINT else BY_HAND
        if self._received not in (None, signal.SIGINT) and callable(tell := self._outer.get(self._received)):
            tell(self._received, None)
        # Other ranks end quietly: Lightning kills the main process when a child fails.
        raise SystemExit(status if trainer.is_global_zero else 0)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
