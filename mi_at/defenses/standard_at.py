"""standard_at: adversarial training on the worst case within the ball.

Paper: Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018, eq. 2.1.
min CE(p(x'), y),  x' = argmax CE(p(x'), y).

Differences from the authors' code: none in the loss. The attack runs in eval mode by default, as in TRADES and MART;
robust_overfitting's PGD-AT leaves the network in train mode (`attack.mode`).
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.functional.divergences import cross_entropy
from mi_at.regularizers.base import Views


def standard_at_loss(logits_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    """CE(p(x'), y).

    Args:
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.

    Returns:
        {"ce", "loss"}: scalars, nats.

    Example:
        >>> import torch
        >>> round(standard_at_loss(torch.zeros(1, 2), torch.tensor([0]))["loss"].item(), 4)
        0.6931
    """
    term = cross_entropy(logits_adv, y)
    return {"ce": term, "loss": term}


class StandardAT(Defense):
    """Madry et al. 2018."""

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy, from a uniform start."""
        return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="uniform")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Cross-entropy of the adversarial view."""
        return standard_at_loss(views.logits("adversarial"), views.y)
