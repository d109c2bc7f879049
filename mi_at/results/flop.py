"""What computations cost, counted as they happen: FLOP, and bytes of hollow tensors, which have no values.

A hollow tensor goes through the real code of networks, attacks and defenses in the time that Python takes: the step of
a WideResNet is counted without its weights, without data and without waiting for the numbers.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATEN: Any = torch.ops.aten
MASKED = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)


class FlopCount(TorchDispatchMode):
    """FLOP of convolutions and matrix products while it is active, 2 per multiplication and addition.

    Attributes:
        of: FLOP by the type of what is multiplied, such as torch.bfloat16.
        calls: operations of any kind that were asked for, one after another.
        peak: the most bytes that hollow tensors made meanwhile took at once.

    Example:
        >>> with FlopCount() as count:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> count.flop
        60
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[torch.dtype] = Counter()
        self.calls: float = 0
        self.peak = self._live = 0
        self._storages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @property
    def flop(self) -> int:
        """Of all types."""
        return sum(self.of.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if func._overloadpacket in flop_registry:
            flop = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.of[next(leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor))] += flop
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Hollow):
                self._note(leaf.meta.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        """A storage is alive from the moment it is first seen until nothing refers to it."""
        if self._storages.get(storage._cdata) is None:
            size = storage.nbytes()
            self._storages[storage._cdata] = storage
            weakref.finalize(storage, self._forget, size).atexit = False
            self._live += size
            self.peak = max(self.peak, self._live)

    def _forget(self, size: int) -> None:
        self._live -= size


class Hollow(Tensor):
    """A tensor without values: what is computed of it is hollow too.

    A mask selects everything. A value that is read is 1, of a truth value true, but false where it says whether there
    is `any`: the checks of this package ask whether anything is wrong, or all is right. It says that it lies on the
    CPU, for autocast wants a device.

    Args:
        meta: its shape and type, on the meta device.

    Example:
        >>> x = hollow(torch.zeros(2, 3))
        >>> (x @ x.T).shape, x.sum().item(), x[x > 0].shape, bool(x.isnan().any())
        (torch.Size([2, 2]), 1.0, torch.Size([6]), False)
    """

    meta: Tensor
    is_any: bool

    @staticmethod
    def __new__(cls, meta: Tensor, is_any: bool = False) -> Hollow:
        """A tensor that stands for one on the meta device."""
        wrapper: Any = torch.Tensor._make_wrapper_subclass
        made: Hollow = wrapper(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device="cpu",
        )
        made.meta, made.is_any = meta, is_any
        return made

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Hollow({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        packet = func._overloadpacket
        if packet is ATEN._local_scalar_dense:
            return not args[0].is_any and torch.ones((), dtype=args[0].dtype).item()
        if packet is ATEN.equal:
            return True
        inner = _inner(args)
        options = {key: torch.device("meta") if key == "device" else _inner(v) for key, v in (kwargs or {}).items()}
        if packet is ATEN.nonzero:
            return cls(inner[0].new_empty((inner[0].numel(), inner[0].ndim), dtype=torch.int64))
        if packet is ATEN.masked_select:
            return cls(inner[0].new_empty((inner[0].numel(),)))
        if func in MASKED:
            inner = (inner[0], _places(inner[1]), *inner[2:])
        is_any, pure = packet is ATEN.any, _is_pure(func)
        out = _shaped(func, inner, options) if pure else func(*inner, **options)
        made: Any = out
        if isinstance(out, Tensor):
            made = cls(out, is_any)
        elif isinstance(out, tuple | list):
            made = type(out)(cls(leaf) if isinstance(leaf, Tensor) else leaf for leaf in out)
        return made if pure else return_and_correct_aliasing(func, args, kwargs or {}, made)


def hollow(tensor: Tensor) -> Hollow:
    """A tensor's shape and type without its values."""
    return Hollow(tensor.detach().to("meta"))


def hollow_out(module: nn.Module) -> None:
    """Take the values out of a module's parameters and buffers."""
    with _replacing_parameters():
        module._apply(hollow)


@contextmanager
def _replacing_parameters() -> Iterator[None]:
    """`_apply` puts new parameters in, for the old ones cannot become hollow."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether an operation writes into nothing and gives no view."""
    return not any(each.alias_info for each in (*func._schema.arguments, *func._schema.returns))


_shapes: dict[Any, Any] = {}


def _shaped(func: Any, args: Any, options: Any) -> Any:
    """What a pure operation gives, from memory where it has been asked before: its shape rule may take milliseconds."""
    key = (func, _signature(args), _signature(tuple(options.items())))
    if key not in _shapes:
        out = func(*args, **options)
        _shapes[key] = _kept(out)
        return out
    return _remade(_shapes[key])


@dataclass(frozen=True)
class _Shape:
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _kept(out: Any) -> Any:
    if isinstance(out, Tensor):
        return _Shape(out.shape, out.stride(), out.dtype)
    return type(out)(_kept(each) for each in out) if isinstance(out, tuple | list) else out


def _remade(kept: Any) -> Any:
    if isinstance(kept, _Shape):
        return torch.empty_strided(kept.size, kept.stride, dtype=kept.dtype, device="meta")
    return type(kept)(_remade(each) for each in kept) if isinstance(kept, tuple | list) else kept


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_signature(each) for each in value)
    return (type(value), value)


def _inner(value: Any) -> Any:
    """Hollow and real tensors, also in lists, as those on the meta device that stand for them."""
    if isinstance(value, Hollow):
        return value.meta
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(map(_inner, value)) if isinstance(value, tuple | list) else value


def _places(indices: Any) -> list[Tensor | None]:
    """Masks as the indices of all that they could select."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty((index.numel(),), dtype=torch.int64) for _ in range(index.ndim)]
        else:
            found.append(index)
    return found
