"""Images per second and the attack's share, against a clock that is set by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.speed import Speed
from tests.callbacks import fits

ATTACK, STEP, VALIDATION, BETWEEN = 0.25, 0.75, 100.0, 1000.0  # seconds


class Clock:
    """What `time.perf_counter` says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Attack(AdversarialExamples):
    """Takes a quarter of a second, and counts how often its time is asked for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(InnerMaximisation(norm="linf", eps=0.1, step_size=0.1, steps=1))
        self.clock, self.attacked, self.asked = clock, 0.0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.clock.now += ATTACK
        self.attacked += ATTACK

    def take_seconds(self) -> float:
        self.asked += 1
        seconds, self.attacked = self.attacked, 0.0
        return seconds


class Work(Callback):
    """Training takes its time, and so do validation and what happens between epochs."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.clock.now += STEP

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.clock.now += VALIDATION

    def on_train_epoch_end(self, trainer, pl_module):
        self.clock.now += BETWEEN


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = "kept"

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr("mi_at.callbacks.speed.time", SimpleNamespace(perf_counter=hand.perf_counter))
    return hand


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}], ids=["validation at the end", "and within"])
def test_only_the_steps_count(tmp_path: Path, clock: Clock, options: dict[str, int]) -> None:
    attack, kept = Attack(clock), Kept()
    callbacks = [Work(clock), Speed(attack, every_n_steps=2)]
    fits.fit(tmp_path, callbacks, epochs=2, train=5, loggers=[kept], examples=attack, options=options)
    # Readings after steps 2 and 4 of the first epoch, after its odd fifth, and so on.
    places = [1, 3, 4, 5, 7, 9]
    size = 6
    assert kept.of("speed/images_per_second") == [(place, size / (ATTACK + STEP)) for place in places]
    assert kept.of("speed/attack_share") == [(place, ATTACK / (ATTACK + STEP)) for place in places]


def test_the_clock_is_read_rarely(tmp_path: Path, clock: Clock) -> None:
    attack = Attack(clock)
    fits.fit(tmp_path, [Work(clock), Speed(attack, every_n_steps=50)], epochs=2, train=9, val=0, examples=attack)
    assert attack.asked == 1 + 2, "at the start, and at the end of each epoch"


def test_a_resumed_run_counts_its_own_steps(tmp_path: Path, clock: Clock) -> None:
    from mi_at.callbacks.checkpoints import Last

    attack, kept = Attack(clock), Kept()
    last = Last(tmp_path, every_n_steps=3)
    fits.fit(tmp_path, [Work(clock), last], epochs=1, train=4, val=0, options={"max_steps": 3}, examples=attack)
    again = Attack(clock)
    callbacks = [Work(clock), Speed(again, every_n_steps=2), Last(tmp_path)]
    fits.fit(tmp_path, callbacks, epochs=2, train=4, loggers=[kept], ckpt=last.path, examples=again)
    assert kept.of("speed/images_per_second")
    assert {value for _, value in kept.of("speed/images_per_second")} == {6 / (ATTACK + STEP)}


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0: expected 1 or more"):
        Speed(fits.attack(), every_n_steps=0)
