"""EOT-PGD: ascent along gradients averaged over a network's noise (Athalye et al. 2018).

max E_noise L(f(x'; noise), y); a single draw's gradient points where its own noise does. For networks that are random
in eval mode; elsewhere it is PGD at `samples` times the price.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.autoattack import forked_rng
from mi_at.attacks.inner import Objective
from mi_at.attacks.restarts import Ascent
from mi_at.functional import random


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random states, of the CPU and of CUDA devices in use, set in the block and as before after it.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(1)
        >>> with seeded(1):
        ...     torch.equal(torch.rand(1), first)
        True
    """
    with forked_rng():
        # torch.manual_seed notes down a stack trace for devices that were never used: 0.2 ms a call.
        torch.default_generator.manual_seed(seed % 2**63)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed % 2**63)
        yield


@contextmanager
def drawing(ids: Tensor, seed: int) -> Iterator[None]:
    """Whatever a network draws in this block is a function of the seed; torch's random state is as before afterwards.

    Layers that draw by sample (`mi_at.functional.random.normal_like`) depend on (seed, id) alone. What comes from
    torch's own generator depends on (seed, batch).

    Args:
        ids: [B] int64 of the samples that are forwarded.
        seed: any integer.

    Example:
        >>> with drawing(torch.tensor([5]), seed=1):
        ...     first = random.normal_like(torch.zeros(1, 2))
        >>> with drawing(torch.tensor([4, 5]), seed=1):
        ...     torch.equal(random.normal_like(torch.zeros(2, 2))[1:], first)
        True
    """
    with seeded(seed), random.keyed(ids, seed):
        yield


def expectation(objective: Objective, *, ids: Tensor, seed: int, samples: int) -> Objective:
    """The mean of an objective over draws of the network's noise, fresh ones at every call.

    Draw d of call t is keyed by (seed, id, t, d). The draws go through the network one after the other, and each is
    differentiated at once: memory is that of one. The value's own graph is its gradient alone, good for one derivative.

    Args:
        objective: images -> one value per sample [B], or a scalar.
        ids: [B] int64.
        seed: any integer.
        samples: draws, >= 1.

    Returns:
        Images -> what `objective` gives, averaged.

    Raises:
        ValueError: no draws.

    Example:
        >>> noisy = lambda x: (x * (1 + random.normal_like(x))).sum(1)
        >>> mean = expectation(noisy, ids=torch.tensor([3]), seed=0, samples=10000)
        >>> abs(mean(torch.ones(1, 1)).item() - 1) < 0.05
        True
    """
    if samples < 1:
        raise ValueError(f"attack.samples={samples}: expected 1 or more")
    calls = itertools.count()

    def mean(x: Tensor) -> Tensor:
        call, differentiate = next(calls), torch.is_grad_enabled() and x.requires_grad
        value: Any = 0.0
        slope = torch.zeros_like(x)
        for draw in range(samples):
            leaf = x.detach().requires_grad_(differentiate)
            with drawing(ids, random.key(seed, "eot", call, draw)):
                drawn = objective(leaf)
            if differentiate:
                slope = slope + torch.autograd.grad(drawn.sum(), leaf)[0] / samples
            value = value + drawn.detach() / samples
        if not differentiate:
            return torch.as_tensor(value)
        linear = ((x - x.detach()) * slope).flatten(1).sum(dim=1)  # 0, with the mean's gradient
        return torch.as_tensor(value + (linear if value.ndim else linear.sum()))

    return mean


@dataclass(frozen=True, kw_only=True)
class EOT(Ascent):
    """PGD along gradients averaged over a stochastic network's noise.

    With several starts the one with the largest mean margin, over as many draws, is returned.

    Attributes:
        samples: draws per step.
        objective: "cross_entropy", "margin" or "dlr".
        kappa: confidence of the margin.
        name: what tables print.

    Example:
        >>> EOT(eps="8/255", step_size="2/255", steps=20, samples=10).describe()["samples"]
        10
    """

    samples: int = 20
    objective: str = "cross_entropy"
    kappa: float = 0.0
    name: str = "eot"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"attack.samples={self.samples}: expected 1 or more")
        if self.objective not in objectives.NAMES:
            raise ValueError(f"objective={self.objective!r}: expected one of {', '.join(objectives.NAMES)}")
        if self.kappa < 0:
            raise ValueError(f"kappa={self.kappa}: expected 0 or more")

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; start and network noise are drawn by (seed, id)."""

        def averaged(objective: Objective, purpose: int) -> Objective:
            return expectation(objective, ids=ids, seed=purpose, samples=self.samples)

        return self.ascend(
            lambda noise: averaged(objectives.by_name(self.objective, net, y, self.kappa), random.key(noise, "ascent")),
            lambda noise: averaged(objectives.margin(net, y, float("inf")), random.key(noise, "judgement")),
            x,
            ids=ids,
            seed=seed,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "eot", **self.settings()}
