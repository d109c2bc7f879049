"""The commands as users run them: each in a process of its own, forked from one that has imported everything.

Starting Python and importing torch, Lightning and Hydra costs seconds, a fork some milliseconds. What runs is the
command's own `main`, with its arguments, working directory, streams, signals and exit status.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
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

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status as a shell reports it, and what it said."""

    code: int
    out: str
    err: str


class Command:
    """A command that is running; its streams go to files, so that it never waits for a reader."""

    def __init__(self, folder: Path, *arguments: str, module: str = "mi_at.train", **environment: str) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self._process = FORKED.Process(
            target=_run, args=(module, arguments, str(folder), self._streams.name, environment)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def is_stopped(self) -> bool:
        """Whether it waits for SIGCONT."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def said(self) -> str:
        """What it has printed so far."""
        out = Path(self._streams.name, "out")
        return out.read_text() if out.is_file() else ""

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
        files = [Path(self._streams.name, name) for name in ("out", "err")]
        out, err = (file.read_text() if file.is_file() else "" for file in files)
        self._streams.cleanup()
        code = self._process.exitcode
        assert code is not None
        return Done(code if code >= 0 else 128 - code, out, err)


def tiny(*overrides: str) -> list[str]:
    """`TINY` with further overrides, which win; without attacks unless an evaluation is among them."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    base = [override for override in TINY if override.partition("=")[0] not in keys]
    return [*base, *([] if "evaluation" in keys else ["evaluation=none"]), *overrides]


def command(folder: Path, *arguments: str, module: str = "mi_at.train", **environment: str) -> Done:
    """Run a command in a folder to its end; further keywords are environment variables."""
    return Command(folder, *arguments, module=module, **environment).wait()


def _run(module: str, arguments: tuple[str, ...], folder: str, streams: str, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, folder)  # as `python -m` does
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(Path(streams, name), os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
