"""Killed at any moment and resumed, a run ends with the bits of the run that was never killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import Command, Done, command, tiny

SIX_STEPS = (  # an epoch; 3 epochs; last.ckpt also in the middle of each
    "dataset.train_size=60",
    "dataset.batch_size=10",
    "optim.epochs=3",
    "save_every_n_steps=4",
    "trainer.log_every_n_steps=1",
    "run_dir=run",
    "+callback.interrupt._target_=tests.own.Interrupt",
)
DROPOUT = "model._target_=tests.own.DropoutNet"
SEARCH = ("defense=mma", "defense.variant=full", "defense.max_margin=0.3")
FAST_AVERAGE = ("callback=ema", "callback.ema.decay=0.5", "callback.ema.warmup=true")
UNTIMED = ("hours_of_last_start", "seconds", "date")

KILLED: dict[str, tuple[tuple[str, ...], str]] = {
    "before the first checkpoint": ((), "train_batch_end:3"),
    "after a checkpoint in the middle of an epoch": ((), "train_batch_end:5"),
    "in validation": ((), "validation_batch_start:12"),
    "at the end of an epoch, before it is saved": ((), "train_epoch_end:12"),
    "while an epoch's end is being saved": ((), "save_checkpoint:12"),
    "between a step and its row": ((), "log_step:3"),
    "between an epoch's end and its row": ((), "log_epoch:11"),
    "between the last epoch's end and its row": ((), "log_epoch:17"),
    "right after an epoch's end": ((), "train_epoch_start:6"),
    "dropout and batch norm": ((DROPOUT,), "train_batch_end:11"),
    "ema": ((DROPOUT, *FAST_AVERAGE), "train_batch_end:11"),
    "swa": ((DROPOUT, "callback=swa", "callback.swa.start_epoch=40"), "train_batch_end:17"),
    "margin search": (SEARCH, "train_batch_end:11"),
    "weight perturbation and a schedule": (
        ("defense=trades_awp", "callback.awp.warmup_epochs=0", "optim=adam", "optim.schedule=one_cycle"),
        "train_batch_end:11",
    ),
    "augmentation": (("dataset.augment=true", "dataset.pad=1", "optim.schedule=cosine"), "train_batch_end:11"),
}


def run(folder: Path, *overrides: str, interrupt: str = "") -> Done:
    folder.mkdir(exist_ok=True)
    return command(folder, *tiny(*SIX_STEPS, *overrides), INTERRUPT=interrupt)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the run with some overrides that nothing interrupted; made once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(overrides: tuple[str, ...]) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("uninterrupted")
            done = run(made[overrides], *overrides)
            assert done.code == 0, done.err
        return made[overrides]

    return folder


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(folder / "run" / f"{name}.ckpt", weights_only=True))


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal down to the bits, tensors and all."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
    else:
        assert one == other, where


def measured(folder: Path) -> dict[str, dict[str, str]]:
    """Loss terms and accuracies by step, as metrics.csv has them; how fast it went differs."""
    rows = list(csv.DictReader((folder / "run/metrics.csv").open()))
    assert len({row["step"] for row in rows}) == len(rows), "a step has one row"
    kept = [key for key in rows[0] if key.startswith(("train/", "val/", "test/"))]
    assert {"train/clean", "train/robust"} <= set(kept)
    return {row["step"]: {key: row[key] for key in kept} for row in rows}


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last", "best"):
        a, b = checkpoint(one, name), checkpoint(other, name)
        del a["mi_at"]["config"], b["mi_at"]["config"]  # one says resume=true
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "epoch", "global_step", "mi_at"):
            assert_same(a[part], b[part], f"{name}/{part}")
        for part in ("current_model_state", "averaging_state", "mma_margins"):
            assert_same(a.get(part), b.get(part), f"{name}/{part}")
    assert measured(one) == measured(other), "earlier rows are kept, and those of steps taken again replaced"
    records = [json.loads((folder / "run/record.json").read_text()) for folder in (one, other)]
    assert records[0]["checkpoint"] == records[1]["checkpoint"]
    assert [row["correct"] for row in records[0]["attacks"]] == [row["correct"] for row in records[1]["attacks"]]
    trainings = [{k: v for k, v in record["training"].items() if k not in UNTIMED} for record in records]
    assert trainings[0] == trainings[1]
    outcomes = [np.load(folder / "run/record.npz") for folder in (one, other)]
    assert all(np.array_equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0].files)


@pytest.mark.parametrize("case", KILLED)
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, uninterrupted: Any, case: str) -> None:
    overrides, point = KILLED[case]
    folder = tmp_path / "killed"
    killed = run(folder, *overrides, interrupt=f"KILL:{point}")
    assert killed.code == 137
    assert not (folder / "run/record.json").exists()
    resumed = run(folder, *overrides, "resume=true")
    assert resumed.code == 0, resumed.err
    assert_same_run(folder, uninterrupted(overrides))


def test_killed_again_and_again(tmp_path: Path, uninterrupted: Any) -> None:
    for point in ("train_batch_end:2", "train_batch_end:7", "validation_batch_start:12", "train_batch_end:15"):
        assert run(tmp_path / "run_", "resume=true", interrupt=f"KILL:{point}").code == 137
    assert run(tmp_path / "run_", "resume=true").code == 0
    assert_same_run(tmp_path / "run_", uninterrupted(()))


@pytest.mark.parametrize(
    ("name", "point", "saved"),
    [
        ("INT", "train_batch_start:7", 8),
        ("TERM", "train_batch_start:7", 8),
        ("USR1", "validation_batch_start:12", 12),
        ("TERM", "train_batch_start:11", 12),
        ("TERM", "train_batch_start:17", 18),
    ],
    ids=[
        "Ctrl-C in a step",
        "SIGTERM in a step",
        "SIGUSR1 in validation",
        "SIGTERM in the last step of an epoch",
        "in the last step",
    ],
)
def test_a_preempted_run_saves_and_goes_on(
    tmp_path: Path, uninterrupted: Any, name: str, point: str, saved: int
) -> None:
    preempted = run(tmp_path, interrupt=f"{name}:{point}")
    assert preempted.code == (130 if name == "INT" else 143)
    assert "preempted: saved run/last.ckpt; continue with resume=true" in preempted.out
    assert checkpoint(tmp_path, "last")["global_step"] == saved
    assert not (tmp_path / "run/record.json").exists()
    assert run(tmp_path, "resume=true").code == 0
    assert_same_run(tmp_path, uninterrupted(()))


def test_a_run_killed_from_outside(tmp_path: Path, uninterrupted: Any) -> None:
    """At a moment nobody chose."""
    going = Command(tmp_path, *tiny(*SIX_STEPS), INTERRUPT="")
    going.until((tmp_path / "run/last.ckpt").is_file)
    going.send(9)
    assert going.wait().code == 137
    assert run(tmp_path, "resume=true").code == 0
    assert_same_run(tmp_path, uninterrupted(()))


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    assert run(tmp_path, interrupt="KILL:train_batch_end:5").code == 137
    before = (tmp_path / "run/last.ckpt").read_bytes()
    refused = run(tmp_path)
    assert refused.code == 1
    assert "run holds an unfinished run of this configuration: resume=true continues it" in refused.err
    assert (tmp_path / "run/last.ckpt").read_bytes() == before


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    assert run(tmp_path, interrupt="KILL:train_batch_end:5").code == 137
    last = tmp_path / "run/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    refused = run(tmp_path, "resume=true")
    assert refused.code == 1
    assert "checkpoint run/last.ckpt is truncated or damaged" in refused.err
    assert "use another one, or remove run to train again" in refused.err
    assert last.stat().st_size == 1000


def test_a_finished_run_is_recognised(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.code == 0, first.err
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for overrides in ((), ("resume=true",), ("trainer.enable_progress_bar=true", "logger=none", "tags=[again]")):
        again = run(tmp_path, *overrides)
        assert again.code == 0, again.err
        assert "run (finished)" in again.out
        table = first.out[first.out.index("attack  norm") : first.out.index("\nrun folder")]
        assert table.strip() in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files


def test_what_was_trained_is_not_trained_again_for_another_evaluation(tmp_path: Path) -> None:
    assert run(tmp_path).code == 0
    last = (tmp_path / "run/last.ckpt").stat().st_mtime_ns
    other = run(tmp_path, "select=last", "evaluation.n=5")
    assert other.code == 0, other.err
    assert "run (trained)" in other.out
    assert (tmp_path / "run/last.ckpt").stat().st_mtime_ns == last
    records = sorted((tmp_path / "run").rglob("record.json"))
    assert [json.loads(path.read_text())["attacks"][0]["n"] for path in records] == [5, 10]


def test_a_run_killed_in_its_evaluation_only_evaluates(tmp_path: Path, uninterrupted: Any) -> None:
    assert run(tmp_path).code == 0
    (tmp_path / "run/record.json").unlink()
    (tmp_path / "run/record.npz").unlink()
    again = run(tmp_path)
    assert again.code == 0, again.err
    assert_same_run(tmp_path, uninterrupted(()))


def test_a_signal_ends_the_evaluation_too(tmp_path: Path) -> None:
    """What was trained is complete then: there is nothing to save."""
    attacks = ("evaluation=quick", "evaluation.n=360", "evaluation.autoattack_n=360", "attack.steps=5")
    going = Command(tmp_path, *tiny("run_dir=run", *attacks))
    going.until((tmp_path / "run/trained.json").is_file)
    going.send(15)
    assert going.wait().code == 143
    assert not (tmp_path / "run/record.json").exists()
    again = command(tmp_path, *tiny("run_dir=run", "attack.steps=5"))
    assert again.code == 0, again.err
    assert "run (trained)" in again.out


def test_the_wandb_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    assert run(tmp_path, "logger=wandb", interrupt="KILL:train_batch_end:5").code == 137
    resumed = run(tmp_path, "logger=wandb", "resume=true")
    assert resumed.code == 0, resumed.err
    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(parts) == 2
    ids = {part.name.split("-", 3)[3] for part in parts}
    assert len(ids) == 1, "both parts belong to one run"
