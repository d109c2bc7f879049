"""Lines: accuracy over steps, eps, a weight or epochs, and robust over natural accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.figures.canvas import Dot, Panel, Scale, below, panels, scale_of
from mi_at.results.figures.readings import Drawing, accuracies, by_row, epochs, information, parameter, value_of
from mi_at.results.measured import Filled, Line
from mi_at.results.page_html import Html
from mi_at.results.tables import Cell

ACCURACY = "accuracy, %"
HEIGHT = 150  # of a panel, in units
FEW = 12  # epochs, each of which has a mark
HELD_OUT = "on the validation images, which are held out of the training set; of the first seed"


@dataclass(frozen=True)
class Plot:
    """What one panel shows.

    Attributes:
        title: of the panel.
        lines: dots by the place of the series among all.
        across, up: its scales.
        marks: a mark at each dot.
    """

    title: str
    lines: Mapping[int, Sequence[Dot]]
    across: Scale
    up: Scale
    marks: bool = True


def plots(several: Sequence[Plot], *, height: float = HEIGHT) -> Drawing:
    """Panels of lines; nothing where there are none."""
    if not several:
        return Drawing([], 0)
    frames = panels(len(several), 0, height * (1.5 if len(several) == 1 else 1))
    parts: list[Html | None] = []
    for plot, frame in zip(several, frames, strict=True):
        panel = Panel(*frame, across=plot.across, up=plot.up, title=plot.title)
        parts += panel.frame()
        parts += [panel.line(place, dots, marks=plot.marks) for place, dots in plot.lines.items()]
    return Drawing(parts, below(frames), hollow=True)


def _dot(x: float, line: Line) -> Dot:
    value = value_of(line)
    return Dot(x, value.mean, value.std)


def _percent(lines: Mapping[int, Sequence[Dot]]) -> Scale:
    return scale_of(ACCURACY, [1.0, *(dot.y + dot.dy for dots in lines.values() for dot in dots)], zero=True)


# ---------------------------------------------------------------- over an option of the attack
def _over(filled: Filled, option: str, *, logarithmic: bool) -> Drawing:
    """A panel for each curve of the evaluation and each data set, a line for each row.

    The points of a curve are its attacks, `<curve>_<value>`; what the value was stands in their records.
    """
    measured, rows = accuracies(filled), by_row(filled)
    said = {
        row.name: row.description.get(option)
        for records in filled.records.values()
        for each in records
        for row in each.record.attacks
    }
    curves: dict[str, list[str]] = {}
    for attack in filled.table.more:
        if attack != CLEAN:
            curves.setdefault(attack.rpartition("_")[0], []).append(attack)
    data = list(dict.fromkeys(_data(cell) for cell in filled.table.cells.values()))
    several = []
    for kind in data:
        for curve, attacks in curves.items():
            lines: dict[int, list[Dot]] = {}
            for place, cells in enumerate(rows.values()):
                own = {
                    attack: line
                    for cell in cells
                    if _data(cell) == kind
                    for attack, line in measured.get(cell.name, {}).items()
                }
                dots = [_dot(float(said[attack] or 0), own[attack]) for attack in attacks if attack in own]
                if dots and CLEAN in own and not logarithmic:
                    dots.insert(0, _dot(0.0, own[CLEAN]))
                if dots:
                    lines[place] = dots
            if lines:
                several.append(
                    Plot(f"{kind} {curve}".strip(), lines, _across(option, lines, logarithmic), _percent(lines))
                )
    drawn = plots(several)
    drawn.names = list(rows)
    return drawn


def _data(cell: Cell) -> str:
    return str(cell.printed.get("dataset", ""))


def _across(label: str, lines: Mapping[int, Sequence[Dot]], logarithmic: bool) -> Scale:
    values = sorted({dot.x for dots in lines.values() for dot in dots})
    marked = [(value, f"{value:.3g}") for value in values] if logarithmic else []
    in_255ths = [(value, f"{255 * value:.0f}") for value in values]
    if label == "eps" and all(abs(255 * value - float(word)) < 1e-3 for value, word in in_255ths):
        label, marked = "eps, of 255", in_255ths
    return scale_of(label, values, logarithmic=logarithmic, marked=marked)


def over_steps(filled: Filled) -> Drawing:
    """Accuracy over the steps of attacks (IB-RAR, Figure 2); what is clean stands below."""
    drawn = _over(filled, "steps", logarithmic=True)
    measured = accuracies(filled)
    clean = [
        f"{cell.row} {value_of(measured[cell.name][CLEAN]).mean:.2f}"
        for cell in filled.table.cells.values()
        if CLEAN in measured.get(cell.name, {})
    ]
    if clean:
        drawn.notes.append("clean accuracy, last epoch, %: " + ", ".join(clean))
    return drawn


def over_eps(filled: Filled) -> Drawing:
    """Accuracy over the radius of an attack, from the clean one on (robust NCMI, Figures 4 to 6)."""
    return _over(filled, "eps", logarithmic=False)


# ---------------------------------------------------------------- over a weight
def over_beta(filled: Filled) -> Drawing:
    """A panel for each row, accuracy over beta, a line for each attack (IB-RAR, Figure 6).

    The weights are no even grid: they stand at equal distances, each with its value.
    """
    measured, several, attacks = accuracies(filled), [], list(filled.table.more)
    for row, cells in by_row(filled).items():
        grid = sorted({parameter(cell, "beta") for cell in cells})
        lines: dict[int, list[Dot]] = {}
        for place, attack in enumerate(attacks):
            at = {
                grid.index(parameter(cell, "beta")): measured[cell.name][attack]
                for cell in cells
                if attack in measured.get(cell.name, {})
            }
            if at:
                lines[place] = [_dot(x, at[x]) for x in sorted(at)]
        if lines:
            marked = tuple((float(place), _briefly(value)) for place, value in enumerate(grid))
            across = Scale("beta", -0.3, len(grid) - 0.7, marked=marked)
            several.append(Plot(row, lines, across, _percent(lines)))
    drawn = plots(several)
    drawn.names = attacks
    return drawn


def _briefly(value: float) -> str:
    """A weight in few letters.

    Example:
        >>> _briefly(0.0005), _briefly(0.05)
        ('5e-4', '0.05')
    """
    return min(f"{value:g}", f"{value:.0e}".replace("e-0", "e-"), key=len) if value else "0"


def robust_over_natural(filled: Filled) -> Drawing:
    """Robust over natural accuracy, a line for each method through its weights (shared_info, Figure 3)."""
    measured, (natural, robust) = accuracies(filled), filled.table.more
    lines: dict[int, list[Dot]] = {}
    rows = by_row(filled)
    for place, cells in enumerate(rows.values()):
        dots = []
        for cell in sorted(cells, key=lambda cell: parameter(cell, "beta")):
            own = measured.get(cell.name, {})
            if natural in own and robust in own:
                x, y = value_of(own[natural]), value_of(own[robust])
                dots.append(Dot(x.mean, y.mean, y.std, x.std))
        if dots:
            lines[place] = dots
    if not lines:
        return Drawing([], 0)
    dots = [dot for own in lines.values() for dot in own]
    across = scale_of("natural accuracy, %", [dot.x + sign * dot.dx for dot in dots for sign in (-1, 1)])
    up = scale_of(f"accuracy under {robust}, %", [dot.y + sign * dot.dy for dot in dots for sign in (-1, 1)])
    drawn = plots([Plot("", lines, across, up)])
    drawn.names = list(rows)
    drawn.notes.append("each point is a beta, in their order along a line")
    return drawn


# ---------------------------------------------------------------- over epochs
def training_curves(filled: Filled) -> Drawing:
    """Robust accuracy and adversarial NCMI after every epoch, a line for each row (robust NCMI, Figure 9)."""
    found, missing = epochs(filled, "probe.jsonl")
    (attack,) = filled.table.more
    labels = {attack: ACCURACY, f"{attack} ncmi": "adversarial NCMI"}
    several, rows = [], by_row(filled)
    for key, label in labels.items():
        lines = {
            place: [Dot(line["epoch"], line[key]) for line in found[cell.name] if line.get(key) is not None]
            for place, cells in enumerate(rows.values())
            for cell in cells
            if cell.name in found
        }
        lines = {place: dots for place, dots in lines.items() if dots}
        if lines:
            up = scale_of(label, [dot.y for dots in lines.values() for dot in dots])
            several.append(Plot(f"under {attack}", lines, _epochs(lines), up, marks=_few(lines)))
    drawn = plots(several)
    drawn.names, drawn.missing = list(rows), missing
    drawn.notes.append(HELD_OUT)
    drawn.of_lines = False
    return drawn


def natural_and_robust_over_epochs(filled: Filled) -> Drawing:
    """A panel for each row: natural and robust accuracy after every epoch (IB-RAR, Figure 4)."""
    found, missing = epochs(filled, "probe.jsonl")
    attacks = list(filled.table.more)
    several = []
    for row, cells in by_row(filled).items():
        for cell in cells:
            own = found.get(cell.name, [])
            lines = {place: [Dot(line["epoch"], line[name]) for line in own] for place, name in enumerate(attacks)}
            if own:
                up = Scale(ACCURACY, 0, 100)
                several.append(Plot(row, lines, _epochs(lines), up, marks=_few(lines)))
    drawn = plots(several, height=110)
    drawn.names, drawn.missing = attacks, missing
    drawn.notes.append(HELD_OUT)
    drawn.of_lines = False
    return drawn


def _epochs(lines: Mapping[int, Sequence[Dot]]) -> Scale:
    last = max(dot.x for dots in lines.values() for dot in dots)
    return Scale("epoch", 0.0, last)


def _few(lines: Mapping[int, Sequence[Dot]]) -> bool:
    return max(map(len, lines.values())) <= FEW


# ---------------------------------------------------------------- over attacks
def information_over_attacks(filled: Filled) -> Drawing:
    """Standard information of clean and attacked images, and what attacked outputs know of the clean (NAMID, Figure 2).

    All above the worst sample of the three, as appendix B has it.
    """
    names = {
        "natural_clean": "I(x, h(x))",
        "own": "I(x~, h(x~))",
        "natural_adversarial": "I(x, h(x~))",
    }
    missing: set[str] = set()
    lines: dict[int, list[Dot]] = {}
    attacks = list(filled.table.more)
    every = [information(filled, "mutual_information", attack, "least")[0] for attack in attacks]
    least = min((value.mean for own in every for value in own.values()), default=0.0)
    for x, attack in enumerate(attacks):
        for place, key in enumerate(names):
            values, lacking = information(filled, "mutual_information", attack, key)
            missing |= set(lacking)
            for value in values.values():
                lines.setdefault(place, []).append(Dot(x, value.mean - least, value.std))
    if not lines:
        return Drawing([], 0, missing=sorted(missing))
    marked = tuple((float(x), _short(attack)) for x, attack in enumerate(attacks))
    up = scale_of("nats above the worst sample", [dot.y for dots in lines.values() for dot in dots], zero=True)
    drawn = plots([Plot("", lines, Scale("attack", -0.3, len(attacks) - 0.7, marked=marked), up)])
    drawn.names, drawn.missing = list(names.values()), sorted(missing)
    return drawn


def _short(attack: str) -> str:
    return attack.replace("autoattack", "aa").replace("_steps", "").replace("_", " ")
