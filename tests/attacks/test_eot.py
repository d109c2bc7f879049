"""EOT: the mean's value and slope, draws by sample, a known optimum that a single draw misses, networks of mi_at."""

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.eot import EOT, drawing, expectation
from mi_at.attacks.pgd import PGD
from mi_at.evaluation.evaluate import evaluate
from mi_at.functional import random
from mi_at.models.cnn import CNNTiny
from tests.attacks.test_linear_model import Y, images, linear, normal

IDS = torch.tensor([11, 3, 8, 40, 5])


class Shaken(nn.Module):
    """Two classes: -+ (w + noise) x, the noise of each image its own, by sample or from torch's generator."""

    def __init__(self, size: float, *, keyed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(12, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            self.weight[::2] *= -1
        self.size, self.keyed = size, keyed

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        noise = random.normal_like(flat) if self.keyed else torch.randn(flat.shape)
        margin = ((self.weight + self.size * noise) * flat).sum(1)
        return torch.stack([-margin, margin], dim=1)


def pictures(n: int = 5) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, 1, 3, 4, generator=torch.Generator().manual_seed(1))


class TestExpectation:
    def test_the_mean_of_the_draws_and_its_slope(self) -> None:
        """Draw d of call t is what a block keyed by (seed, t, d) gives."""
        net, x = Shaken(2.0, keyed=True), pictures()
        objective = objectives.cross_entropy(net, Y)
        mean = expectation(objective, ids=IDS, seed=4, samples=3)
        for call in range(2):
            leaf = x.clone().requires_grad_(True)
            value = mean(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
            by_hand = x.clone().requires_grad_(True)
            total = torch.zeros(5)
            for draw in range(3):
                with random.keyed(IDS, random.key(4, "eot", call, draw)):
                    total = total + objective(by_hand) / 3
            (expected,) = torch.autograd.grad(total.sum(), by_hand)
            torch.testing.assert_close(value.detach(), total.detach())
            torch.testing.assert_close(slope, expected)

    def test_a_joint_objective(self) -> None:
        net, x = Shaken(2.0, keyed=True), pictures()
        objective = objectives.cross_entropy(net, Y)
        single = expectation(objective, ids=IDS, seed=0, samples=4)
        joint = expectation(lambda z: objective(z).mean(), ids=IDS, seed=0, samples=4)
        one, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        value = joint(other)
        assert value.shape == ()
        slopes = torch.autograd.grad(single(one).sum() / 5, one)[0], torch.autograd.grad(value, other)[0]
        torch.testing.assert_close(*slopes)

    def test_without_gradients_it_is_a_value(self) -> None:
        net, x = Shaken(2.0, keyed=True), pictures()
        objective = objectives.cross_entropy(net, Y)
        with torch.no_grad():
            value = expectation(objective, ids=IDS, seed=0, samples=4)(x)
        with_slope = expectation(objective, ids=IDS, seed=0, samples=4)(x.requires_grad_(True))
        torch.testing.assert_close(value, with_slope.detach())

    @pytest.mark.parametrize("keyed", [True, False])
    def test_torchs_random_state_is_as_before(self, keyed: bool) -> None:
        net, x = Shaken(2.0, keyed=keyed), pictures()
        objective = objectives.cross_entropy(net, Y)
        state = torch.get_rng_state()
        values = [expectation(objective, ids=IDS, seed=s, samples=3)(x) for s in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])

    def test_draws_differ(self) -> None:
        net, x = Shaken(2.0, keyed=False), pictures()
        with drawing(IDS, 0):
            first, second = net(x), net(x)
        assert not torch.equal(first, second)

    def test_none_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"attack\.samples=0"):
            expectation(lambda x: x, ids=IDS, seed=0, samples=0)
        with pytest.raises(ValueError, match=r"attack\.samples=0"):
            EOT(eps=0.1, step_size=0.1, steps=1, samples=0)
        with pytest.raises(ValueError, match="objective='kl'"):
            EOT(eps=0.1, step_size=0.1, steps=1, objective="kl")
        with pytest.raises(ValueError, match="kappa=-1"):
            EOT(eps=0.1, step_size=0.1, steps=1, kappa=-1.0)


@pytest.mark.parametrize("keyed", [True, False])
def test_it_reaches_the_optimum_that_one_draw_misses(keyed: bool) -> None:
    """The mean margin is linear in x with slope w: x + eps sign(w) is best; noise of the size of w hides it."""
    net, x = Shaken(1.0, keyed=keyed), pictures()
    sign = 1 - 2 * Y.float()
    corner = (x + 0.1 * (sign[:, None] * net.weight.detach().sign()).view(5, 1, 3, 4)).clamp(0, 1)
    options = {"eps": 0.1, "step_size": 0.05, "steps": 5, "objective": "margin", "kappa": float("inf")}
    many = EOT(**options, samples=200)(net, x, Y, ids=IDS, seed=0)
    torch.testing.assert_close(many, corner, rtol=0, atol=1e-6)
    if keyed:
        single = EOT(**options, samples=1)(net, x, Y, ids=IDS, seed=0)
        assert float((single - corner).abs().mean()) > 0.01


def test_without_noise_it_is_pgd() -> None:
    net, x = linear(2), images()
    options = {"eps": 0.2, "step_size": 0.05, "steps": 6}
    expected = PGD(**options)(net, x, Y, ids=IDS, seed=2)
    torch.testing.assert_close(EOT(**options, samples=2)(net, x, Y, ids=IDS, seed=2), expected)
    corner = (x + 0.2 * normal(net, Y).sign()).clamp(0, 1)
    x_adv = EOT(**options | {"steps": 12}, samples=2)(net, x, Y, ids=IDS, seed=2)
    torch.testing.assert_close(x_adv, corner, rtol=0, atol=1e-15)


def stochastic() -> CNNTiny:
    """As shared_info and vib serve it with test_latent=sample."""
    torch.manual_seed(0)
    net = CNNTiny(num_classes=3, in_channels=1, image_size=8, width=0.2)
    net.insert_latent(dim=8, test="sample")
    return net.eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_stochastic_latent(norm: str) -> None:
    """Contract: budget and range by the evaluator, no companions, the mean loss rises."""
    net = stochastic()
    x, y, ids = torch.rand(9, 1, 8, 8), torch.arange(9) % 3, 50 + torch.arange(9)
    attack = EOT(eps=0.1 if norm == "linf" else 0.5, step_size=0.03, steps=4, norm=norm, samples=6, restarts=2)
    whole = attack(net, x, y, ids=ids, seed=0)
    order = torch.tensor([7, 2, 4])
    some = attack(net, x[order], y[order], ids=ids[order], seed=0)
    # Bits of a convolution depend on the batch, and a sign on bits.
    assert float(((some - whole[order]).abs() > 1e-5).float().mean()) < 0.01
    objective = objectives.cross_entropy(net, y)
    judged = [expectation(objective, ids=ids, seed=99, samples=100)(images).mean() for images in (x, whole)]
    assert judged[1] > judged[0]
    result = evaluate(net, {"eot": attack}, [(x, y, torch.arange(9))], progress=False)
    assert result["eot"].description["samples"] == 6
    assert result["eot"].description["attack"] == "eot"
    assert torch.equal(attack(net, x[:0], y[:0], ids=ids[:0], seed=0), x[:0])


def test_the_best_start_is_judged_by_the_mean_margin() -> None:
    net, x = Shaken(1.0, keyed=True), pictures()
    y = Y
    attack = EOT(eps=0.2, step_size=0.05, steps=0, restarts=6, samples=50)
    starts = [attack._start(x, IDS, 3 * 1009 + restart) for restart in range(6)]
    margin = objectives.margin(net, y, float("inf"))
    judged = []
    for restart, start in enumerate(starts):
        purpose = random.key(3 * 1009 + restart, "judgement")
        with torch.no_grad():
            judged.append(expectation(margin, ids=IDS, seed=purpose, samples=50)((x + start).clamp(0, 1)))
    best = torch.stack(judged).argmax(0)
    expected = torch.stack([(x + starts[int(b)]).clamp(0, 1)[i] for i, b in enumerate(best)])
    torch.testing.assert_close(attack(net, x, y, ids=IDS, seed=3), expected)
