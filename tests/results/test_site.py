"""The site of a table: what stands on its pages, that links lead somewhere, that nothing is half-written."""

from __future__ import annotations

import contextlib
import copy
import csv
import re
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from mi_at import cells, io, report
from mi_at.evaluation.intervals import wilson
from mi_at.results import site as site_module
from mi_at.results.measured import Filled, Found, Line, may_have
from mi_at.results.records import make_record, write_record
from mi_at.results.significance import against
from mi_at.results.site import SiteError, check_place, write_site
from mi_at.results.site_pages import Site
from mi_at.results.table_text import render
from mi_at.results.tables import Cell, Table
from tests.own_table import search, write_table
from tests.results import figure_makers, makers
from tests.results.browser import CHROMIUM, NO_BROWSER, Browser
from tests.results.makers import evaluation, leaving
from tests.results.pages import AUDIT, Tree
from tests.test_report import COLUMNS, SHARED

CELLS = {
    "standard_at": {"printed": {"row": "STANDARD-AT"}, "overrides": ["defense=standard_at"]},
    "trades": {"printed": {"row": "TRADES"}, "overrides": ["defense=trades"]},
    "mimae": {"printed": {"row": "MIMAE-AT"}, "overrides": ["defense=mimae", "dataset=mnist"]},
}
MORE = {"standard_at": (0, 0, 0), "trades": (4, 5, 4)}  # images that FGSM leaves right, beyond the first 20, by seed


@dataclass(frozen=True)
class Made:
    """A site and what it was made of."""

    folder: Path
    pages: dict[str, Tree]
    said: str
    noted: str


def write(path: Path, config: dict[str, Any], *, seed: int, right: int, **changes: Any) -> None:
    """A record, and its outcomes, in which FGSM leaves `right` images right."""
    config, result = copy.deepcopy(config), leaving(evaluation(), "fgsm", right)
    config["seed"] = config["dataset"]["seed"] = seed
    config["defense"] |= changes
    made = make_record(
        result,
        config=config,
        checkpoint={"rule": "last"},
        names=config["choices"],
        tags={"tags": config["tags"]},
        audit=AUDIT if seed == 0 else None,
    )
    write_record(path, made, result)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three seeds of two cells at budget smoke, one record of another version, one that is cut off."""
    folder = tmp_path_factory.mktemp("site")
    write_table(folder, cells=CELLS, seeds=[0, 1, 2], shared=SHARED, columns=COLUMNS, number=5)
    with io.composing():
        _, jobs = cells.composed([search(folder), "table=own", "budget=smoke"])
        configs = {job.cell: dict(report.plan_of(job).config) for job in jobs[:2]}
    for cell, config in configs.items():
        for seed, more in enumerate(MORE[cell]):
            write(folder / f"runs/{cell}-{seed}/record.json", config, seed=seed, right=20 + more)
    write(folder / "runs/other/record.json", configs["trades"], seed=3, right=11, beta=9.0)
    (folder / "runs/cut").mkdir()
    (folder / "runs/cut/record.json").write_text((folder / "runs/trades-0/record.json").read_text()[:500])
    both = contextlib.redirect_stdout(_Said()), contextlib.redirect_stderr(StringIO())
    with contextlib.chdir(folder), both[0] as said, both[1] as noted:
        report.main([search(folder), "table=own", "format=html", f"runs={folder}/runs", "records=runs"])
    pages = {
        str(path.relative_to(folder / "site")): Tree(path.read_text()) for path in (folder / "site").rglob("*.html")
    }
    return Made(folder, pages, said.text, noted.getvalue())


class _Said:
    """What was printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Nothing is kept back."""


# ---------------------------------------------------------------- what stands on the pages
def test_there_is_a_page_of_every_table_budget_and_run(made: Made) -> None:
    assert made.said == "site/index.html: 2 tables, 7 runs\n"
    assert made.noted.startswith("damaged: runs/cut/record.json: not a whole record")
    tables = {name for name in made.pages if name.startswith("tables/")}
    assert tables == {"tables/own.html", "tables/own-smoke.html"}
    runs = [name for name in made.pages if name.startswith("runs/")]
    assert len(runs) == 7
    assert sum("trades-digits-cnn_tiny-s1" in name for name in runs) == 1
    assert {path.name for path in (made.folder / "site").iterdir()} == {"index.html", "tables", "runs"}
    assert {path.name for path in made.folder.iterdir()} == {"conf", "runs", "site"}, "nothing else is left"


def test_every_link_leads_to_a_page_and_every_page_is_linked(made: Made) -> None:
    reached = {"index.html"}
    for name, page in made.pages.items():
        for target in (attributes["href"] for attributes in page.of("a")):
            assert target is not None
            address, _, part = unquote(target).partition("#")
            path = (made.folder / "site" / name).parent / address if address else made.folder / "site" / name
            found = str(path.resolve().relative_to((made.folder / "site").resolve()))
            assert found in made.pages, f"{name}: {target}"
            assert not part or part in [attributes.get("id") for _, attributes in made.pages[found].tags]
            reached.add(found)
    assert reached == set(made.pages)


def test_a_table_shows_printed_measured_and_their_difference(made: Made) -> None:
    text = made.pages["tables/own-smoke.html"].text
    measured = 100 * (24 + 25 + 24) / 3 / 40
    low, high = (100 * bound for bound in wilson((24 + 25 + 24) / 3, 40))
    spread = 100 * (1 / 3) ** 0.5 / 40  # of 24, 25, 24
    assert "printed 58.80 measured" in text
    shown = f"{measured:.2f} ± {spread:.2f} [{low:.1f}, {high:.1f}]"
    assert f"measured {shown} difference {measured - 58.80:+.2f}" in text
    assert f"{shown} (3)" in text
    assert "Not the size that the paper ran: a difference to the print says little about either" in text
    row = text[text.index("STANDARD-AT standard_at digits, cnn_tiny") :]
    assert row.startswith("STANDARD-AT standard_at digits, cnn_tiny audit ✕ fail ")
    assert " reach " in row[: row.index("TRADES")], "the flag stands in its cell"
    empty = made.pages["tables/own.html"].text
    assert "0 of 9 printed numbers measured here, budget paper" in empty
    assert "printed 58.80 measured -" in empty
    assert "7 records of budget smoke: budget=smoke shows them" in empty
    assert "python -m mi_at.train -m table=own budget=smoke table.rows=[mimae] seed=0" in text


def test_a_table_says_what_its_attacks_are(made: Made) -> None:
    text = made.pages["tables/own-smoke.html"].text
    assert "pgd_20 linf, eps 0.02, 20 steps of 0.00025, cross entropy" in text[text.index("The attacks") :]


def test_what_is_not_shown_is_named(made: Made) -> None:
    text = made.pages["tables/own-smoke.html"].text
    assert "another version of trades: runs/other/record.json: defense.beta 9.0 (now 6.0)" in text
    assert "damaged: runs/cut/record.json: not a whole record" in text
    assert "In no table here" in made.pages[run_of(made, "trades", 3)].text


def run_of(made: Made, defense: str, seed: int) -> str:
    (name,) = (name for name in made.pages if name.startswith(f"runs/{defense}-digits-cnn_tiny-s{seed}-"))
    return name


def test_a_run_says_where_it_stands_and_how_it_is_repeated(made: Made) -> None:
    text = made.pages[run_of(made, "trades", 1)].text
    assert "own trades: TRADES fgsm 62.50 40" in text
    assert "python -m mi_at.train -m table=own table.rows=[trades] seed=1 budget=smoke" in text
    for part in ("Configuration", "Versions", "Hardware", "Commit"):
        assert part in text


def test_a_difference_to_the_baseline_is_said_with_its_interval(made: Made) -> None:
    text = made.pages["tables/own-smoke.html"].text
    assert "trades fgsm standard_at +10.83 [+7.25, +14.42] 3 0.006 better" in text
    assert "Against the baseline" not in made.pages["tables/own.html"].text


def test_the_first_page_counts(made: Made) -> None:
    text = made.pages["index.html"].text
    assert "Measured at the papers' size 0 of 9 printed numbers" in text
    assert "Measured in small 6 numbers" in text
    assert "own own 3 9 paper : - · smoke : 6 of 9 ✕ fail" in text
    assert "✕ fail" in text


def test_pages_need_nothing_and_name_no_folder_of_this_machine(made: Made) -> None:
    for name, page in made.pages.items():
        assert not page.of("script"), name
        assert all(set(attributes) & {"src", "srcset"} == set() for tag, attributes in page.tags if tag != "img"), name
        assert str(made.folder) not in page.text, name
        assert "url(" not in page.styles
        for attributes in page.of("th"):
            assert attributes["scope"] in ("row", "col")
        assert len(page.of("caption")) == len(page.of("table"))


# ---------------------------------------------------------------- significance
def line(cell: str, values: dict[int, float], **changes: Any) -> Line:
    parts: dict[str, Any] = {"row": cell, "dataset": "digits", "model": "cnn_tiny", "column": "fgsm", "attack": "fgsm"}
    return Line(
        cell=cell, **{**parts, "reported": None, "values": values, "n": 4000, "flags": (), "audit": None, **changes}
    )


def filled(*lines: Line, **cells: tuple[str, ...]) -> Filled:
    own = {name: Cell(name, {}, overrides) for name, overrides in cells.items()}
    return Filled(Table("own", "mimae", "5", "own", (0,), {}, (), own), "paper", list(lines))


AT, TRADES, NCMI = ("defense=standard_at",), ("defense=trades",), ("defense=trades", "regularizer=ncmi")


def test_holm_counts_the_methods_of_a_column() -> None:
    base, one = {0: 50.0, 1: 51.0, 2: 49.0}, {0: 54.0, 1: 55.5, 2: 52.5}
    two = {0: 50.5, 1: 51.0, 2: 49.0}
    alone = against(filled(line("a", base), line("t", one), a=AT, t=TRADES))
    both = against(filled(line("a", base), line("t", one), line("m", two), a=AT, t=TRADES, m=("defense=mart",)))
    key = ("t", "", "fgsm", "fgsm")
    assert both[key].p == pytest.approx(2 * alone[key].p)
    assert alone[key].difference.value == pytest.approx(0.04)
    assert both["m", "", "fgsm", "fgsm"].verdict == "no clear difference"


def test_rows_that_are_not_asked_for_count_in_holms_rule() -> None:
    base, one = {0: 50.0, 1: 51.0, 2: 49.0}, {0: 54.0, 1: 55.5, 2: 52.5}
    lines = line("a", base), line("t", one)
    alone, narrowed = filled(*lines, a=AT, t=TRADES), filled(*lines, a=AT, t=TRADES)
    hidden = {"m": Cell("m", {}, ("defense=mart",)), "t_without": Cell("t_without", {}, ("defense=alp",))}
    narrowed.table = replace(narrowed.table, others={"m": hidden["m"]})
    key = ("t", "", "fgsm", "fgsm")
    assert against(narrowed)[key].p == pytest.approx(2 * against(alone)[key].p)
    narrowed.table = replace(narrowed.table, others=hidden)
    assert against(narrowed) == {}, "its control is not shown"
    assert "no difference to t_without: table.rows leaves out" in render(narrowed, "markdown")
    assert "'table.rows=[a,t]'" in render(replace(narrowed, lines=[]), "terminal")


def test_of_one_seed_in_common_nothing_is_said() -> None:
    lines = line("a", {0: 50.0, 1: 51.0}), line("t", {1: 60.0, 2: 61.0})
    assert against(filled(*lines, a=AT, t=TRADES)) == {}
    other_n = line("a", {0: 50.0, 1: 51.0}), line("t", {0: 60.0, 1: 61.0}, n=20)
    assert against(filled(*other_n, a=AT, t=TRADES)) == {}


def test_a_regularizer_is_compared_with_what_it_was_added_to() -> None:
    values = {0: 50.0, 1: 51.0}
    lines = [line(cell, values) for cell in ("a", "t", "tn")]
    found = against(filled(*lines, a=AT, t=TRADES, tn=NCMI))
    assert {key[0]: each.baseline for key, each in found.items()} == {"t": "a", "tn": "t"}
    apart = against(filled(*lines, a=AT, t=(*TRADES, "dataset=mnist"), tn=NCMI))
    assert apart == {}, "of other data"


def test_a_control_is_the_baseline_and_of_several_the_plainest() -> None:
    twice, control = (*AT, "optim.epochs=24"), ("defense=mart", "defense.beta=0")
    lines = [line(cell, {0: 50.0, 1: 51.0}) for cell in ("a", "twice", "t", "m", "m_without")]
    found = against(filled(*lines, a=AT, twice=twice, t=TRADES, m=("defense=mart",), m_without=control))
    assert {key[0]: each.baseline for key, each in found.items()} == {
        "twice": "a",
        "t": "a",
        "m": "m_without",
        "m_without": "a",
    }
    unsure = against(filled(*lines, a=(*AT, "optim.lr=1"), twice=twice, t=TRADES, m=control, m_without=control))
    assert {key[0] for key in unsure} == {"m"}, "two are as plain"


def test_a_difference_stands_in_every_format() -> None:
    values = {0: 50.0, 1: 51.0, 2: 49.5}, {0: 54.0, 1: 55.5, 2: 52.5}
    shown = filled(line("a", values[0]), line("t", values[1]), a=AT, t=TRADES)
    for form in ("terminal", "markdown", "latex"):
        assert "better (3 seeds, a)" in render(shown, form)
    (row,) = [row for row in csv.DictReader(render(shown, "csv").splitlines()) if row["cell"] == "t"]
    assert (row["baseline"], row["verdict"]) == ("a", "better")
    assert float(row["to_baseline"]) == pytest.approx(23 / 6)
    assert float(row["to_baseline_low"]) > 0
    assert float(row["p"]) < 0.05
    assert "to the baseline" not in render(filled(line("a", values[0]), a=AT), "terminal")


# ---------------------------------------------------------------- whole or not at all
def test_a_site_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a/site"
    assert write_site(out, [filled(a=AT)], []) == out / "index.html"
    before = {path: path.read_text() for path in out.rglob("*.html")}
    assert len(before) == 2

    def full(site: Site, table: Filled) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "table_page", full)
        with pytest.raises(
            SiteError, match=r"cannot write .*site: No space left on device; what was there is as it was"
        ):
            write_site(out, [filled(a=AT, t=TRADES)], [])
    assert {path: path.read_text() for path in out.rglob("*.html")} == before
    assert [path.name for path in out.parent.iterdir()] == ["site"]
    write_site(out, [filled(a=AT, t=TRADES)], [])
    assert {path: path.read_text() for path in out.rglob("*.html")} != before
    assert [path.name for path in out.parent.iterdir()] == ["site"]


def test_a_site_that_cannot_be_moved_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "site"
    write_site(out, [filled(a=AT)], [])
    before = (out / "index.html").read_text()
    rename = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(SiteError, match="Input/output error"):
        write_site(out, [filled(a=AT, t=TRADES)], [])
    assert (out / "index.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_site_replaces_nothing_but_a_site(tmp_path: Path) -> None:
    check_place(tmp_path / "new")
    check_place(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SiteError, match="is not empty and holds no site of mi_at: choose another out="):
        check_place(tmp_path)
    with pytest.raises(SiteError, match="is a file"):
        check_place(tmp_path / "notes.txt")
    out = tmp_path / "site"
    write_site(out, [filled(a=AT)], [])
    check_place(out)
    (out / "CNAME").write_text("mine")
    with pytest.raises(SiteError, match="holds CNAME, which a new site would take away"):
        write_site(out, [filled(a=AT)], [])
    assert (out / "CNAME").is_file()


def test_mistakes_end_before_anything_is_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").write_text("")
    with pytest.raises(SystemExit, match="out=site is a file"):
        report.main(["format=html"])
    with pytest.raises(SystemExit, match=r"defense.beta=1: all tables take budget, seed, runs"):
        report.main(["format=html", "out=other", "defense.beta=1"])
    with pytest.raises(SystemExit, match="out=here: only format=html writes files"):
        report.main(["table=mimae_t5", "out=here"])


def test_a_figure_stands_on_its_page(tmp_path: Path) -> None:
    table = figure_makers.table_of("ib_rar_f2")
    drawn = figure_makers.filled(table, tmp_path)
    out = write_site(tmp_path / "site", [drawn, Filled(table, "paper")], []).parent
    page = Tree((out / "tables/ib_rar_f2-smoke.html").read_text())
    assert [attributes["class"] for attributes in page.of("svg") if attributes.get("role") == "img"] == ["mi-figure"]
    empty = Tree((out / "tables/ib_rar_f2.html").read_text())
    assert not empty.of("svg")
    assert "nothing of figure ib_rar_f2 was run at budget paper" in empty.text


def test_weights_served_in_another_way_are_told_from_the_run(tmp_path: Path) -> None:
    ways = makers.record(), makers.record(checkpoint={"rule": "last", "served": "without the mask"})
    found = [Found(tmp_path / f"{number}/record.json", record) for number, record in enumerate(ways)]
    for each in found:
        write_record(each.path, each.record, evaluation())
    text = Tree(write_site(tmp_path / "site", [], found).read_text()).text
    key = ways[0].key
    assert re.findall(rf"{key}(?: , served [a-z ]+ mask)?", text) == [key, f"{key} , served without the mask"]


def test_what_differs_from_the_cell_as_its_table_allows_is_shown_and_said(tmp_path: Path) -> None:
    lines = line("a", {0: 50.0}), line("a", {0: 40.0}, row="a [a]", unlike="attack.precision bf16")
    shown = filled(*lines, a=AT)
    shown.aside = ["[a] attack.precision bf16", "refused: runs/x/record.json: fgsm: n 10, the column's is 40"]
    text = Tree((write_site(tmp_path / "site", [shown], []).parent / "tables/own.html").read_text()).text
    assert "a [a] a digits, cnn_tiny attack.precision bf16 measured 40.00" in text
    refused = "are not shown: refused: runs/x/record.json: fgsm: n 10, the column's is 40"
    assert f"{refused} Shown in rows of their own" in text
    assert "not quite the cell's: [a] attack.precision bf16 To run it" in text


def test_only_cells_that_can_have_a_record_are_composed(tmp_path: Path) -> None:
    """By data and network, or by the tags of what it was run for."""
    cells = {"same": ("model=cnn_tiny",), "other": ("model=cnn4",), "tagged": ("dataset=mnist",)}
    table = filled(**cells).table
    own = makers.record(tags={"tags": ["own", "tagged"]})
    found = [Found(tmp_path / "record.json", own)]
    choices = {"dataset": "digits", "model": "cnn_tiny"}
    assert [name for name in cells if may_have(table, table.cells[name], found, choices)] == ["same", "tagged"]


# ---------------------------------------------------------------- the browser
@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
def test_pages_in_a_browser(made: Made, tmp_path: Path) -> None:
    """No page is wider than a phone or a desk, asks for anything, or makes the browser complain."""
    browser = Browser(tmp_path)
    names = ["index.html", "tables/own-smoke.html", "tables/own.html", run_of(made, "trades", 0)]
    pages = [(made.folder / "site" / name).read_text() for name in names]
    for name, frames in zip(names, browser.measure_all(pages), strict=True):
        for frame in frames:
            assert frame["scroll"] == [frame["width"]] * 2, f"{name} scrolls sideways"
            assert frame["wide"] == [], name
            assert frame["requests"] == [], name
            assert frame["small"] >= 12, name
            assert not frame["ran"]
    for name in names[:2]:
        assert browser.complaints(made.folder / "site" / name) == []
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(pages[0].replace("<main>", "<main><script>var a</script>"))
    assert browser.complaints(spoilt), "what the policy forbids is complained of"


@pytest.mark.slow
def test_the_site_of_all_tables(tmp_path: Path) -> None:
    """Every table has a page, and the committed records have theirs."""
    out = tmp_path / "site"
    report.main(["format=html", f"out={out}", f"records={report.MEASURED}"])
    names = {path.stem for path in (out / "tables").glob("*.html")}
    assert set(report.table_names()) <= names
    assert len(list((out / "runs").glob("*.html"))) == len(list(report.MEASURED.rglob("record.json")))
    text = Tree((out / "index.html").read_text()).text
    assert all(re.search(rf"\b{name}\b", text) for name in report.table_names())


@pytest.mark.slow
def test_the_site_of_one_budget_has_its_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["format=html", "budget=smoke", f"out={tmp_path / 'site'}", f"records={report.MEASURED}"])
    assert capsys.readouterr().out.endswith(f"site/index.html: {len(report.table_names())} tables, 0 runs\n")
