"""Training on k processes is training on one: views, losses, gradients, readings and metrics, and the real command.

Every process holds the whole loss and its own shard's part of the gradient (`mi_at.functional.distributed`). Batches
divide by neither 2 nor 3. One gloo group per k runs all cases.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mi_at import io
from mi_at.attacks.inner import Inner, InnerMaximisation, Objective
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.data.batch import Batch
from mi_at.data.digits import Digits
from mi_at.defenses.alp import Alp
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.mart import Mart
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.mma import MMA
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.distributed import gather, world_size
from mi_at.functional.information import joint_distribution, mutual_information
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.base import Regularizer, Views
from mi_at.regularizers.mi import MutualInformation
from tests.commands import command

pytestmark = pytest.mark.ddp

EPS = 0.15
TRAIN = [53, 53, 43]  # sizes of the global batches: uneven over 2 and over 3 processes
VAL = [20, 20, 21]
TOLERANCE = 1e-6


class Joint(Regularizer):
    """A term that reads a tap, and an attack whose objective is joint over the global batch."""

    taps = ("features",)

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        with torch.no_grad():
            clean = gather(net(batch.x).double().softmax(dim=1), batch.global_size)

        def objective(x: Tensor) -> Tensor:
            probabilities = gather(net(x).double().softmax(dim=1), batch.global_size)
            return -mutual_information(joint_distribution(clean, probabilities))

        return {"cluster": Inner(objective, init="uniform")}

    def terms(self, views: Views) -> dict[str, Tensor]:
        clean, cluster = views.tap("clean", "features"), views.tap("cluster", "features")
        correlation = (clean - clean.mean(dim=0)) * (cluster - cluster.mean(dim=0))
        return {"correlation": -0.01 * correlation.mean(dim=0).square().sum().sqrt()}


CASES: dict[str, Callable[[], tuple[Defense, dict[str, Regularizer]]]] = {
    "ce": lambda: (CE(), {}),
    "standard_at": lambda: (StandardAT(), {}),
    "trades": lambda: (Trades(beta=6.0), {}),
    "mart": lambda: (Mart(beta=5.0), {}),
    "alp": lambda: (Alp(alpha=0.5), {}),
    "mma_simplified": lambda: (MMA(), {}),
    "mma_full": lambda: (MMA(variant="full", max_margin=0.3, min_margin=0.05), {}),
    "mimae": lambda: (Mimae(lambda_mi=0.4, beta=1.0), {}),
    "standard_at+mi": lambda: (StandardAT(), {"mi": MutualInformation(lambda_mi=0.4)}),
    "standard_at+joint": lambda: (StandardAT(), {"joint": Joint()}),
}


class Step(nn.Module):
    """What is wrapped for several processes, as Lightning does: its forward is the training step."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, batch: Batch) -> Tensor:
        return self.defense.training_step(batch, batch.batch_idx)


def network() -> CNNTiny:
    return CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.5)


def digits() -> Digits:
    data = Digits(batch_size=TRAIN[0], train_size=sum(TRAIN), val_size=sum(VAL), eval_batch_size=VAL[0], seed=3)
    data.setup("fit")
    return data


def examples() -> AdversarialExamples:
    return AdversarialExamples(InnerMaximisation(norm="linf", eps=EPS, step_size=EPS / 4, steps=5), seed=1)


def trainer_at(epoch: int) -> Any:
    """What the callbacks read of a Trainer."""
    return SimpleNamespace(
        current_epoch=epoch,
        num_training_batches=len(TRAIN),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )


def attached(name: str, weights: dict[str, Tensor]) -> Defense:
    defense, regularizers = CASES[name]()
    net = network()
    net.load_state_dict(weights)
    defense.inspect_every = 0
    return defense.attach(net, regularizers=regularizers)


def wrap(defense: Defense) -> nn.Module:
    step = Step(defense)
    return DistributedDataParallel(step) if world_size() > 1 else step


def gradients(defense: Defense) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in defense.net.named_parameters() if p.grad is not None}


def backward(step: nn.Module, batch: Batch) -> Tensor:
    """The loss of the global batch; gradients are those of the whole afterwards."""
    step.zero_grad(set_to_none=True)
    loss = step(batch)
    loss.backward()
    return loss.detach() / world_size()


def train(name: str, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Two passes over the batches at fixed weights."""
    defense = attached(name, weights)
    step, callback, loader = wrap(defense), examples(), digits().train_dataloader()
    results = []
    for epoch in range(2):
        for number, batch in enumerate(loader):
            assert batch.global_size == TRAIN[number]
            callback.on_train_batch_start(trainer_at(epoch), defense, batch, number)
            loss = backward(step, batch)
            shares = defense.term_shares(defense.all_terms(Views(defense.net, batch, defense.needed_taps)))
            results.append(
                {"loss": loss, "gradients": gradients(defense), "views": dict(batch.views), "shares": shares}
            )
    train_accuracy = {key: metric.compute() for key, metric in defense._accuracy.items() if metric.update_count}
    results.append({"accuracy": train_accuracy, "margins": getattr(defense, "margins", torch.empty(0))})
    return results


def perturb(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A batch under adversarial weight perturbation: where it moves the weights, the gradient there, and the way back."""
    defense = attached("trades", weights)
    step, callback, awp = wrap(defense), examples(), AdversarialWeightPerturbation(gamma=0.01, warmup_epochs=0)
    batch = next(iter(digits().train_dataloader()))
    callback.on_train_batch_start(trainer_at(0), defense, batch, 0)
    awp.on_train_batch_start(trainer_at(0), defense, batch, 0)
    moved = {name: p.detach().clone() for name, p in defense.net.named_parameters()}
    loss = backward(step, batch)
    while defense.undo_before_hooks:
        defense.undo_before_hooks.pop()()
    restored = {name: p.detach().clone() for name, p in defense.net.named_parameters()}
    return {"weights": moved, "loss": loss, "gradients": gradients(defense), "restored": restored}


def validate(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies of a validation, and its views."""
    defense, callback, views = attached("standard_at", weights), examples(), []
    for number, batch in enumerate(digits().val_dataloader()):
        callback.on_validation_batch_start(trainer_at(0), defense, batch, number)
        views.append(dict(batch.views))
        with torch.no_grad():
            defense.validation_step(batch, number)
    return {"views": views, "accuracy": {name: metric.compute() for name, metric in defense._selection.items()}}


def everything(rank: int, processes: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """All cases on this process."""
    assert world_size() == processes
    results: dict[str, Any] = {name: train(name, weights) for name in CASES}
    return results | {"awp": perturb(weights), "validation": validate(weights)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A network half trained, so that right and wrong samples, and terms far from zero, occur."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = digits().train_dataloader()
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.x), batch.y).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def alone(weights: dict[str, Tensor]) -> dict[str, Any]:
    return everything(0, 1, weights)


_groups: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=[2, 3], ids=lambda k: f"{k} processes")
def group(request: pytest.FixtureRequest, spawn: Callable[..., Any], weights: dict[str, Tensor]) -> Any:
    """The results of k processes by rank, computed once."""
    k = request.param
    if k not in _groups:
        _groups[k] = spawn(everything, k, weights)
    return _groups[k]
