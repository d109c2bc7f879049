"""python -m mi_at.report table=mimae_t5: a paper's numbers beside those that were measured here.

Further arguments are those of the sweep whose runs are wanted: budget=short, table.rows=[TRADES], seed=0,1. Measured
numbers come from the records in runs/ and results/measured/ whose configuration is the cell's, and from no others.
With format=html a folder of pages is written, out=site by default, of that table or, without table=, of all tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mi_at import checks, io, stages
from mi_at.cells import (
    MEASURED,
    bar,
    compose_table,
    is_within,
    listed,
    named_table,
    one_table,
    split_arguments,
    table_names,
    table_of,
    unquoted,
)
from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.figures import draw
from mi_at.results.measured import WITHIN, Filled, Found, Planned, fill, find_records, may_have, worst_of
from mi_at.results.records import NOT_HASHED
from mi_at.results.reported import ReportedError, read_reported
from mi_at.results.site import check_place, write_site
from mi_at.results.table_text import notes, render
from mi_at.results.tables import Job, Table, TableError, key_of

FORMATS = ("terminal", "markdown", "latex", "csv", "html", "svg")
OF_ALL_TABLES = ("budget", "seed", "runs", "hydra.searchpath")
OF_THE_SAME_CELLS = (*NOT_HASHED, "budget", "seed")
"""What leaves a table's cells what they are; every other value that is typed makes other cells."""


@dataclass(frozen=True)
class Asked:
    """A table as a command line asks for it.

    Attributes:
        table: with the cells that are wanted.
        jobs: of each cell the first.
        seeds: that were typed; None where none was.
        budget: of all its runs.
        choices: from config groups, where a cell leaves them open.
    """

    table: Table
    jobs: Mapping[str, Job]
    seeds: tuple[int, ...] | None
    budget: str
    choices: Mapping[str, str]

    def cells(self, found: Sequence[Found]) -> list[str]:
        """Those that there can be records of."""
        return [cell.name for cell in self.table.cells.values() if may_have(self.table, cell, found, self.choices)]

    def filled(self, planned: Mapping[str, Planned], found: Sequence[Found]) -> Filled:
        """With what was measured."""
        numbers = read_reported(self.table.paper)
        return fill(self.table, planned, numbers, found, seeds=self.seeds, budget=self.budget, choices=self.choices)


def _asked(table: Table, overrides: Sequence[str], cfg: DictConfig, typed: Sequence[Sequence[str]]) -> Asked:
    jobs = table.jobs(typed, cfg.hydra.runtime.choices)
    first = {job.cell: job for job in reversed(jobs)}
    if len({tuple(part for part in job.overrides if key_of(part) != "seed") for job in jobs}) > len(first):
        raise TableError("a report shows one value of each option: only seed= may have several")
    seeds = tuple(sorted({job.seed for job in jobs})) if "seed" in map(key_of, overrides) else None
    if values := tuple(override for override in overrides if not is_within(key_of(override), OF_THE_SAME_CELLS)):
        table = replace(table, title=f"{table.title}, with {' '.join(values)}", typed=values)
    return Asked(table, first, seeds, str(cfg.budget), dict(cfg.hydra.runtime.choices))


def plan_of(job: Job) -> Planned:
    """The configuration of a job, as its run will have it, checked.

    Raises:
        ValueError: a value that cannot be used; the message names the cell.
    """
    try:
        config = io.compose_run(job.overrides)
        checks.check(config)
        with torch.device("meta"):
            io.build_defense(config, io.build_net(config["model"]))
        for part in ("attack", "optim"):
            io.build(part, config[part])
        config = stages.identify(config)
        attacks = {CLEAN: {"attack": CLEAN}}
        for name, attack in io.build_attacks(config["evaluation"]).items():
            says = dict(attack.describe())
            attacks[name] = says
            if getattr(attack, "minimum_norm", False) and says.get("within") is not None:
                attacks[name + WITHIN] = {**says, "eps": says["within"]}
        attacks |= worst_of(attacks)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"cell {job.cell}: {io.explain(error)} (table.rows=[...] says which cells)") from error
    return Planned(config, attacks)


def report(overrides: Sequence[str], folders: Sequence[str | Path], columns: Sequence[str] | None = None) -> Filled:
    """A table with what was measured of it.

    Args:
        overrides: table=<name>, and what else is typed.
        folders: that hold the records.
        columns: those that are shown, as `Filled.of_columns` takes them; None: all.

    Raises:
        TableError, ValueError: as `cells.composed`; also several values of anything but the seed.
    """
    found, damaged = find_records(folders)
    with io.composing():
        one_table(overrides)
        cfg, typed = compose_table(overrides)
        asked = _asked(table_of(cfg), overrides, cfg, typed)
        # The first cell always, so that what was typed is checked.
        cells = dict.fromkeys([next(iter(asked.table.cells)), *asked.cells(found)])
        planned = {cell: plan_of(asked.jobs[cell]) for cell in bar(cells, "cells with records")}
    filled = asked.filled(planned, found)
    filled.aside += damaged
    return filled if columns is None else filled.of_columns(columns)


def reports(overrides: Sequence[str], found: Sequence[Found]) -> list[Filled]:
    """Tables for a site, a bar in a terminal while they are composed.

    Args:
        overrides: table=<name>, else all tables; budget=<name>, else the paper's and every one that there are records
            of, tables of which nothing was measured there left out.
        found: records.

    Raises:
        TableError, ValueError: as `cells.composed`; what all tables cannot have.
    """
    kept = [override for override in overrides if key_of(override) != "budget"]
    if named_table(overrides) is None and (other := [o for o in overrides if key_of(o) not in OF_ALL_TABLES]):
        raise TableError(f"{other[0]}: all tables take {', '.join(OF_ALL_TABLES)}; table=<name> takes more")
    if named_table(overrides) is not None:
        one_table(overrides)
    typed_budget = [override for override in overrides if key_of(override) == "budget"]
    known = {each.record.budget for each in found} & set(io.names_in("budget")) - {"paper"}
    budgets = typed_budget or ["budget=paper", *(f"budget={name}" for name in sorted(known))]
    with io.composing():
        wanted: list[Asked] = []
        tables: list[Table] = []
        for budget in budgets:
            cfg, typed = compose_table([*kept, budget])
            tables = tables or ([table_of(cfg)] if named_table(overrides) else _all_tables(kept))
            wanted += [_asked(table, kept, cfg, typed) for table in tables]
        cells = [(place, cell) for place, asked in enumerate(wanted) for cell in asked.cells(found)]
        planned: list[dict[str, Planned]] = [{} for _ in wanted]
        for place, cell in bar(cells, "cells with records"):
            planned[place][cell] = plan_of(wanted[place].jobs[cell])
    filled = [asked.filled(plans, found) for asked, plans in zip(wanted, planned, strict=True)]
    first = filled[0].budget
    return [each for each in filled if each.budget == first or any(line.values for line in each.lines)]


def _all_tables(overrides: Sequence[str]) -> list[Table]:
    """Every table, without conf/train.yaml, which takes four times as long and adds nothing to the node."""
    path = [override for override in overrides if key_of(override) == "hydra.searchpath"]
    return [table_of(hydra.compose(f"table/{name}", overrides=path)) for name in bar(table_names(), "tables")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(
            f"{__doc__}\nformat= {' | '.join(FORMATS)}; columns=[pgd_20,...] for some of a text's; "
            "records=[folder,...] for other folders of records."
        )
        return
    try:
        options = {"format": "terminal", "records": "", "out": "", "columns": "all"}
        own, overrides, folders = split_arguments(given, options, measured=_near(MEASURED))
        typed = next((override for override in overrides if key_of(override) == "runs"), None)
        if typed and not Path(unquoted(typed.partition("=")[2])).is_dir():
            raise TableError(f"{typed}: there is no such folder, and so no records of yours")
        if own["format"] not in FORMATS:
            raise TableError(f"format={own['format']}: expected one of {', '.join(FORMATS)}")
        columns = None if own["columns"] == "all" else listed(own["columns"])
        if columns is not None and own["format"] in ("html", "svg"):
            raise TableError(f"columns={own['columns']}: format={own['format']} shows all; a text may have fewer")
        if own["format"] == "html":
            _write_site(overrides, folders, own["out"] or "site")
        elif own["out"]:
            raise TableError(f"out={own['out']}: only format=html writes files; > {own['out']} keeps a text")
        else:
            filled = report(overrides, folders, columns)
            if own["format"] in ("csv", "svg"):  # which have no place for it
                _say(notes(filled))
            print(draw(filled) if own["format"] == "svg" else render(filled, own["format"]), end="")
    except (TableError, ReportedError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _write_site(overrides: Sequence[str], folders: Sequence[str], out: str) -> None:
    check_place(Path(out))
    found, damaged = find_records(folders)
    tables = reports(overrides, found)
    budgets = {override.partition("=")[2] for override in overrides if key_of(override) == "budget"}
    found = [each for each in found if not budgets or each.record.budget in budgets]
    index = write_site(out, tables, found, damaged, folders=folders, everything=named_table(overrides) is None)
    runs = sum(1 for _ in (index.parent / "runs").glob("*.html"))
    counted = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(tables), "table"), (runs, "run"))]
    print(f"{index}: {', '.join(counted)}")
    refused = dict.fromkeys(said for filled in tables for said in filled.aside if said.startswith("refused"))
    _say([*damaged, *refused])


def _say(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(sentence, file=sys.stderr)


def _near(path: Path) -> Path:
    """From here where that is possible: what a page says of a record must not name this machine's folders."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
