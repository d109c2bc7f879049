"""Progress of an evaluation: a bar in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

PLAIN_EVERY = 30.0  # seconds between plain lines within one attack

# Forward passes per sample that stays robust (Croce and Hein 2020 with 100 iterations and 9 targets).
_COMPONENTS = {"apgd-ce": 200, "apgd-dlr": 200, "apgd-t": 1800, "fab": 2700, "fab-t": 2700}


def cost(description: Mapping[str, Any]) -> float:
    """About how many forward passes an attack spends on a sample that stays right; for the time left only.

    Example:
        >>> cost({"attack": "pgd", "steps": 20, "restarts": 10})
        400.0
    """
    if "queries" in description and description.get("attacks"):
        return float(sum(_COMPONENTS.get(name, int(description["queries"])) for name in description["attacks"]))
    return 2.0 * max(1, int(description.get("steps") or 1)) * int(description.get("restarts") or 1)


class Progress:
    """Shows how far an evaluation is, the robust accuracy so far and the time left.

    Args:
        work: by name of attack: forward passes it may need; only their proportions matter.
        enabled: False shows nothing.
        stream: where to; standard error by default, so that tables on standard output stay clean.
    """

    def __init__(self, work: Mapping[str, float], *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._bar: Any = _bar(self._stream) if enabled and self._stream.isatty() else None
        self._work = dict(work)
        self._share = dict.fromkeys(self._work, 0.0)
        self._found = 0.0  # work of earlier sittings: it says nothing about the speed of this one
        self._started = time.monotonic()
        self._task: Any = None
        self._name = ""
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("evaluation", total=1.0, status="", left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str) -> None:
        """The next attack begins."""
        self._name, self._last_line = name, time.monotonic()
        self._show("")

    def at(self, share: float, right: int, n: int, *, note: str = "", found: bool = False) -> None:
        """How far the present attack is.

        Args:
            share: of its work, in [0, 1].
            right: of its samples, how many nothing has broken so far.
            n: its samples.
            note: what it is doing.
            found: this was done in an earlier sitting.
        """
        if found:
            self._found += (share - self._share[self._name]) * self._work[self._name]
        self._share[self._name] = share
        accuracy = f"{100 * right / n:.1f} % right of {n} so far"
        self._show(f"{note}, {accuracy}" if note else accuracy)

    def end(self, accuracy: float, n: int, seconds: float) -> None:
        """The attack is over."""
        self._share[self._name] = 1.0
        if self._enabled and self._bar is None:
            self._print(f"{100 * accuracy:.1f} % right of {n} ({seconds:.1f} s)")

    def say(self, text: str) -> None:
        """Something that must be read, at once."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(f"evaluation: {self._name}: {text}", markup=False, highlight=False)
        else:
            self._print(text)

    @property
    def left(self) -> str:
        """The time left as h:mm:ss, "?" while nothing is known of it."""
        done, total = self._done, sum(self._work.values())
        computed, passed = done - self._found, time.monotonic() - self._started
        if computed <= 0 or passed <= 0:
            return "?"
        seconds = round(passed * (total - done) / computed)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    @property
    def _done(self) -> float:
        return sum(self._work[name] * share for name, share in self._share.items())

    def _show(self, status: str) -> None:
        if self._bar is not None:
            done = self._done / max(sum(self._work.values()), 1e-9)
            self._bar.update(self._task, completed=done, description=self._name, status=status, left=self.left)
        elif self._enabled and status and time.monotonic() - self._last_line >= PLAIN_EVERY:
            self._last_line = time.monotonic()
            self._print(f"{status}, {self.left} left of everything")

    def _print(self, status: str) -> None:
        self._stream.write(f"evaluation: {self._name}: {status}\n")
        self._stream.flush()


def _bar(stream: TextIO) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:  # plain lines then
        return None
    return RichProgress(
        TextColumn("[bold]{task.description:>12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=Console(file=stream),
    )
