"""MIGE: scores of known densities, gradients of known information, and the transcription."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mi_at.estimators.mige import mige_mutual_information, spectral_stein_score
from tests.references import namid as ref


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "dim", "share"), [(8, 1, 0.99), (13, 3, 0.9), (6, 2, 1.0)])
def test_the_score_equals_its_transcription(count: int, dim: int, share: float) -> None:
    x = 2 * normal(count, dim, seed=count) + 1
    expected = ref.spectral_stein_score(x, share)
    torch.testing.assert_close(spectral_stein_score(x, share=share), expected, rtol=1e-6, atol=1e-8)


def test_the_score_of_a_gaussian() -> None:
    x = 1 + 2 * normal(500, 2)
    found, exact = spectral_stein_score(x), -(x - 1) / 4
    assert (found - exact).square().mean() < 0.15 * exact.square().mean()
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.95


def information_gradient(rho: float, dim: int, *, count: int = 500, seed: int = 0) -> float:
    """d/d rho of the estimate for z' = rho z + sqrt(1 - rho^2) e."""
    r = torch.tensor(rho, dtype=torch.float64, requires_grad=True)
    z, e = normal(2, count, dim, seed=seed)
    value = mige_mutual_information(z, r * z + (1 - r**2).sqrt() * e)
    return torch.autograd.grad(value, r)[0].item()


@pytest.mark.parametrize("rho", [-0.8, 0.5, 0.8])
def test_the_gradient_of_correlated_gaussians(rho: float) -> None:
    """I = -d/2 ln(1 - rho^2), so dI/d rho = d rho / (1 - rho^2)."""
    assert information_gradient(rho, 2) == pytest.approx(2 * rho / (1 - rho**2), rel=0.2)


def test_independent_variables_attract_nothing() -> None:
    assert abs(information_gradient(0.0, 2)) < 0.15


def test_a_bijection_of_one_side_changes_nothing() -> None:
    """Scale and shift of z' leave the information and its derivative along rho as they are."""
    r = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    z, e = normal(2, 400, 1)
    z2 = r * z + (1 - r**2).sqrt() * e
    (plain,) = torch.autograd.grad(mige_mutual_information(z, z2), r, retain_graph=True)
    (moved,) = torch.autograd.grad(mige_mutual_information(z, 3 - z2), r)
    assert plain.item() == pytest.approx(moved.item(), rel=1e-6)


def test_both_sides_get_gradients_along_the_difference_of_scores() -> None:
    z, z2 = normal(30, 2).requires_grad_(), normal(30, 3, seed=1).requires_grad_()
    value = mige_mutual_information(z, z2)
    assert value.item() == 0.0
    found = torch.autograd.grad(value, (z, z2))
    joint = spectral_stein_score(torch.cat([z, z2], dim=1)) / 30
    for gradient, score, own in zip(found, joint.split([2, 3], dim=1), (z, z2), strict=True):
        torch.testing.assert_close(gradient, score - spectral_stein_score(own) / 30)


def test_equal_samples_stay_finite() -> None:
    z = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mige_mutual_information(z, z.detach()), z)
    assert gradient.isfinite().all()


def test_float32_goes_in_and_comes_back() -> None:
    z = normal(20, 2).float().requires_grad_()
    (gradient,) = torch.autograd.grad(mige_mutual_information(z, z.detach() + 1), z)
    assert gradient.dtype == torch.float32
    assert math.isfinite(gradient.sum().item())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="as many rows"):
        mige_mutual_information(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"samples \[M, d\] with M of 2 or more"):
        spectral_stein_score(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"share=0: expected a share in \(0, 1\]"):
        spectral_stein_score(torch.zeros(3, 2), share=0)
