"""namid, its estimators and wmim on k processes are those on one: losses, gradients, and all that training moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.defenses.base import Defense
from mi_at.defenses.mi_estimators import MIEstimators
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.distributed import world_size
from mi_at.regularizers.base import Context, Regularizer
from mi_at.regularizers.namid import Namid
from mi_at.regularizers.wmim import Wmim
from tests.test_ddp import State, backward, batches, digits, examples, network, trainer_at, wrap

pytestmark = pytest.mark.ddp

CTX: Any = Context
CASES: dict[str, Callable[[], tuple[Defense, dict[str, Regularizer]]]] = {
    "standard_at+namid": lambda: (StandardAT(), {"namid": Namid(hsize=16, lambda_mi=0.3)}),
    "standard_at+namid of the reference": lambda: (StandardAT(), {"namid": Namid(hsize=16, selection="reference")}),
    "trades+namid": lambda: (Trades(beta=1.0), {"namid": Namid(hsize=16, lambda_term="paper")}),
    "standard_at+wmim": lambda: (StandardAT(), {"wmim": Wmim(hsize=16, lr=1e-3)}),
    "mi_estimators": lambda: (MIEstimators(hsize=16), {}),
    "mi_estimators, released": lambda: (MIEstimators(hsize=16, objective="released"), {}),
}


def attached(name: str, state: State, estimators: dict[str, Any]) -> Defense:
    torch.manual_seed(5)
    defense, terms = CASES[name]()
    defense.attach(network(state), regularizers=terms)
    for term in terms.values():
        if isinstance(term, Namid):
            term.take(estimators)
    defense.inspect_every = 0
    return defense.double().train()


def train(name: str, state: State, estimators: dict[str, Any]) -> dict[str, Any]:
    """A pass over uneven batches; estimators that are trained move, the network stays."""
    defense = attached(name, state, estimators)
    step, callback = wrap(defense), examples()
    own = torch.optim.Adam(defense.trained_parameters(), 1e-3) if isinstance(defense, MIEstimators) else None
    found = []
    for number, batch in batches(defense.net, digits().train_dataloader()):
        callback.on_train_batch_start(trainer_at(0), defense, batch, number)
        loss = backward(step, batch)
        gradients = {n: p.grad.clone() for n, p in defense.named_parameters() if p.grad is not None}
        readings = {n: v.double() for n, v in defense.readings().items()}
        found.append({"loss": loss, "gradients": gradients, "readings": readings})
        with torch.no_grad():
            for term in defense.added_terms().values():
                term.after_step(CTX, batch)
        if own is not None:
            own.step()
    state_after = {n: v.clone() for n, v in defense.state_dict().items() if isinstance(v, Tensor)}
    return {"steps": found, "state": state_after}


def everything(rank: int, processes: int, state: State, estimators: dict[str, Any]) -> dict[str, Any]:
    assert world_size() == processes
    return {name: train(name, state, estimators) for name in CASES}


@pytest.fixture(scope="module")
def weights() -> tuple[State, dict[str, Any]]:
    """A half-trained network, some of whose right answers an attack breaks, and estimators that saw a few batches."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = digits().train_dataloader()
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.x), batch.y).backward()
            optimizer.step()
    state = {name: value.double() for name, value in net.state_dict().items()}
    defense = attached("mi_estimators", state, {})
    adam = torch.optim.Adam(defense.trained_parameters(), 1e-3)
    for number, batch in batches(defense.net, loader):
        batch.views["adversarial"] = (batch.x + 0.15 * (torch.rand_like(batch.x) - 0.5).sign()).clamp(0, 1)
        adam.zero_grad()
        defense.training_step(batch, number).backward()
        adam.step()
    return state, {n: v.float() if isinstance(v, Tensor) else v for n, v in defense.state_dict().items()}


@pytest.fixture(scope="module")
def alone(weights: tuple[State, dict[str, Any]]) -> dict[str, Any]:
    return everything(0, 1, *weights)


_groups: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.slow), 3], ids=lambda k: f"{k} processes")
def group(request: pytest.FixtureRequest, spawn: Callable[..., Any], weights: tuple[State, dict[str, Any]]) -> Any:
    """The results of k processes by rank, computed once."""
    k = request.param
    if k not in _groups:
        _groups[k] = spawn(everything, k, *weights, timeout=600.0)
    return _groups[k]


def assert_same(value: State, expected: State) -> None:
    assert value.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(value[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_one_process(name: str, group: Any, alone: dict[str, Any]) -> None:
    expected = alone[name]
    for result in group:
        for found, step in zip(result[name]["steps"], expected["steps"], strict=True):
            assert_same({"loss": found["loss"]}, {"loss": step["loss"]})
            assert_same(found["gradients"], step["gradients"])
            assert_same(found["readings"], step["readings"])
        assert_same(result[name]["state"], expected["state"])


def test_the_cases_are_not_trivial(alone: dict[str, Any]) -> None:
    for name, result in alone.items():
        for step in result["steps"]:
            assert max(float(g.abs().max()) for g in step["gradients"].values()) > 1e-3
            for reading, value in step["readings"].items():
                if reading.endswith("selected"):
                    assert value >= 2, name
    moved = alone["standard_at+wmim"]["steps"][0]["gradients"]
    assert any("critic" in parameter for parameter in moved)
    assert not any("net." in parameter for parameter in alone["mi_estimators"]["steps"][0]["gradients"])
    assert not any("namid" in parameter for parameter in alone["trades+namid"]["steps"][0]["gradients"])
