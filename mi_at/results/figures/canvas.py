"""What figures are drawn with: scales, panels, a legend, and the whole as one self-contained SVG.

A figure is `WIDTH` units wide and stretches up to twice of it, so that its letters read on a phone and on paper. Its
colours are those of the pages (`mi_at.results.page_html`), light and dark, as rules of its own class.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mi_at.results.page_charts import ticks
from mi_at.results.page_html import DARK, LIGHT, SERIES, Html, tag

WIDTH, SIZE = 400, 11  # units of the drawing, and of its letters
LETTER = 5.9  # units of a letter at SIZE, about
LINE = 15
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 34, 34  # of a panel, around its frame


@dataclass(frozen=True)
class Scale:
    """From values to places in [0, 1].

    Attributes:
        label: what the values are.
        low, high: of the range, low < high.
        logarithmic: both > 0.
        marked: values that have a tick, and how they are written; empty: round numbers.
    """

    label: str
    low: float
    high: float
    logarithmic: bool = False
    marked: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        """The place of a value; beyond the range it is drawn at its edge.

        Example:
            >>> Scale("steps", 1, 100, logarithmic=True).at(10)
            0.5
        """
        if self.logarithmic:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)

    def ticks(self, most: int = 4) -> list[tuple[float, str]]:
        """Values that have a tick, and how they are written."""
        return list(self.marked) or [(value, f"{value:.6g}") for value in ticks(self.low, self.high, most)]


def scale_of(
    label: str,
    values: Iterable[float],
    *,
    zero: bool = False,
    logarithmic: bool = False,
    marked: Sequence[tuple[float, str]] = (),
) -> Scale:
    """A scale with a little air around some values, none of it below 0 where no value is.

    Args:
        label: what they are.
        values: one or more, finite.
        zero: from 0 on.
        logarithmic: all > 0.
        marked: as `Scale` takes it.

    Example:
        >>> scale = scale_of("accuracy, %", [20, 60], zero=True)
        >>> scale.low, round(scale.high, 1)
        (0.0, 63.0)
    """
    known = list(values)
    low, high = min(known), max(known)
    if logarithmic:
        air = (high / low) ** 0.04 if high > low else 2.0
        return Scale(label, low / air, high * air, True, tuple(marked))
    air = 0.05 * (high - min(low, 0.0) if zero else high - low) or max(abs(high), 1.0) * 0.05
    bottom = 0.0 if low >= 0 and (zero or low < air) else low if zero else low - air
    return Scale(label, bottom, high + air, False, tuple(marked))


@dataclass(frozen=True)
class Dot:
    """A value with its spread.

    Attributes:
        x, y: its place.
        dy, dx: half the length of its error bars, 0 for none.
    """

    x: float
    y: float
    dy: float = 0.0
    dx: float = 0.0


@dataclass(frozen=True)
class Panel:
    """A frame with two scales.

    Attributes:
        left, top, width, height: of the frame, without its labels.
        across, up: its scales.
        title: written above it.
    """

    left: float
    top: float
    width: float
    height: float
    across: Scale
    up: Scale
    title: str = ""

    def x(self, value: float) -> float:
        """Units from the left edge of the figure."""
        return round(self.left + self.width * self.across.at(value), 1)

    def y(self, value: float) -> float:
        """Units from its upper edge."""
        return round(self.top + self.height * (1 - self.up.at(value)), 1)

    def frame(self) -> list[Html | None]:
        """Grid, ticks, and what the axes are."""
        right, bottom = self.left + self.width, self.top + self.height
        parts: list[Html | None] = [
            text(self.title, self.left, self.top - 19, "head"),
            text(self.up.label, self.left, self.top - 6),
        ]
        for value, word in self.up.ticks():
            y = self.y(value)
            parts.append(tag("line", x1=self.left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(text(word, self.left - 4, y + 4, "tick", "end"))
        parts.append(tag("line", x1=self.left, x2=right, y1=bottom, y2=bottom, class_="base"))
        end = -math.inf
        for value, word in self.across.ticks(3 if self.width < WIDTH / 2 else 6):
            x, half = self.x(value), len(word) * LETTER / 2
            parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 3, class_="base"))
            if x - half >= end:
                parts.append(text(word, x, bottom + 14, "tick", "middle"))
                end = x + half + LETTER
        parts.append(text(self.across.label, self.left + self.width / 2, bottom + 28, anchor="middle"))
        return parts

    def line(self, place: int, dots: Sequence[Dot], *, joined: bool = True, marks: bool = True) -> Html:
        """A series in its colour: a line, dots with error bars, or both.

        Args:
            place: of the series among all; every second one has hollow dots.
            dots: one or more.
            joined: by a line, in the order given.
            marks: a mark at each dot.
        """
        parts = []
        if joined and len(dots) > 1:
            points = " ".join(f"{self.x(dot.x)},{self.y(dot.y)}" for dot in dots)
            parts.append(tag("polyline", points=points, class_="stroke"))
        for dot in dots:
            x, y = self.x(dot.x), self.y(dot.y)
            if dot.dy:
                ends = {"y1": self.y(dot.y - dot.dy), "y2": self.y(dot.y + dot.dy)}
                parts.append(tag("line", x1=x, x2=x, class_="thin", **ends))
            if dot.dx:
                ends = {"x1": self.x(dot.x - dot.dx), "x2": self.x(dot.x + dot.dx)}
                parts.append(tag("line", y1=y, y2=y, class_="thin", **ends))
            if marks:
                parts.append(tag("circle", cx=x, cy=y, r=3, class_=mark(place)))
        return tag("g", *parts, class_=f"s{place % SERIES}")


def panels(count: int, top: float, height: float) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of the frames of some panels: one wide, or two in a row.

    Example:
        >>> [left for left, _, _, _ in panels(3, 0, 100)]
        [38.0, 238.0, 38.0]
    """
    columns = 1 if count == 1 else 2
    wide, tall = WIDTH / columns, TOP + height + BOTTOM
    width = wide - LEFT - RIGHT
    return [
        (LEFT + (place % columns) * wide, top + (place // columns) * tall + TOP, width, height)
        for place in range(count)
    ]


def below(frames: Sequence[tuple[float, float, float, float]]) -> float:
    """Where the room under some panels begins."""
    return max(top + height for _, top, _, height in frames) + BOTTOM + 4


def text(words: str, x: float, y: float, kind: str | None = None, anchor: str | None = None) -> Html | None:
    """Words; nothing of an empty string."""
    return tag("text", words, x=round(x, 1), y=round(y, 1), class_=kind, text_anchor=anchor) if words else None


def mark(place: int) -> str:
    """How the dots of a series look."""
    return "hollow" if place % 2 else "fill"


def legend(names: Sequence[str], top: float, *, hollow: bool) -> tuple[list[Html | None], float]:
    """The names of series in rows, each after its mark; and where the room under them begins."""
    parts: list[Html | None] = []
    x, y = 4.0, top + 8
    for place, name in enumerate(names):
        length = 16 + len(name) * LETTER + 10
        if x > 4 and x + length > WIDTH:
            x, y = 4.0, y + LINE
        dot = tag("circle", cx=x + 5, cy=y - 4, r=4, class_=mark(place) if hollow else "fill")
        parts += [tag("g", dot, class_=f"s{place % SERIES}"), text(name, x + 14, y)]
        x += length
    return parts, y + LINE


def paragraph(words: str, top: float, kind: str | None = None) -> tuple[list[Html | None], float]:
    """Words broken into lines; and where the room under them begins."""
    letters = int(WIDTH / (LETTER * (1.08 if kind == "head" else 1)))
    lines = textwrap.wrap(words, letters, break_on_hyphens=False)
    return [text(line, 0, top + 11 + LINE * place, kind) for place, line in enumerate(lines)], top + LINE * len(lines)


def moved(parts: Sequence[Html | None], down: float) -> Html:
    """Parts of a drawing, lower."""
    return tag("g", *parts, transform=f"translate(0 {round(down, 1)})")


def document(title: str, parts: Sequence[Html | None], height: float) -> str:
    """A whole SVG, with its own styles.

    Args:
        title: for those who do not see it.
        parts: in units, from the upper left corner.
        height: in units.
    """
    edge = 8
    box = f"{-edge} {-edge} {WIDTH + 2 * edge} {round(height) + 2 * edge}"
    ground = tag("rect", x=-edge, y=-edge, width=WIDTH + 2 * edge, height=round(height) + 2 * edge, class_="ground")
    dark = "@media (prefers-color-scheme:dark){" + _rules(DARK) + "}"
    return (
        tag(
            "svg",
            tag("title", title),
            tag("style", Html(_STYLE + _rules(LIGHT) + dark)),
            ground,
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=box,
            class_="mi-figure",
            role="img",
            style=f"width:100%;max-width:{2 * WIDTH}px;height:auto",
        )
        + "\n"
    )


def blend(share: float) -> str:
    """A colour between the first (0) and the last (1) of an order, to be seen on any ground.

    Example:
        >>> blend(0), blend(1)
        ('#1b6cb0', '#e08a1e')
    """
    first, last = (0x1B, 0x6C, 0xB0), (0xE0, 0x8A, 0x1E)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, last, strict=True))


_STYLE = (
    f".mi-figure{{display:block;font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif}}"
    f".mi-figure text{{font-size:{SIZE}px;font-variant-numeric:tabular-nums}}.mi-figure .head{{font-weight:650}}"
    ".mi-figure .stroke{stroke-width:1.75;fill:none}.mi-figure .thin{stroke-width:1.25}"
    ".mi-figure .hollow{stroke-width:1.5}.mi-figure .pixels{image-rendering:pixelated}"
)


def _rules(palette: dict[str, str]) -> str:
    ground, words, quiet, line = (palette[name] for name in ("ground", "text", "muted", "line"))
    rules = [
        f".mi-figure .ground{{fill:{ground}}}.mi-figure text{{fill:{words}}}.mi-figure .tick{{fill:{quiet}}}",
        f".mi-figure .grid,.mi-figure .edge{{stroke:{line};fill:none}}.mi-figure .base{{stroke:{quiet}}}",
        f".mi-figure .whisker{{stroke:{words}}}",
        f".mi-figure .halo{{stroke:{ground};stroke-width:3;paint-order:stroke}}",
    ]
    for place in range(SERIES):
        colour, own = palette[f"series{place}"], f".mi-figure .s{place} "
        rules.append(f"{own}.fill{{fill:{colour}}}{own}.hollow{{fill:{ground};stroke:{colour}}}")
        rules.append(f"{own}.stroke,{own}.thin{{stroke:{colour}}}")
    return "".join(rules)
