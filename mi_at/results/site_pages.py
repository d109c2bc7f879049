"""What a site is made of, and what its pages are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mi_at.results.measured import Filled, Found, Line
from mi_at.results.page_html import Child, Html, join, tag

INDEX, TABLES, RUNS = "index.html", "tables", "runs"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Tables, records, and the pages of both.

    Attributes:
        tables: filled, in the order they are shown; one of each budget that there is something of.
        found: the records that have a page.
        damaged: a sentence for each record that cannot be read.
        runs: address of each record's page, by its path.
        places: where each record stands, by its path.
        folders: that records were looked for in.
        everything: whether all tables are there, not only some that were asked for.
    """

    tables: Sequence[Filled]
    found: Sequence[Found]
    damaged: Sequence[str]
    runs: Mapping[Path, str]
    places: Mapping[Path, Sequence[tuple[Filled, Line]]]
    folders: Sequence[Path]
    everything: bool

    @classmethod
    def of(
        cls,
        tables: Sequence[Filled],
        found: Sequence[Found],
        damaged: Sequence[str] = (),
        *,
        folders: Sequence[str | Path] = (),
        everything: bool = True,
    ) -> Site:
        """The site of these tables and records; options as `write_site` has them."""
        places: dict[Path, list[tuple[Filled, Line]]] = {}
        for filled in tables:
            for line in filled.lines:
                for path in line.sources.values():
                    places.setdefault(path, []).append((filled, line))
        wanted = {filled.table.name for filled in tables}
        shown = [
            each
            for each in found
            if everything or each.path in places or wanted & set(each.record.tags.get("tags") or [])
        ]
        names: Counter[str] = Counter()
        runs = {}
        for each in shown:
            name = re.sub(r"[^\w.-]", "_", f"{each.record.key}-{each.record.config_hash}")
            names[name] += 1
            runs[each.path] = f"{RUNS}/{name}{f'-{names[name]}' * (names[name] > 1)}.html"
        return cls(
            tables=tables,
            found=shown,
            damaged=damaged,
            runs=runs,
            places=places,
            folders=[Path(folder) for folder in folders],
            everything=everything,
        )

    def table(self, filled: Filled) -> str:
        """Address of a table's page."""
        return f"{TABLES}/{filled.table.name}{'' if filled.budget == 'paper' else f'-{filled.budget}'}.html"

    def below(self, text: str | Path) -> str:
        """A path, or a sentence with some in it, without what lies above the folders of the records."""
        shown = str(text)
        for folder in self.folders:
            if folder.is_absolute():
                shown = shown.replace(f"{folder}/", f"{folder.name}/")
        return shown


def link(content: Child, page: str, *, under: bool = False) -> Html:
    """A link to a page of the site.

    Args:
        content: what it says.
        page: its address within the site.
        under: the link stands on a page of a folder, not on the first page.

    Example:
        >>> link("all", "index.html", under=True)
        '<a href="../index.html">all</a>'
    """
    return tag("a", content, href=f"{'../' * under}{quote(page)}")


def way(site: Site, *below: Child) -> Html:
    """The line of links above a page of a folder.

    Args:
        site: which.
        below: what comes after the link to the first page.
    """
    return join([link("All tables" if site.everything else "The site", INDEX, under=True), *below], " / ")
