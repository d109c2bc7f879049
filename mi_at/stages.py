"""What a run needs trained before: namid its estimators, these their reference network; transfer attacks a surrogate.

Each stage is a run of its own, in a folder of its own beside the others, named by its configuration: it is found again
where it has been trained, by hand or by another run, and continued where it was cut off.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import hashlib
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from mi_at import checks, io
from mi_at.data.base import ImageDataModule
from mi_at.defenses.base import Defense
from mi_at.defenses.mi_estimators import MIEstimators
from mi_at.defenses.standard_at import StandardAT
from mi_at.evaluation.outcomes import CLEAN
from mi_at.functional.geometry import parse_eps
from mi_at.regularizers.namid import AUTO, Namid
from mi_at.results.records import RecordError, config_hash, flat, read_record, run_key
from mi_at.results.runs import NOT_TRAINING, RECORD, TRAINED, find_run
from mi_at.results.runs import Run as RunFolder

DIGEST = "sha256:"
FILES = {"reference": ("net.",), "estimators": ("net.", "natural.", "adversarial.")}
"""Options that hold the checkpoint of a stage, and which of its weights count."""
KEPT = ("seed", "budget", "runs")
PLAIN_EVALUATION = {
    "audit": False,
    "information": [],
    "mutual_information": [],
    "outputs": False,
    "robust_ncmi": False,
    "surrogate": None,
    "survivors": False,
}
"""What an evaluation adds to its attacks, switched off."""
CHECKED_IMAGES = 256
SURROGATE = "evaluation.surrogate"
OF_THE_MACHINE = (
    "dataset.root",
    "dataset.download",
    "dataset.placement",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
)
"""What a surrogate's run takes over of the run that needs it, beside data set and budget."""
Run = Callable[[Mapping[str, Any]], Any]


class StageError(ValueError):
    """A stage that is missing or does not fit; the message names the option and what to do."""


def resolve(config: Mapping[str, Any], train: Run) -> tuple[dict[str, Any], dict[str, Path]]:
    """A configuration in which a stage's file is named by its weights, so that no path is part of a run's identity.

    A surrogate is named as `identify_surrogate` says. `defense=mi_estimators` gets its own optimiser and batch size;
    with `reference=auto` its reference is trained here.

    Args:
        config: resolved, plain values.
        train: trains and evaluates a configuration.

    Returns:
        The configuration, and the files by option ("defense.reference").

    Raises:
        StageError, FileNotFoundError, CheckpointError: a file that cannot be used.
    """
    named, files = identify_surrogate(config)
    if is_a(named["defense"], MIEstimators) and named["defense"]["reference"] == AUTO:
        named["defense"]["reference"] = str(_trained(_reference_run(named), train, named).last)
    for where, node in (("defense", named["defense"]), *_regularizers(named)):
        for option in FILES.keys() & node.keys():
            value = str(node[option])
            if value != AUTO and not value.startswith(DIGEST):
                if not Path(value).is_file():
                    raise FileNotFoundError(
                        f"{where}.{option}: checkpoint {value} does not exist; {option}=auto trains what is needed"
                    )
                files[f"{where}.{option}"] = Path(value)
                node[option] = digest(_state(Path(value)), FILES[option])
    if is_a(named["defense"], MIEstimators):
        _give_own_schedule(named)
    return named, files


def identify_surrogate(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """A copy of a configuration whose `evaluation.surrogate` says which network it is, and where its file is given.

    A checkpoint is named by its weights; a run, such as {model: resnet50, defense: ce}, by the folder it has or will
    have, under the key "run": its configuration is composed, nothing is trained.

    Args:
        config: resolved, plain values.

    Returns:
        The configuration, and the file by the option's name, where it is one.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: a surrogate that cannot be.
    """
    named: dict[str, Any] = copy.deepcopy(dict(config))
    surrogate = named["evaluation"].get("surrogate")
    if isinstance(surrogate, Mapping):
        named["evaluation"]["surrogate"] = {**surrogate, "run": _folder_of(surrogate_run(config))}
    elif surrogate and not str(surrogate).startswith(DIGEST):
        path = Path(str(surrogate))
        try:
            found = io.read_checkpoint(path)
        except io.CheckpointError as error:
            raise StageError(
                f"{SURROGATE}: {error}. Expected a checkpoint of mi_at, or what a run chooses: "
                f"'{SURROGATE}={{model: resnet50, defense: ce}}' trains one"
            ) from error
        named["evaluation"]["surrogate"] = digest(found.net_state, ("",))
        return named, {SURROGATE: path}
    return named, {}


def identify(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as its record has it, without training anything: what a report looks for.

    A surrogate is named as `identify_surrogate` says; the reference of defense=mi_estimators by its weights, where its
    run lies in `runs`, and "auto" where not.

    Args:
        config: resolved, plain values.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: as `identify_surrogate`.
    """
    named, _ = identify_surrogate(config)
    if is_a(named["defense"], MIEstimators):
        if named["defense"]["reference"] == AUTO and (run := _finished(_reference_run(named), processes=1)):
            named["defense"]["reference"] = digest(_state(run.last), FILES["reference"])
        _give_own_schedule(named)
    return named


def surrogate_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the run that trains an evaluation's surrogate, of the same data set and budget, seed 0.

    Args:
        config: resolved; its `evaluation.surrogate` has what the run chooses and sets: {model: resnet50, defense: ce}.

    Raises:
        ValueError: a group or key that there is not; the message says where it stands.
    """
    return copy.deepcopy(_composed(tuple(_surrogate_overrides(config))))


def surrogate_file(config: Mapping[str, Any], files: Mapping[str, Path], train: Run | None) -> Path | None:
    """The checkpoint of an evaluation's surrogate; its run is found, or trained, once for all that need it.

    Args:
        config: as `resolve` or `identify_surrogate` returns it.
        files: likewise.
        train: trains and evaluates a configuration; None: what is missing is refused.

    Returns:
        The file; None where the evaluation needs no surrogate.

    Raises:
        StageError: it is not there and is not to be trained here; the message has the command that trains it.
    """
    surrogate = config["evaluation"].get("surrogate")
    if not surrogate or SURROGATE in files:
        return files.get(SURROGATE)
    if not isinstance(surrogate, Mapping):
        raise StageError(f"{SURROGATE}={surrogate} names weights, but their file is needed: give the checkpoint's path")
    stage = surrogate_run(config)
    command = shlex.join(["python", "-m", "mi_at.train", *_surrogate_overrides(config)])
    if train is None:
        run = _finished(stage, 1)
        if run is None:
            raise StageError(f"{SURROGATE}: {run_key(stage, stage['choices'])} is not in {stage['runs']}: {command}")
    else:
        with isolate_rng():  # the run draws what it would draw without a surrogate
            run = _trained(stage, train, config, command=command)
    return run.checkpoint(stage["select"])


def load_surrogate(
    path: Path | None, config: Mapping[str, Any], device: str | torch.device = "cpu"
) -> io.Surrogate | None:
    """As `io.load_surrogate`, with the clean accuracy that its own record has, where there is one beside it.

    Args:
        path: its checkpoint, as `surrogate_file` returns it; None: there is none.
        config: resolved, of the run whose network is attacked.
        device: where to put it.
    """
    if path is None:
        return None
    found = io.load_surrogate(path, config["dataset"], device)
    with contextlib.suppress(RecordError):
        record = read_record(path.parent / RECORD)
        if record.checkpoint["rule"] == path.stem:
            return replace(found, accuracy=record[CLEAN].accuracy)
    return found


def equip(
    config: Mapping[str, Any], defense: Defense, data: ImageDataModule, files: Mapping[str, Path], train: Run
) -> None:
    """Give a new run what its stages made, and train those that are missing.

    Args:
        config: as `resolve` returns it.
        defense: with its network attached.
        data: set up for fit.
        files: as `resolve` returns them.
        train: trains and evaluates a configuration.

    Raises:
        StageError: a stage that does not fit the run, or estimators that have learnt nothing.
    """
    with isolate_rng():  # the run draws what it would draw without stages
        if isinstance(defense, MIEstimators):
            _take_reference(config, defense, _file(files, "defense.reference", config["defense"]["reference"]))
        for name, term in defense.added_terms().items():
            if isinstance(term, Namid) and term.alpha:
                where = f"regularizer.{name}" if name in config["regularizer"] else "defense"
                if term.estimators == AUTO:
                    then = _estimators_run(config, term)
                    reference = _trained(_reference_run(config), train, config, then=then).last
                    path = _trained(_estimators_run(config, term, reference), train, config).last
                else:
                    path = _file(files, f"{where}.estimators", term.estimators)
                _take_estimators(config, term, path, data, f"{where}.estimators={path}")


def needed(config: Mapping[str, Any], terms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that must be finished before a run trains or is evaluated, the first first; nothing is trained.

    Args:
        config: resolved, plain values.
        terms: of its defense (`Defense.added_terms`).

    Returns:
        Their configurations, as their runs have them where what they need is there already.

    Raises:
        ValueError: a surrogate that cannot be.
    """
    found: list[dict[str, Any]] = []
    auto = [term for term in terms.values() if isinstance(term, Namid) and term.alpha and term.estimators == AUTO]
    if auto or (is_a(config["defense"], MIEstimators) and config["defense"]["reference"] == AUTO):
        found.append(_reference_run(config))
    for term in auto:
        reference = _finished(found[0], 1)
        stage = _estimators_run(config, term, reference.last if reference else AUTO)
        if reference:
            stage, _ = resolve(stage, train=lambda _: None)
        else:
            _give_own_schedule(stage)
        found.append(stage)
    if isinstance(config["evaluation"].get("surrogate"), Mapping):
        found.append(surrogate_run(config))
    return found


def is_a(node: Mapping[str, Any], kind: type) -> bool:
    """Whether a node of a configuration describes this class."""
    return bool(node["_target_"] == f"{kind.__module__}.{kind.__qualname__}")


def digest(state: Mapping[str, Any], prefixes: tuple[str, ...]) -> str:
    """Names weights by their bits.

    Args:
        state: a state dict.
        prefixes: of the names that count.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> same = digest({"net.a": zero, "b": one}, ("net.",)) == digest({"net.a": zero}, ("net.",))
        >>> same and digest({"net.a": zero}, ("net.",)) != digest({"net.a": one}, ("net.",))
        True
    """
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if name.startswith(prefixes) and isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return DIGEST + found.hexdigest()[:12]


# ---------------------------------------------------------------- the stages' configurations
def _reference_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 1 (section 3.2.2): standard adversarial training with the same data, network, attack and optimiser."""
    return _stage(config, "standard_at", {"_target_": f"{StandardAT.__module__}.{StandardAT.__qualname__}"})


def _estimators_run(config: Mapping[str, Any], term: Namid, reference: Path | str = AUTO) -> dict[str, Any]:
    """Stage 2; what the method's options do not say stands in conf/defense/mi_estimators.yaml."""
    written = OmegaConf.load(Path(io.conf_dir()) / "defense" / "mi_estimators.yaml")
    node = io.plain(OmegaConf.create({"budget": config["budget"], "defense": written}))["defense"]
    own = {"objective": term.estimator_objective, "hsize": term.hsize, "epochs": term.estimator_epochs}
    return _stage(config, "mi_estimators", {**node, **own, "reference": str(reference)})


def _stage(config: Mapping[str, Any], defense: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """A run of another defense with everything else alike, evaluated on clean images only."""
    stage = copy.deepcopy(dict(config))
    stage |= {"defense": dict(node), "regularizer": {}, "callback": {}, "select": "last", "init_from": None}
    stage |= {"probe": [], "keep_epochs": [], "run_dir": None, "resume": True, "tags": [], "group": None}
    stage["evaluation"] |= {"attacks": {}, "n": None, "n_of": {}}
    stage["evaluation"] |= {key: off for key, off in PLAIN_EVALUATION.items() if key in stage["evaluation"]}
    stage["logger"] = {name: node for name, node in stage["logger"].items() if name == "csv"}
    stage["trainer"] |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    stage["choices"] |= {"defense": defense, "regularizer": "none", "callback": "none", "evaluation": "none"}
    stage["choices"]["logger"] = ",".join(stage["logger"]) or "none"
    stage["choices"].pop("trained_by", None)  # that is the command of the run that needs it
    return stage


def _surrogate_overrides(config: Mapping[str, Any]) -> list[str]:
    """The command line of a surrogate's run; what is its own comes last and wins."""
    machine: dict[str, Any] = {}
    for key in OF_THE_MACHINE:
        group, _, option = key.partition(".")
        if option in config.get(group, {}):
            machine[key] = config[group][option]
    budget = config["budget"] if config["budget"] in io.names_in("budget") else "paper"
    own = {key: value for key, value in config["evaluation"]["surrogate"].items() if key != "run"}
    values = {
        "dataset": config["choices"]["dataset"],
        "budget": budget,
        "evaluation": "none",
        "runs": config.get("runs", "runs"),
        "trainer.devices": 1,
        **machine,
        **{key: value for key, value in flat(own).items() if value != {}},
    }
    return [f"{key}={_typed(value)}" for key, value in values.items()]


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    try:
        with io.composing():
            stage = io.compose_run(overrides)
            checks.check(stage)
    except ValueError as error:
        raise ValueError(f"{SURROGATE}: {error}") from error
    return stage | {"resume": True}


def _folder_of(stage: Mapping[str, Any]) -> str:
    """What a stage's run folder is called."""
    return f"{run_key(stage, stage['choices'])}-{config_hash(stage, without=NOT_TRAINING)}"


def _give_own_schedule(config: dict[str, Any]) -> None:
    """The estimators' optimiser and batch size (section 4.1) in place of the reference's."""
    own = config["defense"]
    config["optim"] = {
        "_target_": "mi_at.optim.Adam",
        "lr": own["lr"],
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "epochs": own["epochs"],
        "paper_epochs": 25,
        "schedule": "multistep",
        "milestones": own["milestones"],
        "gamma": 0.1,
    }
    config["choices"]["optim"] = "adam"
    config["dataset"]["batch_size"] = min(own["batch_size"], config["dataset"]["train_size"] or own["batch_size"])
    config["trainer"] |= {"max_epochs": own["epochs"], "gradient_clip_val": None}
    config["select"] = "last"


def _regularizers(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in config["regularizer"].items():
        yield f"regularizer.{name}", node


# ---------------------------------------------------------------- finding and training them
def _trained(
    stage: Mapping[str, Any],
    train: Run,
    wanted_by: Mapping[str, Any],
    *,
    then: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> RunFolder:
    """A stage's run, which is trained if it has not been.

    Args:
        stage: its configuration.
        train: trains and evaluates it.
        wanted_by: the configuration of the run that needs it.
        then: what is trained after it.
        command: that trains it by hand; None: that of the run that needs it, with another defense.

    Raises:
        StageError: it has not been, and several processes are to train: they could not wait for it.
    """
    processes = checks.process_count(wanted_by["trainer"])
    if run := _finished(stage, processes):
        return run
    name = run_key(stage, stage["choices"])
    if processes != 1:
        commands = "\n  ".join(command or _command(missing) for missing in (stage, then) if missing is not None)
        raise StageError(
            f"{name} must be trained before, and with several processes a run does not train its stages itself: first "
            f"run\n  {commands}\nwith trainer=ddp where that pays"
        )
    with _alone(Path(stage["runs"]), name):
        if not _finished(stage, processes):
            print(f"\nTrained before, once: {name}", flush=True)
            train(stage)
    run = _finished(stage, processes)
    if run is None:
        raise StageError(f"{name}, which must be trained before, was stopped: start again to continue it")
    return run


def _finished(stage: Mapping[str, Any], processes: int) -> RunFolder | None:
    """The finished run of a stage; it may have been trained on as many processes as are wanted now."""
    named, _ = resolve(stage, train=lambda _: None)
    for count in (None, processes):
        key, parent = run_key(named, named["choices"]), Path(named["runs"])
        run = find_run(named, key=key, parent=parent, resume=True, processes=count)
        if (run.folder / TRAINED).is_file() and run.last.is_file():
            return run
    return None


@contextlib.contextmanager
def _alone(parent: Path, name: str) -> Iterator[None]:
    """Two runs that want the same stage: the second waits, and finds it finished."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the process, however it ends
        yield


def _command(stage: Mapping[str, Any]) -> str:
    """The command that trains a stage by hand: what was typed, without what belongs to the method that needs it."""
    choices = stage["choices"]
    groups = ("dataset", "model", "attack", "optim")
    keys = io.recipe_keys(choices["recipe"]) if choices["recipe"] != "none" else []
    values: Any = [(key, functools.reduce(operator.getitem, key.split("."), stage)) for key in keys]
    from_recipe = [f"{key}={_typed(value)}" for key, value in values if key.split(".")[0] in groups]
    given = list(HydraConfig.get().overrides.task)
    kept = [override for override in given if re.split(r"[.=]", override.lstrip("+~"))[0] in (*groups, *KEPT)]
    known = {override.partition("=")[0] for override in kept}
    recipe = [override for override in from_recipe if override.partition("=")[0] not in known]
    if choices["defense"] == "mi_estimators":
        own = {name: value for name, value in stage["defense"].items() if name not in ("_target_", "reference")}
        kept += [f"defense.{name}={_typed(value)}" for name, value in own.items()]
    words = [f"defense={choices['defense']}", "recipe=none", "evaluation=none", *kept, *recipe]
    return shlex.join(["python", "-m", "mi_at.train", *words])


def _typed(value: Any) -> str:
    """A plain value as it is typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


# ---------------------------------------------------------------- what they made
def _file(files: Mapping[str, Path], option: str, value: str) -> Path:
    if option not in files:
        raise StageError(f"{option}={value} names weights, but a new run needs their file: give the checkpoint's path")
    return files[option]


def _state(path: Path) -> dict[str, Any]:
    io.read_checkpoint(path)  # says what is wrong with it
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return state


def _take_reference(config: Mapping[str, Any], defense: MIEstimators, path: Path) -> None:
    """The reference network's weights."""
    checkpoint = io.read_checkpoint(path)
    _check_same(config, checkpoint.config, f"defense.reference={path}", "network")
    io.load_weights(defense.net, checkpoint)


def _take_estimators(config: Mapping[str, Any], term: Namid, path: Path, data: ImageDataModule, where: str) -> None:
    """The estimators' weights, if they have learnt something."""
    checkpoint = io.read_checkpoint(path)
    made = checkpoint.config
    if not is_a(made["defense"], MIEstimators):
        raise StageError(
            f"{where}: a checkpoint of {made['defense']['_target_']}; expected one of defense=mi_estimators, or auto"
        )
    _check_same(config, made, where, "estimators", any_network=term.any_reference and term.selection == "current")
    try:
        term.take(_state(path))
    except ValueError as error:
        raise StageError(f"{where}: {error}; train them for this run (estimators=auto), or change hsize") from error
    reference = io.build_net(made["model"]).eval()
    io.load_weights(reference, checkpoint)
    batch = next(iter(data.train_batches(batch_size=min(CHECKED_IMAGES, data.batch_size))))
    with torch.no_grad():
        natural = float(term.natural(batch.x, reference(batch.x).float()).mean())
    if not natural > 0:
        problem = (
            f"{where}: the natural information that these estimators see in {len(batch)} training images is "
            f"{natural:.3g} nats, and information is positive: they have learnt nothing"
        )
        if config["budget"] != "smoke":  # whose numbers mean nothing
            raise StageError(f"{problem}; train them longer (estimator_epochs) or wider (hsize)")
        print(f"warning: {problem}", flush=True)


def _check_same(
    config: Mapping[str, Any], made: Mapping[str, Any], where: str, what: str, *, any_network: bool = False
) -> None:
    """Data, norm and network of a stage must be the run's own; another eps is told."""
    pairs = {
        "dataset": (made["dataset"].get("name"), config["dataset"].get("name")),
        "attack.norm": (made["attack"]["norm"], config["attack"]["norm"]),
    }
    if not any_network:
        keys = sorted(made["model"].keys() | config["model"].keys())
        pairs |= {f"model.{key}": (made["model"].get(key), config["model"].get(key)) for key in keys}
    for key, (theirs, own) in pairs.items():
        if theirs != own:
            raise StageError(
                f"{where}: {what} of {key.replace('._target_', '')}={theirs}, but this run has {own}: train the stage "
                "for this run (auto), or give its checkpoint"
            )
    their_eps, own_eps = made["attack"]["eps"], config["attack"]["eps"]
    if parse_eps(their_eps) != parse_eps(own_eps):
        print(f"warning: {where}: {what} of attack.eps={their_eps}, but this run has {own_eps}", flush=True)
