"""trades: cross-entropy on clean images plus the divergence of the adversarial output from the clean one.

Paper: Zhang et al., Theoretically principled trade-off between robustness and accuracy, ICML 2019, eq. 5.
min CE(p(x), y) + beta KL(p(x) || p(x')),  x' = argmax KL(p(x) || p(x')).

Differences from the authors' code: clean logits are computed once for the attack and once, in train mode, for the
loss (the code recomputes them at every attack step, with the same values, and twice in the loss); batch-norm
statistics therefore see each clean batch once instead of twice.
What ib_rar's code calls TRADES is another loss, CE(p(x'), y) + 0.5 KL with x' = argmax CE(p(x'), y) from a uniform
start: `ce_view=adversarial attack_objective=ce beta=0.5 attack.init=uniform` (recipe=_ib_rar_trades); its MART is MART
at weight 0.5 (recipe=_ib_rar_mart).
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import ADVERSARIAL, Defense, require_non_negative, require_one_of
from mi_at.functional.divergences import cross_entropy, kl_divergence
from mi_at.regularizers.base import Views

CE_VIEWS = ("clean", ADVERSARIAL)
ATTACKS = ("kl", "ce")


def trades_loss(
    logits: Tensor, logits_adv: Tensor, y: Tensor, *, beta: float, ce_view: str = "clean"
) -> dict[str, Tensor]:
    """CE(p(x), y) + beta KL(p(x) || p(x')).

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.
        beta: weight, >= 0.
        ce_view: "clean", or "adversarial": CE(p(x'), y) in its place.

    Returns:
        {"ce", "kl", "loss"}: scalars, nats, weights applied.

    Raises:
        ValueError: an unknown view.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> trades_loss(z, z, torch.tensor([0]), beta=6.0)["kl"].item()
        0.0
    """
    require_one_of(CE_VIEWS, ce_view=ce_view)
    ce = cross_entropy(logits if ce_view == "clean" else logits_adv, y)
    kl = beta * kl_divergence(logits, logits_adv)
    return {"ce": ce, "kl": kl, "loss": ce + kl}


class Trades(Defense):
    """Zhang et al. 2019.

    Args:
        beta: 1 / lambda of the paper; 6 on CIFAR, 1 on MNIST.
        ce_view: "clean" | "adversarial" (ib_rar's code): whose cross-entropy.
        attack_objective: "kl" | "ce" (ib_rar's code): what x' maximises.

    Raises:
        ValueError: beta is negative, or an unknown option.
    """

    def __init__(self, *, beta: float = 6.0, ce_view: str = "clean", attack_objective: str = "kl") -> None:
        super().__init__()
        require_non_negative(beta=beta)
        require_one_of(CE_VIEWS, ce_view=ce_view)
        require_one_of(ATTACKS, attack_objective=attack_objective)
        self.beta, self.ce_view, self.attack_objective = beta, ce_view, attack_objective

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """The divergence from the clean output, from a small Gaussian start (it has no gradient at the image)."""
        if self.attack_objective == "ce":
            return {ADVERSARIAL: Inner(objectives.cross_entropy(self.net, batch.y), init="gaussian")}
        with attacking(self.net):
            clean = objectives.frozen_logits(self.net, batch.x)
        return {ADVERSARIAL: Inner(objectives.kl_to(self.net, clean), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 5 on the global batch."""
        logits, logits_adv = views.logits("clean"), views.logits(ADVERSARIAL)
        return trades_loss(logits, logits_adv, views.y, beta=self.beta, ce_view=self.ce_view)
