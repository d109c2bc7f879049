"""The papers' printed numbers: all there, typed, and refused where damaged."""

import csv
from pathlib import Path

import pytest

from mi_at.results.reported import FOLDER, PAPERS, ReportedError, read_reported, tables_of


def test_every_number_of_the_five_papers_is_there() -> None:
    counts = {paper: len(read_reported(paper)) for paper in PAPERS}
    assert counts == {"mimae": 183, "shared_info": 249, "namid": 318, "ib_rar": 175, "ncmi": 776}
    assert sum(counts.values()) == 1701


@pytest.mark.parametrize("paper", PAPERS)
def test_values_are_in_range_and_lost_ones_say_so(paper: str) -> None:
    for number in read_reported(paper):
        if number.value is None:
            assert number.note, number
        elif number.unit == "percent":
            assert 0 <= number.value <= 100
        else:
            assert number.value > 0
        assert number.std is None or 0 <= number.std < 15


def test_known_cells() -> None:
    table = tables_of(read_reported("mimae"))["8"]
    printed = {(number.row, number.attack): number.value for number in table}
    assert printed["MIMAE-AT", "pgd20"] == 92.09
    assert printed["MIMAE-AT", "pgd40"] == 71.15
    first = read_reported("mimae")[0]
    assert first.params == {"lambda": "0.1", "beta": "1"}
    spread = next(n for n in read_reported("shared_info") if n.table == "4" and n.attack == "pgd20")
    assert (spread.dataset, spread.value, spread.std) == ("mnist", 96.25, 0.04)


def damaged(folder: Path, **changes: str) -> Path:
    """A file of one line, with some of its cells changed."""
    with (FOLDER / "mimae.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        line = {**next(reader), **changes}
        names = list(reader.fieldnames or ())
    with (folder / "mimae.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerow(line)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "8l.5"}, "mimae.csv:2: '8l.5': expected a number"),
        ({"unit": "inches"}, "mimae.csv:2: unit='inches': expected one of percent"),
        ({"params": "lambda"}, "params: 'lambda': expected name=value"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ReportedError, match=message):
        read_reported("mimae", damaged(tmp_path, **changes))


def test_a_short_line_is_named(tmp_path: Path) -> None:
    path = damaged(tmp_path) / "mimae.csv"
    path.write_text(path.read_text() + "5,only,three\n")
    with pytest.raises(ReportedError, match=r"mimae.csv:3: 17 cells expected"):
        read_reported("mimae", tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReportedError, match="paper=mimea: expected one of mimae"):
        read_reported("mimea")
    with pytest.raises(ReportedError, match="cannot be read: No such file"):
        read_reported("ncmi", tmp_path)
    (tmp_path / "namid.csv").write_text("table,row\n1,x\n")
    with pytest.raises(ReportedError, match=r"columns .*expected table, row"):
        read_reported("namid", tmp_path)
