"""A sweep of a table that is killed again and again, or started twice: every cell is done, and none twice."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.commands import Command, command
from tests.sweeps import DEFENSES, eight_cells, records

pytestmark = pytest.mark.slow
KILLS = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a sweep that nothing disturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    done = command(folder, *eight_cells(folder))
    assert done.code == 0, done.err
    assert len(records(folder)) == len(DEFENSES)
    return folder, time.monotonic() - began


def finished(folder: Path) -> dict[Path, int]:
    """What says that a training or an evaluation has come to its end, and when."""
    ends = [path for name in ("trained.json", "record.json") for path in folder.glob(f"runs/*/{name}")]
    return {path: path.stat().st_mtime_ns for path in ends}


def test_killed_ten_times_a_sweep_ends_with_the_same_records_and_does_nothing_twice(
    uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    arguments = eight_cells(tmp_path)
    draw = random.Random(0)
    kills, before = 0, finished(tmp_path)
    while kills < KILLS:
        sweep = Command(tmp_path, *arguments)
        # A new start has begun when it looks at the first cell; from there on it gets about a cell and a half at most.
        sweep.until(lambda running=sweep: "run " in running.said())
        time.sleep(draw.uniform(0, 1.5 * seconds / len(DEFENSES)))
        sweep.send(signal.SIGKILL)
        assert sweep.wait().code == 128 + signal.SIGKILL, "killed before its end"
        kills += 1
        now = finished(tmp_path)
        assert {path: now.get(path) for path in before} == before, "nothing that was finished is done again"
        before = now
    assert 0 < len(before) < 2 * len(DEFENSES), "the kills came in its midst"
    done = command(tmp_path, *arguments)
    assert done.code == 0, done.err
    now = finished(tmp_path)
    assert {path: now.get(path) for path in before} == before
    assert records(tmp_path) == records(reference)
    assert not list(tmp_path.rglob("*.damaged"))


def test_two_sweeps_at_once_share_the_cells(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    arguments = eight_cells(tmp_path)
    sweeps = [Command(tmp_path, *arguments) for _ in range(2)]
    ended = [sweep.wait(timeout=900) for sweep in sweeps]
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    shares = [done.out.count("run folder: ") for done in ended]
    assert sum(shares) == len(DEFENSES), "each cell was brought to its end once"
    assert min(shares) > 0, "both had a part in it"
    assert records(tmp_path) == records(uninterrupted[0])
