"""Stratified splits and subsets: sizes, disjointness, determinism."""

import pytest
import torch

from mi_at.data.splits import split, stratified_order

CIFAR_LIKE = torch.arange(50_000) % 10
# Unequal classes, as in the digits and SVHN.
UNEVEN = torch.repeat_interleave(torch.arange(4), torch.tensor([178, 60, 13, 5]))


@pytest.mark.parametrize("labels", [CIFAR_LIKE, UNEVEN])
@pytest.mark.parametrize("size", [1, 10, 37, 128])
def test_every_prefix_is_stratified(labels: torch.Tensor, size: int) -> None:
    order = stratified_order(labels, seed=0)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    found = labels[order[:size]].bincount(minlength=int(labels.max()) + 1)
    expected = labels.bincount() * (size / len(labels))
    assert (found - expected).abs().max() <= 1


def test_cifar_split_is_exact() -> None:
    train, val = split(CIFAR_LIKE, val_size=2000, seed=0)
    assert CIFAR_LIKE[val].bincount().tolist() == [200] * 10
    assert CIFAR_LIKE[train].bincount().tolist() == [4800] * 10
    assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(50_000))


@pytest.mark.parametrize(("fraction", "size"), [(0.4, 19_200), (0.6, 28_800), (0.8, 38_400), (1.0, 48_000)])
def test_fractions(fraction: float, size: int) -> None:
    train, val = split(CIFAR_LIKE, val_size=2000, fraction=fraction, seed=0)
    assert CIFAR_LIKE[train].bincount().tolist() == [size // 10] * 10
    assert not set(train.tolist()) & set(val.tolist())
    # The validation split does not depend on the fraction, and subsets are nested.
    whole, same_val = split(CIFAR_LIKE, val_size=2000, seed=0)
    assert torch.equal(val, same_val)
    assert set(train.tolist()) <= set(whole.tolist())


def test_train_size() -> None:
    train, _ = split(CIFAR_LIKE, val_size=1000, train_size=10_000, seed=0)
    assert len(train) == 10_000
    assert CIFAR_LIKE[train].bincount().tolist() == [1000] * 10
    smaller, _ = split(CIFAR_LIKE, val_size=1000, train_size=500, seed=0)
    assert set(smaller.tolist()) <= set(train.tolist())


def test_uneven_classes_are_spread() -> None:
    train, val = split(UNEVEN, val_size=64, fraction=0.5, seed=3)
    assert (len(train), len(val)) == (96, 64)
    assert (UNEVEN[val].bincount(minlength=4) - UNEVEN.bincount() * 64 / 256).abs().max() <= 1
    assert (UNEVEN[train].bincount(minlength=4) - UNEVEN.bincount() * 96 / 256).abs().max() <= 2


def test_deterministic_in_the_split_seed_alone() -> None:
    first = split(UNEVEN, val_size=50, fraction=0.4, seed=0)
    torch.manual_seed(99)
    again = split(UNEVEN, val_size=50, fraction=0.4, seed=0)
    other = split(UNEVEN, val_size=50, fraction=0.4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert first[0].tolist() == sorted(first[0].tolist())


def test_split_is_the_one_that_records_were_measured_on() -> None:
    """A golden value: another order of torch's permutation or of ours would move images between splits."""
    _, val = split(CIFAR_LIKE, val_size=2000, seed=0)
    assert (val[:5].tolist(), int(val.sum())) == ([18, 42, 49, 55, 58], 48610690)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"dataset.fraction=0.0: expected a share in \(0, 1\]"),
        ({"fraction": 1.5}, r"dataset.fraction=1.5"),
        ({"val_size": 256}, "dataset.val_size=256: expected 0 to 255"),
        ({"val_size": -1}, "dataset.val_size=-1"),
        ({"val_size": 56, "train_size": 201}, "dataset.train_size=201: expected 1 to 200"),
        ({"train_size": 10, "fraction": 0.5}, "give one of the two"),
    ],
)
def test_impossible_sizes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(UNEVEN, **options)
