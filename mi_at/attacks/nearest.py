"""What minimum-norm attacks share: per sample the nearest adversarial image seen so far, and their settings' checks.

Two options go beyond the papers, and are off unless set. As published C&W follows the wrong class of the largest logit
and DDN the cross-entropy, a mean over all classes. Where boundaries differ in slope neither need lead to the nearest
one: on linear models of 4 classes (tests/attacks/test_nearest.py) they ended at up to 1.7 and 3.4 times the true
distance. `targets` adds runs toward one class each, along its own logit difference (then at most 1.02 times);
`line_search` goes back to the boundary on the way found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mi_at.attacks.inner import check_eps
from mi_at.functional import geometry
from mi_at.functional.geometry import check_norm
from mi_at.functional.margins import largest_other


class Nearest:
    """Per sample the misclassified image with the smallest distance, among all that it was shown.

    Args:
        x: [B, ...] the clean images.
        y: [B] int64.
        norm: "linf" or "l2".

    Attributes:
        image: [B, ...] the nearest found; the clean image where none was found.
        distance: [B] of it; infinite where none was found.

    Example:
        >>> nearest = Nearest(torch.zeros(1, 2), torch.tensor([0]), "l2")
        >>> nearest.show(torch.full((1, 2), 0.5), torch.tensor([[0.0, 1.0]]))
        tensor([True])
        >>> nearest.image
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, x: Tensor, y: Tensor, norm: str) -> None:
        self.x, self.y, self.norm = x, y, check_norm(norm)
        self.image = x
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def show(self, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Look at candidates [B, ...] and their logits [B, C]; returns which are misclassified, [B] bool."""
        x_adv = x_adv.detach()
        # The very test that the evaluator makes: with equal logits the first class wins.
        wrong = logits.detach().argmax(dim=1) != self.y
        distance = geometry.norm(x_adv - self.x, self.norm)
        better = wrong & (distance < self.distance)
        self.image = select(better, x_adv, self.image)
        self.distance = torch.where(better, distance, self.distance)
        return wrong

    def search(self, net: Callable[[Tensor], Tensor], halvings: int) -> None:
        """Look for the boundary between the clean image and the nearest found, by bisection of that segment."""
        found, near = self.image, torch.zeros_like(self.distance)
        far = torch.ones_like(near)
        for _ in range(halvings):
            middle = (near + far) / 2
            candidate = (self.x + geometry.per_sample(middle, found) * (found - self.x)).clamp(0, 1)
            with torch.no_grad():
                wrong = self.show(candidate, net(candidate))
            near, far = torch.where(wrong, near, middle), torch.where(wrong, middle, far)


def likely(logits: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """The classes with the largest logits beside the label, the largest first: at most `count` times [B] int64.

    Example:
        >>> likely(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), 9)
        [tensor([2]), tensor([1])]
    """
    others = logits.detach().scatter(1, y[:, None], -torch.inf)
    return list(others.topk(min(count, logits.shape[1] - 1), dim=1).indices.unbind(1))


def lead(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """z_target - z_y [B]; without a target that of the wrong class with the largest logit.

    Example:
        >>> lead(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), torch.tensor([1])).item()
        -2.0
    """
    other = largest_other(logits, y) if target is None else logits.gather(1, target[:, None]).squeeze(1)
    return other - logits.gather(1, y[:, None]).squeeze(1)


def select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Per sample one of two images [B, ...]: `chosen` where the mask [B] is true.

    Example:
        >>> select(torch.tensor([True, False]), torch.ones(2, 1), torch.zeros(2, 1)).tolist()
        [[1.0], [0.0]]
    """
    return torch.where(mask.view(-1, *(1,) * (chosen.ndim - 1)), chosen, other)


def full_precision(logits: Tensor) -> Tensor:
    """Logits as float32 where they are coarser, as they are otherwise."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def check_within(within: Any, norm: str) -> float | None:
    """Parse the radius within which a minimum-norm attack's images count; None: at any distance.

    Raises:
        ValueError: as a radius.

    Example:
        >>> check_within("128/255", "l2") == 128 / 255
        True
    """
    if within is None:
        return None
    try:
        return float(check_eps(within, norm))
    except ValueError as error:
        raise ValueError(str(error).replace("attack.eps", "attack.within")) from None


def check_extras(targets: int, line_search: int = 0) -> None:
    """Refuse a negative number of target classes or of halvings.

    Raises:
        ValueError: naming it.
    """
    if targets < 0:
        raise ValueError(f"attack.targets={targets}: expected 0 (untargeted), or the number of target classes")
    if line_search < 0:
        raise ValueError(f"attack.line_search={line_search}: expected 0 (none), or the number of halvings, such as 10")


def check_steps(steps: int) -> None:
    """Refuse a negative number of steps.

    Raises:
        ValueError: naming it.
    """
    if steps < 0:
        raise ValueError(f"attack.steps={steps}: expected 0 or more")
