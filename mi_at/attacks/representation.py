"""The adversarial representation attack: an image that looks like its source and is, inside the network, a guide image.

Paper: Sabour, Cao, Faghri, Fleet, Adversarial manipulation of deep representations, ICLR 2016, eq. 1-2.
min |phi_k(x') - phi_k(x_guide)|^2  subject to |x' - x_source|_inf < eps,  phi_k a layer's output.

`representation_lbfgs` is the paper's: L-BFGS-B in the box of each image. `representation_attack` is projected gradient
descent, batched, for training (shared_info, Table 7: eps 10/255, 20 steps) and large evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, InnerMaximisation, Objective, Start, check_eps, check_reach, check_step
from mi_at.attacks.pgd import check_images, pgd
from mi_at.functional import random
from mi_at.functional.geometry import check_norm

METHODS = ("pgd", "lbfgs")


def representation(net: Any, tap: str, x: Tensor) -> Tensor:
    """A tap's output on images [B, C, H, W], without a graph.

    Raises:
        ValueError: the network has no such tap.
    """
    objectives.check_tap(net, tap)
    with torch.no_grad():
        found: Tensor = net.forward_taps(x, (tap,))[1][tap]
    return found


def towards(net: Any, tap: str, guides: Tensor) -> Objective:
    """Minus the squared distance of a tap's output from that on the guide images, per sample."""
    distance = objectives.representation_distance(net, tap, representation(net, tap, guides))
    return lambda x: -distance(x)


def representation_attack(
    net: Any,
    x: Tensor,
    guides: Tensor,
    *,
    tap: str,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: str = "linf",
    iterate: str = "worst",
) -> Tensor:
    """Images within eps whose representation approaches that of their guides, by projected gradient descent.

    The network is taken as it is (`mi_at.attacks.contexts.attacking`). The start is the image itself.

    Args:
        net: a network with `forward_taps` (`mi_at.models.base.Classifier`).
        x: [B, C, H, W] float in [0, 1], the sources.
        guides: [B, C, H, W], a guide for each.
        tap: name of a tap.
        eps: radius, a number or a fraction.
        step_size: likewise.
        steps: >= 0.
        norm: "linf" or "l2".
        iterate: "worst": the iterate closest to the guide; "last" saves a forward.

    Returns:
        [B, C, H, W] in [0, 1], at most eps from x, detached.

    Raises:
        ValueError: as `pgd`; no such tap; not a guide for each image.

    Example:
        >>> from mi_at.models.cnn import CNNTiny
        >>> net, x = CNNTiny(num_classes=2, in_channels=1, image_size=8).eval(), torch.rand(4, 1, 8, 8)
        >>> options = {"tap": "features", "eps": "8/255", "step_size": "2/255", "steps": 5}
        >>> x_adv = representation_attack(net, x[:2], x[2:], **options)
        >>> bool((towards(net, "features", x[2:])(x_adv) > towards(net, "features", x[2:])(x[:2])).all())
        True
    """
    _check_guides(x, guides)
    return pgd(
        towards(net, tap, guides),
        x,
        eps=eps,
        step_size=step_size,
        steps=steps,
        norm=norm,
        init="zero",
        iterate=iterate,
    )


def representation_lbfgs(net: Any, x: Tensor, guides: Tensor, *, tap: str, eps: float, steps: int) -> Tensor:
    """The same in the l_inf ball by scipy's L-BFGS-B, image by image: exact bounds, seconds per image.

    Args:
        net: a network with `forward_taps`, frozen.
        x: [B, C, H, W] float in [0, 1], the sources.
        guides: [B, C, H, W], a guide for each.
        tap: name of a tap.
        eps: radius, a number or a fraction.
        steps: >= 0, iterations at most.

    Returns:
        [B, C, H, W] in [0, 1], at most eps from x (to rounding in x's type), detached.

    Raises:
        ValueError: an argument out of range; no such tap; not a guide for each image.
    """
    eps = check_eps(eps, "linf")
    check_step(1.0, steps, "linf")
    check_images(x)
    _check_guides(x, guides)
    x = x.detach()
    if not steps or not eps:
        return x.clone()
    with torch.inference_mode(False), torch.enable_grad():
        parts = [_descend(net, x[i : i + 1], guides[i : i + 1], tap, eps, steps) for i in range(len(x))]
    return torch.cat([x[:0].clone(), *parts])


def _descend(net: Any, x: Tensor, guide: Tensor, tap: str, eps: float, steps: int) -> Tensor:
    """One image."""
    objective = towards(net, tap, guide.clone())
    source = x.double().flatten().cpu().numpy()
    low, high = np.maximum(source - eps, 0), np.minimum(source + eps, 1)

    def image(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat.copy()).view(x.shape).to(x)

    def distance(flat: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = image(flat).requires_grad_(True)
        value = -objective(leaf).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.double().flatten().cpu().numpy()

    options = {"maxiter": steps, "maxfun": 20 * steps}
    found = minimize(distance, source, jac=True, method="L-BFGS-B", bounds=np.stack([low, high], 1), options=options)
    return image(np.clip(found.x, low, high)).clamp(0, 1)


def guided_by_first_half(net: Any, tap: str) -> Inner:
    """The inner maximisation of training on this attack (shared_info, section 4.4): the first half guides the second.

    The first half of the batch comes back as it is; source j of the others has guide j, counted round. It takes eps,
    step, steps and norm of the attack group. Halves are those of the process's own share of a batch.

    Args:
        net: a network with `forward_taps`.
        tap: name of a tap; the paper takes the last layer before the output.

    Example:
        >>> from mi_at.models.cnn import CNNTiny
        >>> net, x = CNNTiny(num_classes=2, in_channels=1, image_size=8).eval(), torch.rand(5, 1, 8, 8)
        >>> budget = InnerMaximisation(norm="linf", eps="10/255", step_size="1/255", steps=20)
        >>> generate = guided_by_first_half(net, "features").generate
        >>> x_adv = generate(x, budget, lambda radius: torch.zeros_like(x))
        >>> torch.equal(x_adv[:2], x[:2]), bool((x_adv[2:] != x[2:]).any())
        (True, True)
    """

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        half = len(x) // 2
        return x[half:], x[torch.arange(len(x) - half, device=x.device) % max(half, 1)]

    def objective(x: Tensor) -> Tensor:
        sources, guides = halves(x)
        return torch.cat([x.new_zeros(len(x) - len(sources)), towards(net, tap, guides)(sources)])

    def generate(x: Tensor, budget: InnerMaximisation, start: Start) -> Tensor:
        if len(x) < 2:  # nobody guides it
            return x
        sources, guides = halves(x)
        attacked = representation_attack(
            net,
            sources,
            guides,
            tap=tap,
            eps=budget.eps,
            step_size=budget.step_size,
            steps=budget.steps,
            norm=budget.norm,
            iterate="last",
        )
        return torch.cat([x[: len(x) - len(sources)], attacked])

    return Inner(objective, init="zero", generate=generate)


@dataclass(frozen=True, kw_only=True)
class RepresentationMaximisation(InnerMaximisation):
    """The `attack` group of training on the representation attack: `guided_by_first_half` is what every view gets.

    What the defense would maximise is not; its loss sees the two views as ever.

    Attributes:
        tap: name of a tap; shared_info: the last layer before the output.
    """

    tap: str = "features"
    joint: ClassVar[bool] = True

    def search_for(self, inner: Inner, net: Any) -> Inner:
        """The first half of the batch guides the second.

        Raises:
            ValueError: a method whose search is its own.
        """
        if inner.generate is not None:
            raise ValueError("attack=representation: this method has a search of its own; use attack=pgd")
        return replace(guided_by_first_half(net, self.tap), mode=inner.mode)


def _check_guides(x: Tensor, guides: Tensor) -> None:
    if guides.shape != x.shape:
        raise ValueError(
            f"guides of shape {list(guides.shape)} for images {list(x.shape)}: expected one guide for each"
        )


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The adversarial representation attack as an evaluation attack.

    Each sample's guide is drawn by (seed, id) among the bound images of another class, so that it depends neither on
    its batch nor on which other samples are attacked.

    Attributes:
        eps, steps: as `representation_attack` takes them.
        step_size: likewise; null: eps / 4. L-BFGS-B has none.
        norm: "linf" or "l2" (pgd alone).
        tap: name of a tap; shared_info: the last layer before the output.
        method: "pgd" or "lbfgs".
        guides: [G, C, H, W] and
        guide_labels: [G], bound by `with_guides`.
        name: what tables print.

    Raises:
        ValueError: a value out of range or an unknown name.

    Example:
        >>> Representation(eps="10/255", steps=20).describe()["tap"]
        'features'
    """

    eps: float
    steps: int
    step_size: float | None = None
    norm: str = "linf"
    tap: str = "features"
    method: str = "pgd"
    guides: Tensor | None = field(default=None, repr=False, compare=False)
    guide_labels: Tensor | None = field(default=None, repr=False, compare=False)
    name: str = "representation"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, check_norm(self.norm)))
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(METHODS)}")
        if self.method == "lbfgs" and (self.norm != "linf" or self.step_size is not None):
            raise ValueError(
                f"method='lbfgs' with norm={self.norm!r}, step_size={self.step_size}: its box is that of linf, and it "
                "finds its own steps; leave both out, or use method='pgd'"
            )
        step = (self.eps / 4 or 1.0) if self.step_size is None else self.step_size
        step = check_step(step, self.steps, self.norm)
        check_reach(step, self.steps, self.norm, self.eps)
        if self.method == "pgd":
            object.__setattr__(self, "step_size", step)

    def with_guides(self, images: Tensor, labels: Tensor) -> Representation:
        """The same attack with a set of guide images.

        Args:
            images: [G, C, H, W] float in [0, 1].
            labels: [G] int64; with two classes at least every sample finds a guide.

        Raises:
            ValueError: images outside [0, 1], or not a label for each.
        """
        check_images(images)
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(f"{list(images.shape)} guide images, {len(labels)} labels: expected [G, C, H, W] and [G]")
        return replace(self, guides=images, guide_labels=labels)

    def choose(self, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """[B] places in the guide set: uniform among the guides of another class, by (seed, id).

        Raises:
            ValueError: no guides are bound, or none of another class.
        """
        if self.guides is None or self.guide_labels is None:
            raise ValueError(
                f"attack {self.name} has no guide images: bind some, attack.with_guides(images, labels), for example "
                "of the validation split"
            )
        differs = self.guide_labels.to(y.device)[None] != y[:, None]
        count = differs.sum(dim=1)
        if not bool((count > 0).all()):
            alone = int(y[count == 0][0])
            raise ValueError(
                f"attack {self.name}: all {len(self.guides)} guide images are of class {alone}; bind others"
            )
        rank = (random.uniform(ids, (), random.key(seed, "guide")).to(y.device) * count).long().clamp_max(count - 1)
        return (differs.cumsum(dim=1) > rank[:, None]).int().argmax(dim=1)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; guides are drawn by (seed, id).

        Raises:
            ValueError: no guides are bound, or none of another class; no such tap.
        """
        chosen = self.choose(y, ids=ids, seed=seed)
        if not len(x) or self.guides is None:
            return x.detach().clone()
        guides = self.guides[chosen.to(self.guides.device)].to(x)
        if self.step_size is None:
            return representation_lbfgs(net, x, guides, tap=self.tap, eps=self.eps, steps=self.steps)
        return representation_attack(
            net,
            x,
            guides,
            tap=self.tap,
            eps=self.eps,
            step_size=self.step_size,
            steps=self.steps,
            norm=self.norm,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record; no step size where there is none."""
        steps = {"steps": self.steps} | ({} if self.step_size is None else {"step_size": self.step_size})
        return {
            "attack": "representation",
            "name": self.name,
            "eps": self.eps,
            "norm": self.norm,
            **steps,
            "tap": self.tap,
            "method": self.method,
            "guides": 0 if self.guides is None else len(self.guides),
        }
