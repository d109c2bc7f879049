"""conf/table: every printed number has one place, every cell is what the print says it is, and composes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from mi_at import io, report, stages
from mi_at.results.measured import Planned
from mi_at.results.reported import NO_PAPER, PAPERS, Reported, read_reported
from mi_at.results.tables import Cell, Job, Table, key_of, read_table

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
NAMES = [name for name in io.names_in("table") if name != "none"]

BUDGETS = ("paper", "short", "smoke")

NO_TABLE = {
    ("mimae", "sec5.4"): "the text's other reading of a number of Table 9",
    ("shared_info", "8"): "costs on named hardware",
    ("ib_rar", "5"): "counts of misclassifications, of a network that is not named",
    ("ib_rar", "secA.3"): "one training that did not converge, read off Figure 4",
}
"""Printed numbers that no cell can have, and why."""


@functools.cache
def written(group: str, name: str) -> dict[str, Any]:
    """A file of conf/ over those of its own group that it includes. Hydra does the same, fifty times slower."""
    node: dict[str, Any] = yaml.load((CONF / group / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
    included = [word.partition("@")[0] for word in node.pop("defaults", []) if isinstance(word, str)]
    for other in (word for word in included if word != "_self_" and "/" not in word):
        node = merged(written(group, other), node)
    return node


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**under, **over}
    return both | {
        key: merged(under[key], over[key])
        for key in under.keys() & over.keys()
        if isinstance(under[key], dict) and isinstance(over[key], dict)
    }


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[Table, list[Job]]]:
    """Every table with the jobs of its sweep."""
    read = {name: read_table(written("table", name)["table"]) for name in NAMES}
    return {name: (table, table.jobs([[]], GROUPS)) for name, table in read.items()}


@pytest.mark.slow
def test_tables_are_read_as_hydra_reads_them() -> None:
    with io.composing():
        for name in NAMES:
            node: Any = OmegaConf.to_container(hydra.compose(f"table/{name}").table)
            assert read_table(node) == read_table(written("table", name)["table"]), name


# ---------------------------------------------------------------- the print
def test_every_printed_number_has_exactly_one_place(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    places: dict[int, list[str]] = {}
    numbers = {paper: read_reported(paper) for paper in (*PAPERS, NO_PAPER)}
    for name, (table, _) in tables.items():
        for cell, columns in table.numbers(numbers[table.paper]).items():
            for column, number in columns.items():
                places.setdefault(id(number), []).append(f"{name} {cell} {column}")
    without, twice, unexpected = [], [], []
    for number in (number for paper in PAPERS for number in numbers[paper]):
        found = places.get(id(number), [])
        key = (number.paper, number.table)
        if key in NO_TABLE:
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
        if table.number is None:  # a figure, or a table of our own
            assert table.more, name
            continue
        found = table.numbers(read_reported(table.paper))
        assert all(found.values()), name
        known = {number.table for number in read_reported(table.paper)}
        assert table.number in known, name


def test_a_table_is_named_as_its_file(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    for name, (table, jobs) in tables.items():
        assert table.name == name
        assert table.paper == NO_PAPER or name.startswith(f"{table.paper}_")
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
        "train_fraction": "dataset.fraction",
        "train_steps": "attack.steps",
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


def check_cell(table: Table, cell: Cell, job: Job) -> Planned:
    """Compose it, hold it against the print, and see that its evaluation has every column."""
    plan = report.plan_of(job)
    numbers = table.numbers(read_reported(table.paper))[cell.name]
    for column, number in numbers.items():
        assert agrees(dict(plan.config), number) == [], f"{table.name} {cell.name}"
        assert table.columns[column] in plan.attacks, f"{table.name} {cell.name} {column}"
    assert numbers or set(table.more) & plan.attacks.keys(), f"{table.name} {cell.name} shows nothing"
    assert plan.config["dataset"]["val_size"] if plan.config["select"] == "best" else True
    assert plan.config["choices"]["recipe"] != "none", f"{table.name} {cell.name}: no paper's numbers"
    return plan


def first_jobs(jobs: list[Job]) -> dict[str, Job]:
    """By cell, with the first seed."""
    return {job.cell: job for job in reversed(jobs)}


def problems(cell: Cell) -> list[str]:
    """Choices and keys of a cell that conf/ has not; what its values are is seen where it is composed."""
    chosen = {**DEFAULT, **{key_of(o): o.partition("=")[2] for o in cell.overrides}}
    found = []
    for key, value in ((key_of(o), o.partition("=")[2]) for o in cell.overrides):
        group, _, option = key.partition(".")
        if key in GROUPS:
            names = {name.replace("${budget}", b) for name in value.strip("[]").split(",") for b in BUDGETS}
            found += [f"{key}={name}" for name in names if not (CONF / key / f"{name}.yaml").is_file()]
        elif not option:
            found += [key] if key not in TRAIN else []
        else:
            several = group in ("regularizer", "callback")
            name, option = option.split(".", 1) if several else (chosen[group], option)
            first = option.partition(".")[0]
            known = written(group, name.replace("${budget}", "paper"))
            there = [*chosen[group].strip("[]").split(","), *brought_along(chosen["defense"])]
            found += [key] if first not in known or (several and name not in there) else []
    return found


def brought_along(defense: str) -> list[str]:
    """Callbacks that a defense includes."""
    return re.findall(r"@callback\.(\w+)", (CONF / "defense" / f"{defense}.yaml").read_text())


TRAIN = yaml.load((CONF / "train.yaml").read_text(), Loader=yaml.CSafeLoader)
DEFAULT = {key: str(value) for each in TRAIN["defaults"] if isinstance(each, dict) for key, value in each.items()}


def test_every_choice_and_key_of_every_cell_exists(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    wrong = {
        f"{name} {cell.name}": problems(cell) for name, (table, _) in tables.items() for cell in table.cells.values()
    }
    assert {where: what for where, what in wrong.items() if what} == {}
    others = ("defense=trades", "regularizer=[ncmi]", "regularizer.ncmi.alfa=1", "regularizer.mi.lambda_mi=1", "sed=0")
    assert problems(Cell("x", {}, others)) == ["regularizer.ncmi.alfa", "regularizer.mi.lambda_mi", "sed"]


SAMPLE = {
    "mimae_t9": "mimae",
    "shared_info_t7": "shared_info",
    "shared_info_t11": "mma",
    "namid_t6": "namid_tiny_imagenet",
    "ib_rar_s321": "resnet18_last",
    "ncmi_t7": "cifar10_wrn34_trades_awp_ncmi_last",
    "head_to_head_mnist": "ib_rar_without",
}
"""A cell of every paper, and of what is composed in its own way; composing one takes most of a second."""


def test_a_sample_of_cells_composes_and_is_what_is_printed(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    """Every cell: the slow test below."""
    with io.composing():
        for name, cell in SAMPLE.items():
            table, jobs = tables[name]
            check_cell(table, table.cells[cell], first_jobs(jobs)[cell])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_what_is_printed_and_instantiates(name: str, tables: dict[str, tuple[Table, list[Job]]]) -> None:
    table, jobs = tables[name]
    with io.composing():
        for cell in table.cells.values():
            config = dict(check_cell(table, cell, first_jobs(jobs)[cell.name]).config)
            instantiate(config)
            if config["evaluation"].get("surrogate"):
                instantiate(stages.surrogate_run(config))


def instantiate(config: dict[str, Any]) -> None:
    """All that a run builds before it reads data; the network without memory for its weights."""
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
            if not columns:  # of a figure, or a table of our own
                continue
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


# ---------------------------------------------------------------- our own tables
OFF = {"alpha", "beta", "lambda_mi", "lambda_x", "lambda_y", "use_mi"}
"""Options that switch an information term off."""


BOUND = {
    ("mimae_t5", "standard_at"): {"attack.init": "gaussian"},
    ("ncmi_t2", "cifar10_pr18_trades"): {"attack.init": "uniform"},
    ("ncmi_t9", "trades_hbar"): {"attack.init": "uniform"},
    ("shared_info_t6", "mma"): {"optim.gamma": [0.3, 0.03333333333333333], "optim.milestones": [75, 90]},
    ("ib_rar_s321", "vgg16_fc1"): {"regularizer.ib_rar.mask.fraction": 0},
    ("namid_f4", "mim"): {"defense.objective": "eq4_selected"},
    ("head_to_head_mnist_last", "mimae"): {"select": "last"},
}
"""Settings of METHODS.md A9 or of the print that a cell would not have by its method's defaults."""


@pytest.mark.parametrize("cell", BOUND, ids="-".join)
def test_a_cell_has_what_its_paper_or_our_reading_binds(cell: tuple[str, str], tables: Any) -> None:
    table, name = cell
    jobs = {job.cell: job for job in tables[table][1]}
    with io.composing():
        config = OmegaConf.create(io.compose_run(jobs[name].overrides))
    assert {key: OmegaConf.select(config, key) for key in BOUND[cell]} == BOUND[cell]


@pytest.mark.parametrize(("budget", "scaled"), [("paper", 10), ("short", 2), ("smoke", 1)])
def test_weights_are_perturbed_after_a_fifth_of_head_to_head(budget: str, scaled: int, tables: Any) -> None:
    """A8: 10 of 50 epochs, 2 of 12."""
    jobs = {job.cell: job for job in tables["head_to_head_mnist"][1]}
    with io.composing():
        config = io.compose_run([*jobs["trades_awp"].overrides, f"budget={budget}"])
    assert io.build("optim", config["optim"]).scaled(config["callback"]["awp"]["warmup_epochs"]) == scaled


@pytest.mark.parametrize("name", ["head_to_head_mnist", "head_to_head_cifar10"])
def test_every_method_stands_beside_its_control(name: str, tables: dict[str, tuple[Table, list[Job]]]) -> None:
    """The same code path: the control differs from its method in weights alone, and all of those are off."""
    cells = tables[name][0].cells
    controls = [word for word in cells if "_without" in word]
    for word in controls:
        method, control = (
            dict(o.split("=", 1) for o in cells[c].overrides) for c in (word.replace("_without", ""), word)
        )
        off = {key: value for key, value in control.items() if method.get(key) != value}
        assert off, word
        assert {key.rpartition(".")[2] for key in off} <= OFF, word
        assert set(off.values()) <= {"0", "false"}, word
        assert {key for key in method if key not in off} == {key for key in control if key not in off}, word
    method_names = {word.removesuffix("_without") for word in (c.partition("_without")[0] for c in controls)}
    plugged = {"namid", "ib_rar", "hbar", "ncmi"}
    assert method_names == {"mimae", "shared_info", *plugged, *(f"trades_{term}" for term in plugged)}


def test_one_protocol_for_all_of_a_head_to_head(tables: dict[str, tuple[Table, list[Job]]]) -> None:
    for name in ("head_to_head_mnist", "head_to_head_cifar10"):
        table = tables[name][0]
        for group in ("dataset", "model", "recipe", "evaluation"):
            chosen = {o for cell in table.cells.values() for o in cell.overrides if key_of(o) == group}
            assert len(chosen) == 1, f"{name} {group}"
        assert len(table.seeds) >= 3
