"""conf/table: every printed number has one place, every cell is what the print says it is, and composes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from mi_at import io, report
from mi_at.results.measured import Planned
from mi_at.results.reported import PAPERS, Reported, read_reported
from mi_at.results.tables import Cell, Job, Table, key_of, read_table

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
NAMES = report.table_names()

NO_TABLE = {
    ("mimae", "sec5.4"): "the text's other reading of a number of Table 9",
    ("shared_info", "8"): "costs on named hardware",
    ("ib_rar", "5"): "counts of misclassifications, of a network that is not named",
    ("ib_rar", "secA.3"): "one training that did not converge, read off Figure 4",
}
"""Printed numbers that no cell can have, and why."""

NOT_YET = {
    ("mimae", "9"): "black box",
    ("shared_info", "6"): "black box",
    ("namid", "2"): "black box",
    ("namid", "5"): "black box",
    ("namid", "6"): "black box",
    ("shared_info", "7"): "training on the representation attack",
    ("shared_info", "9"): "training on the representation attack",
}
"""Printed numbers whose tables are still to come."""


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[Table, list[Job]]]:
    """Every table with the jobs of its sweep."""
    found = {}
    io.register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name in NAMES:
            # Without conf/train.yaml, which takes four times as long and adds nothing to the node.
            node: Any = OmegaConf.to_container(hydra.compose(f"table/{name}").table)
            table = read_table(node)
            found[name] = (table, table.jobs([[]], GROUPS))
    return found


# ---------------------------------------------------------------- the print
def test_every_printed_number_has_exactly_one_place(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    places: dict[int, list[str]] = {}
    numbers = {paper: read_reported(paper) for paper in PAPERS}
    for name, (table, _) in tables.items():
        for cell, columns in table.numbers(numbers[table.paper]).items():
            for column, number in columns.items():
                places.setdefault(id(number), []).append(f"{name} {cell} {column}")
    without, twice, unexpected = [], [], []
    for number in (number for paper in PAPERS for number in numbers[paper]):
        found = places.get(id(number), [])
        key = (number.paper, number.table)
        if key in NO_TABLE or key in NOT_YET:
            unexpected += found
        elif not found:
            without.append((*key, number.row, number.dataset, number.model, number.attack))
        elif len(found) > 1:
            twice.append(found)
    assert without == []
    assert twice == []
    assert unexpected == [], "a number that is said to have no place"


def test_every_cell_and_every_column_has_a_printed_number(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    for name, (table, _) in tables.items():
        found = table.numbers(read_reported(table.paper))
        assert all(found.values()), name
        known = {number.table for number in read_reported(table.paper)}
        assert table.number in known, name


def test_a_table_is_named_as_its_file(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    for name, (table, jobs) in tables.items():
        assert table.name == name
        assert name.startswith(f"{table.paper}_")
        assert table.title
        assert len(jobs) == len(table.cells) * len(table.seeds)
        assert len({job.overrides for job in jobs}) == len(jobs), "no two runs are the same"


MEANS = {
    "mimae": {"lambda": "defense.lambda_mi", "beta": "defense.beta", "batch_size": "dataset.batch_size"},
    "shared_info": {
        "alpha": "defense.alpha",
        "beta": "defense.beta",
        "lambda": "defense.lambda_mi",
        "estimator": "defense.estimator",
        "use_ce_clean": "defense.use_ce_clean",
        "use_ce_adv": "defense.use_ce_adv",
        "use_dskl": "defense.use_dskl",
        "use_mi": "defense.use_mi",
        "early_stop_epoch": "trainer.max_epochs",
    },
    "namid": {"alpha": "regularizer.namid.alpha", "lambda": "regularizer.namid.lambda_mi"},
    "ib_rar": {"mask_fraction": "regularizer.ib_rar.mask.fraction"},
    "ncmi": {
        **{name: f"regularizer.{{regularizer}}.{name}" for name in ("alpha", "beta", "tau_q", "samples_per_class")},
    },
}
"""What a printed setting is called here."""
WEIGHTS = {"trades": "defense.beta", "mart": "defense.beta"}
SEVERAL = {"0": False, "1": True}


def agrees(config: dict[str, Any], number: Reported) -> list[str]:
    """In what a cell's configuration is not what is printed of it."""
    choices, wrong = config["choices"], []

    def same(what: str, here: object, there: object) -> None:
        if here != there:
            wrong.append(f"{what}: {here}, printed {there}")

    defense = "vib" if number.regularizer == "vib" else number.defense
    same("dataset", choices["dataset"], number.dataset)
    same("model", choices["model"], number.model)
    same("defense", choices["defense"], defense)
    if number.regularizer != "vib":
        same("regularizer", choices["regularizer"].removesuffix("_relaxed"), number.regularizer)
    same("extra data", config["dataset"]["extra"] is not None, number.extra_data != "none")
    if number.train_norm != "none":
        same("norm", config["attack"]["norm"], number.train_norm)
    early = "trainer.max_epochs" if (number.paper, number.table) == ("shared_info", "11") else None
    if number.checkpoint != "unspecified" and not early:
        same("select", config["select"], number.checkpoint)
    for name, value in number.params.items():
        key = MEANS[number.paper].get(name)
        if number.paper == "mimae" and number.defense in WEIGHTS:
            key = WEIGHTS[number.defense]
        if key is None or (choices["regularizer"] == "none" and key.startswith("regularizer.")):
            continue
        node: Any = config
        for part in key.format(regularizer=choices["regularizer"]).split("."):
            node = node[part]
        expected = SEVERAL.get(value, value) if isinstance(node, bool) else type(node)(value)
        same(name, node, expected)
    if (mask := number.params.get("mask")) is not None:
        same("mask", bool(config["regularizer"]["ib_rar"]["mask"]["fraction"]), mask == "1")
    for name, option in (("use_ixt", "alpha"), ("use_iyt", "beta")):
        if (used := number.params.get(name)) is not None:
            same(name, bool(config["regularizer"]["ib_rar"][option]), used == "1")
    return wrong


def kind(table: Table, cell: Cell) -> tuple[str, ...]:
    """Cells of a kind compose alike: they differ in data, network, or numbers."""
    chosen = {"regularizer", "recipe", "evaluation"}
    return (table.paper, *sorted(override for override in cell.overrides if key_of(override) in chosen))


def check_cell(table: Table, cell: Cell, job: Job) -> Planned:
    """Compose it, hold it against the print, and see that its evaluation has every column."""
    plan = report.plan_of(job)
    numbers = table.numbers(read_reported(table.paper))[cell.name]
    for column, number in numbers.items():
        assert agrees(dict(plan.config), number) == [], f"{table.name} {cell.name}"
        assert table.columns[column] in plan.attacks, f"{table.name} {cell.name} {column}"
    assert plan.config["dataset"]["val_size"] if plan.config["select"] == "best" else True
    assert plan.config["choices"]["recipe"] != "none", f"{table.name} {cell.name}: no paper's numbers"
    return plan


def test_a_cell_of_each_kind_is_what_is_printed(
    tables: dict[str, tuple[Table, list[Job]]], compose: Callable[..., Any]
) -> None:
    seen: set[tuple[str, ...]] = set()
    for table, jobs in tables.values():
        first = {job.cell: job for job in reversed(jobs)}
        for cell in table.cells.values():
            if kind(table, cell) not in seen:
                seen.add(kind(table, cell))
                check_cell(table, cell, first[cell.name])
    assert len(seen) > 25


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_what_is_printed_and_instantiates(
    name: str, tables: dict[str, tuple[Table, list[Job]]], compose: Callable[..., Any]
) -> None:
    table, jobs = tables[name]
    first = {job.cell: job for job in reversed(jobs)}
    for cell in table.cells.values():
        config = dict(check_cell(table, cell, first[cell.name]).config)
        with torch.device("meta"):
            net = io.build_net(config["model"])
        defense = io.build("defense", config["defense"])
        added = {word: io.build(f"regularizer.{word}", node) for word, node in config["regularizer"].items()}
        defense.attach(net, optimisation=io.build("optim", config["optim"]), regularizers=added, config=config)
        io.build("attack", config["attack"])
        io.build_data(config["dataset"])
        for word, node in config["callback"].items():
            io.build(f"callback.{word}", node)


def test_numbers_that_a_cell_sets_are_the_printed_ones(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    """Of every cell, without composing it: a wrong weight among hundreds would be seen by nobody."""
    compared = 0
    for name, (table, _) in tables.items():
        for cell, columns in table.numbers(read_reported(table.paper)).items():
            own = {key_of(o): o.partition("=")[2] for o in table.cells[cell].overrides}
            number = next(iter(columns.values()))
            regularizer = own.get("regularizer", "none")
            for param, value in number.params.items():
                key = MEANS[table.paper].get(param, "").format(regularizer=regularizer)
                if key in own and not own[key].startswith("${") and number.defense not in WEIGHTS | {"ce": ""}:
                    given = {"true": "1", "false": "0"}.get(own[key], own[key])
                    assert given == value or float(given) == float(value), f"{name} {cell} {param}"
                    compared += 1
                elif table.paper == "ncmi" and key in own:
                    assert float(own[key]) == float(value), f"{name} {cell} {param}"
                    compared += 1
            for group in ("dataset", "model", "defense"):
                if group in own and number.regularizer != "vib":
                    assert own[group] == getattr(number, group), f"{name} {cell} {group}"
    assert compared > 200
