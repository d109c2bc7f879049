"""The first page of a site: every paper's tables and figures with how much of them is measured, and every run."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results import page_data
from mi_at.results.measured import Filled, Found
from mi_at.results.page_evaluation import badge, not_run, percent
from mi_at.results.page_html import Child, Html, document, join, table, tag
from mi_at.results.reported import NO_PAPER, PAPERS, read_reported, tables_of
from mi_at.results.site_pages import Site, link
from mi_at.results.site_tables import counts
from mi_at.results.terminal import NOT_RUN

TITLES = {
    "mimae": "MIMAE-AT: a mutual information regularization for adversarial training",
    "shared_info": "Shared Information: improving adversarial robustness by learning shared information",
    "namid": "NAMID: improving adversarial robustness via mutual information estimation",
    "ib_rar": "IB-RAR: information bottleneck as regularizer for adversarial robustness",
    "ncmi": "Robust NCMI: enhancing adversarial robustness through robust information quantities",
    NO_PAPER: "Head to head: every method under one protocol",
}
"""What a section of a paper's tables is called."""


def index_page(site: Site) -> str:
    """The first page.

    Args:
        site: whose.

    Returns:
        The file's text.
    """
    papers: dict[str, dict[str, list[Filled]]] = {}
    for filled in site.tables:
        papers.setdefault(filled.table.paper, {}).setdefault(filled.table.name, []).append(filled)
    ordered = sorted(papers, key=lambda paper: list(TITLES).index(paper) if paper in TITLES else len(TITLES))
    parts = {TITLES.get(paper, paper): _paper(site, paper, papers[paper]) for paper in ordered}
    parts["Runs"] = _runs(site)
    if site.damaged:
        parts["Damaged records"] = tag("ul", *(tag("li", site.below(said)) for said in site.damaged))
    foot = "mi_at: every measured number is one of a record's, every printed one the paper's."
    return document("The papers' tables, printed and measured", _lead(site), parts, foot=foot)


def in_order(name: str) -> list[tuple[int, str]]:
    """By which tables are sorted: 2 comes before 10.

    Example:
        >>> sorted(["mimae_t10", "mimae_t2", "mimae_f1"], key=in_order)
        ['mimae_f1', 'mimae_t2', 'mimae_t10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _lead(site: Site) -> Html:
    names = {filled.table.name for filled in site.tables}
    figures = {filled.table.name for filled in site.tables if filled.table.figure is not None}
    full = [counts(filled) for filled in site.tables if filled.budget == "paper"]
    small = [counts(filled) for filled in site.tables if filled.budget != "paper"]
    tiles = [
        (
            "Tables and figures",
            str(len(names)),
            _several(len(names) - len(figures), "table") + ", " + _several(len(figures), "figure"),
            "clean",
        ),
        ("Measured at the papers' size", str(sum(c[1] for c in full)), _of(full), "attack"),
        ("Measured in small", str(sum(c[1] + c[2] for c in small)), "numbers at a smaller budget", "attack"),
        ("Runs", str(len(site.found)), "records, a page each", "clean"),
    ]
    made = [
        tag("li", tag("span", what, class_="what"), tag("span", big, class_="big"), tag("span", how, class_="how"),
            class_=kind)
        for what, big, how, kind in tiles
    ]  # fmt: skip
    words = (
        f"Every measured number comes from a record of a real run and links to it; {NOT_RUN} where nothing was run. "
        "A smaller budget is never mixed with the papers' size, nor one number of images with another."
    )
    return join([tag("p", words, class_="sub"), tag("ul", *made, class_="tiles")])


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _of(found: Sequence[tuple[int, int, int]]) -> str:
    return f"of {sum(printed for printed, *_ in found):,} printed numbers" if found else "not asked for"


def _paper(site: Site, paper: str, tables: dict[str, list[Filled]]) -> Html:
    rows = [_row(site, tables[name]) for name in sorted(tables, key=in_order)]
    headings = ["table", "what", "cells", "printed", "measured", "audit"]
    note = "Printed: how many numbers; measured: how many of them, by budget; audit: the gravest verdict"
    parts: list[Child] = [table(note, headings, rows, right=(2, 3), stacked=True)]
    known = {several[0].table.number for several in tables.values()}
    if paper in PAPERS and site.everything:
        without = {number: found for number, found in tables_of(read_reported(paper)).items() if number not in known}
        if without:
            listed = ", ".join(f"{number} ({_several(len(found), 'number')})" for number, found in without.items())
            parts.append(tag("p", f"{NOT_RUN} Printed, and no table here: {listed}.", class_="not-run"))
    return join(parts)


def _row(site: Site, several: Sequence[Filled]) -> list[Child]:
    first = several[0]
    said = []
    audits = []
    for filled in several:
        printed, measured, more = counts(filled)
        number = f"{measured} of {printed}" + (f" and {more} more" if more else "") if measured or more else NOT_RUN
        said.append(join([link(filled.budget, site.table(filled)), f": {number}"]))
        audits += [line.audit for line in filled.lines if line.audit]
    worst = min(audits, key=page_data.SEVERITIES.index, default=None)
    return [
        link(first.table.name, site.table(first)),
        first.table.title,
        str(len(first.table.cells)),
        str(counts(first)[0]),
        join(said, " · "),
        NOT_RUN if worst is None else badge(worst),
    ]


def _runs(site: Site) -> Html:
    if not site.found:
        return not_run("No record was found.")
    rows = [_run(site, each) for each in sorted(site.found, key=lambda each: each.record.key)]
    headings = ["run", "budget", "clean %", "strongest attack", "%", "n", "audit", "tables", "date"]
    note = "Every record, whether it stands in a table or not; the strongest attack is that with a bound"
    return table(note, headings, rows, right=(2, 4, 5), stacked=True)


def _run(site: Site, found: Found) -> list[Child]:
    record = found.record
    clean = next((row for row in record.attacks if row.name == CLEAN), None)
    strong = page_data.strongest(record)
    said = page_data.verdict(record)
    served = [f", served {record.checkpoint['served']}"] if record.checkpoint.get("served") else []
    tables = {site.table(filled): filled.table.name for filled, _ in site.places.get(found.path, ())}
    return [
        join([link(record.key, site.runs[found.path]), *served]),
        record.budget,
        NOT_RUN if clean is None else percent(clean.correct, clean.n),
        NOT_RUN if strong is None else f"{page_data.title(strong)}, {page_data.threat(strong)}",
        NOT_RUN if strong is None else percent(strong.correct, strong.n),
        NOT_RUN if strong is None else f"{strong.n:,}",
        NOT_RUN if said is None else badge(said),
        join([link(name, page) for page, name in tables.items()], ", ") if tables else NOT_RUN,
        record.date[:10],
    ]
