"""Looking at numbers where that is free: on a CPU, not on a device that would have to be waited for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def say_where_known(x: Tensor, bad: Callable[[Tensor], Tensor], message: str) -> None:
    """Raise if anything of x is bad, on a CPU; elsewhere looking would cost a wait, and NaN reaches the watch for it.

    Args:
        x: any tensor.
        bad: x -> bool, any shape; called on a CPU only.
        message: of the error.

    Raises:
        ValueError: with that message.

    Example:
        >>> from torch import ones
        >>> say_where_known(ones(2), lambda x: x > 1, "too large")
        >>> say_where_known(2 * ones(2), lambda x: x > 1, "too large")
        Traceback (most recent call last):
        ...
        ValueError: too large
    """
    if x.device.type == "cpu" and bool(bad(x).any()):
        raise ValueError(message)
