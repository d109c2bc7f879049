"""FWA: the transcription, the linear program's optimum, mass, cost, capacity, the gap, and the contract."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.fwa import FWA, Transport, fwa
from mi_at.evaluation.outcomes import out_of_reach, radius
from tests.evaluation.nets import small_conv
from tests.references import wasserstein

DTYPE = torch.float64


def drawn(*shape: int, high: float = 1.0, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    return high * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(weight: Tensor):
    return lambda x: (x * weight).flatten(1).sum(1)


def bent(weight: Tensor):
    """Concave, with an optimum that is no vertex."""
    return lambda x: -(x - weight).square().flatten(1).sum(1)


def optimum(x: Tensor, weight: Tensor, eps: float, kernel: int, capacity: bool) -> float:
    """max sum_ij w_j Pi_ij over the plans of one [C, H, W] image, by scipy."""
    channels, height, width = x.shape
    pixels = [(c, i, j) for c in range(channels) for i in range(height) for j in range(width)]
    pairs = [(a, b) for a in pixels for b in wasserstein.reachable(a, height, width, kernel)]
    rows = np.array([[float(a == p) for a, _ in pairs] for p in pixels])
    arrivals = np.array([[float(b == p) for _, b in pairs] for p in pixels])
    costs = np.array([[wasserstein.distance(a, b) for a, b in pairs]])
    bounds = [eps * float(x.sum())] + ([1.0] * len(pixels) if capacity else [])
    limits = np.concatenate([costs, arrivals]) if capacity else costs
    gains = [-float(weight[b]) for _, b in pairs]
    found = linprog(gains, A_ub=limits, b_ub=bounds, A_eq=rows, b_eq=[float(x[p]) for p in pixels])
    assert found.success
    return -found.fun


def least_cost(x: Tensor, x_adv: Tensor) -> float:
    """The Wasserstein distance of two [C, H, W] images of equal mass per channel, by scipy."""
    height, width = x.shape[1:]
    total = 0.0
    for c in range(len(x)):
        pixels = [(c, i, j) for i in range(height) for j in range(width)]
        pairs = [(a, b) for a in pixels for b in pixels]
        equal = np.array([[float(a == p) for a, _ in pairs] for p in pixels])
        equal = np.concatenate([equal, np.array([[float(b == p) for _, b in pairs] for p in pixels])])
        same = float(x[c].sum() / x_adv[c].sum())  # up to rounding, which scipy would not forgive
        sides = [float(x[p]) for p in pixels] + [float(x_adv[p]) * same for p in pixels]
        total += linprog([wasserstein.distance(a, b) for a, b in pairs], A_eq=equal, b_eq=sides).fun
    return total


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("high", [0.2, 1.0])
def test_equals_the_transcription(kernel: int, high: float) -> None:
    x, target = drawn(1, 2, 3, 4, high=high), drawn(1, 2, 3, 4, seed=1, high=3.0)

    def gradient(image: list) -> list:
        return (-2 * (torch.tensor(image, dtype=DTYPE) - target[0])).tolist()

    for steps in (1, 2, 5):
        options = {"eps": 0.4, "kernel": kernel, "gamma": 0.05, "steps": steps, "bisection": 60}
        expected = wasserstein.frank_wolfe(gradient, x[0].tolist(), **options)
        ours = fwa(bent(target), x, overflow="none", **options)
        torch.testing.assert_close(ours[0], torch.tensor(expected, dtype=DTYPE), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("eps", [0.02, 0.3, 1.0])
def test_one_step_solves_the_linear_problem(kernel: int, eps: float) -> None:
    """Within gamma ln K of the optimum of scipy's linear program: 1 % of what can be gained."""
    x, weight = drawn(4, 1, 3, 3, high=0.1), drawn(4, 1, 3, 3, seed=1) - 0.5
    objective = linear(weight)
    for steps in (1, 7):
        x_adv = fwa(objective, x, eps=eps, steps=steps, kernel=kernel, gamma=2e-4, bisection=30)
        for i in range(len(x)):
            best = optimum(x[i], weight[i], eps, kernel, capacity=False) - float(objective(x)[i])
            gained = float(objective(x_adv)[i] - objective(x)[i])
            assert 0.99 * best <= gained <= best * (1 + 1e-9)


def test_a_budget_that_buys_everything_is_not_spent() -> None:
    """At lambda 0 each pixel's mass goes where the gradient is largest in its window."""
    x = drawn(1, 1, 3, 3, high=0.1)
    weight = torch.zeros(1, 1, 3, 3, dtype=DTYPE)
    weight[0, 0, 1, 1] = 1.0
    x_adv = fwa(linear(weight), x, eps=9.0, steps=1, kernel=3, gamma=1e-3)
    assert float(x_adv[0, 0, 1, 1]) == pytest.approx(float(x.sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [4, 5])
@pytest.mark.parametrize("overflow", ["none", "capacity"])
def test_mass_is_kept_and_the_budget_too(dtype: torch.dtype, kernel: int, overflow: str) -> None:
    """Mass to 1e-5 of it; cost by scipy's transport problem between the two images, at most the budget."""
    net = small_conv(classes=4, side=4).to(dtype)
    x, y = drawn(5, 1, 4, 4, dtype=dtype).round(decimals=1), torch.arange(5) % 4
    for eps in (0.01, 0.2, 0.8):
        x_adv = fwa(objectives.cross_entropy(net, y), x, eps=eps, steps=20, kernel=kernel, overflow=overflow)
        mass = x.flatten(1).sum(1)
        assert ((x_adv.flatten(1).sum(1) - mass).abs() <= 1e-5 * mass).all()
        assert (x_adv >= 0).all()
        for i in range(len(x)):
            assert least_cost(x[i].double(), x_adv[i].double()) <= eps * float(mass[i]) * (1 + 1e-5)
        if overflow == "capacity":
            assert float(x_adv.max()) <= 1 + 1e-5


def test_the_budget_is_spent() -> None:
    """A cost far below the budget would be a weak attack: on a linear objective nearly all of it goes."""
    x, weight = drawn(3, 2, 6, 6, high=0.2), drawn(3, 2, 6, 6, seed=1)
    transport = Transport(x, kernel=5)
    for eps in (0.01, 0.1, 0.5):
        plan = transport.best(weight, eps=eps, gamma=1e-3, bisection=20)
        spent = transport.cost(plan) / (eps * transport.mass)
        assert (spent <= 1).all()
        assert (spent >= 0.99).all()


def test_one_budget_covers_all_channels() -> None:
    """A channel in which moving pays more gets more than its own share."""
    x = torch.full((1, 2, 3, 3), 0.1, dtype=DTYPE)
    weight = drawn(1, 2, 3, 3)
    weight[:, 1] *= 10
    transport = Transport(x, kernel=3)
    plan = transport.best(weight, eps=0.3, gamma=1e-3, bisection=30)
    spent = (plan * transport.distance).sum(dim=(2, 3))[0]
    assert float(spent[1]) > 0.95 * float(spent.sum())


def test_capacity_against_the_optimum_under_it() -> None:
    """Every pixel at most 1, against scipy with that constraint; a relaxation: 87 to 100 % of the gain."""
    x, weight = drawn(6, 1, 3, 3), drawn(6, 1, 3, 3, seed=1) - 0.5
    objective = linear(weight)
    for eps in (0.1, 0.5):
        x_adv = fwa(objective, x, eps=eps, steps=40, kernel=3, overflow="capacity")
        for i in range(len(x)):
            best = optimum(x[i], weight[i], eps, 3, capacity=True) - float(objective(x)[i])
            gained = float(objective(x_adv)[i] - objective(x)[i])
            assert gained <= best * (1 + 1e-6)
            assert gained >= 0.8 * best


def test_capacity_where_every_pixel_is_full() -> None:
    x = torch.ones(2, 1, 3, 3)
    x_adv = fwa(linear(drawn(2, 1, 3, 3).float()), x, eps=0.5, steps=5, overflow="capacity")
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-5)


def test_a_plan_that_cannot_give_back_enough_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last resort alone: no round of giving back."""
    monkeypatch.setattr("mi_at.attacks.fwa._ROUNDS", 0)
    x = drawn(4, 1, 3, 3, high=0.9)
    x_adv = fwa(linear(drawn(4, 1, 3, 3, seed=1)), x, eps=0.5, steps=3, overflow="capacity")
    assert float(x_adv.max()) <= 1 + 1e-9
    torch.testing.assert_close(x_adv.flatten(1).sum(1), x.flatten(1).sum(1))
    assert not torch.equal(x_adv, x)


def test_clipping_is_the_plain_image_clamped() -> None:
    x, weight = drawn(3, 1, 4, 4), drawn(3, 1, 4, 4, seed=1)
    plain = fwa(linear(weight), x, eps=0.5, steps=5, overflow="none")
    assert float(plain.max()) > 1
    assert torch.equal(fwa(linear(weight), x, eps=0.5, steps=5, overflow="clip"), plain.clamp(0, 1))


def test_pixels_at_zero_and_one_count() -> None:
    """torch's gradient of a clamp vanishes at both ends; the network's must not."""
    x = torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=DTYPE)
    for toward in (1.0, 0.0):  # at 0 only the full pixel says that mass should leave it
        weight = torch.tensor([[[[-1.0, toward, 0.0]]]], dtype=DTYPE)
        x_adv = fwa(linear(weight), x, eps=0.25, steps=1, gamma=1e-3, bisection=30)
        torch.testing.assert_close(x_adv, torch.tensor([[[[0.75, 0.25, 0.0]]]], dtype=DTYPE), rtol=0, atol=1e-3)


def test_the_gap_falls() -> None:
    """max <g, x* - x> over the ball: an upper bound of what a concave objective can still gain."""
    x, target = drawn(3, 1, 5, 5, high=0.3), drawn(3, 1, 5, 5, seed=1, high=0.3)
    transport = Transport(x, kernel=5)
    gaps = []
    for steps in (1, 4, 16, 64):
        x_adv = fwa(bent(target), x, eps=0.3, steps=steps, overflow="none", gamma=1e-4)
        gradient = -2 * (x_adv - target)
        best = transport.images(transport.best(gradient, eps=0.3, gamma=1e-4, bisection=30))
        gaps.append((gradient * (best - x_adv)).flatten(1).sum(1))
    for before, after in itertools.pairwise(gaps):
        assert (after < 0.6 * before).all()


def test_a_deceptive_gradient() -> None:
    """Where there is none the image stays, without NaN; its size does not matter."""
    x, weight = drawn(2, 1, 3, 3, high=0.2), drawn(1, 1, 3, 3, seed=1)
    x_adv = fwa(lambda z: linear(weight)(z) * torch.tensor([0.0, 1.0], dtype=DTYPE), x, eps=0.2, steps=3)
    torch.testing.assert_close(x_adv[0], x[0], rtol=0, atol=1e-15)
    assert float((x_adv[1] - x[1]).abs().max()) > 0.01
    tiny = fwa(lambda z: 1e-30 * linear(weight)(z), x, eps=0.2, steps=3)
    torch.testing.assert_close(tiny[1], x_adv[1], rtol=0, atol=1e-9)


def test_samples_do_not_see_each_other() -> None:
    net = small_conv(classes=4, side=4).double()
    x, y = drawn(6, 1, 4, 4), torch.arange(6) % 4
    attack = FWA(eps=0.3, steps=6)
    ids = torch.arange(6)
    whole = attack(net, x, y, ids=ids, seed=0)
    for i in range(6):
        s = slice(i, i + 1)
        torch.testing.assert_close(attack(net, x[s], y[s], ids=ids[s], seed=7), whole[s], rtol=0, atol=1e-9)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_nothing_of_the_callers_is_touched(outside) -> None:
    net = small_conv(classes=4, side=4)
    x, y = drawn(3, 1, 4, 4, dtype=torch.float32), torch.arange(3)
    before, state = x.clone(), torch.get_rng_state()
    expected = fwa(objectives.cross_entropy(net, y), x, eps=0.2, steps=2)
    with outside():
        x_adv = fwa(objectives.cross_entropy(net, y), x.clone(), eps=0.2, steps=2)
    assert torch.equal(x_adv, expected)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not x_adv.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_nothing_to_do() -> None:
    x = drawn(2, 1, 3, 3)
    for options in ({"eps": 0.0, "steps": 3}, {"eps": 0.3, "steps": 0}, {"eps": 0.3, "steps": 2, "kernel": 1}):
        torch.testing.assert_close(fwa(linear(drawn(1, 1, 3, 3)), x, **options), x, rtol=0, atol=1e-15)
    assert fwa(linear(drawn(1, 1, 3, 3)), x[:0], eps=0.3, steps=2).shape == (0, 1, 3, 3)
    black = torch.zeros(1, 1, 3, 3)
    assert torch.equal(fwa(linear(drawn(1, 1, 3, 3).float()), black, eps=0.3, steps=2), black)


def test_what_the_record_says() -> None:
    """The budget is no radius: neither a check of the ball nor a union of attacks takes it."""
    attack = FWA(eps="1/200", steps=40, kernel=4, overflow="capacity")
    said = attack.describe()
    assert said["budget"] == 0.005
    assert said["norm"] == "wasserstein"
    assert radius(said) is None
    assert not out_of_reach(said)
    assert {"steps": 40, "kernel": 4, "overflow": "capacity", "gamma": 1e-3, "objective": "cross_entropy"}.items() <= (
        said.items()
    )
    x = drawn(2, 1, 4, 4, dtype=torch.float32)
    net = small_conv(classes=4, side=4)
    y = torch.tensor([0, 1])
    for overflow in ("clip", "capacity"):
        options = {"eps": 0.5, "steps": 5, "kernel": 4, "overflow": overflow}
        returned = FWA(**options)(net, x, y, ids=y, seed=0)
        assert torch.equal(returned, fwa(objectives.cross_entropy(net, y), x, **options))
        assert float(returned.max()) <= 1
    with pytest.raises(ValueError, match=r"attack\.overflow='none': .* use clip"):
        FWA(eps=0.005, steps=40, overflow="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "attack.eps=-0.1: expected a budget of 0 or more"),
        ({"eps": math.inf}, "attack.eps=inf"),
        ({"steps": -1}, "attack.steps=-1"),
        ({"kernel": 0}, "attack.kernel=0"),
        ({"gamma": 0.0}, "attack.gamma=0.0"),
        ({"bisection": 0}, "attack.bisection=0"),
        ({"overflow": "wrap"}, "attack.overflow='wrap': expected one of clip, capacity, none"),
        ({"objective": "kl"}, "objective='kl': expected one of"),
        ({"kappa": -1.0}, "kappa=-1.0"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    settings = {"eps": 0.1, "steps": 2} | options
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        FWA(**settings)
    if "objective" not in options and "kappa" not in options:
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            fwa(linear(drawn(1, 1, 3, 3)), drawn(1, 1, 3, 3), **settings)


def test_images_must_be_images() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 9\]: expected images \[B, C, H, W\]"):
        fwa(nn.Flatten(), drawn(2, 9), eps=0.1, steps=1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        fwa(nn.Flatten(), drawn(2, 1, 3, 3) + 1, eps=0.1, steps=1)
