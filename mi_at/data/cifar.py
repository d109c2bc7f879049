"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official python batches."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar

import numpy as np
import torch

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.files import check_files


class CIFAR10(ImageDataModule):
    """50,000 training and 10,000 test images, three channels, 32x32, ten classes.

    Files: `<root>/cifar-10-batches-py/`, every one checked by its md5 before it is unpickled.
    """

    NAME = "cifar10"
    NUM_CLASSES = 10
    CHANNELS = 3
    IMAGE_SIZE = 32
    DOWNLOADABLE = True
    LABELS: ClassVar[str] = "labels"

    def checksums(self, split: SplitName) -> dict[str, str]:
        """File name -> md5 of the official distribution: a split's batches and, last, the class names."""
        official = self._torchvision()
        batches = official.train_list if split == "train" else official.test_list
        return {**dict(batches), official.meta["filename"]: official.meta["md5"]}

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        # torchvision's own reader wants the test files for the training set, and hashes every file again.
        folder = self.root / self._torchvision().base_folder
        *batches, meta = check_files(self.title, folder, self.checksums(split), self.hint)
        entries = [_unpickle(path) for path in batches]
        images = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(entry[self.LABELS], np.int64) for entry in entries])
        names = _unpickle(meta)[self._torchvision().meta["key"]]
        return Images(torch.from_numpy(images), torch.from_numpy(labels), tuple(names))

    def fetch(self) -> None:
        """Download by torchvision."""
        self._torchvision()(str(self.root), download=True)

    def _torchvision(self) -> Any:
        from torchvision.datasets import CIFAR10 as OFFICIAL

        return OFFICIAL


class CIFAR100(CIFAR10):
    """50,000 training and 10,000 test images, three channels, 32x32, a hundred (fine) classes.

    Files: `<root>/cifar-100-python/`.
    """

    NAME = "cifar100"
    NUM_CLASSES = 100
    LABELS = "fine_labels"

    def _torchvision(self) -> Any:
        from torchvision.datasets import CIFAR100 as OFFICIAL

        return OFFICIAL


def _unpickle(path: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")  # noqa: S301 - its md5 was checked
