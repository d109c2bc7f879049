"""Tiny data sets in the official on-disk formats."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from mi_at.data.base import ImageDataModule, Images
from mi_at.data.cifar import CIFAR10, CIFAR100
from mi_at.data.mnist import MNIST, FashionMNIST
from mi_at.data.svhn import SVHN
from mi_at.data.tiny_imagenet import TinyImageNet


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(count: int, channels: int, size: int, *, seed: int = 0) -> np.ndarray:
    """[count, channels, size, size] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


class Plain(ImageDataModule):
    """In-memory images: image i is filled with i % 256; labels count round the classes."""

    NAME = "plain"
    NUM_CLASSES = 4
    CHANNELS = 1
    IMAGE_SIZE = 8
    TRAIN = 40
    reads: list[str]

    def read(self, split: str) -> Images:
        self.reads = [*getattr(self, "reads", []), split]
        count = self.TRAIN if split == "train" else 16
        x = (torch.arange(count) % 256).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
        return Images(x, torch.arange(count) % 4, tuple("abcd"))


def _pickle(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


class TinyCIFAR10(CIFAR10):
    """CIFAR-10 whose checksums are those of the files as `make_cifar10` wrote them."""

    def checksums(self, split: str) -> dict[str, str]:
        return {name: OFFICIAL.get((self.root, name), "0" * 32) for name in super().checksums(split)}


class TinyCIFAR100(CIFAR100):
    """CIFAR-100, likewise."""

    def checksums(self, split: str) -> dict[str, str]:
        return {name: OFFICIAL.get((self.root, name), "0" * 32) for name in super().checksums(split)}


OFFICIAL: dict[tuple[Path, str], str] = {}


def make_cifar10(root: Path, per_batch: int = 20) -> np.ndarray:
    """Five training batches and a test batch; returns the training images [5 per_batch, 3, 32, 32]."""
    folder = root / "cifar-10-batches-py"
    images = pixels(6 * per_batch, 3, 32).reshape(6, per_batch, -1)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, data in zip(names, images, strict=True):
        _pickle(folder / name, {"data": data, "labels": [i % 10 for i in range(per_batch)]})
    _pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    OFFICIAL.update({(root, path.name): md5(path) for path in folder.iterdir()})
    return images[:5].reshape(-1, 3, 32, 32)


def make_cifar100(root: Path, count: int = 200) -> np.ndarray:
    folder = root / "cifar-100-python"
    images = pixels(2 * count, 3, 32).reshape(2, count, -1)
    for name, data in zip(("train", "test"), images, strict=True):
        _pickle(folder / name, {"data": data, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": []})
    _pickle(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    OFFICIAL.update({(root, path.name): md5(path) for path in folder.iterdir()})
    return images[0].reshape(-1, 3, 32, 32)


class TinyMNIST(MNIST):
    UNPACKED_MD5: dict[str, str] = {}

    def checksums(self) -> dict[str, str]:
        return {name: value for (root, name), value in OFFICIAL.items() if root == self.root}


class TinyFashionMNIST(FashionMNIST):
    checksums = TinyMNIST.checksums


def make_idx(folder: Path, root: Path, *, packed: bool, count: int = 30) -> np.ndarray:
    """The four idx files, packed or not; returns the training images [count, 28, 28]."""
    folder.mkdir(parents=True, exist_ok=True)
    train = pixels(count, 1, 28)[:, 0]
    for stem, images in (("train", train), ("t10k", pixels(20, 1, 28, seed=1)[:, 0])):
        labels = np.arange(len(images), dtype=np.uint8) % 10
        for kind, magic, data in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            content = struct.pack(f">{1 + data.ndim}i", magic, *data.shape) + data.tobytes()
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
            OFFICIAL[root, path.name] = md5(path)
    return train


class TinySVHN(SVHN):
    def checksums(self, split: str) -> dict[str, str]:
        return {name: OFFICIAL[self.root, name] for name in super().checksums(split)}


class UncheckedSVHN(SVHN):
    """Of any files: those that a test made in another process."""

    def checksums(self, split: str) -> dict[str, str]:
        return {name: md5(self.root / name) for name in super().checksums(split)}


def make_svhn(folder: Path, root: Path, count: int = 30) -> np.ndarray:
    """Both .mat files, with label 10 for the digit 0; returns the training images [count, 3, 32, 32]."""
    train = pixels(count, 3, 32)
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in (("train", train), ("test", pixels(20, 3, 32, seed=1))):
        labels = (np.arange(len(images)) % 10 + 1).astype(np.uint8)[:, None]
        path = folder / f"{split}_32x32.mat"
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        OFFICIAL[root, path.name] = md5(path)
    return train


class SmallTinyImageNet(TinyImageNet):
    NUM_CLASSES = 3
    IMAGES_PER_CLASS = 4
    TEST_IMAGES = 5


class ThinTinyImageNet(TinyImageNet):
    """All classes, with fewer pictures."""

    IMAGES_PER_CLASS = 4
    TEST_IMAGES = 20


def make_tiny_imagenet(root: Path, wnids: Sequence[str] = ("n03", "n01", "n02"), *, tests: int = 5) -> None:
    """Classes of four pictures, the first of each class grayscale, and test pictures."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    for number, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(4):
            colour = Image.new("RGB", (64, 64), (40 * number % 256, 20 * i, 200))
            picture = colour.convert("L") if i == 0 else colour
            picture.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95)
    rows = []
    for i in range(tests):
        name = f"val_{i}.JPEG"
        Image.new("RGB", (64, 64), (50 * i % 256, 0, 0)).save(folder / "val" / "images" / name, quality=95)
        rows.append(f"{name}\t{wnids[i % len(wnids)]}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def make_folder(root: Path, *, sizes: tuple[tuple[int, int], ...] = ((40, 32), (32, 50)), count: int = 10) -> None:
    """Classes "cat" and "dog" of one-coloured pictures: class in the red, number in the green channel."""
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", sizes[i % len(sizes)], (200 * number, 10 * i, 0))
            picture.save(root / name / f"{i:02d}.png")


def make_extra(path: Path, count: int = 50, classes: int = 10) -> np.ndarray:
    """An npz of extra images; returns them [count, 32, 32, 3]."""
    images = np.ascontiguousarray(pixels(count, 3, 32, seed=7).transpose(0, 2, 3, 1))
    np.savez(path, image=images, label=np.arange(count) % classes)
    return images
