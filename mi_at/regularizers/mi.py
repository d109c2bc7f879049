"""Mutual information of class assignments on clean and adversarial views, added to any defense.

Paper: A mutual information regularization for adversarial training (MIMAE-AT), eq. 13-14.
Term: - lambda MI(p(x), p(x')), the joint distribution taken over the global batch.
`defense=standard_at regularizer=mi` is the paper's loss with cross-entropy and without the logit term.
"""

from __future__ import annotations

from torch import Tensor

from mi_at.functional.information import joint_distribution, mutual_information
from mi_at.regularizers.base import Regularizer, Views


class MutualInformation(Regularizer):
    """- lambda MI(clean, adversarial).

    Args:
        lambda_mi: weight, >= 0; 0.4 on ResNet-18 and 0.6 on WRN-34-10 in the paper (section 5.1).

    Raises:
        ValueError: a negative weight.
    """

    needs_adversarial = True

    def __init__(self, *, lambda_mi: float = 0.4) -> None:
        super().__init__()
        if not 0 <= lambda_mi < float("inf"):
            raise ValueError(f"regularizer.mi.lambda_mi={lambda_mi}: expected 0 or more")
        self.lambda_mi = lambda_mi
        self.coupled = "the mutual information of regularizer.mi" if lambda_mi else ""

    def terms(self, views: Views) -> dict[str, Tensor]:
        """- lambda MI in nats, in [-lambda ln K, 0]."""
        p, q = views.logits("clean").softmax(dim=1), views.logits("adversarial").softmax(dim=1)
        return {"mi": -self.lambda_mi * mutual_information(joint_distribution(p, q))}
