"""Finding, verifying and caching data files, with errors that say what to do."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def missing(what: str, path: Path, expected: str, hint: str) -> FileNotFoundError:
    """The error for a file or folder that is not there.

    Args:
        what: the data set's name.
        path: what was looked for.
        expected: what should be there.
        hint: how to get it.

    Returns:
        The exception, to be raised by the caller.

    Example:
        >>> print(missing("cifar10", Path("data/x"), "the file of the official archive", "Unpack it there."))
        cifar10: not found: data/x. Expected the file of the official archive. Unpack it there.
    """
    return FileNotFoundError(f"{what}: not found: {path}. Expected {expected}. {hint}")


def check_md5(what: str, path: Path, expected: str, hint: str) -> None:
    """Compare a file with the md5 of the official distribution.

    Args:
        what: the data set's name.
        path: an existing file.
        expected: 32 hexadecimal digits.
        hint: how to get the right file.

    Raises:
        ValueError: the file differs (truncated, changed, or another file).
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        raise ValueError(
            f"{what}: {path} is truncated or not the official file: expected md5 {expected}, "
            f"found {found} ({path.stat().st_size:,} bytes). Delete it and get it anew. {hint}"
        )


def check_files(what: str, folder: Path, md5: Mapping[str, str], hint: str) -> list[Path]:
    """Make sure that official files are there, whole and unchanged.

    Args:
        what: the data set's name.
        folder: where they lie.
        md5: file name -> md5 of the official distribution.
        hint: how to get them.

    Returns:
        Their paths, in the order of `md5`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file differs.
    """
    paths = [folder / name for name in md5]
    for path in paths:
        if not path.is_file():
            raise missing(what, path, "the official file of that name", hint)
    for path, expected in zip(paths, md5.values(), strict=True):
        check_md5(what, path, expected, hint)
    return paths


def listing_key(paths: Iterable[Path]) -> str:
    """A short key that changes when a file of the list is added, removed or changes its size or date.

    Args:
        paths: existing files, in order.

    Returns:
        12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.parent.name}/{path.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def cached_array(path: Path, shape: tuple[int, ...], fill: Callable[[Bytes], None]) -> Bytes:
    """A memory-mapped uint8 array, made once and kept as an .npy file.

    The file is written beside its final name and renamed, so it is whole or not there at all, even if several
    processes make it at a time. In a folder that cannot be written the array stays in memory, with a warning.

    Args:
        path: of the .npy file; its name must tell one content from another.
        shape: of the array.
        fill: writes the values into an array of that shape.

    Returns:
        The array, copy-on-write: the file is never changed.
    """
    if not path.exists():
        part = path.with_name(f".{path.stem}.{os.getpid()}.part")
        try:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        except OSError as error:
            warnings.warn(f"{path} cannot be written ({error}): decoding again in every run", stacklevel=2)
            whole = np.empty(shape, np.uint8)
            fill(whole)
            return whole
        try:
            fill(array)
            array.flush()
            del array
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return np.load(path, mmap_mode="c", allow_pickle=False)
