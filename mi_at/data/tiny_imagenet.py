"""Tiny-ImageNet-200 (Stanford CS231n) from its official layout; its validation set is our test set.

The pictures are decoded once, to one uint8 .npy file per split beside them, which is memory-mapped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.files import Bytes, cached_array, listing_key, missing
from mi_at.data.pictures import decode_all


class TinyImageNet(ImageDataModule):
    """100,000 training and 10,000 test images, three channels, 64x64, 200 classes.

    Files: `<root>/tiny-imagenet-200/` with `wnids.txt`, `train/<wnid>/images/*.JPEG` and `val/` with its
    `val_annotations.txt`. Labels count the sorted wnids. Grayscale pictures (about 2 %) become RGB.
    """

    NAME = "tiny_imagenet"
    NUM_CLASSES = 200
    CHANNELS = 3
    IMAGE_SIZE = 64
    FOLDER: ClassVar[str] = "tiny-imagenet-200"
    # An interrupted unpacking leaves fewer; the official archive has no md5 per file.
    IMAGES_PER_CLASS: ClassVar[int] = 500
    TEST_IMAGES: ClassVar[int] = 10_000

    @property
    def hint(self) -> str:
        """How to get the files, for messages."""
        return (
            "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip under the data root "
            f"(MI_AT_DATA or dataset.root, now {self.root})."
        )

    def prepare_data(self) -> None:
        """Decode the training pictures on one process, so that the others find the file."""
        super().prepare_data()
        if os.access(self.root / self.FOLDER, os.W_OK):
            self._decoded("train")

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        array, labels, wnids = self._decoded(split)
        if self.placement == "memory":
            array = np.array(array)
        return Images(torch.from_numpy(array), torch.tensor(labels), tuple(wnids))

    def _decoded(self, split: SplitName) -> tuple[Bytes, list[int], list[str]]:
        folder = self.root / self.FOLDER
        wnids = sorted(self._lines(folder / "wnids.txt"))
        paths, labels = self._train(folder, wnids) if split == "train" else self._val(folder, wnids)
        shape = (len(paths), self.CHANNELS, self.IMAGE_SIZE, self.IMAGE_SIZE)

        def fill(out: Bytes) -> None:
            decode_all(paths, out, resize=False, what=self.title)

        return cached_array(folder / f"{split}.{listing_key(paths)}.npy", shape, fill), labels, wnids

    def _train(self, folder: Path, wnids: list[str]) -> tuple[list[Path], list[int]]:
        paths: list[Path] = []
        labels: list[int] = []
        for label, wnid in enumerate(wnids):
            own = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
            if len(own) != self.IMAGES_PER_CLASS:
                raise missing(
                    self.title,
                    folder / "train" / wnid / "images" / "*.JPEG",
                    f"{self.IMAGES_PER_CLASS} pictures there, found {len(own)}",
                    self.hint,
                )
            paths += own
            labels += [label] * len(own)
        return paths, labels

    def _val(self, folder: Path, wnids: list[str]) -> tuple[list[Path], list[int]]:
        annotations = folder / "val" / "val_annotations.txt"
        rows = [line.split("\t")[:2] for line in self._lines(annotations)]
        if len(rows) != self.TEST_IMAGES:
            raise ValueError(
                f"{self.title}: {annotations} is truncated: expected {self.TEST_IMAGES:,} lines, "
                f"found {len(rows):,}. {self.hint}"
            )
        number = {wnid: label for label, wnid in enumerate(wnids)}
        labels = [number.get(wnid, -1) for _, wnid in rows]
        if -1 in labels:
            raise ValueError(
                f"{self.title}: {annotations} names the class {rows[labels.index(-1)][1]!r}, "
                f"which wnids.txt does not. {self.hint}"
            )
        paths = [folder / "val" / "images" / name for name, _ in rows]
        for path in paths:
            if not path.is_file():
                raise missing(self.title, path, "a picture of the official archive", self.hint)
        return paths, labels

    def _lines(self, path: Path) -> list[str]:
        if not path.is_file():
            raise missing(self.title, path, "the list of the official archive", self.hint)
        return path.read_text().splitlines()
