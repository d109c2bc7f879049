"""docs/REPRODUCING.md: every option of the other reading composes with its run, and its commands are ones there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mi_at import cells, io, report
from mi_at.results.reported import PAPERS
from mi_at.results.tables import key_of

REPO = Path(__file__).resolve().parents[1]
TEXT = (REPO / "docs/REPRODUCING.md").read_text()
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    if "\nRun: `" in body
}


def run_of(body: str) -> list[str]:
    """The run that a section's options are added to."""
    (run,) = re.findall(r"^Run: `([^`]+)`$", body, re.M)
    return str(run).split()


def readings(body: str) -> Iterator[list[str]]:
    """The overrides of each line that has another reading."""
    for line in body.splitlines():
        if line.startswith("| ") and not line.startswith(("| in print", "| ---")):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3, line
            assert all(cells), line
            if cells[2] != "-":
                (overrides,) = re.findall(r"^`([^`]+)`$", cells[2])
                yield str(overrides).split()


def packed(run: list[str], found: Iterator[list[str]]) -> list[list[str]]:
    """Few command lines with all overrides: those that can stand beside one another are composed together.

    A reading that chooses a group is composed alone.
    """
    alone: list[list[str]] = []
    together: list[list[str]] = []
    for overrides in found:
        keys = {key_of(override) for override in overrides}
        if any("." not in key and key not in ("select", "seed") for key in keys):
            alone.append([*(part for part in run if key_of(part) not in keys), *overrides])
            continue
        place = next((line for line in together if not keys & {key_of(override) for override in line}), None)
        if place is None:
            together.append([*run, *overrides])
        else:
            place += overrides
    return [*together, *alone]


def test_every_paper_has_a_section() -> None:
    assert list(SECTIONS) == [*PAPERS, "All papers"]
    for body in SECTIONS.values():
        assert len(list(readings(body))) >= 3


def test_a_reading_is_an_option_and_another_one_than_ours(compose: Callable[..., Any]) -> None:
    """Of the run of every section; readings that choose another run are composed by the slow test."""
    for title, body in SECTIONS.items():
        run = run_of(body)
        config = compose(run)
        for overrides in readings(body):
            if {key_of(override) for override in overrides} & {*map(key_of, run), "recipe"}:
                continue
            values = [(key_of(override), override.partition("=")[2]) for override in overrides]
            ours = [str(OmegaConf.select(config, key, default="no option")) for key, _ in values]
            assert "no option" not in ours or "callback.ema.decay" in dict(values), (title, overrides)
            assert ours != [value for _, value in values], (title, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_every_other_reading_composes(title: str, compose: Callable[..., Any]) -> None:
    lines = packed(run_of(SECTIONS[title]), readings(SECTIONS[title]))
    for overrides in lines:
        config = io.plain(compose(overrides))
        for override in overrides:
            key, _, value = override.partition("=")
            if "." in key:  # a value that a recipe or a budget takes away again would be none
                assert str(OmegaConf.select(OmegaConf.create(config), key)) in (value, str(_number(value))), override
        io.build("defense", config["defense"])
        io.build_attacks(config["evaluation"])


def _number(text: str) -> Any:
    return OmegaConf.create(f"value: {text}").value


def test_commands_are_there() -> None:
    """Those of the workflow, and the records that a report sets aside are those the code knows."""
    (block,) = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    tables = set()
    for line in block.splitlines():
        module, *arguments = line.removeprefix("python -m ").split()
        assert module in ("mi_at.train", "mi_at.report"), line
        tables.add(tuple(argument for argument in arguments if key_of(argument) not in ("format", "out", "-m")))
        form = next((a.partition("=")[2] for a in arguments if key_of(a) == "format"), "terminal")
        assert form in report.FORMATS
    with io.composing():
        for overrides in tables:
            _, jobs = cells.composed(overrides)
            assert jobs


def test_tables_that_are_named_are_there() -> None:
    for name in re.findall(r"`table=(\w+)`", TEXT):
        assert name in report.table_names(), name
