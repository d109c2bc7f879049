"""What may be said of two measured accuracies: paired over images, over seeds, and over several methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mi_at.evaluation.intervals import Z_95


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies, b - a, in [-1, 1].

    Attributes:
        value: the difference.
        low, high: its 95 % interval.
        p: two-sided p-value of no difference; None where it cannot be had (one seed).
        n: images, or seeds, that it is taken over.
    """

    value: float
    low: float
    high: float
    p: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    @property
    def points(self) -> str:
        """In points, with the 95 % interval.

        Example:
            >>> Difference(0.01, 0.005, 0.015, 0.01, 3).points
            '+1.00 [+0.50, +1.50]'
        """
        return f"{100 * self.value:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def p_text(p: float) -> str:
    """A p-value as it is printed.

    Example:
        >>> p_text(0.0002), p_text(0.0421)
        ('< 0.001', '0.042')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def paired_over_images(a: np.ndarray, b: np.ndarray) -> Difference:
    """The difference on the same images, with the interval of Agresti and Min (2005).

    It is Wald's after half an image more in each of the four cells (both right, one, the other, none): of few images,
    or where the two never differ, Wald's own is too narrow, or of no width at all. The p-value is McNemar's exact one
    (McNemar 1947): of the images that one gets right and the other wrong, how unlikely is so uneven a share.

    Args:
        a: [n] bool, right under the first.
        b: [n] bool, right under the second, same images in the same order.

    Raises:
        ValueError: different lengths, or none.

    Example:
        >>> a, b = np.array([1, 1, 0, 0] * 10, bool), np.array([1, 1, 1, 0] * 10, bool)
        >>> d = paired_over_images(a, b)
        >>> round(d.value, 3), round(d.low, 3), round(d.high, 3), round(d.p, 4)
        (0.25, 0.101, 0.375, 0.002)
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"outcomes {a.shape} and {b.shape}: expected two of the same images, one value each")
    n, gained, lost = len(a), int((b & ~a).sum()), int((a & ~b).sum())
    more = n + 2
    centre, apart = (gained - lost) / more, (gained + lost + 1) / more
    half = Z_95 * math.sqrt((apart - centre * centre) / more)
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), p, n)


def paired_over_seeds(a: Sequence[float], b: Sequence[float], *, n: int) -> Difference:
    """The mean difference of runs with the same seeds, with Student's t interval.

    Accuracies are whole images of n: gaps of a few runs that happen to be equal would leave an interval of no width, so
    their variance is taken to be that of rounding two counts at least, 1/12 each.

    Args:
        a: accuracies of the first, a run each.
        b: of the second, in the order of the same seeds.
        n: images that each accuracy is taken over.

    Raises:
        ValueError: different numbers of runs, fewer than 2, or no images.

    Example:
        >>> d = paired_over_seeds([0.50, 0.51, 0.49], [0.53, 0.54, 0.52], n=1000)
        >>> round(d.value, 3), d.clear
        (0.03, True)
        >>> paired_over_seeds([0.50, 0.51, 0.49], [0.51, 0.52, 0.50], n=100).clear  # an image more, each time
        False
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} runs: expected the same seeds, 2 or more")
    if n < 1:
        raise ValueError(f"n={n}: expected the number of images, 1 or more")
    gaps = np.asarray(b, float) - np.asarray(a, float)
    free = len(gaps) - 1
    mean, half = mean_interval(gaps, least=math.sqrt(1 / 6) / n)
    p = 2 * float(stats.t.sf(abs(mean) / half * stats.t.ppf(0.975, free), free))
    return Difference(mean, mean - half, mean + half, p, len(gaps))


def mean_interval(values: Sequence[float] | np.ndarray, *, least: float = 0.0) -> tuple[float, float]:
    """Mean and half the width of the 95 % t interval of a few runs; the half is 0 for one run.

    Args:
        values: of the runs.
        least: that their standard deviation is taken to be.

    Raises:
        ValueError: no values.

    Example:
        >>> tuple(round(v, 3) for v in mean_interval([1.0, 2.0, 3.0]))
        (2.0, 2.484)
    """
    runs = np.asarray(values, float)
    if not len(runs):
        raise ValueError("no runs: expected one or more")
    if len(runs) == 1 or (np.ptp(runs) == 0 and not least):
        return float(runs[0]), 0.0
    half = stats.t.ppf(0.975, len(runs) - 1) * max(runs.std(ddof=1), least) / math.sqrt(len(runs))
    return float(runs.mean()), float(half)


def holm(p_values: Sequence[float], *, of: int = 0) -> list[float]:
    """p-values adjusted for their number by Holm's step-down rule (Holm 1979).

    Args:
        p_values: of the comparisons that are shown.
        of: how many there are, those that are not shown included, which are taken to have larger ones.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
        >>> [round(p, 3) for p in holm([0.01, 0.04], of=5)]
        [0.05, 0.16]
    """
    several = max(of, len(p_values))
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (several - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
