"""Tables of records: in a terminal, as plain text, and as Markdown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, TextIO

from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import CLEAN
from mi_at.functional.geometry import parse_eps
from mi_at.results.records import AttackRecord, Record

HEADINGS = ("attack", "norm", "eps", "steps", "n", "accuracy %", "flags")
MOST_NAMED = 4  # of the members of a worst case
BARE_FROM = 1000  # below so many samples the interval is printed beside the number (the audit's n_small)
NOT_RUN = "-"
FURTHER = ("c", "lr", "binary_search", "kernel", "decay", "prob", "tap", "method", "samples")
"""Settings of single attacks, written as they are called."""
STARTS = {"zero": "from the image", "uniform": "uniform start", "gaussian": "Gaussian start"}
GRAVE = ("fail", "warn")  # severities of the audit that are always spelled out
_RIGHT = {"eps", "steps", "n", "accuracy %"}


def print_table(record: Record, *, stream: TextIO | None = None) -> None:
    """Print a record's rows, a sentence per flag below them, and what the audit found where there was one.

    Args:
        record: what to show.
        stream: where to; standard output by default. Colours and lines in a terminal, plain columns
            elsewhere.
    """
    stream = stream if stream is not None else sys.stdout
    title = f"{record.key}: {record.split} split, {record.checkpoint['rule']} checkpoint, budget {record.budget}"
    rows = [table_row(row) for row in record.attacks]
    notes = [*flag_lines(record), *audit_lines(record)]
    right = [place for place, heading in enumerate(HEADINGS) if heading in _RIGHT]
    if not (stream.isatty() and _print_rich(title, rows, notes, stream)):
        stream.write("\n".join([title, *columns([HEADINGS, *rows], right), *notes]) + "\n")
    stream.flush()


def flag_lines(record: Record) -> list[str]:
    """Every sentence about a flag once, after the rows it is about; a worst case only where no attack has said it."""
    said: dict[str, list[AttackRecord]] = {}
    for row in record.attacks:
        for flag in row.flags:
            if flag in row.messages:
                said.setdefault(row.messages[flag], []).append(row)
    lines = []
    for sentence, rows in said.items():
        attacks = [row for row in rows if "members" not in row.description] or rows
        lines.append(f"{', '.join(row.name for row in attacks)}: {sentence}")
    return lines


def audit_lines(record: Record) -> list[str]:
    """The verdict, every finding that speaks against the numbers, and how many other checks ended how.

    Args:
        record: one that was not audited gives nothing.
    """
    if not record.audit:
        return []
    findings = record.audit.get("findings", [])
    grave = [finding for severity in GRAVE for finding in findings if finding["severity"] == severity]
    lines = [f"audit: {record.audit['verdict']}"]
    for found in grave:
        todo = f" To do: {found['todo']}." if found["todo"] else ""
        lines.append(
            f"  {found['severity']} {found['check']}: {found['measured']}. {_sentence(found['meaning'])}.{todo}"
        )
    counts = Counter(finding["severity"] for finding in findings if finding not in grave)
    if counts:
        others = ", ".join(f"{count} {severity}" for severity, count in sorted(counts.items()))
        lines.append(f"  {'other checks' if grave else 'checks'}: {others}")
    return lines


def print_header(title: str, facts: Mapping[str, str], *, stream: TextIO | None = None) -> None:
    """Print what a run is before it starts, a line per fact."""
    stream = stream if stream is not None else sys.stdout
    width = max(len(name) for name in facts)
    stream.write("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]) + "\n")
    stream.flush()


def table_row(row: AttackRecord) -> tuple[str, ...]:
    """One row's cells, in the order of `HEADINGS`."""
    clean = row.name == CLEAN
    members = row.description.get("members", ())
    return (
        f"worst of {len(members)} attacks" if len(members) > MOST_NAMED else row.name,
        NOT_RUN if clean or row.norm is None else row.norm,
        NOT_RUN if clean or row.eps is None else format_eps(row.eps),
        NOT_RUN if row.steps is None else str(row.steps),
        str(row.n),
        format_accuracy(row.correct, row.n),
        " ".join(row.flags) or NOT_RUN,
    )


def markdown_table(records: Sequence[Record], columns: Sequence[str] | Mapping[str, str], *, first: str = "run") -> str:
    """Records as a Markdown table: a row per key and its seeds, a column per attack.

    The heading of a column names eps and n, which must be the same in all rows: a table never mixes them. Where a
    record was audited, the last column holds the verdicts. A flag of every number of a row stands behind its name.
    Records of one key and other seeds share a row, whose places hold a number for each, in order and without intervals.

    Args:
        records: the rows.
        columns: names of attacks, or names and headings; an attack that a record lacks prints "-".
        first: heading of the first column, which holds the records' keys.

    Returns:
        The lines, ending with a newline.

    Raises:
        ValueError: records of different eps, n, settings of an attack, split or budget.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    for what in ("split", "budget"):
        if len(found := {str(getattr(record, what)) for record in records}) > 1:
            raise ValueError(f"a table never mixes values of {what}, found {', '.join(sorted(found))}")
    rows: list[list[Record]] = []
    for record in records:
        seeds = next((row for row in rows if row[0].key == record.key and record.seed not in _seeds(row)), None)
        if seeds is None:
            rows.append([record])
        else:
            seeds.append(record)
    audited = any(record.audit for record in records)
    titles = [
        _column_title(heading, name, [_find(each, name) for each in records]) for name, heading in headings.items()
    ]
    lines = [
        markdown_row([first, *titles, *(["audit"] if audited else [])]),
        markdown_row(["---", *("---:" for _ in headings), *(["---"] if audited else [])]),
    ]
    for seeds in rows:
        said = [_flags_of_all([_find(each, name) for name in headings]) for each in seeds]
        flagged = dict(zip(_seeds(seeds), said, strict=True))
        behind = [_behind(flag, flagged) for flag in sorted(set().union(*said))]
        bare = len(rows) < len(records)
        cells = [_cell({each.seed: _find(each, name) for each in seeds}, flagged, bare=bare) for name in headings]
        verdicts = [" ".join(str(each.audit.get("verdict", NOT_RUN)) for each in seeds)] if audited else []
        lines.append(markdown_row([f"`{seeds[0].key}`" + "".join(behind), *cells, *verdicts]))
    return "\n".join(lines) + "\n"


def format_accuracy(correct: int, n: int) -> str:
    """Per cent with two decimals; with the 95 % interval and one decimal where n is small.

    Example:
        >>> format_accuracy(84, 100), format_accuracy(8400, 10000)
        ('84.0 [75.6, 89.9]', '84.00')
    """
    if n >= BARE_FROM:
        return f"{100 * correct / n:.2f}"
    return f"{100 * correct / n:.1f}{interval_text(correct, n)}"


def interval_text(correct: float, n: int) -> str:
    """The 95 % interval in per cent as the end of a number; empty where n is large enough for a bare one.

    Example:
        >>> interval_text(84, 100), interval_text(8400, 10000)
        (' [75.6, 89.9]', '')
    """
    bounds = interval(correct, n)
    return "" if bounds is None else f" [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def interval(correct: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval in per cent; None where n is large enough for a bare number."""
    if n >= BARE_FROM:
        return None
    low, high = wilson(correct, n)
    return 100 * low, 100 * high


def format_eps(eps: float | str) -> str:
    """A radius as users write it: a short decimal, or a fraction of 255 where it is one.

    Example:
        >>> format_eps(8 / 255), format_eps(0.031), format_eps("2/255"), format_eps(0.3)
        ('8/255', '0.031', '2/255', '0.3')
    """
    if isinstance(eps, str):
        return eps
    value = parse_eps(eps)
    if abs(round(value, 4) - value) < 1e-9:
        return f"{round(value, 4):g}"
    levels = value * 255
    if round(levels) and abs(levels - round(levels)) < 1e-5:
        return f"{round(levels)}/255"
    return f"{value:.4g}"


def of_seeds(flag: str, flagged: Mapping[int, Collection[str]]) -> str:
    """Which seeds have a flag; empty where all have it.

    Example:
        >>> of_seeds("reach", {0: ["reach"], 1: []}), of_seeds("reach", {0: ["reach"]})
        ('seed 0', '')
    """
    having = [str(seed) for seed, flags in flagged.items() if flag in flags]
    return "" if len(having) == len(flagged) else f"seed {', '.join(having)}"


def in_words(says: Mapping[str, Any]) -> str:
    """What an attack is, by what it says of itself.

    Example:
        >>> in_words({"norm": "linf", "eps": 8 / 255, "steps": 20}), in_words({"norm": "l2", "eps": None})
        ('linf, eps 8/255, 20 steps', 'l2, no bound')
    """
    return ", ".join(filter(None, [ball(says), settings(says)]))


def ball(says: Mapping[str, Any]) -> str:
    """What an attack may do, by what it says of itself.

    Example:
        >>> ball({"norm": "linf", "eps": 8 / 255}), ball({"norm": "l2", "eps": None})
        ('linf, eps 8/255', 'l2, no bound')
        >>> ball({"norm": "wasserstein", "budget": 8 / 255})
        'wasserstein, budget 8/255'
    """
    norm = says.get("norm") or "no norm"
    for bound in ("eps", "budget"):
        if says.get(bound) is not None:
            return f"{norm}, {bound} {format_eps(says[bound])}"
    return f"{norm}, no bound"


def settings(says: Mapping[str, Any]) -> str:
    """What it does within its ball; empty where nothing is attacked.

    Example:
        >>> settings({"steps": 20, "step_size": 2 / 255, "restarts": 10, "objective": "margin", "kappa": 50.0})
        '20 steps of 2/255, 10 restarts, margin, kappa 50'
        >>> settings({"attacks": ["square"], "name": "square", "queries": 5000, "targets": 9})
        '5000 queries'
    """
    if "members" in says:
        return "worst of " + ", ".join(says["members"])
    words = []
    if (steps := says.get("steps")) is not None:
        step = says.get("step_size")
        words.append(f"{steps} step{'s' * (steps != 1)}" + (f" of {format_eps(step)}" if step else ""))
    restarts = says.get("restarts")
    if isinstance(restarts, int) and restarts > 1:
        words.append(f"{restarts} restarts")
    if says.get("objective"):
        words.append(str(says["objective"]).replace("_", " "))
    if says.get("kappa") is not None and says.get("objective") in (None, "margin"):
        words.append(f"kappa {says['kappa']:g}")
    parts = [str(part) for part in says.get("attacks") or ()]
    if parts != [says.get("name")]:
        words += parts
    if "square" in parts:
        words.append(f"{says['queries']} queries")
    if {"apgd-t", "fab-t"} & set(parts):
        words.append(f"{says['targets']} targets")
    words += [f"{key.replace('_', ' ')} {says[key]}" for key in FURTHER if says.get(key) is not None]
    if says.get("init"):
        words.append(STARTS.get(str(says["init"]), f"start {says['init']}"))
    if isinstance(surrogate := says.get("surrogate"), Mapping) and surrogate.get("name"):
        words.append(f"made on {surrogate['name']}")
    return ", ".join(words)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _find(record: Record, name: str) -> AttackRecord | None:
    return next((row for row in record.attacks if row.name == name), None)


def _seeds(records: Sequence[Record]) -> list[int]:
    return [record.seed for record in records]


def _flags_of_all(rows: Sequence[AttackRecord | None]) -> set[str]:
    """What every number of a record is flagged with."""
    flags = [set(row.flags) for row in rows if row is not None]
    return set.intersection(*flags) if len(flags) > 1 else set()


def _cell(rows: Mapping[int, AttackRecord | None], said: Mapping[int, Set[str]], *, bare: bool) -> str:
    """Numbers, one a seed, and their flags but those that are said already; bare: without intervals."""
    left = {seed: [flag for flag in row.flags if flag not in said[seed]] for seed, row in rows.items() if row}
    flags = dict.fromkeys(flag for own in left.values() for flag in own)
    numbers = " ".join(_number(row, bare=bare) for row in rows.values())
    return numbers + "".join(_behind(flag, left) for flag in flags)


def _behind(flag: str, flagged: Mapping[int, Collection[str]]) -> str:
    """A flag as it stands behind what it is of, with its seeds where not all have it."""
    return f" ({': '.join(filter(None, [flag, of_seeds(flag, flagged)]))})"


def _number(row: AttackRecord | None, *, bare: bool) -> str:
    if row is None:
        return NOT_RUN
    text = format_accuracy(row.correct, row.n)
    return text.partition(" ")[0] if bare else text


def _column_title(heading: str, name: str, rows: Sequence[AttackRecord | None]) -> str:
    there = [row for row in rows if row is not None]
    # What makes a column one measurement; its name alone would let a changed yaml slip in.
    if unlike := {what for row in there[1:] for what in there[0].unlike(row)}:
        listed = ", ".join(sorted(unlike))
        raise ValueError(f"column {name}: a table never mixes eps, n or settings of an attack, found {listed}")
    if not there:
        return heading
    row = there[0]
    eps = "" if row.name == CLEAN or row.eps is None else f"eps {format_eps(row.eps)}, "
    return f"{heading} ({eps}n {row.n})"


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table.

    Example:
        >>> markdown_row(["clean", "98.70"])
        '| clean | 98.70 |'
    """
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def columns(table: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of text under each other.

    Args:
        table: rows of cells, the headings among them.
        right: places of the columns that are set to the right.

    Example:
        >>> columns([["a", "n"], ["bc", "10"]], right=[1])
        ['a    n', 'bc  10']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _print_rich(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str], stream: TextIO) -> bool:
    """Whether rich is there and has printed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=Text(title), title_justify="left", caption=Text("\n".join(notes)), caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left")
    for row in rows:
        style = "bold" if row[0].startswith("worst of") else None
        # Text, not str: rich reads square brackets in a string as markup, and intervals have them.
        table.add_row(*(Text(cell) for cell in row), style=style)
    Console(file=stream).print(table)
    return True
