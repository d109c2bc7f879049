"""Loaders: order, shares of every number of processes, extra images, state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mi_at.data.loader import (
    MIN_LAST,
    Augmentation,
    DeviceLoader,
    ImageStore,
    SequentialLoader,
    batch_sizes,
    extra_count,
)


def make_store(count: int = 70, *, size: int = 8, extra: int = 0) -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count + extra, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count + extra) % 5
    parts = [(images[:count], labels[:count])]
    if extra:
        parts.append((images[count:], labels[count:]))
    return ImageStore(parts)


def make(count: int = 70, **options: object) -> DeviceLoader:
    defaults = {"batch_size": 32, "seed": 0}
    return DeviceLoader(make_store(count), torch.arange(count), **{**defaults, **options})  # type: ignore[arg-type]


def indices(loader: DeviceLoader) -> list[Tensor]:
    return [batch.index for batch in loader]


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "sizes"),
    [
        (256, 128, False, [128, 128]),
        (300, 128, False, [128, 128, 44]),
        (300, 128, True, [128, 128]),
        (256 + MIN_LAST, 128, False, [128, 128, MIN_LAST]),
        (256 + MIN_LAST - 1, 128, False, [128, 128 + MIN_LAST - 1]),
        (10, 4, False, [4, 6]),
        (100, 128, False, [100]),
        (3, 128, False, [3]),
        (3, 1, False, [1, 1, 1]),
        (0, 128, False, []),
    ],
)
def test_batch_sizes(count: int, batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    assert batch_sizes(count, batch_size, drop_last=drop_last) == sizes


def test_batch_contents() -> None:
    store = make_store()
    loader = DeviceLoader(store, torch.arange(10, 60), batch_size=20, seed=0)
    images, labels, _ = store.take(torch.arange(70))
    for number, batch in enumerate(loader):
        assert (batch.x.dtype, batch.y.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)
        assert torch.equal(batch.x, images[batch.index].float() / 255)
        assert torch.equal(batch.y, labels[batch.index])
        assert (batch.epoch, batch.batch_idx, batch.offset, batch.global_size) == (0, number, 0, len(batch))
    assert number == 2


def test_floats_have_the_bits_of_torchvision() -> None:
    from torchvision.transforms import ToTensor

    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ours = ImageStore([(values, torch.zeros(1, dtype=torch.int64))]).to_float(values)
    assert torch.equal(ours[0, 0], ToTensor()(values[0, 0].numpy())[0])


def test_an_epoch_holds_every_image_once_in_an_order_of_seed_and_epoch() -> None:
    first, second = indices(loader := make()), indices(loader)
    assert torch.equal(torch.cat(first).sort().values, torch.arange(70))
    assert torch.equal(torch.cat(second).sort().values, torch.arange(70))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    torch.manual_seed(5)
    again = make()
    again.set_epoch(1)
    assert torch.equal(torch.cat(indices(again)), torch.cat(second))
    assert not torch.equal(torch.cat(indices(make(seed=1))), torch.cat(first))


def test_epochs_go_on_by_themselves() -> None:
    loader = make(batch_size=10)
    iter(iter(loader))  # Lightning calls iter() twice before the first batch
    taken = [next(loader).epoch for _ in range(3)]
    assert taken == [0, 0, 0]
    assert [(batch.epoch, batch.batch_idx) for batch in loader] == [(1, i) for i in range(7)]  # left early
    assert [batch.epoch for batch in loader] == [2] * 7
    loader.set_epoch(2)  # the epoch it is in: no change
    assert loader.position == 7
    loader.set_epoch(5)
    assert (loader.epoch, loader.position) == (5, 0)


@pytest.mark.parametrize("augmentation", [None, Augmentation(pad=2, flip=True)])
@pytest.mark.parametrize("count", [70, 71, 64 + MIN_LAST - 1, 67])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_are_the_global_batch(world_size: int, count: int, augmentation: Augmentation | None) -> None:
    whole = make(count, augmentation=augmentation)
    ranks = [make(count, augmentation=augmentation, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(loader) for loader in ranks} == {len(whole)}
    for _ in range(2):
        for batch, *shards in zip(whole, *ranks, strict=True):
            for name in ("x", "y", "index"):
                joined = torch.cat([getattr(shard, name) for shard in shards])
                assert torch.equal(joined, getattr(batch, name))
            cuts = torch.arange(len(batch)).tensor_split(world_size)
            assert [shard.offset for shard in shards] == [int(cut[0]) for cut in cuts]
            assert {shard.global_size for shard in shards} == {len(batch)}


def test_global_batch_is_the_uncut_one_and_leaves_the_place() -> None:
    loader = make(augmentation=Augmentation(), rank=1, world_size=2)
    whole = list(make(augmentation=Augmentation()))
    assert torch.equal(loader.global_batch(0, 1).x, whole[1].x)
    assert loader.state_dict()["position"] == 0


def test_too_many_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 9 images cannot be shared among 10 processes"):
        make(73, rank=0, world_size=10)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        make(rank=2, world_size=2)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resumes_in_the_middle_of_an_epoch(stop: int) -> None:
    options = {"augmentation": Augmentation(pad=2), "batch_size": 25}
    reference = [batch for loader in [make(**options)] for _ in range(3) for batch in loader]
    loader = make(**options)
    list(loader)
    iter(loader)
    seen = [next(loader) for _ in range(stop)]
    state = loader.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = make(**options)
    iter(resumed)
    resumed.load_state_dict(state)
    iter(resumed)
    if stop == 0:
        resumed.set_epoch(1)  # nothing of epoch 1 was taken: only the caller knows that it began
    rest = [*resumed, *resumed]
    for ours, theirs in zip([*seen, *rest], reference[3:], strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.x, theirs.x)
        assert (ours.epoch, ours.batch_idx) == (theirs.epoch, theirs.batch_idx)


@pytest.mark.parametrize(
    ("count", "options", "key"),
    [(70, {"batch_size": 16}, "batch_size"), (69, {}, "images"), (70, {"seed": 3}, "seed")],
)
def test_a_place_in_another_order_is_refused(count: int, options: dict, key: str) -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match=f"the saved place has {key}="):
        make(count, **options).load_state_dict(state)


def test_epochs_of_a_stated_length() -> None:
    loader = make(batch_size=32, batches_per_epoch=5)
    taken = torch.cat(indices(loader))
    assert len(taken) == 160
    assert torch.equal(taken[:70].sort().values, torch.arange(70))
    assert torch.equal(taken[70:140].sort().values, torch.arange(70))
    assert len(make(batch_size=32, batches_per_epoch=1)) == 1


def test_extra_images_are_mixed_three_to_seven() -> None:
    store = make_store(40, extra=100)
    loader = DeviceLoader(
        store,
        torch.arange(40),
        batch_size=20,
        seed=0,
        extra_index=torch.arange(100) + 40,
        extra_fraction=0.7,
        batches_per_epoch=6,
    )
    images, labels, _ = store.take(torch.arange(140))
    batches = list(loader)
    assert len(batches) == 6
    for batch in batches:
        assert int((batch.index >= 40).sum()) == 14
        assert torch.equal(batch.x, images[batch.index].float() / 255)
        assert torch.equal(batch.y, labels[batch.index])
    taken = torch.cat([batch.index for batch in batches])
    original, extra = taken[taken < 40], taken[taken >= 40]
    assert len(original.unique()) == 36  # no image twice before all were seen
    assert len(extra.unique()) == 84
    # Every process's half of a batch holds both kinds.
    assert all(0 < int((half >= 40).sum()) < 10 for batch in batches for half in batch.index.split(10))
    assert loader.num_images == 140


@pytest.mark.parametrize(("batch_size", "count"), [(512, 358), (128, 90), (2, 1), (10, 7)])
def test_extra_count(batch_size: int, count: int) -> None:
    assert extra_count(batch_size, 0.7) == count


def test_sequential_loader_repeats_its_pass() -> None:
    store = make_store()
    loader = SequentialLoader(store, torch.arange(5, 50), batch_size=20, augmentation=Augmentation(pad=1), epoch=3)
    first, second = list(loader), list(loader)
    assert [len(batch) for batch in first] == [20, 25]
    assert torch.equal(torch.cat([batch.index for batch in first]), torch.arange(5, 50))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))
    assert {batch.epoch for batch in first} == {3}
    assert loader.num_images == 45
    halves = [SequentialLoader(store, torch.arange(7), batch_size=20, rank=rank, world_size=2) for rank in (0, 1)]
    assert [batch.index.tolist() for half in halves for batch in half] == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 71}, "dataset.batch_size=71: expected at most 70"),
        ({"batch_size": 0}, "dataset.batch_size=0: expected at least 1"),
        ({"batches_per_epoch": 0}, "dataset.batches_per_epoch=0"),
        ({"extra_index": torch.arange(3)}, "needs its number of batches"),
        ({"extra_index": torch.arange(0), "batches_per_epoch": 2}, "holds no image"),
        (
            {"extra_index": torch.arange(3), "batches_per_epoch": 2, "extra_fraction": 1.0},
            "extra_fraction=1.0",
        ),
        (
            {"extra_index": torch.arange(3), "batches_per_epoch": 2, "batch_size": 1},
            "gives 1 extra images in a batch of 1",
        ),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_placement_and_negative_padding() -> None:
    with pytest.raises(ValueError, match=r"dataset.placement='gpu': expected one of auto, device, memory, mmap"):
        ImageStore([(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1))], placement="gpu")
    with pytest.raises(ValueError, match=r"dataset.pad=-1"):
        Augmentation(pad=-1)
