"""FGSM and PGD on linear models, where the strongest perturbation is known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.fgsm import fgsm
from mi_at.attacks.pgd import pgd

DIM = 12
DTYPE = torch.float64


class Linear(nn.Module):
    """logits = W x + b on flattened images."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def linear(classes: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Linear:
    """With three classes the third is out of reach (bias -60): the attack is that of two classes."""
    g = torch.Generator().manual_seed(seed)
    bias = torch.zeros(classes, dtype=DTYPE)
    bias[2:] = -60.0
    return Linear(torch.randn(classes, DIM, generator=g, dtype=DTYPE).to(dtype), bias.to(dtype))


def images(batch: int = 5, low: float = 0.0, high: float = 1.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(batch, 1, 3, 4, generator=g, dtype=DTYPE)


def normal(net: Linear, y: Tensor) -> Tensor:
    """[B, 1, 3, 4]: the gradient of z_other - z_y between classes 0 and 1."""
    weight = net.weight.detach()
    return (weight[1 - y] - weight[y]).view(-1, 1, 3, 4)


def named(name: str, net: nn.Module, y: Tensor):
    if name == "margin":
        return objectives.margin(net, y, 1e9)
    if name == "dlr":
        return objectives.dlr(net, y)
    return objectives.cross_entropy(net, y)


Y = torch.tensor([0, 1, 0, 1, 1])
CLASSES_AND_OBJECTIVES = [(2, "cross_entropy"), (2, "margin"), (3, "cross_entropy"), (3, "margin")]


@pytest.mark.parametrize(("classes", "name"), CLASSES_AND_OBJECTIVES)
@pytest.mark.parametrize("eps", [0.03, 0.3, 1.0])
class TestLinf:
    def test_one_step_reaches_the_corner(self, classes, name, eps):
        """x + eps sign(w), clamped to [0, 1], exactly."""
        net, x = linear(classes), images()
        expected = (x + eps * normal(net, Y).sign()).clamp(0, 1)
        objective = named(name, net, Y)
        for x_adv in (
            fgsm(objective, x, eps=eps),
            pgd(objective, x, eps=eps, step_size=eps, steps=1, init="zero"),
            pgd(objective, x, eps=eps, step_size=min(2 * eps + 1e-9, 1.0), steps=1, init="uniform"),
        ):
            torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)

    def test_small_steps_reach_it_too(self, classes, name, eps):
        net, x = linear(classes), images()
        expected = (x + eps * normal(net, Y).sign()).clamp(0, 1)
        for init in ("zero", "uniform", "gaussian"):
            x_adv = pgd(named(name, net, Y), x, eps=eps, step_size=eps / 4, steps=9, init=init)
            torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)

    def test_no_point_of_the_ball_is_worse(self, classes, name, eps):
        net, x = linear(classes), images()
        objective = named(name, net, Y)
        reached = objective(fgsm(objective, x, eps=eps))
        g = torch.Generator().manual_seed(3)
        for _ in range(50):
            noise = eps * torch.randn(x.shape, generator=g, dtype=DTYPE).sign()
            assert (objective((x + noise).clamp(0, 1)) <= reached + 1e-12).all()


def test_the_size_of_a_step():
    """One step of 0.01 moves every pixel by 0.01, and not by eps; under l2 the whole image by 0.01."""
    net, x = linear(2), images(low=0.4, high=0.6)
    w = normal(net, Y)
    objective = objectives.cross_entropy(net, Y)
    for steps in (1, 3):
        x_adv = pgd(objective, x, eps=0.1, step_size=0.01, steps=steps, init="zero")
        torch.testing.assert_close(x_adv, x + 0.01 * steps * w.sign(), rtol=0, atol=1e-14)
        x_adv = pgd(objective, x, eps=0.1, step_size=0.01, steps=steps, init="zero", norm="l2")
        unit = w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(x_adv, x + 0.01 * steps * unit, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("classes", "name"), CLASSES_AND_OBJECTIVES)
@pytest.mark.parametrize("eps", [0.05, 0.3])
class TestL2:
    def test_within_a_percent_of_the_optimum_inside_the_box(self, classes, name, eps):
        """eps w / |w|: the margin grows by eps |w|."""
        net, x = linear(classes), images(low=0.4, high=0.6)
        w = normal(net, Y)
        length = w.flatten(1).norm(dim=1)
        before = objectives.margin(net, Y, 1e9)(x).detach()
        for x_adv, tolerance in (
            (fgsm(named(name, net, Y), x, eps=eps, norm="l2"), 1e-12),
            (pgd(named(name, net, Y), x, eps=eps, step_size=eps, steps=1, norm="l2", init="zero"), 1e-12),
            (pgd(named(name, net, Y), x, eps=eps, step_size=eps / 4, steps=20, norm="l2"), 0.01),
            (
                pgd(named(name, net, Y), x, eps=eps, step_size=eps / 4, steps=20, norm="l2", init="gaussian"),
                0.01,
            ),
        ):
            gain = (objectives.margin(net, Y, 1e9)(x_adv).detach() - before) / (eps * length)
            assert float(gain.min()) >= 1 - tolerance
            assert float(gain.max()) <= 1 + 1e-12

    def test_within_a_percent_of_the_optimum_in_a_corner_of_the_box(self, classes, name, eps):
        """With pixels at 0 and 1 the optimum is clip(mu w, -x, 1 - x) with mu such that its length is eps."""
        net, x = linear(classes), images().round()
        x[:, :, 0] = 0.5
        w = normal(net, Y)
        objective = objectives.margin(net, Y, 1e9)
        low, high = torch.zeros(len(x), dtype=DTYPE), torch.full((len(x),), 1e3, dtype=DTYPE)
        for _ in range(200):
            mu = (low + high) / 2
            best = torch.minimum(torch.maximum(mu.view(-1, 1, 1, 1) * w, -x), 1 - x)
            too_long = best.flatten(1).norm(dim=1) > eps
            low, high = torch.where(too_long, low, mu), torch.where(too_long, mu, high)
        before = objective(x).detach()
        optimum = objective(x + best).detach() - before
        x_adv = pgd(named(name, net, Y), x, eps=eps, step_size=eps / 20, steps=200, norm="l2")
        gain = (objective(x_adv).detach() - before) / optimum
        assert float(gain.min()) >= 0.99
        assert float(gain.max()) <= 1 + 1e-9


def test_dlr_follows_the_margin_where_the_denominator_is_constant():
    """z_1 - z_3 does not depend on x here, so that DLR has the margin's direction."""
    w = torch.linspace(-1, 1, DIM, dtype=DTYPE)
    net = Linear(torch.stack([w, 2 * w, w]), torch.tensor([0.0, -5.0, -30.0], dtype=DTYPE))
    x = images(low=0.4, high=0.6)
    y = torch.zeros(5, dtype=torch.int64)
    expected = x + 0.1 * w.sign().view(1, 1, 3, 4)
    torch.testing.assert_close(fgsm(objectives.dlr(net, y), x, eps=0.1), expected, rtol=0, atol=1e-15)


def test_three_classes_in_reach_the_margin_takes_the_nearest():
    """Identity weights: from (.5, .4, .1) with label 0 class 1 is the nearest: only pixels 0 and 1 move."""
    net = Linear(torch.eye(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    x = torch.tensor([[0.5, 0.4, 0.1]], dtype=DTYPE)
    y = torch.tensor([0])
    x_adv = fgsm(objectives.margin(net, y, 50.0), x, eps=0.1)
    torch.testing.assert_close(x_adv, torch.tensor([[0.4, 0.5, 0.1]], dtype=DTYPE), rtol=0, atol=1e-15)
    x_adv = fgsm(objectives.margin(net, y, 50.0), x, eps=0.1, norm="l2")
    move = 0.1 / math.sqrt(2)
    torch.testing.assert_close(x_adv, torch.tensor([[0.5 - move, 0.4 + move, 0.1]], dtype=DTYPE))
    x_adv = fgsm(objectives.cross_entropy(net, y), x, eps=0.1)  # cross-entropy raises both wrong classes
    torch.testing.assert_close(x_adv, torch.tensor([[0.4, 0.5, 0.2]], dtype=DTYPE), rtol=0, atol=1e-15)


def test_the_margin_with_kappa_stops_where_it_is_won():
    net = Linear(torch.eye(2, dtype=DTYPE), torch.zeros(2, dtype=DTYPE))
    x = torch.tensor([[0.5, 0.45], [0.2, 0.8]], dtype=DTYPE)
    y = torch.tensor([0, 0])  # the second is wrong already: it does not move at kappa 0
    x_adv = pgd(objectives.margin(net, y), x, eps=0.3, step_size=0.05, steps=10, init="zero")
    expected = torch.tensor([[0.45, 0.5], [0.2, 0.8]], dtype=DTYPE)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    x_adv = pgd(objectives.margin(net, y, 50.0), x, eps=0.3, step_size=0.05, steps=10, init="zero")
    expected = torch.tensor([[0.2, 0.75], [0.0, 1.0]], dtype=DTYPE)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_trades_kl_starts_flat_and_noise_gets_it_moving():
    """KL to the clean output has zero gradient at the clean image, which is why TRADES starts from noise."""
    net, x = linear(2), images(low=0.4, high=0.6)
    logits = net(x).detach()
    objective = objectives.kl_to(net, logits)
    stuck = pgd(objective, x, eps=0.1, step_size=0.02, steps=10, init="zero", norm="l2")
    assert float((stuck - x).abs().max()) < 1e-6 or float(objective(stuck).min()) >= 0.0
    moved = pgd(objective, x, eps=0.1, step_size=0.02, steps=10, init="gaussian")
    w = normal(net, torch.zeros(5, dtype=torch.int64)).sign()
    side = ((moved - x) / (0.1 * w)).flatten(1)
    torch.testing.assert_close(side.abs(), torch.ones_like(side))  # one of the two corners along w, per sample
    assert (side.amax(1) == side.amin(1)).all() or float((side.amax(1) - side.amin(1)).max()) < 1e-9
    assert (objective(moved) > 0.0).all()
