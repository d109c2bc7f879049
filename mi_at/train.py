"""python -m mi_at.train: train one classifier, evaluate it, record the result."""

from __future__ import annotations

import functools
import operator
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mi_at import io
from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.checkpoints import AtomicCheckpointIO, Best, KeepEpochs, Last, Preemption
from mi_at.callbacks.probe import Probe
from mi_at.callbacks.progress import Progress
from mi_at.callbacks.sample_grid import SampleGrid
from mi_at.callbacks.speed import Speed
from mi_at.data.base import ImageDataModule
from mi_at.data.seeding import keyed_generator
from mi_at.defenses.base import Defense
from mi_at.evaluation.evaluate import sizes
from mi_at.regularizers.base import Context
from mi_at.results import loggers
from mi_at.results.measure import measure
from mi_at.results.records import read_record, run_key
from mi_at.results.runs import Run, find_run
from mi_at.results.terminal import print_header, print_table

OWN_TRAINER_OPTIONS = ("channels_last", "compile", "inspect_every")
PRECISIONS = ("32-true", "bf16-mixed")
Check = tuple[str, Callable[[Any], bool], str]
EXPECTED: tuple[Check, ...] = (
    ("seed", lambda v: whole(v) and 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
    ("resume", lambda v: isinstance(v, bool), "true or false"),
    ("keep_epochs", lambda v: isinstance(v, list) and all(whole(e) and e > 0 for e in v), "a list of epochs from 1 on"),
    ("probe", lambda v: isinstance(v, list), "a list of attacks, such as [pgd_20]"),
    ("tags", lambda v: isinstance(v, list), "a list of words"),
    ("save_every_n_steps", lambda v: whole(v) and v >= 0, "a number of steps, or 0"),
    ("select", lambda v: v in ("auto", "best", "last"), "auto, best or last"),
    ("trainer.precision", lambda v: v in PRECISIONS, "32-true or bf16-mixed: others break the attack's budget"),
    ("optim.epochs", lambda v: whole(v) and v > 0, "1 or more"),
    (
        "trainer.devices",
        lambda v: v == "auto" or isinstance(v, list) or (whole(v) and (v > 0 or v == -1)),
        "a number of devices, a list of them, -1 for all, or auto",
    ),
    ("trainer.accumulate_grad_batches", lambda v: whole(v) and v > 0, "1 or more"),
    ("trainer.gradient_clip_val", lambda v: v is None or v >= 0, "null, or 0 or more"),
    ("trainer.inspect_every", lambda v: whole(v) and v >= 0, "a number of steps, or 0"),
    ("trainer.max_epochs", lambda v: whole(v) and (v > 0 or v == -1), "1 or more, or -1 where max_steps ends the run"),
    ("trainer.max_steps", lambda v: whole(v) and (v > 0 or v == -1), "1 or more, or -1 where max_epochs ends the run"),
    ("trainer.limit_train_batches", lambda v: v > 0, "a number of batches, or a share of them"),
)
"""Plain settings: key, whether a value is right, what is expected."""


def whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def train(cfg: DictConfig) -> float | None:
    """Train, evaluate and record one configuration.

    Args:
        cfg: conf/train.yaml, composed.

    Returns:
        The best robust accuracy on validation in percent (what a sweep maximises), where there is a validation split.
    """
    config = io.resolve(cfg)
    check(config)
    own = {name: config["trainer"][name] for name in OWN_TRAINER_OPTIONS}
    lightning = {name: value for name, value in config["trainer"].items() if name not in OWN_TRAINER_OPTIONS}

    # Everything that can be wrong is built before a folder is made.
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    net = io.build_net(config["model"])
    if config["init_from"]:
        io.load_weights(net, io.read_checkpoint(config["init_from"]))
    defense: Defense = io.build("defense", config["defense"])
    defense.attach(
        net,
        optimisation=io.build("optim", config["optim"]),
        regularizers={name: io.build(f"regularizer.{name}", node) for name, node in config["regularizer"].items()},
        config=config,
    )
    defense.inspect_every = own["inspect_every"]
    data = io.build_data(config["dataset"])
    check_coupling(config, defense)
    budget: InnerMaximisation = io.build("attack", config["attack"])
    attacks = io.build_attacks(config["evaluation"])
    extra_callbacks = [io.build(f"callback.{name}", node) for name, node in config["callback"].items()]
    data.prepare_data()  # downloads, where asked
    data.setup("test")  # a missing file or too few images are found now, not after hours of training
    sizes(attacks, data.test_dataloader().num_images, n=config["evaluation"]["n"], n_of=config["evaluation"]["n_of"])
    data.setup("fit")  # forgets the test split
    check_net(net, data)

    processes = process_count(lightning)
    processes_matter = batch_coupled(net)
    run = find_run(
        config,
        key=run_key(config, config["choices"]),
        parent=Path(config["runs"]),
        folder=Path(config["run_dir"]) if config["run_dir"] else None,
        resume=config["resume"] or not first_process(),
        processes=processes if processes_matter else None,
    )
    if first_process():
        print_header(run.key, header(config, run, net))
    if run.state == "resumed":
        io.read_checkpoint(run.last)  # says what is wrong with a damaged one
    if run.state == "finished":
        record = read_record(run.record)
        print_table(record)
        return record.training.get("validation")

    recorders = loggers.build(
        {name: instantiate(node, _partial_=True) for name, node in config["logger"].items()},
        folder=run.folder,
        key=run.key,
        config_hash=run.hash,
        tags=config["tags"],
        group=config["group"],
        config=config,
    )
    if run.state != "trained":
        if own["channels_last"]:
            net.to(memory_format=torch.channels_last)
        if own["compile"]:
            net.compile()
        adversarial_examples = AdversarialExamples(budget, seed=config["seed"])
        probe = {name: attacks[name] for name in config["probe"]}
        callbacks = [
            adversarial_examples,
            *extra_callbacks,
            *([Probe(probe, folder=run.folder)] if probe else []),
            SampleGrid(run.folder),
            *([Speed(adversarial_examples), LearningRateMonitor("epoch")] if recorders else []),
            *([Progress()] if lightning["enable_progress_bar"] else []),
        ]
        notes = fit(config, run, defense, data, callbacks, recorders, lightning)
        if not first_process():
            return None
        run.write_training({**notes, "precision": lightning["precision"], "attack_precision": budget.precision})
    training = run.read_training()

    select = config["select"]
    rule = select if select != "auto" else "best" if (run.folder / "best.ckpt").is_file() else "last"
    served = io.read_checkpoint(run.folder / f"{rule}.ckpt")
    record = measure(
        io.load(served.path),
        attacks,
        data,
        config=config,
        checkpoint={"rule": rule, "epoch": served.epoch, "step": served.step},
        path=run.record,
        device="cuda" if lightning["accelerator"] != "cpu" and torch.cuda.is_available() else "cpu",
        processes=processes,
        processes_matter=processes_matter,
        training=training,
        progress=lightning["enable_progress_bar"],
    )
    loggers.log_evaluation(recorders, record, step=training["steps"])
    print(f"\nrun folder: {run.folder}")
    return record.training["validation"]


def fit(
    config: Mapping[str, Any],
    run: Run,
    defense: Defense,
    data: ImageDataModule,
    callbacks: list[Callback],
    recorders: list[Logger],
    lightning: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, from the start or from last.ckpt.

    Args:
        config: resolved.
        run: where to.
        defense: with its network attached.
        data: set up for fit.
        callbacks: `AdversarialExamples` first; those that write checkpoints are added here.
        recorders: loggers.
        lightning: options of the Trainer.

    Returns:
        What is worth knowing of the training, plain values.
    """
    last = Last(run.folder, every_n_steps=config["save_every_n_steps"])
    best = Best(run.folder) if config["dataset"]["val_size"] else None
    savers = [Preemption(last), *([best] if best else []), KeepEpochs(run.folder, config["keep_epochs"]), last]
    try:
        trainer = pl.Trainer(
            **lightning,
            callbacks=[*callbacks, *savers],
            logger=recorders or False,
            default_root_dir=run.folder,
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
            enable_model_summary=False,
        )
    except (TypeError, ModuleNotFoundError) as error:  # Lightning's answer to a value of the wrong kind
        raise ValueError(f"trainer: {error}") from error
    run.make(config)
    adversarial_examples = next(callback for callback in callbacks if isinstance(callback, AdversarialExamples))
    defense.context = lambda: Context(
        net=defense.net,
        epoch=trainer.current_epoch,
        train_batches=lambda batch_size, augment: iter(data.train_batches(batch_size=batch_size, augment=augment)),
        draw_per_class=lambda n: data.draw_per_class(
            n, generator=keyed_generator(config["seed"], "draw", trainer.global_step)
        ),
        attack=adversarial_examples.attack_of(defense),
    )
    started = time.perf_counter()
    trainer.fit(defense, datamodule=data, ckpt_path=run.last if run.state == "resumed" else None, weights_only=True)
    score = best.best_model_score if best else None
    return {
        "validation": None if score is None else float(score),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "hours_of_last_start": round((time.perf_counter() - started) / 3600, 4),
        "terms": defense.term_history(),
    }


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot give a true number, before anything is built.

    Raises:
        ValueError: naming the keys and the way out.
    """
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
    if {"ema", "swa"} <= set(config["callback"]):
        raise ValueError("callback=[ema,swa]: only one average of the weights can be served; choose one")
    check_devices(config["trainer"])
    check_recipe(config)


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse GPUs that are not there, and several processes in a multirun.

    Raises:
        ValueError: naming the option.
    """
    devices, there = trainer["devices"], torch.cuda.device_count()
    wanted = max(devices, default=0) + 1 if isinstance(devices, list) else process_count(trainer)
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
    except RuntimeError as error:
        raise ValueError(f"model: {name} does not take images {shape} of {data.name}: {error}") from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (2, data.num_classes):
        raise ValueError(
            f"model: {name} gives {found} for images {shape}, but {data.name} has {data.num_classes} classes: expected "
            f"logits (2, {data.num_classes}); set model.num_classes={data.num_classes}"
        )


def check_coupling(config: Mapping[str, Any], defense: Defense) -> None:
    """A term coupled over the batch needs a batch, and the whole of it.

    Raises:
        ValueError: naming the term and the option.
    """
    coupled = defense.coupled_terms()
    if coupled and config["dataset"]["batch_size"] < 2:
        raise ValueError(f"dataset.batch_size=1: {coupled} is computed over a batch; use 2 or more")
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
            raise ValueError(
                f"{group}={config['choices'][group]} would keep the values of recipe {recipe}: {', '.join(kept)}; "
                f"give them on the command line, or use recipe=none"
            )


def first_process() -> bool:
    """Whether this is not a process that another one of the same run has started."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def batch_coupled(net: nn.Module) -> bool:
    """Whether a forward depends on how the global batch is cut: batch norm or dropout."""
    return any(isinstance(module, _BatchNorm | _DropoutNd) for module in net.modules())


def header(config: Mapping[str, Any], run: Run, net: nn.Module) -> dict[str, str]:
    """What a reader wants to know before waiting for a run."""
    choices, attack, optim, data = config["choices"], config["attack"], config["optim"], config["dataset"]
    recipe = choices["recipe"]
    customary = (
        f"none for {choices['defense']}_{choices['dataset']}_{choices['model']}: customary threat model of the data"
    )
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {
        "defense": " + ".join([choices["defense"], *config["regularizer"]]),
        "data": f"{choices['dataset']}, batch {data['batch_size']}, validation {data['val_size']}",
        "model": f"{choices['model']}, {parameters:,} parameters",
        "attack": f"{attack['norm']} eps {attack['eps']}, {attack['steps']} steps of {attack['step_size']}",
        "optimiser": f"{choices['optim']} lr {optim['lr']}, {optim['schedule']}, {optim['epochs']} epochs",
        "recipe": recipe if recipe != "none" else customary + " and default schedule",
        "budget": config["budget"],
        "seed": str(config["seed"]),
        "run": f"{run.folder} ({run.state})",
    }


def main() -> None:
    """The command line."""
    io.run_command(train, "train")


if __name__ == "__main__":
    main()
