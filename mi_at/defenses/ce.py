"""ce: cross-entropy on clean images, no adversarial training.

The natural baseline, and the base that IB-RAR and HBaR are also trained on without adversarial training.
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.functional.divergences import cross_entropy
from mi_at.regularizers.base import Views


def ce_loss(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """CE(p(x), y).

    Args:
        logits: [B, K] of the clean images.
        y: [B] int64.

    Returns:
        {"ce", "loss"}: scalars, nats.

    Example:
        >>> import torch
        >>> round(ce_loss(torch.zeros(1, 2), torch.tensor([0]))["loss"].item(), 4)
        0.6931
    """
    term = cross_entropy(logits, y)
    return {"ce": term, "loss": term}


class CE(Defense):
    """Training on clean images."""

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """None."""
        return {}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Cross-entropy of the clean view."""
        return ce_loss(views.logits("clean"), views.y)
