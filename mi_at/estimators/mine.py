"""MINE: a critic on pairs, trained on the Donsker-Varadhan bound.

Paper: Belghazi et al., Mutual information neural estimation, ICML 2018, eq. 10 and Algorithm 1.
I(z; z') >= E_joint[T(z, z')] - ln E_marginal[exp T(z, z')].

Differences from the paper: the gradient of the bound is that of the batch (its section 3.2 corrects the bias of small
batches by a moving average; with one step per batch of a training run the critic lags more than that); the independent
pairs are those of one random cycle through the batch, so that no pair is drawn from the joint distribution by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mi_at.estimators.own_optimizer import OwnAdam
from mi_at.functional import random
from mi_at.functional.variational import donsker_varadhan


class Mine(nn.Module):
    """A critic 2d - 512 - 512 - 1 and its own Adam.

    Its parameters never require gradients outside `fit_step`: a loss that reads `estimate` moves z and z' alone.
    Under several processes pass the gathered global batch: every process then makes the same step.

    Args:
        dim: d, of z and of z'.
        hidden: width of the two hidden layers.
        lr: of Adam.
        seed: of the pairs that are drawn as independent.

    Raises:
        ValueError: a size or a rate that is not positive.

    Example:
        >>> mine = Mine(2)
        >>> abs(mine.estimate(torch.zeros(4, 2), torch.zeros(4, 2)).item()) < 1e-6  # nothing to tell apart
        True
    """

    def __init__(self, dim: int, *, hidden: int = 512, lr: float = 1e-4, seed: int = 0) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim={dim}, hidden={hidden}: expected 1 or more")
        self.dim, self.seed = dim, seed
        self.critic = nn.Sequential(
            nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.critic.requires_grad_(False)
        self.adam = OwnAdam(self.critic, lr=lr)

    def estimate(self, z: Tensor, z2: Tensor) -> Tensor:
        """The Donsker-Varadhan bound of a batch under the critic as it is.

        Args:
            z: [B, d].
            z2: [B, d], whose row i belongs to row i of z.

        Returns:
            Scalar in nats, with gradients to z and z2.

        Raises:
            ValueError: not two [B, d] tensors of this critic's d, or fewer than two samples.
        """
        if z.ndim != 2 or z.shape != z2.shape or z.shape[1] != self.dim or len(z) < 2:
            raise ValueError(
                f"expected two [B, {self.dim}] tensors with B of 2 or more, got {tuple(z.shape)} and {tuple(z2.shape)}"
            )
        order = random.uniform(
            torch.arange(len(z), device=z.device), (), random.key(self.seed, "mine", self.adam.steps)
        )
        cycle = order.argsort()
        shuffled = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))
        pairs, mixed = torch.cat([z, z2], dim=1), torch.cat([z, z2[shuffled]], dim=1)
        weight = next(self.critic.parameters())
        joint, marginal = self.critic(pairs.to(weight.dtype)), self.critic(mixed.to(weight.dtype))
        return donsker_varadhan(joint.squeeze(1), marginal.squeeze(1))

    def fit_step(self, z: Tensor, z2: Tensor) -> Tensor:
        """One step of Adam that raises the bound on this batch, which gets no gradients.

        Args:
            z: [B, d].
            z2: [B, d].

        Returns:
            The bound before the step: scalar, nats, detached.
        """
        parameters = list(self.critic.parameters())
        with torch.enable_grad():
            self.critic.requires_grad_(True)
            try:
                bound = self.estimate(z.detach(), z2.detach())
                gradients = torch.autograd.grad(-bound, parameters)
            finally:
                self.critic.requires_grad_(False)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        return bound.detach()
