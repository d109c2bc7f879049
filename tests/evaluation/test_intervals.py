"""Wilson's interval against its definition and known values."""

import math

import pytest

from mi_at.evaluation.intervals import Z_95, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (84, 100), (100, 100), (3, 7)])
def test_bounds_solve_the_score_equation(correct: int, n: int) -> None:
    # The bounds are where |p_hat - p| = z sqrt(p (1 - p) / n).
    p = correct / n
    for bound in wilson(correct, n):
        assert abs(p - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / n), abs=1e-12)
    assert wilson(correct, n)[0] <= p <= wilson(correct, n)[1]


def test_known_value() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3


def test_symmetry_and_range() -> None:
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected n >= 1 and 0 <= correct <= n"):
        wilson(correct, n)
