"""What figures are made of: the lines of a filled table, and what lies beside its records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mi_at.results.measured import Filled, Found, Line
from mi_at.results.page_html import Html
from mi_at.results.records import read_outcomes
from mi_at.results.runs import EVALUATIONS
from mi_at.results.tables import Cell


class FigureError(ValueError):
    """A figure that cannot be drawn; the message says what to run."""


@dataclass
class Drawing:
    """What a plot function made.

    Attributes:
        parts: in units, from the upper left corner.
        height: in units.
        names: of the series, in their order, for the legend; empty where the drawing names them itself.
        hollow: whether the marks of every second series are, as those of lines are.
        missing: what was not drawn, and why, a sentence each.
        notes: what a reader must know, a sentence each.
        of_lines: whether it shows the lines of its table, whose n and seeds are then said.
    """

    parts: list[Html | None]
    height: float
    names: Sequence[str] = ()
    hollow: bool = False
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    of_lines: bool = True


@dataclass(frozen=True)
class Value:
    """A number over seeds.

    Attributes:
        mean: over them.
        std: of a single run; 0 with one seed.
    """

    mean: float
    std: float


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and standard deviation.

    Example:
        >>> over_seeds([1.0, 3.0])
        Value(mean=2.0, std=1.4142135623730951)
    """
    return Value(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)


def accuracies(filled: Filled) -> dict[str, dict[str, Line]]:
    """Cell -> attack -> its line, of those that were measured."""
    found: dict[str, dict[str, Line]] = {}
    for line in filled.lines:
        if line.values:
            found.setdefault(line.cell, {})[line.attack] = line
    return found


def value_of(line: Line) -> Value:
    """A measured accuracy, in per cent."""
    return over_seeds(list(line.values.values()))


def parameter(cell: Cell, name: str) -> float:
    """A number that its yaml prints of a cell, such as beta.

    Raises:
        FigureError: it has none.
    """
    try:
        return float(cell.printed["params"][name])
    except (KeyError, TypeError, ValueError) as error:
        raise FigureError(f"cell {cell.name} of the figure has no printed.params.{name}") from error


def by_row(filled: Filled) -> dict[str, list[Cell]]:
    """The cells of each series: those that are one row of the print."""
    rows: dict[str, list[Cell]] = {}
    for cell in filled.table.cells.values():
        rows.setdefault(cell.row, []).append(cell)
    return rows


def information(filled: Filled, *path: str) -> tuple[dict[str, Value], list[str]]:
    """A number of the records' `information`, by cell; those of another n than most are refused.

    Args:
        filled: the table.
        path: of the number within it, such as "robust_ncmi", "ncmi"; beside it lies its n.

    Returns:
        The values, and a sentence for each that is missing or refused.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    missing = []
    for cell, each in _records(filled):
        node: Any = each.record.information
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, Mapping) else None
        value = node.get(path[-1]) if isinstance(node, Mapping) else None
        if value is None:
            missing.append(f"{cell}: {each.path} has no {' '.join(path)}")
        else:
            found.setdefault(cell, []).append((float(value), int(node["n"])))
    counts = Counter(n for values in found.values() for _, n in values)
    usual = counts.most_common(1)[0][0] if counts else 0
    kept = {}
    for cell, values in found.items():
        same = [value for value, n in values if n == usual]
        if len(same) < len(values):
            missing.append(f"{cell}: {' '.join(path)} of another n than {usual}, that of the others: refused")
        if same:
            kept[cell] = over_seeds(same)
    return kept, missing


def epochs(filled: Filled, file: str) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """The lines of a file that training wrote, such as probe.jsonl, by cell; of the first seed that has it.

    Returns:
        The lines, and a sentence for each cell that was run without it.
    """
    found: dict[str, list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    for cell, each in _records(filled):
        path = run_folder(each) / file
        if cell in found:
            continue
        if path.is_file():
            found[cell] = [json.loads(line) for line in path.read_text().splitlines()]
            missing.pop(cell, None)
        else:
            missing[cell] = (
                f"{cell}: {run_folder(each)} was trained without {file}, for another table perhaps: delete that folder "
                "and run this table again"
            )
    return found, list(missing.values())


def arrays(filled: Filled, file: str) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Arrays in a file beside the record, such as outputs.npz, by cell; of the first seed that has it.

    Returns:
        The arrays, and a sentence for each cell without it.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    missing: dict[str, str] = {}
    for cell, each in _records(filled):
        path = each.path.with_name(file)
        if cell in found:
            continue
        if path.is_file():
            found[cell] = read_outcomes(path)
            missing.pop(cell, None)
        else:
            missing[cell] = f"{cell}: there is no {path}: delete {each.path} and run this table again"
    return found, list(missing.values())


def run_folder(found: Found) -> Path:
    """The folder of the run that a record is of, which may lie in its evaluations/."""
    folder = found.path.parent
    return folder.parent.parent if folder.parent.name == EVALUATIONS else folder


def _records(filled: Filled) -> Iterator[tuple[str, Found]]:
    for cell, records in filled.records.items():
        for each in records:
            yield cell, each
