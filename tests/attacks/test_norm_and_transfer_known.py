"""C&W l2, DDN, FAB, NI-FGSM and TI-DIM where the answer is known: linear and piecewise-linear models.

Not reached as published, and the option that reaches it: on several classes whose boundaries lie at other slopes
an attack may end at a boundary that is not the nearest one (test_nearest.py). Where the nearest class is that of the
largest logit all of them must be within 5 %.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.cw_l2 import cw_l2
from mi_at.attacks.ddn import ddn
from mi_at.attacks.fab import fab
from mi_at.attacks.ni_fgsm import ni_fgsm
from mi_at.attacks.ti_dim import gaussian_kernel, smooth, ti_dim

DTYPE = torch.float64
DIM = 12
Net = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor) -> Net:
    return lambda x: x.flatten(1) @ weight.to(x.dtype).T + bias.to(x.dtype)


def two_classes(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, DIM, generator=g, dtype=DTYPE), torch.zeros(2, dtype=DTYPE)


def five_classes(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthogonal weights of one length: all boundaries have the same slope. Large, so that a softmax is sharp."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=DTYPE))[0][:5]
    return 20 * rows, torch.zeros(5, dtype=DTYPE)


def images(low: float, high: float, batch: int = 24, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(batch, 1, 3, 4, generator=g, dtype=DTYPE)


def true_distance(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Per sample the distance within [0, 1] to the nearest other class, by bisection over the multiplier.

    The nearest point of a half-space in a box is clip(t w) under l2, clip(t sign w) under linf.
    """
    best = torch.full((len(x),), torch.inf, dtype=DTYPE)
    flat = x.flatten(1)
    for k in range(len(weight)):
        w = weight[k] - weight[y]
        needed = -((w * flat).sum(1) + bias[k] - bias[y])
        direction = w if norm == "l2" else w.sign()

        def moved(t: Tensor, direction: Tensor = direction) -> Tensor:
            return torch.minimum(torch.maximum(t[:, None] * direction, -flat), 1 - flat)

        low, high = torch.zeros(len(x), dtype=DTYPE), torch.full((len(x),), 1e4, dtype=DTYPE)
        reachable = ((w * moved(high)).sum(1) >= needed) & (y != k)
        for _ in range(100):
            middle = (low + high) / 2
            enough = (w * moved(middle)).sum(1) >= needed
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        delta = moved(high)
        distance = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
        best = torch.where(reachable, torch.minimum(best, distance), best)
    return best


# The lengths of C&W's steps, lr, must be small beside the distance: with lr .01 it is off by more than 5 % below .05.
L2_ATTACKS = {
    "cw_l2": lambda net, x, y: cw_l2(net, x, y, c=1.0, steps=200, lr=0.02, binary_search=8),
    "ddn": lambda net, x, y: ddn(net, x, y, steps=300),
    "fab": lambda net, x, y: fab(net, x, y, norm="l2", steps=50),
    "fab_t": lambda net, x, y: fab(net, x, y, norm="l2", steps=50, targets=9),
}
LINF_ATTACKS = {
    "fab": lambda net, x, y: fab(net, x, y, norm="linf", steps=50),
    "fab_t": lambda net, x, y: fab(net, x, y, norm="linf", steps=50, targets=9),
}
ATTACKS = [("l2", name, attack) for name, attack in L2_ATTACKS.items()]
ATTACKS += [("linf", name, attack) for name, attack in LINF_ATTACKS.items()]


def assert_reached(net: Net, x_adv: Tensor, x: Tensor, y: Tensor, distance: Tensor, norm: str = "l2") -> None:
    assert (net(x_adv).argmax(1) != y).all()
    delta = (x_adv - x).flatten(1)
    ratio = (delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)) / distance
    assert float(ratio.max()) <= 1.05
    assert float(ratio.min()) >= 1 - 1e-5, "nearer than the truth: the truth is wrong"


@pytest.mark.parametrize(("norm", "name", "attack"), ATTACKS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize(
    # In a corner of the box the class of the largest logit need not be the nearest: two classes only.
    ("classes", "box"),
    [(two_classes, False), (five_classes, False), (two_classes, True)],
    ids=["two", "five", "two-in-a-corner"],
)
def test_minimum_norm_attacks_reach_the_true_distance_of_a_linear_model(norm, name, attack, classes, box):
    weight, bias = classes()
    x = images(0.3, 0.7)
    if box:  # two thirds of the pixels at 0 or 1, half of which cannot move the way they should
        x[:, :, :2] = x[:, :, :2].round()
    net = linear(weight, bias)
    y = net(x).argmax(1)
    distance = true_distance(weight, bias, x, y, norm)
    keep = (distance > 0.07) & distance.isfinite()
    x, y, distance = x[keep], y[keep], distance[keep]
    assert len(x) >= 10
    if box:
        free = true_distance(weight, bias, x * 0 + 0.5, y, norm)  # bound pixels matter: not the distance of a plane
        plane = (net(x).amax(1) - net(x).amin(1)) / (weight[0] - weight[1]).norm(p=2 if norm == "l2" else 1)
        assert free.isfinite().all()
        assert float((distance / plane).max()) > 1.1
    assert_reached(net, attack(net, x, y), x, y, distance, norm)


@pytest.mark.parametrize("name", L2_ATTACKS)
def test_minimum_norm_attacks_on_piecewise_linear_models(name):
    """A fold |a u| >= r, and a corner min(a u - r, b u - s) >= 0 with a and b orthogonal, u = x - .5; from ReLUs."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, DIM, generator=g, dtype=DTYPE)
    b = b - (a @ b) / (a @ a) * a
    x = images(0.35, 0.65, batch=10)
    u, y = x.flatten(1) - 0.5, torch.zeros(10, dtype=torch.int64)

    def fold(z: Tensor) -> Tensor:
        along = (z.flatten(1) - 0.5) @ a.to(z.dtype)
        score = along.relu() + (-along).relu() - 1.2
        return torch.stack([torch.zeros_like(score), score], 1)

    def corner(z: Tensor) -> Tensor:
        first, second = ((z.flatten(1) - 0.5) @ v.to(z.dtype) - r for v, r in ((a, 0.8), (b, 0.7)))
        score = first - (first - second).relu()
        return torch.stack([torch.zeros_like(score), score], 1)

    to_fold = (1.2 - (u @ a).abs()) / a.norm()
    sides = [((r - u @ v) / v.norm()).clamp_min(0) for v, r in ((a, 0.8), (b, 0.7))]
    to_corner = (sides[0].square() + sides[1].square()).sqrt()
    assert float(torch.minimum(*sides).max()) > 0, "some must cross both planes"
    attack = L2_ATTACKS[name]
    assert_reached(fold, attack(fold, x, y), x, y, to_fold)
    assert_reached(corner, attack(corner, x, y), x, y, to_corner)


def test_a_fixed_c_may_be_worth_less_than_its_distance():
    """min |d|^2 + c max(m - w d, 0) has its solution at |d| = c |w| / 2: too short below c = 2 m / |w|^2."""
    weight, bias = two_classes()
    net, x = linear(weight, bias), images(0.3, 0.7)
    y = net(x).argmax(1)
    length = (weight[0] - weight[1]).norm()
    margin = net(x).amax(1) - net(x).amin(1)
    c = 0.2
    x_adv = cw_l2(net, x, y, c=c, steps=400, lr=0.01)
    within = 2 * margin / length**2 < c
    found = net(x_adv).argmax(1) != y
    clear = (2 * margin / length**2 / c - 1).abs() > 0.2  # on the way an iterate may overshoot
    assert 0 < int(within.sum()) < len(x)
    assert torch.equal(found[clear], within[clear])
    assert torch.equal(x_adv[~found], x[~found])


def test_kappa_goes_on_after_the_boundary():
    """With kappa the loss is lower beyond it; the nearest misclassified iterate is returned all the same."""
    weight, bias = two_classes()
    net, x = linear(weight, bias), images(0.3, 0.7, batch=4)
    y = net(x).argmax(1)
    last: dict[float, Tensor] = {}

    def watched(kappa: float) -> Net:
        def forward(z: Tensor) -> Tensor:
            last[kappa] = z.detach()
            return net(z)

        return forward

    for kappa in (0.0, 3.0):
        cw_l2(watched(kappa), x, y, c=20.0, kappa=kappa, steps=400, lr=0.02)
    lead = {kappa: (net(z)[torch.arange(4), 1 - y] - net(z)[torch.arange(4), y]) for kappa, z in last.items()}
    assert float(lead[0.0].abs().max()) < 0.5
    assert float((lead[3.0] - 3.0).abs().max()) < 0.5


def test_negative_logits_are_as_good_as_any():
    """A maximum over logits that are masked by zero is wrong where all others are negative."""
    weight, bias = five_classes()
    x = images(0.3, 0.7)
    for shift in (-100.0, 100.0):
        net, shifted = linear(weight, bias), linear(weight, bias + shift)
        y = net(x).argmax(1)
        for attack in (lambda n, x, y: cw_l2(n, x, y, c=1.0, steps=100, lr=0.02), L2_ATTACKS["fab"]):
            torch.testing.assert_close(attack(shifted, x[:4], y[:4]), attack(net, x[:4], y[:4]), rtol=0, atol=1e-3)


def test_pixels_at_the_edge_are_frozen_by_no_shrink_and_slow_by_a_small_one():
    x = torch.tensor([[0.0, 0.5], [1.0, 0.5]], dtype=DTYPE)
    y = torch.zeros(2, dtype=torch.int64)
    toward = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=DTYPE)  # only the pixel at the edge matters

    def net(z: Tensor) -> Tensor:
        score = 3 * ((z - x) * toward).sum(1) - 0.3
        return torch.stack([torch.zeros_like(score), score], 1)

    def reached(**settings: float) -> list[bool]:
        return (net(cw_l2(net, x, y, c=10.0, **settings)).argmax(1) != y).tolist()

    assert reached(shrink=0.0, steps=300, lr=0.1) == [False, False]
    assert reached(shrink=1e-6, steps=20, lr=0.01) == [False, False]
    assert reached(shrink=1e-6, steps=200, lr=0.1) == [True, True]
    assert reached(shrink=0.02, steps=200, lr=0.01) == [True, True]


# ---------------------------------------------------------------- bounded attacks
def corner_of(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x + eps * w.sign().view(-1, 1, 3, 4)).clamp(0, 1)


@pytest.mark.parametrize("eps", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("edges", [False, True])
def test_ni_fgsm_and_ti_dim_reach_the_corner_of_a_linear_model(eps, decay, edges):
    weight, bias = two_classes()
    net = linear(weight, bias)
    x = images(0.0, 1.0).round() if edges else images(0.0, 1.0)
    y = net(x).argmax(1)
    expected = corner_of(x, weight[1 - y] - weight[y], eps)
    settings = {"eps": eps, "step_size": eps / 4, "steps": 5, "decay": decay}
    objective = objectives.cross_entropy(net, y)
    torch.testing.assert_close(ni_fgsm(objective, x, **settings), expected, rtol=0, atol=1e-15)
    x_adv = ti_dim(objective, x, **settings, prob=0.0, kernel_size=1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)
    x_adv = ti_dim(objective, x, **settings, prob=0.0, kernel_size=3)
    slope = smooth((weight[1 - y] - weight[y]).view(-1, 1, 3, 4), gaussian_kernel(3, 3.0))
    torch.testing.assert_close(x_adv, corner_of(x, slope, eps), rtol=0, atol=1e-15)


def test_ni_fgsm_and_ti_dim_on_a_piecewise_linear_model():
    """|a u|: each image goes to the corner of the side it is on, which is the optimum of the ball."""
    a = torch.randn(DIM, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    x = images(0.3, 0.7)
    along = (x.flatten(1) - 0.5) @ a
    assert 0 < int((along > 0).sum()) < len(x)

    def objective(z: Tensor) -> Tensor:
        value = (z.flatten(1) - 0.5) @ a
        return value.relu() + (-value).relu()

    expected = along.abs() + 0.1 * a.abs().sum()
    settings = {"eps": 0.1, "step_size": 0.02, "steps": 6, "decay": 1.0}
    for x_adv in (
        ni_fgsm(objective, x, **(settings | {"decay": 0.1})),
        ti_dim(objective, x, **settings, prob=0.0, kernel_size=1),
    ):
        torch.testing.assert_close(objective(x_adv), expected, rtol=0, atol=1e-12)


def test_the_size_of_a_step():
    weight, bias = two_classes()
    net, x = linear(weight, bias), images(0.4, 0.6)
    y = net(x).argmax(1)
    w = (weight[1 - y] - weight[y]).sign().view(-1, 1, 3, 4)
    objective = objectives.cross_entropy(net, y)
    for steps in (1, 3):
        settings = {"eps": 0.2, "step_size": 0.01, "steps": steps}
        torch.testing.assert_close(ni_fgsm(objective, x, **settings), x + 0.01 * steps * w, rtol=0, atol=1e-14)
        x_adv = ti_dim(objective, x, **settings, prob=0.0, kernel_size=1)
        torch.testing.assert_close(x_adv, x + 0.01 * steps * w, rtol=0, atol=1e-14)


def test_ddn_takes_its_length_and_its_share():
    """Along a line: eps_k from the signs of the answers alone, 1 (1 - .2) (1 - .2) (1 + .2) ..."""
    shown: list[float] = []

    def net(z: Tensor) -> Tensor:
        shown.append(float(z.detach()[0, 0]))
        return torch.stack([0.3 - z[:, 0], torch.zeros(len(z), dtype=z.dtype)], 1)  # wrong above .3

    x = torch.zeros(1, 1, dtype=DTYPE)
    x_adv = ddn(net, x, torch.tensor([0]), steps=7, gamma=0.2, init_norm=0.5)
    expected = [0.0, 0.6]
    for _ in range(6):
        expected.append(expected[-1] * (0.8 if expected[-1] > 0.3 else 1.2))
    assert shown == pytest.approx(expected)
    assert float(x_adv) == pytest.approx(min(v for v in expected if v > 0.3))
    assert math.isclose(float(x_adv), 0.6 * 0.8**3, rel_tol=1e-12)
