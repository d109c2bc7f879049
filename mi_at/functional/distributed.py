"""Gathering the global batch so that a loss on k processes equals the loss on one.

Each process computes the loss of the whole batch, with gradients through its own shard only. The gradient of the
whole is the sum of these over processes; DistributedDataParallel averages, so the loss is multiplied by
`world_size()` before backward. No communication happens in backward, and pure functions know nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 without a process group.

    Example:
        >>> world_size()
        1
    """
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_alone: list[None] = []


@contextmanager
def alone() -> Iterator[None]:
    """In this block the process is the only one: nothing is gathered, for the others do not come by here.

    Example:
        >>> with alone():
        ...     world_size(), rank()
        (1, 0)
    """
    _alone.append(None)
    try:
        yield
    finally:
        _alone.pop()


def rank() -> int:
    """Index of this process; 0 without a process group.

    Example:
        >>> rank()
        0
    """
    if _alone:
        return 0
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shard_sizes(total: int, parts: int) -> list[int]:
    """Sizes of the shards that `torch.tensor_split` cuts, which the loader uses.

    Args:
        total: size of the global batch.
        parts: number of processes.

    Returns:
        A list of `parts` sizes; the first ones are larger by one where it does not divide.

    Example:
        >>> shard_sizes(7, 3)
        [3, 2, 2]
    """
    return [total // parts + (i < total % parts) for i in range(parts)]


def gather(shard: Tensor, total: int | None = None) -> Tensor:
    """The global batch: the other processes' shards detached, the own one with its graph.

    Args:
        shard: [b, ...], this process's part in the order of `torch.tensor_split`.
        total: size of the global batch, where known; saves a communication.

    Returns:
        [B, ...], the same values on every process; `shard` itself on one process.

    Example:
        >>> gather(torch.arange(3)).tolist()
        [0, 1, 2]
    """
    parts = world_size()
    if parts == 1:
        return shard
    if total is None:
        count = torch.tensor(len(shard), device=shard.device)
        dist.all_reduce(count)
        total = int(count)
    sizes = shard_sizes(total, parts)
    own = rank()
    if sizes[own] != len(shard):
        raise ValueError(f"process {own} holds {len(shard)} of {total} samples, expected {sizes[own]}")
    padded = shard.new_zeros(max(sizes), *shard.shape[1:])
    padded[: len(shard)] = shard.detach()
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    parts_cut = [part[:size] for part, size in zip(received, sizes, strict=True)]
    parts_cut[own] = shard
    return torch.cat(parts_cut)


def own_shard(whole: Tensor) -> Tensor:
    """This process's part of a tensor drawn for the global batch.

    Args:
        whole: [B, ...].

    Returns:
        [b, ...].

    Example:
        >>> own_shard(torch.arange(3)).tolist()
        [0, 1, 2]
    """
    return whole.tensor_split(world_size())[rank()]
