"""A paper's table as data: its cells, what each of them overrides, and which printed numbers belong to it."""

from __future__ import annotations

import difflib
import fnmatch
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mi_at.results.reported import NO_PAPER, PAPERS, Reported

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
PARTS = (
    "name",
    "paper",
    "number",
    "title",
    "seeds",
    "rows",
    "shared",
    "columns",
    "more",
    "cells",
    "variants",
    "may_differ",
    "figure",
)
"""What the `table` node of conf/table/<name>.yaml has."""
TEXT = tuple(field.name for field in fields(Reported) if field.name not in ("paper", "table", "value", "std", "params"))


class TableError(ValueError):
    """A table that is asked for something it has not, or whose yaml is wrong; the message names it and the choices."""


@dataclass(frozen=True)
class Cell:
    """One run of a table (a row of the print, as a rule).

    Attributes:
        name: a word, unique in its table.
        printed: fields of `Reported` by which its printed numbers are found, without those that are not to count; of
            `params` only those that are named.
        overrides: what it sets beside the defaults of conf/train.yaml, those that all cells share among them.
    """

    name: str
    printed: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def row(self) -> str:
        """As the print calls it; its name where the print has several rows for it."""
        return str(self.printed.get("row", self.name))

    def has(self, number: Reported) -> bool:
        """Whether a printed number of the table is one of this cell's."""
        wanted = dict(self.printed)
        params = wanted.pop("params", {})
        return all(getattr(number, field) == str(value) for field, value in wanted.items()) and all(
            number.params.get(name) == str(value) for name, value in params.items()
        )


@dataclass(frozen=True)
class Job:
    """One run that a sweep starts.

    Attributes:
        cell: its name.
        overrides: the whole of its command line.
    """

    cell: str
    overrides: tuple[str, ...]

    @property
    def seed(self) -> int:
        """Of its training."""
        return int(next(part for part in self.overrides if key_of(part) == "seed").partition("=")[2])


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        name: that of its yaml, such as mimae_t5.
        paper: of the printed numbers ("mimae"); "none" for a table of our own.
        number: of the printed table ("5"); None where nothing of it is printed.
        title: what it shows.
        seeds: of training, each a run per cell.
        columns: the print's names of attacks -> ours, in the order they are shown.
        more: attacks of ours that are shown and that the paper has not.
        cells: by name, in order; only those that were asked for.
        may_differ: settings in which a record may differ from its cell; it is shown in a row of its own that says so.
        figure: name of what draws it (`mi_at.results.figures.FIGURES`); None for a table.
        others: its cells that were not asked for, by name.
        typed: values that all its cells have because they were typed; its title says so.
    """

    name: str
    paper: str
    number: str | None
    title: str
    seeds: tuple[int, ...]
    columns: Mapping[str, str]
    more: tuple[str, ...]
    cells: Mapping[str, Cell]
    may_differ: tuple[str, ...] = ()
    figure: str | None = None
    others: Mapping[str, Cell] = field(default_factory=dict)
    typed: tuple[str, ...] = ()

    @property
    def quoted(self) -> list[str]:
        """`typed`, as a shell takes it."""
        return [shlex.quote(word) for word in self.typed]

    def numbers(self, numbers: Iterable[Reported]) -> dict[str, dict[str, Reported]]:
        """The paper's printed numbers by cell and by the print's name of the attack.

        Args:
            numbers: all of the paper's.

        Raises:
            TableError: two numbers in one place.
        """
        found: dict[str, dict[str, Reported]] = {name: {} for name in self.cells}
        for number in numbers:
            if number.table != self.number or number.attack not in self.columns:
                continue
            for cell in self.cells.values():
                if cell.has(number):
                    if number.attack in found[cell.name]:
                        raise TableError(
                            f"{self.name}: cell {cell.name} has several printed numbers of {number.attack}: its "
                            "printed: must say more"
                        )
                    found[cell.name][number.attack] = number
        return found

    def jobs(self, typed: Sequence[Sequence[str]], groups: Collection[str]) -> list[Job]:
        """What a sweep runs: every cell with every seed, the whole table with the first seed first.

        Args:
            typed: combinations of overrides that were typed beside `table=...`, each "key=value"; they win. A typed
                seed replaces the table's.
            groups: names of config groups: one that a cell chooses cannot be typed.

        Raises:
            TableError: a typed group that a cell chooses, a typed name of a cell, or a seed that is none.

        Example:
            >>> cell = Cell("TRADES", {"row": "TRADES"}, ("dataset=digits", "defense=trades"))
            >>> table = Table("mimae_t5", "mimae", "5", "", (0, 1), {}, (), {"TRADES": cell})
            >>> for job in table.jobs([["budget=smoke"]], {"defense"}): print(*job.overrides)
            table.name=mimae_t5 cell=TRADES dataset=digits defense=trades resume=true tags=[mimae_t5,TRADES] seed=0
            budget=smoke
            table.name=mimae_t5 cell=TRADES dataset=digits defense=trades resume=true tags=[mimae_t5,TRADES] seed=1
            budget=smoke
        """
        jobs = []
        for chosen in typed:
            own = [override for override in chosen if key_of(override).partition(".")[0] != "table"]
            keys = {key_of(override) for override in own}
            if "cell" in keys:
                raise TableError(f"cell= is the table's own: table.rows=[...] says which cells of {self.name} run")
            for override in own:
                key, _, seed = override.partition("=")
                if key == "seed" and not seed.isdecimal():
                    raise TableError(f"seed={seed}: expected a whole number from 0, or several, such as seed=0,1,2")
            seeds = [own] if "seed" in keys else [[f"seed={seed}", *own] for seed in self.seeds]
            jobs += [self._job(cell, both, keys & set(groups)) for both in seeds for cell in self.cells.values()]
        return jobs

    def _job(self, cell: Cell, typed: Sequence[str], groups: Collection[str]) -> Job:
        chosen = {key_of(override): override for override in cell.overrides}
        if taken := sorted(set(groups) & set(chosen)):
            raise TableError(
                f"{taken[0]}= cannot be typed beside table={self.name}: its cell {cell.name} is {chosen[taken[0]]}; "
                f"table.rows=[...] says which cells run, and single values, {taken[0]}.<key>=, can be typed"
            )
        fixed = [f"table.name={self.name}", f"cell={cell.name}"]
        kept = ["resume=true", f"tags=[{self.name},{cell.name}]"]
        return Job(cell.name, tuple(last_of_each([*fixed, *cell.overrides, *kept, *typed])))


def near_to(word: str, words: Sequence[str]) -> str:
    """The end of a message about a word that is none of some: the one that was meant, perhaps.

    Example:
        >>> near_to("pgd20", ["clean", "pgd_20"]), near_to("fgsm", ["clean"])
        ('; did you mean pgd_20?', '')
    """
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def key_of(override: str) -> str:
    """What an override sets.

    Example:
        >>> key_of("+defense.beta=4"), key_of("regularizer=[ncmi]")
        ('defense.beta', 'regularizer')
    """
    return override.lstrip("+~").partition("=")[0]


def last_of_each(overrides: Iterable[str]) -> list[str]:
    """Of several overrides of one key the last, in the place of the first.

    Example:
        >>> last_of_each(["select=last", "seed=0", "select=best"])
        ['select=best', 'seed=0']
    """
    kept: dict[str, str] = {}
    for override in overrides:
        kept[key_of(override)] = override
    return list(kept.values())


def read_table(node: Mapping[str, Any]) -> Table:
    """The `table` node of a composed configuration, checked; of its cells those that `rows` asks for.

    Where there are `variants`, each cell is run in each of them: it is called `<cell>_<variant>`.

    Args:
        node: plain values.

    Raises:
        TableError: rows that the table has not, or a node that is not what a table needs.

    Example:
        >>> read_table({"name": "t", "paper": "mimae", "cells": {"TRADES": ["defense=trades"]}}).cells["TRADES"].printed
        {'row': 'TRADES'}
    """
    name = str(node.get("name"))
    if unknown := sorted(set(node) - set(PARTS)):
        raise TableError(f"table {name}: unknown {', '.join(unknown)}: expected {', '.join(PARTS)}")
    if node.get("paper") not in (*PAPERS, NO_PAPER):
        known = ", ".join((*PAPERS, NO_PAPER))
        raise TableError(f"table {name}: paper={node.get('paper')}: expected one of {known}")
    seeds = node.get("seeds") or [0]
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise TableError(f"table {name}: seeds={seeds}: expected whole numbers")
    shared = [str(override) for override in node.get("shared") or ()]
    made = [
        cell
        for word, own in (node.get("cells") or {}).items()
        for cell in _made(name, str(word), own, node.get("variants") or {}, shared)
    ]
    cells = {cell.name: cell for cell in made}
    if not cells:
        raise TableError(f"table {name} has no cells")
    number = node.get("number")
    chosen = _chosen(name, cells, node.get("rows"))
    return Table(
        name=name,
        paper=str(node["paper"]),
        number=None if number is None else str(number),
        title=str(node.get("title") or ""),
        seeds=tuple(seeds),
        columns={str(printed): str(attack) for printed, attack in (node.get("columns") or {}).items()},
        more=tuple(str(attack) for attack in node.get("more") or ()),
        cells=chosen,
        may_differ=tuple(str(key) for key in node.get("may_differ") or ()),
        figure=None if node.get("figure") is None else str(node["figure"]),
        others={word: cell for word, cell in cells.items() if word not in chosen},
    )


def _parts(table: str, name: str, own: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is printed of a cell or variant, and its overrides: the yaml's list of overrides, or both."""
    if not NAME.fullmatch(name):
        raise TableError(f"table {table}: a cell is called {name!r}: expected a word; its row goes to printed:")
    if isinstance(own, Sequence) and not isinstance(own, str):
        own = {"overrides": own}
    if not isinstance(own, Mapping) or not set(own) <= {"printed", "overrides"}:
        raise TableError(f"table {table}: cell {name}: expected a list of overrides, or printed: and overrides:")
    printed = dict(own.get("printed") or {})
    if unknown := sorted(set(printed) - {*TEXT, "params"}):
        raise TableError(f"table {table}: cell {name}: printed.{unknown[0]}: expected {', '.join(TEXT)}, params")
    return printed, tuple(str(override) for override in own.get("overrides") or ())


def _made(table: str, name: str, own: Any, variants: Mapping[str, Any], shared: Sequence[str]) -> Iterable[Cell]:
    """A cell of the yaml in each of its table's variants."""
    printed, overrides = _parts(table, name, own)
    printed = {"row": name, **printed}
    if not variants:
        yield Cell(name, _counting(printed), tuple(last_of_each([*shared, *overrides])))
    for variant, node in variants.items():
        further, more = _parts(table, f"{name}_{variant}", node)
        both = tuple(last_of_each([*shared, *more, *overrides]))
        yield Cell(f"{name}_{variant}", _counting({**printed, **further}), both)


def _counting(printed: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that are null: they do not count."""
    return {field: value for field, value in printed.items() if value is not None}


def _chosen(table: str, cells: Mapping[str, Cell], rows: Any) -> dict[str, Cell]:
    """The cells that are asked for by their names, by the rows of the print, or by patterns such as 'TRADES*'."""
    if rows is None:
        return dict(cells)
    found: set[str] = set()
    asked = [rows] if isinstance(rows, str) else list(rows)
    if not asked:
        raise TableError(f"table.rows=[]: leave it out for all rows; table {table} has {', '.join(cells)}")
    for row in asked:
        wanted = str(row)
        fitting = [
            name
            for name, cell in cells.items()
            if name == wanted or cell.row == wanted or fnmatch.fnmatchcase(name, wanted)
        ]
        if not fitting:
            words = [*cells, *(cell.row for cell in cells.values())]
            there = [name if cell.row == name else f"{name} ({cell.row})" for name, cell in cells.items()]
            raise TableError(f"table.rows=[{wanted}]: table {table} has {', '.join(there)}{near_to(wanted, words)}")
        found.update(fitting)
    return {name: cell for name, cell in cells.items() if name in found}
