"""The data module that every data set fills in with one method, `read`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from mi_at.data import splits
from mi_at.data.augment import crop_flip, draw_crop_flip
from mi_at.data.batch import Batch
from mi_at.data.extra import read_extra
from mi_at.data.loader import (
    PLACEMENTS,
    Augmentation,
    DeviceLoader,
    ImageStore,
    SequentialLoader,
    batches_with_extra,
    extra_count,
)
from mi_at.data.seeding import keyed_generator
from mi_at.functional import distributed

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """One official split as it was read.

    Attributes:
        x: [N, C, H, W] uint8, in memory or memory-mapped.
        y: [N] int64 in 0..K-1.
        classes: the K class names in the order of the labels.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]


class ImageDataModule(LightningDataModule, ABC):
    """A data set of images with a fixed train / validation / test split.

    Training and validation images come out of the official training set, by a seeded stratified split; the
    official test set is read by `setup("test")` alone and cannot be reached while a fit runs. Works with a
    Trainer and without: `prepare_data()` where a download is wanted, `setup("fit")`, then the loaders.

    A subclass states NAME, NUM_CLASSES, CHANNELS and IMAGE_SIZE and implements `read`.

    Args:
        root: the data root, the folder that holds the official files.
        name: what the set is called in messages and records; None: NAME.
        num_classes: K; None: the set's own. Here as in `channels` and `image_size`, the value is what the
            network was built for, and data that differ are refused.
        channels: C; None: the set's own.
        image_size: height and width in pixels; None: the set's own.
        batch_size: images of a global batch, over all processes.
        eval_batch_size: the same for validation and test; None: batch_size.
        val_size: images of the training set held out for validation; 0: no validation.
        fraction: share of the remaining training images to use, in (0, 1].
        train_size: a number of training images instead of a fraction.
        split_seed: of the validation split and the subset; apart from `seed`, so that all seeds of a table
            share them.
        seed: of order and augmentation.
        augment: whether training images are cropped and flipped.
        pad: zero padding of the random crop in pixels; 0: no crop.
        flip: whether half of the training images are mirrored.
        extra: path of an .npz of extra training images (`image` uint8 [N, H, W, C], `label` [N]).
        extra_fraction: share of extra images in every batch, in (0, 1).
        batches_per_epoch: length of an epoch; None: one pass over the training images, or, with extra images,
            ceil(training and validation images / batch_size): the whole official set's, unless `fraction` or
            `train_size` takes a part of it.
        drop_last: leave out a last training batch smaller than batch_size.
        placement: where the images lie: "auto", "device", "memory" or "mmap" (see `ImageStore`; "mmap" keeps
            the sets that have a decoded cache file, Tiny-ImageNet and `extra`, on disk; "memory" reads them
            whole).
        download: whether `prepare_data` may fetch missing files (where torchvision can).

    Raises:
        ValueError: an option out of range, before anything is read.
    """

    NAME: ClassVar[str]
    NUM_CLASSES: ClassVar[int | None]
    CHANNELS: ClassVar[int]
    IMAGE_SIZE: ClassVar[int]
    DOWNLOADABLE: ClassVar[bool] = False

    def __init__(
        self,
        *,
        root: str | Path = "data",
        name: str | None = None,
        num_classes: int | None = None,
        channels: int | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_size: int = 0,
        fraction: float = 1.0,
        train_size: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
        augment: bool = False,
        pad: int = 4,
        flip: bool = True,
        extra: str | Path | None = None,
        extra_fraction: float = 0.7,
        batches_per_epoch: int | None = None,
        drop_last: bool = False,
        placement: str = "auto",
        download: bool = False,
    ) -> None:
        super().__init__()
        _at_least("batch_size", batch_size, 1)
        _at_least("eval_batch_size", eval_batch_size, 1)
        _at_least("val_size", val_size, 0)
        _at_least("train_size", train_size, 1)
        _at_least("batches_per_epoch", batches_per_epoch, 1)
        if not 0 < fraction <= 1:
            raise ValueError(f"dataset.fraction={fraction}: expected a share in (0, 1], such as 0.4")
        if train_size is not None and fraction != 1:
            raise ValueError(f"dataset.train_size={train_size} with dataset.fraction={fraction}: give one of the two")
        if placement not in PLACEMENTS:
            raise ValueError(f"dataset.placement={placement!r}: expected one of {', '.join(PLACEMENTS)}")
        if extra is not None:
            extra_count(batch_size, extra_fraction)
        self.root = Path(root).expanduser()
        self.name = self.title = name or self.NAME
        self.num_classes = num_classes or self.NUM_CLASSES
        self.channels = channels or self.CHANNELS
        self.image_size = image_size or self.IMAGE_SIZE
        if download and not self.DOWNLOADABLE:
            raise ValueError(f"dataset.download=true: torchvision cannot fetch {self.title}. {self.hint}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.val_size = val_size
        self.fraction = fraction
        self.train_size = train_size
        self.split_seed = split_seed
        self.seed = seed
        self.augmentation = Augmentation(pad, flip) if augment else None
        self.extra = Path(extra).expanduser() if extra is not None else None
        self.extra_fraction = extra_fraction
        self.batches_per_epoch = batches_per_epoch
        self.drop_last = drop_last
        self.placement = placement
        self.download = download
        self._official: Images | None = None
        self._extra: tuple[Tensor, Tensor] | None = None
        self._test: Images | None = None
        self._indices: tuple[Tensor, Tensor] | None = None
        self._stores: dict[str, ImageStore] = {}
        self._per_class: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ what a data set fills in

    @abstractmethod
    def read(self, split: SplitName) -> Images:
        """Read and verify one official split, and nothing of the other.

        Args:
            split: "train" or "test".

        Returns:
            Its images, labels and class names.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated or not the official one.
        """

    def fetch(self) -> None:
        """Download missing files into the root; a set with DOWNLOADABLE implements it."""
        raise ValueError(f"torchvision cannot fetch {self.title}. {self.hint}")

    @property
    def hint(self) -> str:
        """How to get the files, for messages."""
        fetch = ", or let torchvision fetch them with dataset.download=true" if self.DOWNLOADABLE else ""
        where = f"the data root (MI_AT_DATA or dataset.root, now {self.root})"
        return f"Put the official files under {where}{fetch}."

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare_data(self) -> None:
        """Download where asked. Lightning calls it on one process; without a Trainer call it yourself."""
        if self.download:
            self.fetch()

    def setup(self, stage: str) -> None:
        """Read what a stage may see.

        Args:
            stage: "fit" or "validate" (training set; "fit" also forgets the test set), or "test" (test set).

        Raises:
            ValueError: an unknown stage, or data that do not fit the options.
            RuntimeError: "test" while a fit is running.
        """
        if stage in ("fit", "validate"):
            if stage == "fit":
                self._test = None
                self._stores.pop("test", None)
            if self._official is None:
                self._read_train()
        elif stage == "test":
            if self._fitting():
                raise RuntimeError("the test split cannot be read while a fit is running; evaluate after it")
            if self._test is None:
                self._test = self._checked(self.read("test"), "test")
        else:
            raise ValueError(f"stage={stage!r}: expected 'fit', 'validate' or 'test'")

    def train_dataloader(self) -> DeviceLoader:
        """The training loader, at the start of epoch 0.

        Raises:
            RuntimeError: before `setup("fit")`.
        """
        official, (train, held_out) = self._training_set()
        rank, world_size = self._process()
        extra_index, length = None, self.batches_per_epoch
        if self._extra is not None:
            extra_index = torch.arange(len(self._extra[1])) + len(official.y)
            length = length or batches_with_extra(len(train) + len(held_out), self.batch_size)
        return DeviceLoader(
            self._store("train"),
            train,
            batch_size=self.batch_size,
            seed=self.seed,
            extra_index=extra_index,
            extra_fraction=self.extra_fraction,
            batches_per_epoch=length,
            augmentation=self.augmentation,
            drop_last=self.drop_last,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> SequentialLoader | list[SequentialLoader]:
        """The validation images in order; with val_size 0 an empty list, for Lightning no validation.

        Raises:
            RuntimeError: before `setup("fit")`.
        """
        _, (_, val) = self._training_set()
        return self._pass("train", val, self.eval_batch_size) if len(val) else []

    def test_dataloader(self) -> SequentialLoader:
        """The official test images in order.

        Raises:
            RuntimeError: before `setup("test")`; `setup("fit")` forgets the test set.
        """
        if self._test is None:
            raise RuntimeError("the test split cannot be reached from a fit: call setup('test') after it")
        return self._pass("test", torch.arange(len(self._test.y)), self.eval_batch_size)

    # ------------------------------------------------------------------ for regularizers and records

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels, once a split was read.

        Raises:
            RuntimeError: before `setup`.
        """
        for images in (self._official, self._test):
            if images is not None:
                return images.classes
        raise RuntimeError("the class names are known after setup('fit') or setup('test')")

    @property
    def train_index(self) -> Tensor:
        """[n] int64, ascending: places of the training images in the official training set; no extra ones."""
        return self._training_set()[1][0]

    @property
    def val_index(self) -> Tensor:
        """[val_size] int64, the validation images' places in the official training set, ascending."""
        return self._training_set()[1][1]

    def train_batches(
        self, *, batch_size: int | None = None, augment: bool = False, epoch: int | None = None
    ) -> SequentialLoader:
        """One plain pass over the training images without extra ones, each process its share of every batch.

        Args:
            batch_size: of a global batch; None: that of training.
            augment: crop and flip as in training (with draws of its own), where the data set's options do.
            epoch: key of these draws and of a random order; None: the official order.

        Returns:
            A loader; every `iter()` of it is the same pass.
        """
        loader_augmentation = self.augmentation if augment else None
        index = self.train_index
        if epoch is not None:  # files may be sorted by class, and a term over a batch wants all of them
            index = index[torch.randperm(len(index), generator=keyed_generator(self.seed, "pass", epoch))]
        return self._pass("train", index, batch_size or self.batch_size, loader_augmentation, epoch or 0)

    def draw_per_class(self, n: int, *, generator: torch.Generator, augment: bool = False) -> Batch:
        """Random training images (extra ones among them), n of every class, drawn with replacement.

        Args:
            n: images per class, >= 1.
            generator: a CPU generator in the same state on every process.
            augment: crop and flip, where the data set's options do.

        Returns:
            This process's share of the K n images, which are ordered by class.

        Raises:
            ValueError: n < 1, a generator of another device, or a class without training images.
        """
        if n < 1 or generator.device.type != "cpu":
            raise ValueError(f"n={n} with a generator on {generator.device}: expected n >= 1 and a generator on cpu")
        by_class, counts = self._class_table()
        if not counts.all():
            absent = ", ".join(str(c) for c in (counts == 0).nonzero().flatten().tolist())
            raise ValueError(f"no training image of class {absent}: use a larger dataset.fraction or train_size")
        places = (torch.rand((len(counts), n), generator=generator, dtype=torch.float64) * counts[:, None]).long()
        index = by_class[(counts.cumsum(0) - counts)[:, None] + places].flatten()
        drawn = None
        if augment and self.augmentation is not None:
            drawn = draw_crop_flip(
                len(index), pad=self.augmentation.pad, flip=self.augmentation.flip, generator=generator
            )
        rank, world_size = self._process()
        sizes = distributed.shard_sizes(len(index), world_size)
        offset, share = sum(sizes[:rank]), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        store = self._store("train")
        own = index[share]
        images, labels, own = store.take(store.send(own) if store.resident else own)
        if drawn is not None and self.augmentation is not None:
            images = crop_flip(images, store.send(drawn[:, share].contiguous()), pad=self.augmentation.pad)
        return Batch(x=store.to_float(images), y=labels, index=own, global_size=len(index), offset=offset)

    # ------------------------------------------------------------------ inside

    def _read_train(self) -> None:
        official = self._checked(self.read("train"), "train")
        if self.num_classes is None:
            self.num_classes = len(official.classes)
        train, val = splits.split(
            official.y,
            val_size=self.val_size,
            fraction=self.fraction,
            train_size=self.train_size,
            seed=self.split_seed,
        )
        if self.batch_size > len(train) and self.extra is None:
            raise ValueError(
                f"dataset.batch_size={self.batch_size}: expected at most {len(train)}, "
                f"the training images of {self.title} (it has {len(official.y)}: val_size takes {len(val)}, "
                "fraction or train_size the rest)"
            )
        if self.extra is not None:
            channels, height, width = official.x.shape[1:]
            self._extra = read_extra(
                self.extra,
                shape=(channels, height, width),
                num_classes=self.num_classes,
                mapped=self.placement == "mmap",
            )
        self._official, self._indices = official, (train, val)

    def _checked(self, images: Images, split: str) -> Images:
        """Refuse arrays that are not what the rest relies on."""
        x, y = images.x, images.y
        what = f"{self.title} ({split})"
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise ValueError(f"{what}: images {x.dtype} {list(x.shape)}, expected torch.uint8 [N, C, H, W]")
        if not len(y):
            raise ValueError(f"{what}: no images")
        if y.dtype != torch.int64 or y.shape != (len(x),):
            raise ValueError(f"{what}: labels {y.dtype} {list(y.shape)}, expected torch.int64 [{len(x)}]")
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{what}: images of (channels, height, width) {tuple(x.shape[1:])}, expected {expected}: "
                "set dataset.channels and dataset.image_size to what the files hold"
            )
        classes = self.num_classes or len(images.classes)
        if len(images.classes) != classes:
            raise ValueError(f"{what}: dataset.num_classes={classes}, but the files name {len(images.classes)} classes")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{what}: labels run from {low} to {high}, expected 0 to {classes - 1}")
        return images

    def _training_set(self) -> tuple[Images, tuple[Tensor, Tensor]]:
        if self._official is None or self._indices is None:
            raise RuntimeError("the training set was not read: call setup('fit') first")
        return self._official, self._indices

    def _pass(
        self,
        split: SplitName,
        index: Tensor,
        batch_size: int,
        augmentation: Augmentation | None = None,
        epoch: int = 0,
    ) -> SequentialLoader:
        rank, world_size = self._process()
        return SequentialLoader(
            self._store(split),
            index,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )

    def _store(self, split: SplitName) -> ImageStore:
        """The images on their place; made once per split and device."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        store = self._stores.get(split)
        if store is None or store.device != device:
            images = self._official if split == "train" else self._test
            if images is None:
                raise RuntimeError(f"the {split} split was not read")
            parts = [(images.x, images.y)]
            if split == "train" and self._extra is not None:
                parts.append(self._extra)
            store = self._stores[split] = ImageStore(parts, device=device, placement=self.placement)
        return store

    def _class_table(self) -> tuple[Tensor, Tensor]:
        """(training images sorted by class, images per class)."""
        if self._per_class is None:
            official, (train, _) = self._training_set()
            labels, index = official.y[train], train
            if self._extra is not None:
                index = torch.cat((index, torch.arange(len(self._extra[1])) + len(official.y)))
                labels = torch.cat((labels, self._extra[1]))
            order = labels.argsort(stable=True)
            self._per_class = index[order], labels.bincount(minlength=len(official.classes))
        return self._per_class

    def _process(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        if distributed.world_size() > 1 or self.trainer is None:
            return distributed.rank(), distributed.world_size()
        return self.trainer.global_rank, self.trainer.world_size

    def _fitting(self) -> bool:
        if self.trainer is None:
            return False
        state = self.trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise ValueError(f"dataset.{name}={value!r}: expected at least {least}, a whole number")
