"""Conditional mutual information, separation and their quotient (robust NCMI eq. 15-18)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mi_at.functional.information import (
    LOG_FLOOR,
    class_means,
    class_sums,
    conditional_mutual_information,
    normalized_cmi,
    separation,
)
from tests.references import cases as inputs
from tests.references import ncmi as ref
from tests.references.losses import rows

# (samples, classes, scale of the logits, labels balanced or not); at scale 30 the clamp of the logarithm acts.
CASES = [
    (n, c, scale, balanced)
    for n, c in [(4, 2), (9, 3), (24, 10)]
    for scale in (0.5, 3.0, 30.0)
    for balanced in (True, False)
]


def case(n: int, classes: int, scale: float, balanced: bool) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels; unbalanced: a class has half the samples, some have none."""
    z, _, _ = inputs.draw(n, classes, seed=n, scale=scale)
    y = torch.arange(n) % classes if balanced else (torch.arange(n) % (2 * classes)).clamp_max(classes - 1)
    if not balanced and classes > 2:
        y[y == 1] = 0
    return z.softmax(dim=1), y


@pytest.mark.parametrize(("n", "classes", "scale", "balanced"), CASES)
def test_values_equal_the_transcription(n: int, classes: int, scale: float, balanced: bool) -> None:
    p, y = case(n, classes, scale, balanced)
    table, labels = rows(p), y.tolist()
    cmi, gamma = ref.cmi(table, labels), ref.separation(table, labels)
    assert conditional_mutual_information(p, y, classes).item() == pytest.approx(cmi, abs=1e-10)
    assert separation(p, y, classes).item() == pytest.approx(gamma, abs=1e-10)
    assert separation(p, y, classes, norm="pairs").item() == pytest.approx(
        ref.separation(table, labels, pairs=True), abs=1e-10
    )
    assert normalized_cmi(p, y, classes).item() == pytest.approx(cmi / gamma, abs=1e-10)
    means, counts = class_means(p, y, classes)
    for label in range(classes):
        assert counts[label] == labels.count(label)
        expected = ref.centroid(table, labels, label) if label in labels else [0.0] * classes
        assert means[label].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("norm", ["batch_sq", "pairs"])
def test_gradients_of_the_separation_equal_the_transcription(norm: str, detach: bool) -> None:
    p, y = case(9, 3, 3.0, balanced=False)
    p.requires_grad_(True)
    (got,) = torch.autograd.grad(separation(p, y, 3, norm=norm, detach_log=detach), p)
    logs = rows(p.detach()) if detach else None
    value = ref.separation(rows(p, grad=True), y.tolist(), pairs=norm == "pairs", logs=logs)
    (want,) = torch.autograd.grad(value, p)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    p, y = case(6, 3, 1.0, balanced=True)
    p.requires_grad_(True)
    for function in (conditional_mutual_information, separation, normalized_cmi):
        assert gradcheck(lambda q, f=function: f(q, y, 3), (p,))


def test_clusters_of_one_point_have_no_width() -> None:
    y = torch.tensor([0, 1, 1, 2, 2, 2])
    points = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0]], dtype=torch.float64)
    assert abs(conditional_mutual_information(points[y], y, 3).item()) < 1e-15
    assert normalized_cmi(points[y], y, 3).item() == pytest.approx(0.0, abs=1e-15)


def test_the_widest_cluster_is_spread_over_all_classes() -> None:
    """One class whose outputs are every one-hot vector once: I = ln C."""
    assert conditional_mutual_information(torch.eye(5), torch.zeros(5, dtype=torch.int64), 5).item() == pytest.approx(
        math.log(5), abs=1e-6
    )


def test_separation_of_uniform_and_of_one_hot_outputs() -> None:
    y = torch.tensor([0, 0, 0, 1])  # 6 of 16 ordered pairs differ
    uniform = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert separation(uniform, y, 2).item() == pytest.approx(6 / 16 * math.log(4), abs=1e-12)
    assert separation(uniform, y, 2, norm="pairs").item() == pytest.approx(math.log(4), abs=1e-12)
    one_hot = torch.eye(2, dtype=torch.float64)[y]
    assert separation(one_hot, y, 2).item() == pytest.approx(-6 / 16 * math.log(LOG_FLOOR), abs=1e-9)


def test_one_class_is_not_separated_from_itself() -> None:
    p, _ = case(24, 10, 30.0, balanced=True)
    y = torch.full((24,), 7)
    assert separation(p, y, 10).item() == 0
    assert separation(p, y, 10, norm="pairs").item() == 0
    assert separation(p.float(), y, 10).item() == 0  # nothing is left over by cancellation
    assert normalized_cmi(p, y, 10).item() == math.inf


def test_width_around_other_centres_is_larger_by_their_distance() -> None:
    """Eq. 51: mean D(f || Q) = I + mean D(s || Q)."""
    p, y = case(24, 10, 3.0, balanced=False)
    q = torch.rand(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(dim=1)
    means, _ = class_means(p, y, 10)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(dim=1).mean()

    left = divergence(p, q[y])
    right = conditional_mutual_information(p, y, 10) + divergence(means[y], q[y])
    assert left.item() == pytest.approx(right.item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ranges_and_invariance_under_order(seed: int) -> None:
    p, y = case(24, 10, 3.0, balanced=seed % 2 == 0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    for function in (conditional_mutual_information, separation, normalized_cmi):
        value = function(p, y, 10)
        assert value >= 0
        assert function(p[order], y[order], 10).item() == pytest.approx(value.item(), abs=1e-12)
    assert conditional_mutual_information(p, y, 10) <= math.log(10)


def test_float32_is_close_to_float64() -> None:
    p, y = case(24, 10, 3.0, balanced=True)
    for function in (conditional_mutual_information, separation, normalized_cmi):
        assert function(p.float(), y, 10).item() == pytest.approx(function(p, y, 10).item(), rel=1e-5)


def test_saturated_outputs_have_finite_gradients() -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 1, 1])
    value = conditional_mutual_information(p, y, 2) + separation(p, y, 2)
    (gradient,) = torch.autograd.grad(value, p)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_the_arguments_are_left_alone() -> None:
    p, y = case(9, 3, 3.0, balanced=True)
    before = p.clone(), y.clone()
    normalized_cmi(p, y, 3)
    assert torch.equal(p, before[0])
    assert torch.equal(y, before[1])


def test_bad_input() -> None:
    p, y = torch.full((2, 3), 1 / 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"norm='sum': expected one of batch_sq, pairs"):
        separation(p, y, 3, norm="sum")
    for function in (conditional_mutual_information, separation, normalized_cmi):
        with pytest.raises(ValueError, match=r"expected \[B, C\] probabilities with B > 0, got \(0, 3\)"):
            function(p[:0], y[:0], 3)
        with pytest.raises(ValueError, match=r"expected \[B, C\] probabilities"):
            function(p[0], y, 3)
        with pytest.raises(ValueError, match=r"one label per row, got \(1,\) labels for \(2, 3\)"):
            function(p, y[:1], 3)
    with pytest.raises(ValueError, match="one label per row"):
        class_sums(p, torch.zeros(2, 3, dtype=torch.int64), 3)
    for function in (conditional_mutual_information, separation, normalized_cmi):
        with pytest.raises(ValueError, match=r"labels in \[0, 3\), the number of classes"):
            function(p, y + 3, 3)
        with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
            function(p, y - 3, 3)
        with pytest.raises(ValueError, match=r"expected int64 labels, got torch.float64: labels.long\(\)"):
            function(p, y.double(), 3)
        with pytest.raises(ValueError, match=r"expected probabilities.*pass softmax\(logits\), once"):
            function(3 * p, y, 3)


def test_not_a_number_is_the_training_s_to_tell() -> None:
    p = torch.full((2, 3), 1 / 3)
    p[0, 0] = math.nan
    for function in (conditional_mutual_information, separation, normalized_cmi):
        assert function(p, torch.tensor([0, 1]), 3).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_kept_inside(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(4096, 10, generator=generator).softmax(dim=1).to(dtype)
    y = torch.randint(10, (4096,), generator=generator)
    for function in (conditional_mutual_information, separation, normalized_cmi):
        found = function(p, y, 10)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), function(p.double(), y, 10), rtol=1e-4, atol=0)
