"""trades: cross-entropy on clean images plus the divergence of the adversarial output from the clean one.

Paper: Zhang et al., Theoretically principled trade-off between robustness and accuracy, ICML 2019, eq. 5.
min CE(p(x), y) + beta KL(p(x) || p(x')),  x' = argmax KL(p(x) || p(x')).

Differences from the authors' code: clean logits are computed once for the attack and once, in train mode, for the
loss (the code recomputes them at every attack step, with the same values, and twice in the loss); batch-norm
statistics therefore see each clean batch once instead of twice.
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense, require_non_negative
from mi_at.functional.divergences import cross_entropy, kl_divergence
from mi_at.regularizers.base import Views


def trades_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, *, beta: float) -> dict[str, Tensor]:
    """CE(p(x), y) + beta KL(p(x) || p(x')).

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.
        beta: weight, >= 0.

    Returns:
        {"ce", "kl", "loss"}: scalars, nats, weights applied.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> trades_loss(z, z, torch.tensor([0]), beta=6.0)["kl"].item()
        0.0
    """
    ce = cross_entropy(logits, y)
    kl = beta * kl_divergence(logits, logits_adv)
    return {"ce": ce, "kl": kl, "loss": ce + kl}


class Trades(Defense):
    """Zhang et al. 2019.

    Args:
        beta: 1 / lambda of the paper; 6 on CIFAR, 1 on MNIST.

    Raises:
        ValueError: beta is negative.
    """

    def __init__(self, *, beta: float = 6.0) -> None:
        super().__init__()
        require_non_negative(beta=beta)
        self.beta = beta

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """The divergence from the clean output, from a small Gaussian start (it has no gradient at the image)."""
        with attacking(self.net):
            clean = objectives.frozen_logits(self.net, batch.x)
        return {"adversarial": Inner(objectives.kl_to(self.net, clean), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 5 on the global batch."""
        return trades_loss(views.logits("clean"), views.logits("adversarial"), views.y, beta=self.beta)
