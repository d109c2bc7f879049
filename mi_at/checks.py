"""What is refused before anything is trained, each with a message that names the value and the way out."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import nn

from mi_at import io
from mi_at.attacks.contexts import attacking
from mi_at.data.base import ImageDataModule
from mi_at.defenses.base import Defense

PRECISIONS = ("32-true", "bf16-mixed")
Check = tuple[str, Callable[[Any], bool], str]
EXPECTED: tuple[Check, ...] = (
    ("seed", lambda v: whole(v) and 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
    ("resume", lambda v: isinstance(v, bool), "true or false"),
    ("keep_epochs", lambda v: isinstance(v, list) and all(whole(e) and e > 0 for e in v), "a list of epochs from 1 on"),
    ("probe", lambda v: isinstance(v, list), "a list of attacks, such as [pgd_20]"),
    ("probe_ncmi", lambda v: isinstance(v, bool), "true or false"),
    ("tags", lambda v: isinstance(v, list), "a list of words"),
    ("save_every_n_steps", lambda v: whole(v) and v >= 0, "a number of steps, or 0"),
    ("select", lambda v: v in ("auto", "best", "last"), "auto, best or last"),
    ("trainer.precision", lambda v: v in PRECISIONS, "32-true or bf16-mixed: others break the attack's budget"),
    ("optim.epochs", lambda v: whole(v) and v > 0, "1 or more"),
    (
        "trainer.devices",
        lambda v: (
            v == "auto"
            or (isinstance(v, list) and all(whole(d) and d >= 0 for d in v))
            or (whole(v) and (v > 0 or v == -1))
        ),
        "a number of devices, a list of them, -1 for all, or auto",
    ),
    ("trainer.accumulate_grad_batches", lambda v: whole(v) and v > 0, "1 or more"),
    ("trainer.gradient_clip_val", lambda v: v is None or (number(v) and v >= 0), "null, or 0 or more"),
    ("trainer.inspect_every", lambda v: whole(v) and v >= 0, "a number of steps, or 0"),
    ("trainer.max_epochs", lambda v: whole(v) and (v > 0 or v == -1), "1 or more, or -1 where max_steps ends the run"),
    ("trainer.max_steps", lambda v: whole(v) and (v > 0 or v == -1), "1 or more, or -1 where max_epochs ends the run"),
    ("trainer.limit_train_batches", lambda v: number(v) and v > 0, "a number of batches, or a share of them"),
    ("trainer.limit_val_batches", lambda v: number(v) and v >= 0, "a number of batches, or a share of them"),
    ("trainer.check_val_every_n_epoch", lambda v: whole(v) and v > 0, "a number of epochs, 1 or more"),
    ("trainer.log_every_n_steps", lambda v: whole(v) and v > 0, "a number of steps, 1 or more"),
    ("trainer.num_nodes", lambda v: whole(v) and v > 0, "a number of machines, 1 or more"),
    ("trainer.accelerator", lambda v: v in ("auto", "cpu", "gpu", "cuda"), "auto, cpu or gpu"),
    ("trainer.deterministic", lambda v: isinstance(v, bool) or v == "warn", "true, false or warn"),
    *(
        (f"trainer.{key}", lambda v: isinstance(v, bool), "true or false")
        for key in ("enable_progress_bar", "benchmark", "channels_last", "compile")
    ),
)
"""Plain settings: key, whether a value is right, what is expected."""


def whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot give a true number, before anything is built.

    Raises:
        ValueError: naming the keys and the way out.
    """
    check_table(config)
    check_multirun()
    for key, right, expected in EXPECTED:
        value: Any = functools.reduce(operator.getitem, key.split("."), config)
        if not right(value):
            raise ValueError(f"{key}={value}: expected {expected}")
    if config["select"] == "best" and not config["dataset"]["val_size"]:
        raise ValueError("select=best needs a validation split: set dataset.val_size")
    if config["probe"] and not config["dataset"]["val_size"]:
        raise ValueError(
            f"probe={config['probe']} runs on the validation split, and there is none: set dataset.val_size"
        )
    if unknown := sorted(set(config["probe"]) - set(config["evaluation"]["attacks"])):
        known = ", ".join(config["evaluation"]["attacks"]) or "none"
        raise ValueError(f"probe={unknown}: expected attacks of evaluation={config['choices']['evaluation']}: {known}")
    if config["evaluation"].get("mutual_information") and config["choices"]["defense"] != "mi_estimators":
        raise ValueError(
            f"evaluation.mutual_information={config['evaluation']['mutual_information']} is estimated by "
            f"defense=mi_estimators, and this is defense={config['choices']['defense']}: set it to []"
        )
    optim, data = config["optim"], config["dataset"]
    last = optim["paper_epochs"] or optim["epochs"]
    if late := [epoch for epoch in config["keep_epochs"] if epoch > last]:
        raise ValueError(f"keep_epochs={late}: the run ends after epoch {last} (of optim.paper_epochs, if it is set)")
    if 0 < data["val_size"] < data["num_classes"]:
        raise ValueError(
            f"dataset.val_size={data['val_size']}: a stratified split of {data['num_classes']} classes needs at least "
            "as many images; 0 switches validation off"
        )
    if {"ema", "swa"} <= set(config["callback"]):
        raise ValueError("callback=[ema,swa]: only one average of the weights can be served; choose one")
    check_devices(config["trainer"])
    check_recipe(config)


def check_table(config: Mapping[str, Any]) -> None:
    """Refuse a whole table as one run.

    Raises:
        ValueError: naming the table and the way out.
    """
    cells = (config.get("table") or {}).get("cells")
    if cells:
        name = config["table"]["name"]
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ValueError(f"table={name} beside others: a command runs one table; give a command for each")
        typed = " ".join(HydraConfig.get().overrides.task)
        raise ValueError(
            f"table={name} is {len(cells)} runs ({', '.join(cells)}): give -m too, python -m mi_at.train -m {typed}, "
            f"with table.rows=[{next(iter(cells))}] for one of them"
        )


def check_multirun() -> None:
    """Refuse what only -m heeds.

    Raises:
        ValueError: naming it and the way out.
    """
    runtime = HydraConfig.get()
    for group, usual in (("sweep", "none"), ("launcher", "basic")):
        choice = runtime.runtime.choices.get(group, usual)
        if choice != usual and runtime.mode != RunMode.MULTIRUN:
            raise ValueError(
                f"{group}={choice} is for many runs: give -m too, python -m mi_at.train -m {group}={choice}"
            )


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse GPUs that are not there, and several processes in a multirun.

    Raises:
        ValueError: naming the option.
    """
    devices, there = trainer["devices"], torch.cuda.device_count()
    wanted = max(devices, default=0) + 1 if isinstance(devices, list) else process_count({**trainer, "num_nodes": 1})
    if trainer["accelerator"] in ("gpu", "cuda") and wanted > there:
        raise ValueError(f"trainer.devices={devices}: this machine has {there} GPUs; use fewer, or trainer=default")
    if process_count(trainer) > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(
            f"trainer.devices={devices} in a multirun: each process would start the whole sweep again; run the "
            "configurations one by one, or each of them on one device"
        )


def process_count(trainer: Mapping[str, Any]) -> int:
    """How many processes train, by the options of the `trainer` group."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    elif devices in ("auto", -1):
        devices = 1 if trainer["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    return int(devices) * int(trainer["num_nodes"])


def check_net(net: nn.Module, data: ImageDataModule) -> None:
    """The network must take the images of the data and have an output per class.

    Raises:
        ValueError: naming what it takes or gives, and what the data need.
    """
    name, shape = type(net).__name__, (2, data.channels, data.image_size, data.image_size)
    try:
        with attacking(net), torch.no_grad():
            logits = net(torch.zeros(shape))
    except Exception as error:
        raise ValueError(f"model: {name} does not take images {shape} of {data.name}: {error}") from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (2, data.num_classes):
        way = f"model.num_classes={data.num_classes} sets that where its constructor takes num_classes"
        if not isinstance(logits, torch.Tensor):
            way = "return the logits alone"
        raise ValueError(
            f"model: {name} gives {found} for images {shape}, but {data.name} has {data.num_classes} classes: expected "
            f"logits (2, {data.num_classes}); {way}"
        )


def check_coupling(config: Mapping[str, Any], defense: Defense) -> None:
    """A term coupled over the batch needs a batch, and the whole of it; the loader leaves no image over alone.

    Args:
        config: resolved.
        defense: with its regularizers.

    Raises:
        ValueError: naming the term and the option.
    """
    coupled = defense.coupled_terms()
    if coupled and config["dataset"]["batch_size"] < 2:
        raise ValueError(f"dataset.batch_size=1: expected 2 or more for {coupled}, computed over a batch")
    if coupled and config["trainer"]["accumulate_grad_batches"] != 1:
        batches = config["trainer"]["accumulate_grad_batches"]
        raise ValueError(f"trainer.accumulate_grad_batches={batches}: {coupled} needs the whole batch at once; use 1")


def check_recipe(config: Mapping[str, Any]) -> None:
    """A group chosen by the user must not silently keep a recipe's values, such as an SGD rate under optim=adam.

    Raises:
        ValueError: naming the group and the values.
    """
    recipe = config["choices"]["recipe"]
    if recipe == "none":
        return
    given = [override.lstrip("+~") for override in HydraConfig.get().overrides.task]
    chosen = {name for name, _, _ in (override.partition("=") for override in given) if "." not in name}
    values = {name for name, _, _ in (override.partition("=") for override in given) if "." in name}
    for group in sorted(chosen & {"optim", "attack"}):
        kept = [key for key in io.recipe_keys(recipe) if key.startswith(f"{group}.") and key not in values]
        if kept:
            choice = config["choices"][group]
            own = io.options_of(group, choice)
            foreign = [key for key in kept if key.removeprefix(f"{group}.") not in own]
            way = "use recipe=none, and give on the command line what you want of the recipe"
            if foreign:
                way = f"{choice} has no {', '.join(foreign)}: {way}"
            else:
                way = f"give them on the command line ({' '.join(f'{key}=...' for key in kept)}), or {way}"
            raise ValueError(f"{group}={choice} would keep the values of recipe {recipe}: {', '.join(kept)}; {way}")
