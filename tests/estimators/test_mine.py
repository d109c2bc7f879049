"""MINE: known information, its own optimiser, what moves and what does not, and its state."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch.autograd import gradcheck

from mi_at.estimators.mine import Mine
from mi_at.estimators.own_optimizer import OwnAdam


def pairs(count: int, dim: int, rho: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal vectors, correlated dimension by dimension."""
    z, noise = torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed))
    return z, rho * z + math.sqrt(1 - rho**2) * noise


@pytest.fixture(scope="module")
def trained() -> Mine:
    torch.manual_seed(0)
    mine = Mine(2, hidden=64, lr=3e-3)
    for step in range(300):
        mine.fit_step(*pairs(256, 2, 0.8, step))
    return mine


def test_it_finds_the_information_of_correlated_gaussians(trained: Mine) -> None:
    z, z2 = pairs(8000, 2, 0.8, 1000)
    exact = -math.log(1 - 0.8**2)  # d = 2
    assert exact - 0.2 < trained.estimate(z, z2).item() < exact + 0.05
    assert trained.estimate(z, pairs(8000, 2, 0.8, 1001)[1]).item() < 0.05


def test_independent_variables_have_none() -> None:
    torch.manual_seed(0)
    mine = Mine(2, hidden=64, lr=3e-3)
    for step in range(100):
        mine.fit_step(pairs(256, 2, 0.0, step)[0], pairs(256, 2, 0.0, 500 + step)[0])
    assert abs(mine.estimate(pairs(8000, 2, 0.0, 1)[0], pairs(8000, 2, 0.0, 2)[0]).item()) < 0.05


def test_the_optimum_does_not_depend_on_names_for_the_values() -> None:
    """z' -> -2 z' + 1 is a bijection: the information stays, and a trained critic finds it again."""
    torch.manual_seed(0)
    mine = Mine(2, hidden=64, lr=3e-3)
    for step in range(300):
        z, z2 = pairs(256, 2, 0.8, step)
        mine.fit_step(z, 1 - 2 * z2)
    z, z2 = pairs(8000, 2, 0.8, 1000)
    assert mine.estimate(z, 1 - 2 * z2).item() == pytest.approx(-math.log(1 - 0.8**2), abs=0.25)


def test_a_step_raises_the_bound_on_its_batch() -> None:
    torch.manual_seed(0)
    mine, (z, z2) = Mine(3, hidden=32, lr=1e-3), pairs(64, 3, 0.9, 0)
    found = [mine.fit_step(z, z2).item() for _ in range(60)]
    assert found[-1] > found[0] + 0.05
    assert mine.adam.steps == 60


def test_the_loss_moves_z_and_not_the_critic() -> None:
    torch.manual_seed(0)
    mine = Mine(2, hidden=8)
    z, z2 = (v.requires_grad_() for v in pairs(5, 2, 0.5, 0))
    mine.estimate(z, z2).backward()
    for side in (z, z2):
        assert side.grad is not None
        assert side.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in mine.parameters())
    before = {name: p.clone() for name, p in mine.named_parameters()}
    with torch.no_grad():  # as in a hook after the step
        bound = mine.fit_step(z, z2)
    assert not bound.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in mine.parameters())
    same = {name for name, p in mine.named_parameters() if torch.equal(p, before[name])}
    assert same == {"critic.4.bias"}  # a shift of all scores changes no bound


def test_gradients() -> None:
    torch.manual_seed(0)
    mine = Mine(2, hidden=8).double()
    z, z2 = (v.double().requires_grad_() for v in pairs(5, 2, 0.5, 0))
    assert gradcheck(mine.estimate, (z, z2))


def test_the_bound_is_that_of_the_equation_over_one_cycle_of_strangers() -> None:
    torch.manual_seed(0)
    mine = Mine(1, hidden=8, seed=3).double()
    z, z2 = (v.double() for v in pairs(6, 1, 0.5, 0))
    seen: list[torch.Tensor] = []
    mine.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    value = mine.estimate(z, z2)
    joint, marginal = seen
    assert torch.equal(joint, torch.cat([z, z2], dim=1))
    assert torch.equal(marginal[:, :1], z)
    partner = [int((z2[:, 0] == v).nonzero()) for v in marginal[:, 1]]
    assert sorted(partner) == list(range(6))
    place, steps = partner[0], 1
    while place != 0:
        place, steps = partner[place], steps + 1
    assert steps == 6  # one cycle, so nobody is paired with himself
    scores = mine.critic(joint), mine.critic(marginal)
    expected = scores[0].mean() - scores[1].exp().mean().log()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def test_strangers_change_with_the_step_and_are_drawn_alike_everywhere() -> None:
    def mixed(steps: int, seed: int) -> list[float]:
        torch.manual_seed(0)
        mine = Mine(1, hidden=8, seed=seed)
        mine.adam.steps = steps
        torch.rand(17 * steps)  # torch's own random state does not matter
        return [mine.estimate(*pairs(32, 1, 0.5, 0)).item()]

    assert mixed(1, 0) == mixed(1, 0)
    assert len({*mixed(1, 0), *mixed(2, 0), *mixed(1, 1)}) == 3


def test_a_restored_critic_goes_on_as_the_first(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    mine = Mine(2, hidden=8, lr=1e-2)
    for step in range(5):
        mine.fit_step(*pairs(16, 2, 0.5, step))
    saved = io.BytesIO()
    torch.save(mine.state_dict(), saved)
    saved.seek(0)
    other = Mine(2, hidden=8, lr=1e-2)
    other.load_state_dict(torch.load(saved, weights_only=True))
    untouched = io.BytesIO()
    torch.save(other.state_dict(), untouched)  # saved once more before it makes a step
    untouched.seek(0)
    third = Mine(2, hidden=8, lr=1e-2)
    third.load_state_dict(torch.load(untouched, weights_only=True))
    for step in range(5, 8):
        found = {model.fit_step(*pairs(16, 2, 0.5, step)).item() for model in (mine, other, third)}
        assert len(found) == 1
    for name, value in mine.critic.state_dict().items():
        assert torch.equal(other.critic.state_dict()[name], value)
        assert torch.equal(third.critic.state_dict()[name], value)


def test_bad_input() -> None:
    mine = Mine(2)
    for z, z2 in ((torch.zeros(1, 2),) * 2, (torch.zeros(4, 3),) * 2, (torch.zeros(4, 2), torch.zeros(3, 2))):
        with pytest.raises(ValueError, match=r"expected two \[B, 2\] tensors with B of 2 or more"):
            mine.estimate(z, z2)
    with pytest.raises(ValueError, match="dim=0, hidden=512: expected 1 or more"):
        Mine(0)
    with pytest.raises(ValueError, match="lr=0: expected a positive number"):
        OwnAdam(mine.critic, lr=0)
