"""Between the command line, the disk and the rest: configurations, what they build, checkpoints that carry theirs."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from mi_at.data import CUSTOMARY_KEYS
from mi_at.data.base import ImageDataModule
from mi_at.data.folder import class_names
from mi_at.defenses.base import NonFiniteLossError
from mi_at.evaluation.outcomes import EvalAttack
from mi_at.functional.geometry import parse_eps

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
        ValueError: a folder of images whose classes cannot be read.
    """
    if "num_classes" in cfg.dataset and cfg.dataset.num_classes is None:
        cfg.dataset.num_classes = len(class_names(cfg.dataset.root))
    runtime = HydraConfig.get()
    config = plain(cfg)
    choices = {group: name for group, name in runtime.runtime.choices.items() if "/" not in group}
    if not (Path(conf_dir()) / "recipe" / f"{choices.get('recipe')}.yaml").is_file():
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
    included = [name for name in node.pop("defaults", []) if name != "_self_"]
    keys = [f"{group}.{key}" for group, values in node.items() if isinstance(values, dict) for key in values]
    return [*(key for name in included for key in recipe_keys(name)), *keys]


def register_resolvers() -> None:
    """Resolvers that conf/ uses: `${mul:a,b}` multiplies numbers or fractions."""
    OmegaConf.register_new_resolver("mul", lambda a, b: parse_eps(a) * parse_eps(b), replace=True)


def build_net(model: Mapping[str, Any]) -> nn.Module:
    """The network of a resolved `model` node.

    A network of mi_at takes exactly the node's options. One's own (`model._target_=my_package.Net`) is offered them:
    those its constructor names are passed, the others, which belong to the yaml it replaced, are left out.

    Args:
        model: `_target_` and options, plain values.

    Returns:
        The network, on the CPU, freshly initialised from torch's global random state.

    Raises:
        ValueError: the target does not exist or does not take what it was given.
    """
    target = str(model["_target_"])
    options = {key: value for key, value in model.items() if key != "_target_"}
    if not target.startswith("mi_at."):
        try:
            accepted = inspect.signature(get_class(target)).parameters
        except Exception as error:
            raise ValueError(f"model._target_={target}: {error}; expected the path of an importable class") from error
        options = {key: value for key, value in options.items() if key in accepted}
    net = instantiate({"_target_": target, **options})
    if not isinstance(net, nn.Module):
        raise ValueError(f"model._target_={target}: made a {type(net).__name__}, expected a torch.nn.Module")
    return net


def build_data(dataset: Mapping[str, Any]) -> ImageDataModule:
    """The data module of a resolved `dataset` node, without its customary threat model and schedule."""
    module: ImageDataModule = instantiate({k: v for k, v in dataset.items() if k not in CUSTOMARY_KEYS})
    return module


def build_attacks(evaluation: Mapping[str, Any]) -> dict[str, EvalAttack]:
    """The attacks of a resolved `evaluation` node by name."""
    return {name: instantiate({**node, "name": name}) for name, node in evaluation["attacks"].items()}


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
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path} contains pickled code or objects and is refused ({reason}); save a plain state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({reason}); use another one") from error
    if not isinstance(raw, dict) or "mi_at" not in raw or "state_dict" not in raw:
        raise CheckpointError(f"checkpoint {path} was not written by mi_at: it carries no configuration")
    prefix = "net."
    state = {name.removeprefix(prefix): value for name, value in raw["state_dict"].items() if name.startswith(prefix)}
    return Checkpoint(
        path, raw["mi_at"]["config"], state, int(raw.get("epoch", -1)) + 1, int(raw.get("global_step", 0))
    )


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
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", text)


def report_errors(run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """An error of the user's is one line and exit status 1; in a multirun Hydra reports it and goes on."""

    @functools.wraps(run)
    def reported(cfg: DictConfig) -> Any:
        quiet()
        try:
            return run(cfg)
        except USER_ERRORS as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            cause: BaseException = error
            while isinstance(cause, HydraException) and isinstance(cause.__cause__, USER_ERRORS):
                cause = cause.__cause__
            sys.exit(f"error: {cause}\n(HYDRA_FULL_ERROR=1 shows where)")

    return reported
