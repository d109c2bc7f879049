"""What a training costs, counted before it is run: a few of its steps are rehearsed with hollow tensors.

The defense, its terms, the inner maximisation and adversarial weight perturbation are those of the run, so that there
is no formula per method. Convolutions and matrix products count. A pass over the training set is one batch, that many
times; epochs that cost alike are counted once; and an attack takes one step and two, for all further ones cost as much
as the second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.weight_averaging import SWA
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.regularizers.base import Context, Regularizer, Views
from mi_at.results.flop import FlopCount, hollow, hollow_out


@dataclass(frozen=True)
class Cost:
    """FLOP by precision, and operations.

    Attributes:
        fp32: FLOP in float32, or better.
        bf16: in bfloat16.
        calls: operations of any kind, each of which a GPU waits for when they are small.

    Example:
        >>> (Cost(1.0) + Cost(bf16=2.0) * 3).total
        7.0
    """

    fp32: float = 0.0
    bf16: float = 0.0
    calls: float = 0.0

    @property
    def total(self) -> float:
        """FLOP of both."""
        return self.fp32 + self.bf16

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.fp32 + other.fp32, self.bf16 + other.bf16, self.calls + other.calls)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.fp32 * times, self.bf16 * times, self.calls * times)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.fp32 - other.fp32, self.bf16 - other.bf16, self.calls - other.calls)


@dataclass(frozen=True)
class Size:
    """How much a training does.

    Attributes:
        train: images of the training set, extra ones left out.
        images: that an epoch trains on; batch: of them in a step.
        validation: images of a validation; eval_batch: of them at once; validations: how many there are.
        epochs: of the run.
        channels, image_size, num_classes: of the data.
    """

    train: int
    images: int
    batch: int
    validation: int
    eval_batch: int
    validations: int
    epochs: int
    channels: int
    image_size: int
    num_classes: int

    def images_of(self, count: int, epoch: int = 0, batch_idx: int = 0, device: torch.device | None = None) -> Batch:
        """A batch without values; on a device, one of noise."""
        shape, y = (count, self.channels, self.image_size, self.image_size), torch.arange(count) % self.num_classes
        x = hollow(torch.empty(shape, device="meta")) if device is None else torch.rand(shape, device=device)
        y, index = (y, torch.arange(count)) if device is None else (y.to(device), torch.arange(count, device=device))
        return Batch(x=x, y=y, index=index, epoch=epoch, batch_idx=batch_idx)


@dataclass(frozen=True)
class Training:
    """What a training costs.

    Attributes:
        start: before the first epoch.
        step: a step of the last epoch.
        epochs: of each epoch, passes at its end included, validation not.
        validation: of one validation.
        readings: of all readings of the terms' shares (`Defense.inspect_every`).
        size: how much it does.
        memory: bytes at the peak: weights, gradients, the optimiser's state, an average, and what a step or a
            validation holds beside them. Not in it: the data, the device's own libraries, what an allocator wastes.
    """

    start: Cost
    step: Cost
    epochs: tuple[Cost, ...]
    validation: Cost
    readings: Cost
    size: Size
    memory: int

    @property
    def total(self) -> Cost:
        """Of the whole training."""
        return sum(self.epochs, start=self.start) + self.validation * self.size.validations + self.readings

    @property
    def per_epoch(self) -> Cost:
        """Of an epoch on average, validations and readings included."""
        return self.total * (1 / self.size.epochs)


Make = Callable[[], tuple[Defense, Sequence[Callback]]]
"""Gives a defense with its network, and the callbacks of its training, the inner maximisation first."""


def count_training(
    make: Make, size: Size, *, bf16: bool = False, validations: dict[Any, tuple[Cost, int]] | None = None
) -> Training:
    """Count a training.

    Args:
        make: called for every epoch that is rehearsed.
        size: how much the training does.
        bf16: whether training runs under autocast; what the attack does is its own.
        validations: those of other trainings, of which the same need not be counted again; this one is added.
    """
    brief: dict[int, Cost] = {}  # of epochs, with one step of the attack
    known: dict[Cost, _Epoch] = {}  # with all of them, by the cost with one
    final = _Rehearsal(make, size, bf16)

    def rehearsed(epoch: int) -> Cost:
        if epoch not in brief:
            one = _Rehearsal(make, size, bf16, attack_steps=1).epoch(epoch, read=False)
            brief[epoch] = one.cost
            if one.cost not in known:
                two = _Rehearsal(make, size, bf16, attack_steps=2).epoch(epoch)
                known[one.cost] = one.with_steps(two, final.attack_steps)
        return brief[epoch]

    def between(first: int, last: int) -> None:
        """Where two epochs cost alike, so do those between them."""
        if last - first > 1 and rehearsed(first) != rehearsed(last):
            middle = (first + last) // 2
            rehearsed(middle)
            between(first, middle)
            between(middle, last)

    last = size.epochs - 1
    start = known[rehearsed(0)].start
    rehearsed(last)
    between(0, last)
    costs: list[Cost] = []
    for epoch in range(size.epochs):
        costs.append(known[brief[epoch]].cost if epoch in brief else costs[-1])
    validation, at_validation = final.validation({} if validations is None else validations)
    steps = size.epochs * math.ceil(size.images / size.batch)
    readings = math.ceil(steps / final.inspect_every) if final.inspect_every else 0
    return Training(
        start=start,
        step=known[brief[last]].step,
        epochs=tuple(costs),
        validation=validation,
        readings=known[brief[last]].reading * readings,
        size=size,
        memory=final.kept() + max(at_validation, *(each.peak for each in known.values())),
    )


def count_forward(net: nn.Module, size: Size) -> Cost:
    """FLOP of one image's forward in float32, and the operations of a batch's; the network becomes hollow."""
    hollow_out(net)
    with torch.no_grad(), FlopCount() as count, attacking(net):
        net(size.images_of(2).x)
    return replace(_cost(count) * 0.5, calls=count.calls)


def time_step(
    make: Make, size: Size, *, device: torch.device, bf16: bool = False, seconds: float = 3.0
) -> tuple[float, int]:
    """How long a step really takes: it is run with noise for images.

    Args:
        make: as in `count_training`, with values.
        size: its batch is taken.
        device: to run on.
        bf16: as in `count_training`.
        seconds: to measure for, after one step that is not measured.

    Returns:
        Seconds per step, and how many were measured.
    """
    rehearsal = _Rehearsal(make, size, bf16, device=device)
    rehearsal.step(size.images_of(size.batch, device=device))
    steps, started = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - started < seconds:
        rehearsal.step(size.images_of(size.batch, batch_idx=1, device=device))
        steps += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / steps, steps


@dataclass(frozen=True)
class _Epoch:
    cost: Cost
    step: Cost
    start: Cost
    reading: Cost
    peak: int

    def with_steps(self, two: _Epoch, steps: int) -> _Epoch:
        """This epoch, rehearsed with one step of the attack, with more of them, by what a second one adds."""

        def more(one: Cost, other: Cost) -> Cost:
            return one + (other - one) * (steps - 1)

        return _Epoch(
            more(self.cost, two.cost),
            more(self.step, two.step),
            more(self.start, two.start),
            two.reading,  # of the terms, not of the attack
            max(self.peak, two.peak),
        )


class _Rehearsal:
    """A defense on a stage: the hooks of a training are called in its order, without a Trainer."""

    def __init__(
        self,
        make: Make,
        size: Size,
        bf16: bool,
        *,
        device: torch.device | None = None,
        attack_steps: int | None = None,
    ) -> None:
        self.defense, self.callbacks = make()
        if attack_steps is not None:
            self._examples.budget = replace(self._examples.budget, steps=attack_steps)
        self.size, self.bf16, self.device = size, bf16, device
        if device is None:
            hollow_out(self.defense)
        else:
            self.defense.to(device)
        expect: Any = getattr(self.defense, "expect", None)  # mma's memory of its margins
        if expect is not None:
            expect(max(size.train, size.batch))
        self.defense.train()
        self.inspect_every, self.defense.inspect_every = self.defense.inspect_every, 0  # read apart from the steps
        self.trainer: Any = SimpleNamespace(
            current_epoch=0,
            num_training_batches=math.ceil(size.images / size.batch),
            precision_plugin=SimpleNamespace(forward_context=self._autocast),
        )
        self.terms = list(self.defense.added_terms().values())

    def epoch(self, epoch: int, *, read: bool = True) -> _Epoch:
        """Count one epoch: its first step, another one, a reading of the terms' shares where asked, and its end."""
        size, start = self.size, Cost()
        with FlopCount() as count:
            self._each(lambda term: term.on_fit_start(self._context(0, count)))
            start = _cost(count) if epoch == 0 else start
        if epoch > 0 and any(type(term).on_epoch_end is not Regularizer.on_epoch_end for term in self.terms):
            self.trainer.current_epoch = epoch - 1  # what the end of an epoch leaves behind
            self.step(size.images_of(size.batch, epoch - 1, 1))
            with FlopCount() as count:
                self._each(lambda term: term.on_epoch_end(self._context(epoch, count)))
        self.trainer.current_epoch = epoch
        costs, peaks = [], []
        batch = size.images_of(size.batch, epoch)
        for batch_idx in (0, 1) if self.terms else (0,):  # a term may do more in an epoch's first step
            batch = size.images_of(size.batch, epoch, batch_idx)
            with FlopCount() as count:
                self.step(batch, count)
            costs.append(_cost(count))
            peaks.append(count.peak)
        first, other = costs[0], costs[-1]
        reading = self._reading(batch) if read and self.inspect_every else Cost()
        with FlopCount() as count:
            self._each(lambda term: term.on_epoch_end(self._context(epoch + 1, count)))
        peaks.append(count.peak)
        steps = size.images / size.batch
        whole = first + other * (steps - 1) + _cost(count) + self._averaging(epoch)
        return _Epoch(whole, other, start, reading, max(peaks))

    def step(self, batch: Batch, count: FlopCount | None = None) -> None:
        """The inner maximisation, forward, backward, and the hooks after the optimiser's step."""
        for callback in self.callbacks:
            callback.on_train_batch_start(self.trainer, self.defense, batch, batch.batch_idx)
        with self._autocast():
            loss = self.defense.training_step(batch, batch.batch_idx)
        loss.backward()
        while self.defense.undo_before_hooks:
            self.defense.undo_before_hooks.pop()()
        with torch.no_grad():
            self.defense.after_step(batch)
            self._each(lambda term: term.after_step(self._context(batch.epoch, count), batch))
        for parameter in self.defense.parameters():
            parameter.grad = None

    def validation(self, known: dict[Any, tuple[Cost, int]]) -> tuple[Cost, int]:
        """Count one validation, and the bytes it holds, unless one of the same rule, network and batch is known."""
        images = min(self.size.validation, self.size.eval_batch)
        if not images:
            return Cost(), 0
        rule: Any = type(self.defense)
        state = self.defense.state_dict().items()  # an estimator's holds plain values beside tensors
        shapes = tuple((name, value.shape, value.dtype) for name, value in state if isinstance(value, Tensor))
        key = (rule.validation_step, rule.selection_adversaries, images, self.bf16, type(self.defense.net), shapes)
        if key not in known:
            batch = self.size.images_of(images)
            self.defense.eval()
            with torch.no_grad(), FlopCount() as count:
                self._examples.on_validation_batch_start(self.trainer, self.defense, batch, 0)
                with self._autocast():
                    self.defense.validation_step(batch, 0)
            known[key] = _cost(count), count.peak
        cost, peak = known[key]
        return cost * (self.size.validation / images), peak

    def kept(self) -> int:
        """Bytes that are there between steps; gradients come and go with a step."""
        weights = [*self.defense.parameters(), *self.defense.buffers()]
        trained = sum(p.nbytes for p in self.defense.trained_parameters())
        of_optimizer = 0
        if self.defense.optimisation is not None:
            options = self.defense.optimisation.optimizer(self.defense.trained_parameters()).defaults
            of_optimizer = 2 if "betas" in options else int(bool(options.get("momentum")))
        copies = sum(isinstance(callback, WeightAveraging) for callback in self.callbacks)
        return sum(w.nbytes for w in weights) * (1 + copies) + trained * of_optimizer

    @property
    def attack_steps(self) -> int:
        """Of the inner maximisation."""
        return self._examples.budget.steps

    @property
    def _examples(self) -> AdversarialExamples:
        return next(callback for callback in self.callbacks if isinstance(callback, AdversarialExamples))

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = "cpu" if self.device is None else self.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bf16)

    def _each(self, hook: Callable[[Regularizer], None]) -> None:
        with torch.no_grad():
            for term in self.terms:
                hook(term)

    def _reading(self, batch: Batch) -> Cost:
        """The shares and gradient norms of the terms, read every so many steps (`Defense.inspect_every`)."""
        defense = self.defense
        with self._autocast():
            views = Views(defense.net, batch, defense.needed_taps)
            terms = defense.all_terms(views)
        with FlopCount() as count:
            if "clean" not in views.computed():
                with attacking(defense.net):
                    objectives.frozen_logits(defense.net, batch.x)
            if len(terms) > 2:
                defense.term_shares(terms)
        return _cost(count)

    def _averaging(self, epoch: int) -> Cost:
        """SWA measures the statistics of the average in a pass over the training images."""
        start = [self.defense.scaled(each.start_epoch) for each in self.callbacks if isinstance(each, SWA)]
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.defense.net.modules())
        if not start or epoch + 1 < start[0] or not norms:
            return Cost()
        batch = self.size.images_of(self.size.batch)
        with torch.no_grad(), FlopCount() as count:
            self.defense.net(batch.x)
        return _cost(count) * (self.size.train / self.size.batch)

    def _context(self, epoch: int, count: FlopCount | None) -> Context:
        def batches(batch_size: int, augment: bool) -> Iterator[Batch]:
            batch = self.size.images_of(min(batch_size, self.size.train), epoch)
            before, calls = (dict(count.of), count.calls) if count else ({}, 0)
            yield batch
            if count:  # what was done with this batch is done with all of them
                others = self.size.train / len(batch) - 1
                for kind in count.of:
                    count.of[kind] += round((count.of[kind] - before.get(kind, 0)) * others)
                count.calls += (count.calls - calls) * others

        return Context(
            net=self.defense.net,
            epoch=epoch,
            scaled=self.defense.scaled,
            train_batches=batches,
            draw_per_class=lambda n: self.size.images_of(n * self.size.num_classes, device=self.device),
            attack=self._examples.attack_of(self.defense, epoch),
        )


def _cost(count: FlopCount) -> Cost:
    bf16 = float(count.of[torch.bfloat16])
    return Cost(count.flop - bf16, bf16, count.calls)
