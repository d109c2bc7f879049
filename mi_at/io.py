"""Between the command line, the disk and the rest: configurations, what they build, checkpoints that carry theirs."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
import os
import pickle
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_class, get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from mi_at.data import CUSTOMARY_KEYS
from mi_at.data.base import ImageDataModule
from mi_at.data.folder import class_names
from mi_at.defenses.base import Defense, NonFiniteLossError
from mi_at.evaluation.outcomes import EvalAttack
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
    """A checkpoint read from disk.

    Attributes:
        path: the file.
        config: the resolved configuration of its run, plain values.
        net_state: the weights that are served (averaged, where averaging was on), names without prefix.
        epoch: finished epochs.
        step: finished steps.
    """

    path: Path
    config: dict[str, Any]
    net_state: dict[str, torch.Tensor]
    epoch: int
    step: int


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
    if "num_classes" in cfg.dataset and cfg.dataset.num_classes is None:
        cfg.dataset.num_classes = len(class_names(cfg.dataset.root))
    runtime = HydraConfig.get()
    config = plain(cfg)
    choices = {group: name for group, name in runtime.runtime.choices.items() if "/" not in group}
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

    `${mul:a,b}` multiplies numbers or fractions; `${by_budget:p,s,t}` is s at budget short, t at smoke, p at others.
    """
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
        try:
            attacks[name] = build(where, {**node, "name": name})
        except ValueError as error:
            raise ValueError(str(error).replace("attack.", f"{where}.")) from error
    return attacks


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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle that is then refused
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} contains pickled code or objects and is refused; use one that mi_at wrote"
        ) from error
    except Exception as error:  # a text file, a half-written one: torch has no common word for what it cannot read
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({reason}); use another one") from error
    if not isinstance(raw, dict) or "mi_at" not in raw or not isinstance(raw.get("state_dict"), dict):
        raise CheckpointError(f"checkpoint {path} was not written by mi_at: it carries no weights with a configuration")
    config = raw["mi_at"].get("config") if isinstance(raw["mi_at"], dict) else None
    parts = ("model", "dataset", "defense", "regularizer")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in parts):
        raise CheckpointError(f"checkpoint {path} carries no whole configuration: expected {', '.join(parts)}")
    prefix = "net."
    state = {name.removeprefix(prefix): value for name, value in raw["state_dict"].items() if name.startswith(prefix)}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.is_floating_point() and not value.isfinite().all()):
            found = "a value that is not finite" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(f"checkpoint {path} has {found} among the weights {name}; use an earlier one")
    return Checkpoint(path, config, state, _finished_epochs(raw), int(raw.get("global_step", 0)))


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


def load_weights(net: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a network.

    Raises:
        CheckpointError: they belong to another network; the message names what differs.
    """
    state = net.state_dict()
    missing = sorted(set(state) - set(checkpoint.net_state))
    unexpected = sorted(set(checkpoint.net_state) - set(state))
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(state[name].shape)}"
        for name, value in checkpoint.net_state.items()
        if name in state and value.shape != state[name].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        made = checkpoint.config.get("model", {}).get("_target_", "unknown")
        raise CheckpointError(
            f"checkpoint {checkpoint.path} (of {made}) does not fit the network {type(net).__name__}: "
            + "; ".join(problems)
        )
    net.load_state_dict(checkpoint.net_state)


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


class FailedJobError(RuntimeError):
    """A job of a multirun that failed and has said why."""


def run_command(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """The command line of a job: what is the user's own mistake ends as one message and exit status 1.

    In a multirun a job that fails says why at once, the others go on, and the exit status is 1 in the end.

    Args:
        job: called with the composed configuration.
        config_name: "train" or "evaluate".
    """
    register_resolvers()
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on instead of printing them itself

    @functools.wraps(job)
    def reported(cfg: DictConfig) -> Any:
        quiet()
        try:
            return job(cfg)
        except USER_ERRORS as error:
            if traced:
                raise
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                sys.exit(message(error))
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)
            raise FailedJobError from error

    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(reported)()
    except FailedJobError:
        sys.exit(1)
    except USER_ERRORS as error:
        if traced:
            raise
        sys.exit(message(error))


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
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).strip("/").rpartition("/")
        known = sorted(path.stem for path in (Path(conf_dir()) / group).glob("[!_]*.yaml"))
        if known:
            return f"{group}={name}: expected one of {', '.join(known)}{_guess(name, known)}"
    return str(error)


def _guess(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
