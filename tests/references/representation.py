"""The representation attack's problem, written out over Python floats (Sabour et al., ICLR 2016, eq. 1-2)."""

Rows = list[list[float]]


def distance(phi: list[float], guide: list[float]) -> float:
    """|phi(x') - phi(x_guide)|^2."""
    return sum((a - b) ** 2 for a, b in zip(phi, guide, strict=True))


def box(source: list[float], eps: float) -> list[tuple[float, float]]:
    """What each pixel may be: within eps of the source, within [0, 1]."""
    return [(max(0.0, v - eps), min(1.0, v + eps)) for v in source]


def nearest(source: list[float], guide: list[float], eps: float) -> list[float]:
    """The solution where phi is the identity times a number: each pixel of the guide, moved into the box."""
    return [min(max(g, low), high) for g, (low, high) in zip(guide, box(source, eps), strict=True)]


def first_half_guides(batch: Rows) -> list[tuple[list[float], list[float] | None]]:
    """(image, its guide) of a training batch: none for the first half, in turn for the second."""
    half = len(batch) // 2
    return [(image, None if place < half else batch[(place - half) % half]) for place, image in enumerate(batch)]
