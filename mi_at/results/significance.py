"""Which rows of a table differ from their baseline by more than the seeds do.

Mean and standard deviation over seeds, differences paired over the seeds that both have, Student's t interval, Holm's
rule over all rows of a column: rows that are not asked for count too, so that a choice of rows makes nothing better.
Where fewer than two seeds are in common, nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mi_at.results.measured import Filled, Line, chosen
from mi_at.results.statistics import Difference, holm, paired_over_seeds
from mi_at.results.tables import Cell, Table

Key = tuple[str, str, str, str]
BASE, CONTROL = "standard_at", "_without"
ALIKE = ("dataset", "model", "evaluation", "select")
PRINTED_ALIKE = ("dataset", "extra_data", "model", "checkpoint", "train_norm", "threat", "surrogate")


@dataclass(frozen=True)
class Against:
    """A number beside its baseline's.

    Attributes:
        baseline: the other cell's name.
        difference: of accuracies in [-1, 1], this minus the baseline's, over the seeds in common.
        p: of no difference, adjusted for the rows of the column.
    """

    baseline: str
    difference: Difference
    p: float

    @property
    def verdict(self) -> str:
        """What may be said: "better", "worse", or "no clear difference"."""
        if not self.difference.clear or self.p >= 0.05:
            return "no clear difference"
        return "better" if self.difference.value > 0 else "worse"


def baseline_of(table: Table, name: str) -> str | None:
    """The cell that another is compared with: its control, by name <cell>_without, where the table has one.

    Else the same without its regularizer, else standard adversarial training, of the same data, network, evaluation and
    checkpoint; of several the one with the fewest changes, and where several have as few, none. What is standard
    adversarial training itself is compared with one that has fewer changes.

    Args:
        table: with both.
        name: of the cell.

    Example:
        >>> rows = {"at": ["defense=standard_at"], "t": ["defense=trades"]}
        >>> rows["tn"] = [*rows["t"], "regularizer=ncmi"]
        >>> rows["at_twice"] = [*rows["at"], "optim.epochs=200"]
        >>> cells = {name: Cell(name, {}, tuple(own)) for name, own in rows.items()}
        >>> table = Table("t", "ncmi", "2", "", (0, 1), {}, (), cells)
        >>> [baseline_of(table, name) for name in cells]
        [None, 'at', 't', 'at']
    """
    cells = {**table.cells, **table.others}
    if name + CONTROL in cells:
        return name + CONTROL
    cell = cells[name]
    others = [other for other in cells.values() if other.name != name and _setting(other) == _setting(cell)]
    bare = [other for other in others if chosen(other, "regularizer", {}) == "none"]
    defense, added = chosen(cell, "defense", {}), chosen(cell, "regularizer", {})
    wanted = defense if added != "none" else BASE
    found = [other for other in bare if chosen(other, "defense", {}) == wanted]
    if added == "none" and defense == BASE:
        found = [other for other in found if len(other.overrides) < len(cell.overrides)]
    fewest = min((len(other.overrides) for other in found), default=0)
    plain = [other.name for other in found if len(other.overrides) == fewest]
    return plain[0] if len(plain) == 1 else None


def _setting(cell: Cell) -> tuple[Any, ...]:
    choices = tuple(chosen(cell, group, {}) for group in ALIKE)
    return choices + tuple(cell.printed.get(field) for field in PRINTED_ALIKE)


def key_of_line(line: Line) -> Key:
    """What a number is told from the others of its table by: cell, what it differs in, column, attack."""
    return line.cell, line.unlike, line.column, line.attack


def against(filled: Filled) -> dict[Key, Against]:
    """What can be said of a table's numbers, by `key_of_line`.

    Args:
        filled: the table.
    """
    table = filled.table
    whole = {**table.cells, **table.others}
    bases = {name: baseline_of(table, name) for name in whole}
    lines = {key_of_line(line): line for line in filled.lines}
    found: dict[Key, tuple[str, Difference]] = {}
    for key, line in lines.items():
        base = bases[line.cell]
        other = lines.get((base, *key[1:])) if base is not None else None
        if base is not None and other is not None and (gap := _gap(line, other)) is not None:
            found[key] = (base, gap)
    compared = Counter(_data_and_network(whole[name]) for name, base in bases.items() if base is not None)
    return _adjusted(found, lines, lambda line: compared[_data_and_network(whole[line.cell])])


def _gap(line: Line, base: Line) -> Difference | None:
    seeds = sorted(line.values.keys() & base.values.keys())
    if len(seeds) < 2 or line.n is None or line.n != base.n:
        return None
    return paired_over_seeds(*([side.values[seed] / 100 for seed in seeds] for side in (base, line)), n=line.n)


def missing_baselines(filled: Filled) -> list[str]:
    """Cells that others would be compared with, and that were not asked for."""
    if not filled.table.others:
        return []
    bases = {baseline_of(filled.table, name) for name in filled.table.cells}
    return [name for name in filled.table.others if name in bases]


def _data_and_network(cell: Cell) -> tuple[Any, Any]:
    return chosen(cell, "dataset", {}), chosen(cell, "model", {})


def _adjusted(
    found: Mapping[Key, tuple[str, Difference]], lines: Mapping[Key, Line], methods: Callable[[Line], int]
) -> dict[Key, Against]:
    """Holm's rule over the table's methods on one data set and network, whether or not they were asked for and run."""
    groups: dict[tuple[str, ...], list[Key]] = {}
    for key in found:
        line = lines[key]
        groups.setdefault((line.column, line.attack, line.dataset, line.model), []).append(key)
    made = {}
    for keys in groups.values():
        gaps, of = [found[key] for key in keys], methods(lines[keys[0]])
        for key, (base, gap), p in zip(keys, gaps, holm([gap.p or 0.0 for _, gap in gaps], of=of), strict=True):
            made[key] = Against(base, gap, p)
    return made
