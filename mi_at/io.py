"""Between the command line, the disk and the rest: configurations, what they build, checkpoints that carry theirs."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
import inspect
import itertools
import logging
import os
import pickle
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from mi_at.attacks.adaptive import Adaptive, FeatureShift
from mi_at.data import CUSTOMARY_KEYS
from mi_at.data.base import ImageDataModule
from mi_at.data.batch import Batch
from mi_at.data.folder import class_names
from mi_at.defenses.base import Defense, NonFiniteLossError
from mi_at.defenses.mi_estimators import MIEstimators
from mi_at.evaluation.mutual_information import CRITICS
from mi_at.evaluation.outcomes import CLEAN, EvalAttack
from mi_at.functional.geometry import parse_eps
from mi_at.regularizers.base import Regularizer

USER_ERRORS = (
    ValueError,
    OSError,
    NonFiniteLossError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of mi_at, read from disk.

    Attributes:
        path: the file.
        config: the resolved configuration of its run, plain values.
        net_state: the weights that are served (averaged, where averaging was on), names without prefix.
        epoch: finished epochs.
        step: finished steps.
        state: all that the defense keeps: the weights as "net.<name>", and the states of its own and its regularizers'.
    """

    path: Path
    config: dict[str, Any]
    net_state: dict[str, torch.Tensor]
    epoch: int
    step: int
    state: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """The weights of a network trained elsewhere, read from disk.

    Attributes:
        path: the file.
        tensors: by the names they have in it.
        nest: where in the file they lay, such as "state_dict"; empty at its top.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    nest: str = ""


def conf_dir() -> str:
    """The configuration folder: inside an installed package, or beside it in a checkout; absolute.

    Raises:
        FileNotFoundError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/train.yaml inside or beside {package}: reinstall mi_at")


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
            guess = _guess(choices["recipe"], named)
            raise ValueError(f"recipe={choices['recipe']}: expected one of {', '.join(named)}{guess}")
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
        ValueError: lists of different lengths, names that are taken, or what is wanted beside the attacks (audit,
            information, robust NCMI) cannot be.

    Example:
        >>> curve = {"attack": {"_target_": "mi_at.attacks.pgd.PGD", "eps": 0.1}, "steps": [1, 20]}
        >>> resolve_evaluation({"attacks": {}, "n_of": {}, "curves": {"pgd_steps": curve}})["attacks"]["pgd_steps_20"]
        {'_target_': 'mi_at.attacks.pgd.PGD', 'eps': 0.1, 'steps': 20}
    """
    found = dict(evaluation)
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
            near = _guess(str(unknown[0]), list(options))
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
            near = _guess(unknown[0], known)
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


def names_in(group: str) -> list[str]:
    """The names that a group of conf/ can be chosen by."""
    return sorted(path.stem for path in (Path(conf_dir()) / group).glob("[!_]*.yaml"))


def plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """A configuration as dictionaries, lists, numbers and text, interpolations resolved."""
    values = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(values, dict):
        raise ValueError(f"expected a configuration with keys, got a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def recipe_keys(recipe: str) -> list[str]:
    """Dotted keys that a recipe sets, those of the recipes it includes among them."""
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "recipe" / f"{recipe}.yaml"))
    # An included group (/callback/ema) is no recipe.
    included = [name for name in node.pop("defaults", []) if name != "_self_" and not name.startswith("/")]
    keys = [f"{group}.{key}" for group, values in node.items() if isinstance(values, dict) for key in values]
    return [*(key for name in included for key in recipe_keys(name)), *keys]


def options_of(group: str, name: str) -> list[str]:
    """Keys of a group's file, such as conf/optim/adam.yaml, those of the files it includes among them."""
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / group / f"{name}.yaml"))
    included = [other for other in node.pop("defaults", []) if other != "_self_"]
    return [*(key for other in included for key in options_of(group, other)), *node]


def register_resolvers() -> None:
    """Resolvers that conf/ uses.

    `${mul:a,b}` multiplies numbers or fractions; `${multiples:a,[b,c]}` is the list of a b and a c; `${larger:a,b}` is
    the larger of two numbers;
    `${by_budget:p,s,t}` is s at budget short, t at smoke, p at others.
    """
    OmegaConf.register_new_resolver("multiples", lambda a, b: [parse_eps(a) * parse_eps(v) for v in b], replace=True)
    OmegaConf.register_new_resolver("larger", max, replace=True)
    OmegaConf.register_new_resolver("mul", lambda a, b: parse_eps(a) * parse_eps(b), replace=True)
    OmegaConf.register_new_resolver(
        "by_budget",
        lambda paper, short, smoke, *, _root_: {"short": short, "smoke": smoke}.get(str(_root_.budget), paper),
        replace=True,
    )


def build(where: str, node: Mapping[str, Any]) -> Any:
    """Make what a node of the configuration describes.

    Args:
        where: the node's key, for messages.
        node: `_target_` and options, plain values.

    Returns:
        What the target makes of the options.

    Raises:
        ValueError: an option that is unknown or of the wrong kind; the message names its key.
    """
    target: Any = get_object(str(node["_target_"]))
    if hidden := [key for key, value in node.items() if _has_target(value)]:
        raise ValueError(f"{where}.{hidden[0]} has a _target_ of its own: expected plain values")
    given = {key: value for key, value in node.items() if key != "_target_"}
    try:
        accepted = dict(inspect.signature(target).parameters)
    except ValueError:  # some of Python's own have none
        accepted = {}
    takes_any = not accepted or any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if unknown := [key for key in given if key not in accepted and not takes_any]:
        raise ValueError(
            f"{where}.{unknown[0]}: expected one of {', '.join(accepted)}{_guess(unknown[0], list(accepted))}"
        )
    try:
        hints = typing.get_type_hints(target if inspect.isroutine(target) else target.__init__)
    except NameError:  # names that only a type checker sees
        hints = {}
    options = {key: _of_kind(f"{where}.{key}", value, _kinds(hints.get(key))) for key, value in given.items()}
    try:
        return target(**options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _has_target(value: Any) -> bool:
    """Whether Hydra would make something of a value: a checkpoint's configuration may come from anywhere."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(_has_target(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(_has_target(inner) for inner in value)


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    types.NoneType: "null",
}


def _kinds(hint: Any) -> tuple[type, ...]:
    """The plain types an annotation allows; empty where there is none, or it allows others too."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return kinds if all(kind in _KINDS for kind in kinds) else ()


def _of_kind(key: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """The value, checked; a fraction such as 8/255 becomes the number that is asked for."""
    if not kinds or type(value) in kinds or (type(value) is int and float in kinds):
        return value
    if isinstance(value, str) and float in kinds:
        with contextlib.suppress(ValueError):
            return parse_eps(value)
    expected = " or ".join(dict.fromkeys(_KINDS[kind] for kind in kinds))
    raise ValueError(f"{key}={value!r}: expected {expected}")


def build_net(model: Mapping[str, Any]) -> nn.Module:
    """The network of a resolved `model` node.

    A network of mi_at takes exactly the node's options. One's own (`model._target_=my_package.Net`) is offered them:
    those its constructor names are passed, the others, which belong to the yaml it replaced, are left out.

    Args:
        model: `_target_` and options, plain values.

    Returns:
        The network, on the CPU, freshly initialised from torch's global random state; lazy layers have their sizes.

    Raises:
        ValueError: the target does not exist or does not take what it was given, or a lazy layer keeps no size.
    """
    target = _class("model", model, nn.Module)
    options = {key: value for key, value in model.items() if key != "_target_"}
    if not target.__module__.startswith("mi_at."):
        accepted = inspect.signature(target).parameters
        options = {key: value for key, value in options.items() if key in accepted}
    try:
        net: nn.Module = target(**options)
    except TypeError as error:
        raise ValueError(f"model: {error}") from error
    if _lazy_layers(net):
        _initialise(net, model)
    return net


def _lazy_layers(net: nn.Module) -> list[str]:
    """Layers that do not know their size before a forward, such as nn.LazyLinear."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in net.named_modules()
        if any(is_lazy(value) for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]


def _initialise(net: nn.Module, model: Mapping[str, Any]) -> None:
    """Give lazy layers their sizes, by a forward of two images of the configured size in eval mode.

    Raises:
        ValueError: naming a layer that keeps none, and the way out.
    """
    lazy, way = _lazy_layers(net)[0], "set model.in_channels and model.image_size, or give the layer its size"
    if not {"in_channels", "image_size"} <= model.keys():
        raise ValueError(f"model: the size of layer {lazy} depends on the images: {way}")
    shape = (2, model["in_channels"], model["image_size"], model["image_size"])
    training = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"model: the size of layer {lazy} depends on the images, and {type(net).__name__} does not take those "
            f"of {shape}: {error}; {way}"
        ) from error
    for module, mode in training:
        module.training = mode
    if left := _lazy_layers(net):
        raise ValueError(f"model: a forward does not reach layer {left[0]}, so it has no size: {way}")


def build_defense(config: Mapping[str, Any], net: nn.Module) -> Defense:
    """The defense of a resolved configuration, its regularizers added, attached to a network.

    Both may give the network layers of their own (a stochastic latent, a mask), so a checkpoint's weights fit the
    network only afterwards.

    Raises:
        ValueError: an option of the wrong kind or out of range, or a network that a term cannot work with.
    """
    _class("defense", config["defense"], Defense)
    terms = {}
    for name, node in config["regularizer"].items():
        _class(f"regularizer.{name}", node, Regularizer)
        terms[name] = build(f"regularizer.{name}", node)
    defense: Defense = build("defense", config["defense"])
    return defense.attach(net, regularizers=terms, config=config)


def build_data(dataset: Mapping[str, Any]) -> ImageDataModule:
    """The data module of a resolved `dataset` node, without its customary threat model and schedule.

    Raises:
        ValueError: an option of the wrong kind or out of range, or another target than a data module.
    """
    _class("dataset", dataset, ImageDataModule)
    module: ImageDataModule = build("dataset", {k: v for k, v in dataset.items() if k not in CUSTOMARY_KEYS})
    return module


def _class(where: str, node: Mapping[str, Any], kind: type) -> type[Any]:
    """The class a node names. A checkpoint's configuration may come from anywhere: nothing else is ever called."""
    target = str(node["_target_"])
    try:
        found = get_class(target)
    except Exception as error:
        raise ValueError(f"{where}._target_={target}: {error}; expected the path of an importable class") from error
    if not issubclass(found, kind):
        raise ValueError(f"{where}._target_={target}: expected a {kind.__module__}.{kind.__qualname__}")
    if nested := [key for key, value in node.items() if _has_target(value)]:
        raise ValueError(f"{where}.{nested[0]} has a _target_ of its own: expected plain values")
    return found


def build_attacks(evaluation: Mapping[str, Any]) -> dict[str, EvalAttack]:
    """The attacks of a resolved `evaluation` node by name.

    Raises:
        ValueError: an option of the wrong kind or out of range; the message names its key.
    """
    attacks = {}
    for name, node in evaluation["attacks"].items():
        where = f"evaluation.attacks.{name}"
        if "_target_" not in node:
            known = ", ".join(names_in("evaluation/attacks"))
            raise ValueError(
                f"{where} has values, but is no attack of this evaluation; evaluation/attacks= has {known}"
            )
        try:
            attacks[name] = build(where, {**node, "name": name})
        except ValueError as error:
            raise ValueError(str(error).replace("attack.", f"{where}.")) from error
    return attacks


AUTO_TAP, FEATURES = "auto", "features"
GUIDES = 1000
"""Images that guides are drawn from."""

NESTS = ("state_dict", "model_state_dict", "net", "model")
"""Keys under which training scripts keep a state dict."""

PREFIXES = ("module.", "_orig_mod.", "net.", "model.")
"""What wrappers put before the names of weights: DataParallel, torch.compile, and modules that hold the network."""

_SAVE_WEIGHTS = "save the weights alone, torch.save(net.state_dict(), 'weights.pt')"


@dataclass(frozen=True)
class Surrogate:
    """The network that transfer attacks are made on.

    Attributes:
        net: in eval mode.
        name: of its run, for the record.
        accuracy: its own clean accuracy in [0, 1], where known.
    """

    net: nn.Module
    name: str
    accuracy: float | None = None


def bind(
    attacks: Mapping[str, EvalAttack],
    *,
    surrogate: Surrogate | None = None,
    defense: Defense | None = None,
    guides: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, EvalAttack]:
    """The attacks with what they need beside the network they attack.

    Args:
        attacks: by name.
        surrogate: that transfer attacks are made on.
        defense: whose training loss adaptive attacks maximise, and whose regularised layer they look at.
        guides: gives images and labels that the representation attack draws its guides from.

    Returns:
        By name; those that need nothing are as they were.

    Raises:
        ValueError: one of them is needed and not there; the message names the attack and the option.
    """
    bound: dict[str, EvalAttack] = {}
    for name, attack in attacks.items():
        needs: Any = attack
        if hasattr(attack, "with_surrogate"):
            if surrogate is None:
                raise ValueError(
                    f"evaluation.attacks.{name} is made on another network: give its checkpoint, evaluation.surrogate="
                )
            needs = needs.with_surrogate(surrogate.net, name=surrogate.name, accuracy=surrogate.accuracy)
        if hasattr(attack, "with_training_loss"):
            if defense is None:
                raise ValueError(
                    f"evaluation.attacks.{name} maximises the loss of the training, which only a checkpoint of mi_at "
                    "carries: leave it out, evaluation/attacks=[...]"
                )
            needs = needs.with_training_loss(defense.training_objective)
        if hasattr(attack, "with_guides") and guides is not None:
            needs = needs.with_guides(*guides())
        if getattr(attack, "tap", None) == AUTO_TAP:
            needs = replace(needs, tap=regularised_tap(defense))
        bound[name] = needs
    return bound


@dataclass(frozen=True)
class Served:
    """A network and what its evaluation needs beside it.

    Attributes:
        net: in eval mode.
        attacks: by name, bound.
        adaptive: attacks made for its defense, for the audit; None: none are known.
        variants: other versions of the network, for the audit; {}: there are none; None: not known.
        critics: estimators of mutual information, where the evaluation wants it.
    """

    net: nn.Module
    attacks: dict[str, EvalAttack]
    adaptive: dict[str, EvalAttack] | None = None
    variants: dict[str, nn.Module] | None = None
    critics: dict[str, nn.Module] | None = None


def serve(
    trained: str | Path | Weights,
    attacks: Mapping[str, EvalAttack],
    config: Mapping[str, Any],
    data: ImageDataModule,
    *,
    device: str | torch.device = "cpu",
    surrogate: Surrogate | None = None,
) -> Served:
    """A trained network and its evaluation's attacks, ready for `mi_at.results.measure.measure`.

    Args:
        trained: path of a checkpoint of mi_at, or weights that were trained elsewhere.
        attacks: as `build_attacks` gives them.
        config: resolved; its `evaluation` and `dataset`, and `model` for weights.
        data: set up for "test"; guides of the representation attack are drawn from its first images.
        device: where to put the network.
        surrogate: that transfer attacks are made on.

    Raises:
        FileNotFoundError, CheckpointError: as `load` and `load_own`.
        ValueError: as `bind`.
    """
    evaluation, defense = config["evaluation"], None
    adaptive: dict[str, EvalAttack] | None = None
    variants: dict[str, nn.Module] | None = None
    if isinstance(trained, Weights):
        net, variants = load_own(trained, config["model"], device), {}
    elif any(evaluation.get(name) for name in ("audit", "mutual_information")) or any(
        _needs_defense(attack) for attack in attacks.values()
    ):
        defense = load_defense(trained, device)
        net = defense.net
        # An average has raw weights beside it.
        variants = None if defense.config.get("callback") else {}
        adaptive = adaptive_attacks(defense, evaluation) if evaluation.get("audit") else None
    else:
        net = load(trained, device)
    bound = bind(attacks, surrogate=surrogate, defense=defense, guides=lambda: guides_of(data.test_dataloader()))
    estimators = isinstance(defense, MIEstimators) and evaluation.get("mutual_information")
    critics = {name: getattr(defense, name) for name in CRITICS} if estimators else None
    return Served(net, bound, adaptive, variants, critics)


def guides_of(batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images and labels of a split, `GUIDES` at most, on the CPU."""
    x, y, found = [], [], 0
    for batch in batches:
        x.append(batch.x.cpu())
        y.append(batch.y.cpu())
        found += len(batch)
        if found >= GUIDES:
            break
    return torch.cat(x)[:GUIDES], torch.cat(y)[:GUIDES]


def _needs_defense(attack: EvalAttack) -> bool:
    return hasattr(attack, "with_training_loss") or getattr(attack, "tap", None) == AUTO_TAP


def regularised_tap(defense: Defense | None) -> str:
    """The last layer that a defense and its terms look at; where none is known, the features before the head."""
    return defense.needed_taps[-1] if defense is not None and defense.needed_taps else FEATURES


def adaptive_attacks(defense: Defense, evaluation: Mapping[str, Any]) -> dict[str, EvalAttack]:
    """The attacks made for a defense that its audit asks for, in the ball of an evaluation.

    Args:
        defense: with its network.
        evaluation: resolved; its `eps`, `norm` and `step_size`.

    Returns:
        By name: on its training loss and, where the network has taps, on the layer that it regularises.
    """
    ball = {key: evaluation[key] for key in ("eps", "norm", "step_size")}
    wanted: dict[str, EvalAttack] = {"adaptive": Adaptive(**ball, steps=50)}
    if hasattr(defense.net, "forward_taps"):
        wanted["feature_shift"] = FeatureShift(**ball, steps=50, tap=AUTO_TAP)
    return bind(wanted, defense=defense)


def load_surrogate(path: str | Path, dataset: Mapping[str, Any], device: str | torch.device = "cpu") -> Surrogate:
    """The network of another run, to make transfer attacks on.

    Args:
        path: its checkpoint.
        dataset: the resolved `dataset` node of the network under attack.
        device: where to put it.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
        ValueError: it was trained on another data set.
    """
    config = read_checkpoint(path).config
    theirs = config["dataset"]
    for key in ("name", "num_classes", "channels", "image_size"):
        if theirs.get(key) != dataset.get(key):
            raise ValueError(
                f"evaluation.surrogate={path} was trained on {theirs.get('name')} ({key} {theirs.get(key)}), but the "
                f"network under attack on {dataset.get('name')} ({key} {dataset.get(key)}): choose one of the same data"
            )
    chosen = config.get("choices") or {}
    name = "-".join(str(chosen.get(group, group)) for group in ("defense", "dataset", "model"))
    return Surrogate(load(path, device), name)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of mi_at; tensors and plain data only, pickled code is refused.

    Args:
        path: a file written by a run.

    Returns:
        Its parts, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, with code in it, or not written by mi_at.
    """
    found = read_weights(path)
    if isinstance(found, Weights):
        raise CheckpointError(f"checkpoint {path} was not written by mi_at: it carries no weights with a configuration")
    return found


def read_weights(path: str | Path) -> Checkpoint | Weights:
    """Read a checkpoint of mi_at, or a state dict that something else wrote; pickled code is refused.

    Args:
        path: written by a run of mi_at, or by torch.save of a state dict, as it is or under a key of `NESTS`.

    Returns:
        Its parts, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, with code in it, or without weights.
    """
    path = Path(path)
    raw = _read(path)
    if not isinstance(raw, dict) or "mi_at" not in raw:
        tensors, nest = _state_dict(path, raw)
        return Weights(path, tensors, nest)
    if not isinstance(raw.get("state_dict"), dict):
        raise CheckpointError(f"checkpoint {path} was not written by mi_at: it carries no weights with a configuration")
    config = raw["mi_at"].get("config") if isinstance(raw["mi_at"], dict) else None
    parts = ("model", "dataset", "defense", "regularizer")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in parts):
        raise CheckpointError(f"checkpoint {path} carries no whole configuration: expected {', '.join(parts)}")
    prefix = "net."
    state = {name.removeprefix(prefix): value for name, value in raw["state_dict"].items() if name.startswith(prefix)}
    _check_numbers(path, state)
    return Checkpoint(path, config, state, _finished_epochs(raw), int(raw.get("global_step", 0)), raw["state_dict"])


def _read(path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain data."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle that is then refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} contains pickled code or objects and is refused; use one that mi_at wrote, or "
            f"{_SAVE_WEIGHTS}"
        ) from error
    except Exception as error:  # a text file, a half-written one: torch has no common word for what it cannot read
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({reason}); use another one") from error


def _state_dict(path: Path, raw: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict in a file, and the keys it lay under."""
    nest: list[str] = []
    while not (isinstance(raw, Mapping) and raw and all(isinstance(v, torch.Tensor) for v in raw.values())):
        inner = [key for key in NESTS if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping)]
        if len(inner) != 1:
            found = f"a {type(raw).__name__}"
            if isinstance(raw, Mapping):
                found = f"the keys {', '.join(map(str, list(raw)[:6])) or '(none)'}"
            several = f" and several sets of weights, under {', '.join(inner)}" if inner else " and no weights"
            raise CheckpointError(
                f"checkpoint {path} was not written by mi_at: it holds {found}{several}; {_SAVE_WEIGHTS} (as it is, "
                f"or under {', '.join(NESTS)})"
            )
        nest.append(inner[0])
        raw = raw[inner[0]]
    tensors = {str(name): value for name, value in raw.items()}
    _check_numbers(path, tensors)
    return tensors, ".".join(nest)


def _check_numbers(path: Path, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.is_floating_point() and not value.isfinite().all()):
            found = "a value that is not finite" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(f"checkpoint {path} has {found} among the weights {name}; use an earlier one")


def _finished_epochs(raw: Mapping[str, Any]) -> int:
    """Epochs whose last batch was taken: a checkpoint may be of the middle of one."""
    loop = raw.get("loops", {}).get("fit_loop")
    if loop is None:
        return int(raw.get("epoch", -1)) + 1
    epochs, last_batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["is_last_batch"]
    running = epochs["ready"] > epochs["completed"]
    return int(epochs["completed"]) + int(running and last_batch)


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network of a checkpoint, in eval mode.

    Args:
        path: best.ckpt, last.ckpt or epoch_076.ckpt of a run.
        device: where to put it.

    Returns:
        Images [B, C, H, W] float in [0, 1] -> logits [B, K]; normalisation is inside.

    Raises:
        FileNotFoundError, CheckpointError: as `read_checkpoint`; also weights that do not fit the configured network.
    """
    checkpoint = read_checkpoint(path)
    net = build_net(checkpoint.config["model"])
    build_defense(checkpoint.config, net)
    load_weights(net, checkpoint)
    return net.to(device).eval()


def load_defense(path: str | Path, device: str | torch.device = "cpu") -> Defense:
    """The defense of a checkpoint around its trained network, its own and its regularizers' states restored.

    For what needs more than the network: the training loss (centroids, estimators), the taps that were regularized.

    Args:
        path: as `load`.
        device: where to put it.

    Returns:
        In eval mode; its `net` is what `load` gives.

    Raises:
        FileNotFoundError, CheckpointError: as `load`; also states that do not fit the configured defense.
    """
    checkpoint = read_checkpoint(path)
    defense = build_defense(checkpoint.config, build_net(checkpoint.config["model"]))
    if isinstance(checkpoint.config.get("optim"), dict):  # the schedule scales the method's own epochs
        defense.optimisation = build("optim", checkpoint.config["optim"])
    if problems := _differences(defense.state_dict(), checkpoint.state):
        raise CheckpointError(f"checkpoint {path} does not fit its own defense {type(defense).__name__}: {problems}")
    defense.load_state_dict(checkpoint.state)
    return defense.to(device).eval()


def load_own(weights: Weights, model: Mapping[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """A network trained elsewhere, in eval mode.

    Args:
        weights: read from a state dict.
        model: a resolved `model` node: `_target_` and options.
        device: where to put it.

    Returns:
        The network.

    Raises:
        CheckpointError: weights of another network; the message names what is missing, left over or of another shape.
        ValueError: as `build_net`.
    """
    net = build_net(model)
    state, _ = named_as(weights, net)
    made = f"checkpoint {weights.path} does not fit the network {type(net).__name__}"
    if problems := _differences(net.state_dict(), state):
        raise CheckpointError(f"{made}: {problems}")
    net.load_state_dict(state)
    return net.to(device).eval()


def named_as(weights: Weights, net: nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    """The weights under a network's own names: a prefix that a wrapper has put before all of them is taken off.

    Args:
        weights: read from a file.
        net: that they are for.

    Returns:
        Name -> weight, and the prefix. Where no prefix fits, those that come nearest.

    Raises:
        CheckpointError: two prefixes under which all of the network's weights are found.

    Example:
        >>> weights = Weights(Path("a.pt"), {"module.net.weight": torch.ones(1, 1), "module.net.bias": torch.ones(1)})
        >>> named_as(weights, nn.Linear(1, 1))[1]
        'module.net.'
    """
    wanted = set(net.state_dict())
    found: list[tuple[int, str, dict[str, torch.Tensor]]] = []
    for depth in range(4):
        for parts in itertools.product(PREFIXES, repeat=depth):
            prefix = "".join(parts)
            inner = {name.removeprefix(prefix): v for name, v in weights.tensors.items() if name.startswith(prefix)}
            if inner:
                found.append((len(wanted ^ set(inner)), prefix, inner))
    fitting = [prefix for apart, prefix, _ in found if not apart]
    if len(fitting) > 1:
        raise CheckpointError(
            f"checkpoint {weights.path} holds the network's weights more than once, under {' and '.join(fitting)}: "
            f"{_SAVE_WEIGHTS}"
        )
    _, prefix, state = min(found, key=lambda each: each[0])
    return state, prefix


def load_weights(net: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a network.

    Raises:
        CheckpointError: they belong to another network; the message names what differs.
    """
    if problems := _differences(net.state_dict(), checkpoint.net_state):
        made = checkpoint.config.get("model", {}).get("_target_", "unknown")
        raise CheckpointError(
            f"checkpoint {checkpoint.path} (of {made}) does not fit the network {type(net).__name__}: {problems}"
        )
    net.load_state_dict(checkpoint.net_state)


def _differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What keeps a state dict from fitting, in words; empty where nothing does."""
    missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in given.items()
        if name in wanted and isinstance(value, torch.Tensor) and value.shape != wanted[name].shape  # or extra state
    ]
    return "; ".join(
        f"{title}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    )


def quiet() -> None:
    """Silence what libraries say at every start; warnings about the user's own settings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    for text in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*recommended to use .*sync_dist=True.*",  # every process logs the metric of all of them
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*Total length of `list` across ranks is zero.*",  # dataset.val_size=0
        ".*module.s. in eval mode at the start of training.*",  # frozen estimators and reference networks
    ):
        warnings.filterwarnings("ignore", text)


def reuse_memory() -> None:
    """Have glibc keep freed memory: to give a step's tensors back and fault them in anew takes a fifth of it on a CPU.

    MALLOC_MMAP_THRESHOLD_ in the environment wins.
    """
    largest = 32 << 20  # that glibc takes
    options = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, largest)}  # as in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or set(options) & set(os.environ):
        return
    for name, (option, value) in options.items():
        mallopt(option, value)
        os.environ[name] = str(value)  # for processes that this one starts


class FailedJobError(RuntimeError):
    """A job of a multirun that failed and has said why.

    Attributes:
        busy: folder of the run, where all that was wrong is that another process is at it.
    """

    def __init__(self, text: str = "", busy: str | None = None) -> None:
        super().__init__(text, busy)  # both, so that it can be pickled
        self.busy = busy

    def __str__(self) -> str:
        return str(self.args[0])


def run_command(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """The command line of a job: what is the user's own mistake ends as one message and exit status 1.

    In a multirun a job that fails says why at once, the others go on, and the exit status is 1 in the end.

    Args:
        job: called with the composed configuration.
        config_name: "train" or "evaluate".
    """
    register_resolvers()
    reuse_memory()
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on instead of printing them itself

    @functools.wraps(job)
    def reported(cfg: DictConfig) -> Any:
        quiet()
        register_resolvers()  # a launcher may have started a process for the job
        try:
            return job(cfg)
        except USER_ERRORS as error:
            if traced:
                raise
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                sys.exit(message(error))
            busy = getattr(error, "folder", None)
            if busy is None:
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)
            raise FailedJobError(explain(error), busy) from error
        except Exception as error:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            # Said here: on its way from another process an error loses its place in the code, and some cannot be sent.
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
            raise FailedJobError(f"{type(error).__name__}: {error}") from error

    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(reported)()
    except FailedJobError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if traced:
            raise
        sys.exit(message(error))
    except RuntimeError as error:
        launcher = next((word for word in sys.argv if word.startswith(("launcher=", "hydra/launcher="))), None)
        if traced or launcher is None:
            raise
        sys.exit(message(ValueError(f"{launcher}: {error}")))  # such as Slurm's where there is no Slurm


def message(error: BaseException) -> str:
    """What a command that fails says last."""
    return f"error: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where)"


def explain(error: BaseException) -> str:
    """What a user's mistake is: the cause of what Hydra wraps, and the keys there are where one is unknown."""
    while isinstance(error, HydraException) and isinstance(error.__cause__, USER_ERRORS):
        error = error.__cause__
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and isinstance(error.parent_node, DictConfig):
        known, where = sorted(str(key) for key in error.parent_node), str(error.full_key).rpartition(".")[0]
        guess = _guess(str(error.key), known)
        return f"unknown key {error.full_key}: {where or 'the configuration'} has {', '.join(known)}{guess}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: {error.full_key}=<path>"
    if isinstance(error, HydraException) and "INTERVAL_SWEEP" in str(error):
        return "interval() is for a search: give sweep=optuna too, or values: a=1,2"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).strip("/").rpartition("/")
        if group == "hydra/launcher":
            return _launcher_missing(name)
        if known := names_in(group):
            return f"{group}={name}: expected one of {', '.join(known)}{_guess(name, known)}"
    return str(error)


def _launcher_missing(name: str) -> str:
    known = names_in("launcher")
    for launcher in known:
        node = OmegaConf.load(Path(conf_dir()) / "launcher" / f"{launcher}.yaml")
        if {"override /hydra/launcher": name} in node.defaults:
            return f"launcher={launcher}: its plugin is not installed: pip install 'mi_at[launchers]'"
    return f"hydra/launcher={name}: expected launcher= and one of {', '.join(known)}{_guess(name, known)}"


def _guess(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
