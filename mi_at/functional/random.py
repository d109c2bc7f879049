"""Noise that depends on (seed, sample id) alone, so that an attack's result does not depend on its batch.

A counter-based generator: SplitMix64's finaliser (Steele, Lea, Flood 2014) applied to a key of the seed and the id,
then to a counter per pixel. Works on any device, batched, without state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
