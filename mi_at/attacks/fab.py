"""FAB, the fast adaptive boundary attack (Croce and Hein 2020b), of minimum norm, run by its authors' package.

As a part of AutoAttack FAB is held to a radius: `mi_at.attacks.autoattack.AutoAttack(attacks=["fab-t"])`. Here it is
what its paper describes: it returns the nearest adversarial image that it finds, with a number of steps of its own.

One run from the image per target and no random restart, so that nothing is drawn and a sample's result does not
depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks.nearest import Nearest, check_extras, check_steps, check_within
from mi_at.attacks.pgd import check_images
from mi_at.functional.geometry import check_norm


def fab(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    targets: int = 0,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Tensor:
    """The nearest misclassified image FAB comes across.

    Args:
        net: images -> logits [B, C].
        x: [B, ...] float in [0, 1]; the package works in float32.
        y: [B] int64.
        norm: "linf" or "l2", of the distance.
        steps: >= 0.
        targets: 0: FAB, C backward passes a step; k >= 1: FAB-T, one run and one backward pass a step for each of
            the k classes with the largest logits beside the label (at most C - 1).
        alpha_max: in [0, 1], the largest bias towards the clean image.
        eta: >= 1, overshoot over the linearised boundary.
        beta: in (0, 1), the step back towards the clean image after a success.

    Returns:
        [B, ...] in [0, 1], detached; the clean image where none was found, or where it is misclassified itself.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].
        ImportError: pyautoattack is not installed.

    Example:
        >>> net = lambda x: torch.stack([x[:, 0], x[:, 1]], 1)
        >>> x_adv = fab(net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), norm="l2", steps=20)
        >>> round(float((x_adv - torch.tensor([[0.6, 0.4]])).norm()), 2)
        0.14
    """
    _check(norm=norm, steps=steps, targets=targets, alpha_max=alpha_max, eta=eta, beta=beta)
    check_images(x)
    try:
        from pyautoattack.fab_pt import FABAttack_PT
    except ImportError as error:
        raise ImportError("FAB needs its authors' package: pip install pyautoattack") from error
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        nearest = Nearest(x, y, norm)
        with torch.no_grad():
            logits = net(x)
        nearest.show(x, logits)
        if not len(x) or not steps:
            return nearest.image
        library = FABAttack_PT(
            lambda images: net(images.to(x.dtype)).float(),
            norm={"linf": "Linf", "l2": "L2"}[norm],
            n_iter=steps,
            alpha_max=alpha_max,
            eta=eta,
            beta=beta,
            device=x.device,
        )
        # The package's own pair calls backward(), which leaves gradients in the network's parameters.
        library.get_diff_logits_grads_batch = partial(_differences, library.predict)
        library.get_diff_logits_grads_batch_targeted = partial(_difference, library.predict)
        for target in range(2, 2 + min(targets, logits.shape[1] - 1)) if targets else (None,):
            library.target_class = target
            x_adv = library.attack_single_run(x, y, is_targeted=target is not None).to(x.dtype)
            with torch.no_grad():
                nearest.show(x_adv, net(x_adv))
        return nearest.image


def _differences(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_k - z_y [B, C] (at k = y: huge, so that it is never the nearest) and its gradients [B, C, ...]."""
    rows = torch.arange(len(x), device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = predict(x)
        each = torch.stack([torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in logits.unbind(1)], dim=1)
    logits = logits.detach()
    differences = logits - logits[rows, y][:, None]
    differences[rows, y] = 1e10
    return differences, each - each[rows, y][:, None]


def _difference(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """z_target - z_y [B, 1] and its gradient [B, 1, ...]."""
    rows = torch.arange(len(x), device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = predict(x)
        difference = logits[rows, target] - logits[rows, y]
        (gradient,) = torch.autograd.grad(difference.sum(), x)
    return difference.detach()[:, None], gradient[:, None]


def _check(*, norm: str, steps: int, targets: int, alpha_max: float, eta: float, beta: float) -> None:
    check_norm(norm)
    check_steps(steps)
    check_extras(targets)
    if not 0 <= alpha_max <= 1:
        raise ValueError(f"attack.alpha_max={alpha_max}: expected a number in [0, 1], such as 0.1")
    if not 1 <= eta < float("inf"):
        raise ValueError(f"attack.eta={eta}: expected 1 or more, such as 1.05")
    if not 0 < beta < 1:
        raise ValueError(f"attack.beta={beta}: expected a number in (0, 1), such as 0.9")


@dataclass(frozen=True, kw_only=True)
class FAB:
    """FAB as an evaluation attack, of minimum norm: an image is returned at whatever distance it was found.

    Attributes:
        norm, steps, targets, alpha_max, eta, beta: as `fab` takes them.
        within: radius of the second number, that of samples broken within it; None: none.
        name: what tables print.

    Example:
        >>> FAB(norm="linf", steps=100, within="8/255").describe()["within"] == 8 / 255
        True
    """

    minimum_norm: ClassVar[bool] = True

    steps: int
    norm: str = "linf"
    targets: int = 0
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    within: float | None = None
    name: str = "fab"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        _check(**self._settings())
        object.__setattr__(self, "within", check_within(self.within, self.norm))

    def _settings(self) -> dict[str, Any]:
        values = asdict(self)
        return {key: values[key] for key in ("norm", "steps", "targets", "alpha_max", "eta", "beta")}

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; ids and seed are not needed: nothing is random."""
        return fab(net, x, y, **self._settings())

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "fab", "eps": None, **asdict(self)}
