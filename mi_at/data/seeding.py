"""One seeded generator per purpose, so that a draw depends on its key and on nothing drawn before it."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for one purpose, a pure function of its arguments and the same on every machine.

    Args:
        seed: the run's seed, any integer.
        purpose: a word per kind of draw: "order", "augment", ...
        numbers: the rest of the key, such as epoch and batch.

    Returns:
        An integer in [0, 2^63).

    Example:
        >>> keyed_seed(0, "order", 1) == keyed_seed(0, "order", 1) != keyed_seed(0, "order", 2)
        True
    """
    key = "/".join([str(int(seed)), purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by `keyed_seed` of the same arguments.

    Example:
        >>> a, b = keyed_generator(0, "augment", 2, 5), keyed_generator(0, "augment", 2, 5)
        >>> torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
        True
    """
    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *numbers))
