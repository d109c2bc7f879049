"""From what the user typed to a configuration of plain values, composed by a command or by code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from mi_at.data.folder import class_names
from mi_at.evaluation.outcomes import CLEAN
from mi_at.functional.geometry import parse_eps
from mi_at.io.conf import conf_dir, plain, register_resolvers
from mi_at.io.errors import explain, guess


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values, with the names of the groups that made it under "choices".

    Raises:
        ValueError: a recipe that does not exist.
        FileNotFoundError: a folder of images whose classes cannot be read.
    """
    fill_classes(cfg.dataset)
    runtime = HydraConfig.get()
    config = plain(cfg)
    config["evaluation"] = resolve_evaluation(config["evaluation"])
    # How jobs are chosen and launched is no part of a run.
    process = ("launcher", "sweep")
    choices = {
        group: name for group, name in runtime.runtime.choices.items() if "/" not in group and group not in process
    }
    recipes = sorted(path.stem for path in (Path(conf_dir()) / "recipe").glob("*.yaml"))
    if choices.get("recipe") not in recipes:  # Hydra passes over the optional recipe that is not there
        if choices.get("recipe") != f"{choices['defense']}_{choices['dataset']}_{choices['model']}":
            named = [name for name in recipes if not name.startswith("_")]
            near = guess(choices["recipe"], named)
            raise ValueError(f"recipe={choices['recipe']}: expected one of {', '.join(named)}{near}")
        choices["recipe"] = "none"
    for group in ("regularizer", "callback", "logger"):
        choices[group] = ",".join(config[group]) or "none"
    if config["group"] is None and runtime.mode == RunMode.MULTIRUN:
        config["group"] = Path(runtime.sweep.dir).name
    return {**config, "choices": choices}


def fill_classes(dataset: DictConfig) -> None:
    """Count the classes of a folder of images, where the configuration leaves their number to it.

    Raises:
        FileNotFoundError: a folder that cannot be read.
    """
    if "num_classes" in dataset and dataset.num_classes is None:
        dataset.num_classes = len(class_names(dataset.root))


def resolve_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved `evaluation` node with its curves written out as attacks, and without sample counts that are null.

    A curve is an attack and, beside it, lists of values of its options that run along together; its points are attacks
    called `<curve>_<value>`, after the first option.

    Args:
        evaluation: plain values.

    Raises:
        ValueError: numbers of images that are none, lists of different lengths, names that are taken, or what is
            wanted beside the attacks (audit, information, robust NCMI) cannot be.

    Example:
        >>> curve = {"attack": {"_target_": "mi_at.attacks.pgd.PGD", "eps": 0.1}, "steps": [1, 20]}
        >>> resolve_evaluation({"attacks": {}, "n_of": {}, "curves": {"pgd_steps": curve}})["attacks"]["pgd_steps_20"]
        {'_target_': 'mi_at.attacks.pgd.PGD', 'eps': 0.1, 'steps': 20}
    """
    found = dict(evaluation)
    counts = {"n": found.get("n"), **{f"n_of.{name}": count for name, count in (found.get("n_of") or {}).items()}}
    for where, count in counts.items():
        if count is not None and type(count) is not int:
            raise ValueError(f"evaluation.{where}={count}: expected a whole number of images, or null: all")
    attacks = dict(found["attacks"])
    for curve, node in (found.pop("curves", None) or {}).items():
        values = {option: value for option, value in node.items() if option != "attack"}
        lengths = {option: len(value) if isinstance(value, list) else 0 for option, value in values.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values(), default=0):
            raise ValueError(f"evaluation.curves.{curve}: expected lists of one length, got {lengths or 'none'}")
        for point in zip(*values.values(), strict=True):
            value = f"{point[0]:.4g}" if isinstance(point[0], float) else str(point[0]).replace("/", "_")
            name = f"{curve}_{value}"
            if name in attacks:
                raise ValueError(f"evaluation.curves.{curve} has {point[0]} twice, or {name} is an attack already")
            attacks[name] = {**node["attack"], **dict(zip(values, point, strict=True))}
    _check_extras(found, attacks)
    found["attacks"] = attacks
    found["n_of"] = {name: count for name, count in (found.get("n_of") or {}).items() if count is not None}
    return found


EXTRAS = {
    "audit": ("n", "steps", "step_size", "restarts", "queries", "batch_size"),
    "robust_ncmi": ("n", "rounds", "steps", "quantity"),
    "outputs": ("of", "n", "features", "images"),
}
"""Options of what an evaluation adds to its attacks."""


def _check_extras(evaluation: Mapping[str, Any], attacks: Mapping[str, Any]) -> None:
    for extra, options in EXTRAS.items():
        wanted, where = evaluation.get(extra), f"evaluation.{extra}"
        if not isinstance(wanted, bool | Mapping | None):
            raise ValueError(f"{where}={wanted!r}: expected true, false, or options: {', '.join(options)}")
        if unknown := [key for key in wanted or () if key not in options] if isinstance(wanted, Mapping) else []:
            near = guess(str(unknown[0]), list(options))
            raise ValueError(f"unknown key {where}.{unknown[0]}: expected one of {', '.join(options)}{near}")
        if extra == "outputs" and wanted and (wanted is True or not wanted.get("of")):
            raise ValueError(f"{where} has no of: expected names, such as {{of: [clean]}}")
        if wanted and extra != "outputs" and "eps" not in evaluation:
            raise ValueError(f"{where} needs a ball, and this protocol has no eps: take another, such as chosen")
        if wanted and extra == "audit" and not parse_eps(evaluation["eps"]):
            raise ValueError(f"evaluation.eps={evaluation['eps']}: at 0 there is nothing to audit; {where}=false")
    lists = {
        "information": ([CLEAN, *attacks], evaluation.get("information")),
        "mutual_information": (list(attacks), evaluation.get("mutual_information")),
        "outputs.of": ([CLEAN, *attacks], (evaluation.get("outputs") or {}).get("of")),
    }
    for option, (known, names) in lists.items():
        if unknown := [str(name) for name in names or () if name not in known]:
            near = guess(unknown[0], known)
            raise ValueError(f"evaluation.{option}={unknown[0]}: expected some of {', '.join(known)}{near}")


@contextlib.contextmanager
def composing() -> Iterator[None]:
    """Compose conf/ by code; what a Hydra application around it has set is there again afterwards.

    Raises:
        ValueError: an unknown name or key; the message names those there are.
    """
    register_resolvers()
    before, own = GlobalHydra.get_state(), HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    finally:
        GlobalHydra.set_state(before)
        HydraConfig.instance().cfg = own


def compose(evaluation: str, overrides: Sequence[str] = ()) -> DictConfig:
    """conf/evaluate.yaml with a protocol, for code that is no command.

    Args:
        evaluation: name of a protocol.
        overrides: as on the command line: "evaluation.n=100".

    Raises:
        ValueError: an unknown protocol or key; the message names those there are.
    """
    with composing():
        return hydra.compose("evaluate", overrides=[f"evaluation={evaluation}", *overrides])


def compose_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of `python -m mi_at.train <overrides>`; within `composing`.

    Hydra's own settings are those of this run until `composing` ends.

    Args:
        overrides: as on the command line.

    Raises:
        ValueError, HydraException, OmegaConfBaseException: a name or value that cannot be.
    """
    cfg = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return resolve(cfg)
