"""SVHN (Netzer et al. 2011), cropped digits, from the official .mat files."""

from __future__ import annotations

import numpy as np
import torch

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.files import check_files


class SVHN(ImageDataModule):
    """73,257 training and 26,032 test images, three channels, 32x32, ten classes.

    Files: `<root>/train_32x32.mat` and `<root>/test_32x32.mat`, or the same in `<root>/SVHN/`; checked by
    md5. The files' label 10 is the digit 0. The set's 531,131 "extra" images are not used.
    """

    NAME = "svhn"
    NUM_CLASSES = 10
    CHANNELS = 3
    IMAGE_SIZE = 32
    DOWNLOADABLE = True

    def checksums(self, split: SplitName) -> dict[str, str]:
        """File name -> md5 of the official distribution."""
        from torchvision.datasets import SVHN as OFFICIAL

        _, name, md5 = OFFICIAL.split_list[split]
        return {name: md5}

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        from scipy.io import loadmat

        checksums = self.checksums(split)
        own = self.root / "SVHN"
        folder = own if any((own / name).is_file() for name in checksums) else self.root
        [path] = check_files(self.title, folder, checksums, self.hint)
        arrays = loadmat(path)
        images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
        labels = arrays["y"].astype(np.int64).reshape(-1) % 10
        return Images(torch.from_numpy(images), torch.from_numpy(labels), tuple(str(digit) for digit in range(10)))

    def fetch(self) -> None:
        """Download by torchvision."""
        from torchvision.datasets import SVHN as OFFICIAL

        for split in ("train", "test"):
            OFFICIAL(str(self.root), split=split, download=True)
