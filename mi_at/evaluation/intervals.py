"""Confidence intervals of an accuracy measured on a sample."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def wilson(correct: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); unlike the usual one it is right near 0 and 1.

    Args:
        correct: successes, in [0, n]; of several runs on the same trials their mean.
        n: trials, >= 1.
        z: quantile; the default gives 95 %.

    Returns:
        (low, high), fractions in [0, 1].

    Raises:
        ValueError: n < 1, or correct outside [0, n].

    Example:
        >>> tuple(round(bound, 4) for bound in wilson(0, 10))
        (0.0, 0.2775)
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct={correct}, n={n}: expected n >= 1 and 0 <= correct <= n")
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding would put it beside 0 or 1.
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)
