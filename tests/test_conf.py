"""conf/ as a whole: every file composes and instantiates, names agree, and precedence is what the README says."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from mi_at import io, stages
from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.checks import check
from mi_at.defenses.base import Defense
from mi_at.defenses.trades import Trades
from mi_at.regularizers.base import Regularizer
from mi_at.results import loggers
from mi_at.results.runs import Run
from mi_at.train import header

REPO = Path(__file__).resolve().parents[1]
CONF = REPO / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
COMPOSITIONS = {"defense": {"trades_awp"}}  # yaml files without a Python file of that name
PACKAGES = {"defense": "mi_at.defenses", "regularizer": "mi_at.regularizers"}
Compose = Callable[..., Any]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def public(group: str) -> list[str]:
    return [name for name in names(group) if not name.startswith("_")]


def fitting(dataset: str) -> str:
    """A model that takes the images of a data set."""
    size = yaml.safe_load((CONF / f"dataset/{dataset}.yaml").read_text())["image_size"]
    return "cnn_tiny" if size < 16 else "cnn4" if size < 32 else "resnet18"


def overrides_for(group: str, name: str) -> list[str]:
    """What must be said beside `<group>=<name>`."""
    if group == "dataset":
        return [f"model={fitting(name)}", *(["dataset.root=pictures"] if name == "folder" else [])]
    if group == "model":
        return ["dataset=digits" if name == "cnn_tiny" else "dataset=cifar10"]
    if group == "recipe" and name != "none":
        datasets, models = "|".join(public("dataset")), "|".join(public("model"))
        match = re.fullmatch(rf"(\w+?)_({datasets})_({models})(_paper|_short|_smoke|_l2|_1m)?", name)
        assert match is not None, f"{name}: expected <defense>_<dataset>_<model>"
        known = match[1] in names("defense")
        return [*([f"defense={match[1]}"] if known else []), f"dataset={match[2]}", f"model={match[3]}"]
    if group == "evaluation" and name.endswith("_information"):
        return ["defense=mi_estimators"]
    return []


def assemble(cfg: Any, tmp_path: Path) -> dict[str, Any]:
    """Check a composed configuration and build everything that it describes, weights and images apart."""
    if cfg.dataset.name == "folder":
        cfg.dataset.num_classes = 3
    config = io.resolve(cfg)
    check(config)
    with torch.device("meta"):
        net = io.build_net(config["model"])
    defense = io.build("defense", config["defense"])
    added = {name: io.build(f"regularizer.{name}", node) for name, node in config["regularizer"].items()}
    defense.attach(net, optimisation=io.build("optim", config["optim"]), regularizers=added, config=config)
    recorders = {name: instantiate(node, _partial_=True) for name, node in config["logger"].items()}
    return {
        "config": config,
        "defense": defense,
        "attack": io.build("attack", config["attack"]),
        "attacks": io.build_attacks(config["evaluation"]),
        "data": io.build_data(config["dataset"]),
        "callbacks": {name: io.build(f"callback.{name}", node) for name, node in config["callback"].items()},
        "loggers": loggers.build(recorders, folder=tmp_path, key="key", config_hash="0", config=config),
    }


# ---------------------------------------------------------------- every file
def test_every_group_is_known() -> None:
    named = set(re.findall(r"^ +- (?:optional )?(\w+):", (CONF / "train.yaml").read_text(), re.M))
    assert set(GROUPS) == named - {"override"}


@pytest.mark.parametrize(
    ("group", "name"),
    # a table is many runs (tests/test_tables.py), as what sweeps are made of (tests/hydra_plugins)
    [(group, name) for group in GROUPS if group not in ("table", "launcher", "sweep") for name in public(group)],
    ids=lambda value: str(value),
)
def test_composes_and_instantiates(group: str, name: str, compose: Compose, tmp_path: Path) -> None:
    cfg = compose([f"{group}={name}", *overrides_for(group, name)])
    built = assemble(cfg, tmp_path)
    chosen = built["config"]["choices"][group]
    assert name in chosen.split(",") or group in ("logger", "trainer"), (
        "the file's name is the name on the command line"
    )


@pytest.mark.parametrize("group", ["regularizer", "callback"])
def test_several_of_a_group(group: str, compose: Compose, tmp_path: Path) -> None:
    # Of two averages of the weights one is served; of two algorithms of ncmi each would make the same second attack.
    several = [name for name in public(group) if name not in ("none", "swa", "ncmi_relaxed")]
    built = assemble(compose([f"{group}=[{','.join(several)}]"]), tmp_path)
    assert list(built["config"][group]) == several
    assert built["config"]["choices"][group] == ",".join(several)


@pytest.mark.parametrize("name", names("evaluation"))
def test_every_evaluation_on_a_checkpoint_of_another_data_set(name: str, compose: Compose) -> None:
    cfg = compose([f"evaluation={name}", "checkpoint=best.ckpt"], "evaluate")
    dataset = {"norm": "linf", "eps": "8/255", "step_size": "2/255"}
    whole = OmegaConf.create({"dataset": dataset, "evaluation": None})
    whole.evaluation = cfg.evaluation
    io.build_attacks(io.plain(whole)["evaluation"])


# ---------------------------------------------------------------- names
@pytest.mark.parametrize("group", PACKAGES)
def test_a_method_is_one_py_and_one_yaml_of_the_same_name(group: str) -> None:
    """A new method is found here by its files; nothing is listed."""
    folder = REPO / PACKAGES[group].replace(".", "/")
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert set(names(group)) - {"none"} == files | COMPOSITIONS.get(group, set())
    kind: type = {"defense": Defense, "regularizer": Regularizer}[group]
    for name in files:
        made = get_class(yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["_target_"])
        assert made.__module__ == f"{PACKAGES[group]}.{name}"
        assert issubclass(made, kind)
        if group == "defense":
            assert made.__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("group", ["defense", "regularizer", "callback", "optim", "attack"])
def test_a_file_lists_every_option(group: str, compose: Compose) -> None:
    """So that each can be set without a plus sign, and none is hidden."""
    for name in set(public(group)) - {"none"} - COMPOSITIONS.get(group, set()):
        config = io.plain(compose([f"{group}={name}"]))[group]
        node = config[name] if group in ("regularizer", "callback") else config
        options = inspect.signature(get_class(node["_target_"])).parameters
        assert set(node) - {"_target_"} == set(options), name
        assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options.values()), name


def test_trades_awp_is_trades_with_the_callback(compose: Compose, tmp_path: Path) -> None:
    built = assemble(compose(["defense=trades_awp"]), tmp_path)
    assert type(built["defense"]) is Trades
    perturbation = built["callbacks"]["awp"]
    assert isinstance(perturbation, AdversarialWeightPerturbation)
    assert perturbation.gamma == 0.005
    assert built["config"]["choices"]["defense"] == "trades_awp"
    own = assemble(compose(["defense=trades_awp", "callback.awp.gamma=0.02", "defense.beta=3"]), tmp_path)
    assert (own["callbacks"]["awp"].gamma, own["defense"].beta) == (0.02, 3)


# ---------------------------------------------------------------- recipes and precedence
def test_a_recipe_sets_what_its_paper_says(compose: Compose, tmp_path: Path) -> None:
    built = assemble(compose(["defense=mimae", "dataset=cifar100", "model=wrn34_10"]), tmp_path)
    config = built["config"]
    assert config["choices"]["recipe"] == "mimae_cifar100_wrn34_10"
    attack, optim = built["attack"], built["defense"].optimisation
    assert (attack.norm, attack.eps, attack.step_size, attack.steps) == ("linf", 0.031, 0.007, 10)
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.1, 0.9, 5e-4)
    assert (optim.epochs, optim.schedule, optim.milestones, optim.gamma) == (100, "multistep", [75, 90], 0.1)
    assert (built["defense"].lambda_mi, built["defense"].beta) == (0.6, 1.0)
    assert built["data"].batch_size == 128
    assert config["trainer"]["max_epochs"] == 100
    assert config["select"] == "last"


@pytest.mark.parametrize("name", [name for name in public("recipe") if name != "none"])
def test_every_value_of_a_recipe_arrives(name: str, compose: Compose) -> None:
    config = io.resolve(compose([f"recipe={name}", *overrides_for("recipe", name)]))
    assert config["choices"]["recipe"] == name
    assert io.recipe_keys(name)

    def values(recipe: str) -> dict[str, Any]:
        node = yaml.safe_load((CONF / f"recipe/{recipe}.yaml").read_text())
        included = [other for other in node.pop("defaults", []) if other != "_self_" and not other.startswith("/")]
        own = {f"{group}.{key}": v for group, part in node.items() if isinstance(part, dict) for key, v in part.items()}
        return {key: value for other in included for key, value in values(other).items()} | own

    expected = values(name)
    assert set(expected) == set(io.recipe_keys(name))
    for key, value in expected.items():
        group, option = key.split(".")
        found = config[group][option]
        assert (found | value if isinstance(value, dict) else value) == found, key


def test_smoke_narrows_what_would_take_minutes_unless_a_width_is_typed(compose: Compose) -> None:
    base = ["dataset=cifar10", "model=wrn34_10", "evaluation=namid_black_box"]

    def width(*overrides: str) -> float:
        return float(io.resolve(compose([*base, *overrides]))["model"]["width"])

    assert (width(), width("budget=short"), width("budget=smoke")) == (1, 1, 0.03125)
    assert width("budget=smoke", "model=resnet18") == 0.125
    assert width("budget=smoke", "model.width=0.5") == 0.5
    surrogate = stages.surrogate_run(io.resolve(compose([*base, "budget=smoke"])))
    assert (surrogate["choices"]["model"], surrogate["model"]["width"]) == ("vgg19", 0.125)


@pytest.mark.parametrize(("budget", "queries", "targets"), [("paper", 5000, 9), ("short", 5000, 9), ("smoke", 100, 2)])
def test_autoattack_is_the_authors_but_at_smoke(budget: str, queries: int, targets: int, compose: Compose) -> None:
    chosen = "evaluation/attacks=[autoattack,autoattack_plus,autoattack_rand,square]"
    asked = compose(["evaluation=chosen", chosen, f"budget={budget}"])
    attacks = io.build_attacks(io.resolve(asked)["evaluation"])
    assert len(attacks) == 4
    assert {attack.describe()["queries"] for attack in attacks.values()} == {queries}
    assert {attack.describe()["targets"] for name, attack in attacks.items() if name != "square"} == {targets}


def test_the_command_line_wins_over_budget_over_recipe_over_data_set(compose: Compose) -> None:
    base = ["defense=mimae", "dataset=cifar10", "model=resnet18"]
    assert io.resolve(compose([*base, "recipe=none"]))["attack"]["eps"] == "8/255"
    assert io.resolve(compose(base))["attack"]["eps"] == 0.031
    assert io.resolve(compose([*base, "attack.eps=4/255"]))["attack"]["eps"] == "4/255"
    short = io.resolve(compose([*base, "budget=short"]))
    assert (short["optim"]["epochs"], short["optim"]["paper_epochs"]) == (12, 100)
    assert short["trainer"]["max_epochs"] == 12
    assert short["dataset"]["train_size"] == 10_000
    assert io.resolve(compose([*base, "budget=short", "optim.epochs=3"]))["trainer"]["max_epochs"] == 3


def test_a_recipe_can_be_switched_off_and_forced(compose: Compose) -> None:
    base = ["defense=trades", "dataset=cifar10", "model=resnet18"]
    off, forced = (io.resolve(compose([*base, f"recipe={name}"])) for name in ("none", "head_to_head_cifar10_resnet18"))
    assert off["choices"]["recipe"] == "none"
    assert (off["defense"]["beta"], off["attack"]["step_size"], off["optim"]["epochs"]) == (6.0, "2/255", 120)
    assert forced["choices"]["recipe"] == "head_to_head_cifar10_resnet18"
    assert (forced["attack"]["init"], forced["optim"]["milestones"]) == ("uniform", [100, 110])


def test_without_a_recipe_the_data_set_speaks_and_the_header_says_so(compose: Compose) -> None:
    config = io.resolve(compose(["defense=mart", "dataset=cifar10", "model=vgg16"]))
    assert config["choices"]["recipe"] == "none"
    dataset = yaml.safe_load((CONF / "dataset/cifar10.yaml").read_text())
    assert {key: config["attack"][key] for key in ("norm", "eps", "step_size", "steps")} == {
        key: dataset[key] for key in ("norm", "eps", "step_size", "steps")
    }
    assert (config["optim"]["lr"], config["optim"]["epochs"]) == (dataset["lr"], dataset["epochs"])
    run = Run(Path("run"), "key", "0", "new", Path("run/record.json"))
    says = header(config, run, torch.nn.Linear(1, 1))["recipe"]
    assert says == "none for mart_cifar10_vgg16: customary threat model of the data and default schedule"
    with_recipe = io.resolve(compose(["defense=mart", "dataset=cifar10", "model=resnet18"]))
    assert header(with_recipe, run, torch.nn.Linear(1, 1))["recipe"] == "mart_cifar10_resnet18"


def test_a_group_chosen_against_a_recipe_is_an_error_that_names_the_values(compose: Compose) -> None:
    base = ["defense=mimae", "dataset=cifar10", "model=resnet18"]
    with pytest.raises(ValueError, match=r"optim=adam would keep .* mimae_cifar10_resnet18: optim.lr, .*recipe=none"):
        check(io.resolve(compose([*base, "optim=adam"])))
    with pytest.raises(ValueError, match=r"attack=fgsm would keep .* attack.step_size, attack.steps"):
        check(io.resolve(compose([*base, "attack=fgsm"])))
    with pytest.raises(ValueError, match=r"; adam has no optim.momentum: use recipe=none, and give .* what you want"):
        check(io.resolve(compose([*base, "optim=adam"])))
    with pytest.raises(
        ValueError, match=r"; give them .* \(attack.norm=\.\.\. .*attack.init=\.\.\.\), or use recipe=none"
    ):
        check(io.resolve(compose([*base, "attack=fgsm"])))
    check(io.resolve(compose([*base, "optim=adam", "recipe=none"])))
    every = [f"{key}={key.replace('.', '_')}" for key in io.recipe_keys("mimae_cifar10_resnet18") if "attack" in key]
    check(io.resolve(compose([*base, "attack=fgsm", *every])))
    check(io.resolve(compose(["optim=adam"])))  # no recipe there


def test_a_misspelt_key_is_an_error(compose: Compose) -> None:
    with pytest.raises(HydraException, match="lamda_mi"):
        compose(["defense.lamda_mi=1"])


# ---------------------------------------------------------------- the README
def _commands() -> list[str]:
    text = (REPO / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m mi_at.")]


def test_the_readme_shows_both_commands() -> None:
    assert {line.split()[2] for line in _commands()} >= {"mi_at.train", "mi_at.evaluate"}


@pytest.mark.parametrize("line", _commands())
def test_every_command_of_the_readme_composes(line: str, compose: Compose, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(line, comments=True)
    assert hasattr(importlib.import_module(module), "main")
    sweep = "-m" in arguments
    overrides = [argument for argument in arguments if argument != "-m"]
    if module == "mi_at.report" or any(override.startswith("table=") for override in overrides):  # see test_tables.py
        own = ("format=", "device=", "calibrate=", "out=")  # of report and plan themselves
        cfg = compose([o for o in overrides if not o.startswith(own)], "train")
        assert cfg.table.get("cells") or module == "mi_at.report"  # without table= it shows all of them
        return
    jobs = [overrides]
    if sweep:
        ends = [re.sub(r"interval\((.*?),(.*?)\)", r"\1,\2", override) for override in overrides]
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(ends), None)[0]
        assert len(jobs) > 1
        jobs = [[*job, "hydra.mode=MULTIRUN"] for job in jobs]
    for job in jobs:
        cfg = compose(job, module.rpartition(".")[2])
        if module == "mi_at.train":
            assemble(cfg, tmp_path)
