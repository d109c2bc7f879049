"""The commands as users run them: each in a process of its own, forked from one that has imported everything.

Starting Python and importing torch, Lightning and Hydra costs seconds, a fork some milliseconds. What runs is the
command's own `main`, with its arguments, working directory, streams, signals and exit status.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TINY = (
    "budget=smoke",
    "dataset.train_size=60",
    "dataset.val_size=20",
    "dataset.batch_size=20",
    "model.width=0.25",
    "attack.steps=2",
    "evaluation.n=10",
    "trainer.enable_progress_bar=false",
)
"""A run of a second: 2 epochs of 3 batches, on real digits."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mi_at.train", "mi_at.evaluate"])


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status as a shell reports it, and what it said."""

    code: int
    out: str
    err: str


class Command:
    """A command that is running; its streams go to files, so that it never waits for a reader."""

    def __init__(self, folder: Path, *arguments: str, module: str = "mi_at.train", **environment: str) -> None:
        self._folder = folder
        self._streams = [folder / f".{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        self._process = _context.Process(
            target=_run, args=(module, arguments, str(folder), [str(path) for path in self._streams], environment)
        )
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def until(self, condition: Callable[[], bool], *, timeout: float = 120.0) -> None:
        """Wait for something the command does."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.is_alive(), f"ended before: {self.wait()}"
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.002)

    def wait(self, *, timeout: float = 300.0) -> Done:
        """How it ended."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        out, err = (path.read_text() if path.is_file() else "" for path in self._streams)
        for path in self._streams:
            path.unlink(missing_ok=True)
        code = self._process.exitcode
        assert code is not None
        return Done(code if code >= 0 else 128 - code, out, err)


def command(folder: Path, *arguments: str, module: str = "mi_at.train", **environment: str) -> Done:
    """Run a command in a folder to its end; further keywords are environment variables."""
    return Command(folder, *arguments, module=module, **environment).wait()


def _run(
    module: str, arguments: tuple[str, ...], folder: str, streams: list[str], environment: Mapping[str, str]
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
