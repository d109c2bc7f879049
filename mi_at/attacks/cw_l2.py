"""The l_2 attack of Carlini and Wagner (2017, section VI.A): distance and margin, traded off by c, in tanh space.

min_w |x'(w) - x|^2 + c max(z_y(x') - max_{k != y} z_k(x'), -kappa),  x'(w) = (tanh w + 1) / 2, by Adam.

With a fixed c (`binary_search=1`, as Torchattacks has it and the papers ran it) this is a weak attack: a small c pays
more for the distance than a success is worth. Its number means nothing without c, kappa, steps and lr.

Differences from the authors' code: no early abort (it looks at the loss of the whole batch, so that a sample's result
would depend on its companions); the last iterate counts too; an image counts once it is misclassified, whatever kappa.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks.nearest import Nearest, check_extras, check_steps, check_within, full_precision, lead, likely
from mi_at.attacks.pgd import check_images
from mi_at.functional.margins import at_most

# Adam's constants (Kingma and Ba 2015, Algorithm 1).
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


def cw_l2(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    c: float = 1.0,
    kappa: float = 0.0,
    steps: int = 20,
    lr: float = 0.01,
    binary_search: int = 1,
    shrink: float = 1e-6,
    targets: int = 0,
    line_search: int = 0,
) -> Tensor:
    """The nearest misclassified image that gradient descent in tanh space comes across.

    Every iterate of every search step is looked at, the start and the last included. Samples do not see each other.

    A pixel at exactly 0 or 1 has w = -+inf and would never move. The image is therefore drawn towards grey by the
    factor 1 - shrink before atanh, as in the authors' code. At the default such a pixel starts at |w| = 7.25, and Adam
    moves w by about lr a step: it still takes some 5 / lr steps before it is seen to move. shrink=0 freezes them
    altogether (Torchattacks 3.5); a larger one (0.01) frees them at once, at the price of a start that is not x.

    Args:
        net: images -> logits [B, C].
        x: [B, ...] float in [0, 1].
        y: [B] int64.
        c: > 0, weight of the margin; where it is searched for, its first value.
        kappa: >= 0, the lead of the wrong class up to which the loss rewards it.
        steps: >= 0, of Adam, in each search step.
        lr: > 0, of Adam.
        binary_search: >= 1, values of c tried: 1 leaves it fixed. Per sample it is multiplied by 10 until an image is
            found, then the interval between the largest failure and the smallest success is halved.
        shrink: in [0, 1), see above.
        targets: 0: as published; k >= 1: further runs, one toward each of the k classes with the largest logits
            beside the label (at most C - 1), with z_y - z_target for the margin.
        line_search: >= 0, halvings of the segment from x to the image found; 0: as published.

    Returns:
        [B, ...] in [0, 1], detached; the clean image where none was found, or where it is misclassified itself.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].

    Example:
        >>> net = lambda x: torch.stack([x[:, 0], x[:, 1]], 1)
        >>> x_adv = cw_l2(net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), c=1.0, steps=200, binary_search=5)
        >>> round(float((x_adv - torch.tensor([[0.6, 0.4]])).norm()), 2)
        0.14
    """
    _check(c=c, kappa=kappa, steps=steps, lr=lr, binary_search=binary_search, shrink=shrink)
    check_extras(targets, line_search)
    check_images(x)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        nearest = Nearest(x, y, "l2")
        with torch.no_grad():
            logits = net(x)
        nearest.show(x, logits)
        start = ((2 * x - 1) * (1 - shrink)).atanh()
        for target in (None, *likely(logits, y, targets)):
            weight = torch.full((len(x),), float(c), dtype=x.dtype, device=x.device)
            low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
            for _ in range(binary_search):
                found = _descend(net, nearest, target, start, weight, kappa=kappa, steps=steps, lr=lr)
                low, high = torch.where(found, low, weight), torch.where(found, weight, high)
                weight = torch.where(high.isinf(), weight * 10, (low + high) / 2)
        nearest.search(net, line_search)
        return nearest.image


def _descend(
    net: Callable[[Tensor], Tensor],
    nearest: Nearest,
    target: Tensor | None,
    start: Tensor,
    c: Tensor,
    *,
    kappa: float,
    steps: int,
    lr: float,
) -> Tensor:
    """One run of Adam with c [B]; shows every iterate to `nearest` and returns which samples succeeded, [B] bool."""
    w, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    found = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for step in range(1, steps + 1):
        w = w.detach().requires_grad_(True)
        x_adv = (w.tanh() + 1) / 2
        logits = full_precision(net(x_adv))
        found = found | nearest.show(x_adv, logits)
        margin = at_most(lead(logits, nearest.y, target), kappa)
        loss = (x_adv - nearest.x).flatten(1).square().sum(dim=1) - c * margin
        (gradient,) = torch.autograd.grad(loss.sum(), w)
        first = _BETA_1 * first + (1 - _BETA_1) * gradient
        second = _BETA_2 * second + (1 - _BETA_2) * gradient.square()
        size = (second / (1 - _BETA_2**step)).sqrt() + _EPSILON
        w = w.detach() - lr * (first / (1 - _BETA_1**step)) / size
    with torch.no_grad():
        x_adv = (w.tanh() + 1) / 2
        return found | nearest.show(x_adv, net(x_adv))


def _check(*, c: float, kappa: float, steps: int, lr: float, binary_search: int, shrink: float) -> None:
    check_steps(steps)
    for name, value in (("c", c), ("lr", lr)):
        if not 0 < value < float("inf"):
            raise ValueError(f"attack.{name}={value}: expected a positive number")
    if not 0 <= kappa < float("inf"):
        raise ValueError(f"attack.kappa={kappa}: expected 0 or more")
    if binary_search < 1:
        raise ValueError(f"attack.binary_search={binary_search}: expected 1 (c stays fixed) or more")
    if not 0 <= shrink < 1:
        raise ValueError(f"attack.shrink={shrink}: expected a number in [0, 1), such as 1e-6")


@dataclass(frozen=True, kw_only=True)
class CWL2:
    """C&W l_2 as an evaluation attack, of minimum norm: an image is returned at whatever distance it was found.

    Attributes:
        c, kappa, steps, lr, binary_search, shrink, targets, line_search: as `cw_l2` takes them.
        within: radius of the second number, that of samples broken within it; None: none.
        name: what tables print.

    Example:
        >>> CWL2(c=1.0, steps=20, lr=0.01, within="128/255").describe()["eps"] is None
        True
    """

    minimum_norm: ClassVar[bool] = True
    norm: ClassVar[str] = "l2"

    c: float
    steps: int
    lr: float
    kappa: float = 0.0
    binary_search: int = 1
    shrink: float = 1e-6
    targets: int = 0
    line_search: int = 0
    within: float | None = None
    name: str = "cw_l2"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "within", check_within(self.within, self.norm))
        _check(**self._settings())
        check_extras(self.targets, self.line_search)

    def _settings(self) -> dict[str, Any]:
        values = asdict(self)
        return {key: values[key] for key in ("c", "kappa", "steps", "lr", "binary_search", "shrink")}

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; ids and seed are not needed: nothing is random."""
        return cw_l2(net, x, y, **self._settings(), targets=self.targets, line_search=self.line_search)

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "cw_l2", "norm": self.norm, "eps": None, **asdict(self)}
