"""Robust NCMI on k processes is that on one: passes over the training set, joint attacks, losses, gradients, centroids.

Two epochs of real steps in float64 on batches that divide by neither 2 nor 3; one gloo group per k runs all cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.data.batch import Batch
from mi_at.data.digits import Digits
from mi_at.data.seeding import keyed_generator
from mi_at.defenses.base import Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.distributed import world_size
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.base import Context
from mi_at.regularizers.clean_ncmi import CleanNCMI
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from tests.test_ddp import Step, gradients, trainer_at

pytestmark = pytest.mark.ddp

SIZES, EPOCHS, EPS = [53, 53, 43], 2, 0.15
CASES: dict[str, Callable[[], tuple[Defense, NCMI]]] = {
    "standard_at+ncmi": lambda: (StandardAT(), NCMI(alpha=1.0, beta=2.0, tau_q=0.9)),
    "trades+ncmi": lambda: (
        Trades(beta=6.0),
        NCMI(
            alpha=2.0,
            beta=5.0,
            tau_q=0.9,
            tau_q_warmup=True,
            separation_grad="both",
            separation_norm="pairs",
            attack_separation_grad="detached",
            centroid_forward="loss",
        ),
    ),
    "trades+ncmi_relaxed": lambda: (Trades(beta=6.0), NCMIRelaxed(alpha=1.0, beta=2.0, batch_factor=1)),
    "standard_at+clean_ncmi": lambda: (StandardAT(), CleanNCMI(alpha=1.0, beta=2.0, tau_q=0.9, samples_per_class=2)),
}


def double(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, x=batch.x.double())


def train(name: str) -> list[dict[str, Any]]:
    """What is seen at the start, after every step and after every epoch."""
    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.5).double()
    defense, term = CASES[name]()
    defense.attach(net, regularizers={term.name: term})
    defense.inspect_every = 0
    data = Digits(batch_size=SIZES[0], train_size=sum(SIZES), val_size=60, seed=3)
    data.setup("fit")
    examples = AdversarialExamples(InnerMaximisation(norm="linf", eps=EPS, step_size=EPS / 2, steps=2), seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step: nn.Module = Step(defense)
    if world_size() > 1:
        step = nn.parallel.DistributedDataParallel(step)

    def context(epoch: int, steps: int = 0) -> Context:
        return Context(
            net=net,
            epoch=epoch,
            scaled=round,
            train_batches=lambda size, augment: double(
                data.train_batches(batch_size=size, augment=augment, epoch=epoch)
            ),
            draw_per_class=lambda n: next(
                double([data.draw_per_class(n, generator=keyed_generator(0, "draw", steps))])
            ),
            attack=examples.attack_of(defense, epoch),
        )

    term.on_fit_start(context(0))
    seen: list[dict[str, Any]] = [{"centroids": term.centroids.clone()}]
    for epoch in range(EPOCHS):
        for number, batch in enumerate(double(data.train_dataloader())):
            assert batch.global_size == SIZES[number]
            examples.on_train_batch_start(trainer_at(epoch), defense, batch, number)
            optimizer.zero_grad()
            loss = step(batch)
            loss.backward()
            found = gradients(defense)
            optimizer.step()
            with torch.no_grad():
                term.after_step(context(epoch, len(seen)), batch)
            seen.append(
                {
                    "loss": loss.detach() / world_size(),
                    "gradients": found,
                    "views": dict(batch.views),
                    "centroids": term.centroids.clone(),
                }
            )
        term.on_epoch_end(context(epoch + 1))
        seen.append({"centroids": term.centroids.clone()})
    return seen


def everything(rank: int, processes: int) -> dict[str, Any]:
    """All cases on this process."""
    assert world_size() == processes
    return {name: train(name) for name in CASES}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(0, 1)


_groups: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.slow), 3], ids=lambda k: f"{k} processes")
def group(request: pytest.FixtureRequest, spawn: Callable[..., Any]) -> Any:
    """The results of k processes by rank, computed once."""
    k = request.param
    if k not in _groups:
        _groups[k] = spawn(everything, k, timeout=600.0)
    return _groups[k]


def same(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name: str, group: Any, alone: dict[str, Any]) -> None:
    largest = 0.0
    for number, expected in enumerate(alone[name]):
        for result in group:
            found = result[name][number]
            same(found["centroids"], expected["centroids"])
            assert torch.equal(found["centroids"], group[0][name][number]["centroids"]), "the same on every process"
            if "loss" in expected:
                same(found["loss"], expected["loss"])
                assert found["gradients"].keys() == expected["gradients"].keys()
                for key, gradient in expected["gradients"].items():
                    same(found["gradients"][key], gradient)
                    largest = max(largest, float(gradient.abs().max()))
        if "views" in expected:
            assert ("cluster" in expected["views"]) == ("clean" not in name and (number > 4 or "relaxed" not in name))
            for view, images in expected["views"].items():
                whole = torch.cat([result[name][number]["views"][view] for result in group])
                same(whole, images)
                if number == 1:  # before the first update nothing is rounded differently
                    assert torch.equal(whole, images)
    assert largest > 1e-2
    assert (alone[name][-1]["centroids"] - alone[name][0]["centroids"]).abs().max() > 1e-3
