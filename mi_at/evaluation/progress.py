"""Progress of an evaluation: a bar in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

PLAIN_EVERY = 30.0  # seconds between plain lines within one attack


class Progress:
    """Counts attacked images and shows the current robust accuracy.

    Args:
        total: images times attacks.
        enabled: False shows nothing.
        stream: where to; standard error by default, so that tables on standard output stay clean.
    """

    def __init__(self, total: int, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._bar: Any = _bar(self._stream) if enabled and self._stream.isatty() else None
        self._total = total
        self._done = 0
        self._task: Any = None
        self._name = ""
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("evaluation", total=self._total, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str) -> None:
        """The next attack begins."""
        self._name, self._last_line = name, time.monotonic()
        self._update("")

    def advance(self, images: int, correct: int, seen: int) -> None:
        """So many more images are done; of `seen` images of this attack, `correct` are still right."""
        self._done += images
        status = f"{100 * correct / seen:.1f} % right of {seen}" if seen else ""
        self._update(status)
        self._plain(status)

    def note(self, status: str) -> None:
        """Something happened within an attack that took all its images at once."""
        self._update(status)
        self._plain(status)

    def end(self, accuracy: float, n: int, seconds: float) -> None:
        """The attack is over."""
        if self._enabled and self._bar is None:
            self._print(f"{100 * accuracy:.1f} % right of {n} ({seconds:.1f} s)")

    def _update(self, status: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._name, status=status)

    def _plain(self, status: str) -> None:
        if self._enabled and self._bar is None and time.monotonic() - self._last_line >= PLAIN_EVERY:
            self._last_line = time.monotonic()
            self._print(status)

    def _print(self, status: str) -> None:
        self._stream.write(f"evaluation: {self._name}: {status}\n")
        self._stream.flush()


def _bar(stream: TextIO) -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
    except ImportError:  # plain lines then
        return None
    return RichProgress(
        TextColumn("[bold]{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
