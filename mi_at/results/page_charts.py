"""Charts as inline SVG, each a pure function of numbers.

Across they are measured in per cent and down in pixels, so that a chart is as wide as the screen and its words keep
their size: nothing is scaled, and a phone shows what a desk shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mi_at.results.page_html import SERIES, Html, join, tag

LINE = 15.0  # pixels between two labels, at least
LETTER = 6.8  # pixels of a letter at 12 px, about


@dataclass(frozen=True)
class Point:
    """A measured value with its interval.

    Attributes:
        x: place across.
        y: in [0, 1].
        low, high: 95 % interval of y.
        x_low, x_high: of x, where it was measured too.
    """

    x: float
    y: float
    low: float
    high: float
    x_low: float | None = None
    x_high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order of x.

    Attributes:
        name: written at its end.
        points: one or more.
    """

    name: str
    points: tuple[Point, ...]


def bar(value: float, interval: tuple[float, float], kind: str) -> Html:
    """A bar from 0 to an accuracy with its 95 % interval; its number stands beside it.

    Args:
        value: in [0, 1].
        interval: in [0, 1].
        kind: "clean", "attack" or "worst": its colour.

    Returns:
        An <svg>, hidden from screen readers.

    Example:
        >>> 'width="50%"' in bar(0.5, (0.4, 0.6), "attack")
        True
    """
    low, high = interval
    return tag(
        "svg",
        *_grid(20),
        tag("rect", x="0", y=4, width=_percent(value), height=12, rx=2, class_="fill"),
        _across(low, high, 10, "halo"),
        _across(low, high, 10, "whisker"),
        height=20,
        class_=f"plot {kind}",
        aria_hidden="true",
    )


def axis(label: str = "%") -> Html:
    """The scale under bars: 0, 25, 50, 75 and 100 %."""
    ticks = (
        tag("text", f"{tick} {label}" if tick == 100 else tick, x=f"{tick}%", y=14, text_anchor=anchor, class_="tick")
        for tick, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end"))
    )
    return tag("svg", *ticks, height=18, class_="plot", aria_hidden="true")


def dumbbell(first: float, second: float) -> Html:
    """Two shares of one class, a ring for the first and a dot for the second, and the loss between them.

    Example:
        >>> dumbbell(1.0, 0.25).count("<circle")
        2
    """
    return tag(
        "svg",
        *_grid(20),
        _across(first, second, 10, "thin worst", caps=False),
        tag("circle", cx=_percent(first), cy=10, r=5, class_="hollow clean"),
        tag("circle", cx=_percent(second), cy=10, r=5, class_="fill worst"),
        height=20,
        class_="plot",
        aria_hidden="true",
    )


def span(low: float, mean: float, high: float, *, top: float = 1.0) -> Html:
    """The range of a value and its mean.

    Args:
        low: the least, >= 0; above `top` it is drawn at the edge, as the others are.
        mean: between the others.
        high: the greatest.
        top: of the scale.

    Example:
        >>> 'cx="50%"' in span(0.0, 0.5, 1.0)
        True
    """
    low, mean, high = (min(max(value / top, 0.0), 1.0) for value in (low, mean, high))
    return tag(
        "svg",
        *_grid(20),
        tag(
            "rect",
            x=_percent(low),
            y=7,
            width=_percent(high - low),
            height=6,
            rx=3,
            class_="fill attack",
            opacity=".35",
        ),
        tag("circle", cx=_percent(mean), cy=10, r=5, class_="fill attack"),
        height=20,
        class_="plot",
        aria_hidden="true",
    )


def difference(value: float, low: float, high: float, reach: float) -> Html:
    """A difference with its interval on a scale from -reach to +reach; beyond it an arrow.

    Example:
        >>> 'cx="75%"' in difference(0.1, 0.05, 0.15, 0.2)
        True
    """

    def place(at: float) -> float:
        return min(max(0.5 + at / (2 * reach), 0.0), 1.0) if reach > 0 else 0.5

    kind = "attack" if low > 0 else "worst" if high < 0 else "clean"
    if abs(value) > reach > 0:
        arrow = ("◂", "0%", "start") if value < 0 else ("▸", "100%", "end")
        drawn = [tag("text", arrow[0], x=arrow[1], y=17, text_anchor=arrow[2], class_="colour arrow")]
    else:
        dot = tag("circle", cx=_percent(place(value)), cy=10, r=5, class_="fill")
        drawn = [_across(place(low), place(high), 10, "thin"), dot]
    return tag(
        "svg",
        tag("line", x1="50%", x2="50%", y1=0, y2=20, class_="base"),
        *drawn,
        height=20,
        class_=f"plot {kind}",
        aria_hidden="true",
    )


def curves(
    series: Sequence[Series],
    *,
    across: str,
    up: str,
    logarithmic: bool = False,
    shown: Callable[[float], str] = "{:.4g}".format,
    height: int = 260,
) -> Html:
    """Lines over a common scale, each named at its end.

    Args:
        series: at most `SERIES` have a colour of their own; the shape of the dots differs too.
        across: what x is.
        up: what y is, in per cent.
        logarithmic: x on a logarithmic scale; all x > 0.
        shown: how an x is written.
        height: of the plot, in pixels.

    Returns:
        A <div> with the <svg>.

    Example:
        >>> line = Series("pgd", (Point(0, 1.0, 0.9, 1.0), Point(0.1, 0.5, 0.4, 0.6)))
        >>> curves([line], across="eps", up="accuracy").count("<circle")
        2
    """
    values = sorted({point.x for line in series for point in line.points})
    at = math.log if logarithmic else float
    first, last = at(values[0]), at(values[-1])
    room = max(len(_short(line.name)) for line in series) * LETTER + 14
    scale = last - first or 1.0

    def x_of(value: float) -> str:
        return _percent((at(value) - first) / scale)

    def y_of(value: float) -> float:
        return round((1 - value) * height, 1)

    parts: list[Html] = []
    for tick in (0, 25, 50, 75, 100):
        y = y_of(tick / 100)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="base" if tick == 0 else "grid"))
        parts.append(tag("text", tick, x=-8, y=y + 4, text_anchor="end", class_="tick"))
    parts.extend(
        tag("text", shown(value), x=x_of(value), y=height + 18, text_anchor="middle", class_="tick")
        for value in _apart(values, lambda value: (at(value) - first) / scale)
    )
    ends = spread([y_of(line.points[-1].y) for line in series], 0, height)
    for place, (line, end) in enumerate(zip(series, ends, strict=True)):
        kind = f"s{place % SERIES}"
        drawn: list[Html] = []
        for a, b in pairwise(line.points):
            drawn.append(tag("line", x1=x_of(a.x), y1=y_of(a.y), x2=x_of(b.x), y2=y_of(b.y), class_="stroke"))
        for point in line.points:
            x = x_of(point.x)
            drawn.append(tag("line", x1=x, x2=x, y1=y_of(point.low), y2=y_of(point.high), class_="thin"))
            drawn.append(tag("circle", cx=x, cy=y_of(point.y), r=4, class_="hollow" if place % 2 else "fill"))
        drawn.append(tag("text", _short(line.name), x="100%", dx=10, y=end + 4, class_="colour"))
        parts.append(tag("g", *drawn, class_=kind))
    title = f"{up} over {across}: " + "; ".join(
        f"{line.name} from {100 * line.points[0].y:.1f} % at {shown(line.points[0].x)}"
        f" to {100 * line.points[-1].y:.1f} % at {shown(line.points[-1].x)}"
        for line in series
    )
    return tag(
        "div",
        tag("p", up, class_="note"),
        tag("svg", *parts, height=height + 24, role="img", aria_label=title),
        tag("p", across + (" (logarithmic scale)" if logarithmic else ""), class_="note"),
        class_="chart",
        style=f"padding-right:{room:.0f}px",
    )


def scatter(points: Sequence[Point], *, across: str, up: str, height: int = 300) -> Html:
    """Numbered points with their intervals, both ways in per cent; a list beside it says which number is what.

    The scale is that of most points: what lies far below them stands as an arrow at the lower edge.

    Args:
        points: x and y in [0, 1]; their numbers are 1, 2, ...
        across: what x is.
        up: what y is.
        height: of the plot, in pixels.

    Returns:
        A <div> with the <svg>.

    Example:
        >>> scatter([Point(0.9, 0.5, 0.4, 0.6)], across="clean", up="robust").count("<circle")
        1
    """
    edge = outlying([point.y for point in points])
    x_low, x_high = _range([at for p in points for at in (p.x, p.x_low, p.x_high) if at is not None])
    y_low, y_high = _range([at for p in points if p.y >= edge for at in (p.y, p.low, p.high)])

    def x_of(value: float) -> float:
        return (value - x_low) / (x_high - x_low)

    def y_of(value: float) -> float:
        return round((y_high - value) / (y_high - y_low) * height, 1)

    parts: list[Html] = []
    for tick in ticks(y_low, y_high):
        y = y_of(tick)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(tag("text", _number(round(100 * tick, 6)), x=-8, y=y + 4, text_anchor="end", class_="tick"))
    for tick in ticks(x_low, x_high, most=4):
        x, shown = _percent(x_of(tick)), _number(round(100 * tick, 6))
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=height, class_="grid"))
        parts.append(tag("text", shown, x=x, y=height + 18, text_anchor="middle", class_="tick"))
    parts.append(tag("line", x1="0", x2="100%", y1=height, y2=height, class_="base"))
    inside = [(number, p) for number, p in enumerate(points, start=1) if p.y >= edge]
    for _, p in inside:
        x, y = _percent(x_of(p.x)), y_of(p.y)
        parts.append(tag("line", x1=x, x2=x, y1=y_of(p.low), y2=y_of(p.high), class_="thin clean"))
        if p.x_low is not None and p.x_high is not None:
            parts.append(_across(x_of(p.x_low), x_of(p.x_high), y, "thin clean", caps=False))
    for number, p in inside:
        x, y = _percent(x_of(p.x)), y_of(p.y)
        parts.append(tag("circle", cx=x, cy=y, r=9, class_="disc attack"))
        parts.append(tag("text", number, x=x, y=y + 4, text_anchor="middle", class_="on-disc"))
    for number, p in enumerate(points, start=1):
        if p.y < edge:
            words, place = f"{number} ↓ {100 * p.y:.1f} %", x_of(p.x)
            anchor = "start" if place < 0.2 else "end" if place > 0.8 else "middle"  # within the plot
            parts.append(tag("text", words, x=_percent(place), y=height - 6, text_anchor=anchor, class_="head"))
    title = f"{up} over {across}: " + "; ".join(
        f"{number}: {100 * p.x:.1f} %, {100 * p.y:.1f} %" for number, p in enumerate(points, start=1)
    )
    return tag(
        "div",
        tag("p", up, class_="note"),
        tag("svg", *parts, height=height + 24, role="img", aria_label=title),
        tag("p", across, class_="note"),
        class_="chart",
    )


def outlying(values: Sequence[float]) -> float:
    """The value below which a scatter shows arrows: above the few that lie far under all others.

    Example:
        >>> outlying([0.88, 0.0, 0.9, 0.92]), outlying([0.2, 0.5, 0.9])
        (0.88, 0.2)
    """
    ordered = sorted(values)
    gaps = [(b - a, place) for place, (a, b) in enumerate(pairwise(ordered), start=1)]
    gap, place = max(gaps, default=(0.0, 0))
    far = gap > 0.6 * (ordered[-1] - ordered[0]) and gap > 0.2
    return ordered[place] if far and place < len(ordered) / 2 else ordered[0]


def spread(places: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Places moved as little as needed for labels not to overlap, in the order given.

    Args:
        places: wanted.
        low: where labels may begin.
        high: where they end; more labels than fit go beyond.
        gap: between neighbours.

    Example:
        >>> spread([50, 52, 10], 0, 100, gap=10)
        [46.0, 56.0, 10.0]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Neighbours that collide form a block around the mean of what they wanted.
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while (
            len(blocks) > 1
            and _top(blocks[-1], places, gap, low, high) < _bottom(blocks[-2], places, gap, low, high) + gap - 1e-9
        ):
            last = blocks.pop()
            blocks[-1] += last
    found = [0.0] * len(places)
    for block in blocks:
        top = _top(block, places, gap, low, high)
        for step, index in enumerate(block):
            found[index] = round(top + step * gap, 1)
    return found


def _top(block: Sequence[int], places: Sequence[float], gap: float, low: float, high: float) -> float:
    length = (len(block) - 1) * gap
    middle = sum(places[index] for index in block) / len(block)
    return max(low, min(middle - length / 2, high - length))


def _bottom(block: Sequence[int], places: Sequence[float], gap: float, low: float, high: float) -> float:
    return _top(block, places, gap, low, high) + (len(block) - 1) * gap


def _grid(height: int) -> list[Html]:
    return [
        tag("line", x1=f"{tick}%", x2=f"{tick}%", y1=0, y2=height, class_="base" if tick == 0 else "grid")
        for tick in (0, 25, 50, 75, 100)
    ]


def _across(low: float, high: float, y: float, kind: str, *, caps: bool = True) -> Html:
    a, b = _percent(low), _percent(high)
    ends = [tag("line", x1=x, x2=x, y1=y - 4, y2=y + 4, class_=kind) for x in (a, b)] if caps else []
    return join([tag("line", x1=a, x2=b, y1=y, y2=y, class_=kind), *ends])


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _apart(values: Sequence[float], place: Callable[[float], float], least: float = 0.17) -> list[float]:
    """Those of the ticks that leave one another room; the first and the last always."""
    kept = [values[0]]
    for value in values[1:-1]:
        if place(value) - place(kept[-1]) >= least and place(values[-1]) - place(value) >= least:
            kept.append(value)
    return kept if len(values) == 1 else [*kept, values[-1]]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range with some air around the values, within [0, 1]."""
    low, high = min(values), max(values)
    air = max(0.08 * (high - low), 0.005)
    return max(0.0, low - air), min(1.0, high + air)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, about `most` of them.

    Example:
        >>> ticks(0, 1, most=2)
        [0.0, 0.5, 1.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
