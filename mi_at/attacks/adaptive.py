"""Adaptive attacks: on what a defense itself trains, and on the layer that it regularises.

`Adaptive` is PGD on the defense's whole training loss (IB-RAR, appendix A.2), whose terms may couple the batch (NCMI,
kernels). `FeatureShift` moves a layer's output as far as it can from that of the clean image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Objective
from mi_at.attacks.representation import representation
from mi_at.attacks.restarts import Ascent

TrainingLoss = Callable[[Tensor, Tensor, Tensor], Objective]
"""Clean images, labels and ids of a batch -> the training loss as a function of its adversarial images."""


@dataclass(frozen=True, kw_only=True)
class Adaptive(Ascent):
    """PGD on the training loss of the defense that made the network.

    Several starts are compared by the margin, per sample, also where the loss couples the batch.

    Attributes:
        batch_coupled: whether the loss may couple the batch; the evaluator then keeps fixed blocks. Without, a sample
            must not see its companions.
        batch_size: of these blocks, that of training; the result depends on it. None: the evaluation's.
        training_loss: bound by `with_training_loss`.
        name: what tables print.

    Raises:
        ValueError: a value out of range or an unknown name.

    Example:
        >>> import torch
        >>> attack = Adaptive(eps=0.3, step_size=0.01, steps=40)
        >>> attack(nn.Identity(), torch.zeros(1, 1, 1, 1), torch.tensor([0]), ids=torch.tensor([0]), seed=0)
        Traceback (most recent call last):
        ValueError: attack adaptive has no training loss: bind one, ...
    """

    batch_coupled: bool = True
    batch_size: int | None = 128
    training_loss: TrainingLoss | None = field(default=None, repr=False, compare=False)
    name: str = "adaptive"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"attack.batch_size={self.batch_size}: expected 1 or more, or null")

    def with_training_loss(self, make: TrainingLoss) -> Adaptive:
        """The same attack on a defense: `defense.training_objective`."""
        return replace(self, training_loss=make)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack a block of images; start noise is drawn by (seed, id).

        Raises:
            ValueError: no training loss is bound.
        """
        if self.training_loss is None:
            raise ValueError(
                f"attack {self.name} has no training loss: bind one, "
                "attack.with_training_loss(defense.training_objective)"
            )
        if not len(x):
            return x.detach().clone()
        loss = self.training_loss(x, y, ids)
        return self.ascend(
            lambda noise: loss, lambda noise: objectives.margin(net, y, float("inf")), x, ids=ids, seed=seed
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "adaptive", **self.settings(), "objective": "training_loss"}


def feature_shift(net: Any, tap: str, x: Tensor) -> Objective:
    """Squared distance of a tap's output from that on the clean images; 0, without a slope, at these.

    Args:
        net: a network with `forward_taps` (`mi_at.models.base.Classifier`).
        tap: name of a tap.
        x: [B, C, H, W], the clean images.

    Raises:
        ValueError: the network has no such tap.

    Example:
        >>> import torch
        >>> from mi_at.models.cnn import CNNTiny
        >>> net, x = CNNTiny(num_classes=2, in_channels=1, image_size=8).eval(), torch.rand(2, 1, 8, 8)
        >>> feature_shift(net, "features", x)(x).tolist()
        [0.0, 0.0]
    """
    return objectives.representation_distance(net, tap, representation(net, tap, x))


@dataclass(frozen=True, kw_only=True)
class FeatureShift(Ascent):
    """PGD on `feature_shift`: does a regularised layer hide what the loss cannot see?

    Attributes:
        tap: name of a tap.
        name: what tables print.

    Example:
        >>> FeatureShift(eps="8/255", step_size="2/255", steps=20).describe()["tap"]
        'features'
    """

    tap: str = "features"
    name: str = "feature_shift"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        super().__post_init__()
        if self.init == "zero" and self.steps:
            raise ValueError("init='zero': the distance has no slope at the clean image; use uniform or gaussian")

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; start noise is drawn by (seed, id)."""
        if not len(x):
            return x.detach().clone()
        shift = feature_shift(net, self.tap, x)
        return self.ascend(
            lambda noise: shift, lambda noise: objectives.margin(net, y, float("inf")), x, ids=ids, seed=seed
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "feature_shift", **self.settings()}
