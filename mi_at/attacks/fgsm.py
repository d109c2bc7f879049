"""The fast gradient sign method: one step from the image (Goodfellow et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Objective, check_eps
from mi_at.attacks.pgd import pgd
from mi_at.functional.geometry import check_norm


def fgsm(objective: Objective, x: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """One step of length eps from the image.

    Args:
        objective: images -> one value per sample [B].
        x: [B, ...] float in [0, 1].
        eps: radius >= 0, a number or a fraction.
        norm: "linf" or "l2".

    Returns:
        [B, ...] in [0, 1], at most eps from x.

    Raises:
        ValueError: as `pgd`.

    Example:
        >>> import torch
        >>> fgsm(lambda x: x.sum(1), torch.full((1, 2), 0.5), eps=0.25)
        tensor([[0.7500, 0.7500]])
    """
    eps = check_eps(eps, check_norm(norm))
    return pgd(objective, x, eps=eps, step_size=eps, steps=1 if eps else 0, norm=norm, init="zero")


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """FGSM on the cross-entropy as an evaluation attack.

    Attributes:
        eps: radius and step.
        norm: "linf" or "l2".
        name: what tables print.
    """

    eps: float
    norm: str = "linf"
    name: str = "fgsm"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, check_norm(self.norm)))

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; ids and seed are not needed: nothing is random."""
        return fgsm(objectives.cross_entropy(net, y), x, eps=self.eps, norm=self.norm)

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "attack": "fgsm",
            "name": self.name,
            "eps": self.eps,
            "norm": self.norm,
            "step_size": self.eps,
            "steps": 1,
            "init": "zero",
            "objective": "cross_entropy",
        }
