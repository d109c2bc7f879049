"""Optimisers and schedules as plain numbers, so that a recipe can set each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    StepLR,
)

SCHEDULES = ("constant", "multistep", "step", "cosine", "one_cycle")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Numbers every optimiser shares, and the schedule, stepped once an epoch.

    Numbers given in epochs belong to a paper's run of `paper_epochs`; a run of `epochs` uses them in proportion
    (`scaled`), so that a short run is the long one in small.

    Attributes:
        lr: learning rate, the maximum of cosine and one_cycle; > 0.
        weight_decay: >= 0.
        epochs: epochs of this run; >= 1.
        paper_epochs: epochs that milestones and other such numbers refer to; None: `epochs`.
        schedule: "constant", "multistep", "step", "cosine" or "one_cycle".
        milestones: finished epochs after which multistep multiplies the rate by gamma.
        gamma: factor of multistep and step; of multistep also one for each milestone.
        step_epochs: period of step.
        pct_start: share of one_cycle in which the rate rises.

    Raises:
        ValueError: a number out of range or an unknown schedule.

    Example:
        >>> run = SGD(lr=0.1, epochs=12, paper_epochs=100, milestones=[75, 90])
        >>> run.scaled(75), run.scaled(90), run.scaled(1), run.scaled(0)
        (9, 11, 1, 0)
    """

    lr: float
    epochs: int
    weight_decay: float = 0.0
    paper_epochs: int | None = None
    schedule: str = "multistep"
    milestones: Sequence[int] = ()
    gamma: float | Sequence[float] = 0.1
    step_epochs: int = 20
    pct_start: float = 0.3

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"optim.lr={self.lr}: expected a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"optim.weight_decay={self.weight_decay}: expected 0 or more")
        if self.epochs < 1:
            raise ValueError(f"optim.epochs={self.epochs}: expected 1 or more")
        if self.paper_epochs is not None and self.paper_epochs < 1:
            raise ValueError(f"optim.paper_epochs={self.paper_epochs}: expected 1 or more")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule={self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if list(self.milestones) != sorted(self.milestones) or any(m < 1 for m in self.milestones):
            raise ValueError(f"optim.milestones={list(self.milestones)}: expected rising epochs, counted from 1")
        if isinstance(self.gamma, Sequence) and (
            self.schedule != "multistep" or len(self.gamma) != len(self.milestones)
        ):
            raise ValueError(
                f"optim.gamma={list(self.gamma)}: expected a number, or with schedule=multistep one for each of its "
                f"{len(self.milestones)} milestones"
            )

    def scaled(self, epochs: float) -> int:
        """A number of epochs of the paper in this run: round(value e / E), at least 1 where the value is at least 1."""
        in_this_run = round(epochs * self.epochs / (self.paper_epochs or self.epochs))
        return max(1, in_this_run) if epochs >= 1 else in_this_run

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        raise NotImplementedError("choose conf/optim/sgd.yaml or adam.yaml")

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """The schedule of `optimizer`, to be stepped after every epoch."""
        if self.schedule == "multistep":
            ends = [self.scaled(epoch) for epoch in self.milestones]
            if not isinstance(self.gamma, Sequence):
                return MultiStepLR(optimizer, ends, self.gamma)
            factors = list(zip(ends, self.gamma, strict=True))
            return LambdaLR(optimizer, lambda done: math.prod(factor for end, factor in factors if done >= end))
        if self.schedule == "step":
            return StepLR(optimizer, self.scaled(self.step_epochs), cast("float", self.gamma))
        if self.schedule == "cosine":
            return CosineAnnealingLR(optimizer, T_max=self.epochs)
        if self.schedule == "one_cycle":
            # One step more than epochs: the schedule is read at the start of each epoch and stepped after the last.
            return OneCycleLR(optimizer, self.lr, total_steps=self.epochs + 1, pct_start=self.pct_start)
        return LambdaLR(optimizer, lambda _: 1.0)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimisation):
    """Stochastic gradient descent with momentum in [0, 1)."""

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum}: expected a share in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov=true: expected optim.momentum above 0")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """torch.optim.SGD with these numbers."""
        return torch.optim.SGD(
            parameters,
            self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True, kw_only=True)
class Adam(Optimisation):
    """Adam; its betas are shares in [0, 1)."""

    betas: Sequence[float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)}: expected two shares in [0, 1)")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """torch.optim.Adam with these numbers."""
        first, second = self.betas
        return torch.optim.Adam(parameters, self.lr, betas=(first, second), weight_decay=self.weight_decay)
