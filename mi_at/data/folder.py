"""One's own pictures: a folder per class.

Either `<root>/train/<class>/*` and `<root>/test/<class>/*`, or `<root>/<class>/*`, of which a stratified
fifth is the test split, by a fixed seed. Classes are numbered by their sorted folder names. The pictures are
decoded in every run: nothing is written into the folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_at.data.base import ImageDataModule, Images, SplitName
from mi_at.data.files import missing
from mi_at.data.pictures import decode_all
from mi_at.data.splits import stratified_order

# Fixed, so that no option can move a picture from test to train.
TEST_SEED = 0
TEST_FRACTION = 0.2
_LAYOUT = "folders <class>/ of pictures, or train/<class>/ and test/<class>/"


def class_names(root: str | Path) -> tuple[str, ...]:
    """The classes of a picture folder, without opening a picture.

    Args:
        root: the folder that `dataset.root` names.

    Returns:
        The sorted names of the class folders; their number is `dataset.num_classes`.

    Raises:
        FileNotFoundError: no such folder, or no class folder in it.
        ValueError: one class folder alone.
    """
    base = Path(root).expanduser()
    folder = base / "train" if (base / "train").is_dir() else base
    names = [] if not folder.is_dir() else [f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != "."]
    if not names:
        raise missing("folder", folder, _LAYOUT, "Set dataset.root to the folder that holds them.")
    if len(names) < 2:
        raise ValueError(f"{folder} holds one class folder, {names[0]}: a classifier needs two or more (dataset.root)")
    return tuple(sorted(names))


class Folder(ImageDataModule):
    """Pictures of any size that Pillow reads, brought to one size: shorter side resized, centre cut.

    `image_size`, `channels` (1 or 3) and `num_classes` (None: as many as there are class folders) are options
    here.
    """

    NAME = "folder"
    NUM_CLASSES = None
    CHANNELS = 3
    IMAGE_SIZE = 32

    @property
    def hint(self) -> str:
        """How to get the files, for messages."""
        return f"dataset.root is {self.root}."

    def read(self, split: SplitName) -> Images:
        """See `ImageDataModule.read`."""
        if self.channels not in (1, 3):
            raise ValueError(f"dataset.channels={self.channels}: expected 1 (grayscale) or 3 (RGB)")
        classes = class_names(self.root)
        if (self.root / "train").is_dir():
            folder = self.root / split
            if not folder.is_dir():
                raise missing(self.title, folder, "test/<class>/ beside train/<class>/", self.hint)
            if unknown := {f.name for f in folder.iterdir() if f.is_dir()} - set(classes):
                raise ValueError(
                    f"{self.title}: {folder} has the classes {sorted(unknown)}, which train/ does not have"
                )
            paths, labels = self._listing(folder, classes)
        else:
            paths, labels = self._listing(self.root, classes)
            order = stratified_order(labels, seed=TEST_SEED)
            size = max(1, round(TEST_FRACTION * len(order)))
            own = (order[:size] if split == "test" else order[size:]).sort().values
            paths, labels = [paths[place] for place in own.tolist()], labels[own]
        images = np.empty((len(paths), self.channels, self.image_size, self.image_size), np.uint8)
        decode_all(paths, images, resize=True, what=self.title)
        return Images(torch.from_numpy(images), labels, classes)

    def _listing(self, folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        numbers = {name: label for label, name in enumerate(classes)}
        try:
            found = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.title}: {folder}: {error}. {self.hint}") from error
        return [Path(path) for path, _ in found], torch.tensor([label for _, label in found])
