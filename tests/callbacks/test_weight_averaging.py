"""The average that is served: equal to one computed by hand, from the raw weights after every step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mi_at.callbacks.checkpoints import Best, Last
from mi_at.callbacks.weight_averaging import EMA, SWA, warming_average
from mi_at.data.digits import Digits
from mi_at.defenses.base import Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.optim import SGD
from tests.callbacks import fits

State = dict[str, Tensor]


class Net(nn.Module):
    """Batch norm, a mask and a counter: buffers of every kind."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, classes)
        self.register_buffer("mask", torch.tensor([True, True, False, True]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.mask: Tensor
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.norm(self.conv(x)).relu() * self.mask.view(1, -1, 1, 1)
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


class Raw(Callback):
    """The weights that are trained, after every step; and those that validation sees."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.validated: list[State] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.steps.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr, operator]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.validated.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr, operator]


EPOCHS, STEPS = 4, 3


def defense(classes: int = fits.CLASSES, **options: Any) -> Defense:
    torch.manual_seed(0)
    optimisation = SGD(lr=0.1, epochs=EPOCHS, schedule="constant", **options)
    return StandardAT().attach(Net(classes), optimisation=optimisation)


def fit(folder: Path, average: Callback, **options: Any) -> tuple[Raw, Defense]:
    raw, module = Raw(), options.pop("module", None) or defense()
    savers = [Best(folder), Last(folder, every_n_steps=2)]
    fits.fit(folder, [average, raw, *savers], epochs=EPOCHS, train=STEPS, val=1, defense=module, **options)
    return raw, module


def served(folder: Path, name: str) -> State:
    state = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


def assert_close(found: State, expected: State, *, exactly: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = name in exactly or not value.is_floating_point()
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exact else 1e-6, msg=name)


def ema_by_hand(steps: list[State], decay: float, start: int, *, warmup: bool = False) -> list[State]:
    """m_t = decay m_(t-1) + (1 - decay) w_t from the first step after the start, before it a copy; counters copied."""
    asked = decay
    averages: list[State] = []
    for number, state in enumerate(steps):
        if number <= start:
            averages.append(state)
            continue
        t = number - start
        decay = min(asked, (1 + t) / (10 + t)) if warmup else asked
        averages.append(
            {
                name: decay * averages[-1][name] + (1 - decay) * value if value.is_floating_point() else value
                for name, value in state.items()
            }
        )
    return averages


@pytest.mark.parametrize("start_epoch", [0, 2])
def test_ema(tmp_path: Path, start_epoch: int) -> None:
    raw, module = fit(tmp_path, EMA(decay=0.8, start_epoch=start_epoch))
    averages = ema_by_hand(raw.steps, 0.8, start_epoch * STEPS)
    assert len(averages) == EPOCHS * STEPS
    assert_close(served(tmp_path, "last"), averages[-1])
    # validation, and what it chooses, are of the average at the end of an epoch
    for epoch, seen in enumerate(raw.validated):
        assert_close(seen, averages[(epoch + 1) * STEPS - 1])
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert_close(served(tmp_path, "best"), averages[best["global_step"] - 1])
    # training went on from the raw weights, which are kept
    trained = {k.removeprefix("net."): v for k, v in best["current_model_state"].items() if k.startswith("net.")}
    assert_close(trained, raw.steps[best["global_step"] - 1])
    # after the fit the module holds what is served
    assert_close(module.net.state_dict(), averages[-1])


@pytest.mark.parametrize("start_epoch", [0, 2])
def test_ema_with_a_memory_that_grows(tmp_path: Path, start_epoch: int) -> None:
    """Over 11 steps (1 + t) / (10 + t) goes from 2 / 11 to 12 / 21, and passes 0.5 at the eighth."""
    raw, module = fit(tmp_path, EMA(decay=0.5, start_epoch=start_epoch, warmup=True))
    averages = ema_by_hand(raw.steps, 0.5, start_epoch * STEPS, warmup=True)
    assert_close(served(tmp_path, "last"), averages[-1])
    for epoch, seen in enumerate(raw.validated):
        assert_close(seen, averages[(epoch + 1) * STEPS - 1])
    assert_close(module.net.state_dict(), averages[-1])
    plain = ema_by_hand(raw.steps, 0.5, start_epoch * STEPS)[-1]
    assert any((plain[name] - averages[-1][name]).abs().max() > 1e-4 for name in plain if plain[name].ndim > 1)


@pytest.mark.parametrize(
    ("step", "decay"), [(1, 2 / 11), (8, 0.5), (10, 11 / 20), (11, 12 / 21), (12, 0.58), (99, 0.58)]
)
def test_the_memory_grows_to_tau(step: int, decay: float) -> None:
    for t in (step, torch.tensor(step)):
        found = warming_average(0.58, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), t)
        torch.testing.assert_close(found, torch.tensor([decay, 1 - decay]))
        assert found.dtype == torch.float32
        half = warming_average(0.58, torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16), t)
        assert half.dtype == torch.bfloat16


def test_ema_does_not_disturb_training(tmp_path: Path) -> None:
    plain = Raw()
    fits.fit(tmp_path / "plain", [plain], epochs=EPOCHS, train=STEPS, val=1, defense=defense())
    raw, _ = fit(tmp_path / "averaged", EMA(decay=0.8))
    for one, other in zip(raw.steps, plain.steps, strict=True):
        assert_close(one, other, exactly=tuple(one))


def test_an_average_without_batch_norm_is_the_mean_of_epochs(tmp_path: Path) -> None:
    module = fits.module(epochs=EPOCHS)
    raw, _ = fit(tmp_path, SWA(start_epoch=2), module=module)
    ends = raw.steps[STEPS - 1 :: STEPS]
    expected = {name: (ends[1][name] + ends[2][name] + ends[3][name]) / 3 for name in ends[0]}
    assert_close(served(tmp_path, "last"), expected)
    mean_of_two = {name: (ends[1][name] + ends[2][name]) / 2 for name in ends[0]}
    # a validation comes before its epoch is averaged in; until then the average is a copy
    for seen, at in zip(raw.validated, [ends[0], ends[1], ends[1], mean_of_two], strict=True):
        assert_close(seen, at)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert_close(served(tmp_path, "best"), raw.validated[best["epoch"]], exactly=tuple(ends[0]))


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_an_average_from_the_start_is_never_the_untrained_network(tmp_path: Path, start_epoch: int) -> None:
    raw, _ = fit(tmp_path, SWA(start_epoch=start_epoch), module=fits.module(epochs=EPOCHS))
    assert_close(raw.validated[0], raw.steps[STEPS - 1])
    ends = raw.steps[STEPS - 1 :: STEPS]
    assert_close(served(tmp_path, "last"), {n: torch.stack([end[n] for end in ends]).mean(dim=0) for n in ends[0]})


def test_the_start_is_scaled_to_the_run(tmp_path: Path) -> None:
    """75 of 100 epochs are 3 of 4."""
    torch.manual_seed(0)
    module = fits.module(epochs=EPOCHS)
    optimisation = SGD(lr=0.1, epochs=EPOCHS, paper_epochs=100, schedule="constant")
    raw, _ = fit(tmp_path, SWA(start_epoch=75), module=module.attach(module.net, optimisation=optimisation))
    ends = raw.steps[STEPS - 1 :: STEPS]
    assert_close(served(tmp_path, "last"), {name: (ends[2][name] + ends[3][name]) / 2 for name in ends[0]})


def test_batch_norm_statistics_of_an_average_are_measured_anew(tmp_path: Path) -> None:
    """Those of the averaged network on the training images: the mean over batches of what each batch has."""
    data = Digits(batch_size=30, train_size=90, val_size=20)
    raw, _ = fit(tmp_path, SWA(start_epoch=2), module=defense(10), data=data)
    ends = raw.steps[STEPS - 1 :: STEPS]
    found = served(tmp_path, "last")
    weights = [name for name, _ in Net(10).named_parameters()]
    for name in weights:
        torch.testing.assert_close(found[name], (ends[1][name] + ends[2][name] + ends[3][name]) / 3, rtol=0, atol=1e-6)
    conv = nn.Conv2d(1, 4, 3)
    conv.load_state_dict({"weight": found["conv.weight"], "bias": found["conv.bias"]})
    with torch.no_grad():
        outputs = [conv(batch.x).transpose(0, 1).flatten(1) for batch in data.train_batches()]
    mean = torch.stack([output.mean(dim=1) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.var(dim=1) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(found["norm.running_mean"], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["norm.running_var"], variance, rtol=0, atol=1e-6)
    assert not torch.allclose(found["norm.running_mean"], ends[-1]["norm.running_mean"], atol=1e-4)
    assert found["mask"].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(decay=1.0), r"callback.ema.decay=1.0: expected a factor in \[0, 1\)"),
        (lambda: EMA(decay=-0.1), "callback.ema.decay=-0.1"),
        (lambda: EMA(start_epoch=-1), "callback.ema.start_epoch=-1: expected 0 or more"),
        (lambda: SWA(start_epoch=-1), "callback.swa.start_epoch=-1: expected 0 or more"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
