"""Noise that depends on (seed, sample id) alone, so that an attack's result does not depend on its batch.

A counter-based generator: SplitMix64's finaliser (Steele, Lea, Flood 2014) applied to a key of the seed and the id,
then to a counter per pixel. Works on any device, batched, without state.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def uniform(ids: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform noise in [0, 1), a pure function of (seed, id).

    Args:
        ids: [B] int64, one per sample.
        shape: shape of one sample.
        seed: any integer.

    Returns:
        [B, *shape] float32 in [0, 1).

    Example:
        >>> a = uniform(torch.tensor([7, 8]), (2, 2), seed=0)
        >>> torch.equal(uniform(torch.tensor([8]), (2, 2), seed=0)[0], a[1])
        True
    """
    bits = _bits(ids, math.prod(shape), seed)
    return (_shift(bits, 40).to(torch.float32) * 2.0**-24).view(len(ids), *shape)


def gaussian(ids: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise, a pure function of (seed, id), by the Box-Muller transform.

    Args:
        ids: [B] int64, one per sample.
        shape: shape of one sample.
        seed: any integer.

    Returns:
        [B, *shape] float32.

    Example:
        >>> abs(gaussian(torch.arange(1000), (10,), seed=1).std().item() - 1) < 0.02
        True
    """
    bits = _bits(ids, 2 * math.prod(shape), seed).view(len(ids), 2, math.prod(shape))
    first = (_shift(bits[:, 0], 40).double() + 1) * 2.0**-24  # in (0, 1]
    second = _shift(bits[:, 1], 40).double() * 2.0**-24
    return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).float().view(len(ids), *shape)


def key(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> int:
    """One seed per purpose: distinct for distinct arguments within the ranges that occur; `key + 1` is free too.

    Example:
        >>> key(0, "adversarial", 0, 1) == key(0, "adversarial", 1, 0)
        False
    """
    named = zlib.crc32(purpose.encode())
    return (((seed * 1_000_003 + named) * 1_000_003 + epoch) * 1_000_003 + batch) * 2


_sources: list[tuple[Tensor, Iterator[int]]] = []


@contextmanager
def keyed(ids: Tensor, seed: int) -> Iterator[None]:
    """What stochastic layers draw in this block (`normal_like`) is a function of (seed, id, how many draws before).

    Args:
        ids: [B] int64 of the samples that are forwarded.
        seed: any integer.

    Example:
        >>> with keyed(torch.tensor([5]), seed=0):
        ...     first, second = normal_like(torch.zeros(1, 3)), normal_like(torch.zeros(1, 3))
        >>> with keyed(torch.tensor([4, 5]), seed=0):
        ...     again = normal_like(torch.zeros(2, 3))
        >>> torch.equal(again[1:], first), torch.equal(first, second)
        (True, False)
    """
    _sources.append((ids, (key(seed, "draw", draw) for draw in itertools.count())))
    try:
        yield
    finally:
        _sources.pop()


def normal_like(x: Tensor) -> Tensor:
    """Standard normal noise for a batch [B, ...]: keyed by sample in a `keyed` block, else from torch's generator.

    Raises:
        ValueError: in a `keyed` block, another number of samples than ids.
    """
    if not _sources:
        return torch.randn_like(x)
    ids, seeds = _sources[-1]
    if len(ids) != len(x):
        raise ValueError(f"noise for {len(x)} samples in a block keyed by {len(ids)} ids")
    return gaussian(ids, x.shape[1:], next(seeds)).to(x)


def _bits(ids: Tensor, count: int, seed: int) -> Tensor:
    """[B, count] int64 of random bits."""
    key = _mix(_mix(ids.to(torch.int64) * _GOLDEN + _mix_int(seed)))
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=ids.device) * _GOLDEN
    return _mix(key[:, None] + counter[None, :])


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift(z, 31)


def _mix_int(seed: int) -> int:
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return int(_mix(torch.tensor(wrapped)))


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (z >> n) & ((1 << (64 - n)) - 1)
