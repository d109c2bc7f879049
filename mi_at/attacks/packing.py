"""What the evaluator lends to attacks that batch samples themselves: a batch size that fits, steps that are kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Kept = dict[str, "Tensor | str"]
"""What a step leaves behind: tensors and text by name."""


def tensor(kept: Kept, name: str) -> Tensor:
    """A tensor of a step's.

    Raises:
        TypeError: it is text.
    """
    value = kept[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


class Steps(Protocol):
    """Runs named pieces of work, or finds them done: by an earlier sitting, or by another process."""

    def __call__(self, names: Sequence[str], compute: Callable[[int], Kept]) -> Iterator[tuple[int, Kept]]:
        """Give (number, outcome) of every name once, in any order; `compute(number)` is called for what is not done."""
        ...


def every_step(names: Sequence[str], compute: Callable[[int], Kept]) -> Iterator[tuple[int, Kept]]:
    """Steps that keep nothing: all are computed here, in order.

    Example:
        >>> [number for number, _ in every_step(["a", "b"], lambda number: {})]
        [0, 1]
    """
    for number in range(len(names)):
        yield number, compute(number)


class BatchSize:
    """How many samples are computed at once; it halves when memory runs out.

    Attributes:
        size: the present number.

    Args:
        size: to begin with, 1 or more.
        on_halving: told the new size.

    Example:
        >>> def small(x):
        ...     if len(x) > 2:
        ...         raise torch.OutOfMemoryError("out of memory")
        ...     return 2 * x
        >>> batch = BatchSize(8)
        >>> batch.map(small, torch.arange(5)), batch.size
        (tensor([0, 2, 4, 6, 8]), 2)
    """

    def __init__(self, size: int, *, on_halving: Callable[[int], None] | None = None) -> None:
        if size < 1:
            raise ValueError(f"batch_size={size}: expected 1 or more")
        self.size = size
        self._on_halving = on_halving

    def map(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Apply a function of batches whose rows do not depend on each other.

        Args:
            function: tensors [b, ...] -> a tensor [b, ...] or a tuple of such.
            tensors: [B, ...] each, B >= 1.

        Returns:
            What the function returns, for all B rows.

        Raises:
            RuntimeError: memory runs out on a single sample.
        """
        results, begin = [], 0
        while begin < len(tensors[0]):
            rows = slice(begin, begin + self.size)
            result = self._try(function, *(tensor[rows] for tensor in tensors))
            if result is not None:
                results.append(result)
                begin = rows.stop
        if len(results) == 1:
            return results[0]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def _try(self, function: Callable[..., Any], *parts: Tensor) -> Any:
        """The result, or None where memory ran out: the size is smaller then."""
        rows = len(parts[0])
        try:
            return function(*parts)
        except Exception as error:
            if rows == 1 or not out_of_memory(error):
                raise
        # Outside the handler, whose error still holds the tensors that did not fit.
        self.size = rows // 2
        free_memory()
        if self._on_halving is not None:
            self._on_halving(self.size)
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host.

    Example:
        >>> out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), out_of_memory(RuntimeError("a bug"))
        (True, False)
    """
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def free_memory() -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How an attack that gets many samples at once batches them.

    Attributes:
        batch: how many at once.
        device: where they are computed; None: where they are.
        active: leave out what is settled already; off, every sample is computed to the end. The outcome is the same.
        on_progress: told (share of the work done, in [0, 1]; samples broken so far).
    """

    batch: BatchSize
    device: torch.device | None = None
    active: bool = True
    on_progress: Callable[[float, int], None] | None = None
