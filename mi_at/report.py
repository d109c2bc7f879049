"""python -m mi_at.report table=mimae_t5: a paper's numbers beside those that were measured here.

Further arguments are those of the sweep whose runs are wanted: budget=short, table.rows=[TRADES], seed=0,1. Measured
numbers come from the records in runs/ and results/measured/ whose configuration is the cell's, and from no others.
"""

from __future__ import annotations

import csv
import io as streams
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mi_at import checks, io
from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.measured import WITHIN, Filled, Line, Planned, fill, find_records
from mi_at.results.reported import FOLDER, ReportedError, read_reported
from mi_at.results.tables import Job, Table, TableError, key_of, read_table
from mi_at.results.terminal import NOT_RUN

FORMATS = ("terminal", "markdown", "latex", "csv")
MEASURED = FOLDER.parent / "measured"
HEADINGS = ("row", "attack", "reported", "measured (seeds)", "n", "difference", "flags", "audit")
CSV = (
    "table",
    "cell",
    "row",
    "dataset",
    "model",
    "budget",
    "column",
    "attack",
    "reported",
    "reported_std",
    "unit",
    "measured",
    "std",
    "seeds",
    "n",
    "difference",
    "flags",
    "audit",
    "note",
)
LATEX = {"\\": r"\textbackslash{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}"}


def composed(overrides: Sequence[str]) -> tuple[Table, list[Job]]:
    """A table as a command line asks for it, and the jobs that a sweep with the same arguments would run.

    Args:
        overrides: table=<name>, and what else is typed.

    Raises:
        TableError: no table, or one that is asked for what it has not.
        ValueError: an unknown name or key; the message names those there are.
    """
    name = next((override.partition("=")[2] for override in overrides if key_of(override) == "table"), "none")
    if name == "none":
        raise TableError(f"which table? table= one of {', '.join(table_names())}")
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    single = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    cfg = hydra.compose("train", overrides=single, return_hydra_config=True)
    node: Any = OmegaConf.to_container(cfg.table, resolve=False)  # interpolations are the job's to resolve
    table = read_table(node)
    typed = BasicSweeper.split_arguments(parsed, None)[0]
    return table, table.jobs(typed, cfg.hydra.runtime.choices)


def table_names() -> list[str]:
    """Tables that there are."""
    return [name for name in io.names_in("table") if name != "none"]


def plan_of(job: Job) -> Planned:
    """The configuration of a job, as its run will have it, checked.

    Raises:
        ValueError: a value that cannot be used; the message names the cell.
    """
    try:
        cfg = hydra.compose("train", overrides=list(job.overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        config = io.resolve(cfg)
        checks.check(config)
        attacks = {CLEAN: {"attack": CLEAN}}
        for name, attack in io.build_attacks(config["evaluation"]).items():
            says = dict(attack.describe())
            attacks[name] = says
            if getattr(attack, "minimum_norm", False) and says.get("within") is not None:
                attacks[name + WITHIN] = {**says, "eps": says["within"]}
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"cell {job.cell}: {io.explain(error)}") from error
    return Planned(config, attacks)


def report(overrides: Sequence[str], folders: Sequence[str | Path]) -> Filled:
    """A table with what was measured of it.

    Args:
        overrides: table=<name>, and what else is typed.
        folders: that hold the records.

    Raises:
        TableError, ValueError: as `composed`; also several values of anything but the seed.
    """
    io.register_resolvers()
    before, composed_before = GlobalHydra.get_state(), HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(io.conf_dir(), version_base="1.3"):
            table, jobs = composed(overrides)
            seeds = sorted({_seed(job) for job in jobs})
            first = {job.cell: job for job in reversed(jobs)}
            apart = {tuple(part for part in job.overrides if key_of(part) != "seed") for job in jobs}
            if len(apart) > len(first):
                raise TableError("a report shows one value of each option: only seed= may have several")
            planned = {cell: plan_of(first[cell]) for cell in table.cells}
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(io.explain(error)) from error
    finally:
        GlobalHydra.set_state(before)
        HydraConfig.instance().cfg = composed_before
    typed = any(key_of(override) == "seed" for override in overrides)
    found, damaged = find_records(folders)
    filled = fill(table, planned, read_reported(table.paper), found, seeds=seeds if typed else None)
    filled.aside += damaged
    return filled


def _seed(job: Job) -> int:
    return int(next(part for part in job.overrides if key_of(part) == "seed").partition("=")[2])


# ---------------------------------------------------------------- how it is shown
def render(filled: Filled, form: str) -> str:
    """The table as text.

    Args:
        filled: what to show.
        form: one of `FORMATS`.

    Returns:
        Lines, ending with a newline.
    """
    if form == "csv":
        return _csv(filled)
    rows = [_cells(line) for line in filled.lines]
    notes = _notes(filled)
    if form == "latex":
        return _latex(filled, rows, notes)
    if form == "markdown":
        table = [HEADINGS, ["---", "---", *["---:"] * 4, "---", "---"], *rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        listed = ["", *(f"- {note}" for note in notes)] if notes else []
        return "\n".join([f"**{_title(filled)}**", "", *lines, *listed]) + "\n"
    table = [HEADINGS, *_without_repetition(rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([_title(filled), *lines, *notes]) + "\n"


def _title(filled: Filled) -> str:
    size = "" if filled.budget == "paper" else f" (budget {filled.budget}: not the size the paper ran)"
    return f"{filled.table.title}{size}"


def _cells(line: Line) -> tuple[str, ...]:
    same_as_cell = line.row == line.cell
    row = line.cell if same_as_cell else f"{line.cell}: {line.row}"
    attack = line.attack if line.column == line.attack else f"{line.column}: {line.attack}"
    difference = NOT_RUN if line.difference is None else f"{line.difference:+.2f}"
    return (
        row,
        attack,
        _reported(line),
        _measured(line),
        NOT_RUN if line.n is None else str(line.n),
        difference,
        " ".join(line.flags) or NOT_RUN,
        line.audit or NOT_RUN,
    )


def _reported(line: Line) -> str:
    number = line.reported
    if number is None:
        return NOT_RUN
    value = "lost" if number.value is None else f"{number.value:.2f}"
    spread = "" if number.std is None else f" +- {number.std:.2f}"
    return f"{value}{spread}{'*' if number.note else ''}"


def _measured(line: Line) -> str:
    if line.mean is None:
        return NOT_RUN
    spread = "" if line.std is None else f" +- {line.std:.2f}"
    return f"{line.mean:.2f}{spread} ({len(line.values)})"


def _notes(filled: Filled) -> list[str]:
    """What is doubtful in the print, what nothing was run for, and which records are not shown."""
    doubtful: dict[str, list[str]] = {}
    for line in filled.lines:
        if line.reported is not None and line.reported.note:
            doubtful.setdefault(line.reported.note, []).append(f"{line.cell} {line.column}")
    notes = [f"* {note} ({', '.join(places)})" for note, places in doubtful.items()]
    if not any(line.values for line in filled.lines):
        run = f"python -m mi_at.train -m table={filled.table.name}"
        budget = "" if filled.budget == "paper" else f" budget={filled.budget}"
        notes.append(f"nothing of this table was run at budget {filled.budget}: {run}{budget}")
    return [*notes, *filled.aside]


def _without_repetition(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows in which a row's name stands once."""
    shown: list[Sequence[str]] = []
    last = None
    for row in rows:
        shown.append(["" if row[0] == last else row[0], *row[1:]])
        last = row[0]
    return shown


def _latex(filled: Filled, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    def text(words: str) -> str:
        return "".join(LATEX.get(sign, sign) for sign in words).replace("+-", r"$\pm$")

    body = [" & ".join(text(cell) for cell in row) + r" \\" for row in _without_repetition(rows)]
    return (
        "\n".join(
            [
                *(f"% {note}" for note in notes),
                r"\begin{table}",
                rf"\caption{{{text(_title(filled))}}}",
                r"\begin{tabular}{llrrrrll}",
                " & ".join(text(heading) for heading in HEADINGS) + r" \\ \hline",
                *body,
                r"\end{tabular}",
                r"\end{table}",
            ]
        )
        + "\n"
    )


def _csv(filled: Filled) -> str:
    """A line per number, values in full; empty where there is none."""
    stream = streams.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV)
    for line in filled.lines:
        number = line.reported
        values = {
            "table": filled.table.name,
            "cell": line.cell,
            "row": line.row,
            "dataset": line.dataset,
            "model": line.model,
            "budget": filled.budget,
            "column": line.column,
            "attack": line.attack,
            "reported": number.value if number else None,
            "reported_std": number.std if number else None,
            "unit": number.unit if number else "percent",
            "measured": line.mean,
            "std": line.std,
            "seeds": " ".join(str(seed) for seed in line.values),
            "n": line.n,
            "difference": line.difference,
            "flags": " ".join(line.flags),
            "audit": line.audit,
            "note": number.note if number else "",
        }
        writer.writerow(["" if values[name] is None else values[name] for name in CSV])
    return stream.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(f"{__doc__}\nformat= {' | '.join(FORMATS)}; records=[folder,...] for other folders of records.")
        return
    own = {"format": "terminal", "records": ""}
    overrides = []
    for argument in given:
        key, equals, value = argument.partition("=")
        if key in own and equals:
            own[key] = value
        else:
            overrides.append(argument)
    folders = [part.strip() for part in own["records"].strip("[]").split(",") if part.strip()]
    runs = next((o.partition("=")[2] for o in overrides if key_of(o) == "runs"), "runs")
    try:
        if own["format"] not in FORMATS:
            raise TableError(f"format={own['format']}: expected one of {', '.join(FORMATS)}")
        print(render(report(overrides, folders or [runs, MEASURED]), own["format"]), end="")
    except (TableError, ReportedError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
