"""What attacks by projected ascent share: settings, starts drawn by (seed, id), and the best of several starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mi_at.attacks.inner import INITS, Objective, check_eps, check_reach, check_step
from mi_at.attacks.pgd import pgd
from mi_at.functional import random
from mi_at.functional.geometry import check_norm, per_sample, start_noise


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Settings of projected gradient ascent, for an evaluation attack to build on.

    Attributes:
        eps, step_size, steps, norm, init: as `mi_at.attacks.pgd.pgd` takes them.
        restarts: starts; per sample the result with the largest margin is returned.

    Raises:
        ValueError: a value out of range or an unknown name.

    Example:
        >>> ascent = Ascent(eps=0.25, step_size=0.25, steps=2, init="zero")
        >>> x, total = torch.full((1, 1, 1, 2), 0.5), lambda x: x.flatten(1).sum(1)
        >>> ascent.ascend(lambda seed: total, lambda seed: total, x, ids=torch.tensor([0]), seed=0)
        tensor([[[[0.7500, 0.7500]]]])
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    init: str = "uniform"
    restarts: int = 1

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, check_norm(self.norm)))
        object.__setattr__(self, "step_size", check_step(self.step_size, self.steps, self.norm, eps=self.eps))
        check_reach(self.step_size, self.steps, self.norm, self.eps)
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(INITS)}")
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts}: expected 1 or more")

    def ascend(
        self,
        objective: Callable[[int], Objective],
        margin: Callable[[int], Objective],
        x: Tensor,
        *,
        ids: Tensor,
        seed: int,
    ) -> Tensor:
        """The result of the start that ends with the largest margin, per sample.

        Args:
            objective: seed of a start's noise -> what is maximised; per sample, or joint over the batch.
            margin: the same seed -> what starts are compared by, one value per sample.
            x: [B, C, H, W] in [0, 1].
            ids: [B] int64 that the noise is drawn by.
            seed: of the noise.

        Returns:
            [B, C, H, W] in [0, 1], at most eps from x.
        """
        if not len(x):
            return x.detach().clone()
        best, best_margin = x, torch.empty(0)
        for restart in range(self.restarts):
            noise = seed * 1009 + restart
            x_adv = pgd(
                objective(noise),
                x,
                eps=self.eps,
                step_size=self.step_size,
                steps=self.steps,
                norm=self.norm,
                init=self._start(x, ids, noise),
            )
            if self.restarts == 1:
                return x_adv
            with torch.no_grad():
                reached = margin(noise)(x_adv)
            # Logits that are not numbers are the worst that can happen to a network.
            reached = reached.nan_to_num(nan=torch.inf)
            better = reached > best_margin if restart else torch.ones_like(reached, dtype=torch.bool)
            best_margin = torch.where(better, reached, best_margin) if restart else reached
            best = torch.where(torch.as_tensor(per_sample(better, x)), x_adv, best)
        return best

    def settings(self) -> dict[str, Any]:
        """All settings that a yaml can hold, for a record."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.repr}

    def _start(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        if self.init == "zero":
            return torch.zeros_like(x)
        uniform = random.uniform(ids, x.shape[1:], 2 * seed).to(x)
        needs_gaussian = self.init == "gaussian" or self.norm == "l2"
        gaussian = random.gaussian(ids, x.shape[1:], 2 * seed + 1).to(x) if needs_gaussian else uniform
        return start_noise(self.init, uniform, gaussian, self.eps, self.norm)
