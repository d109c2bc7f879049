"""What every call of pgd and fgsm guarantees: budget, range, purity, reproducible starts, clear refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.fgsm import fgsm
from mi_at.attacks.inner import InnerMaximisation, check_eps, check_step
from mi_at.attacks.pgd import PGD, pgd

INITS = ["uniform", "gaussian", "zero", "tensor"]
NORMS = ["linf", "l2"]


def network(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)


def images(batch: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 3, 3, generator=g)
    x[:4] = x[:4].round()
    return x.to(dtype), torch.randint(5, (batch,), generator=g)


def first(init: str, x: Tensor) -> str | Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) if init == "tensor" else init


def total(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.5])
def test_budget_and_range(dtype, which, init, eps):
    net = network(dtype)
    x, y = images(dtype=dtype)
    objective = objectives.cross_entropy(net, y)
    for iterate in ("last", "worst"):
        for steps in (0, 1, 5):
            x_adv = pgd(
                objective,
                x,
                eps=eps,
                step_size=0.1,
                steps=steps,
                norm=which,
                init=first(init, x),
                iterate=iterate,
            )
            change = (x_adv - x).double().flatten(1)
            size = change.abs().amax(1) if which == "linf" else change.norm(dim=1)
            assert float(size.max()) <= eps + 1e-6
            assert float(x_adv.min()) >= 0.0
            assert float(x_adv.max()) <= 1.0
            assert x_adv.dtype == dtype
            assert x_adv.shape == x.shape
            assert not x_adv.requires_grad
            if eps == 0.0:
                assert torch.equal(x_adv, x)
    x_adv = fgsm(objective, x, eps=eps, norm=which)
    change = (x_adv - x).double().flatten(1)
    assert float((change.abs().amax(1) if which == "linf" else change.norm(dim=1)).max()) <= eps + 1e-6
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    if eps == 0.0:
        assert torch.equal(x_adv, x)


@pytest.mark.parametrize("which", NORMS)
def test_no_steps_return_the_projected_start(which):
    x, _ = images(dtype=torch.float64)
    assert torch.equal(pgd(total, x, eps=0.3, step_size=0.1, steps=0, norm=which, init="zero"), x)
    assert torch.equal(pgd(total, x, eps=0.3, step_size=0.0, steps=0, norm=which, init="zero"), x)
    small = torch.full_like(x, 0.01)
    x_adv = pgd(total, x, eps=0.3, step_size=0.1, steps=0, norm=which, init=small)
    torch.testing.assert_close(x_adv, (x + 0.01).clamp(0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("which", NORMS)
def test_a_zero_gradient_leaves_the_point(which):
    """Sample 0 has no gradient, sample 1 has: the one stays, without NaN, the other moves."""
    x = torch.full((2, 1, 2, 2), 0.5)

    def objective(z: Tensor) -> Tensor:
        return total(z) * torch.tensor([0.0, 1.0])

    for x_adv in (
        pgd(objective, x, eps=0.2, step_size=0.1, steps=3, norm=which, init="zero"),
        fgsm(objective, x, eps=0.2, norm=which),
    ):
        assert torch.equal(x_adv[0], x[0])
        assert float((x_adv[1] - x[1]).min()) > 0.05


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e20])
def test_the_size_of_the_gradient_does_not_matter(which, size):
    """A confident network has tiny gradients; a constant added to their length would shorten the l2 step."""
    x = torch.full((2, 1, 4, 4), 0.5)
    x_adv = pgd(lambda z: size * total(z), x, eps=0.2, step_size=0.1, steps=1, norm=which, init="zero")
    step = 0.1 if which == "linf" else 0.1 / 4
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.5 + step), rtol=0, atol=1e-6)


def test_it_climbs():
    """Ascent, not descent; each sample by its own objective."""
    net = network(torch.float64)
    x, y = images(dtype=torch.float64)
    objective = objectives.cross_entropy(net, y)
    for which, eps in (("linf", 0.1), ("l2", 0.5)):
        for init in ("uniform", "gaussian", "zero"):
            x_adv = pgd(objective, x, eps=eps, step_size=eps / 4, steps=8, norm=which, init=init)
            assert (objective(x_adv) > objective(x)).all()
        assert (objective(fgsm(objective, x, eps=eps / 10, norm=which)) > objective(x)).all()


def test_samples_do_not_see_each_other():
    net = network(torch.float64)
    x, y = images(8, dtype=torch.float64)
    delta = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for which in NORMS:
        arguments = {"eps": 0.3, "step_size": 0.1, "steps": 4, "norm": which}
        whole = pgd(objectives.cross_entropy(net, y), x, init=delta, **arguments)
        for i in range(8):
            s = slice(i, i + 1)
            alone = pgd(objectives.cross_entropy(net, y[s]), x[s], init=delta[s], **arguments)
            torch.testing.assert_close(alone, whole[s], rtol=0, atol=1e-12)


class TestStarts:
    def start(self, init: str, which: str, seed: int | None, shape=(200, 1, 4, 5), eps: float = 0.25) -> Tensor:
        x = torch.full(shape, 0.5)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return pgd(total, x, eps=eps, step_size=0.1, steps=0, norm=which, init=init, generator=generator) - x

    @pytest.mark.parametrize("which", NORMS)
    @pytest.mark.parametrize("init", ["uniform", "gaussian"])
    def test_a_generator_decides(self, init, which):
        assert torch.equal(self.start(init, which, 3), self.start(init, which, 3))
        assert not torch.equal(self.start(init, which, 3), self.start(init, which, 4))
        state = torch.get_rng_state()
        self.start(init, which, 3)
        assert torch.equal(torch.get_rng_state(), state), "with a generator of its own the global one is not used"
        generator = torch.Generator().manual_seed(3)
        x = torch.full((4, 1, 2, 2), 0.5)
        two = [pgd(total, x, eps=0.2, step_size=0.1, steps=0, init=init, generator=generator) for _ in range(2)]
        assert not torch.equal(*two), "a second call continues the stream"

    @pytest.mark.parametrize("which", NORMS)
    def test_without_a_generator_the_global_seed_decides(self, which):
        torch.manual_seed(0)
        a = self.start("uniform", which, None)
        b = self.start("uniform", which, None)
        torch.manual_seed(0)
        assert torch.equal(self.start("uniform", which, None), a)
        assert not torch.equal(a, b)

    def test_uniform_in_the_cube(self):
        noise = self.start("uniform", "linf", 0).flatten().double()
        ordered = (noise.sort().values / 0.25 + 1) / 2
        grid = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((ordered - grid).abs().max()) * math.sqrt(len(ordered)) < 1.95

    @pytest.mark.parametrize("shape", [(3000, 1, 1, 1), (3000, 1, 1, 2), (3000, 1, 4, 5)])
    def test_uniform_in_the_ball(self, shape):
        noise = self.start("uniform", "l2", 0, shape).flatten(1).double()
        dim = noise.shape[1]
        ordered = (noise.norm(dim=1) / 0.25).pow(dim).sort().values
        grid = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((ordered - grid).abs().max()) * math.sqrt(len(ordered)) < 1.95
        assert float(noise.mean(0).abs().max()) < 5 * 0.25 / math.sqrt(len(noise) * dim)

    @pytest.mark.parametrize("which", NORMS)
    def test_gaussian_is_a_thousandth(self, which):
        noise = self.start("gaussian", which, 0).flatten()
        assert float(noise.std()) == pytest.approx(0.001, rel=0.05)
        assert abs(float(noise.mean())) < 1e-4
        assert float(self.start("gaussian", which, 0, eps=1e-4).flatten(1).abs().max()) <= 1e-4 + 1e-7

    def test_zero_is_the_image(self):
        assert float(self.start("zero", "linf", 0).abs().max()) == 0.0


def test_nothing_of_the_callers_is_touched():
    net = network(torch.float32)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    x, y = images()
    x_before, delta = x.clone(), torch.full_like(x, 0.02)
    pgd(objectives.cross_entropy(net, y), x, eps=0.1, step_size=0.05, steps=3, init=delta)
    fgsm(objectives.cross_entropy(net, y), x, eps=0.1)
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(delta, torch.full_like(x, 0.02))
    for parameter in net.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))


def test_images_that_require_gradients_keep_theirs():
    x, _ = images()
    x.requires_grad_(True)
    x_adv = pgd(total, x, eps=0.1, step_size=0.05, steps=2)
    assert x.grad is None
    assert x.requires_grad
    assert not x_adv.requires_grad


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_it_works_where_the_caller_has_no_gradients(outside):
    """Lightning's validation and test loops."""
    net = network(torch.float32)
    x, y = images()
    expected = pgd(objectives.cross_entropy(net, y), x, eps=0.1, step_size=0.03, steps=3, init="zero")
    with outside():
        assert torch.equal(
            pgd(objectives.cross_entropy(net, y), x, eps=0.1, step_size=0.03, steps=3, init="zero"), expected
        )
        inner = x + 0.0  # under inference_mode an inference tensor
        x_adv = pgd(objectives.cross_entropy(net, y), inner, eps=0.1, step_size=0.03, steps=3, init="zero")
        assert torch.equal(x_adv, expected)
    assert not x_adv.is_inference(), "the result can be trained on"


def test_radii_and_steps_may_be_fractions_or_per_sample():
    x = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    arguments = {"steps": 1, "init": "zero"}
    written = pgd(total, x, eps="8/255", step_size="2/255", **arguments)
    torch.testing.assert_close(written, x + 2 / 255, rtol=0, atol=1e-15)
    eps = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    each = pgd(total, x, eps=eps, step_size=torch.tensor([0.3, 0.05, 0.3], dtype=torch.float64), **arguments)
    torch.testing.assert_close(each.flatten(1)[:, 0], torch.tensor([0.5, 0.55, 0.7], dtype=torch.float64))


GOOD = {"eps": 0.1, "step_size": 0.05, "steps": 2}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": -0.125}, "-0.125"),
        ({"eps": float("nan")}, "nan"),
        ({"eps": float("inf")}, "inf"),
        ({"eps": 8.0}, "8"),
        ({"eps": "-8/255"}, "-8/255"),
        ({"eps": "eight"}, "eight"),
        ({"step_size": 0.0}, "0"),
        ({"step_size": -0.0625}, "-0.0625"),
        ({"step_size": float("nan")}, "nan"),
        ({"step_size": float("inf")}, "inf"),
        ({"step_size": 8}, r"attack.step_size=8: pixels are in \[0, 1\]; did you mean 8/255\?"),
        ({"eps": torch.tensor([0.1, -0.125])}, "attack.eps=-0.125"),
        ({"eps": torch.tensor([float("nan"), 0.1])}, "attack.eps=nan"),
        ({"eps": torch.tensor([0.1, float("inf")])}, "attack.eps=inf"),
        ({"eps": torch.tensor([0.1, 8.0])}, "attack.eps=8.0: .* did you mean 8.0/255"),
        ({"eps": torch.tensor(0.1)}, r"attack.eps of shape \[\]: expected a number, or one per sample \[2\]"),
        ({"eps": torch.full((3,), 0.1)}, r"attack.eps of shape \[3\]: .* \[2\]"),
        ({"eps": torch.full((2, 1, 1, 1), 0.1)}, r"attack.eps of shape \[2, 1, 1, 1\]"),
        ({"step_size": torch.tensor([0.1, 0.0])}, "attack.step_size=0.0"),
        ({"step_size": torch.tensor([0.1, -0.125])}, "attack.step_size=-0.125"),
        ({"step_size": torch.tensor([float("nan"), 0.1])}, "attack.step_size=nan"),
        ({"step_size": torch.tensor([0.1, 2.0])}, "attack.step_size=2.0: .* did you mean 2.0/255"),
        ({"step_size": torch.full((1,), 0.1)}, r"attack.step_size of shape \[1\]: .* \[2\]"),
        ({"steps": -3}, "-3"),
        ({"norm": "l1"}, "l1"),
        ({"init": "sobol"}, "sobol"),
        ({"iterate": "best"}, "best"),
    ],
    ids=lambda v: (
        "-".join(f"{k}={getattr(x, 'tolist', lambda x=x: x)()}" for k, x in v.items()) if isinstance(v, dict) else ""
    ),
)
def test_invalid_arguments_are_named(change, named):
    x, _ = images(2)
    with pytest.raises(ValueError, match=named):
        pgd(total, x, **{**GOOD, **change})
    if set(change) <= {"eps", "norm"} and not isinstance(change.get("eps"), torch.Tensor):
        with pytest.raises(ValueError, match=named):
            fgsm(total, x, **{"eps": 0.1, **change})


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.tensor([[0.5, 1.5]]), "1.5"),
        (torch.tensor([[-0.25, 0.5]]), "-0.25"),
        (torch.tensor([[0.5, float("nan")]]), "nan"),
        (torch.tensor([[0.5, float("inf")]]), "inf"),
        (torch.tensor([[0, 1]]), "int64"),
        (torch.tensor([[0, 255]], dtype=torch.uint8), "uint8"),
    ],
    ids=["above", "below", "nan", "inf", "int64", "uint8"],
)
def test_invalid_images_are_named(x, named):
    with pytest.raises(ValueError, match=named):
        pgd(total, x, **GOOD)
    with pytest.raises(ValueError, match=named):
        fgsm(total, x, eps=0.1)


def test_a_start_of_another_shape_is_refused():
    x, _ = images(4)
    with pytest.raises((ValueError, RuntimeError)):
        pgd(total, x, **GOOD, init=torch.zeros(3, 3, 3, 3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_per_sample_are_those_of_a_batch_each(norm):
    x, y = images(3, torch.float64)
    net = network(torch.float64)
    eps, step = torch.tensor([0.0, 0.1, 0.3], dtype=x.dtype), torch.tensor([0.05, 0.02, 0.1], dtype=x.dtype)
    start = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    together = pgd(objectives.cross_entropy(net, y), x, eps=eps, step_size=step, steps=3, norm=norm, init=start)
    for i in range(3):
        own, sizes = slice(i, i + 1), {"eps": float(eps[i]), "step_size": float(step[i])}
        alone = pgd(objectives.cross_entropy(net, y[own]), x[own], **sizes, steps=3, norm=norm, init=start[own])
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-12)


def test_values_per_sample_on_an_accelerator_are_not_looked_at():
    """There it would wait for the device; the shape is known to the host."""
    values = torch.full((3,), -1.0, device="meta")
    assert check_eps(values, "linf", 3) is values
    assert check_step(values, 2, "linf", 3) is values
    for wrong in (lambda: check_eps(values, "linf", 2), lambda: check_step(values, 2, "linf", 2)):
        with pytest.raises(ValueError, match=r"of shape \[3\]: expected a number, or one per sample \[2\]"):
            wrong()


def test_an_empty_batch_has_no_radii():
    x = torch.zeros(0, 1, 2, 2)
    assert pgd(total, x, eps=torch.zeros(0), step_size=torch.zeros(0), steps=1, init="zero").shape == x.shape


BUDGETS = {"attack": InnerMaximisation, "evaluation": PGD}


@pytest.mark.parametrize("kind", BUDGETS)
def test_an_l2_step_may_be_long_but_not_longer_than_the_ball_is_wide(kind):
    """A length grows with the number of pixels, so that only eps says what is too long."""
    make = BUDGETS[kind]
    assert make(norm="l2", eps=3.0, step_size=1.5, steps=10).step_size == 1.5
    assert make(norm="l2", eps=3.0, step_size=6.0, steps=10).step_size == 6.0
    assert make(norm="l2", eps=0.1, step_size=1.0, steps=10).step_size == 1.0
    assert make(norm="l2", eps=0.0, step_size=15, steps=10).step_size == 15
    with pytest.raises(ValueError, match=r"attack.step_size=15: the l2 ball of .*=0.501961 .* did you mean 15/255\?"):
        make(norm="l2", eps="128/255", step_size=15, steps=20)
    for step in (8, 1.001):
        with pytest.raises(ValueError, match=rf"attack.step_size={step}: pixels .* did you mean {step}/255\?"):
            make(norm="linf", eps="8/255", step_size=step, steps=10)
    assert make(norm="linf", eps=1.0, step_size=1, steps=1).step_size == 1.0


def test_a_radius_that_grows_may_be_shorter_than_its_step():
    budget = InnerMaximisation(norm="l2", eps=3.0, step_size=1.5, steps=10, warmup_epochs=5)
    assert replace(budget, eps=budget.eps_at(0.1)).eps == pytest.approx(0.06)
