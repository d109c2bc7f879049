"""Every kind of cell runs, in seconds of budget smoke, from its command to its place in the report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mi_at import report
from mi_at.results.figures import draw
from mi_at.results.tables import Cell, Table, key_of, read_table
from tests.commands import Command, Done
from tests.conftest import DATA_FILES
from tests.data.makers import make_svhn, make_tiny_imagenet
from tests.test_tables import DEFAULT, NAMES, written

# Where torchvision finds the sets that no other test needs, and what reads a few made-up images where they are missing.
OTHER_FILES = {"svhn": "test_32x32.mat", "tiny_imagenet": "tiny-imagenet-200/wnids.txt"}
MADE_UP = {"svhn": "tests.data.makers.UncheckedSVHN", "tiny_imagenet": "tests.data.makers.ThinTinyImageNet"}
METHOD = ("defense", "regularizer", "callback", "attack", "dataset", "model")

pytestmark = pytest.mark.slow


def kinds() -> Iterator[tuple[Table, Cell]]:
    """The first cell of each method with its network and data set, and of each evaluation."""
    seen: set[tuple[str, ...]] = set()
    for name in NAMES:
        table = read_table(written("table", name)["table"])
        for cell in table.cells.values():
            chosen = {**DEFAULT, **{key_of(o): o.partition("=")[2] for o in cell.overrides}}
            own = {tuple(chosen[group] for group in METHOD), (chosen["evaluation"],)}
            if own - seen:
                seen |= own
                yield table, cell


KINDS = {f"{table.name}-{cell.name}": (table, cell) for table, cell in kinds()}


def data_set(cell: Cell) -> str:
    return next((o.partition("=")[2] for o in cell.overrides if key_of(o) == "dataset"), DEFAULT["dataset"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, so that a surrogate or a reference is trained once; with a few synthetic images."""
    place = tmp_path_factory.mktemp("smoke")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    np.savez(place / "extra.npz", image=images, label=np.arange(400) % 10)
    make_svhn(place, place, count=2300)
    make_tiny_imagenet(place, [f"n{number:08d}" for number in range(200)], tests=20)
    return place


def ask(folder: Path, *asked: str) -> Done:
    """The sweep, in its command's own process."""
    done = Command(folder, "-m", *asked, "trainer.enable_progress_bar=false").wait(timeout=3600)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mimae_t8", marks=pytest.mark.realdata("mnist")),
        pytest.param("ib_rar_t3", marks=pytest.mark.realdata("cifar10")),
    ],
)
def test_a_whole_small_table(name: str, tmp_path: Path) -> None:
    """One command fills every place of it; the same command again finds all of it done."""
    table = read_table(written("table", name)["table"])
    asked = [f"table={name}", "budget=smoke", "seed=0"]
    ask(tmp_path, *asked)
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/record.json")}
    assert len(records) == len(table.cells)
    filled = report.report([*asked, f"runs={tmp_path / 'runs'}"], [tmp_path / "runs"])
    assert filled.aside == []
    assert {line.cell for line in filled.lines} == set(table.cells)
    assert [line for line in filled.lines if list(line.values) != [0]] == []
    again = ask(tmp_path, *asked)
    assert again.out.count("(finished)") == len(table.cells)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/record.json")} == records


@pytest.mark.realdata("cifar10")
@pytest.mark.parametrize("name", ["ib_rar_f5", "ncmi_f9"])
def test_a_figure_of_what_training_leaves_is_drawn(name: str, tmp_path: Path) -> None:
    """Of files that a run writes beside its record, also in the few steps of a smoke run."""
    asked = [f"table={name}", "budget=smoke", "seed=0"]
    ask(tmp_path, *asked)
    filled = report.report([*asked, f"runs={tmp_path / 'runs'}"], [tmp_path / "runs"])
    drawn = draw(filled)
    assert drawn.startswith("<svg")
    assert "not run" not in drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_of_every_kind_runs_and_is_reported(kind: str, folder: Path) -> None:
    table, cell = KINDS[kind]
    root, name = Path(os.environ.get("MI_AT_DATA") or "data"), data_set(cell)
    file = {**DATA_FILES, **OTHER_FILES}.get(name)
    asked = [f"table={table.name}", f"table.rows=[{cell.name}]", "budget=smoke", "seed=0"]
    if file is not None and not (root / file).is_file():
        if name not in MADE_UP:
            pytest.skip(f"{name} is not in {root}")
        asked += [f"dataset.root={folder}", f"dataset._target_={MADE_UP[name]}"]
    if any(key_of(o) == "dataset.extra" for o in cell.overrides):
        asked.append(f"dataset.extra={folder / 'extra.npz'}")
    started = time.monotonic()
    ask(folder, *asked)
    print(f"{kind}: {time.monotonic() - started:.0f} s")
    filled = report.report([*asked, f"runs={folder / 'runs'}"], [folder / "runs"])
    assert filled.aside == []
    assert filled.lines
    empty = [line.attack for line in filled.lines if list(line.values) != [0]]
    assert empty == []
    assert all(0 <= value <= 100 for line in filled.lines for value in line.values.values())
