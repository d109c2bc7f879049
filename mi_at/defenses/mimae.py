"""mimae: mutual information and mean absolute error between the clean and the adversarial output.

Paper: A mutual information regularization for adversarial training (MIMAE-AT), eq. 10-14, Algorithm 1.
min BCE(p(x'), y) - lambda MI(p(x), p(x')) + beta |f(x') - f(x)|_1,  x' = argmax CE(p(x'), y).

Differences from the paper: the absolute error is the mean over batch and classes (`mae_reduction=sum` sums over
classes, as eq. 11 reads; the flat response of its Table 4 and the name speak for the mean); the joint distribution is
always symmetrised ("can be", section 4.2.1). There is no public code; BCE's constants are MART's.
"""

from __future__ import annotations

from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense, require_non_negative, require_one_of
from mi_at.functional.divergences import boosted_cross_entropy, cross_entropy
from mi_at.functional.information import joint_distribution, mutual_information
from mi_at.regularizers.base import Views


def mimae_loss(
    logits: Tensor,
    logits_adv: Tensor,
    y: Tensor,
    *,
    lambda_mi: float,
    beta: float,
    adversarial_term: str = "bce",
    logit_term: str = "mae",
    mae_reduction: str = "mean",
) -> dict[str, Tensor]:
    """BCE(p(x'), y) - lambda MI(p(x), p(x')) + beta |f(x') - f(x)|_1 (eq. 11).

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.
        lambda_mi: weight of the mutual information, >= 0; at 0 the term is left out (Table 10).
        beta: weight of the logit term, >= 0.
        adversarial_term: "bce" or "ce" (Table 10).
        logit_term: "mae", "mse" or "none" (Table 10).
        mae_reduction: "mean" over batch and classes, or "sum" over classes and mean over the batch.

    Returns:
        The terms in use, signed and weighted, and "loss", their sum: scalars; "mi" in nats.

    Raises:
        ValueError: an unknown option.

    Example:
        >>> import torch
        >>> z = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> terms = mimae_loss(z, z, torch.tensor([0, 1]), lambda_mi=1.0, beta=1.0)
        >>> round(terms["mi"].item(), 4), terms["mae"].item()  # - ln 2: both classes, perfectly predictable
        (-0.6931, 0.0)
    """
    _check_options(adversarial_term, logit_term, mae_reduction)
    adversarial = {"bce": boosted_cross_entropy, "ce": cross_entropy}[adversarial_term]
    terms = {adversarial_term: adversarial(logits_adv, y)}
    if lambda_mi:
        joint = joint_distribution(logits.softmax(dim=1), logits_adv.softmax(dim=1))
        terms["mi"] = -lambda_mi * mutual_information(joint)
    if beta and logit_term != "none":
        difference = logits_adv - logits
        error = difference.abs() if logit_term == "mae" else difference.square()
        terms[logit_term] = beta * (error.mean() if mae_reduction == "mean" else error.sum(dim=1).mean())
    return terms | {"loss": sum(terms.values(), start=logits.new_zeros(()))}


def _check_options(adversarial_term: str, logit_term: str, mae_reduction: str) -> None:
    require_one_of(("bce", "ce"), adversarial_term=adversarial_term)
    require_one_of(("mae", "mse", "none"), logit_term=logit_term)
    require_one_of(("mean", "sum"), mae_reduction=mae_reduction)


class Mimae(Defense):
    """MIMAE-AT.

    Args:
        lambda_mi: 0.4 on ResNet-18, 0.6 on WRN-34-10 (section 5.1).
        beta: 1 (section 5.1).
        adversarial_term: "bce" | "ce".
        logit_term: "mae" | "mse" | "none".
        mae_reduction: "mean" | "sum".

    Raises:
        ValueError: a negative weight or an unknown option.
    """

    def __init__(
        self,
        *,
        lambda_mi: float = 0.4,
        beta: float = 1.0,
        adversarial_term: str = "bce",
        logit_term: str = "mae",
        mae_reduction: str = "mean",
    ) -> None:
        super().__init__()
        require_non_negative(lambda_mi=lambda_mi, beta=beta)
        _check_options(adversarial_term, logit_term, mae_reduction)
        self.lambda_mi, self.beta = lambda_mi, beta
        self.coupled = "the mutual information of defense=mimae" if lambda_mi else ""
        self.adversarial_term, self.logit_term, self.mae_reduction = (
            adversarial_term,
            logit_term,
            mae_reduction,
        )

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy, from a small Gaussian start (Algorithm 1, lines 4-7)."""
        return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 11 on the global batch."""
        return mimae_loss(
            views.logits("clean"),
            views.logits("adversarial"),
            views.y,
            lambda_mi=self.lambda_mi,
            beta=self.beta,
            adversarial_term=self.adversarial_term,
            logit_term=self.logit_term,
            mae_reduction=self.mae_reduction,
        )
