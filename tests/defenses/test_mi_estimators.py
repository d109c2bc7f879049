"""The estimators' stage: transcription, gradients, what is trained and what is frozen, and what validation says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mi_at.defenses.mi_estimators import MIEstimators, estimators_loss
from mi_at.functional.selection import broken_by_attack
from mi_at.regularizers.base import Views
from tests.references import namid as ref
from tests.regularizers.test_namid import CLASSES, digits, estimates, labelled, network

OBJECTIVES = ("eq5", "eq4", "eq4_selected", "released")


def ours(values: list[Tensor], right: list[bool], broken: list[bool], objective: str) -> dict[str, Tensor]:
    n, n_adv, a, a_adv = values
    natural, adversarial = {"clean": n, "adversarial": n_adv}, {"clean": a, "adversarial": a_adv}
    flags = {"right": torch.tensor(right), "broken": torch.tensor(broken)}
    return estimators_loss(natural, adversarial, **flags, objective=objective)


RIGHT = [True, True, False, True, True, True, False, True]
BROKEN = [
    [True, False, False, True, True, False, False, False],
    [True, False, False, False, False, False, False, False],
    [False] * 8,
    RIGHT,
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_equals_the_transcription(objective: str, broken: list[bool], seed: int) -> None:
    values = estimates(8, seed, 2.0)
    found = ours(values, RIGHT, broken, objective)
    n, n_adv, a, a_adv = (v.tolist() for v in values)
    expected = ref.estimators_terms((n, n_adv), (a, a_adv), RIGHT, broken, objective=objective)
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, abs=1e-10)
    assert found["loss"].item() == pytest.approx(sum(expected.values()), abs=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])  # both sides of the hinges
def test_gradients(objective: str, sign: float) -> None:
    values = [v.abs().mul(sign).requires_grad_() for v in estimates(8, 1)]

    def loss(*v: Tensor) -> Tensor:
        return ours(list(v), RIGHT, BROKEN[0], objective)["loss"] + 0.0 * sum(x.sum() for x in v)

    assert gradcheck(loss, values)


def test_each_estimator_is_raised_on_its_own_view_and_lowered_on_the_other() -> None:
    values = [v.abs().add(0.1).requires_grad_() for v in estimates(3, 0)]
    loss = ours(values, [True] * 3, [True] * 3, "eq5")["loss"]
    signs = [torch.sign(g).tolist() for g in torch.autograd.grad(loss, values)]
    assert signs == [[-1.0] * 3, [1.0] * 3, [1.0] * 3, [-1.0] * 3]


def test_an_estimate_below_zero_is_not_driven_further_down() -> None:
    values = [v.abs().neg().requires_grad_() for v in estimates(3, 0)]
    loss = ours(values, [True] * 3, [True] * 3, "eq5")["loss"]
    n_adv, a_clean = torch.autograd.grad(loss, (values[1], values[2]))
    assert torch.equal(n_adv, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(a_clean, torch.zeros(3, dtype=torch.float64))


def test_a_batch_in_which_nothing_broke_moves_nothing() -> None:
    values = [v.requires_grad_() for v in estimates(4, 0)]
    loss = ours(values, [True] * 4, [False] * 4, "eq5")["loss"]
    assert loss.item() == 0.0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, values))


# ---------------------------------------------------------------- the defense
def attached(**options: Any) -> MIEstimators:
    torch.manual_seed(3)
    defense = MIEstimators(**{"hsize": 8, **options})
    defense.attach(network())
    defense.inspect_every = 0
    return defense


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_terms_are_those_of_the_critics_in_train_mode(objective: str) -> None:
    defense = attached(objective=objective).double().eval()
    data = digits(9)
    data.x, data.views["adversarial"] = data.x.double(), 1 - data.x.double()
    data = labelled(defense.net, data)
    found = defense.all_terms(Views(defense.net, data))
    x, adv = data.x, data.views["adversarial"]
    z, z_adv = defense.net(x), defense.net(adv)
    right = (z.argmax(dim=1) == data.y).tolist()
    broken = broken_by_attack(z, z_adv, data.y).tolist()
    pairs = []
    for critic, former in ((defense.natural, x), (defense.adversarial, adv - x)):
        pairs.append((critic(former, z).tolist(), critic(former, z_adv).tolist()))
    expected = ref.estimators_terms(pairs[0], pairs[1], right, broken, objective=objective)
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, abs=1e-8)
    assert defense.readings()["selected"].item() == sum(broken)
    assert defense.readings()["natural_clean"].item() == pytest.approx(
        sum(e for e, b in zip(pairs[0][0], broken, strict=True) if b) / sum(broken)
    )


def test_the_estimators_are_trained_and_the_reference_is_not() -> None:
    defense = attached()
    defense.train()
    assert not any(module.training for module in defense.net.modules())
    assert all(module.training for module in (*defense.natural.modules(), *defense.adversarial.modules()))
    before = {name: v.clone() for name, v in defense.net.state_dict().items()}
    data = labelled(defense.net, digits(20))
    loss = defense.training_step(data, 0)
    loss.backward()
    trained = defense.trained_parameters()
    assert {id(p) for p in trained} == {id(p) for p in defense.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained)
    assert not any(p.requires_grad for p in defense.net.parameters())
    assert all(torch.equal(v, before[name]) for name, v in defense.net.state_dict().items())


def test_training_lowers_the_loss_and_raises_the_natural_estimate() -> None:
    defense = attached()
    defense.train()
    data = labelled(defense.net, digits(24))
    adam = torch.optim.Adam(defense.trained_parameters(), 1e-2)
    found = []
    for step in range(40):
        adam.zero_grad()
        loss = defense.training_step(data, step)
        loss.backward()
        adam.step()
        found.append((loss.item(), defense.readings()["natural_clean"].item()))
    assert found[-1][0] < min(found[0][0], 0.0)
    assert found[-1][1] > max(found[0][1], 0.0)


def test_a_batch_of_one_gives_zero_and_reaches_every_parameter() -> None:
    defense = attached()
    defense.train()
    loss = defense.training_step(digits(1), 0)
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is not None for p in defense.trained_parameters())
    assert all(p.grad.abs().sum() == 0 for p in defense.trained_parameters() if p.grad is not None)


def test_validation_estimates_in_eval_mode() -> None:
    defense = attached()
    defense.train()
    for step in range(5):
        defense.training_step(digits(20, seed=step), step)
    defense.eval()
    data = digits(10)
    data.views |= {"cross_entropy": data.views["adversarial"], "margin": data.views["adversarial"]}
    statistics = {name: v.clone() for name, v in defense.named_buffers()}
    with torch.no_grad():
        defense.validation_step(data, 0)
        natural: Any = defense.natural
        expected = natural(data.x, defense.net(data.x)).mean()
    assert defense._estimates["natural"].compute().item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(v, statistics[name]) for name, v in defense.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "eq6"}, r"defense\.objective='eq6': expected one of eq5, eq4, eq4_selected, released"),
        ({"hsize": 0}, r"defense\.hsize=0: expected 1 or more"),
        ({"epochs": 0}, r"defense\.epochs=0: expected 1 or more"),
        ({"batch_size": 1}, r"defense\.batch_size=1: expected 2 or more"),
        ({"lr": 0.0}, r"defense\.lr=0\.0: expected a positive number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIEstimators(**options)


def test_a_network_of_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"defense\.mi_estimators: Linear does not say its num_classes"):
        MIEstimators().attach(torch.nn.Linear(2, CLASSES))
