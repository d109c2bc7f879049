"""Checkpoints: written whole or not at all, nothing but plain data in them, and when each of them is written."""

from __future__ import annotations

import contextlib
import csv
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from mi_at import io
from mi_at.callbacks.checkpoints import INTERRUPTED, AtomicCheckpointIO, Best, KeepEpochs, Last, Preemption
from mi_at.data.loader import DeviceLoader, ImageStore
from mi_at.defenses.standard_at import StandardAT
from mi_at.optim import SGD
from mi_at.regularizers.base import Context, Regularizer, Views
from mi_at.results import loggers
from tests.callbacks import fits


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- one file
@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_saves_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3), "epoch": 2}, path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert found["epoch"] == 2
    assert found["weights"].tolist() == [0, 1, 2]
    assert names(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_written_whole_is_not_written(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "last.ckpt"
    if there:
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes() if there else None
    kept = "the previous one is intact" if there else "there was none before"
    with files_of_at_most(10_000), pytest.raises(OSError, match=rf"could not save .*last.ckpt: .*too large; {kept}"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert names(tmp_path) == (["last.ckpt"] if there else [])
    assert (path.read_bytes() if there else None) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not save .*; there was none before. Free space or choose another"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "file/last.ckpt")


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("last.ckpt", weights_only=False)  # what it is asked does not matter
    assert names(tmp_path) == ["last.ckpt"]


# ---------------------------------------------------------------- when
class Told(StandardAT):
    """Validation accuracies as told, whatever the network does."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = scores

    def on_validation_epoch_end(self) -> None:
        self.log("val/robust", self.scores[self.current_epoch], batch_size=1)


class Saved(Checkpoint):
    """Which steps were saved where; behind the callbacks that save."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        for path in Path(trainer.default_root_dir).glob("*.ckpt"):
            step = int(load(path)["global_step"])
            steps = self.steps.setdefault(path.name, [])
            if step not in steps:
                steps.append(step)


def test_best_is_the_highest_and_the_first_of_equals(tmp_path: Path) -> None:
    saved, best = Saved(), Best(tmp_path)
    module = fits.module(defense=Told(10.0, 30.0, 20.0, 30.0), epochs=4)
    fits.fit(tmp_path, [best, saved], epochs=4, train=2, val=1, defense=module)
    assert saved.steps == {"best.ckpt": [2, 4]}
    assert best.best_model_score == 30.0
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"], "no version counter"


def test_best_holds_what_was_validated(tmp_path: Path) -> None:
    """It is written at the end of the validation, before anything else happens to the weights."""

    class Moves(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.zero_()

    fits.fit(tmp_path, [Moves(), Best(tmp_path)], epochs=1, train=2, val=1)
    assert all(value.any() for value in load(tmp_path / "best.ckpt")["state_dict"].values())


@pytest.mark.parametrize(("every", "expected"), [(0, [5, 10]), (2, [2, 4, 5, 6, 8, 10]), (5, [5, 10]), (200, [5, 10])])
def test_last_is_written_at_the_end_of_an_epoch_and_every_n_steps(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    saved = Saved()
    fits.fit(tmp_path, [Last(tmp_path, every_n_steps=every), saved], epochs=2, train=5, val=1)
    assert saved.steps == {"last.ckpt": expected}


def test_last_is_not_written_on_the_last_step_of_an_epoch_but_after_it(tmp_path: Path) -> None:
    """There Lightning could not tell whether validation had run."""
    seen = []

    class Look(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(load(tmp_path / "last.ckpt")["global_step"])

    fits.fit(tmp_path, [Look(), Last(tmp_path, every_n_steps=1)], epochs=1, train=4, val=1)
    assert seen == [3]
    assert load(tmp_path / "last.ckpt")["global_step"] == 4


def test_epochs_to_keep_are_those_of_the_paper(tmp_path: Path) -> None:
    module = fits.module()
    module.attach(module.net, optimisation=SGD(lr=0.1, epochs=4, paper_epochs=100, schedule="constant"))
    fits.fit(tmp_path, [KeepEpochs(tmp_path, [1, 50, 76, 100])], epochs=4, train=2, val=0, defense=module)
    found = {path.name: load(path)["epoch"] + 1 for path in tmp_path.glob("*.ckpt")}
    assert found == {"epoch_001.ckpt": 1, "epoch_050.ckpt": 2, "epoch_076.ckpt": 3, "epoch_100.ckpt": 4}


def test_epochs_to_keep_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_epochs=\[0\]: epochs are counted from 1"):
        KeepEpochs(tmp_path, [0])


def test_a_moved_run_folder_keeps_its_best_score(tmp_path: Path) -> None:
    """Resumed elsewhere, a worse epoch must not replace best.ckpt."""
    there, here = tmp_path / "there", tmp_path / "here"
    first, second = (fits.module(defense=Told(50.0, 10.0), epochs=2) for _ in range(2))
    fits.fit(there, [Best(there), Last(there)], epochs=1, train=2, val=1, defense=first)
    there.rename(here)
    best, ckpt = Best(here), here / "last.ckpt"
    fits.fit(here, [best, Last(here)], epochs=2, train=2, val=1, defense=second, ckpt=ckpt)
    assert best.best_model_score == 50.0
    assert load(here / "best.ckpt")["global_step"] == 2
    assert load(here / "last.ckpt")["global_step"] == 4
    assert not there.exists()


# ---------------------------------------------------------------- preemption
class Signals(Callback):
    """Signals this process before a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("step", "saved"),
    [(1, 2), (3, 4), (11, 12)],
    ids=["in an epoch", "in the last step of an epoch", "in the last step"],
)
def test_a_signal_saves_and_ends_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, step: int, saved: int
) -> None:
    def own(*_: Any) -> None:
        """A handler from before the fit."""

    before = signal.signal(number, own)
    try:
        last = Last(tmp_path, every_n_steps=0)
        with pytest.raises(SystemExit) as end:
            fits.fit(tmp_path, [Signals(number, step), Preemption(last), last], epochs=3, train=4, val=1)
        assert end.value.code == INTERRUPTED == 143
        assert signal.getsignal(number) is own, "listening ends with the fit"
    finally:
        signal.signal(number, before)
    assert load(tmp_path / "last.ckpt")["global_step"] == saved
    assert "continue with resume=true" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "saved"), [(1, 2), (3, 4), (5, 6)])
def test_what_belongs_to_the_last_step_is_logged_and_done_before_leaving(tmp_path: Path, step: int, saved: int) -> None:
    """A resumed run takes neither again: rows of metrics, and what terms do at the end of an epoch."""

    class Counts(Regularizer):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: torch.Tensor
            self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

        def terms(self, views: Views) -> dict[str, torch.Tensor]:
            return {"counts": views.logits("clean").sum() * 0}

        def on_epoch_end(self, ctx: Context) -> None:
            self.epochs += 1

    def fit(folder: Path, *callbacks: Callback) -> dict[str, dict[str, str]]:
        module = fits.module()
        module.attach(module.net, optimisation=module.optimisation, regularizers={"counts": Counts()})
        module.context = lambda _: None  # type: ignore[assignment]
        last, options = Last(folder, every_n_steps=0), {"log_every_n_steps": 1}
        files = [loggers.csv(folder=folder)]
        with contextlib.suppress(SystemExit):
            fits.fit(
                folder,
                [*callbacks, Preemption(last), last],
                epochs=3,
                train=4,
                val=1,
                loggers=files,
                defense=module,
                options=options,
            )
        with (folder / "metrics.csv").open(newline="") as file:
            return {row["step"]: {name: row[name] for name in row if row[name]} for row in csv.DictReader(file)}

    whole, preempted = fit(tmp_path / "whole"), fit(tmp_path / "preempted", Signals(signal.SIGTERM, step))
    assert preempted == {number: row for number, row in whole.items() if int(number) < saved}
    assert len(preempted) == saved
    state = load(tmp_path / "preempted/last.ckpt")["state_dict"]
    assert state["regularizers.counts.epochs"] == saved // 4


def test_finished_epochs_are_counted(tmp_path: Path) -> None:
    """Not the one that is running."""
    seen: dict[str, list[tuple[int, int]]] = {}

    class Read(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            for path in tmp_path.glob("*.ckpt"):
                counted = io.read_checkpoint(path)
                pair = (counted.step, counted.epoch)
                if pair not in seen.setdefault(path.stem, []):
                    seen[path.stem].append(pair)

    module = fits.module(defense=Told(10.0, 20.0, 30.0))
    module.config = {part: {} for part in ("model", "dataset", "defense", "regularizer")}
    savers = [Best(tmp_path), KeepEpochs(tmp_path, [1, 2]), Last(tmp_path, every_n_steps=2)]
    trainer = fits.fit(tmp_path, [Read(), *savers], epochs=3, train=4, val=1, defense=module)
    assert seen == {
        "last": [(2, 0), (4, 1), (6, 1), (8, 2), (10, 2)],
        "best": [(4, 1), (8, 2)],
        "epoch_001": [(4, 1)],
        "epoch_002": [(8, 2)],
    }
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("last", "best", "after"):
        assert io.read_checkpoint(tmp_path / f"{name}.ckpt").epoch == 3
    cut = fits.module(defense=Told(10.0, 20.0, 30.0))
    cut.config = module.config
    fits.fit(tmp_path / "cut", [Last(tmp_path / "cut")], train=4, val=1, defense=cut, options={"max_steps": 6})
    assert io.read_checkpoint(tmp_path / "cut/last.ckpt").epoch == 1, "the second was not finished"


def test_finished_epochs_of_a_resumed_run(tmp_path: Path) -> None:
    """Resumed at the end of an epoch, then in the middle of one."""
    seen = []

    class Read(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            seen.append(io.read_checkpoint(tmp_path / "last.ckpt").epoch)

    for step in (3, 5, None):
        module, last = fits.module(), Last(tmp_path, every_n_steps=1)
        module.config = {part: {} for part in ("model", "dataset", "defense", "regularizer")}
        ckpt = tmp_path / "last.ckpt" if last.path.is_file() else None
        stop = [Signals(signal.SIGTERM, step)] if step else []
        with contextlib.suppress(SystemExit):
            callbacks = [*([Read()] if ckpt else []), *stop, Preemption(last), last]
            fits.fit(tmp_path, callbacks, val=0, defense=module, ckpt=ckpt, data=fits.Loaded(resumable(24)))
    assert seen == [1, 1, 1, 1, 1, 2, 2, 2, 2]  # a preempted one begins a last batch
    assert io.read_checkpoint(tmp_path / "last.ckpt").epoch == 3


def resumable(images: int) -> DeviceLoader:
    """The project's loader, 6 images a batch, which keeps its place."""
    pixels = torch.randint(0, 256, (images, 1, fits.SIDE, fits.SIDE), dtype=torch.uint8)
    store = ImageStore([(pixels, torch.arange(images) % fits.CLASSES)])
    return DeviceLoader(store, torch.arange(images), batch_size=6, seed=0)


def test_without_a_signal_nothing_happens(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in Preemption.SIGNALS}
    last = Last(tmp_path)
    trainer = fits.fit(tmp_path, [Preemption(last), last], epochs=2, train=2, val=1)
    assert trainer.current_epoch == 2
    assert {number: signal.getsignal(number) for number in Preemption.SIGNALS} == before
