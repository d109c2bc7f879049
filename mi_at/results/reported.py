"""The papers' printed numbers as data: results/reported/<paper>.csv, one number a line.

A line says where a number stands (table, row), what it is of (data, network, method, attack), its spread where one is
printed, and what is doubtful about it (`note`). Nothing here was measured by us.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

PAPERS = ("mimae", "shared_info", "namid", "ib_rar", "ncmi")
NO_PAPER = "none"
"""The paper of a table of our own, which nobody has printed."""
UNITS = ("percent", "count", "s", "G", "M")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "reported"


class ReportedError(ValueError):
    """A file of printed numbers that cannot be read; the message names the file and the line."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """One printed number.

    Attributes:
        paper: one of `PAPERS`.
        table: "2", or "fig2", "sec5.4" for numbers that stand in a caption or in the text.
        row: the row's name as printed.
        dataset, extra_data, model: "cifar10", "none" or "ddpm_1m", "preact_resnet18".
        defense, regularizer: in mi_at's names; "none".
        params: settings of the row, e.g. {"lambda": "0.4"}.
        checkpoint: "best", "last" or "unspecified".
        train_norm: of the training attack: "linf", "l2", "none".
        threat: "white_box", "black_box" or "none".
        surrogate: the network that transferred attacks come from, or "none".
        attack: what the column is of: "clean", "pgd20", "autoattack", ...
        value: the number; None where the print is lost.
        std: its printed spread.
        unit: one of `UNITS`; accuracies are in percent.
        note: what is doubtful, or was repaired.
    """

    paper: str
    table: str
    row: str
    dataset: str
    extra_data: str
    model: str
    defense: str
    regularizer: str
    params: dict[str, str]
    checkpoint: str
    train_norm: str
    threat: str
    surrogate: str
    attack: str
    value: float | None
    std: float | None
    unit: str
    note: str


COLUMNS = tuple(field.name for field in fields(Reported) if field.name != "paper")


def read_reported(paper: str, folder: Path = FOLDER) -> tuple[Reported, ...]:
    """All printed numbers of a paper, in the order of its tables; of "none" there are none.

    Raises:
        ReportedError: an unknown paper, a missing or damaged file; the message names what and where.

    Example:
        >>> first = read_reported("mimae")[0]
        >>> first.table, first.row, first.attack, first.value
        ('2', 'lambda=0.1', 'clean', 82.0)
    """
    if paper == NO_PAPER:
        return ()
    if paper not in PAPERS:
        raise ReportedError(f"paper={paper}: expected one of {', '.join(PAPERS)}")
    return _read(folder / f"{paper}.csv", paper)


@cache
def _read(path: Path, paper: str) -> tuple[Reported, ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if set(reader.fieldnames or ()) != set(COLUMNS):
                raise ReportedError(f"{path}: columns {reader.fieldnames}: expected {', '.join(COLUMNS)}")
            return tuple(_number(path, reader.line_num, paper, line) for line in reader)
    except OSError as error:
        raise ReportedError(f"{path}: cannot be read: {error.strerror or error}") from error


def _number(path: Path, line: int, paper: str, cells: dict[str, str]) -> Reported:
    where = f"{path}:{line}"
    if any(not isinstance(value, str) for value in cells.values()):
        raise ReportedError(f"{where}: {len(COLUMNS)} cells expected")
    if cells["unit"] not in UNITS:
        raise ReportedError(f"{where}: unit={cells['unit']!r}: expected one of {', '.join(UNITS)}")
    params = dict(_pair(where, part) for part in cells["params"].split(";") if part)
    values = {name: _value(where, cells[name]) for name in ("value", "std")}
    text = {name: cells[name] for name in COLUMNS if name not in ("params", *values)}
    return Reported(paper=paper, params=params, **values, **text)  # type: ignore[arg-type]


def _pair(where: str, part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ReportedError(f"{where}: params: {part!r}: expected name=value")
    return name, value


def _value(where: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ReportedError(f"{where}: {text!r}: expected a number, or nothing where the print is lost") from error


def tables_of(numbers: Iterable[Reported]) -> dict[str, list[Reported]]:
    """Printed numbers by table, in order."""
    tables: dict[str, list[Reported]] = {}
    for number in numbers:
        tables.setdefault(number.table, []).append(number)
    return tables
