"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017) from their idx files, packed or not."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.files import check_md5, missing


class MNIST(ImageDataModule):
    """60,000 training and 10,000 test images, one channel, 28x28, ten classes.

    Files: `<root>/MNIST/raw/` or `<root>/` itself, as `train-images-idx3-ubyte.gz` and so on, or unpacked. A
    packed file is preferred and checked by its md5; an unpacked one by its md5 (MNIST), header and length.
    """

    NAME = "mnist"
    NUM_CLASSES = 10
    CHANNELS = 1
    IMAGE_SIZE = 28
    DOWNLOADABLE = True
    FOLDER: ClassVar[str] = "MNIST"
    CLASSES: ClassVar[tuple[str, ...]] = tuple(str(digit) for digit in range(10))
    # md5 of the unpacked files, taken from the packed ones.
    UNPACKED_MD5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def checksums(self) -> dict[str, str]:
        """File name -> md5 of the official distribution; of unpacked files too, where known."""
        return {**dict(self._torchvision().resources), **self.UNPACKED_MD5}

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        stem = "train" if split == "train" else "t10k"
        images = self._read_idx(f"{stem}-images-idx3-ubyte", dimensions=3)
        labels = self._read_idx(f"{stem}-labels-idx1-ubyte", dimensions=1)
        return Images(images[:, None], labels.long(), self.CLASSES)

    def fetch(self) -> None:
        """Download by torchvision."""
        self._torchvision()(str(self.root), download=True)

    def _read_idx(self, name: str, *, dimensions: int) -> Tensor:
        path = self._find(name)
        if expected := self.checksums().get(path.name):
            check_md5(self.title, path, expected, self.hint)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return parse_idx(data, dimensions=dimensions, what=f"{self.title}: {path}")

    def _find(self, name: str) -> Path:
        folders = (self.root / self.FOLDER / "raw", self.root)
        candidates = [folder / file for folder in folders for file in (f"{name}.gz", name)]
        for path in candidates:
            if path.is_file():
                return path
        raise missing(self.title, candidates[0], f"the official idx file, packed or as {name}", self.hint)

    def _torchvision(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.FOLDER)


class FashionMNIST(MNIST):
    """60,000 + 10,000 images of clothes in MNIST's format; files in `<root>/FashionMNIST/raw/`."""

    NAME = "fashion_mnist"
    FOLDER = "FashionMNIST"
    CLASSES = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    UNPACKED_MD5: ClassVar[Mapping[str, str]] = {}


def parse_idx(data: bytes, *, dimensions: int, what: str) -> Tensor:
    """Decode an idx file of unsigned bytes.

    Args:
        data: the whole file, unpacked.
        dimensions: 3 for images, 1 for labels.
        what: named in errors.

    Returns:
        uint8 tensor of that many dimensions.

    Raises:
        ValueError: another magic number, or another length than the header states.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), dimensions=1, what="labels").tolist()
        [7, 9]
    """
    header = 4 + 4 * dimensions
    expected_magic = 0x0800 + dimensions
    magic = struct.unpack(">i", data[:4])[0] if len(data) >= header else None
    if magic != expected_magic:
        raise ValueError(f"{what}: no idx file: magic number {magic}, expected {expected_magic}; get the file anew")
    shape = struct.unpack(f">{dimensions}i", data[4:header])
    size = int(np.prod(shape))
    if len(data) - header != size:
        raise ValueError(
            f"{what}: truncated: its header states {size:,} values, found {len(data) - header:,}; get the file anew"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())
