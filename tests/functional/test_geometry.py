"""Norms of perturbations and the projection: into the ball, then into [0, 1]."""

import math

import pytest
import torch

from mi_at.functional.geometry import ascent_direction, norm, parse_eps, project, start_noise
from tests.references import attacks as ref

NORMS = ["linf", "l2"]


def batch(seed: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 3, 4, 5, generator=g, dtype=torch.float64)
    delta = size * torch.randn(6, 3, 4, 5, generator=g, dtype=torch.float64)
    delta[0] = 0.0
    return x.to(dtype), (x + delta).to(dtype)


@pytest.mark.parametrize("which", NORMS)
def test_norm_per_sample(which):
    x, x_adv = batch(0)
    values = norm(x_adv - x, which)
    assert values.shape == (6,)
    for i in range(6):
        assert float(values[i]) == pytest.approx(ref.norm(x_adv[i] - x[i], which), abs=1e-12)
    assert float(values[0]) == 0.0
    three, four = torch.tensor([[3.0, -4.0]]), {"linf": 4.0, "l2": 5.0}
    assert float(norm(three, which)) == four[which]


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("size", [0.005, 0.2, 3.0])
def test_project_equals_the_transcription(which, eps, size):
    x, x_adv = batch(1, size=size)
    expected = torch.stack([ref.project(x_adv[i], x[i], eps, which) for i in range(6)])
    torch.testing.assert_close(project(x_adv, x, eps, which), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_keeps_budget_and_range(which, dtype):
    for seed in range(20):
        x, x_adv = batch(seed, dtype)
        out = project(x_adv, x, 8 / 255, which)
        assert out.dtype == dtype
        assert (norm(out - x, which) <= 8 / 255 + 1e-6).all()
        assert float(out.min()) >= 0.0
        assert float(out.max()) <= 1.0


@pytest.mark.parametrize("which", NORMS)
def test_project_twice_is_project_once(which):
    x, x_adv = batch(2)
    once = project(x_adv, x, 0.3, which)
    torch.testing.assert_close(project(once, x, 0.3, which), once, rtol=0, atol=1e-15)


@pytest.mark.parametrize("which", NORMS)
def test_what_lies_inside_is_left_alone(which):
    x = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.1
    assert torch.equal(project(x_adv, x, 0.2, which), x_adv)
    assert torch.equal(project(x, x, 0.0, which), x)


def test_the_ball_comes_first_then_the_range():
    """From (0.9, 0.5) a move of (0.3, 0.4) in l2 0.25 is (0.15, 0.2); then the first pixel stops at 1."""
    x = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
    out = project(x + torch.tensor([[0.3, 0.4]], dtype=torch.float64), x, 0.25, "l2")
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.7]], dtype=torch.float64), rtol=0, atol=1e-15)
    out = project(x + torch.tensor([[0.3, -0.9]], dtype=torch.float64), x, 0.25, "linf")
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.25]], dtype=torch.float64), rtol=0, atol=1e-15)


def test_l2_projection_lands_on_the_sphere_and_keeps_the_direction():
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    delta = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = project(x + delta, x, 0.3, "l2") - x
    for i in range(3):
        assert math.sqrt(float((moved[i] ** 2).sum())) == pytest.approx(0.3, abs=1e-12)
        cosine = float((moved[i] * delta[i]).sum()) / (0.3 * math.sqrt(float((delta[i] ** 2).sum())))
        assert cosine == pytest.approx(1.0, abs=1e-12)


def test_samples_are_projected_one_by_one():
    x, x_adv = batch(3)
    whole = project(x_adv, x, 0.5, "l2")
    for i in range(6):
        torch.testing.assert_close(project(x_adv[i : i + 1], x[i : i + 1], 0.5, "l2"), whole[i : i + 1])


@pytest.mark.parametrize("which", NORMS)
def test_project_writes_to_nothing(which):
    x, x_adv = batch(4)
    x_before, adv_before = x.clone(), x_adv.clone()
    project(x_adv, x, 0.1, which)
    assert torch.equal(x, x_before)
    assert torch.equal(x_adv, adv_before)


def test_an_unknown_norm_is_named():
    x, x_adv = batch(5)
    with pytest.raises(ValueError, match="l7"):
        norm(x_adv - x, "l7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="l7"):
        project(x_adv, x, 0.1, "l7")  # type: ignore[arg-type]


@pytest.mark.parametrize("which", NORMS)
def test_radii_may_differ_per_sample(which):
    x, x_adv = batch(6)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.3, 1.0, 100.0], dtype=torch.float64)
    expected = torch.stack([ref.project(x_adv[i], x[i], float(eps[i]), which) for i in range(6)])
    torch.testing.assert_close(project(x_adv, x, eps, which), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_direction_of_ascent(which, size, dtype):
    """Unit length whatever the size of the gradient, which underflows when squared; zero where it is zero."""
    g = torch.Generator().manual_seed(0)
    gradient = (torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64)).to(dtype)
    gradient[1] = 0.0
    gradient[2, 0] = 0.0
    direction = ascent_direction(size * gradient, which)
    unit = torch.stack(
        [ref.ascend(torch.zeros(2, 3, 3, dtype=torch.float64), gradient[i].double(), 1.0, which) for i in range(4)]
    )
    assert direction.dtype == dtype
    torch.testing.assert_close(direction.double(), unit, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


class TestStartNoise:
    eps = 0.25

    def draw(self, kind: str, which: str, n: int = 4000, dim: int = 3) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        u = torch.rand(n, 1, dim, generator=g, dtype=torch.float64)
        z = torch.randn(n, 1, dim, generator=g, dtype=torch.float64)
        return start_noise(kind, u, z, self.eps, which)

    @pytest.mark.parametrize("which", NORMS)
    def test_zero_and_gaussian(self, which):
        assert torch.equal(self.draw("zero", which), torch.zeros(4000, 1, 3, dtype=torch.float64))
        noise = self.draw("gaussian", which)  # 0.001 N(0, I), whatever the norm and the radius
        assert float(noise.std()) == pytest.approx(0.001, rel=0.05)
        assert abs(float(noise.mean())) < 5e-5

    def test_uniform_in_the_cube(self):
        noise = self.draw("uniform", "linf").flatten()
        assert float(noise.abs().max()) <= self.eps
        ordered = (noise.sort().values / self.eps + 1) / 2
        grid = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((ordered - grid).abs().max()) * math.sqrt(len(ordered)) < 1.95

    @pytest.mark.parametrize("dim", [1, 2, 3, 8])
    def test_uniform_in_the_ball(self, dim):
        """The share of the ball's volume inside each point's radius is uniform, and the directions cancel."""
        noise = self.draw("uniform", "l2", dim=dim).flatten(1)
        radius = noise.square().sum(1).sqrt()
        assert float(radius.max()) <= self.eps * (1 + 1e-12)
        ordered = (radius / self.eps).pow(dim).sort().values
        grid = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((ordered - grid).abs().max()) * math.sqrt(len(ordered)) < 1.95
        unit = noise / radius[:, None]
        assert float(unit.mean(0).abs().max()) < 5 / math.sqrt(len(unit) * dim)
        second = unit.T @ unit / len(unit)
        torch.testing.assert_close(second, torch.eye(dim, dtype=torch.float64) / dim, rtol=0, atol=0.05)

    def test_an_unknown_start_is_named(self):
        with pytest.raises(ValueError, match="sobol"):
            self.draw("sobol", "linf")


def test_a_radius_may_be_written_as_a_fraction():
    assert parse_eps("8/255") == 8 / 255
    assert parse_eps(" 8 / 255 ") == 8 / 255
    assert parse_eps("0.031") == 0.031
    assert parse_eps(0.5) == 0.5
    assert parse_eps(1) == 1.0
    for wrong in ("8/0", "eight", ""):
        with pytest.raises(ValueError, match="fraction"):
            parse_eps(wrong)
