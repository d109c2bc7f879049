"""python -m mi_at.report: which records stand in a table, what is said of the others, and how it is shown."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mi_at import cells, report
from mi_at.evaluation.intervals import wilson
from mi_at.results import table_text
from mi_at.results.measured import Filled, Line, identity
from mi_at.results.records import Record, make_record, write_record
from mi_at.results.tables import Table, TableError
from tests.own_table import search, write_table
from tests.results.makers import evaluation, leaving

SHARED = [
    "dataset=digits",
    "model=cnn_tiny",
    "evaluation=chosen",
    "evaluation/attacks=[fgsm,pgd_20]",
    "evaluation.eps=0.02",
    "evaluation.step_size=0.00025",
    "evaluation.n=40",
    "+evaluation.n_of.pgd_20=20",
]
COLUMNS = {"clean": "clean", "fgsm": "fgsm", "pgd20": "pgd_20"}
CELLS = {"TRADES": ["defense=trades"], "MART": ["defense=mart"], "MIMAE-AT": ["defense=mimae"]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a table and an empty folder of records."""
    write_table(tmp_path, cells=CELLS, seeds=[0], shared=SHARED, columns=COLUMNS, number=5)
    (tmp_path / "runs").mkdir()
    return tmp_path


def shown(place: Path, *typed: str, folders: list[Path] | None = None) -> Filled:
    return report.report([search(place), "table=own", *typed], folders or [place / "runs"])


def planned(place: Path, cell: str, *typed: str) -> dict[str, Any]:
    """A cell's configuration, as its run would have it."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from mi_at import io

    io.register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(io.conf_dir(), version_base="1.3"):
        _, jobs = cells.composed([search(place), "table=own", f"table.rows=[{cell}]", *typed])
        return dict(report.plan_of(jobs[0]).config)


def measured(place: Path, cell: str, *typed: str, name: str = "run", less: int = 0, **changes: Any) -> Record:
    """A record of a cell in runs/<name>/, in which FGSM leaves `less` images fewer right than it does."""
    config, result = planned(place, cell, *typed), evaluation(eps=changes.pop("eps", 0.02))
    result = leaving(result, "fgsm", int(result["fgsm"].correct.sum()) - less)
    made = make_record(
        result, config=config, checkpoint={"rule": "last"}, names=config["choices"], tags={"tags": config["tags"]}
    )
    made = replace(made, **changes)
    write_record(place / "runs" / name / "record.json", made, result)
    return made


def line(filled: Filled, cell: str, attack: str) -> Line:
    (found,) = (each for each in filled.lines if (each.cell, each.attack) == (cell, attack))
    return found


# ---------------------------------------------------------------- what stands in it
def test_reported_beside_measured(place: Path) -> None:
    record = measured(place, "TRADES")
    filled = shown(place)
    found = line(filled, "TRADES", "pgd_20")
    assert found.reported is not None
    assert found.reported.value == 52.74
    assert found.mean == pytest.approx(100 * record["pgd_20"].accuracy)
    assert found.difference == pytest.approx(100 * record["pgd_20"].accuracy - 52.74)
    assert (found.n, found.std, found.audit) == (20, None, None)
    assert "reach" in found.flags
    assert line(filled, "MART", "pgd_20").mean is None
    assert filled.aside == []
    assert [each.column for each in filled.lines[:3]] == ["clean", "fgsm", "pgd20"]


def test_seeds_are_averaged_and_a_typed_seed_chooses(place: Path) -> None:
    rights = []
    for seed in (0, 1, 2):
        record = measured(place, "TRADES", f"seed={seed}", name=f"s{seed}", less=seed)
        rights.append(record["fgsm"].correct)
    found = line(shown(place), "TRADES", "fgsm")
    assert found.mean == pytest.approx(100 * sum(rights) / 3 / 40)
    assert found.std == pytest.approx(100 / 40)  # of r, r - 1, r - 2
    assert sorted(found.values) == [0, 1, 2]
    two = line(shown(place, "seed=0,2"), "TRADES", "fgsm")
    assert sorted(two.values) == [0, 2]


def share(n: int, correct: int) -> dict[str, Any]:
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": wilson(correct, n)}


def with_row(record: Record, row: Any) -> Record:
    return replace(record, attacks=tuple(row if each.name == row.name else each for each in record.attacks))


def test_the_audit_travels_with_the_number(place: Path) -> None:
    measured(place, "TRADES", name="a", audit={"verdict": "warn"})
    measured(place, "TRADES", "seed=1", name="b", audit={"verdict": "pass"})
    assert line(shown(place), "TRADES", "fgsm").audit == "warn"


def test_an_attack_that_the_print_has_not_is_shown_without_a_printed_number(place: Path) -> None:
    columns = {"clean": "clean", "fgsm": "pgd_20"}  # the print's fgsm is our pgd_20 here
    write_table(place, cells=CELLS, seeds=[0], shared=SHARED, columns=columns, more=["fgsm"])
    measured(place, "TRADES")
    filled = shown(place)
    assert line(filled, "TRADES", "fgsm").reported is None
    printed = line(filled, "TRADES", "pgd_20").reported
    assert printed is not None
    assert printed.value == 58.80


# ---------------------------------------------------------------- our own tables
OURS = {"paper": "none", "number": None, "columns": {}, "more": ["clean", "pgd_20", "worst"]}


def test_the_worst_case_over_the_attacks_of_a_ball_is_a_column(place: Path) -> None:
    write_table(place, cells=CELLS, seeds=[0], shared=SHARED, **OURS)
    record = measured(place, "TRADES")
    (union,) = (row for row in record.attacks if row.name == "worst of fgsm, pgd_20")
    found = line(shown(place), "TRADES", "worst")
    assert (found.mean, found.n, found.reported) == (100 * union.accuracy, 20, None)
    fewer = replace(union, description={**union.description, "members": ["fgsm", "square"]})
    write_record(place / "runs/run/record.json", with_row(record, fewer))
    filled = shown(place)
    assert line(filled, "TRADES", "worst").mean is None
    assert any("worst: members ['fgsm', 'square'], the column's is" in said for said in filled.aside)


def test_a_cell_of_which_nothing_is_printed_stays_where_nothing_was_run(place: Path) -> None:
    write_table(place, cells=CELLS, seeds=[0], shared=SHARED, columns={}, more=["clean", "fgsm"])
    measured(place, "TRADES")
    filled = shown(place)
    assert {each.cell for each in filled.lines} == set(CELLS)
    assert [(each.attack, each.mean) for each in filled.lines if each.cell == "MART"] == [
        ("clean", None),
        ("fgsm", None),
    ]


def test_runs_that_may_differ_get_a_row_of_their_own_that_says_so(place: Path) -> None:
    bf16 = ("trainer.channels_last=true", "attack.precision=bf16")
    for may_differ, rows in (
        ([], 0),
        (["trainer.channels_last"], 0),
        (["trainer.channels_last", "attack.precision"], 2),
    ):
        write_table(place, cells=CELLS, seeds=[0], shared=SHARED, **OURS, may_differ=may_differ)
        if not may_differ:
            measured(place, "TRADES", *bf16, name="bf16")
            measured(place, "MART", name="fp32")
            measured(place, "MART", "seed=1", name="again")
            measured(place, "MART", *bf16, "seed=2", name="both")
        filled = shown(place)
        assert sum(each.row == "TRADES [a]" and bool(each.values) for each in filled.lines) == (3 if rows else 0)
    said = "attack.precision bf16 (the cell's is fp32), trainer.channels_last True (the cell's is False)"
    assert f"[a] {said}" in filled.aside
    assert {(each.row, tuple(each.values), each.unlike) for each in filled.lines if each.cell == "MART"} == {
        ("MART", (0, 1), ""),
        ("MART [a]", (2,), said),
    }, "seeds of the one are never averaged with those of the other"


def test_how_often_validation_ran_is_no_part_of_the_last_checkpoint(place: Path) -> None:
    for select, same in (("last", True), ("best", False)):
        one, two = (
            planned(place, "TRADES", f"select={select}", *o) for o in ((), ("trainer.check_val_every_n_epoch=3",))
        )
        assert (identity(one) == identity(two)) == same


# ---------------------------------------------------------------- what does not
def test_other_budgets_are_counted_and_never_mixed(place: Path) -> None:
    measured(place, "TRADES", "budget=smoke")
    filled = shown(place)
    assert all(not each.values for each in filled.lines)
    assert filled.aside == ["1 record of budget smoke: budget=smoke shows it"]
    assert shown(place, "seed=0").aside == filled.aside
    assert shown(place, "seed=3").aside == [], "budget=smoke seed=3 has none either"
    (said,) = shown(place, "optim.lr=0.02").aside
    assert said == "1 record of budget smoke: budget=smoke shows those with optim.lr=0.02"
    assert "nothing of this table was run at budget paper: python -m mi_at.train -m table=own" in report.render(
        filled, "terminal"
    )


def test_another_version_of_a_configuration_is_listed_with_what_differs(place: Path) -> None:
    measured(place, "TRADES", "defense.beta=2", "runs=elsewhere")
    filled = shown(place)
    assert line(filled, "TRADES", "fgsm").mean is None
    (said,) = filled.aside
    assert said.startswith("another version of TRADES: ")
    assert said.endswith("record.json: defense.beta 2 (now 6.0)")


def test_tags_alone_bring_nothing_into_a_table(place: Path) -> None:
    """A record is found by its configuration; what it was run for does not count."""
    measured(place, "TRADES", tags={"tags": ["another", "cell"]})
    assert line(shown(place), "TRADES", "fgsm").mean is not None
    measured(place, "MART", "defense.beta=9", name="tagged", tags={"tags": ["own", "MIMAE-AT"]})
    filled = shown(place)
    assert line(filled, "MIMAE-AT", "fgsm").mean is None
    assert line(filled, "MART", "fgsm").mean is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eps": 0.1}, "eps 0.1, the column's is 0.02"),
        ({"attack": "pgd"}, "attack pgd, the column's is fgsm"),
        ({"norm": "l2"}, "norm l2, the column's is linf"),
        (share(10, 5), "n 10, the column's is 40"),
    ],
    ids=["eps", "attack", "norm", "n"],
)
def test_a_row_that_is_another_measurement_is_refused(place: Path, change: dict[str, Any], said: str) -> None:
    record = measured(place, "TRADES")
    path = place / "runs/run/record.json"
    path.with_suffix(".npz").unlink()  # beside which another n would be damage
    write_record(path, with_row(record, replace(record["fgsm"], **change)))
    filled = shown(place)
    assert line(filled, "TRADES", "fgsm").mean is None
    assert filled.aside == [
        f"refused: {path}: fgsm: {said}",
        f"not checked: {path}: there are no outcomes beside it, record.npz",
    ]
    assert line(filled, "TRADES", "pgd_20").mean is not None


def test_a_description_that_differs_is_refused_too(place: Path) -> None:
    record = measured(place, "TRADES")
    row = record["pgd_20"]
    other = replace(row, description={**row.description, "init": "zero"})
    write_record(place / "runs/run/record.json", with_row(record, other))
    (said,) = shown(place).aside
    assert said.endswith("pgd_20: init zero, the column's is uniform")


def test_a_damaged_record_is_named_and_the_others_are_shown(place: Path) -> None:
    measured(place, "TRADES", name="a")
    broken = place / "runs/b/record.json"
    broken.parent.mkdir()
    broken.write_text((place / "runs/a/record.json").read_text()[:300])
    filled = shown(place)
    assert line(filled, "TRADES", "fgsm").mean is not None
    (said,) = filled.aside
    assert said.startswith(f"damaged: {broken}: not a whole record")
    assert table_text.notes(shown(place, "seed=3"))[0].startswith("but for what is damaged, nothing of this table was")


def test_counts_that_are_not_those_of_the_outcomes_are_damage(place: Path) -> None:
    """An edit that is consistent in itself, interval and all."""
    record = measured(place, "TRADES")
    row, path = record["fgsm"], place / "runs/run/record.json"
    write_record(path, with_row(record, replace(row, **share(row.n, row.correct + 1))))
    filled = shown(place)
    assert line(filled, "TRADES", "fgsm").mean is None
    said = f"fgsm: {row.correct + 1} right of 40, but {row.correct} of 40 in the outcomes beside it: was it edited?"
    assert filled.aside == [f"damaged: {path}: {said}"]


def test_a_second_record_of_a_seed_is_listed_where_it_differs(place: Path) -> None:
    record = measured(place, "TRADES", name="a")
    shutil.copytree(place / "runs/a", place / "runs/b")
    assert shown(place).aside == []
    measured(place, "TRADES", name="b", less=1)
    filled = shown(place)
    assert filled.aside == [
        f"a second run of seed 0: {place}/runs/b/record.json differs from {place}/runs/a/record.json, which is shown"
    ]
    assert line(filled, "TRADES", "fgsm").mean == pytest.approx(100 * record["fgsm"].accuracy)


def test_the_seed_of_training_is_no_part_of_a_cell(place: Path) -> None:
    one, two, other = (planned(place, "TRADES", *typed) for typed in ([], ["seed=4"], ["defense.beta=1"]))
    assert identity(one) == identity(two) != identity(other)


# ---------------------------------------------------------------- how it is shown
@pytest.mark.parametrize(("n", "interval"), [(200, " [83.3, 92.2]"), (999, " [86.4, 90.3]"), (1000, "")])
def test_a_number_of_few_images_has_its_interval(n: int, interval: str) -> None:
    """The audit's n_small: no bare number of less than 1,000."""
    of_one = Line("trades", "TRADES", "mnist", "cnn4", "PGD", "pgd_20", None, {0: 88.5}, n, (), None)
    assert table_text.measured(of_one) == f"88.50{interval} (1)"
    assert table_text.measured(replace(of_one, values={0: 88.0, 1: 89.0})) == f"88.50 +- 0.71{interval} (2)"
    assert table_text.measured(replace(of_one, values={}, n=None)) == "-"


def test_every_format_has_every_number(place: Path) -> None:
    record = measured(place, "TRADES")
    filled = shown(place)
    low, high = wilson(record["fgsm"].correct, record["fgsm"].n)
    mean = f"{100 * record['fgsm'].accuracy:.2f} [{100 * low:.1f}, {100 * high:.1f}] (1)"
    for form in ("terminal", "markdown", "latex"):
        text = report.render(filled, form)
        assert mean in text
        assert "52.74" in text
        assert "54.38" in text
    assert "| TRADES | fgsm | 58.80 |" in report.render(filled, "markdown")
    doubtful = next(each for each in filled.lines if each.reported)
    noted = replace(doubtful, reported=replace(doubtful.reported, note="unreadable"))
    assert "\n- \\* unreadable (" in report.render(replace(filled, lines=[noted]), "markdown")
    assert r"pgd20: pgd\_20 & 52.74 &" in report.render(filled, "latex")
    rows = list(csv.DictReader(StringIO(report.render(filled, "csv"))))
    assert len(rows) == len(filled.lines) == 9
    assert rows[2]["measured"] == str(100 * record["pgd_20"].accuracy)
    assert rows[3]["measured"] == rows[3]["difference"] == rows[3]["n"] == rows[3]["low"] == ""
    assert float(rows[1]["low"]) == pytest.approx(100 * low)
    assert float(rows[1]["high"]) == pytest.approx(100 * high)
    assert (rows[0]["reported"], rows[0]["seeds"], rows[0]["budget"]) == ("81.18", "0", "paper")


def test_every_format_says_what_the_attacks_are(place: Path) -> None:
    measured(place, "TRADES")
    filled = shown(place)
    fgsm = "fgsm: linf, eps 0.02, 1 step of 0.02, cross entropy, from the image"
    pgd = "pgd_20: linf, eps 0.02, 20 steps of 0.00025, cross entropy, uniform start"
    for form in ("terminal", "markdown"):
        assert {fgsm, pgd} <= {part.removeprefix("- ") for part in report.render(filled, form).splitlines()}, form
    latex = report.render(filled, "latex").splitlines()
    assert rf"\par\footnotesize {pgd.replace('_', chr(92) + '_')}" in latex[latex.index(r"\end{tabular}") :]
    row = list(csv.DictReader(StringIO(report.render(filled, "csv"))))[2]
    assert (row["norm"], row["eps"], row["steps"], row["step_size"]) == ("linf", "0.02", "20", "0.00025")


def test_attacks_of_one_name_are_told_apart() -> None:
    def number(cell: str, dataset: str, eps: float) -> Line:
        return Line(
            cell, cell, dataset, "m", "PGD", "pgd", None, {0: 50.0}, 10_000, (), None, says={"norm": "linf", "eps": eps}
        )

    lines = [
        number("a", "mnist", 0.3),
        number("b", "mnist", 0.3),
        number("c", "cifar10", 0.5),
        number("d", "svhn", 0.5),
    ]
    table = Table("own", "none", None, "own", (0,), {}, ("pgd",), {})
    told = {"pgd (mnist)": "linf, eps 0.3", "pgd (cifar10, svhn)": "linf, eps 0.5"}
    assert table_text.attacks(Filled(table, "paper", lines)) == told
    lines = [number("a", "mnist", 0.3), number("b", "mnist", 0.2)]
    assert set(table_text.attacks(Filled(table, "paper", lines))) == {"pgd (a)", "pgd (b)"}
    assert table_text.attacks(Filled(table, "paper", lines[:1])) == {"pgd": "linf, eps 0.3"}


def test_columns_are_chosen_by_either_name(place: Path) -> None:
    write_table(place, cells=CELLS, seeds=[0], shared=SHARED, columns=COLUMNS, number=5, more=["worst"])
    for names in (["pgd20", "worst"], ["pgd_20", "worst"]):
        filled = report.report([search(place), "table=own"], [place / "runs"], names)
        assert {each.attack for each in filled.lines} <= {"pgd_20", "worst"}
        assert line(filled, "TRADES", "pgd_20").reported is not None
    with pytest.raises(TableError, match=r"columns=\[pgd21\]: table own has clean, .*did you mean pgd20"):
        report.report([search(place), "table=own"], [place / "runs"], ["pgd21"])


def test_legends_stand_where_they_are_needed(place: Path) -> None:
    result = measured(place, "TRADES", name="a")
    shown_once = report.render(shown(place), "terminal")
    assert "\nmeasured: % of n images" in shown_once, "n 40 has an interval"
    assert "to the baseline" not in shown_once
    reach = next(row for row in result.attacks if "reach" in row.flags)
    said = [text for text in shown_once.splitlines() if text.startswith("reach: ")]
    assert said == [f"reach: {reach.messages['reach']} (TRADES, {reach.name})"]


def test_a_flag_of_some_seeds_says_which(place: Path) -> None:
    measured(place, "TRADES", "seed=0", name="a")
    record = measured(place, "TRADES", "seed=1", name="b")
    path = place / "runs/b/record.json"
    path.with_suffix(".npz").unlink()
    flagged = replace(record["fgsm"], flags=("no_gradient",))
    write_record(path, with_row(record, flagged))
    assert line(shown(place), "TRADES", "fgsm").flags == ("no_gradient (seed 1)",)
    assert line(shown(place, "seed=1"), "TRADES", "fgsm").flags == ("no_gradient",)


def test_seeds_that_are_asked_for_and_not_there_are_named(place: Path) -> None:
    measured(place, "TRADES", "seed=0")
    run = "python -m mi_at.train -m table=own"
    assert table_text.notes(shown(place, "seed=7"))[-1].endswith(f"was run at budget paper, seed 7: {run} seed=7")
    both = table_text.notes(shown(place, "seed=0,7"))
    assert f"seed 0 was not run: MART, MIMAE-AT: {run} seed=0,7" in both
    assert f"seed 7 was not run: TRADES, MART, MIMAE-AT: {run} seed=0,7" in both


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    report.main([search(place), "table=own", "table.rows=[TRADES]", "format=csv"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    assert "nothing of these rows was run" in printed.err, "a CSV has no place for it"
    (place / "my runs").mkdir()
    for quoted in ("runs='my runs'", "runs=my runs"):
        report.main([search(place), "table=own", quoted])
    for arguments, said in {
        ("table=mimae_t55",): "table=mimae_t55: expected one of .*did you mean mimae_t5",
        (): "which table",
        ("table=",): "which table",
        ("tabel=mimae_t8",): "tabel=mimae_t8: unknown; did you mean table=mimae_t8",
        ("mimae_t8",): "mimae_t8: unknown; did you mean table=mimae_t8",
        ("table=mimae_t5", "table=mimae_t8"): "table=mimae_t5 table=mimae_t8: one table at a time",
        (search(place), "table=own", "format=pdf"): "format=pdf: expected one of terminal, markdown, latex, csv",
        (search(place), "table=own", "table.rows=[TRADEZ]"): "did you mean TRADES",
        ("table=mimae_t5,mimae_t8",): "table=mimae_t5,mimae_t8: one table at a time",
        (search(place), "table=own", "columns=[]"): r"columns=\[\]: table own has clean, fgsm",
        (search(place), "table=own", "colums=[fgsm]"): r"colums=\[fgsm\]: unknown; did you mean columns=",
        (search(place), "table=own", "attack.eps=abc"): "cell TRADES: attack.eps='abc': expected a number",
        (search(place), "table=own", "optim.lr=-1"): "cell TRADES: optim.lr=-1",
        (search(place), "table=own", "columns=[fgsm]", "format=svg"): "format=svg shows all",
        (search(place), "table=own", "table.columns=[pgd99]"): r"table.columns=\[...\]: the table's own; table.rows=",
        (search(place), "table=own", "defense=mart"): "defense= cannot be typed beside table=own",
        (search(place), "table=own", "defense.beta=1,2"): "only seed= may have several",
        (search(place), "table=own", "defense.bta=1"): "defense.bta",
        (search(place), "table=own", "table.rows=[]"): r"rows=\[\]: leave it out for all rows",
        (search(place), "table=own", "seed=one"): "seed=one: expected a whole number",
        (search(place), "table=own", "runs=nowhere"): "runs=nowhere: there is no such folder",
        (search(place), "table=own", "records=[conf/table/own.yaml]"): "is a file; its folder is wanted, conf/table",
        (search(place), "table=own", "records=[runs,nowhere]"): r"records=\[runs,nowhere\]: there is no folder nowhere",
    }.items():
        with pytest.raises(SystemExit, match=said):
            report.main(list(arguments))


def test_a_column_that_no_attack_has_is_an_error(place: Path) -> None:
    write_table(place, cells=CELLS, seeds=[0], shared=SHARED, columns={"fgsm": "fgms"})
    with pytest.raises(TableError, match="column fgsm: evaluation=chosen of cell TRADES has no fgms: expected one of"):
        shown(place)


def test_the_committed_records_are_readable(tmp_path: Path) -> None:
    """Those of an earlier protocol are said to be so."""
    filled = report.report(["table=mimae_t8", "budget=short"], [report.MEASURED])
    assert filled.budget == "short"
    assert not [said for said in filled.aside if said.startswith("damaged")]
    assert json.dumps([each.cell for each in filled.lines])
