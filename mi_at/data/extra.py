"""An extra training set, such as the 1M synthetic CIFAR images: one npz of `image` and `label`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_at.data.files import Bytes, cached_array, listing_key, missing

_EXPECTED = "an .npz with `image` uint8 [N, H, W, C] and `label` [N]"
_CHUNK = 10_000


def read_extra(path: Path, *, shape: tuple[int, int, int], num_classes: int, mapped: bool) -> tuple[Tensor, Tensor]:
    """Read extra images and labels.

    Args:
        path: the npz file.
        shape: (C, H, W) of the data set that they are added to.
        num_classes: labels lie in 0..num_classes - 1.
        mapped: unpack the images once into an .npy beside the file and memory-map it.

    Returns:
        (images [N, C, H, W] uint8, labels [N] int64).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, missing arrays, or images or labels that do not fit the data set.
    """
    if not path.is_file():
        raise missing("extra set", path, _EXPECTED, "Set dataset.extra to its path, or to null.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if absent := {"image", "label"} - set(arrays.files):
                raise ValueError(f"no array {' and '.join(sorted(absent))}, found {', '.join(arrays.files)}")
            labels = arrays["label"]
            images: Bytes = _mapped(path) if mapped else _to_channels_first(arrays["image"])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"extra set: {path}: {error}; expected {_EXPECTED}") from error
    if images.shape[1:] != shape:
        raise ValueError(
            f"extra set: {path}: images of (channels, height, width) {images.shape[1:]}, expected {shape}, "
            "those of the data set"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"extra set: {path}: label has shape {labels.shape} and dtype {labels.dtype}, "
            f"expected ({len(images)},) and integers"
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"extra set: {path}: labels run from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _mapped(path: Path) -> Bytes:
    """The npz's images as a memory-mapped .npy beside it."""
    name = path.with_name(f"{path.stem}.{listing_key([path])}.npy")
    if name.exists():
        return np.load(name, mmap_mode="c", allow_pickle=False)
    with np.load(path, allow_pickle=False) as arrays:
        images = _check(arrays["image"])
    count, height, width, channels = images.shape

    def fill(out: Bytes) -> None:
        for start in range(0, count, _CHUNK):  # the transposed copy never stands whole in memory
            out[start : start + _CHUNK] = images[start : start + _CHUNK].transpose(0, 3, 1, 2)

    return cached_array(name, (count, channels, height, width), fill)


def _to_channels_first(images: Bytes) -> Bytes:
    return np.ascontiguousarray(_check(images).transpose(0, 3, 1, 2))


def _check(images: Bytes) -> Bytes:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"image has dtype {images.dtype} and shape {images.shape}")
    return images
