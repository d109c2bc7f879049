"""mart: boosted cross-entropy plus a divergence weighted by the clean error.

Paper: Wang et al., Improving adversarial robustness requires revisiting misclassified examples, ICLR 2020, eq. 11.
min BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)),  x' = argmax CE(p(x'), y).

Differences from the authors' code: none; its constants (1.0001, 1e-12, 1.0000001) are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense, require_non_negative
from mi_at.functional.divergences import boosted_cross_entropy
from mi_at.regularizers.base import Views


def mart_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, *, beta: float) -> dict[str, Tensor]:
    """BCE(p(x'), y) + beta mean_i KL(p(x_i) || p(x'_i)) (1 - p_y(x_i)).

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.
        beta: weight, >= 0.

    Returns:
        {"bce", "kl", "loss"}: scalars, nats, weights applied.

    Example:
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> abs(mart_loss(z, z, torch.tensor([0]), beta=5.0)["kl"].item()) < 1e-6
        True
    """
    bce = boosted_cross_entropy(logits_adv, y)
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    divergence = (p * (log_p - torch.log(F.softmax(logits_adv, dim=1) + 1e-12))).sum(dim=1)
    error = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
    kl = beta * (divergence * error).mean()
    return {"bce": bce, "kl": kl, "loss": bce + kl}


class Mart(Defense):
    """Wang et al. 2020.

    Args:
        beta: lambda of the paper; 5 on ResNet-18, 6 on WRN-34-10.

    Raises:
        ValueError: beta is negative.
    """

    def __init__(self, *, beta: float = 5.0) -> None:
        super().__init__()
        require_non_negative(beta=beta)
        self.beta = beta

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy, from a small Gaussian start."""
        return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 11 on the global batch."""
        return mart_loss(views.logits("clean"), views.logits("adversarial"), views.y, beta=self.beta)
