"""Projected gradient ascent over many samples at once, each until it is broken: the batch is refilled all the time.

A sample is broken as soon as any of its iterates, the start included, is misclassified. What becomes of one sample
does not depend on its companions, so that those that are settled can make room for the next (Croce and Hein 2020 drop
them between attacks; here it is done between steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Objective
from mi_at.attacks.packing import Packing
from mi_at.functional import random
from mi_at.functional.geometry import ascent_direction, project
from mi_at.functional.margins import logit_margin

# Leaves room for 2**40 ids below the step in the key of a stochastic layer's noise.
_STEP = 1 << 40


@dataclass
class Found:
    """What an ascent found, per sample.

    Attributes:
        x_adv: [N, ...] the first misclassified iterate; the one with the highest objective where none is.
        broken: [N] bool.
        margin: [N] of x_adv, max_{k != y} z_k - z_y.
    """

    x_adv: Tensor
    broken: Tensor
    margin: Tensor


@dataclass
class _Rows:
    """The samples in the batch: where they came from and their step (on the CPU), and their state on the device."""

    place: Tensor
    step: Tensor
    x: Tensor
    y: Tensor
    ids: Tensor
    x_adv: Tensor
    best: Tensor
    best_value: Tensor
    best_margin: Tensor
    broken: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, rows: Tensor) -> _Rows:
        return _Rows(**{name: values[rows.to(values.device)] for name, values in vars(self).items()})

    def put(self, rows: Tensor, others: _Rows) -> None:
        """Overwrite rows."""
        if not len(rows):
            return
        for name, values in vars(others).items():
            getattr(self, name)[rows.to(values.device)] = values

    @staticmethod
    def cat(parts: list[_Rows]) -> _Rows:
        return _Rows(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def ascend_until_broken(
    net: nn.Module,
    objective: Callable[[Callable[[Tensor], Tensor], Tensor], Objective],
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    *,
    start: Callable[[Tensor, Tensor], Tensor],
    eps: float,
    step_size: float,
    steps: int,
    norm: str,
    packing: Packing,
    seed: int = 0,
) -> Found:
    """Projected gradient ascent that ends, per sample, with the first misclassified iterate.

    Args:
        net: logits; frozen and in eval mode.
        objective: (network, labels) -> objective, one value per sample; it calls the network once.
        x: [N, ...] float in [0, 1], on any device: it goes to the packing's in batches.
        y: [N] int64.
        ids: [N] int64, the samples' places in their data set.
        start: (images, ids) -> start perturbations, a function of the ids.
        eps: radius, >= 0.
        step_size: length of a step, > 0.
        steps: >= 0.
        norm: "linf" or "l2".
        packing: how many at once. Without `active` every sample takes all steps.
        seed: of the noise of stochastic layers, which is drawn by (seed, id, step).

    Returns:
        What was found, on the device of x. A step costs one forward and one backward, the last iterate one forward.

    Example:
        >>> from mi_at.attacks import objectives, packing
        >>> net = nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> _ = net.weight.copy_(torch.eye(2))
        >>> found = ascend_until_broken(
        ...     net, objectives.cross_entropy, torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.zeros(2, dtype=torch.long),
        ...     torch.arange(2), start=lambda x, ids: torch.zeros_like(x), eps=0.25, step_size=0.125, steps=3,
        ...     norm="linf", packing=Packing(batch=packing.BatchSize(1)))
        >>> found.broken.tolist(), found.x_adv[0].tolist()
        ([True, False], [0.4750000238418579, 0.5249999761581421])
    """
    found = Found(
        x_adv=x.detach().clone(),
        broken=torch.zeros(len(x), dtype=torch.bool, device=x.device),
        margin=torch.full((len(x),), -torch.inf, device=x.device),
    )
    ascent = _Ascent(net, objective, x, y, ids, start, eps, step_size, steps, norm, packing, seed, found)
    # Lightning's evaluation loops run in inference mode, under which no gradient exists.
    with torch.inference_mode(False), torch.enable_grad():
        ascent.run()
    return found


@dataclass
class _Ascent:
    """The state of `ascend_until_broken`: what it was given, and how many samples have entered and left."""

    net: nn.Module
    objective: Callable[[Callable[[Tensor], Tensor], Tensor], Objective]
    x: Tensor
    y: Tensor
    ids: Tensor
    start: Callable[[Tensor, Tensor], Tensor]
    eps: float
    step_size: float
    steps: int
    norm: str
    packing: Packing
    seed: int
    found: Found
    entered: int = 0
    left: int = 0

    def run(self) -> None:
        """Step all samples in the batch; those that are settled make room for the next."""
        rows = self.enter(self.packing.batch.size)
        ending: list[_Rows] = []  # at their last iterate: they need no gradient, and wait for a batch of their kind
        while len(rows) or ending:
            if self.steps:
                self.step(rows)
            broken = rows.broken.cpu() if self.packing.active else torch.zeros(len(rows), dtype=torch.bool)
            last = ~broken & (rows.step == self.steps)
            self.leave(rows[_places(broken)])
            ending.append(rows[_places(last)])
            rows = self.refill(rows, _places(broken | last))
            if sum(map(len, ending)) >= self.packing.batch.size or not len(rows):
                final, ending = _Rows.cat(ending), []
                self.look(final, with_gradient=False)
                self.leave(final)
            if self.packing.on_progress is not None and len(self.x):
                self.packing.on_progress(self.left / len(self.x), int(self.found.broken.sum()))

    def enter(self, count: int) -> _Rows:
        """The next samples, at their starts."""
        place = torch.arange(self.entered, min(len(self.x), self.entered + count))
        self.entered += len(place)
        device = self.x.device if self.packing.device is None else self.packing.device
        x, y, ids = (values[place.to(values.device)].detach().to(device) for values in (self.x, self.y, self.ids))
        x_adv = project(x + self.start(x, ids).to(x), x, self.eps, self.norm)
        low = torch.full((len(place),), -torch.inf, device=device)
        return _Rows(
            place=place,
            step=torch.zeros(len(place), dtype=torch.int64),
            x=x,
            y=y,
            ids=ids,
            x_adv=x_adv,
            best=x_adv.clone(),
            best_value=low,
            best_margin=low.clone(),
            broken=torch.zeros(len(place), dtype=torch.bool, device=device),
        )

    def step(self, rows: _Rows) -> None:
        """Look at the present iterates and go on to the next."""
        if len(rows):
            direction = ascent_direction(self.look(rows, with_gradient=True), self.norm)
            rows.x_adv = project(rows.x_adv + self.step_size * direction, rows.x, self.eps, self.norm)
            rows.step = rows.step + 1

    def look(self, rows: _Rows, *, with_gradient: bool) -> Tensor:
        """Judge the present iterates and keep those that count; returns the gradient."""
        if not len(rows):
            return rows.x_adv
        value, margin, broken, gradient = self.packing.batch.map(
            lambda *parts: self.judge(*parts, with_gradient=with_gradient), rows.x_adv, rows.y, rows.ids, rows.step
        )
        better = ~rows.broken & (broken | (value > rows.best_value))
        rows.best = torch.where(better.view(-1, *(1,) * (rows.x.ndim - 1)), rows.x_adv, rows.best)
        rows.best_value = torch.where(better, value, rows.best_value)
        rows.best_margin = torch.where(better, margin, rows.best_margin)
        rows.broken = rows.broken | broken
        return gradient

    def judge(self, x_adv: Tensor, y: Tensor, ids: Tensor, step: Tensor, *, with_gradient: bool) -> tuple[Tensor, ...]:
        """Objective, margin, whether misclassified, and the gradient of the objective: one forward, one backward."""
        logits = torch.empty(0)

        def remembering(images: Tensor) -> Tensor:
            nonlocal logits
            logits = self.net(images)
            return logits

        x_adv = x_adv.detach().requires_grad_(with_gradient)
        with random.keyed(ids + step.to(ids.device) * _STEP, self.seed), torch.set_grad_enabled(with_gradient):
            value = self.objective(remembering, y)(x_adv)
        gradient = torch.autograd.grad(value.sum(), x_adv)[0] if with_gradient else x_adv
        logits = logits.detach().float()
        # Not a number is not right either: whoever looks at the iterate then sees it.
        broken = (logits.argmax(dim=1) != y) | ~logits.isfinite().all(dim=1)
        return value.detach(), logit_margin(logits, y), broken, gradient

    def leave(self, rows: _Rows) -> None:
        """Write down what was found for samples that are settled."""
        if len(rows):
            at = rows.place.to(self.x.device)
            self.found.x_adv[at] = rows.best.to(self.found.x_adv)
            self.found.broken[at] = rows.broken.to(self.x.device)
            self.found.margin[at] = rows.best_margin.to(self.x.device)
            self.left += len(rows)

    def refill(self, rows: _Rows, leaving: Tensor) -> _Rows:
        """Put the next samples in the place of those that leave; the batch may have become smaller meanwhile."""
        room = self.packing.batch.size - (len(rows) - len(leaving))
        fresh = self.enter(max(0, min(len(leaving), room)))
        if len(leaving) == len(rows):
            return fresh
        rows.put(leaving[: len(fresh)], fresh)
        stays = torch.ones(len(rows), dtype=torch.bool)
        stays[leaving[len(fresh) :]] = False
        return rows if bool(stays.all()) else rows[_places(stays)]


def _places(chosen: Tensor) -> Tensor:
    return chosen.nonzero().squeeze(1)
