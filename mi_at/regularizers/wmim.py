"""wmim: raise the mutual information of adversarial samples and their outputs, by an estimator trained along.

Papers: the baseline "WMIM" of Zhou et al. (NAMID), ICML 2022, section 4.1, Table 3: adversarial training with the
standard mutual information of adversarial samples maximised; estimator and its training of Zhu et al., Learning
adversarially robust representations via worst-case mutual information maximization, ICML 2020, section 5.
L - lambda I(x~; h(x~)); network and estimator both raise the term, each with its own optimiser, in one backward pass.

Differences from the papers: Zhu et al. train without labels, and attack the information itself; NAMID states neither
the weight nor whether the estimator is trained along, and its code has no such baseline. As in Zhu et al. the
expectation of the Donsker-Varadhan bound runs over all pairs of the batch, but without the pairs that belong together
(their masked diagonal adds exp 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mi_at.data.batch import Batch
from mi_at.estimators.local_dim import LocalDIM, count_gradients_once, critic_of, pair_scores
from mi_at.estimators.own_optimizer import OwnAdam
from mi_at.functional.distributed import gather
from mi_at.functional.variational import pooled_donsker_varadhan
from mi_at.regularizers.base import Context, Regularizer, Views


class Wmim(Regularizer):
    """- lambda I(x~; h(x~)).

    Args:
        lambda_mi: weight, >= 0; no paper states it.
        lr: of the estimator's Adam (Zhu et al.: 1e-4).
        hsize: width of the estimator (Zhu et al.: 2048).

    Raises:
        ValueError: a negative weight, a rate or a width that is not positive.
    """

    needs_adversarial = True

    def __init__(self, *, lambda_mi: float = 0.1, lr: float = 1e-4, hsize: int = 2048) -> None:
        super().__init__()
        if not 0 <= lambda_mi < float("inf"):
            raise ValueError(f"regularizer.wmim.lambda_mi={lambda_mi}: expected 0 or more")
        if not 0 < lr < float("inf"):
            raise ValueError(f"regularizer.wmim.lr={lr}: expected a positive number")
        if hsize < 1:
            raise ValueError(f"regularizer.wmim.hsize={hsize}: expected 1 or more")
        self.lambda_mi, self.lr, self.hsize = lambda_mi, lr, hsize
        self.coupled = "the mutual information of regularizer.wmim" if lambda_mi else ""
        self.critic: nn.Module = nn.Identity()
        self.adam: OwnAdam | None = None
        self._readings: dict[str, Tensor] = {}

    def adapt(self, net: nn.Module) -> None:
        """Make the estimator of the network's size.

        Raises:
            ValueError: a network that does not say its size, or images that are too small.
        """
        if self.lambda_mi:
            self.critic = critic_of(net, hsize=self.hsize, owner="regularizer.wmim")
            count_gradients_once(self.critic)
            self.adam = OwnAdam(self.critic, lr=self.lr)

    def terms(self, views: Views) -> dict[str, Tensor]:
        """- lambda I in nats; every process forwards the global batch, for the estimator holds batch norm."""
        if not self.lambda_mi:
            return {}
        if not isinstance(self.critic, LocalDIM):
            raise ValueError("regularizer.wmim has no network yet: attach one first")
        z, x = views.logits("adversarial"), gather(views.images("adversarial"), views.batch.global_size or None)
        alone = len(z) < 2  # the last batch of an epoch: one image has no negatives
        if alone:
            z, x = torch.cat([z, z]), torch.cat([x, x])
        information = pooled_donsker_varadhan(pair_scores(self.critic.embed_outputs(z), self.critic.embed_images(x)))
        if alone:
            information = information * 0
        self._readings = {"information": information.detach()}
        return {"wmim": -self.lambda_mi * information}

    def readings(self) -> dict[str, Tensor]:
        """The estimate, in nats."""
        return self._readings

    def after_step(self, ctx: Context, batch: Batch) -> None:
        """The estimator's own step, along the gradients of the same backward pass."""
        if self.adam is not None:
            self.adam.step()
