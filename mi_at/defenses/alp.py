"""alp: adversarial logit pairing.

Paper: Kannan, Kurakin, Goodfellow, Adversarial logit pairing, 2018, as Table 1 of MIMAE-AT states it.
min CE(p(x'), y) + alpha |f(x') - f(x)|^2,  x' = argmax CE(p(x'), y).

Differences from the authors' code: no cross-entropy on the clean half, no label smoothing; the square is the mean
over batch and classes, as in the code (Table 1 prints a sum).
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense, require_non_negative
from mi_at.functional.divergences import cross_entropy
from mi_at.regularizers.base import Views


def alp_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, *, alpha: float) -> dict[str, Tensor]:
    """CE(p(x'), y) + alpha mean (f(x') - f(x))^2.

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.
        alpha: weight of the pairing, >= 0.

    Returns:
        {"ce", "pairing", "loss"}: scalars, weights applied; "ce" in nats.

    Example:
        >>> import torch
        >>> alp_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0]), alpha=0.5)["pairing"].item()
        0.5
    """
    ce = cross_entropy(logits_adv, y)
    pairing = alpha * (logits_adv - logits).square().mean()
    return {"ce": ce, "pairing": pairing, "loss": ce + pairing}


class Alp(Defense):
    """Kannan et al. 2018.

    Args:
        alpha: weight of the pairing; 0.5 in our comparison.

    Raises:
        ValueError: alpha is negative.
    """

    def __init__(self, *, alpha: float = 0.5) -> None:
        super().__init__()
        require_non_negative(alpha=alpha)
        self.alpha = alpha

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy, from a uniform start."""
        return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="uniform")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """The pairing loss on the global batch."""
        return alp_loss(views.logits("clean"), views.logits("adversarial"), views.y, alpha=self.alpha)
