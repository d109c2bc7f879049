"""Optimisers and schedules: the rates they give, the paper's epochs in a run of another length, and their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from mi_at.optim import SGD, Adam, Optimisation


def rates(optimisation: Optimisation) -> list[float]:
    """Learning rate of every epoch."""
    optimizer = optimisation.optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = optimisation.scheduler(optimizer)
    found = []
    for _ in range(optimisation.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant() -> None:
    assert rates(SGD(lr=0.1, epochs=3, schedule="constant")) == [0.1, 0.1, 0.1]


def test_multistep_falls_after_its_finished_epochs() -> None:
    found = rates(SGD(lr=0.1, epochs=100, paper_epochs=100, milestones=[75, 90], gamma=0.1))
    assert found[:75] == [0.1] * 75
    assert found[75:90] == pytest.approx([0.01] * 15)
    assert found[90:] == pytest.approx([0.001] * 10)


def test_milestones_of_the_paper_in_a_short_run() -> None:
    """round(75 * 12 / 100) = 9, round(90 * 12 / 100) = 11."""
    found = rates(SGD(lr=0.1, epochs=12, paper_epochs=100, milestones=[75, 90]))
    assert found == pytest.approx([0.1] * 9 + [0.01] * 2 + [0.001])


def test_multistep_with_a_factor_for_each_milestone() -> None:
    """shared_info Table 3, MMA: .3, .09 after 75 epochs, .003 after 90."""
    found = rates(SGD(lr=0.3, epochs=120, milestones=[75, 90], gamma=[0.3, 1 / 30]))
    assert found == pytest.approx([0.3] * 75 + [0.09] * 15 + [0.003] * 30)
    short = rates(SGD(lr=0.3, epochs=12, paper_epochs=120, milestones=[75, 90], gamma=[0.3, 1 / 30]))
    assert short == pytest.approx([0.3] * 8 + [0.09] + [0.003] * 3)
    equal = [rates(SGD(lr=0.1, epochs=9, milestones=[3, 6], gamma=gamma)) for gamma in (0.1, [0.1, 0.1])]
    assert equal[0] == pytest.approx(equal[1])


@pytest.mark.parametrize(("schedule", "gamma"), [("multistep", [0.1]), ("step", [0.1, 0.1])])
def test_factors_that_no_milestone_has_are_refused(schedule: str, gamma: list[float]) -> None:
    with pytest.raises(ValueError, match=r"optim\.gamma=\[.*one for each of its 2 milestones"):
        SGD(lr=0.1, epochs=9, schedule=schedule, milestones=[3, 6], gamma=gamma)


def test_step() -> None:
    assert rates(SGD(lr=1.0, epochs=5, schedule="step", step_epochs=2, gamma=0.5)) == [1, 1, 0.5, 0.5, 0.25]


def test_cosine_ends_near_zero() -> None:
    found = rates(SGD(lr=0.2, epochs=10, schedule="cosine"))
    assert found == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)])


def test_one_cycle_rises_and_falls_within_the_run() -> None:
    found = rates(SGD(lr=0.2, epochs=20, schedule="one_cycle", pct_start=0.3))
    top = found.index(max(found))
    assert found[0] == pytest.approx(0.2 / 25)
    assert max(found) == pytest.approx(0.2, rel=0.05)
    assert top in (5, 6)
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize(
    ("epochs", "paper", "value", "expected"),
    [(100, 100, 75, 75), (12, 100, 75, 9), (12, 100, 1, 1), (12, 100, 0, 0), (3, 100, 5, 1), (50, None, 20, 20)],
)
def test_scaled(epochs: int, paper: int | None, value: int, expected: int) -> None:
    """At least 1 where the paper has at least 1: a warm-up does not vanish."""
    assert SGD(lr=1, epochs=epochs, paper_epochs=paper).scaled(value) == expected


def test_numbers_arrive_at_the_optimisers() -> None:
    weight = nn.Parameter(torch.zeros(1))
    sgd = SGD(lr=0.1, epochs=1, momentum=0.8, weight_decay=5e-4, nesterov=True).optimizer([weight])
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.8, 5e-4, True)
    adam = Adam(lr=1e-3, epochs=1, betas=[0.8, 0.99], weight_decay=0.1).optimizer([weight])
    assert isinstance(adam, torch.optim.Adam)
    group = adam.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.99), 0.1)


def test_the_base_is_no_optimiser() -> None:
    with pytest.raises(NotImplementedError, match=r"sgd.yaml or adam.yaml"):
        Optimisation(lr=0.1, epochs=1).optimizer([])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SGD, {"lr": 0}, "optim.lr=0: expected a positive number"),
        (SGD, {"lr": float("nan")}, "optim.lr=nan"),
        (SGD, {"lr": float("inf")}, "optim.lr=inf"),
        (SGD, {"weight_decay": -1e-4}, "optim.weight_decay=-0.0001: expected 0 or more"),
        (SGD, {"weight_decay": float("nan")}, "optim.weight_decay=nan"),
        (SGD, {"epochs": 0}, "optim.epochs=0: expected 1 or more"),
        (SGD, {"paper_epochs": 0}, "optim.paper_epochs=0: expected 1 or more"),
        (SGD, {"schedule": "linear"}, "optim.schedule='linear': expected one of constant, multistep, step, cosine"),
        (SGD, {"milestones": [90, 75]}, r"optim.milestones=\[90, 75\]: expected rising epochs"),
        (SGD, {"milestones": [0]}, r"optim.milestones=\[0\]: expected rising epochs, counted from 1"),
        (SGD, {"momentum": 1.0}, r"optim.momentum=1.0: expected a share in \[0, 1\)"),
        (SGD, {"momentum": 0.0, "nesterov": True}, "optim.nesterov=true: expected optim.momentum above 0"),
        (Adam, {"betas": [0.9]}, r"optim.betas=\[0.9\]: expected two shares in \[0, 1\)"),
        (Adam, {"betas": [0.9, 1.0]}, r"optim.betas=\[0.9, 1.0\]"),
        (Adam, {"lr": -1}, "optim.lr=-1"),
    ],
)
def test_values_out_of_range(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"lr": 0.1, "epochs": 10, **options})
