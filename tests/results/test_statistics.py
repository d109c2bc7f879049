"""Paired differences, t intervals and Holm's rule, against known values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from mi_at.results.statistics import holm, mean_interval, paired_over_images, paired_over_seeds


def outcomes(n: int, share_a: float, share_b: float, overlap: float, rng: np.random.Generator) -> tuple:
    """Two correlated outcomes: with probability `overlap` both are decided by the same draw."""
    same = rng.random(n) < overlap
    u, v = rng.random(n), rng.random(n)
    return u < share_a, np.where(same, u, v) < share_b


def test_images_by_hand() -> None:
    # 3 gained, 1 lost of 10: difference .2. With half an image more in each cell 3.5 and 1.5 of 12: centre 2/12,
    # variance (5/12 - 1/36) / 12. McNemar: 2 P(X <= 1 | 4, 1/2) = 10/16.
    a = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0], bool)
    b = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    found = paired_over_images(a, b)
    assert found.value == pytest.approx(0.2)
    half = 1.959964 * math.sqrt((5 / 12 - 1 / 36) / 12)
    assert (found.low, found.high) == pytest.approx((1 / 6 - half, 1 / 6 + half), rel=1e-6)
    assert found.p == pytest.approx(10 / 16)
    assert not found.clear


def test_sides_change_the_sign_alone() -> None:
    a, b = outcomes(500, 0.8, 0.7, 0.5, np.random.default_rng(0))
    one, other = paired_over_images(a, b), paired_over_images(b, a)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)
    assert paired_over_images(a, a).value == 0
    assert paired_over_images(a, a).p == 1


@pytest.mark.parametrize("n", [1, 20])
def test_few_images_that_never_differ_are_no_proof(n: int) -> None:
    right, wrong = np.ones(n, bool), np.zeros(n, bool)
    found = paired_over_images(right, right)
    assert found.low < 0 < found.high
    assert found.high > 0.05
    assert -1 <= paired_over_images(right, wrong).low < paired_over_images(wrong, right).high <= 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits, false_alarms = 0, 0
    for _ in range(400):
        found = paired_over_images(*outcomes(300, 0.8, 0.75, 0.6, rng))
        hits += found.low <= -0.05 <= found.high
        false_alarms += (paired_over_images(*outcomes(300, 0.8, 0.8, 0.6, rng)).p or 0) < 0.05
    assert 0.91 <= hits / 400 <= 0.98
    assert false_alarms / 400 <= 0.07


def test_seeds_are_a_paired_t_test() -> None:
    a, b = [0.50, 0.52, 0.49, 0.55], [0.53, 0.54, 0.50, 0.60]
    found = paired_over_seeds(a, b, n=100)
    expected = stats.ttest_rel(b, a)
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert (found.low, found.high, found.p) == pytest.approx((low, high, expected.pvalue))


def test_equal_gaps_are_known_no_better_than_whole_images_tell() -> None:
    assert paired_over_seeds([0.5, 0.6], [0.5, 0.6], n=10).p == 1
    assert not paired_over_seeds([0.5, 0.6], [0.5, 0.6], n=10).clear
    runs = [0.5, 0.6, 0.7], [0.51, 0.61, 0.71]
    an_image, many = paired_over_seeds(*runs, n=100), paired_over_seeds(*runs, n=10_000)
    assert not an_image.clear
    assert (an_image.p or 0) > 0.05
    assert many.clear
    assert an_image.high - an_image.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.01 * (1 / 6 / 3) ** 0.5)
    assert mean_interval([0.5]) == (0.5, 0.0)


def test_holm_by_hand_and_its_order() -> None:
    assert holm([0.02, 0.01, 0.9]) == pytest.approx([0.04, 0.03, 0.9])
    assert holm([0.03, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    raw = list(np.random.default_rng(2).random(9))
    adjusted = holm(raw)
    assert all(high >= low for low, high in zip(raw, adjusted, strict=True))
    assert sorted(range(9), key=adjusted.__getitem__) == sorted(range(9), key=raw.__getitem__) or len(set(adjusted)) < 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_over_images(np.ones(3, bool), np.ones(4, bool)), r"\(3,\) and \(4,\)"),
        (lambda: paired_over_images(np.ones(0, bool), np.ones(0, bool)), "expected two of the same images"),
        (lambda: paired_over_seeds([0.1], [0.2], n=9), "1 and 1 runs: expected the same seeds, 2 or more"),
        (lambda: paired_over_seeds([0.1, 0.2], [0.2], n=9), "2 and 1 runs"),
        (lambda: paired_over_seeds([0.1, 0.2], [0.2, 0.3], n=0), "n=0: expected the number of images"),
        (lambda: mean_interval([]), "no runs"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
