"""Bars: accuracies of methods, and information beside them on a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mi_at.results.figures.canvas import LETTER, LINE, WIDTH, Scale, scale_of, text
from mi_at.results.figures.readings import Drawing, Value, accuracies, by_row, information, value_of
from mi_at.results.measured import Filled
from mi_at.results.page_html import SERIES, Html, tag

BAR, GAP = 12, 3  # units
ACCURACY = "accuracy, %"
NUMBERS = 46  # units at the right for the numbers


@dataclass(frozen=True)
class Group:
    """Bars under one name.

    Attributes:
        name: of the group.
        values: by the place of the series among all, those that were measured.
        written: formats of numbers by the place of the series; "{:.1f}" else.
    """

    name: str
    values: Mapping[int, Value]
    written: Mapping[int, str] = field(default_factory=dict)


def bars(groups: Sequence[Group], first: Scale, second: Scale | None = None, of_second: int = -1) -> Drawing:
    """Lying bars in groups, each with its number and its error bar; one series may have a scale of its own, above.

    Args:
        groups: one or more.
        first: the scale of the series, below.
        second: that of one of them.
        of_second: which one.
    """
    parts: list[Html | None] = []
    width = WIDTH - NUMBERS
    y = 0.0
    if second is not None:
        y = _axis(parts, second, width, 14, above=True)
    top = y
    lower: list[Html | None] = []
    for group in groups:
        y += 4
        lower.append(text(group.name, 0, y + 10, "head"))
        y += LINE
        for place, value in group.values.items():
            scale = second if second is not None and place == of_second else first
            start, end = width * scale.at(max(0.0, scale.low)), width * scale.at(value.mean)
            left, length = min(start, end), abs(end - start)
            shape = tag("rect", x=round(left, 1), y=y, width=round(length, 1), height=BAR, class_="fill")
            lower.append(tag("g", shape, class_=f"s{place % SERIES}"))
            reach = max(start, end)
            if value.std:
                a, b = (round(width * scale.at(value.mean + sign * value.std), 1) for sign in (-1, 1))
                lower.append(tag("line", x1=a, x2=b, y1=y + BAR / 2, y2=y + BAR / 2, class_="whisker"))
                reach = max(reach, b)
            lower.append(text(group.written.get(place, "{:.1f}").format(value.mean), reach + 4, y + BAR - 2))
            y += BAR + GAP
        y += 4
    for tick, _ in first.ticks(5):
        x = round(width * first.at(tick), 1)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=y, class_="grid"))
    parts += lower
    return Drawing(parts, _axis(parts, first, width, y, above=False))


def _axis(parts: list[Html | None], scale: Scale, width: float, y: float, *, above: bool) -> float:
    """Draw a scale across; its label stands outside. Returns where the room under it begins."""
    label, word, line = (y - 4, y + 12, y + 18) if above else (y + 28, y + 14, y)
    parts.append(text(scale.label, 0, label))
    parts.append(tag("line", x1=0, x2=width, y1=line, y2=line, class_="base"))
    for place, (value, written) in enumerate(scale.ticks(5)):
        x = width * scale.at(value)
        parts.append(text(written, x, word, "tick", "start" if place == 0 and x < LETTER else "middle"))
    return y + 22 if above else y + 40


def _accuracies_beside(filled: Filled, path: tuple[str, ...], name: str) -> Drawing:
    """A group for each method: a bar for each attack, and one of a number of the information."""
    measured, attacks = accuracies(filled), list(filled.table.more)
    other, missing = information(filled, *path)
    groups = []
    for cell in filled.table.cells.values():
        values = {
            place: value_of(measured[cell.name][attack])
            for place, attack in enumerate(attacks)
            if attack in measured.get(cell.name, {})
        }
        if cell.name in other:
            values[len(attacks)] = other[cell.name]
        if values:
            groups.append(Group(cell.row, values, {len(attacks): "{:.3g}"}))
    if not groups:
        return Drawing([], 0, missing=missing)
    first = scale_of(ACCURACY, [100.0], zero=True, marked=[(v, str(v)) for v in (0, 25, 50, 75, 100)])
    largest = max((value.mean + value.std for value in other.values()), default=0.0)
    drawn = bars(groups, first, scale_of(name, [largest or 1.0], zero=True), len(attacks))
    drawn.names, drawn.missing = [*attacks, name], missing
    return drawn


def adversarial_ncmi(filled: Filled) -> Drawing:
    """Accuracy under an attack, and NCMI of the outputs under it (robust NCMI, Figure 2)."""
    attack = filled.table.more[0]
    return _accuracies_beside(filled, (attack, "ncmi"), f"adversarial NCMI ({attack})")


def robust_ncmi(filled: Filled) -> Drawing:
    """Accuracies under attacks, and the robust NCMI (robust NCMI, Figure 3)."""
    return _accuracies_beside(filled, ("robust_ncmi", "ncmi"), "robust NCMI")


def by_attack(filled: Filled) -> Drawing:
    """A group for each attack, a bar for each method (NAMID, Figures 5 and 7)."""
    measured, rows = accuracies(filled), by_row(filled)
    groups = []
    for attack in filled.table.more:
        values = {
            place: value_of(measured[cell.name][attack])
            for place, cells in enumerate(rows.values())
            for cell in cells
            if attack in measured.get(cell.name, {})
        }
        if values:
            groups.append(Group(attack, values))
    if not groups:
        return Drawing([], 0)
    tops = [value.mean + value.std for group in groups for value in group.values.values()]
    drawn = bars(groups, scale_of(ACCURACY, [*tops, 1.0], zero=True))
    drawn.names = list(rows)
    return drawn


def estimated_information(filled: Filled) -> Drawing:
    """Natural and adversarial information of clean and attacked images, each above its worst case (NAMID, Figure 4)."""
    attack = filled.table.more[0]
    views = {"clean": "natural sample", "adversarial": "adversarial sample"}
    groups, missing = [], []
    for kind in ("natural", "adversarial"):
        found = {}
        for view in views:
            found[view], lacking = information(filled, "mutual_information", attack, f"{kind}_{view}")
            least, _ = information(filled, "mutual_information", attack, f"{kind}_least")
            found[view] = {cell: Value(value.mean - least[cell].mean, value.std) for cell, value in found[view].items()}
            missing += lacking
        for cell in filled.table.cells.values():
            values = {place: found[view][cell.name] for place, view in enumerate(views) if cell.name in found[view]}
            if values:
                groups.append(Group(f"{kind} MI, estimators by {cell.row}", values, {0: "{:.3g}", 1: "{:.3g}"}))
    if not groups:
        return Drawing([], 0, missing=missing)
    tops = [value.mean + value.std for group in groups for value in group.values.values()]
    drawn = bars(groups, scale_of("nats above the worst sample", [*tops, 1e-3], zero=True))
    drawn.names, drawn.missing = list(views.values()), sorted(set(missing))
    return drawn
