"""DDN: decoupled direction and norm, a minimum-norm l_2 attack (Rony et al. 2019, Algorithm 1).

Per step k = 0, 1, ...: delta <- delta + alpha_k g / |g|, g the gradient of the cross-entropy at x + delta;
eps <- (1 - gamma) eps where x + delta is misclassified, (1 + gamma) eps where not;
delta <- clip(x + eps delta / |delta|) - x.

Differences from Algorithm 1, as in the authors' code: the delta that the next step starts from is the projected and
clipped one; alpha falls from 1 to 0.01 by a cosine; eps stops growing at the distance of the farthest corner of
[0, 1]. Unlike in their code the last iterate counts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks.nearest import (
    Nearest,
    check_extras,
    check_steps,
    check_within,
    full_precision,
    lead,
    likely,
    select,
)
from mi_at.attacks.pgd import check_images
from mi_at.functional import geometry, random
from mi_at.functional.divergences import cross_entropy
from mi_at.functional.geometry import ascent_direction, per_sample

_LAST_LR = 0.01  # of the cosine that begins at 1 (Rony et al. 2019, section 5)


def ddn(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    init_norm: float = 1.0,
    levels: int | None = None,
    noise: Tensor | None = None,
    targets: int = 0,
    line_search: int = 0,
) -> Tensor:
    """The nearest misclassified image on a path of steps whose direction and length are set apart.

    Every iterate, the clean image and the last one included, is looked at. Samples do not see each other.

    Args:
        net: images -> logits [B, C].
        x: [B, ...] float in [0, 1].
        y: [B] int64.
        steps: >= 0.
        gamma: in (0, 1), the share by which the length changes in a step.
        init_norm: > 0, the first length.
        levels: >= 2, pixels are rounded to multiples of 1 / (levels - 1) (256: images of 8 bits); None: they are not.
        noise: [B, ...] standard normal, the direction of a step whose gradient is exactly zero; None: no step there.
        targets: 0: as published; k >= 1: further runs, one toward each of the k classes with the largest logits
            beside the label (at most C - 1), along the gradient of z_target - z_y.
        line_search: >= 0, halvings of the segment from x to the image found (not rounded to levels); 0: as published.

    Returns:
        [B, ...] in [0, 1], detached; the clean image where none was found, or where it is misclassified itself.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].

    Example:
        >>> net = lambda x: torch.stack([x[:, 0], x[:, 1]], 1)
        >>> x_adv = ddn(net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), steps=100)
        >>> round(float((x_adv - torch.tensor([[0.6, 0.4]])).norm()), 2)
        0.14
    """
    _check(steps=steps, gamma=gamma, init_norm=init_norm, levels=levels)
    check_extras(targets, line_search)
    check_images(x)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        nearest = Nearest(x, y, "l2")
        aside = None if noise is None else ascent_direction(noise.to(x), "l2")
        run = partial(_descend, net, nearest, aside=aside, steps=steps, gamma=gamma, init_norm=init_norm, levels=levels)
        logits = run(None)
        for target in likely(logits, y, targets):
            run(target)
        nearest.search(net, line_search)
        return nearest.image


def _descend(
    net: Callable[[Tensor], Tensor],
    nearest: Nearest,
    target: Tensor | None,
    *,
    aside: Tensor | None,
    steps: int,
    gamma: float,
    init_norm: float,
    levels: int | None,
) -> Tensor:
    """One run; shows every iterate to `nearest` and returns the logits of the first, x."""
    x, y = nearest.x, nearest.y
    length = torch.full((len(x),), float(init_norm), dtype=x.dtype, device=x.device)
    farthest = geometry.norm(torch.maximum(x, 1 - x), "l2")
    x_adv, first = x.detach(), None  # another tensor: x must not require a gradient
    for step in range(steps):
        x_adv.requires_grad_(True)
        logits = full_precision(net(x_adv))
        first = logits if first is None else first
        objective = cross_entropy(logits, y, reduction="none") if target is None else lead(logits, y, target)
        (gradient,) = torch.autograd.grad(objective.sum(), x_adv)
        x_adv = x_adv.detach()
        wrong = nearest.show(x_adv, logits)
        direction = ascent_direction(gradient, "l2")
        if aside is not None:
            direction = select(geometry.norm(gradient, "linf") == 0, aside, direction)
        lr = _LAST_LR + (1 - _LAST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
        delta = x_adv - x + lr * direction
        length = torch.where(wrong, (1 - gamma) * length, (1 + gamma) * length).minimum(farthest)
        x_adv = _round(x + per_sample(length, x) * ascent_direction(delta, "l2"), levels).clamp(0, 1)
    with torch.no_grad():
        logits = net(x_adv)
    nearest.show(x_adv, logits)
    return logits if first is None else first


def _round(x: Tensor, levels: int | None) -> Tensor:
    return x if levels is None else (x * (levels - 1)).round() / (levels - 1)


def _check(*, steps: int, gamma: float, init_norm: float, levels: int | None) -> None:
    check_steps(steps)
    if not 0 < gamma < 1:
        raise ValueError(f"attack.gamma={gamma}: expected a number in (0, 1), such as 0.05")
    if not 0 < init_norm < float("inf"):
        raise ValueError(f"attack.init_norm={init_norm}: expected a positive number")
    if levels is not None and levels < 2:
        raise ValueError(f"attack.levels={levels}: expected null (no rounding), or 2 or more, such as 256")


@dataclass(frozen=True, kw_only=True)
class DDN:
    """DDN as an evaluation attack, of minimum norm: an image is returned at whatever distance it was found.

    Attributes:
        steps, gamma, init_norm, levels, targets, line_search: as `ddn` takes them.
        within: radius of the second number, that of samples broken within it; None: none.
        name: what tables print.

    Example:
        >>> DDN(steps=20, within=0.5).describe()["within"]
        0.5
    """

    minimum_norm: ClassVar[bool] = True
    norm: ClassVar[str] = "l2"

    steps: int
    gamma: float = 0.05
    init_norm: float = 1.0
    levels: int | None = None
    targets: int = 0
    line_search: int = 0
    within: float | None = None
    name: str = "ddn"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "within", check_within(self.within, self.norm))
        _check(steps=self.steps, gamma=self.gamma, init_norm=self.init_norm, levels=self.levels)
        check_extras(self.targets, self.line_search)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; (seed, id) decide where a gradient is exactly zero."""
        return ddn(
            net,
            x,
            y,
            steps=self.steps,
            gamma=self.gamma,
            init_norm=self.init_norm,
            levels=self.levels,
            noise=random.gaussian(ids, x.shape[1:], random.key(seed, "ddn")),
            targets=self.targets,
            line_search=self.line_search,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "ddn", "norm": self.norm, "eps": None, **asdict(self)}
