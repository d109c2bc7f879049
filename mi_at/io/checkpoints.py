"""Checkpoints, which carry their configuration, and the weights of networks trained elsewhere; never code."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi_at.defenses.base import Defense
from mi_at.io.building import build, build_defense, build_net

NESTS = ("state_dict", "model_state_dict", "net", "model")
"""Keys under which training scripts keep a state dict."""

PREFIXES = ("module.", "_orig_mod.", "net.", "model.")
"""What wrappers put before the names of weights: DataParallel, torch.compile, and modules that hold the network."""

_SAVE_WEIGHTS = "save the weights alone, torch.save(net.state_dict(), 'weights.pt')"


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
        raw: as `state`, with the weights that training went on with; empty where nothing is averaged.
    """

    path: Path
    config: dict[str, Any]
    net_state: dict[str, torch.Tensor]
    epoch: int
    step: int
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)


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
    return Checkpoint(
        path,
        config,
        state,
        _finished_epochs(raw),
        int(raw.get("global_step", 0)),
        raw["state_dict"],
        raw.get("current_model_state") or {},
    )


def _read(path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain data."""
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; give a file, such as {path / 'best.ckpt'}")
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
        size, run = path.stat().st_size, path.parent
        again = f", or remove {run} to train again" if (run / "config.json").is_file() else ""
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged: {size:,} bytes that torch.load cannot read; use another "
            f"one{again}"
        ) from error


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


def load(path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network of a checkpoint, in eval mode.

    Args:
        path: best.ckpt, last.ckpt or epoch_076.ckpt of a run, or what was read of it.
        device: where to put it.

    Returns:
        Images [B, C, H, W] float in [0, 1] -> logits [B, K]; normalisation is inside.

    Raises:
        FileNotFoundError, CheckpointError: as `read_checkpoint`; also weights that do not fit the configured network.
    """
    checkpoint = _checkpoint(path)
    net = build_net(checkpoint.config["model"])
    build_defense(checkpoint.config, net)
    load_weights(net, checkpoint)
    return net.to(device).eval()


def load_defense(path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> Defense:
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
    checkpoint = _checkpoint(path)
    return _defense(checkpoint, checkpoint.state, device)


def load_raw(path: str | Path | Checkpoint, device: str | torch.device = "cpu") -> nn.Module | None:
    """The network of the weights that training went on with, where `load` gives their average.

    Args:
        path: as `load`.
        device: where to put it.

    Returns:
        In eval mode; None where nothing is averaged.

    Raises:
        FileNotFoundError, CheckpointError: as `load_defense`.
    """
    checkpoint = _checkpoint(path)
    return _defense(checkpoint, checkpoint.raw, device).net if checkpoint.raw else None


def _checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Read, unless it was."""
    return path if isinstance(path, Checkpoint) else read_checkpoint(path)


def _defense(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], device: str | torch.device) -> Defense:
    """A checkpoint's defense with one of its states."""
    defense = build_defense(checkpoint.config, build_net(checkpoint.config["model"]))
    if isinstance(checkpoint.config.get("optim"), dict):  # the schedule scales the method's own epochs
        defense.optimisation = build("optim", checkpoint.config["optim"])
    if problems := _differences(defense.state_dict(), state):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not fit its own defense {type(defense).__name__}: {problems}"
        )
    defense.load_state_dict(state)
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
