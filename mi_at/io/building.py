"""From the nodes of a configuration to what they describe: networks, defenses, data, attacks."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_class, get_object
from torch import nn
from torch.nn.parameter import is_lazy

from mi_at.data import CUSTOMARY_KEYS
from mi_at.data.base import ImageDataModule
from mi_at.defenses.base import Defense
from mi_at.evaluation.outcomes import EvalAttack
from mi_at.functional.geometry import parse_eps
from mi_at.io.conf import names_in
from mi_at.io.errors import guess
from mi_at.regularizers.base import Regularizer


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
            f"{where}.{unknown[0]}: expected one of {', '.join(accepted)}{guess(unknown[0], list(accepted))}"
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
        why = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{where}._target_={target}: expected the path of an importable class: {why}") from error
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
