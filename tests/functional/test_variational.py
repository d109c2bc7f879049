"""Bounds of mutual information: transcriptions, gradients, what they promise, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from mi_at.functional import selection, variational
from tests.references import namid as ref


def scores(count: int, locations: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, count, locations, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("count", "locations", "scale"), [(2, 1, 1.0), (3, 4, 2.0), (7, 2, 30.0)])
def test_bounds_equal_their_transcriptions(count: int, locations: int, scale: float) -> None:
    u = scores(count, locations, count, scale)
    literal = ref.numbers(u)
    local = variational.local_donsker_varadhan(u)
    assert local.tolist() == pytest.approx(ref.local_donsker_varadhan(literal), abs=1e-9)
    assert variational.pooled_donsker_varadhan(u).item() == pytest.approx(
        ref.pooled_donsker_varadhan(literal), abs=1e-9
    )
    plane = [[cell[0] for cell in row] for row in literal]
    assert variational.info_nce(u[:, :, 0]).item() == pytest.approx(ref.info_nce(plane), abs=1e-9)
    first, second = u[:, 0, 0], u[0].flatten()
    expected = ref.donsker_varadhan(first.tolist(), second.tolist())
    assert variational.donsker_varadhan(first, second).item() == pytest.approx(expected, abs=1e-9)


def test_gradients() -> None:
    u = scores(4, 3, 0).requires_grad_()
    assert gradcheck(variational.local_donsker_varadhan, (u,))
    assert gradcheck(variational.pooled_donsker_varadhan, (u,))
    assert gradcheck(lambda v: variational.info_nce(v[:, :, 0]), (u,))
    assert gradcheck(lambda v: variational.donsker_varadhan(v[0, :, 0], v[1, :, 1]), (u,))


def test_a_constant_critic_sees_nothing_and_a_shift_changes_nothing() -> None:
    flat = torch.full((5, 5, 2), 3.0, dtype=torch.float64)
    assert variational.local_donsker_varadhan(flat).abs().max() < 1e-12
    u = scores(5, 2, 1)
    for bound in (variational.local_donsker_varadhan, variational.pooled_donsker_varadhan):
        torch.testing.assert_close(bound(u + 7.0), bound(u))


def test_pooled_is_at_most_the_mean_of_the_local_ones() -> None:
    for seed in range(5):
        u = scores(6, 3, seed)
        assert variational.pooled_donsker_varadhan(u) <= variational.local_donsker_varadhan(u).mean() + 1e-12
    equal = scores(1, 3, 0).expand(6, 6, 3) + 5 * torch.eye(6)[:, :, None]
    torch.testing.assert_close(
        variational.pooled_donsker_varadhan(equal), variational.local_donsker_varadhan(equal).mean()
    )


def test_own_patches_are_no_negatives() -> None:
    u = scores(4, 2, 2)
    higher = u + 100 * torch.eye(4, dtype=torch.float64)[:, :, None]
    torch.testing.assert_close(
        variational.local_donsker_varadhan(higher), variational.local_donsker_varadhan(u) + 100.0
    )


def test_info_nce_is_at_most_the_logarithm_of_the_batch() -> None:
    for seed in range(5):
        assert variational.info_nce(scores(6, 1, seed, 50.0)[:, :, 0]) <= math.log(6) + 1e-12


def test_the_optimal_critic_gives_the_information_of_gaussians() -> None:
    """T = ln p(x, y) / p(x) p(y) reaches the information -1/2 ln(1 - rho^2)."""
    rho, generator = 0.7, torch.Generator().manual_seed(0)
    x, e, y2 = torch.randn(3, 20000, generator=generator, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * e

    def ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (2 * rho * a * b - rho**2 * (a**2 + b**2)) / (2 * (1 - rho**2)) - 0.5 * math.log(1 - rho**2)

    found = variational.donsker_varadhan(ratio(x, y), ratio(x, y2))
    assert found.item() == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.02)


@pytest.mark.parametrize("bound", [variational.local_donsker_varadhan, variational.pooled_donsker_varadhan])
def test_bad_scores(bound) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="one sample has no negatives: use batches of 2 or more"):
        bound(torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match=r"expected scores \[B, B, L\], got \(2, 3, 1\)"):
        bound(torch.zeros(2, 3, 1))


def test_bad_vectors() -> None:
    with pytest.raises(ValueError, match="two vectors of scores"):
        variational.donsker_varadhan(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="two vectors of scores"):
        variational.donsker_varadhan(torch.zeros(0), torch.zeros(2))
    with pytest.raises(ValueError, match="square"):
        variational.info_nce(torch.zeros(2, 3))


# ---------------------------------------------------------------- selected parts of a batch
def test_selection_is_that_of_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    z, z_adv = torch.randn(2, 50, 4, generator=generator)
    y = torch.randint(4, (50,), generator=generator)
    found = selection.broken_by_attack(z, z_adv, y).tolist()
    assert found == ref.selection(z.tolist(), z_adv.tolist(), y.tolist())
    assert 0 < sum(found) < 50


def test_an_empty_selection_has_zero_gradients() -> None:
    a, b = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))
    for selected in (torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, False, False])):
        cosine, known = selection.selected_cosine(a, b, selected)
        assert (cosine.item(), known.item()) == (1.0, False)
        for gradient in torch.autograd.grad(cosine, (a, b)):
            assert torch.equal(gradient, torch.zeros(4, dtype=torch.float64))
    mean = selection.selected_mean(a, torch.zeros(4, dtype=torch.bool))
    assert mean.item() == 0.0
    assert torch.equal(torch.autograd.grad(mean, a)[0], torch.zeros(4, dtype=torch.float64))


def test_what_is_not_selected_does_not_matter_even_if_it_is_not_finite() -> None:
    selected = torch.tensor([True, True, False])
    a = torch.tensor([1.0, 2.0, math.nan]).requires_grad_()
    b = torch.tensor([2.0, 1.0, math.inf])
    cosine, known = selection.selected_cosine(a, b, selected)
    assert cosine.item() == pytest.approx(0.8)
    assert known.item()
    (gradient,) = torch.autograd.grad(cosine + selection.selected_mean(a, selected), a)
    assert gradient.isfinite().all()
    assert selection.selected_mean(a.detach(), selected).item() == 1.5


def test_gradients_of_selected_values() -> None:
    selected = torch.tensor([True, False, True, True])
    a, b = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert gradcheck(lambda v, w: selection.selected_cosine(v, w, selected)[0], (a, b))
    assert gradcheck(lambda v: selection.selected_mean(v, selected), (a,))


def test_a_vector_of_zeros_has_no_direction() -> None:
    cosine, known = selection.selected_cosine(torch.zeros(3), torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert (cosine.item(), known.item()) == (1.0, False)
