"""Robust information: the alternating maximisation of appendix B against its equations and against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.evaluation import EvaluationError
from mi_at.evaluation.robust_ncmi import channel_objective, log_channel, robust_ncmi
from mi_at.functional.information import conditional_mutual_information, normalized_cmi, separation
from mi_at.models.cnn import CNNTiny
from tests.references import ncmi as ref
from tests.references.losses import rows

K = 3


def outputs(n: int = 9, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, K, generator=g, dtype=torch.float64)).softmax(1), torch.arange(n) % K


def images(n: int = 12, side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(1)), torch.arange(n) % K


def network(**options: Any) -> CNNTiny:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=K, in_channels=1, image_size=8, width=0.3, **options)
    nn.init.normal_(net.head[-1].weight if isinstance(net.head, nn.Sequential) else net.head.weight, std=0.5)
    return net


def probabilities(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x).double().softmax(1)


# ---------------------------------------------------------------- the equations
def test_the_channel_is_that_of_eq_48() -> None:
    p, y = outputs()
    expected = torch.tensor(ref.channel(rows(p), y.tolist()), dtype=torch.float64)
    torch.testing.assert_close(log_channel(p, y).exp(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_its_own_channel_is_the_best_and_gives_the_value_itself(seed: int) -> None:
    """Theorem 2: the objective at the channel of G is the NCMI of G, and no other channel gives more."""
    p, y = outputs(seed=seed)
    own = log_channel(p, y)
    values = {"ncmi": normalized_cmi(p, y, K), "cmi": conditional_mutual_information(p, y, K)}
    for quantity, value in values.items():
        assert channel_objective(p, y, own, quantity).item() == pytest.approx(value.item(), abs=1e-10)
        for other in range(5):
            channel = log_channel(outputs(seed=10 + other)[0], y)
            assert channel_objective(p, y, channel, quantity) < value
    assert channel_objective(p, y, own, "separation").item() == pytest.approx(-separation(p, y, K).item())


@pytest.mark.parametrize("quantity", ["ncmi", "cmi", "separation"])
def test_the_gradient_by_batches_is_that_of_the_whole(quantity: str) -> None:
    """One step from the images: the sign of the gradient of the coupled objective, whatever the batches."""
    net, (x, y) = network().double().eval(), images(7)
    x = x.double().clamp(0.3, 0.7)
    other = outputs(7)[0]
    found = {}
    for batch_size in (2, 7, 100):
        from mi_at.evaluation.robust_ncmi import _Search

        search = _Search(net, x, y, quantity, batch_size)
        found[batch_size] = search.gradient(x, search.slope(search.outputs(x), log_channel(other, y)))
    images_ = x.clone().requires_grad_(True)
    value = channel_objective(net(images_).softmax(1), y, log_channel(other, y), quantity)
    (expected,) = torch.autograd.grad(value, images_)
    for gradient in found.values():
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- the maximisation
@pytest.mark.parametrize("quantity", ["ncmi", "cmi", "separation"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_value_does_not_fall_and_is_that_of_the_images(quantity: str, norm: str) -> None:
    net, (x, y) = network(), images()
    eps = 0.2 if norm == "linf" else 1.0
    found = robust_ncmi(net, x, y, eps=eps, step_size=eps / 4, norm=norm, steps=4, quantity=quantity, batch_size=5)
    sign = -1 if quantity == "separation" else 1
    assert len(found.history) == 5
    values = [sign * value for value in (found.clean, *found.history)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 1e-4
    assert found.value == found.history[-1]
    distance = (found.x_adv - x).flatten(1)
    assert (distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)).max() <= eps + 1e-6
    assert found.x_adv.min() >= 0
    assert found.x_adv.max() <= 1
    p = probabilities(net, found.x_adv)
    assert found.cmi == pytest.approx(conditional_mutual_information(p, y, K).item(), abs=1e-6)
    assert found.separation == pytest.approx(separation(p, y, K).item(), abs=1e-6)
    expected = {"ncmi": found.cmi / found.separation, "cmi": found.cmi, "separation": found.separation}
    assert found.value == pytest.approx(expected[quantity], abs=1e-9)
    clean = {"ncmi": normalized_cmi, "cmi": conditional_mutual_information, "separation": separation}[quantity]
    assert found.clean == pytest.approx(clean(probabilities(net, x), y, K).item(), abs=1e-6)


def test_a_round_starts_at_the_best_so_far_not_at_the_last() -> None:
    """Steps across the whole ball, which end beside the best of what was met on the way."""
    net, (x, y) = network(), images()
    options: dict[str, Any] = {"eps": 0.2, "step_size": 0.4, "steps": 1, "quantity": "separation"}
    after_one = robust_ncmi(net, x, y, rounds=1, **options).x_adv
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, images: seen.append(images[0].detach().clone()))
    robust_ncmi(net, x, y, rounds=2, **options)
    # The clean images; then of each round its start, the start once more for the gradient, and its end.
    assert len(seen) == 1 + 2 * 3
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[4], after_one)
    assert not torch.equal(seen[3], after_one)


@pytest.mark.parametrize("quantity", ["ncmi", "cmi", "separation"])
def test_it_finds_what_brute_force_finds(quantity: str) -> None:
    """Four images of one pixel, every joint choice of 9 points of the ball."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for layer in (net[1], net[3]):
        nn.init.normal_(layer.weight, std=2.0)
    x, y = torch.tensor([0.3, 0.5, 0.45, 0.7], dtype=torch.float64).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 1])
    eps, points = 0.2, torch.linspace(-0.2, 0.2, 9, dtype=torch.float64)
    with torch.no_grad():
        table = net((x.view(4, 1) + points).reshape(-1, 1, 1, 1)).softmax(1).view(4, 9, 3)
    score = {
        "ncmi": lambda p: normalized_cmi(p, y, 2),
        "cmi": lambda p: conditional_mutual_information(p, y, 2),
        "separation": lambda p: -separation(p, y, 2),
    }[quantity]
    places = torch.arange(4)
    best = max(float(score(table[places, torch.tensor(c)])) for c in itertools.product(range(9), repeat=4))
    found = robust_ncmi(net, x, y, eps=eps, step_size=0.02, steps=20, quantity=quantity)
    value = -found.value if quantity == "separation" else found.value
    clean = -found.clean if quantity == "separation" else found.clean
    assert value >= clean + 0.9 * (best - clean)
    assert value <= best + 0.05 * abs(best)


def test_without_a_ball_it_is_the_clean_value() -> None:
    net, (x, y) = network(), images()
    found = robust_ncmi(net, x, y, eps=0.0, step_size=0.1, rounds=1, steps=1)
    assert found.value == found.clean
    assert torch.equal(found.x_adv, x)


def test_batches_do_not_matter_and_seed_and_ids_do() -> None:
    net, (x, y) = network().double(), images()
    runs = [robust_ncmi(net, x.double(), y, eps="0.1", step_size="0.02", steps=3, batch_size=b) for b in (5, 12)]
    assert runs[0].value == pytest.approx(runs[1].value, abs=1e-9)
    other = robust_ncmi(net, x.double(), y, eps=0.1, step_size=0.02, steps=3, seed=1)
    assert other.value != pytest.approx(runs[0].value, abs=1e-9)
    ids = torch.arange(12)
    named = [robust_ncmi(net, x.double(), y, eps=0.1, step_size=0.02, steps=3, ids=ids + k).value for k in (0, 5)]
    assert named[0] == pytest.approx(runs[0].value, abs=1e-9)
    assert named[1] != pytest.approx(runs[0].value, abs=1e-9)


def test_the_network_and_the_images_are_left_alone() -> None:
    net, (x, y) = network(batch_norm=True).train(), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}, x.clone()
    with torch.inference_mode():
        robust_ncmi(net, x, y, eps=0.1, step_size=0.05, rounds=1, steps=1)
    assert net.training
    assert all(torch.equal(value, before[0][name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(x, before[1])


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "mi"}, r"quantity='mi': expected one of ncmi, cmi, separation"),
        ({"rounds": 0}, r"rounds=0: expected 1 or more"),
        ({"steps": 0}, r"steps=0: expected 1 or more"),
        ({"batch_size": 0}, r"batch_size=0: expected 1 or more"),
        ({"eps": 8}, r"did you mean 8/255"),
        ({"norm": "l1"}, r"norm"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    x, y = images()
    with pytest.raises(ValueError, match=message):
        robust_ncmi(network(), x, y, **{"eps": 0.1, "step_size": 0.05, **options})


def test_samples_it_cannot_work_with() -> None:
    x, y = images()
    for images_, labels in ((x, torch.zeros_like(y)), (x[:0], y[:0]), (x, y[:3])):
        with pytest.raises(EvaluationError, match=r"robust NCMI compares classes: expected samples of 2 classes"):
            robust_ncmi(network(), images_, labels, eps=0.1, step_size=0.05)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        robust_ncmi(network(), 2 * x, y, eps=0.1, step_size=0.05)


def test_outputs_that_are_no_numbers() -> None:
    x, y = images()
    net = network()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"\(12, 3\) for 12 images, or values that are not finite"):
        robust_ncmi(net, x, y, eps=0.1, step_size=0.05)
