"""FWA: Frank-Wolfe in a Wasserstein ball, with an entropic dual solution of each linear problem.

Paper: Wu, Wang, Yu, Stronger and faster Wasserstein adversarial attacks, ICML 2020.
max f(x'),  x'_j = sum_i Pi_ij,  over plans Pi >= 0 with sum_j Pi_ij = x_i and <C, Pi> <= eps sum_i x_i;  C is the
Euclidean distance of two pixels of one channel; mass goes no further than a kernel x kernel window, nor out of the
image; one budget for all channels. The network sees x' clamped to [0, 1].
Pi <- Pi + 2/(t+2) (Pi* - Pi),  Pi*_ij = x_i softmax_j((g_j - lambda C_ij) / gamma),  g the gradient at x' over its
largest entry, lambda by bisection until the cost meets the budget, the end that keeps it.

Differences from the paper: what lies above 1 is an option (`overflow`). With "capacity" each linear problem is relaxed:
a price per pixel rises while more than 1 would arrive, and in the end what has no room goes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks import objectives
from mi_at.attacks.inner import Objective
from mi_at.attacks.pgd import check_images
from mi_at.functional.geometry import parse_eps, per_sample

OVERFLOWS = ("clip", "capacity", "none")
# Overflow that counts as rounding, and rounds of giving mass back before the plan is shrunk instead.
_ROUNDING, _ROUNDS = 1e-6, 200


class Transport:
    """Plans that move the mass of images within a window.

    A plan is [B, C, K, L]: mass of pixel l that goes to offset k, K = kernel^2, L = H W; an even window reaches one
    pixel further up and left than down and right.

    Args:
        x: [B, C, H, W] float, >= 0: where the mass is.
        kernel: side of the window, >= 1.

    Attributes:
        distance: [K, 1], how far an offset is, in pixels.
        mass: [B], of each image.

    Example:
        >>> transport = Transport(torch.ones(1, 1, 2, 2), kernel=3)
        >>> plan = transport.stay()
        >>> transport.images(plan).tolist(), transport.cost(plan).tolist()
        ([[[[1.0, 1.0], [1.0, 1.0]]]], [0.0])
    """

    def __init__(self, x: Tensor, *, kernel: int) -> None:
        self.x, self.kernel = x, kernel
        before = kernel // 2
        after = kernel - 1 - before
        self.padding = (before, after, before, after)
        steps = torch.arange(kernel, dtype=x.dtype, device=x.device) - before
        self.distance = (steps[:, None].square() + steps.square()).sqrt().view(-1, 1)
        self.here = before * kernel + before  # the offset that stays
        self.inside = self.at_targets(torch.ones_like(x[:1, :1]))[0, 0] > 0  # [K, L]
        self.rows = x.flatten(2).unsqueeze(2)  # [B, C, 1, L]
        self.mass = x.flatten(1).sum(dim=1)

    def at_targets(self, values: Tensor) -> Tensor:
        """[B, C, H, W] values of pixels -> [B, C, K, L]: those at the pixel that each entry of a plan goes to."""
        batch, channels = values.shape[:2]
        windows = F.unfold(F.pad(values.flatten(0, 1).unsqueeze(1), self.padding), self.kernel)
        return windows.view(batch, channels, self.kernel**2, -1)

    def images(self, plan: Tensor) -> Tensor:
        """[B, C, K, L] -> [B, C, H, W]: the mass that arrives at each pixel."""
        height, width = self.x.shape[2:]
        before, reach = self.kernel // 2, self.kernel - 1
        padded = F.fold(plan.flatten(0, 1), (height + reach, width + reach), self.kernel)
        return padded[:, 0, before : before + height, before : before + width].reshape(self.x.shape)

    def cost(self, plan: Tensor) -> Tensor:
        """[B]: mass times distance, over all channels."""
        return (plan * self.distance).flatten(1).sum(dim=1)

    def stay(self) -> Tensor:
        """The plan that moves nothing."""
        plan = self.x.new_zeros(*self.x.shape[:2], self.kernel**2, self.rows.shape[3])
        plan[:, :, self.here] = self.rows[:, :, 0]
        return plan

    def best(self, gradient: Tensor, *, eps: float, gamma: float, bisection: int) -> Tensor:
        """The plan that gains most along a gradient within the budget, up to gamma ln K of its largest entry.

        Args:
            gradient: [B, C, H, W]; of an image without any, the plan that stays is as good.
            eps: budget per unit of mass, > 0, in pixels.
            gamma: weight of the entropy, > 0; the gradient's largest entry is 1.
            bisection: halvings of lambda's interval.

        Returns:
            [B, C, K, L], cost at most eps x mass.
        """
        gain = (self.at_targets(_unit(gradient)) / gamma).masked_fill(~self.inside, -torch.inf)
        budget = eps * self.mass

        def plan(price: Tensor) -> Tensor:
            return self.rows * (gain - per_sample(price / gamma, gain) * self.distance).softmax(dim=2)

        # At this price even a gain of 2 over the nearest offset leaves less than eps of the mass to move.
        dear = 2 + gamma * max(0.0, math.log(float(self.distance.sum()) / eps)) if self.kernel > 1 else 0.0
        low = torch.zeros_like(self.mass)
        high = torch.where(self.cost(plan(low)) <= budget, low, torch.full_like(low, dear))
        for _ in range(bisection):
            middle = (low + high) / 2
            within = self.cost(plan(middle)) <= budget
            low, high = torch.where(within, low, middle), torch.where(within, middle, high)
        slope = gradient.flatten(1).any(dim=1).view(-1, 1, 1, 1)
        return torch.where(slope, plan(high), self.stay())

    def within_capacity(self, plan: Tensor) -> Tensor:
        """Give back what arrives at a pixel above 1, to where it came from, until no pixel has more than 1.

        Neither mass nor any row's sum changes, and the cost only falls. It is a feasible plan, not the nearest one.

        Args:
            plan: [B, C, K, L] of images in [0, 1].

        Returns:
            [B, C, K, L].
        """
        for _ in range(_ROUNDS):
            there = self.images(plan)
            above = (there - 1).clamp_min(0)
            if not bool((above > _ROUNDING).any()):
                return plan
            stays = plan[:, :, self.here].view_as(there)
            arrives = (there - stays).clamp_min(torch.finfo(plan.dtype).tiny)
            kept = plan * self.at_targets((1 - above / arrives).clamp_min(0))
            kept[:, :, self.here] = 0
            kept[:, :, self.here] = self.rows[:, :, 0] - kept.sum(dim=2)
            plan = kept
        there = self.images(plan)
        room = torch.where(there - 1 > _ROUNDING, (1 - self.x) / (there - self.x), 1)
        share = per_sample(room.flatten(1).amin(dim=1), plan)
        return self.stay() + share * (plan - self.stay())


def fwa(
    objective: Objective,
    x: Tensor,
    *,
    eps: float,
    steps: int,
    kernel: int = 5,
    gamma: float = 1e-3,
    overflow: str = "clip",
    bisection: int = 20,
) -> Tensor:
    """Maximise an objective over images whose mass was moved by at most eps pixels on average.

    Args:
        objective: images -> one value per sample [B]; it sees images clamped to [0, 1].
        x: [B, C, H, W] float in [0, 1].
        eps: >= 0, a number or a fraction: budget of mass times distance, in pixels, per unit of the image's mass.
        steps: >= 0.
        kernel: side of the window that mass may move in, >= 1; one pixel less to the right and below if even.
        gamma: weight of the entropy in each linear problem, > 0.
        overflow: "clip" what lies above 1 in the end (which loses mass), "capacity" (no pixel takes more than 1; mass
            and budget are kept), or "none": an image that may exceed 1.
        bisection: halvings in the search for lambda, >= 1.

    Returns:
        [B, C, H, W], detached; in [0, 1] unless overflow="none".

    Raises:
        ValueError: an argument out of range, or images that are not [B, C, H, W] in [0, 1].

    Example:
        >>> x = torch.tensor([[[[0.5, 0.0, 0.0]]]])
        >>> towards = torch.tensor([0.0, 1.0, 0.0])
        >>> fwa(lambda x: (x * towards).flatten(1).sum(1), x, eps=0.2, steps=1).round(decimals=2)
        tensor([[[[0.4000, 0.1000, 0.0000]]]])
    """
    eps = _checked(eps, steps, kernel, gamma, overflow, bisection)
    check_images(x)
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}: expected images [B, C, H, W]")
    if not eps or not steps or not len(x):
        return x.detach().clone()
    with torch.inference_mode(False), torch.enable_grad():
        transport = Transport(x.detach().clone(), kernel=kernel)
        plan, price = transport.stay(), torch.zeros_like(transport.x)
        for step in range(steps):
            x_adv = transport.images(plan)
            seen = x_adv.clamp(0, 1).requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(seen).sum(), seen)
            gradient = _unit(gradient)
            if overflow != "capacity":
                # torch's own gradient of clamp vanishes at 0 and 1 too, where most pixels of a digit are.
                gradient = gradient.masked_fill(x_adv > 1 + _ROUNDING, 0)
            best = transport.best(gradient - price, eps=eps, gamma=gamma, bisection=bisection)
            plan = plan + 2 / (step + 2) * (best - plan)
            if overflow == "capacity":
                # Ascent on the dual of the capacity, whose averaged plans, which these are, meet it in the limit.
                price = (price + (transport.images(best) - 1) / math.sqrt(step + 1)).clamp_min(0)
        if overflow == "capacity":
            plan = transport.within_capacity(plan)
        x_adv = transport.images(plan)
        return x_adv if overflow == "none" else x_adv.clamp(0, 1)


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient over its largest entry."""
    largest = gradient.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / per_sample(largest, gradient)


def _checked(eps: Any, steps: int, kernel: int, gamma: float, overflow: str, bisection: int) -> float:
    """The budget as a number."""
    value = parse_eps(eps)
    if not 0 <= value < math.inf:
        raise ValueError(f"attack.eps={eps}: expected a budget of 0 or more, in pixels per unit of mass")
    if steps < 0:
        raise ValueError(f"attack.steps={steps}: expected 0 or more")
    for name, number in (("kernel", kernel), ("bisection", bisection)):
        if number < 1:
            raise ValueError(f"attack.{name}={number}: expected 1 or more")
    if not 0 < gamma < math.inf:
        raise ValueError(f"attack.gamma={gamma}: expected a positive number, such as 1e-3")
    if overflow not in OVERFLOWS:
        raise ValueError(f"attack.overflow={overflow!r}: expected one of {', '.join(OVERFLOWS)}")
    return value


@dataclass(frozen=True, kw_only=True)
class FWA:
    """FWA as an evaluation attack; nothing in it is random.

    Its budget is no l_p ball, so the evaluator checks the range alone and no worst case takes it in. The paper's own
    images may exceed 1 and are clamped by the network: that is "clip".

    Attributes:
        eps, steps, kernel, gamma, bisection: as `fwa` takes them (CIFAR in the paper: 0.005; MNIST: 0.5).
        overflow: "clip" or "capacity"; no image that exceeds 1 is evaluated.
        objective: "cross_entropy", "margin" or "dlr".
        kappa: confidence of the margin.
        name: what tables print.

    Example:
        >>> FWA(eps=0.005, steps=40).describe()["budget"]
        0.005
    """

    eps: float
    steps: int
    kernel: int = 5
    gamma: float = 1e-3
    overflow: str = "clip"
    bisection: int = 20
    objective: str = "cross_entropy"
    kappa: float = 0.0
    name: str = "fwa"

    def __post_init__(self) -> None:
        """Parse a fraction and check ranges."""
        budget = _checked(self.eps, self.steps, self.kernel, self.gamma, self.overflow, self.bisection)
        object.__setattr__(self, "eps", budget)
        if self.overflow == "none":
            raise ValueError(
                "attack.overflow='none': what is evaluated lies in [0, 1]; use clip, which is what the network saw, or "
                "capacity"
            )
        if self.objective not in objectives.NAMES:
            raise ValueError(f"objective={self.objective!r}: expected one of {', '.join(objectives.NAMES)}")
        if self.kappa < 0:
            raise ValueError(f"kappa={self.kappa}: expected 0 or more")

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; ids and seed are not needed."""
        return fwa(
            objectives.by_name(self.objective, net, y, self.kappa),
            x,
            eps=self.eps,
            steps=self.steps,
            kernel=self.kernel,
            gamma=self.gamma,
            overflow=self.overflow,
            bisection=self.bisection,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record; the budget is under `budget`, for `eps` means an l_p radius."""
        return {
            "attack": "fwa",
            "name": self.name,
            "norm": "wasserstein",
            "budget": self.eps,
            "steps": self.steps,
            "kernel": self.kernel,
            "gamma": self.gamma,
            "overflow": self.overflow,
            "bisection": self.bisection,
            "objective": self.objective,
            "kappa": self.kappa,
        }
