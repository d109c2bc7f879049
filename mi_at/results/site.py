"""A site of the papers' tables: printed beside measured, a page per table and per run, made of records alone.

A folder of files that need nothing else: no script, no font, no server. It is made beside its place and then moved
there: a site that was there before is whole until the new one is.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mi_at.results.measured import Filled, Found
from mi_at.results.page_html import GENERATOR
from mi_at.results.site_index import index_page
from mi_at.results.site_pages import INDEX, RUNS, TABLES, Site
from mi_at.results.site_runs import run_page
from mi_at.results.site_tables import table_page

OWN = {INDEX, TABLES, RUNS}


class SiteError(ValueError):
    """A folder that no site can be written to; the message says what to do."""


def write_site(
    out: str | Path,
    tables: Sequence[Filled],
    found: Sequence[Found],
    damaged: Sequence[str] = (),
    *,
    folders: Sequence[str | Path] = (),
    everything: bool = True,
) -> Path:
    """Write the site.

    Args:
        out: its folder.
        tables: filled, in the order they are shown.
        found: records; each gets a page of its own.
        damaged: a sentence for each record that cannot be read.
        folders: the records were looked for in; pages show paths below them.
        everything: False where only some tables were asked for: records that are not of them get no page.

    Returns:
        The path of its first page.

    Raises:
        SiteError: the folder holds something else, or cannot be written; what was there is as it was.
    """
    out = Path(out)
    check_place(out)
    site = Site.of(tables, found, damaged, folders=folders, everything=everything)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
    except OSError as error:
        raise SiteError(f"cannot write {out}: {error.strerror or error}; choose another out=") from error
    try:
        _write_pages(made, site)
        made.chmod(0o755)  # mkdtemp makes it private
        _put(made, out.absolute())
    except OSError as error:
        raise SiteError(f"cannot write {out}: {error.strerror or error}; what was there is as it was") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out / INDEX


def check_place(out: Path) -> None:
    """See that a site can replace what is there: nothing, or an earlier site.

    Raises:
        SiteError: it holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise SiteError(f"out={out} is a file: a site is a folder, choose another out=")
    there = {path.name for path in out.iterdir()}
    if not there:
        return
    index = out / INDEX
    if not index.is_file() or GENERATOR not in index.read_text(errors="replace")[:2000]:
        raise SiteError(f"out={out} is not empty and holds no site of mi_at: choose another out=")
    if others := sorted(there - OWN):
        raise SiteError(f"out={out} holds {', '.join(others)}, which a new site would take away: choose another out=")


def _write_pages(folder: Path, site: Site) -> None:
    for name in (TABLES, RUNS):
        (folder / name).mkdir()
    (folder / INDEX).write_text(index_page(site), encoding="utf-8")
    for filled in site.tables:
        (folder / site.table(filled)).write_text(table_page(site, filled), encoding="utf-8")
    for each in site.found:
        (folder / site.runs[each.path]).write_text(run_page(site, each), encoding="utf-8")


def _put(made: Path, out: Path) -> None:
    """Move a finished site to its place; where that fails, the one before is there again."""
    if not out.exists():
        made.rename(out)
        return
    before = made.with_suffix(".before")
    out.rename(before)
    try:
        made.rename(out)
    except OSError:
        before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)
