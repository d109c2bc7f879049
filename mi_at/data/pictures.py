"""Decoding picture files to uint8 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mi_at.data.files import Bytes


def decode(path: Path, *, channels: int, size: int, resize: bool, what: str) -> Bytes:
    """One picture as an array; grayscale becomes RGB and the reverse, as asked.

    Args:
        path: a file that Pillow reads.
        channels: 1 or 3.
        size: height and width in pixels.
        resize: bring the shorter side to `size` and cut the centre; without, another size is an error.
        what: the data set's name, for errors.

    Returns:
        [channels, size, size] uint8.

    Raises:
        ValueError: no whole picture, or one of another size.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB" if channels == 3 else "L")
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        raise ValueError(f"{what}: {path} is truncated or no picture ({error}); get it anew") from error
    if picture.size != (size, size):
        if not resize:
            raise ValueError(f"{what}: {path} has {picture.size[0]}x{picture.size[1]} pixels, expected {size}x{size}")
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def decode_all(paths: Sequence[Path], out: Bytes, *, resize: bool, what: str) -> None:
    """Decode pictures into an array.

    Args:
        paths: N files.
        out: [N, C, size, size] uint8, written to.
        resize: as in `decode`.
        what: the data set's name, for errors.

    Raises:
        ValueError: no whole picture, or one of another size.
    """
    _, channels, size, _ = out.shape
    for place, path in enumerate(paths):
        out[place] = decode(path, channels=channels, size=size, resize=resize, what=what)
