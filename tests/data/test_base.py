"""The data module: stages, splits, placements, what it refuses, two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_at.data.augment import crop_flip, draw_crop_flip
from mi_at.data.base import Images
from mi_at.data.loader import SequentialLoader
from tests.data.makers import Plain, TinyCIFAR10, make_cifar10, make_extra


def fitted(**options: object) -> Plain:
    plain = Plain(**{"batch_size": 8, **options})  # type: ignore[arg-type]
    plain.setup("fit")
    return plain


def test_stand_alone() -> None:
    plain = fitted(val_size=8)
    assert (len(plain.train_index), len(plain.val_index)) == (32, 8)
    assert not set(plain.train_index.tolist()) & set(plain.val_index.tolist())
    assert plain.classes == ("a", "b", "c", "d")
    batch = next(iter(plain.train_dataloader()))
    # Image i is filled with i, so index, image and label must belong together.
    assert torch.equal(batch.x[:, 0, 0, 0], batch.index.float() / 255)
    assert torch.equal(batch.y, batch.index % 4)
    val = plain.val_dataloader()
    assert isinstance(val, SequentialLoader)
    assert torch.equal(torch.cat([b.index for b in val]), plain.val_index)


def test_only_what_a_stage_may_see_is_read() -> None:
    plain = Plain(batch_size=8)
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\) first"):
        plain.train_dataloader()
    with pytest.raises(RuntimeError, match="the class names are known after"):
        _ = plain.classes
    plain.setup("fit")
    assert plain.reads == ["train"]
    with pytest.raises(RuntimeError, match="the test split cannot be reached from a fit"):
        plain.test_dataloader()
    plain.setup("test")
    assert [batch.index.tolist() for batch in plain.test_dataloader()] == [list(range(8)), list(range(8, 16))]
    plain.setup("fit")
    assert plain.reads == ["train", "test"]
    with pytest.raises(RuntimeError, match="the test split cannot be reached from a fit"):
        plain.test_dataloader()
    with pytest.raises(ValueError, match="stage='predict'"):
        plain.setup("predict")


def test_no_validation() -> None:
    assert fitted(val_size=0).val_dataloader() == []


def test_split_does_not_depend_on_the_training_seed() -> None:
    first, second = fitted(val_size=8, seed=0), fitted(val_size=8, seed=1)
    assert torch.equal(first.val_index, second.val_index)
    assert not torch.equal(next(first.train_dataloader()).index, next(second.train_dataloader()).index)
    assert not torch.equal(first.val_index, fitted(val_size=8, split_seed=1).val_index)


def test_subsets_and_sizes_of_batches() -> None:
    assert len(fitted(fraction=0.4).train_index) == 16
    assert len(fitted(train_size=10).train_index) == 10
    assert len(fitted(drop_last=True, train_size=39, batch_size=16).train_dataloader()) == 2
    assert len(fitted(batches_per_epoch=9).train_dataloader()) == 9
    plain = fitted(val_size=20, eval_batch_size=12)
    assert [len(batch) for batch in plain.val_dataloader()] == [12, 8]  # type: ignore[arg-type]


def test_only_training_batches_are_augmented() -> None:
    options = {"val_size": 8, "augment": True, "pad": 2}
    plain = fitted(**options)

    def whole(x: Tensor) -> bool:
        """Whether every image is still of one value, that is, shows no padding."""
        return bool((x.flatten(1).amin(1) == x.flatten(1).amax(1)).all())

    assert not all(whole(batch.x) for batch in plain.train_dataloader())
    assert all(whole(batch.x) for batch in plain.val_dataloader())  # type: ignore[union-attr]
    assert all(whole(batch.x) for batch in plain.train_batches())
    assert not all(whole(batch.x) for batch in plain.train_batches(augment=True))
    assert all(whole(batch.x) for batch in fitted(val_size=8).train_batches(augment=True))


def test_train_batches_is_one_plain_pass() -> None:
    plain = fitted(val_size=8, augment=True, pad=2)
    batches = list(plain.train_batches(batch_size=32, augment=True, epoch=4))
    index = torch.cat([batch.index for batch in batches])
    assert not torch.equal(index, plain.train_index), "files may be sorted by class"
    assert torch.equal(index.sort()[0], plain.train_index)
    official = torch.cat([batch.index for batch in plain.train_batches()])
    assert torch.equal(official, plain.train_index)
    again = list(plain.train_batches(batch_size=32, augment=True, epoch=4))
    other = list(plain.train_batches(batch_size=32, augment=True, epoch=5))
    assert torch.equal(batches[0].x, again[0].x)
    assert not torch.equal(batches[0].x, other[0].x)
    assert [len(batch) for batch in plain.train_batches()] == [8, 8, 8, 8]


def test_draw_per_class() -> None:
    plain = fitted(val_size=8)
    batch = plain.draw_per_class(5, generator=torch.Generator().manual_seed(0))
    assert batch.y.tolist() == [c for c in range(4) for _ in range(5)]
    assert torch.equal(batch.x[:, 0, 0, 0], batch.index.float() / 255)
    assert set(batch.index.tolist()) <= set(plain.train_index.tolist())
    assert torch.equal(plain.draw_per_class(5, generator=torch.Generator().manual_seed(0)).index, batch.index)
    assert (batch.global_size, batch.offset) == (20, 0)
    many = plain.draw_per_class(800, generator=torch.Generator().manual_seed(0)).index
    counts = many.bincount(minlength=40)[plain.train_index]
    assert counts.min() > 50  # of 100 expected


def test_draw_per_class_augmented() -> None:
    plain = fitted(augment=True, pad=2)
    generator = torch.Generator().manual_seed(0)
    still = plain.draw_per_class(3, generator=generator)
    drawn = draw_crop_flip(12, pad=2, flip=True, generator=generator)
    moved = plain.draw_per_class(3, generator=torch.Generator().manual_seed(0), augment=True)
    assert torch.equal(moved.index, still.index)
    assert torch.equal(moved.x, crop_flip(still.x, drawn, pad=2))


def test_draw_per_class_refuses() -> None:
    with pytest.raises(ValueError, match="n=0"):
        fitted().draw_per_class(0, generator=torch.Generator())
    with pytest.raises(ValueError, match="no training image of class"):
        fitted(train_size=2, batch_size=2).draw_per_class(1, generator=torch.Generator())


def _shares(rank: int, world_size: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """(index, x, offset, global_size) of every batch that a process gets."""
    plain = fitted(val_size=9, augment=True, pad=2)
    loaders = [plain.train_dataloader(), plain.val_dataloader(), plain.train_batches(batch_size=15)]
    batches = [batch for loader in loaders for batch in loader]  # type: ignore[union-attr]
    batches.append(plain.draw_per_class(3, generator=torch.Generator().manual_seed(0)))
    return [(batch.index, batch.x, batch.offset, batch.global_size) for batch in batches]


@pytest.mark.ddp
def test_two_processes_share_every_batch(spawn: Callable[..., list[Any]]) -> None:
    first, second = spawn(_shares, 2)
    whole = _shares(0, 1)
    assert len(first) == len(second) == len(whole)
    for a, b, (index, x, _, size) in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat((a[0], b[0])), index)
        assert torch.equal(torch.cat((a[1], b[1])), x)
        assert (a[2], b[2], a[3], b[3]) == (0, len(a[0]), size, size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "dataset.batch_size=0: expected at least 1"),
        ({"eval_batch_size": 0}, "dataset.eval_batch_size=0"),
        ({"val_size": -1}, "dataset.val_size=-1: expected at least 0"),
        ({"train_size": 0}, "dataset.train_size=0"),
        ({"batches_per_epoch": 0}, "dataset.batches_per_epoch=0"),
        ({"fraction": 0}, r"dataset.fraction=0: expected a share in \(0, 1\]"),
        ({"fraction": 40}, "dataset.fraction=40"),
        ({"fraction": 0.5, "train_size": 5}, "give one of the two"),
        ({"placement": "gpu"}, "dataset.placement='gpu': expected one of auto, device, memory, mmap"),
        ({"augment": True, "pad": -1}, "dataset.pad=-1"),
        ({"extra": "x.npz", "extra_fraction": 1.5}, "dataset.extra_fraction=1.5"),
        ({"extra": "x.npz", "batch_size": 1}, "use a larger dataset.batch_size"),
        ({"download": True}, "torchvision cannot fetch plain"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plain(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, "dataset.batch_size=41: expected at most 40, the training images of plain"),
        ({"batch_size": 33, "val_size": 8}, "dataset.batch_size=33: expected at most 32"),
        ({"batch_size": 8, "fraction": 0.1}, "dataset.batch_size=8: expected at most 4"),
        ({"val_size": 40}, "dataset.val_size=40: expected 0 to 39"),
        ({"val_size": 20, "train_size": 21}, "dataset.train_size=21: expected 1 to 20"),
        ({"num_classes": 5}, "dataset.num_classes=5, but the files name 4 classes"),
        ({"channels": 3}, r"images of \(channels, height, width\) \(1, 8, 8\), expected \(3, 8, 8\)"),
        ({"image_size": 32}, r"expected \(1, 32, 32\)"),
    ],
)
def test_options_that_the_data_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(**options)


IMAGES = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(6) % 4


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (IMAGES.float(), LABELS, "images torch.float32"),
        (IMAGES[:, 0], LABELS, r"expected torch.uint8 \[N, C, H, W\]"),
        (IMAGES, LABELS.int(), "labels torch.int32"),
        (IMAGES, LABELS[:5], r"labels torch.int64 \[5\], expected torch.int64 \[6\]"),
        (IMAGES, LABELS + 1, "labels run from 1 to 4, expected 0 to 3"),
        (IMAGES, LABELS - 1, "labels run from -1 to 2"),
        (IMAGES[:0], LABELS[:0], "no images"),
    ],
)
def test_arrays_that_are_no_images_or_labels(x: Tensor, y: Tensor, message: str) -> None:
    class Broken(Plain):
        def read(self, split: str) -> Images:
            return Images(x, y, tuple("abcd"))

    with pytest.raises(ValueError, match=message):
        Broken(batch_size=2).setup("fit")


def cifar(root: Path, **options: object) -> TinyCIFAR10:
    data = TinyCIFAR10(root=root, **{"batch_size": 20, **options})  # type: ignore[arg-type]
    data.setup("fit")
    return data


@pytest.mark.parametrize("placement", ["auto", "mmap", "memory"])
def test_extra_images(tmp_path: Path, placement: str) -> None:
    official = torch.from_numpy(make_cifar10(tmp_path))
    extra = torch.from_numpy(make_extra(tmp_path / "extra.npz", count=45)).permute(0, 3, 1, 2)
    data = cifar(tmp_path, extra=tmp_path / "extra.npz", placement=placement, val_size=20)
    loader = data.train_dataloader()
    assert len(loader) == 5  # ceil(100 / 20): the official training set, whatever is held out
    for batch in loader:
        assert int((batch.index >= 100).sum()) == 14
        pixels = torch.cat((official, extra))[batch.index]
        assert torch.equal(batch.x, pixels.float() / 255)
        assert torch.equal(batch.y, torch.where(batch.index < 100, batch.index % 20 % 10, (batch.index - 100) % 10))
        assert not set(batch.index.tolist()) & set(data.val_index.tolist())
    assert len(cifar(tmp_path, extra=tmp_path / "extra.npz", batches_per_epoch=3).train_dataloader()) == 3
    part = cifar(tmp_path, extra=tmp_path / "extra.npz", train_size=30, val_size=20)
    assert len(part.train_dataloader()) == 3  # ceil((30 + 20) / 20)
    assert torch.equal(torch.cat([b.index for b in data.train_batches()]), data.train_index)
    drawn = data.draw_per_class(50, generator=torch.Generator().manual_seed(0))
    assert (drawn.index >= 100).any()
    assert (drawn.index < 100).any()
    mapped = list(tmp_path.glob("extra.*.npy"))
    assert len(mapped) == (placement == "mmap")
    if mapped:  # a second run maps the same file
        first = mapped[0].stat().st_mtime_ns
        cifar(tmp_path, extra=tmp_path / "extra.npz", placement=placement)
        assert [path.stat().st_mtime_ns for path in tmp_path.glob("extra.*.npy")] == [first]


def test_extra_files_that_do_not_fit(tmp_path: Path) -> None:
    import numpy as np

    make_cifar10(tmp_path)
    path = tmp_path / "extra.npz"

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            cifar(tmp_path, extra=path)

    refused(FileNotFoundError, "extra set: not found: .*extra.npz")
    images = make_extra(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "extra set: .*extra.npz.*expected an .npz")
    path.write_bytes(b"")
    refused(ValueError, "extra set")
    labels = np.arange(50) % 10
    for arrays, message in (
        ({"image": images}, "no array label, found image"),
        ({"image": images.astype(np.float32), "label": labels}, "image has dtype float32"),
        ({"image": images[:, :28, :28], "label": labels}, r"\(3, 28, 28\), expected \(3, 32, 32\)"),
        ({"image": images, "label": labels[:40]}, r"label has shape \(40,\)"),
        ({"image": images, "label": labels.astype(np.float64)}, "dtype float64"),
        ({"image": images, "label": labels + 1}, "labels run from 1 to 10, expected 0 to 9"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        refused(ValueError, message)
