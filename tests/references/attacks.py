"""Literal transcriptions of the attacks' objectives and of projected gradient ascent, one sample at a time.

Sources: MIMAE-AT eq. 5, 12 and Algorithm 1 (sign step, projection, start x + 0.001 N(0, I)); Madry et al.
2018 (uniform start); Carlini and Wagner 2017 (margin); Ding et al. 2020 (soft margin); Croce and Hein 2020,
eq. 6 (DLR). Everything in float64, pixels in loops.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.references.losses import Number, Row, cross_entropy, kl, largest_other, log_softmax, value_of


def _row(logits: Tensor) -> Row:
    """The logits of one sample [1, C] as scalars that keep their graph."""
    return [logits[0, k] for k in range(logits.shape[1])]


def logit_margin(z: Row, y: int) -> Number:
    """max_{k != y} z_k - z_y: negative while the sample is classified right."""
    return z[largest_other(z, y)] - z[y]


def cw_margin(z: Row, y: int, kappa: float = 0.0) -> Number:
    """min(max_{k != y} z_k - z_y, kappa): constant once the wrong class leads by kappa."""
    margin = logit_margin(z, y)
    return margin if value_of(margin) < kappa else 0.0 * margin + kappa


def soft_logit_margin(z: Row, y: int) -> Number:
    """log sum_{k != y} exp z_k - z_y (Ding et al. 2020)."""
    others = [z[k] for k in range(len(z)) if k != y]
    # log sum exp z_k = z_0 - log softmax(z)_0
    return others[0] - log_softmax(others)[0] - z[y]


def dlr(z: Row, y: int) -> Number:
    """-(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3 + 1e-12), pi by decreasing logits (C >= 3)."""
    order = sorted(range(len(z)), key=lambda k: -value_of(z[k]))
    return -(z[y] - z[largest_other(z, y)]) / (z[order[0]] - z[order[2]] + 1e-12)


OBJECTIVES: dict[str, Callable[[Row, int], Number]] = {
    "cross_entropy": cross_entropy,
    "margin": cw_margin,
    "margin_50": lambda z, y: cw_margin(z, y, 50.0),
    "dlr": dlr,
}


def norm(delta: Tensor, which: str) -> float:
    """Largest absolute pixel, or the root of the sum of squares, of one perturbation."""
    pixels = [float(v) for v in delta.reshape(-1).tolist()]
    if which == "linf":
        return max(abs(v) for v in pixels)
    return math.sqrt(sum(v * v for v in pixels))


def project(x_adv: Tensor, x: Tensor, eps: float, which: str) -> Tensor:
    """One sample: into the eps-ball around x, then into [0, 1]."""
    moved, origin = x_adv.reshape(-1).tolist(), x.reshape(-1).tolist()
    length = norm(x_adv - x, which)
    out = []
    for a, b in zip(moved, origin, strict=True):
        d = a - b
        if which == "linf":
            d = min(max(d, -eps), eps)
        elif length > eps:
            d = d * (eps / length)
        out.append(min(max(b + d, 0.0), 1.0))
    return torch.tensor(out, dtype=x.dtype).reshape(x.shape)


def ascend(x_adv: Tensor, gradient: Tensor, step_size: float, which: str) -> Tensor:
    """One sample: x' + step sgn(g), or x' + step g / |g|_2; a zero gradient does not move it."""
    flat, g = x_adv.reshape(-1).tolist(), gradient.reshape(-1).tolist()
    length = math.sqrt(sum(v * v for v in g))
    out = []
    for a, v in zip(flat, g, strict=True):
        direction = 0.0
        if v != 0.0:
            direction = math.copysign(1.0, v) if which == "linf" else v / length
        out.append(a + step_size * direction)
    return torch.tensor(out, dtype=x_adv.dtype).reshape(x_adv.shape)


def start(x: Tensor, eps: float, which: str, init: str, generator: torch.Generator) -> Tensor:
    """One sample's start delta: zero, 0.001 N(0, I), or uniform in the eps-ball."""
    if init == "zero":
        return torch.zeros_like(x)
    if init == "gaussian":
        return 0.001 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if which == "linf":
        return eps * (2.0 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1.0)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    radius = float(torch.rand((), generator=generator, dtype=x.dtype)) ** (1.0 / x.numel())
    return eps * radius * direction / norm(direction, "l2")


def pgd(
    objective: Callable[[int, Tensor], Number],
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    which: str = "linf",
    delta: Tensor | None = None,
    iterate: str = "last",
) -> Tensor:
    """Eq. 5 and Algorithm 1, lines 3-8. ``objective(i, x_i)`` is the scalar of sample i at x_i [1, ...]."""
    results = []
    for i in range(x.shape[0]):
        origin = x[i : i + 1]
        current = origin if delta is None else origin + delta[i : i + 1]
        current = project(current, origin, eps, which)
        best, best_value = current, value_of(objective(i, current))
        for _ in range(steps):
            leaf = current.clone().requires_grad_(True)
            value = objective(i, leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
            current = project(ascend(current, gradient, step_size, which), origin, eps, which)
            value_now = value_of(objective(i, current))
            if value_now > best_value:
                best, best_value = current, value_now
        results.append(best if iterate == "worst" else current)
    return torch.cat(results)


def label_objective(net: nn.Module, y: Tensor, name: str) -> Callable[[int, Tensor], Number]:
    """(i, x_i) -> the named objective of sample i at its label."""
    return lambda i, x_i: OBJECTIVES[name](_row(net(x_i)), int(y[i]))


def kl_objective(net: nn.Module, logits: Tensor) -> Callable[[int, Tensor], Number]:
    """(i, x_i) -> KL(softmax(logits_i) || softmax(net(x_i))): what TRADES maximises."""
    return lambda i, x_i: kl(_row(logits[i : i + 1].detach()), _row(net(x_i)))
