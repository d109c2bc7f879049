"""Cross-entropy, boosted cross-entropy and KL against their equations."""

import math

import pytest
import torch
from torch import distributions
from torch.autograd import gradcheck

from mi_at.functional.divergences import (
    boosted_cross_entropy,
    cross_entropy,
    kl_divergence,
    kl_to_standard_normal,
    symmetrised_kl,
)
from tests.references import cases as inputs
from tests.references import losses as ref

CASES = inputs.cases()
IDS = [c[0] for c in CASES]
DTYPE = torch.float64


@pytest.mark.parametrize(("name", "z", "z_adv", "y"), CASES, ids=IDS)
def test_values_equal_the_transcription(name, z, z_adv, y):
    labels, rows, rows_adv = y.tolist(), ref.rows(z), ref.rows(z_adv)
    for function, literal in (
        (cross_entropy, ref.cross_entropy),
        (boosted_cross_entropy, ref.boosted_cross_entropy),
    ):
        expected = [literal(rows[i], labels[i]) for i in range(len(labels))]
        per_sample = function(z, y, reduction="none")
        assert per_sample.shape == y.shape
        torch.testing.assert_close(per_sample, torch.tensor(expected, dtype=DTYPE), rtol=0, atol=1e-10)
        assert float(function(z, y, reduction="mean")) == pytest.approx(sum(expected) / len(expected), abs=1e-10)
        assert float(function(z, y)) == pytest.approx(sum(expected) / len(expected), abs=1e-10)
    expected = [ref.kl(rows[i], rows_adv[i]) for i in range(len(labels))]
    per_sample = kl_divergence(z, z_adv, reduction="none")
    assert per_sample.shape == y.shape
    torch.testing.assert_close(per_sample, torch.tensor(expected, dtype=DTYPE), rtol=0, atol=1e-10)
    assert float(kl_divergence(z, z_adv)) == pytest.approx(sum(expected) / len(expected), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_the_transcription(seed):
    z, z_adv, y = inputs.draw(3, 4, seed)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    labels = y.tolist()
    rows, rows_adv = ref.rows(z, grad=True), ref.rows(z_adv, grad=True)
    pairs = [
        (cross_entropy(z, y), ref.mean([ref.cross_entropy(rows[i], labels[i]) for i in range(3)])),
        (
            boosted_cross_entropy(z, y),
            ref.mean([ref.boosted_cross_entropy(rows[i], labels[i]) for i in range(3)]),
        ),
        (kl_divergence(z, z_adv), ref.mean([ref.kl(rows[i], rows_adv[i]) for i in range(3)])),
    ]
    for value, expected in pairs:
        got = torch.autograd.grad(value, (z, z_adv), allow_unused=True, retain_graph=True)
        want = torch.autograd.grad(expected, (z, z_adv), allow_unused=True, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 3), (3, 10)])
def test_gradcheck(batch, classes):
    z, z_adv, y = inputs.draw(batch, classes, 5)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    assert gradcheck(lambda a: cross_entropy(a, y), (z,))
    assert gradcheck(lambda a: boosted_cross_entropy(a, y), (z,))
    assert gradcheck(lambda a, b: kl_divergence(a, b), (z, z_adv))


def test_the_constants_of_the_boosted_term():
    """Certain and wrong: -log(1e-4 + 1e-12). Certain and right: -log(1.0001 + 1e-12)."""
    z = torch.tensor([[-80.0, 80.0], [80.0, -80.0]], dtype=DTYPE)
    margin = boosted_cross_entropy(z, torch.tensor([0, 0]), reduction="none") - cross_entropy(
        z, torch.tensor([0, 0]), reduction="none"
    )
    assert float(margin[0]) == pytest.approx(-math.log(1.0001 - 1.0 + 1e-12), abs=1e-10)
    assert float(margin[1]) == pytest.approx(-math.log(1.0001 + 1e-12), abs=1e-10)


def test_the_boosted_term_looks_at_the_best_wrong_class_only():
    y = torch.tensor([2])
    z = torch.tensor([[0.3, 1.2, 4.0, -1.0]], dtype=DTYPE, requires_grad=True)
    boost = boosted_cross_entropy(z, y) - cross_entropy(z, y)
    p = z.detach().softmax(-1)[0]
    assert float(boost.detach()) == pytest.approx(-math.log(1.0001 - float(p[1]) + 1e-12), abs=1e-12)


@pytest.mark.parametrize("size", [80.0, 1000.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_finite_in_float32_on_saturated_logits(size, classes):
    z, z_adv, y = inputs.extreme(classes, size, torch.float32)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    value = cross_entropy(z, y) + boosted_cross_entropy(z_adv, y) + kl_divergence(z, z_adv)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    for gradient in torch.autograd.grad(value, (z, z_adv)):
        assert torch.isfinite(gradient).all()


def test_float32_agrees_with_float64():
    z, z_adv, y = inputs.draw(17, 10, 3, 3.0)
    for a, b in (
        (cross_entropy(z.float(), y), cross_entropy(z, y)),
        (boosted_cross_entropy(z.float(), y), boosted_cross_entropy(z, y)),
        (kl_divergence(z.float(), z_adv.float()), kl_divergence(z, z_adv)),
    ):
        assert float(a) == pytest.approx(float(b), rel=1e-5)


def test_kl_is_zero_at_equality_positive_elsewhere_and_not_symmetric():
    z, z_adv, _ = inputs.draw(17, 10, 2)
    assert float(kl_divergence(z, z).abs()) < 1e-14
    assert float(kl_divergence(z, z + 7.0).abs()) < 1e-13  # a softmax does not see a shift
    assert (kl_divergence(z, z_adv, reduction="none") > 0).all()
    assert abs(float(kl_divergence(z, z_adv) - kl_divergence(z_adv, z))) > 1e-3


def test_kl_of_a_certain_to_a_flat_distribution_is_log_c():
    z = torch.tensor([[60.0, 0.0, 0.0, 0.0]], dtype=DTYPE)
    assert float(kl_divergence(z, torch.zeros(1, 4, dtype=DTYPE))) == pytest.approx(math.log(4), abs=1e-12)
    assert float(kl_divergence(torch.zeros(1, 4, dtype=DTYPE), z)) == pytest.approx(45 - math.log(4), abs=1e-12)


def test_classes_may_be_renamed_and_samples_reordered():
    z, z_adv, y = inputs.draw(9, 7, 4)
    g = torch.Generator().manual_seed(0)
    classes, order = torch.randperm(7, generator=g), torch.randperm(9, generator=g)
    renamed = torch.argsort(classes)[y]
    for function in (cross_entropy, boosted_cross_entropy):
        per_sample = function(z, y, reduction="none")
        torch.testing.assert_close(function(z[:, classes], renamed, reduction="none"), per_sample)
        torch.testing.assert_close(function(z[order], y[order], reduction="none"), per_sample[order])
    torch.testing.assert_close(kl_divergence(z[:, classes], z_adv[:, classes]), kl_divergence(z, z_adv))


@pytest.mark.parametrize("call", [
    lambda z, y: cross_entropy(z, y, reduction="sum_up"),  # type: ignore[arg-type]
    lambda z, y: boosted_cross_entropy(z, y, reduction="sum_up"),  # type: ignore[arg-type]
    lambda z, y: kl_divergence(z, z, reduction="sum_up"),  # type: ignore[arg-type]
])  # fmt: skip
def test_an_unknown_reduction_is_named(call):
    z, _, y = inputs.draw(2, 3, 0)
    with pytest.raises(ValueError, match="sum_up"):
        call(z, y)


# ---------------------------------------------------------------- Gaussians


def gaussians():
    generator = torch.Generator().manual_seed(0)
    mu, mu2 = torch.randn(2, 5, 4, generator=generator, dtype=DTYPE)
    sigma, sigma2 = torch.rand(2, 5, 4, generator=generator, dtype=DTYPE) + 0.3
    return mu, sigma, mu2, sigma2


def test_gaussians_equal_those_of_torch():
    mu, sigma, mu2, sigma2 = gaussians()
    p, q = distributions.Normal(mu, sigma), distributions.Normal(mu2, sigma2)
    both = distributions.kl_divergence(p, q) + distributions.kl_divergence(q, p)
    torch.testing.assert_close(symmetrised_kl(mu, sigma, mu2, sigma2, "none"), both.sum(dim=1) / 2)
    prior = distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(
        kl_to_standard_normal(mu, sigma, "none"), distributions.kl_divergence(p, prior).sum(dim=1)
    )


def test_gaussians_that_are_none_are_refused():
    mu, sigma, mu2, sigma2 = gaussians()
    with pytest.raises(ValueError, match=r"one shape \[B, d\], got \(5, 4\), \(5, 4\), \(1, 4\), \(5, 4\)"):
        symmetrised_kl(mu, sigma, mu2[:1], sigma2)
    with pytest.raises(ValueError, match=r"one shape \[B, d\], got \(4,\), \(4,\)"):
        kl_to_standard_normal(mu[0], sigma[0])
    for bad in (0 * sigma, -sigma, math.nan * sigma):
        with pytest.raises(ValueError, match="expected deviations > 0"):
            symmetrised_kl(mu, sigma, mu2, bad)
        with pytest.raises(ValueError, match="expected deviations > 0"):
            kl_to_standard_normal(mu, bad)
