"""Robust CMI, separation and NCMI of a network: the worst over all attacks of the budget (robust NCMI eq. 25-27).

Paper: Enhancing adversarial robustness through robust information quantities (robust NCMI), section 3.4, appendix B.
Alternating maximisation of eq. 50, 5 rounds: with the channel q(x|i, y) held fixed, G is found for all samples at once,
for the denominator couples them; then q = P(x|y) f(x')[i] / P(i|y) (eq. 48), at which the value is the NCMI of G.

Differences from the paper: it gives neither start nor steps. Round 1 starts in the ball with the q of the clean
outputs, each further round at the best G so far; an iterate counts by its own NCMI (that is, with its own q) and the
best one is kept, the clean images among them, so the value falls neither between rounds nor below that of the clean
outputs. Logarithms in the objective are clamped at ln 1e-8. The authors' code does not contain it.

A step costs 3 F per image: the outputs of all samples first, then each batch once more with its input gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import check_eps, check_step
from mi_at.attacks.pgd import check_images
from mi_at.evaluation.outcomes import EvaluationError
from mi_at.functional import random
from mi_at.functional.geometry import ascent_direction, check_norm, project, start_noise
from mi_at.functional.information import LOG_FLOOR, class_means, conditional_mutual_information, separation

QUANTITIES = ("ncmi", "cmi", "separation")


@dataclass(frozen=True)
class RobustInformation:
    """What the maximisation found.

    Attributes:
        value: the robust quantity: the largest NCMI or CMI, the smallest separation.
        history: the best value after each round.
        clean: the value of the clean outputs.
        cmi: of the outputs at the best G.
        separation: of the outputs at the best G.
        x_adv: [n, C, H, W], the best G.
    """

    value: float
    history: tuple[float, ...]
    clean: float
    cmi: float
    separation: float
    x_adv: Tensor


def robust_ncmi(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    step_size: float | str,
    norm: str = "linf",
    rounds: int = 5,
    steps: int = 20,
    quantity: str = "ncmi",
    batch_size: int = 500,
    ids: Tensor | None = None,
    seed: int = 0,
) -> RobustInformation:
    """Robust NCMI (or CMI, or separation) over a whole set.

    Args:
        net: a classifier, logits out; attacked in eval mode, left as it was.
        x: [n, C, H, W] float in [0, 1], all samples; outputs are computed in batches on the network's device.
        y: [n] int64.
        eps: radius, a number or a fraction ("8/255"), that of the evaluation.
        step_size: likewise.
        norm: "linf" or "l2".
        rounds: alternations, >= 1 (5 in appendix B).
        steps: of G in each round, >= 1.
        quantity: "ncmi" (eq. 27), "cmi" (eq. 25) or "separation" (eq. 26, a minimum).
        batch_size: samples of a forward; does not change the result beyond rounding.
        ids: [n] int64 of the start noise; None: 0 to n - 1.
        seed: of the start noise.

    Returns:
        Values in nats (NCMI: a ratio), and the attacked images.

    Raises:
        EvaluationError: fewer than two classes, or outputs that are no [n, K] finite logits.
        ValueError: an argument out of range.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        >>> x, y = torch.rand(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> found = robust_ncmi(net, x, y, eps=0.1, step_size=0.05, rounds=2, steps=3)
        >>> found.clean <= found.history[0] <= found.history[1] == found.value
        True
    """
    radius, length = check_eps(eps, check_norm(norm)), check_step(step_size, steps, norm)
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity={quantity!r}: expected one of {', '.join(QUANTITIES)}")
    for name, value in (("rounds", rounds), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    check_images(x)
    if not len(x) or len(y) != len(x) or not bool((y != y[0]).any()):
        raise EvaluationError(
            f"robust NCMI compares classes: expected samples of 2 classes or more, got {len(x)} images and labels of "
            f"{len(y.unique())} classes"
        )
    x, y = x.detach(), y.cpu()
    with attacking(net):
        search = _Search(net, x, y, quantity, batch_size)
        clean = best = search.score(search.best)
        x_adv = project(x + _uniform(x, radius, norm, ids, seed), x, radius, norm)
        history = []
        for _ in range(rounds):
            channel = log_channel(search.best, y)
            for _ in range(steps):
                probs = search.outputs(x_adv)
                best = search.keep(best, probs, x_adv)
                ascent = search.gradient(x_adv, search.slope(probs, channel))
                for part, batch, gradient in zip(*(t.split(batch_size) for t in (x_adv, x, ascent)), strict=True):
                    part.copy_(project(part + length * ascent_direction(gradient, norm), batch, radius, norm))
            best = search.keep(best, search.outputs(x_adv), x_adv)
            history.append(best)
            x_adv = search.best_x.clone()
        sign = -1 if quantity == "separation" else 1
        probs = search.best
        return RobustInformation(
            value=sign * best,
            history=tuple(sign * value for value in history),
            clean=sign * clean,
            cmi=conditional_mutual_information(probs, y, search.classes).item(),
            separation=separation(probs, y, search.classes).item(),
            x_adv=search.best_x,
        )


def log_channel(probs: Tensor, y: Tensor) -> Tensor:
    """Ln of q(x|i, y) / P(x|y) = f(x')[i] / P(i|y), the best channel of a G (eq. 48), logarithms clamped.

    Args:
        probs: [n, K] outputs f(x').
        y: [n] int64.

    Returns:
        [n, K].

    Example:
        >>> log_channel(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1, 1])).exp()
        tensor([[6.6667e-01, 2.0000e+00],
                [1.3333e+00, 4.0000e-08]])
    """
    centroids, _ = class_means(probs, y, int(y.max()) + 1)
    return probs.clamp_min(LOG_FLOOR).log() - centroids.clamp_min(LOG_FLOOR).log()[y]


def channel_objective(probs: Tensor, y: Tensor, channel: Tensor, quantity: str = "ncmi") -> Tensor:
    """What G maximises while the channel is fixed (eq. 28, 26, 30), the ball apart.

    Args:
        probs: [n, K] outputs f(x').
        y: [n] int64.
        channel: [n, K] as `log_channel` gives it, of another G.
        quantity: "ncmi", "cmi" or "separation" (negated).

    Returns:
        Scalar; at the channel of these outputs it is their NCMI, CMI or -separation, clamps apart.
    """
    cmi = (probs * channel).sum() / len(probs)
    if quantity == "cmi":
        return cmi
    gamma = separation(probs, y, int(y.max()) + 1)
    return cmi / gamma if quantity == "ncmi" else -gamma


class _Search:
    """Outputs, gradients and the best iterate over a set that does not fit into one forward."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, quantity: str, batch_size: int) -> None:
        self.net, self.y, self.quantity, self.batch_size = net, y, quantity, batch_size
        self.device = next((parameter.device for parameter in net.parameters()), x.device)
        self.best_x = x.clone()
        self.best = self.outputs(x)
        self.classes = self.best.shape[1]

    def outputs(self, x: Tensor) -> Tensor:
        """[n, K] float64 probabilities, on the CPU."""
        with torch.no_grad():
            logits = torch.cat([self.net(part.to(self.device)).double().cpu() for part in x.split(self.batch_size)])
        if logits.ndim != 2 or len(logits) != len(x) or not bool(logits.isfinite().all()):
            raise EvaluationError(
                f"the network gave {tuple(logits.shape)} for {len(x)} images, or values that are not finite: expected "
                "finite logits [n, classes]"
            )
        return logits.softmax(dim=1)

    def score(self, probs: Tensor) -> float:
        """The quantity of a G by its outputs, with its own channel; the larger, the worse for the network."""
        if self.quantity == "cmi":
            return conditional_mutual_information(probs, self.y, self.classes).item()
        gamma = separation(probs, self.y, self.classes)
        if self.quantity == "separation":
            return -gamma.item()
        return (conditional_mutual_information(probs, self.y, self.classes) / gamma).item()

    def keep(self, best: float, probs: Tensor, x_adv: Tensor) -> float:
        """Keep an iterate that is better than all before."""
        score = self.score(probs)
        if score <= best:
            return best
        self.best = probs
        self.best_x.copy_(x_adv)
        return score

    def slope(self, probs: Tensor, channel: Tensor) -> Tensor:
        """[n, K] derivative of the objective by the outputs; all of the coupling between samples is in it."""
        probs = probs.requires_grad_(True)
        (slope,) = torch.autograd.grad(channel_objective(probs, self.y, channel, self.quantity), probs)
        probs.requires_grad_(False)
        return slope

    def gradient(self, x: Tensor, slope: Tensor) -> Tensor:
        """[n, C, H, W] derivative of the objective by the images."""
        parts = []
        for part, weight in zip(x.split(self.batch_size), slope.split(self.batch_size), strict=True):
            images = part.to(self.device).clone().requires_grad_(True)
            probs = self.net(images).double().softmax(dim=1)
            (gradient,) = torch.autograd.grad(probs, images, grad_outputs=weight.to(self.device))
            parts.append(gradient.to(x.device))
        return torch.cat(parts)


def _uniform(x: Tensor, eps: float, norm: str, ids: Tensor | None, seed: int) -> Tensor:
    ids = torch.arange(len(x)) if ids is None else ids.cpu()
    uniform = random.uniform(ids, x.shape[1:], 2 * seed).to(x)
    gaussian = random.gaussian(ids, x.shape[1:], 2 * seed + 1).to(x) if norm == "l2" else uniform
    return start_noise("uniform", uniform, gaussian, eps, norm)
