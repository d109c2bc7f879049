"""A run's page in a site: where its numbers stand, the command that repeats it, and the page of its evaluation."""

from __future__ import annotations

from mi_at.results.examples import beside
from mi_at.results.measured import Found
from mi_at.results.page_data import Measured
from mi_at.results.page_evaluation import evaluation_page, not_run
from mi_at.results.page_html import Child, Html, join, table, tag
from mi_at.results.site_pages import Site, link, way
from mi_at.results.table_text import attack_name, row_name


def run_page(site: Site, found: Found) -> str:
    """The whole page of one record.

    Args:
        site: that it is a page of.
        found: the record and where it lies.

    Returns:
        The file's text.
    """
    outcomes, examples = beside(found.path)
    measured = Measured(record=found.record, outcomes=outcomes, examples=examples)
    return evaluation_page(measured, first={"Where its numbers stand": _places(site, found)}, up=way(site, "run"))


def _places(site: Site, found: Found) -> Html:
    record = found.record
    lies = tag("p", "The record: ", tag("code", site.below(found.path)), class_="note")
    places = site.places.get(found.path, ())
    if not places:
        return join([not_run("In no table here: its configuration is that of no cell."), lies])
    rows: list[list[Child]] = []
    commands: dict[str, None] = {}
    for filled, line in places:
        name = link(filled.table.name, site.table(filled), under=True)
        rows.append([name, row_name(line), attack_name(line), f"{line.values[record.seed]:.2f}", str(line.n)])
        words = [f"table={filled.table.name}", f"table.rows=[{line.cell}]", f"seed={record.seed}"]
        words += filled.table.quoted
        budget = [] if filled.budget == "paper" else [f"budget={filled.budget}"]
        commands[" ".join(["python -m mi_at.train -m", *words, *budget])] = None
    return join(
        [
            table("Numbers of this run in tables", ["table", "row", "attack", "accuracy %", "n"], rows, right=(3, 4)),
            tag("p", "As a cell of its table it is repeated, with exactly this configuration, by"),
            *(tag("pre", command, class_="command") for command in commands),
            lies,
        ]
    )
