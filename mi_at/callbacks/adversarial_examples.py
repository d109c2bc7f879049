"""The inner maximisation: when it runs, in which mode and precision, with which noise. Defenses say what."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import Inner, InnerMaximisation, Objective, Start
from mi_at.attacks.pgd import pgd
from mi_at.data.batch import Batch
from mi_at.functional import random
from mi_at.functional.geometry import start_noise
from mi_at.regularizers.base import TrainingRule

SELECTION_STEPS = 10


class AdversarialExamples(Callback):
    """Put the adversarial views that a defense asks for into each batch, in fit, validation and test.

    In training the noise is a function of (seed, view, epoch, batch, place in the global batch), so it does not
    depend on the number of processes; in validation and test of (seed, sample id).

    Args:
        budget: the `attack` group.
        seed: of the noise.

    Attributes:
        seconds: time spent in attacks since the last `take_seconds`.
    """

    def __init__(self, budget: InnerMaximisation, *, seed: int = 0) -> None:
        self.budget, self.seed = budget, seed
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Craft every view of a training batch with the budget of this moment."""
        rule = cast(TrainingRule, pl_module)
        place = torch.arange(len(batch.y), device=batch.y.device) + batch.offset
        epoch, batches = trainer.current_epoch, max(int(trainer.num_training_batches), 1)
        budget = self._budget_at(rule, epoch + (batch_idx + 1) / batches)
        self._clock_start(batch.x)
        for view, inner in rule.all_adversaries(batch).items():
            key = random.key(self.seed, view, epoch, batch_idx)
            batch.views[view] = craft(rule, batch.x, inner, budget, ids=place, seed=key)
        self._clock_stop(batch.x)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Craft the views that a checkpoint is chosen by."""
        self._select(cast(TrainingRule, pl_module), batch)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation."""
        self._select(cast(TrainingRule, pl_module), batch)

    def attack_of(self, rule: TrainingRule, epoch: int = 0) -> Callable[[Objective | Inner, Batch], Tensor]:
        """The run's own attack for hooks outside a training step.

        Args:
            rule: whose network is attacked.
            epoch: epochs finished so far, which eps and the noise depend on.

        Returns:
            (objective, batch) -> x_adv of the batch's images.
        """
        budget = self._budget_at(rule, epoch)

        def attack(objective: Objective | Inner, batch: Batch) -> Tensor:
            inner = objective if isinstance(objective, Inner) else Inner(objective)
            place = torch.arange(len(batch), device=batch.x.device) + batch.offset
            seed = random.key(self.seed, "hook", epoch, batch.batch_idx)
            return craft(rule, batch.x, inner, budget, ids=place, seed=seed)

        return attack

    def take_seconds(self) -> float:
        """Seconds spent in training attacks since the last call; on a GPU this waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _budget_at(self, rule: TrainingRule, epochs: float) -> InnerMaximisation:
        warmup = rule.scaled(self.budget.warmup_epochs)
        return replace(self.budget, eps=replace(self.budget, warmup_epochs=warmup).eps_at(epochs))

    def _select(self, rule: TrainingRule, batch: Batch) -> None:
        eps = self.budget.eps
        budget = InnerMaximisation(
            norm=self.budget.norm,
            eps=eps,
            steps=SELECTION_STEPS if eps else 0,
            step_size=eps / 4 or 1.0,
            init=self.budget.init,
            mode="eval",
        )
        # Lightning's trainer.validate may hand over inference tensors, which autograd refuses.
        batch.x, batch.y = batch.x.clone(), batch.y.clone()
        for view, inner in rule.selection_adversaries(batch).items():
            key = random.key(self.seed, view)
            batch.views[view] = craft(rule, batch.x, inner, budget, ids=batch.index, seed=key)

    def _clock_start(self, x: Tensor) -> None:
        if x.is_cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self._events.append((start, stop))
        self._started = time.perf_counter()

    def _clock_stop(self, x: Tensor) -> None:
        if x.is_cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started


def craft(rule: TrainingRule, x: Tensor, inner: Inner, budget: InnerMaximisation, *, ids: Tensor, seed: int) -> Tensor:
    """Run one inner maximisation on the bare network.

    Args:
        rule: whose `net` is attacked.
        x: [B, C, H, W] in [0, 1].
        inner: what is maximised, and the method's own start and mode.
        budget: radius, steps and what overrides the method's own.
        ids: [B] int64 of the noise.
        seed: of the noise.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    inner = budget.search_for(inner, rule.net)
    kind = budget.init or inner.init
    drawn = random.key(seed, "network")
    with attacking(rule.net, budget.mode or inner.mode, budget.precision), random.keyed(ids, drawn):
        start = _starter(kind, x, ids, seed, budget.norm)
        if inner.generate is not None:
            return inner.generate(x, budget, start)
        return pgd(
            inner.objective,
            x,
            eps=budget.eps,
            step_size=budget.step_size,
            steps=budget.steps,
            norm=budget.norm,
            init=start(budget.eps),
        )


def _starter(kind: str, x: Tensor, ids: Tensor, seed: int, norm: str) -> Start:
    def start(radius: float | Tensor) -> Tensor:
        shape = x.shape[1:]
        if kind == "zero":
            return torch.zeros_like(x)
        uniform = random.uniform(ids, shape, seed).to(x) if kind == "uniform" else x
        needs_gaussian = kind == "gaussian" or norm == "l2"
        gaussian = random.gaussian(ids, shape, seed + 1).to(x) if needs_gaussian else uniform
        return start_noise(kind, uniform, gaussian, radius, norm)

    return start
