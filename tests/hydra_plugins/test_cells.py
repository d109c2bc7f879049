"""The sweeper of tables, by its command: what runs, what is skipped, what fails, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.commands import TINY, Done, command
from tests.own_table import search, write_table

CELLS = {
    "TRADES": ["defense=trades"],
    "negative": ["defense=trades", "defense.beta=-1"],
    "plain": ["defense=standard_at"],
}


def sweep(folder: Path, *typed: str, name: str = "own") -> Done:
    return command(folder, "-m", search(folder), f"table={name}", *TINY, *typed)


def records(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "runs").glob("*/record.json"))}


def lines_of_jobs(done: Done) -> list[str]:
    return [line for line in done.out.splitlines() if "#" in line and "cell=" in line]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A table of three cells, of which the second fails, with two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    write_table(folder, cells=CELLS, seeds=[0, 1])
    return folder, sweep(folder)


def test_every_cell_runs_with_every_seed_and_one_that_fails_stops_no_other(swept: tuple[Path, Done]) -> None:
    folder, done = swept
    keys = [json.loads(path.read_text())["key"] for path in records(folder)]
    assert sorted(keys) == sorted(
        f"{defense}-digits-cnn_tiny-s{seed}" for defense in ("trades", "standard_at") for seed in (0, 1)
    )
    assert done.code == 1
    said = done.err.splitlines()
    place = said.index("2 of 6 runs of table own failed:")
    assert said[place + 1].startswith("  negative seed=0: defense.beta=-1")
    assert said[place + 2].startswith("  negative seed=1: defense.beta=-1")
    assert "Traceback" not in done.err


def test_what_failed_leaves_its_error_in_the_folder_of_the_sweep(swept: tuple[Path, Done]) -> None:
    folder, done = swept
    (sweeps,) = (folder / "runs/multirun").iterdir()
    left = {path.parent.name: path.read_text() for path in sorted(sweeps.glob("*/error.txt"))}
    assert list(left) == ["1", "4"], "the jobs of the second cell, by number"
    for seed, text in zip((0, 1), left.values(), strict=True):
        assert "cell=negative" in text.splitlines()[0]
        assert f"seed={seed}" in text.splitlines()[0]
        assert text.splitlines()[2].startswith("defense.beta=-1")
        assert "Traceback" in text
        assert "ValueError" in text.splitlines()[-1]
    assert f"where each of them failed: {sweeps.relative_to(folder)}/*/error.txt" in done.err


def test_the_whole_table_runs_with_one_seed_before_the_next(swept: tuple[Path, Done]) -> None:
    order = [(line.split("cell=")[1].split()[0], line.split("seed=")[1][0]) for line in lines_of_jobs(swept[1])]
    assert order == [(cell, seed) for seed in "01" for cell in CELLS]


def test_what_is_finished_is_not_run_again_and_a_record_says_where_it_belongs(swept: tuple[Path, Done]) -> None:
    folder, _ = swept
    before = records(folder)
    again = sweep(folder, "table.rows=[TRADES,plain]", "seed=0")
    assert again.code == 0, again.err
    assert records(folder) == before
    assert again.out.count("(finished)") == 2
    said = again.out.splitlines()[-2:]
    assert said[0] == "all 2 runs of table own are finished; what they measured:"
    shown = command(folder, *shlex.split(said[1])[3:], module="mi_at.report")
    assert shown.code == 0, shown.err
    (row,) = (line.split() for line in shown.out.splitlines() if line.startswith("TRADES"))
    assert row[3] != "-", "its number, not that nothing was run"
    tags = [json.loads(path.read_text())["tags"]["tags"] for path in before]
    assert sorted(map(tuple, tags)) == sorted([("own", "TRADES"), ("own", "plain")] * 2)


def test_a_damaged_record_is_set_aside_and_the_run_evaluated_again(swept: tuple[Path, Done], tmp_path: Path) -> None:
    folder, _ = swept
    write_table(tmp_path, cells={"plain": ["defense=standard_at"]}, seeds=[0])
    assert sweep(tmp_path).code == 0
    (record,) = records(tmp_path)
    whole = json.loads(record.read_text())
    record.write_text(record.read_text()[:500])
    weights = (record.parent / "last.ckpt").stat().st_mtime_ns
    done = sweep(tmp_path)
    assert done.code == 0, done.err
    assert "not a whole record" in done.err
    assert (record.parent / "record.json.damaged").is_file()
    assert json.loads(record.read_text())["attacks"] == [
        {**row, "seconds": new["seconds"]}
        for row, new in zip(whole["attacks"], json.loads(record.read_text())["attacks"], strict=True)
    ]
    assert (record.parent / "last.ckpt").stat().st_mtime_ns == weights, "it is not trained again"
    assert folder != tmp_path
    record.with_suffix(".npz").unlink()
    shown = command(tmp_path, *shlex.split(done.out.splitlines()[-1])[3:], module="mi_at.report")
    assert f"not checked: runs/{record.parent.name}/record.json: there are no outcomes" in shown.out, shown.err
    done = sweep(tmp_path)
    assert record.with_suffix(".npz").is_file(), "without its outcomes nothing shows whether a record was edited"
    assert "the run of table own is finished; what it measured:" in done.out
    assert (record.parent / "last.ckpt").stat().st_mtime_ns == weights


def test_several_tables_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, cells={"plain": ["defense=standard_at"]}, seeds=[0])
    done = sweep(tmp_path, "table=own")
    assert done.code == 1
    assert done.err.startswith("error: table=own table=own: one table at a time")
    assert not records(tmp_path)


def test_a_value_is_set_that_the_defaults_lack(tmp_path: Path) -> None:
    """The cell alone has the regularizer; the same words make the report."""
    write_table(tmp_path, cells={"TRADES": ["defense=trades", "regularizer=mi"]}, seeds=[0])
    done = sweep(tmp_path, "regularizer.mi.lambda_mi=0.3")
    assert done.code == 0, done.err
    (record,) = records(tmp_path)
    assert json.loads(record.read_text())["config"]["regularizer"]["mi"]["lambda_mi"] == 0.3
    said = shlex.split(done.out.splitlines()[-1])[3:]
    assert "regularizer.mi.lambda_mi=0.3" in said
    shown = command(tmp_path, *said, module="mi_at.report")
    assert shown.code == 0, shown.err
    assert "another version" not in shown.out
    (row,) = (line.split() for line in shown.out.splitlines() if line.startswith("TRADES"))
    assert row[3] != "-", "its number, not that nothing was run"
    title = shown.out.splitlines()[0]
    assert title.startswith("own, with ")
    assert "regularizer.mi.lambda_mi=0.3" in title, "it is not the paper's table"
    line = command(tmp_path, *said, "format=csv", module="mi_at.report").out.splitlines()[1]
    assert re.match(r"own .*regularizer\.mi\.lambda_mi=0\.3,TRADES,", line)
    assert command(tmp_path, *said, "format=html", module="mi_at.report").code == 0
    pages = {path.parent.name: path.read_text() for path in (tmp_path / "site").glob("*/*-smoke.html")}
    pages["runs"] = next((tmp_path / "site/runs").glob("*.html")).read_text()
    for page in pages.values():
        commands = re.findall(r"python -m mi_at\.(?:train -m|report) table=own [^<]*", page)
        assert commands
        assert all("regularizer.mi.lambda_mi=0.3" in each for each in commands), commands
    wrong = sweep(tmp_path, "regularizer.mi.lambda=0.3")
    assert wrong.code == 1
    assert "unknown key regularizer.mi.lambda" in wrong.err
    assert "Traceback" not in wrong.err


def test_of_several_values_the_report_that_is_named_shows_the_first(tmp_path: Path) -> None:
    write_table(tmp_path, cells={"TRADES": ["defense=trades"]}, seeds=[0])
    done = sweep(tmp_path, "defense.beta=2,3", "seed=0,1")
    assert done.code == 0, done.err
    assert "all 4 runs of table own are finished; what they measured with the first defense.beta:" in done.out
    said = shlex.split(done.out.splitlines()[-1])[3:]
    assert {"defense.beta=2", "seed=0,1"} < set(said)
    shown = command(tmp_path, *said, module="mi_at.report")
    assert shown.code == 0, shown.err
    (row,) = (line for line in shown.out.splitlines() if line.startswith("TRADES"))
    assert "(2)" in row, "both seeds"


REFUSED = {
    ("table.rows=[TRADE]",): "table.rows=[TRADE]: table own has TRADES, negative, plain; did you mean TRADES?",
    ("defense=mart",): "defense= cannot be typed beside table=own: its cell TRADES is defense=trades",
    ("cell=TRADES",): "cell= is the table's own",
    ("seed=0,one",): "seed=one: expected a whole number from 0, or several, such as seed=0,1,2",
    ("runs=/dev/null",): "Not a directory: '/dev/null/multirun/",
    ("defense.bta=1",): "cell TRADES: unknown key defense.bta",
    ("defense.beta=1",): "cell plain: unknown key defense.beta",
}


@pytest.mark.parametrize("typed", REFUSED, ids=" ".join)
def test_what_cannot_be_asked_is_said_before_anything_runs(typed: tuple[str, ...], tmp_path: Path) -> None:
    write_table(tmp_path, cells=CELLS, seeds=[0])
    done = sweep(tmp_path, *typed)
    assert done.code == 1
    assert REFUSED[typed] in done.err
    assert not (tmp_path / "runs").exists() or not records(tmp_path)


def test_an_unknown_table_names_those_there_are(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "table=mimae_t55", *TINY)
    assert done.code == 1
    assert "table=mimae_t55: expected one of " in done.err
    assert "did you mean mimae_t5?" in done.err


def test_two_tables_are_two_commands(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "table=mimae_t5,mimae_t8")
    assert done.code == 1
    assert "error: table=mimae_t5 beside others: a command runs one table; give a command for each" in done.err
    assert not list(tmp_path.glob("runs/*/record.json"))


def test_a_table_is_no_single_run(tmp_path: Path) -> None:
    done = command(tmp_path, "table=mimae_t5")
    assert done.code == 1
    assert "table=mimae_t5 is 4 runs (standard_at, trades, mart, mimae): give -m too" in done.err
    assert list(tmp_path.iterdir()) == []


def test_typed_values_win_over_those_of_a_cell(tmp_path: Path) -> None:
    write_table(tmp_path, cells={"TRADES": ["defense=trades", "defense.beta=2"]}, seeds=[0, 1])
    assert sweep(tmp_path, "defense.beta=3", "seed=5").code == 0
    (record,) = records(tmp_path)
    config = json.loads(record.read_text())["config"]
    assert (config["defense"]["beta"], config["seed"]) == (3, 5)
