"""python -m mi_at.train: train one classifier, evaluate it, record the result."""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mi_at import checks, io, stages
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.checkpoints import AtomicCheckpointIO, Best, KeepEpochs, Last, Preemption
from mi_at.callbacks.probe import Probe
from mi_at.callbacks.progress import Progress
from mi_at.callbacks.sample_grid import SampleGrid
from mi_at.callbacks.speed import Speed
from mi_at.cells import left_to_cells, typed_words
from mi_at.data.base import ImageDataModule
from mi_at.data.seeding import keyed_generator
from mi_at.defenses.base import Defense
from mi_at.evaluation.evaluate import check_taps, sizes
from mi_at.evaluation.outcomes import EvalAttack
from mi_at.regularizers.base import Context
from mi_at.results import loggers
from mi_at.results.measure import measure
from mi_at.results.records import config_hash, git_at_start, read_record, run_key
from mi_at.results.runs import EVALUATIONS, RECORD, Run, find_run, is_kept, let_go_of_all
from mi_at.results.terminal import print_header, print_table

OWN_TRAINER_OPTIONS = ("channels_last", "compile", "inspect_every")
RANKS = (("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",))
"""Variables that say which of a run's processes this is, those that decide first."""


def train(cfg: DictConfig) -> float | None:
    """Train, evaluate and record one configuration.

    Args:
        cfg: conf/train.yaml, composed.

    Returns:
        The best robust accuracy on validation in percent (what a sweep maximises), where there is a validation split.
    """
    config = io.resolve(cfg)
    checks.check(config)
    config["choices"]["trained_by"] = typed_words()
    try:
        return run_once(config)
    finally:
        let_go_of_all()  # in a sweep the process lives on, and others may be waiting


def run_once(config: Mapping[str, Any]) -> float | None:
    """`train` for a resolved and checked configuration; stages that it needs are trained by this function too.

    Args:
        config: plain values.

    Returns:
        As `train`.
    """
    git_at_start()
    config, files = stages.resolve(config, run_once)
    own = {name: config["trainer"][name] for name in OWN_TRAINER_OPTIONS}
    lightning = {name: value for name, value in config["trainer"].items() if name not in OWN_TRAINER_OPTIONS}

    # Everything that can be wrong is built before a folder is made.
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    net = io.build_net(config["model"])
    defense = io.build_defense(config, net)
    defense.optimisation = io.build("optim", config["optim"])
    if config["init_from"]:
        io.load_weights(net, io.read_checkpoint(config["init_from"]))
    defense.inspect_every = own["inspect_every"]
    data = io.build_data(config["dataset"])
    budget: InnerMaximisation = io.build("attack", config["attack"])
    attacks = io.build_attacks(config["evaluation"])
    extra_callbacks = [io.build(f"callback.{name}", node) for name, node in config["callback"].items()]
    data.prepare_data()  # downloads, where asked
    data.setup("test")  # a missing file or too few images are found now, not after hours of training
    sizes(attacks, data.test_dataloader().num_images, n=config["evaluation"]["n"], n_of=config["evaluation"]["n_of"])
    data.setup("fit")  # forgets the test split
    checks.check_net(net, data)
    checks.check_coupling(config, defense)

    processes = checks.process_count(lightning)
    processes_matter = batch_coupled(net) or budget.joint
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
    elif run.state in ("trained", "finished"):
        return None  # the first process evaluates
    surrogate_file = None if run.state == "finished" else stages.surrogate_file(config, files, run_once)
    if run.state in ("new", "resumed"):  # what the attacks lack is found now too
        surrogate = stages.load_surrogate(surrogate_file, config)
        check_taps(defense.net, io.bind(attacks, surrogate=surrogate, defense=defense))
    if run.state == "new":
        stages.equip(config, defense, data, files, run_once)
    if run.state == "resumed":
        io.read_checkpoint(run.last)  # says what is wrong with a damaged one
    if run.state == "finished":
        record = read_record(run.record)
        print_table(record)
        return record.training.get("validation")
    if run.state == "trained":
        run.make(config, alone=first_process())  # nobody else evaluates it meanwhile

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
            *([Probe(probe, folder=run.folder, ncmi=config["probe_ncmi"])] if probe else []),
            SampleGrid(run.folder),
            *([Speed(adversarial_examples), LearningRateMonitor("epoch")] if recorders else []),
            *([Progress()] if lightning["enable_progress_bar"] else []),
        ]
        notes = fit(config, run, defense, data, callbacks, recorders, lightning)
        if not first_process():
            return None
        run.write_training({**notes, "precision": lightning["precision"], "attack_precision": budget.precision})
    training = run.read_training()

    served = io.read_checkpoint(run.checkpoint(config["select"]))
    rule = served.path.stem
    checkpoint = {"rule": rule, "epoch": served.epoch, "step": served.step}
    device = "cuda" if lightning["accelerator"] != "cpu" and torch.cuda.is_available() else "cpu"
    measured = functools.partial(
        measure,
        data=data,
        device=device,
        processes=processes,
        processes_matter=processes_matter,
        training=training,
        progress=lightning["enable_progress_bar"],
    )
    with loggers.ended_on_failure(recorders):
        for label, other in served_otherwise(config, defense, attacks):
            print(f"\nThe same weights {label}:")
            name = f"{rule}-{config['choices']['evaluation']}-{label.replace(' ', '_')}-{config_hash(other)}"
            measured(
                rebuilt(other, served),
                {attack: attacks[attack] for attack in other["evaluation"]["attacks"]},
                config=other,
                checkpoint=checkpoint | {"served": label},
                path=run.folder / EVALUATIONS / name / RECORD,
            )
        data.setup("test")
        surrogate = stages.load_surrogate(surrogate_file, config, device)
        ready = io.serve(served, attacks, config, data, device=device, surrogate=surrogate)
        record = measured(
            ready.net,
            ready.attacks,
            config=config,
            checkpoint=checkpoint,
            path=run.record,
            adaptive=ready.adaptive,
            variants=ready.variants,
            critics=ready.critics,
        )
        loggers.log_evaluation(recorders, record, step=training["steps"], path=run.record)
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
    except TypeError as error:  # Lightning's answer to a value of the wrong kind
        raise ValueError(f"trainer: {error}") from error
    run.make(config, alone=first_process())
    adversarial_examples = next(callback for callback in callbacks if isinstance(callback, AdversarialExamples))
    defense.context = lambda epoch: Context(
        net=defense.net,
        epoch=epoch,
        scaled=defense.scaled,
        train_batches=lambda batch_size, augment: iter(
            data.train_batches(batch_size=batch_size, augment=augment, epoch=epoch)
        ),
        draw_per_class=lambda n: data.draw_per_class(
            n, generator=keyed_generator(config["seed"], "draw", trainer.global_step)
        ),
        attack=adversarial_examples.attack_of(defense, epoch),
    )
    started = time.perf_counter()
    trainer.fit(defense, datamodule=data, ckpt_path=run.last if run.state == "resumed" else None, weights_only=True)
    score = best.best_model_score if best else None
    return {
        "validation": None if score is None else float(score),
        "validation_last": best.last_score if best else None,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "hours_of_last_start": round((time.perf_counter() - started) / 3600, 4),
        "terms": defense.term_history(),
        "readings": defense.reading_history(),
        "settings": defense.settings(),
    }


def served_otherwise(
    config: Mapping[str, Any], defense: Defense, attacks: Mapping[str, EvalAttack]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations that serve the same weights in another way, such as without a mask.

    Args:
        config: resolved.
        defense: with its terms.
        attacks: of the evaluation.

    Yields:
        What it is, and the configuration; of the attacks those of one gradient search remain, which cost little.
    """
    quick = [name for name, attack in attacks.items() if is_quick(attack.describe())]
    for name, term in defense.added_terms().items():
        for label, options in term.alternatives().items():
            other = copy.deepcopy(dict(config))
            group, key = (other["regularizer"], name) if name in other["regularizer"] else (other, "defense")
            group[key] = OmegaConf.to_container(OmegaConf.merge(group[key], options))
            own = other["evaluation"]
            own["attacks"] = {attack: own["attacks"][attack] for attack in quick}
            own["n_of"] = {attack: n for attack, n in own["n_of"].items() if attack in quick}
            own.update({option: value for option, value in stages.PLAIN_EVALUATION.items() if option in own})
            yield label, other


def is_quick(description: Mapping[str, Any]) -> bool:
    """Whether an attack is one search along the gradient, from one start.

    Example:
        >>> is_quick({"attack": "pgd", "steps": 20}), is_quick({"attack": "pgd", "restarts": 10})
        (True, False)
    """
    return description["attack"] in ("fgsm", "pgd") and description.get("restarts", 1) == 1


def rebuilt(config: Mapping[str, Any], checkpoint: io.Checkpoint) -> nn.Module:
    """The network of a configuration with the weights of a checkpoint, in eval mode."""
    net = io.build_net(config["model"])
    io.build_defense(config, net)
    io.load_weights(net, checkpoint)
    return net.eval()


def first_process() -> bool:
    """Whether this is the only process of a run or, of those on all its machines, the first.

    torchrun sets RANK, Lightning LOCAL_RANK for the processes that it starts, the user NODE_RANK, srun SLURM_PROCID.
    """
    by = next((names for names in RANKS if any(name in os.environ for name in names)), ())
    return not any(int(os.environ.get(name, 0)) for name in by)


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
    state = "another process is at it" if run.state != "finished" and is_kept(run.folder) else run.state
    return {
        "defense": " + ".join([choices["defense"], *config["regularizer"]]),
        "data": f"{choices['dataset']}, batch {data['batch_size']}, validation {data['val_size']}",
        "model": f"{choices['model']}, {parameters:,} parameters",
        "attack": f"{attack['norm']} eps {attack['eps']}, {attack['steps']} steps of {attack['step_size']}",
        "optimiser": f"{choices['optim']} lr {optim['lr']}, {optim['schedule']}, {optim['epochs']} epochs",
        "recipe": recipe if recipe != "none" else customary + " and default schedule",
        "budget": config["budget"],
        "seed": str(config["seed"]),
        "run": f"{run.folder} ({state})",
    }


def main() -> None:
    """The command line."""
    sys.argv[1:] = left_to_cells(sys.argv[1:])
    io.run_command(train, "train")


if __name__ == "__main__":
    main()
