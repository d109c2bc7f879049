"""A filled table as text: columns for a terminal, Markdown, LaTeX, CSV; `-` where nothing was run."""

from __future__ import annotations

import csv
import io as streams
from collections.abc import Mapping, Sequence

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.measured import Filled, Line, row_of
from mi_at.results.significance import Against, Key, against, key_of_line, missing_baselines
from mi_at.results.statistics import p_text
from mi_at.results.tables import key_of
from mi_at.results.terminal import NOT_RUN, columns, in_words, interval, interval_text, markdown_row

HEADINGS = ("row", "attack", "reported", "measured (seeds)", "n", "difference", "flags", "audit")
VERSUS = "to the baseline, points [95 %]"
MEASURED = (
    "measured: % of n images that are right, mean over the seeds (how many) +- their standard deviation; in brackets "
    "the 95 % interval over the images alone, below 1,000 of them"
)
COMPARED = (
    "to the baseline: this row minus it, over the seeds that both have, with Student's t interval; p by Holm's rule "
    "over the rows of a column; better or worse where p is below 0.05 and the interval leaves 0 out"
)
CSV = (
    "table",
    "cell",
    "row",
    "dataset",
    "model",
    "budget",
    "column",
    "attack",
    "norm",
    "eps",
    "steps",
    "step_size",
    "reported",
    "reported_std",
    "unit",
    "measured",
    "std",
    "low",
    "high",
    "seeds",
    "n",
    "difference",
    "flags",
    "audit",
    "note",
    "baseline",
    "to_baseline",
    "to_baseline_low",
    "to_baseline_high",
    "p",
    "verdict",
)
LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
LATEX |= {sign: f"${sign}$" for sign in "<>"}
Versus = Mapping[Key, Against]


def render(filled: Filled, form: str) -> str:
    """The table as text.

    Args:
        filled: what to show.
        form: "terminal", "markdown", "latex" or "csv".

    Returns:
        Lines, ending with a newline.
    """
    if form == "csv":
        return _csv(filled)
    versus = against(filled)
    headings = (*HEADINGS, VERSUS) if versus else HEADINGS
    rows = [_cells(line, versus) for line in filled.lines]
    if form == "latex":
        return _latex(filled, headings, rows, _explained(filled, versus))
    listed = [*_explained(filled, versus), *notes(filled)]
    if form == "markdown":
        rules = ["---" if heading in ("row", "attack", "flags", "audit") else "---:" for heading in headings]
        lines = [markdown_row(row) for row in (headings, rules, *rows)]
        # A bare asterisk would begin a list in the list.
        below = ["", *(f"- {note}".replace("- * ", "- \\* ", 1) for note in listed)] if listed else []
        return "\n".join([f"**{title(filled)}**", "", *lines, *below]) + "\n"
    lines = columns([headings, *_without_repetition(rows)])
    return "\n".join([title(filled), *lines, *listed]) + "\n"


def title(filled: Filled) -> str:
    """What the table is, with its budget where that is not the paper's."""
    size = "" if filled.budget == "paper" else f" (budget {filled.budget}: not the size the paper ran)"
    return f"{filled.table.title}{size}"


def row_name(line: Line) -> str:
    """A row as it is called here, and in print where that is another word."""
    return line.row if line.row.startswith(line.cell) else f"{line.cell}: {line.row}"


def attack_name(line: Line) -> str:
    """An attack as the print calls it, and as it is called here where that is another word."""
    return line.attack if line.column == line.attack else f"{line.column}: {line.attack}"


def reported(line: Line) -> str:
    """The printed number with its spread, a star where it is doubtful."""
    number = line.reported
    if number is None:
        return NOT_RUN
    value = "lost" if number.value is None else f"{number.value:.2f}"
    spread = "" if number.std is None else f" +- {number.std:.2f}"
    return f"{value}{spread}{'*' if number.note else ''}"


def measured(line: Line) -> str:
    """Mean over the seeds, their standard deviation, the interval of few images, and how many seeds there are."""
    if line.mean is None:
        return NOT_RUN
    spread = "" if line.std is None else f" +- {line.std:.2f}"
    return f"{line.mean:.2f}{spread}{few_images(line)} ({len(line.values)})"


def few_images(line: Line) -> str:
    """The 95 % interval as the end of a mean that is of too few images to stand without one.

    It is that of the images, the same ones under every seed; that of the seeds is another.
    """
    return interval_text(*line.counted) if line.counted else ""


def difference(line: Line) -> str:
    """Measured minus printed, in points."""
    return NOT_RUN if line.difference is None else f"{line.difference:+.2f}"


def versus_text(found: Against) -> str:
    """A difference to the baseline, its interval, its p-value and what may be said of it."""
    return (
        f"{found.difference.points} p {p_text(found.p)}: {found.verdict} ({found.difference.n} seeds, {found.baseline})"
    )


def doubts(filled: Filled) -> dict[str, list[str]]:
    """What is doubtful in print, and of which of the table's numbers it is said."""
    found: dict[str, list[str]] = {}
    for line in filled.lines:
        if line.reported is not None and line.reported.note:
            found.setdefault(line.reported.note, []).append(f"{line.cell} {line.column}")
    return found


def attacks(filled: Filled) -> dict[str, str]:
    """What each attack is, in words, as far as a cell with records tells; told apart where it is not one for all."""
    found: dict[str, dict[str, list[Line]]] = {}
    for line in filled.lines:
        if line.says and line.attack != CLEAN:
            found.setdefault(line.attack, {}).setdefault(in_words(line.says), []).append(line)
    return {
        name if len(ways) == 1 else f"{name} ({_whose(lines, ways)})": words
        for name, ways in found.items()
        for words, lines in ways.items()
    }


def _whose(lines: Sequence[Line], ways: Mapping[str, Sequence[Line]]) -> str:
    """The data sets of some of an attack's numbers; the cells where a data set has numbers of several ways."""
    datasets = {line.dataset for line in lines}
    others = {line.dataset for way in ways.values() if way is not lines for line in way}
    return ", ".join(dict.fromkeys(line.cell if datasets & others else line.dataset for line in lines))


def command(filled: Filled, *further: str) -> str:
    """What runs the table at its budget.

    Args:
        filled: the table.
        further: arguments.
    """
    table = filled.table
    budget = [] if filled.budget == "paper" else [f"budget={filled.budget}"]
    own = {"table.rows": f"'table.rows=[{','.join(table.cells)}]'"} if table.others else {}
    if filled.seeds is not None:
        own["seed"] = f"seed={','.join(map(str, filled.seeds))}"
    kept = [word for key, word in own.items() if key not in map(key_of, further)]
    return " ".join([f"python -m mi_at.train -m table={table.name}", *budget, *kept, *table.quoted, *further])


def notes(filled: Filled) -> list[str]:
    """What is of this machine and this moment: what was not run or not compared, and which records are not shown."""
    listed = []
    damage = "but for what is damaged, " if any(said.startswith("damaged") for said in filled.aside) else ""
    if hidden := missing_baselines(filled):
        listed.append(f"no difference to {', '.join(hidden)}: table.rows leaves out what others are compared with")
    if any(filled.records.values()) or any(line.values for line in filled.lines):
        for seed in filled.seeds or ():
            run = {cell for cell, records in filled.records.items() if seed in {each.record.seed for each in records}}
            if lacking := [cell for cell in filled.table.cells if cell not in run]:
                listed.append(f"{damage}seed {seed} was not run: {', '.join(lacking)}: {command(filled)}")
    else:
        what = "these rows" if filled.table.others else "this table"
        seeds = "" if filled.seeds is None else f", seed {', '.join(map(str, filled.seeds))}"
        listed.append(f"{damage}nothing of {what} was run at budget {filled.budget}{seeds}: {command(filled)}")
    return [*listed, *filled.aside]


def _explained(filled: Filled, versus: Versus) -> list[str]:
    """What a reader of the numbers needs: legends, what the attacks are, what is doubtful."""
    listed = []
    if any(line.std is not None or few_images(line) for line in filled.lines):
        listed.append(MEASURED)
    if versus:
        listed.append(COMPARED)
    listed += [f"{name}: {words}" for name, words in attacks(filled).items()]
    listed += [f"{flag}: {sentence}" for flag, sentence in _flags(filled).items()]
    return [*listed, *(f"* {note} ({', '.join(places)})" for note, places in doubts(filled).items())]


def _flags(filled: Filled) -> dict[str, str]:
    """What each flag says of the first number that has it, and of how many more it is said."""
    said: dict[str, list[str]] = {}
    for line in filled.lines:
        for found in filled.records.get(line.cell, ()):
            row = row_of(found.record, line.attack)
            if row is None or found.path not in line.sources.values():
                continue
            for flag in row.flags:
                said.setdefault(flag, []).append(f"{row.messages.get(flag, '')} ({line.cell}, {line.attack})".strip())
    return {
        flag: places[0] + (f", and {len(places) - 1} more" if len(places) > 1 else "") for flag, places in said.items()
    }


def _cells(line: Line, versus: Versus) -> tuple[str, ...]:
    n = NOT_RUN if line.n is None else str(line.n)
    flags, audit = " ".join(line.flags) or NOT_RUN, line.audit or NOT_RUN
    cells = (row_name(line), attack_name(line), reported(line), measured(line), n, difference(line), flags, audit)
    if not versus:
        return cells
    found = versus.get(key_of_line(line))
    return (*cells, NOT_RUN if found is None else versus_text(found))


def _without_repetition(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows in which a row's name stands once."""
    shown: list[Sequence[str]] = []
    last = None
    for row in rows:
        shown.append(["" if row[0] == last else row[0], *row[1:]])
        last = row[0]
    return shown


def _latex(filled: Filled, headings: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    """A table with footnotes below it; what concerns this machine alone as comments before it."""

    def text(words: str) -> str:
        return "".join(LATEX.get(sign, sign) for sign in words).replace("+-", r"$\pm$")

    body = [" & ".join(text(cell) for cell in row) + r" \\" for row in _without_repetition(rows)]
    columns = "llrrrrll" + "l" * (len(headings) - len(HEADINGS))
    return (
        "\n".join(
            [
                *(f"% {note}" for note in notes(filled)),
                r"\begin{table}",
                rf"\caption{{{text(title(filled))}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                " & ".join(text(heading) for heading in headings) + r" \\ \hline",
                *body,
                r"\end{tabular}",
                *(rf"\par\footnotesize {text(note)}" for note in below),
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
    versus = against(filled)
    for line in filled.lines:
        number = line.reported
        low, high = (interval(*line.counted) if line.counted else None) or (None, None)
        values = {
            "table": " ".join([filled.table.name, *filled.table.typed]),
            "cell": line.cell,
            "row": line.row,
            "dataset": line.dataset,
            "model": line.model,
            "budget": filled.budget,
            "column": line.column,
            "attack": line.attack,
            **{name: line.says.get(name) for name in ("norm", "eps", "steps", "step_size")},
            "reported": number.value if number else None,
            "reported_std": number.std if number else None,
            "unit": number.unit if number else "percent",
            "measured": line.mean,
            "std": line.std,
            "low": low,
            "high": high,
            "seeds": " ".join(str(seed) for seed in line.values),
            "n": line.n,
            "difference": line.difference,
            "flags": " ".join(line.flags),
            "audit": line.audit,
            "note": number.note if number else "",
        }
        if found := versus.get(key_of_line(line)):
            gap = found.difference
            points = {"to_baseline": gap.value, "to_baseline_low": gap.low, "to_baseline_high": gap.high}
            values |= {name: 100 * value for name, value in points.items()}
            values |= {"baseline": found.baseline, "p": found.p, "verdict": found.verdict}
        writer.writerow(["" if values.get(name) is None else values[name] for name in CSV])
    return stream.getvalue()
