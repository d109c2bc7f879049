"""Run folders that several processes share: who has one, who must come back, and what outlives a crash."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from mi_at.results import runs
from mi_at.results.runs import LAST, TRAINED, Run, RunBusyError, find_run, let_go_of_all, wait_for_others
from tests.results.makers import NAMES, config

CONFIG = {**config(), "choices": NAMES}


def find(folder: Path, **options: Any) -> Run:
    return find_run(CONFIG, key="run", parent=folder, **options)


def hold(folder: str, ready: Any, release: Any) -> None:
    """Another process: it keeps the run until told to let go."""
    run = find(Path(folder), resume=True)
    run.make(CONFIG)
    ready.set()
    release.wait(60)
    os._exit(9)  # as a crash would


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Another process that keeps the run in tmp_path, and the event that makes it die."""
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready, release))
    process.start()
    assert ready.wait(60)
    yield process, release
    release.set()
    process.join(60)


def test_a_run_that_another_process_keeps_is_busy_until_that_dies(tmp_path: Path, other: Any) -> None:
    process, release = other
    run = find(tmp_path)
    with pytest.raises(RunBusyError, match="another process is training in") as raised:
        run.make(CONFIG)
    assert Path(raised.value.folder) == run.folder.resolve()
    waited = threading.Thread(target=wait_for_others, args=(raised.value.folder,))
    waited.start()
    waited.join(0.3)
    assert waited.is_alive(), "it waits while the other lives"
    release.set()
    process.join(60)
    waited.join(60)
    assert not waited.is_alive()
    run.make(CONFIG)
    run.let_go()


def test_let_go_lets_others_have_it(tmp_path: Path) -> None:
    run = find(tmp_path)
    run.make(CONFIG)
    run.make(CONFIG)  # one's own twice is no quarrel
    taken = os.open(run.folder, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            runs.fcntl.flock(taken, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)
        run.let_go()
        run.let_go()
        runs.fcntl.flock(taken, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)
    finally:
        os.close(taken)


def test_let_go_of_all(tmp_path: Path) -> None:
    one = find_run(CONFIG, key="one", parent=tmp_path)
    two = find_run(CONFIG, key="two", parent=tmp_path)
    for run in (one, two):
        run.make(CONFIG)
    let_go_of_all()
    for run in (one, two):
        taken = os.open(run.folder, os.O_RDONLY)
        runs.fcntl.flock(taken, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)
        os.close(taken)


@pytest.mark.parametrize(("before", "files"), [("new", (TRAINED,)), ("new", (LAST,)), ("resumed", (TRAINED,))])
def test_a_run_that_another_has_brought_further_meanwhile_is_not_done_twice(
    tmp_path: Path, before: str, files: tuple[str, ...]
) -> None:
    if before == "resumed":
        first = find(tmp_path)
        first.make(CONFIG)
        first.let_go()
        (first.folder / LAST).touch()
    run = find(tmp_path, resume=True)
    assert run.state == before
    run.folder.mkdir(exist_ok=True)
    for name in files:
        (run.folder / name).write_text("{}")
    with pytest.raises(RunBusyError, match=r"has trained in .* meanwhile: start this one again"):
        run.make(CONFIG)
    taken = os.open(run.folder, os.O_RDONLY)
    runs.fcntl.flock(taken, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)  # it was let go
    os.close(taken)


def test_busy_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RunBusyError("who", "where")))
    assert (str(error), error.folder) == ("who", "where")


def test_there_is_nothing_to_wait_for_where_there_is_no_folder(tmp_path: Path) -> None:
    wait_for_others(tmp_path / "none")
