"""An evaluation as pieces of work: each is computed once, kept in a folder, and found again after a kill.

Several processes, on one machine or on several with a common file system, may share a folder: a piece belongs to the
process that holds its lock, and the operating system lets go of the lock when the process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mi_at.attacks.packing import Kept
from mi_at.evaluation.outcomes import EvaluationError

VERSION = 1  # of what a piece holds; another one is never read

_SECONDS = "seconds"


class Pieces:
    """Finished pieces of an evaluation, in a folder or in memory.

    Args:
        folder: where; made if it is not there. None: in memory, for this process alone.

    Attributes:
        seconds: of computing, of all pieces that were asked for, whoever computed them.

    Raises:
        EvaluationError: the folder cannot be written, or the system has no locks of this kind.

    Example:
        >>> pieces = Pieces(None)
        >>> for number, kept in pieces.run(["a", "b"], lambda number: {"half": torch.tensor(number / 2)}):
        ...     print(number, kept["half"].item())
        0 0.0
        1 0.5
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seconds = 0.0
        self._memory: dict[str, Kept] = {}
        if folder is None:
            return
        try:
            import fcntl  # noqa: F401
        except ImportError as error:
            raise EvaluationError("state= and processes= need a system with fcntl (Linux, macOS)") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"state={folder}: {error.strerror or error}; choose another folder") from error

    def within(self, name: str) -> Pieces:
        """Pieces of a piece, in a folder of that name; they count their own seconds."""
        return Pieces(None if self.folder is None else self.folder / name)

    def has(self, name: str) -> bool:
        """Whether a piece is done."""
        return self._read(name) is not None

    def run(
        self, names: Sequence[str], compute: Callable[[int], Kept], *, wait: bool = True
    ) -> Iterator[tuple[int, Kept]]:
        """Give the outcome of every piece, computing those that are neither done nor being computed elsewhere.

        Args:
            names: of the pieces, unique in the folder, fit for a file name.
            compute: number of a name -> its outcome; called once per piece over all processes that share the folder.
            wait: for those that another process is computing; else they are left out.

        Returns:
            (number, outcome), first those that did not need waiting for.
        """
        elsewhere = []
        for number, name in enumerate(names):
            kept = self._claim(name, number, compute, wait=False)
            if kept is None:
                elsewhere.append(number)
            else:
                yield number, kept
        for number in elsewhere if wait else ():
            kept = self._claim(names[number], number, compute, wait=True)
            if kept is not None:
                yield number, kept

    __call__ = run  # as `mi_at.attacks.packing.Steps`

    def _claim(self, name: str, number: int, compute: Callable[[int], Kept], *, wait: bool) -> Kept | None:
        kept = self._read(name)
        if kept is None:
            with self._lock(name, wait=wait) as mine:
                if not mine:
                    return None
                kept = self._read(name)  # the one we waited for may have finished it
                if kept is None:
                    started = time.perf_counter()
                    kept = compute(number)
                    kept = {**kept, _SECONDS: torch.tensor(time.perf_counter() - started, dtype=torch.float64)}
                    self._write(name, kept)
        self.seconds += float(kept[_SECONDS])
        return kept

    @contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether the piece is ours within this block."""
        if self.folder is None:
            yield True
            return
        import fcntl

        with (self.folder / f"{name}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file lets go of the lock

    def _read(self, name: str) -> Kept | None:
        if self.folder is None:
            return self._memory.get(name)
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {
                    key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
                    for key, value in arrays.items()
                }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # a disk that was full: it is computed again

    def _write(self, name: str, kept: Kept) -> None:
        if self.folder is None:
            self._memory[name] = kept
            return
        arrays: dict[str, Any] = {
            key: np.array(value) if isinstance(value, str) else value.numpy() for key, value in kept.items()
        }
        path = self.folder / f"{name}.npz"
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            why = error.strerror or error
            raise EvaluationError(f"cannot keep {path}: {why}; free space or choose another state=") from error


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits over all that can change an outcome: plain values, tensors, networks, dataclasses.

    A function is known by its name alone.

    Example:
        >>> fingerprint({"a": 1}) == fingerprint({"a": 1}), fingerprint({"a": 1}) == fingerprint({"a": 2})
        (True, False)
    """
    digest = hashlib.sha256()
    for part in (VERSION, *parts):
        _feed(digest, part)
    return digest.hexdigest()[:12]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data if array.numel() else b"")
    elif isinstance(value, nn.Module):
        digest.update(repr(value).encode())
        # Buffers that are not saved with the weights can change an outcome all the same.
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            digest.update(name.encode())
            _feed(digest, tensor)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {field.name: getattr(value, field.name) for field in fields(value)})
    elif value is None or isinstance(value, str | int | float | bool):
        digest.update(json.dumps(value).encode() + b";")
    else:
        # What cannot be written down (a function) is known by its name: its address changes from run to run.
        name = getattr(value, "__qualname__", type(value).__qualname__)
        digest.update(f"{getattr(value, '__module__', '')}.{name};".encode())
