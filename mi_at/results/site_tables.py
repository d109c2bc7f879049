"""A table's page in a site: what is printed, what was measured, what differs, what is doubtful, what is set aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mi_at.evaluation.audit_findings import SEVERITIES
from mi_at.results.figures import FigureError, draw
from mi_at.results.measured import Filled, Line
from mi_at.results.page_evaluation import badge, not_run
from mi_at.results.page_html import Child, Html, document, join, table, tag
from mi_at.results.reported import NO_PAPER
from mi_at.results.significance import Against, Key, against, key_of_line
from mi_at.results.site_pages import Site, link, way
from mi_at.results.statistics import mean_interval, p_text
from mi_at.results.table_text import (
    attack_name,
    attacks,
    command,
    difference,
    doubts,
    few_images,
    measured,
    reported,
    row_name,
)
from mi_at.results.terminal import NOT_RUN

LEGEND = (
    "In every cell: the printed number, * where it is doubtful; below it the number measured here, mean ± standard "
    "deviation over the seeds, and the 95 % interval where they are fewer than 1,000 images; below that measured minus "
    "printed, in points, and what is doubtful about it. A link leads to the run; a row has the gravest verdict of its "
    f"audits. {NOT_RUN}: nothing was run, or nothing is printed."
)


def table_page(site: Site, filled: Filled) -> str:
    """The whole page of a table at one budget.

    Args:
        site: that it is a page of.
        filled: the table.

    Returns:
        The file's text.
    """
    versus = against(filled)
    parts = {
        "Figure": _figure(filled),
        "Printed and measured": _matrix(site, filled),
        "Every number": _numbers(site, filled),
        "The attacks": _attacks(filled),
        "Against the baseline": _against(versus, filled.lines),
        "Doubtful in print": _doubts(filled),
        "Records set aside": _aside(site, filled),
        "To run it": _commands(filled),
    }
    if filled.table.figure is None:
        del parts["Figure"]
    if not versus:  # fewer than two seeds in common, or no baseline: nothing to be said
        del parts["Against the baseline"]
    foot = "mi_at: every measured number is one of a record's, every printed one the paper's."
    return document(filled.table.title, _lead(site, filled), parts, foot=foot, up=way(site, filled.table.name))


def counts(filled: Filled) -> tuple[int, int, int]:
    """Printed numbers, those of them that were measured, and measured numbers that nothing is printed for."""
    printed = [line for line in filled.lines if line.reported is not None]
    return (
        len(printed),
        sum(bool(line.values) for line in printed),
        sum(bool(line.values) for line in filled.lines if line.reported is None),
    )


def _lead(site: Site, filled: Filled) -> Html:
    printed, measured, more = counts(filled)
    said = f"{measured} of {printed} printed numbers measured here, budget {filled.budget}."
    if not printed:
        what = "A table of our own" if filled.table.paper == NO_PAPER else "Nothing of it is printed as a number"
        said, more = f"{what}: {more} numbers measured, budget {filled.budget}.", 0
    others = [other for other in site.tables if other.table.name == filled.table.name and other is not filled]
    beside = ": a difference to the print says little about either" if printed else ""
    small = f"Not the size that the paper{'' if printed else 's'} ran{beside}."
    return join(
        [
            tag("p", said, f" {more} further numbers." if more else None, class_="sub"),
            tag("p", tag("b", f"Budget {filled.budget}. "), small) if filled.budget != "paper" else None,
            tag("p", "Other budgets: ", join([link(o.budget, site.table(o), under=True) for o in others], ", "), ".")
            if others
            else None,
        ]
    )


# ---------------------------------------------------------------- the table


def _matrix(site: Site, filled: Filled) -> Html:
    """Rows of the print down, its attacks across."""
    rows: dict[tuple[str, str], dict[tuple[str, str], Line]] = {}
    for line in filled.lines:
        rows.setdefault((line.cell, line.unlike), {})[line.column, line.attack] = line
    columns = list(dict.fromkeys((line.column, line.attack) for line in filled.lines))
    order = [*filled.table.columns.items(), *((attack, attack) for attack in filled.table.more)]
    printed = counts(filled)[0] > 0
    columns.sort(key=lambda pair: order.index(pair) if pair in order else len(order))
    head = tag(
        "tr",
        tag("th", "row", scope="col"),
        *(tag("th", c, tag("small", a) if a != c else None, scope="col", class_="number") for c, a in columns),
    )
    body = []
    for lines in rows.values():
        first = next(iter(lines.values()))
        small = [first.cell] if first.cell != first.row else []
        small += [f"{first.dataset}, {first.model}", *([first.unlike] if first.unlike else [])]
        verdict = min((line.audit for line in lines.values() if line.audit), key=SEVERITIES.index, default=None)
        audit = None if verdict is None else tag("small", "audit ", badge(verdict))
        heading = tag("th", first.row, *(tag("small", words) for words in small), audit, scope="row")
        body.append(tag("tr", heading, *(_cell(site, lines.get(column), printed) for column in columns)))
    caption = tag("caption", tag("span", filled.table.title, ". ", LEGEND))
    made = tag("table", caption, tag("thead", head), tag("tbody", *body), class_="numbers")
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label="Printed and measured")


def _cell(site: Site, line: Line | None, printed: bool) -> Html:
    if line is None:
        return tag("td", NOT_RUN)
    above = tag("span", tag("span", "printed ", class_="unseen"), _sign(reported(line)), class_="printed")
    gap = (
        None if line.difference is None else tag("small", tag("span", "difference ", class_="unseen"), difference(line))
    )
    return tag(
        "td",
        above if printed else None,
        _measured(site, line),
        gap,
        *(tag("small", flag, class_="flag") for flag in line.flags),
    )


def _measured(site: Site, line: Line) -> Html:
    unseen = tag("span", "measured ", class_="unseen")
    if line.mean is None:
        return tag("span", unseen, NOT_RUN)
    spread = "" if line.std is None else f" ± {line.std:.2f}"
    shown = tag("b", f"{line.mean:.2f}", spread)
    page = next((site.runs[path] for path in line.sources.values() if path in site.runs), None)
    return tag("span", unseen, shown if page is None else link(shown, page, under=True), few_images(line))


def _sign(text: str) -> str:
    return text.replace("+-", "±")


# ---------------------------------------------------------------- every number


def _numbers(site: Site, filled: Filled) -> Html:
    rows = [_row(site, line) for line in filled.lines if line.values]
    if not rows:
        return not_run(f"Nothing of this table was run at budget {filled.budget}.")
    headings = [
        "row",
        "attack",
        "printed",
        "measured",
        "95 % over seeds",
        "n",
        "difference",
        "audit",
        "flags",
        "run of seed",
    ]
    note = "What was measured, in per cent: mean ± standard deviation (number of seeds), n images each"
    parts: list[Child] = [table(note, headings, rows, right=range(2, 7))]
    if rest := sum(not line.values for line in filled.lines):
        parts.append(tag("p", f"{NOT_RUN} The other {rest} numbers of the table were not run.", class_="not-run"))
    return join(parts)


def _row(site: Site, line: Line) -> list[Child]:
    links = [
        link(str(seed), site.runs[path], under=True) if path in site.runs else tag("span", seed)
        for seed, path in sorted(line.sources.items())
    ]
    return [
        row_name(line) if line.unlike else line.cell,
        attack_name(line),
        _sign(reported(line)),
        _sign(measured(line)),
        _interval(line.values.values()),
        NOT_RUN if line.n is None else f"{line.n:,}",
        difference(line),
        NOT_RUN if line.audit is None else badge(line.audit),
        tag("span", " ".join(line.flags), class_="flag") if line.flags else NOT_RUN,
        join(links, " "),
    ]


def _interval(values: Iterable[float]) -> str:
    """Student's t interval of the mean over the seeds, within 0 and 100; `-` for a single one."""
    found = list(values)
    if len(found) < 2:
        return NOT_RUN
    mean, half = mean_interval(found)
    return f"[{max(0.0, mean - half):.2f}, {min(100.0, mean + half):.2f}]"


def _attacks(filled: Filled) -> Html:
    found = attacks(filled)
    if not found:
        return not_run("A cell that was run says what its attacks are.")
    return table("As the table's evaluation has them", ["attack", "what it is"], [[*item] for item in found.items()])


def _against(versus: Mapping[Key, Against], lines: Sequence[Line]) -> Html:
    rows: list[list[Child]] = []
    for line in lines:
        found = versus.get(key_of_line(line))
        if found is not None:
            p, gap = p_text(found.p), found.difference.points
            seeds = str(found.difference.n)
            name = row_name(line) if line.unlike else line.cell
            rows.append([name, attack_name(line), found.baseline, gap, seeds, p, found.verdict])
    headings = ["row", "attack", "baseline", "difference, points [95 %]", "seeds", "p (Holm)", "what may be said"]
    note = (
        "This row minus its baseline, paired over the seeds that both have: Student's t interval, Holm's rule over the "
        "rows of a column. Better or worse is said only where the interval leaves 0 out and p is below 0.05."
    )
    return table(note, headings, rows, right=(3, 4, 5))


# ---------------------------------------------------------------- notes


def _figure(filled: Filled) -> Html:
    try:
        return tag("figure", Html(draw(filled)))
    except FigureError as error:
        return not_run(f"{error}")


def _doubts(filled: Filled) -> Html:
    found = doubts(filled)
    if not found:
        return tag("p", "Nothing is noted about the printed numbers.")
    items = [tag("li", f"* {note}", tag("br"), tag("small", ", ".join(places))) for note, places in found.items()]
    return tag("ul", *items)


def _aside(site: Site, filled: Filled) -> Html:
    said = [sentence for sentence in [*filled.aside, *site.damaged] if not sentence.startswith("[")]
    lettered = [sentence for sentence in filled.aside if sentence.startswith("[")]
    parts: list[Child] = [tag("p", "None: every record of this table's cells is shown.")] if not said else []
    if said:
        parts.append(tag("p", "Records that are of this table, or cannot be read, and whose numbers are not shown:"))
        parts.append(tag("ul", *(tag("li", site.below(sentence)) for sentence in said)))
    if lettered:
        parts.append(tag("p", "Shown in rows of their own, though not quite the cell's:"))
        parts.append(tag("ul", *(tag("li", sentence) for sentence in lettered)))
    return join(parts)


def _commands(filled: Filled) -> Html:
    budget = "" if filled.budget == "paper" else f" budget={filled.budget}"
    rows = next((cell for cell in filled.table.cells if not filled.records.get(cell)), next(iter(filled.table.cells)))
    lines = [
        ("All cells and seeds that have no record yet:", command(filled)),
        ("One row, one seed:", command(filled, f"table.rows=[{rows}]", "seed=0")),
        (
            "This table in a terminal:",
            " ".join([f"python -m mi_at.report table={filled.table.name}{budget}", *filled.table.quoted]),
        ),
    ]
    return join([join([tag("p", words), tag("pre", line, class_="command")]) for words, line in lines])
