"""PGD on a small nonlinear network against the literal loop over samples, pixels and steps."""

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.fgsm import fgsm
from mi_at.attacks.pgd import pgd
from tests.references import attacks as ref

DTYPE = torch.float64
SHAPE = (1, 4, 4)


def network(classes: int = 4, seed: int = 0) -> nn.Module:
    """Smooth (tanh), so that no kink of a ReLU decides a sign by a rounding error."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(48, 16),
            nn.Tanh(),
            nn.Linear(16, classes),
        ).to(DTYPE)


def data(batch: int = 4, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *SHAPE, generator=g, dtype=DTYPE)
    x[0] = x[0].round()  # a black and white image: the range binds at once
    return x, torch.randint(classes, (batch,), generator=g)


def delta(x: Tensor, kind: str, eps: float, which: str, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([ref.start(x[i], eps, which, kind, g) for i in range(len(x))])


def closure(name: str, net: nn.Module, x: Tensor, y: Tensor):
    """(our objective, the literal one)."""
    if name == "kl":
        logits = net(x).detach()
        return objectives.kl_to(net, logits), ref.kl_objective(net, logits)
    ours = {
        "cross_entropy": lambda: objectives.cross_entropy(net, y),
        "margin": lambda: objectives.margin(net, y),
        "margin_50": lambda: objectives.margin(net, y, 50.0),
        "dlr": lambda: objectives.dlr(net, y),
    }[name]()
    return ours, ref.label_objective(net, y, name)


NAMES = ["cross_entropy", "margin", "margin_50", "dlr", "kl"]


@pytest.mark.parametrize("name", NAMES)
def test_objectives_equal_the_transcription_in_value_and_gradient(name):
    net = network()
    for seed in range(3):
        x, y = data(6, seed=seed)
        clean, x = (
            x,
            (x + 0.1 * torch.randn(x.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(9))),
        )
        ours, literal = closure(name, net, clean, y)
        x.requires_grad_(True)
        values = ours(x)
        assert values.shape == (6,)
        (got,) = torch.autograd.grad(values.sum(), x)
        for i in range(6):
            leaf = x[i : i + 1].detach().requires_grad_(True)
            value = literal(i, leaf)
            (want,) = torch.autograd.grad(value, leaf)
            assert float(values[i].detach()) == pytest.approx(float(value.detach()), abs=1e-10)
            torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("which", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("iterate", ["last", "worst"])
def test_pgd_equals_the_literal_loop(name, which, iterate):
    net = network(seed=1)
    x, y = data(3, seed=2)
    eps, step = (0.1, 0.03) if which == "linf" else (0.5, 0.2)
    ours, literal = closure(name, net, x, y)
    for kind in ("uniform", "gaussian"):
        d = delta(x, kind, eps, which)
        got = pgd(ours, x, eps=eps, step_size=step, steps=5, norm=which, init=d, iterate=iterate)
        want = ref.pgd(literal, x, eps=eps, step_size=step, steps=5, which=which, delta=d, iterate=iterate)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("which", ["linf", "l2"])
def test_zero_start_and_fgsm_equal_the_literal_loop(which):
    net = network(seed=3)
    x, y = data(4, seed=4)
    ours, literal = closure("cross_entropy", net, x, y)
    got = pgd(ours, x, eps=0.2, step_size=0.07, steps=4, norm=which, init="zero")
    want = ref.pgd(literal, x, eps=0.2, step_size=0.07, steps=4, which=which)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    got = fgsm(ours, x, eps=0.2, norm=which)
    want = ref.pgd(literal, x, eps=0.2, step_size=0.2, steps=1, which=which)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("which", ["linf", "l2"])
def test_a_start_outside_the_ball_is_projected_first(which):
    net = network(seed=3)
    x, y = data(4, seed=4)
    ours, literal = closure("cross_entropy", net, x, y)
    d = delta(x, "uniform", 3.0, which)
    for steps in (0, 2):
        got = pgd(ours, x, eps=0.1, step_size=0.02, steps=steps, norm=which, init=d)
        want = ref.pgd(literal, x, eps=0.1, step_size=0.02, steps=steps, which=which, delta=d)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["linf", "l2"])
def test_worst_is_at_least_the_last_and_the_start(which):
    """A step much too long, so that the last iterate is often not the best."""
    net = network(seed=5)
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(8.0)
    x, y = data(64, seed=6)
    objective = objectives.cross_entropy(net, y)
    d = delta(x, "uniform", 0.4, which)
    arguments = {"eps": 0.4, "step_size": 0.4, "norm": which, "init": d}
    worst = objective(pgd(objective, x, steps=6, iterate="worst", **arguments))
    for steps in range(7):  # every iterate on the way, start and last included
        assert (objective(pgd(objective, x, steps=steps, **arguments)) <= worst + 1e-12).all()
    last = objective(pgd(objective, x, steps=6, **arguments))
    start = objective(pgd(objective, x, steps=0, **arguments))
    assert (worst > last + 1e-6).any()
    assert (worst > start + 1e-6).any()
    if which == "l2":
        assert not torch.equal(worst, torch.maximum(last, start))


def test_worst_keeps_a_start_that_nothing_beats():
    """The objective falls from the start on: its gradient points the wrong way."""
    x = torch.full((2, 1, 2, 2), 0.5, dtype=DTYPE)

    def objective(z: Tensor) -> Tensor:
        offset = (z - x).flatten(1).square().sum(1)
        pull = (z - z.detach()).flatten(1).sum(1)  # value 0, gradient 1
        return pull - offset.detach()

    worst = pgd(objective, x, eps=0.3, step_size=0.1, steps=3, init="zero", iterate="worst")
    assert torch.equal(worst, x)
    last = pgd(objective, x, eps=0.3, step_size=0.1, steps=3, init="zero")
    torch.testing.assert_close(last, x + 0.3)


def test_a_joint_objective_is_a_scalar():
    """The sum over the batch moves each sample as its own value does; 'worst' has no meaning there."""
    net = network(seed=7)
    x, y = data(4, seed=8)
    objective = objectives.cross_entropy(net, y)
    for which in ("linf", "l2"):
        each = pgd(objective, x, eps=0.1, step_size=0.03, steps=4, norm=which, init="zero")
        for joint in (lambda z: objective(z).sum(), lambda z: objective(z).mean()):
            both = pgd(joint, x, eps=0.1, step_size=0.03, steps=4, norm=which, init="zero")
            torch.testing.assert_close(both, each, rtol=0, atol=1e-9)
    for steps in (0, 1, 3):
        with pytest.raises(ValueError, match="worst"):
            pgd(lambda z: objective(z).sum(), x, eps=0.1, step_size=0.03, steps=steps, iterate="worst")


def test_a_truly_joint_objective_uses_the_whole_batch():
    """Maximise the product of two samples' sums: a sample's direction depends on its neighbour's sign."""
    x = torch.full((2, 1, 1, 2), 0.5, dtype=DTYPE)

    def joint(z: Tensor) -> Tensor:
        a, b = z[0].sum() - 2.0, z[1].sum() - 0.2
        return a * b

    x_adv = pgd(joint, x, eps=0.1, step_size=0.1, steps=1, init="zero")
    torch.testing.assert_close(x_adv[0], x[0] + 0.1)  # b = 0.8 > 0
    torch.testing.assert_close(x_adv[1], x[1] - 0.1)  # a = -1 < 0
