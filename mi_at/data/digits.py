"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no file and no download.

Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI. The values 0..16 become uint8 by
round(255 v / 16). The set has no official test split: 360 images, stratified with a fixed seed, are the test
set.
"""

from __future__ import annotations

import numpy as np
import torch

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.splits import stratified_order

TEST_SIZE = 360
# Fixed, so that no option can move an image from test to train.
TEST_SEED = 0


class Digits(ImageDataModule):
    """1,437 training and 360 test images, one channel, 8x8, ten classes; `root` is not used.

    Example:
        >>> digits = Digits(batch_size=64, val_size=180)
        >>> digits.setup("fit")
        >>> len(digits.train_index), len(digits.val_index), len(digits.train_dataloader())
        (1257, 180, 20)
    """

    NAME = "digits"
    NUM_CLASSES = 10
    CHANNELS = 1
    IMAGE_SIZE = 8

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
        images, labels = torch.from_numpy(pixels)[:, None], torch.from_numpy(data.target.astype(np.int64))
        order = stratified_order(labels, seed=TEST_SEED)
        own = (order[:TEST_SIZE] if split == "test" else order[TEST_SIZE:]).sort().values
        return Images(images[own], labels[own], tuple(str(digit) for digit in range(10)))
