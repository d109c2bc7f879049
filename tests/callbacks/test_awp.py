"""Adversarial weight perturbation against a transcription of its steps, and what it must leave alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from tests.callbacks import fits

LR, MOMENTUM, DECAY, GAMMA = 0.1, 0.9, 5e-4, 0.02
EPOCHS, STEPS = 3, 3


def defense(*, batch_norm: bool = False, paper_epochs: int | None = None, lr: float = LR) -> Defense:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=fits.CLASSES, in_channels=1, image_size=8, width=0.2, batch_norm=batch_norm)
    optimisation = SGD(
        lr=lr, momentum=MOMENTUM, weight_decay=DECAY, epochs=EPOCHS, paper_epochs=paper_epochs, schedule="constant"
    )
    return StandardAT().attach(net, optimisation=optimisation)


class Watch(Callback):
    """Weights and views as a step leaves them, and as it finds them after the perturbation."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.during: list[dict[str, Tensor]] = []
        self.views: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.during.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr, operator]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.after.append(copy.deepcopy(pl_module.net.state_dict()))  # type: ignore[union-attr, operator]
        self.views.append((batch.views["adversarial"].clone(), batch.y))


def fit(folder: Path, module: Defense, *callbacks: Callback, **options: Any) -> Watch:
    watch = Watch()
    fits.fit(folder, [*callbacks, watch], epochs=EPOCHS, train=STEPS, val=0, defense=module, **options)
    return watch


def test_every_step_is_that_of_the_paper(tmp_path: Path) -> None:
    """Uphill by gamma |w| g / |g| per matrix, gradient and SGD step there, then back: eq. 8-12, on the same views."""
    module = defense()
    net = copy.deepcopy(module.net)
    watch = fit(tmp_path, module, AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=0))
    velocity = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    for step, (x_adv, y) in enumerate(watch.views):
        weights = dict(net.named_parameters())
        gradients = torch.autograd.grad(F.cross_entropy(net(x_adv), y), list(weights.values()))
        moves = {}
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                if weight.ndim > 1:
                    moves[name] = GAMMA * weight.norm() * gradient / gradient.norm()
                    weight += moves[name]
        for name, value in watch.during[step].items():
            torch.testing.assert_close(value, net.state_dict()[name], rtol=0, atol=1e-6, msg=name)
        gradients = torch.autograd.grad(F.cross_entropy(net(x_adv), y), list(weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                velocity[name] = MOMENTUM * velocity[name] + gradient + DECAY * weight
                weight -= LR * velocity[name]
                if name in moves:
                    weight -= moves[name]
        for name, value in watch.after[step].items():
            torch.testing.assert_close(value, net.state_dict()[name], rtol=0, atol=2e-6, msg=name)


def test_the_perturbation_has_its_relative_size(tmp_path: Path) -> None:
    module = defense()
    start = copy.deepcopy(module.net.state_dict())
    watch = fit(tmp_path, module, AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=0))
    for name, before in start.items():
        moved = (watch.during[0][name] - before).norm() / before.norm().clamp_min(1e-12)
        assert moved.item() == pytest.approx(GAMMA if before.ndim > 1 else 0.0, rel=1e-3), name


def test_nothing_is_left_of_the_perturbation(tmp_path: Path) -> None:
    """With a vanishing learning rate the weights end where they began."""
    module = defense(lr=1e-12)
    start = copy.deepcopy(module.net.state_dict())
    fit(tmp_path, module, AdversarialWeightPerturbation(gamma=0.5, warmup_epochs=0))
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6, msg=name)
    assert module.undo_before_hooks == []


def test_its_forward_leaves_batch_norm_statistics_alone(tmp_path: Path) -> None:
    """A clean-up that is off by one forward would count a batch twice."""
    module = defense(batch_norm=True)
    watch = fit(tmp_path, module, AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=0))
    norms = [name for name in watch.after[0] if name.endswith("running_mean")]
    assert norms
    for step, during in enumerate(watch.during):
        before = watch.after[step - 1] if step else None
        for name in norms:
            if before is None:
                assert not during[name].any(), "as initialised"
            else:
                assert torch.equal(during[name], before[name])
    counters = [value for name, value in watch.after[-1].items() if name.endswith("num_batches_tracked")]
    assert all(int(counter) == EPOCHS * STEPS for counter in counters)
    assert all(part.track_running_stats for part in module.net.modules() if isinstance(part, nn.BatchNorm2d))


def test_the_warm_up_is_untouched_training(tmp_path: Path) -> None:
    """33 of 100 epochs are 1 of 3: bit for bit those without the callback, then not."""
    plain = fit(tmp_path / "a", defense(paper_epochs=100))
    awp = AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=33)
    warmed = fit(tmp_path / "b", defense(paper_epochs=100), awp)
    for step in range(EPOCHS * STEPS):
        same = all(torch.equal(value, plain.after[step][name]) for name, value in warmed.after[step].items())
        assert same == (step < STEPS)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    plain = fit(tmp_path / "a", defense())
    off = fit(tmp_path / "b", defense(), AdversarialWeightPerturbation(gamma=0.0, warmup_epochs=0))
    assert all(torch.equal(value, plain.after[-1][name]) for name, value in off.after[-1].items())


def test_the_gradients_of_the_step_are_those_of_the_step(tmp_path: Path) -> None:
    """Its own gradient does not accumulate into that of the optimiser: with gradients left over, steps would differ."""

    class Gradients(Callback):
        def __init__(self) -> None:
            self.before: list[bool] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            self.before.append(all(p.grad is None or not p.grad.any() for p in pl_module.parameters()))

    gradients = Gradients()
    fit(tmp_path, defense(), AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=0), gradients)
    assert gradients.before[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_any_precision(tmp_path: Path, precision: str) -> None:
    awp = AdversarialWeightPerturbation(gamma=GAMMA, warmup_epochs=0)
    watch = fit(tmp_path, defense(), awp, options={"precision": precision})
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in watch.after[-1].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, r"callback.awp.gamma=1.0: expected a share in \[0, 1\)"),
        ({"gamma": -0.1}, "callback.awp.gamma=-0.1"),
        ({"warmup_epochs": -1}, "callback.awp.warmup_epochs=-1: expected 0 or more"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialWeightPerturbation(**options)
