"""NI-FGSM: the iterative sign method with Nesterov's accelerated gradient (Lin et al. 2020, section 3.2).

x_nes = x_t + alpha mu g_t;  g_{t+1} = mu g_t + grad J(x_nes) / mean|grad J(x_nes)|;
x_{t+1} = clip(x_t + alpha sign(g_{t+1})),  x_0 = x, g_0 = 0.

The paper divides by the l_1 norm, its code (and Torchattacks) by the mean of the absolute values; we do as the code:
with the l_1 norm the look-ahead alpha mu g would be shorter by the number of pixels, and so without effect.
x_nes is not clipped: the network sees pixels up to about alpha mu / (1 - mu) outside [0, 1] (mu < 1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Objective, check_eps, check_step
from mi_at.attacks.pgd import check_images
from mi_at.functional.geometry import per_sample, project


def ni_fgsm(
    objective: Objective,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    decay: float = 1.0,
) -> Tensor:
    """Maximise an objective in the l_inf ball of radius eps around x, within [0, 1], from x itself.

    Args:
        objective: images -> one value per sample [B].
        x: [B, ...] float in [0, 1].
        eps: radius >= 0, a number or a fraction.
        step_size: in (0, 1], likewise.
        steps: >= 0.
        decay: >= 0, mu: of the momentum and of the look-ahead; 0 gives the plain iteration.

    Returns:
        [B, ...] in [0, 1], at most eps from x, detached: the last iterate.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].

    Example:
        >>> ni_fgsm(lambda x: x.sum(1), torch.full((1, 2), 0.5), eps=0.25, step_size=0.125, steps=2)
        tensor([[0.7500, 0.7500]])
    """
    eps = check_eps(eps, "linf")
    step_size = check_step(step_size, steps, "linf", eps=eps)
    check_decay(decay)
    check_images(x)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()
        x_adv, momentum = x, torch.zeros_like(x)
        for _ in range(steps):
            ahead = (x_adv + step_size * decay * momentum).requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(ahead).sum(), ahead)
            momentum = decay * momentum + mean_normalised(gradient)
            x_adv = project(x_adv + step_size * momentum.sign(), x, eps, "linf")
        return x_adv


def mean_normalised(gradient: Tensor) -> Tensor:
    """The gradient divided by the mean of its absolute values, per sample.

    Args:
        gradient: [B, ...] float; a zero gradient stays zero.

    Returns:
        [B, ...].

    Example:
        >>> mean_normalised(torch.tensor([[1.0, -3.0]]))
        tensor([[ 0.5000, -1.5000]])
    """
    # Through the largest entry first: a sum of tiny gradients underflows, one of huge ones overflows.
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient / per_sample(gradient.flatten(1).abs().amax(dim=1).clamp_min(tiny), gradient)
    return gradient / per_sample(gradient.flatten(1).abs().mean(dim=1).clamp_min(tiny), gradient)


def check_decay(decay: float) -> None:
    """Refuse a negative or infinite decay.

    Raises:
        ValueError: naming it.
    """
    if not 0 <= decay < float("inf"):
        raise ValueError(f"attack.decay={decay}: expected 0 (no momentum) or more")


@dataclass(frozen=True, kw_only=True)
class NIFGSM:
    """NI-FGSM on the cross-entropy as an evaluation attack.

    Attributes:
        eps, step_size, steps, decay: as `ni_fgsm` takes them.
        name: what tables print.
    """

    norm: ClassVar[str] = "linf"

    eps: float
    step_size: float
    steps: int
    decay: float = 1.0
    name: str = "ni_fgsm"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        object.__setattr__(self, "step_size", check_step(self.step_size, self.steps, self.norm, eps=self.eps))
        check_decay(self.decay)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; ids and seed are not needed: nothing is random."""
        return ni_fgsm(
            objectives.cross_entropy(net, y),
            x,
            eps=self.eps,
            step_size=self.step_size,
            steps=self.steps,
            decay=self.decay,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "ni_fgsm", "norm": self.norm, **asdict(self), "init": "zero", "objective": "cross_entropy"}
