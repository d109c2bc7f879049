"""A training's count before it is run, against FLOP counted while real code runs with real numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import InnerMaximisation
from mi_at.attacks.pgd import pgd
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.callbacks.weight_averaging import EMA, SWA
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.mma import MMA
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.cnn import CNNTiny
from mi_at.models.resnet import ResNet18
from mi_at.optim import SGD
from mi_at.regularizers.base import Regularizer
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from mi_at.results.flop import FlopCount
from mi_at.results.rehearsal import Cost, Make, Size, Training, count_forward, count_training, time_step

STEPS = 2  # of the inner maximisation: it costs as many searches of 2 forwards
SIZE = Size(
    train=100,
    images=100,
    batch=50,
    validation=0,
    eval_batch=20,
    validations=4,
    epochs=4,
    channels=1,
    image_size=8,
    num_classes=10,
)


def net() -> CNNTiny:
    return CNNTiny(num_classes=10, in_channels=1, image_size=8)


FORWARD = count_forward(net(), SIZE).total


def made(
    defense: Callable[[], Defense],
    term: Callable[[], Regularizer] | None = None,
    callbacks: Callable[[], Sequence[Callback]] = list,
    inspect_every: int = 0,
    momentum: float = 0.9,
) -> Make:
    def make() -> tuple[Defense, list[Callback]]:
        module = defense()
        optimisation = SGD(lr=0.1, epochs=SIZE.epochs, momentum=momentum, schedule="constant")
        module.attach(net(), optimisation=optimisation, regularizers={"term": term()} if term else {})
        module.inspect_every = inspect_every
        budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=STEPS)
        return module, [AdversarialExamples(budget), *callbacks()]

    return make


def forwards(training: Training) -> list[float]:
    """Of each epoch, per image."""
    return [cost.total / SIZE.images / FORWARD for cost in training.epochs]


# (defense, forwards beside the attack's); the counts at ten steps are those of tests/test_flop.py
DEFENSES: dict[str, tuple[Callable[[], Defense], float]] = {
    "ce": (CE, 3),
    "standard_at": (StandardAT, 2 * STEPS + 3),
    "trades": (Trades, 2 * STEPS + 7),
}


@pytest.mark.parametrize("name", DEFENSES)
def test_a_step(name: str) -> None:
    defense, floor = DEFENSES[name]
    training = count_training(made(defense), SIZE)
    assert forwards(training) == pytest.approx([floor] * 4, rel=0.02)
    assert training.step.total == pytest.approx(training.epochs[-1].total / 2)
    assert training.start == Cost()


def test_operations_are_those_of_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = net(), torch.rand(50, 1, 8, 8), torch.arange(50) % 10

    def counts(steps: int) -> tuple[float, float]:
        monkeypatch.setitem(globals(), "STEPS", steps)
        with FlopCount() as real, attacking(network):
            pgd(objectives.cross_entropy(network, y), x, eps=0.1, step_size=0.03, steps=steps, init="uniform")
        return count_training(made(StandardAT), SIZE).step.calls, real.calls

    (two, real_two), (nine, real_nine) = counts(2), counts(9)
    assert nine - two == real_nine - real_two > 7 * 20


def test_validation_is_two_searches_and_three_forwards() -> None:
    training = count_training(made(CE), replace(SIZE, validation=50))
    assert training.validation.total == pytest.approx((2 * 20 + 3) * FORWARD * 50, rel=1e-6)
    known: dict[Any, Any] = {}
    for _ in range(2):
        assert count_training(made(CE), replace(SIZE, validation=50), validations=known) == training
    assert count_training(made(Trades), replace(SIZE, validation=25), validations=known).validation == (
        training.validation * 0.5
    )
    assert len(known) == 1
    assert count_training(made(CE), replace(SIZE, validation=10), validations=known).validation.total == pytest.approx(
        training.validation.total / 5
    )
    assert len(known) == 2  # of another batch
    alone = count_training(made(CE), SIZE)
    assert training.total.total - alone.total.total == pytest.approx(4 * training.validation.total)


def test_a_pass_before_training_counts_for_the_whole_set() -> None:
    training = count_training(made(StandardAT, NCMI), SIZE)
    assert training.start.total == pytest.approx(SIZE.train * FORWARD, rel=1e-6)
    assert forwards(training) == pytest.approx([4 * STEPS + 7] * 4, rel=0.02)


def test_epochs_that_differ_are_found() -> None:
    """Algorithm 2: an epoch without centroids, then a second attack in every step and a pass at every end.

    The first epoch ends with one more pass, without an attack, in which the centroids begin.
    """
    one, both, passed = 2 * STEPS + 3, 4 * STEPS + 6, 2 * STEPS + 1
    training = count_training(made(StandardAT, lambda: NCMIRelaxed(warmup_epochs=2, batch_factor=1)), SIZE)
    assert forwards(training) == pytest.approx([one, one + 1 + passed, both + passed, both + passed], rel=0.02)


def test_weight_perturbation_begins_after_its_warmup() -> None:
    awp = made(Trades, callbacks=lambda: [AdversarialWeightPerturbation(gamma=0.01, warmup_epochs=3)])
    plain = 2 * STEPS + 7
    assert forwards(count_training(awp, SIZE)) == pytest.approx([plain, plain, plain, plain + 6], rel=0.02)


def test_readings_of_the_terms_count_as_often_as_they_are_made() -> None:
    """In every step; in the first and the fifth of eight; never."""
    often, seldom, never = (count_training(made(Trades, inspect_every=every), SIZE) for every in (1, 4, 0))
    more = often.total.total - never.total.total
    # Three gradients through two forwards.
    assert more / 8 == pytest.approx(3 * 4 * FORWARD * SIZE.batch, rel=0.35)
    assert seldom.total.total - never.total.total == pytest.approx(more / 4)
    assert never.readings == Cost()


def test_bfloat16_is_what_is_trained_not_the_attack() -> None:
    training = count_training(made(StandardAT), SIZE, bf16=True)
    assert training.step.bf16 == pytest.approx(3 * FORWARD * SIZE.batch, rel=0.02)
    assert training.step.fp32 == pytest.approx(2 * STEPS * FORWARD * SIZE.batch, rel=0.01)


def test_a_search_of_its_own_counts_too() -> None:
    training = count_training(made(lambda: MMA(variant="full")), SIZE)
    assert forwards(training)[0] > 2 * STEPS + 7 + 5  # bisection too


def test_swa_measures_its_statistics_where_there_are_any() -> None:
    def with_norms() -> tuple[Defense, list[Callback]]:
        module, callbacks = made(CE, callbacks=lambda: [SWA(start_epoch=3)])()
        narrow = ResNet18(num_classes=10, in_channels=1, image_size=8, width=0.1)
        return module.attach(narrow, optimisation=module.optimisation), callbacks

    costs = [cost.total for cost in count_training(with_norms, SIZE).epochs]
    assert costs[0] == costs[1] < costs[2] == costs[3]
    assert costs[2] / costs[1] == pytest.approx(4 / 3, rel=0.01)


def test_memory_is_weights_momentum_gradients_and_what_a_step_holds() -> None:
    weights = sum(p.nbytes for p in net().parameters())
    one = count_training(made(CE), SIZE).memory
    twice = count_training(made(CE), replace(SIZE, batch=100)).memory
    assert one > 3 * weights  # weights, momentum, gradients
    assert one - count_training(made(CE, momentum=0.0), SIZE).memory == weights
    buffers = sum(b.nbytes for b in net().buffers())
    assert count_training(made(CE, callbacks=lambda: [EMA()]), SIZE).memory - one == weights + buffers
    assert twice - one > 50 * (8 * 8 * 16) * 4 / 2  # at least half of what the first layer gives
    adversarial = count_training(made(StandardAT), SIZE).memory
    assert one <= adversarial < 1.5 * one  # an attack's graph is gone before the training's is built


def test_a_step_is_timed_with_real_numbers() -> None:
    seconds, steps = time_step(made(CE), SIZE, device=torch.device("cpu"), seconds=0.05)
    assert seconds > 0
    assert steps >= 1


@pytest.mark.parametrize("name", ["trades", "ncmi"])
def test_the_count_is_that_of_a_real_step(name: str) -> None:
    """The same rehearsal, with values."""
    from mi_at.results.flop import FlopCount
    from mi_at.results.rehearsal import _Rehearsal

    make: Any = {"trades": made(Trades), "ncmi": made(StandardAT, lambda: NCMI(alpha=0.0))}[name]
    real = _Rehearsal(make, SIZE, False, device=torch.device("cpu"))
    with FlopCount() as count:
        real.step(SIZE.images_of(SIZE.batch, device=torch.device("cpu"), batch_idx=1))
    assert count.flop == count_training(make, SIZE).step.total
