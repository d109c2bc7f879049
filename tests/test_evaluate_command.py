"""python -m mi_at.evaluate: the numbers of the end of training again, other attacks, other places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mi_at.results.records import Record, read_record
from tests.commands import Done, command, tiny

QUICK = ("evaluation=quick", "evaluation.n=10", "evaluation.autoattack_n=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    done = command(folder, *tiny("run_dir=run", "optim.epochs=8", "dataset.train_size=200", *QUICK))
    assert done.code == 0, done.err
    return folder / "run"


def evaluate(folder: Path, *overrides: str) -> Done:
    return command(folder, *overrides, module="mi_at.evaluate")


def record_of(done: Done, folder: Path) -> tuple[Path, Record]:
    """The record, where the header says it is."""
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("  record ")]
    path = folder / line.split()[1]
    return path, read_record(path)


def test_the_numbers_are_those_of_the_end_of_training(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.ckpt", tmp_path / "best.ckpt")
    path, again = record_of(evaluate(tmp_path, "checkpoint=best.ckpt", *QUICK), tmp_path)
    first = read_record(trained / "record.json")
    assert path.parent.parent == tmp_path / "evaluations"
    assert path.parent.name.startswith("best-quick-")
    assert [(row.name, row.n, row.correct, row.eps) for row in again.attacks] == [
        (row.name, row.n, row.correct, row.eps) for row in first.attacks
    ]
    one, other = np.load(trained / "record.npz"), np.load(path.with_suffix(".npz"))
    assert one.files == other.files
    assert all(np.array_equal(one[name], other[name]) for name in one.files)
    assert again.checkpoint == first.checkpoint
    assert again.config_hash == first.config_hash
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.ckpt", "evaluations"]


def test_another_evaluation_lies_beside_it(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir() if path.is_file()}
    paths = set()
    for options in (QUICK, ("evaluation=none",), (*QUICK, "evaluation.eps=0.05"), (*QUICK, "evaluation.seed=1")):
        path, record = record_of(evaluate(trained.parent, "checkpoint=run/last.ckpt", *options), trained.parent)
        paths.add(path)
        assert path.parent.parent == trained / "evaluations"
        assert record.checkpoint["rule"] == "last"
        assert record.names["evaluation"] == options[0].partition("=")[2]
    assert len(paths) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_smaller_ball_is_easier(trained: Path, tmp_path: Path) -> None:
    found = []
    for eps in ("0", "0.02", "80/255"):
        options = ("evaluation=quick", "evaluation.n=40", f"evaluation.eps={eps}", f"output={tmp_path}")
        _, record = record_of(evaluate(trained, "checkpoint=best.ckpt", *options, "evaluation.autoattack_n=1"), trained)
        found.append(record["pgd_20"].accuracy)
        clean = record["clean"].accuracy
    assert found[0] == clean
    assert found == sorted(found, reverse=True)
    assert found[2] < found[0]


def test_output_and_data_from_elsewhere(trained: Path, tmp_path: Path) -> None:
    """The folder of the data is the machine's, not the checkpoint's."""
    done = evaluate(
        trained.parent, "checkpoint=run/best.ckpt", f"output={tmp_path}", "dataset.root=elsewhere", "evaluation=none"
    )
    path, record = record_of(done, trained.parent)
    assert path.parent.parent == tmp_path
    assert record.key == "mimae-digits-cnn_tiny-s0"
    assert list(json.loads(path.read_text())["tags"]) == ["tags", "group"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("checkpoint=run/best.ckpt", "device=cuda:98"), ("device=cuda:98", "this machine has cpu")),
        (("checkpoint=run/best.ckpt", "evaluation=no_such"), ("evaluation=no_such: expected one of", "quick")),
        (("checkpoint=run/best.ckpt", "evaluation.n=1000"), ("n=1000", "360")),
        (("checkpoint=run/best.ckpt", "evaluation.eps=8"), ("eps=8", "did you mean 8/255?")),
        (("checkpoint=run/best.ckpt", "eps=8/255"), ("unknown key eps", "evaluation")),
        (("checkpoint=run/best.ckpt", "dataset.rot=a"), ("unknown key dataset.rot", "did you mean root?")),
        ((), ("checkpoint",)),
    ],
)
def test_what_is_wrong_is_refused(trained: Path, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = set(trained.parent.rglob("*"))
    done = evaluate(trained.parent, *overrides)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert set(trained.parent.rglob("*")) == before
