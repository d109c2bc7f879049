"""python -m mi_at.plan table=ncmi_t2: what a table's runs would cost, and how far each of them is; nothing is run.

Further arguments are those of the sweep: budget=short, table.rows=[TRADES], seed=0,1. Hours are those of this machine,
by the finished runs that it has, or of calibrate=true, which runs a few steps of each network now; or, roughly, those
of device=h100 (conf/plan.yaml).
"""

from __future__ import annotations

import copy
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Callback
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mi_at import cells, checks, io, stages
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.defenses.base import Defense
from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.evaluation_cost import evaluation_calls, evaluation_forwards
from mi_at.results.measured import Found, find_records
from mi_at.results.planning import FORMATS, GIB, OFFICIAL, Entry, Plan, Speed, Standing, flop, render, size_of, standing
from mi_at.results.records import config_hash, hardware, run_key
from mi_at.results.rehearsal import Cost, Make, Size, Training, count_forward, count_training, time_step
from mi_at.results.runs import CONFIG, NOT_TRAINING
from mi_at.results.tables import Job, TableError, near_to

SPEED = "speed/images_per_second"
OPTIONS = (
    f"format= {' | '.join(FORMATS)}; device=<name>, efficiency=<share of its peak>; calibrate=true; "
    "records=[folder,...] for other folders of records."
)
IMAGES_OF = ("_target_", "name", "root", "val_size", "fraction", "train_size", "split_seed", "extra")
CALIBRATING_FLOP = 2e11  # a few seconds of a CPU core; the batch is cut to it there
Config = Mapping[str, Any]


def plan(
    overrides: Sequence[str],
    folders: Sequence[str | Path],
    *,
    device: str | None = None,
    efficiency: float | None = None,
    calibrate: bool = False,
) -> Plan:
    """What a table's runs would cost, and how far each is.

    Args:
        overrides: table=<name>, and what else is typed.
        folders: that hold records.
        device: a name of conf/plan.yaml; None: this machine.
        efficiency: share of a named device's peak, in (0, 1], in place of the file's.
        calibrate: run some steps of each network here.

    Raises:
        TableError, ValueError: a name or value that cannot be; the message names the choices.
    """
    named = _named_device(device, efficiency) if device else None
    if calibrate and device:
        raise ValueError(f"calibrate=true measures this machine, device={device} is another: give one of them")
    found, damaged = find_records(folders)
    estimate = _Estimate(found)
    entries: list[Entry] = []
    with io.composing():
        table, jobs = cells.composed(overrides)
        first: dict[str, Config] = {}
        for job in cells.bar(jobs, "runs"):
            if job.cell not in first:
                first[job.cell] = _configuration(job)
            entries += estimate.entries(job.cell, _with_seed(first[job.cell], job.seed))
    speed_of = (lambda config: named) if named else estimate.measured if calibrate else estimate.remembered()
    entries = [replace(entry, speed=speed_of(estimate.configs[entry.run])) for entry in cells.bar(entries, "hours")]
    budget = str(next(iter(first.values()))["budget"])
    title = f"{table.title} (budget {budget})"
    memory = _read_devices()[device]["memory_gib"] * GIB if device else None
    return Plan(title, entries, device or "this machine", memory, damaged)


class _Estimate:
    """Counts of runs that are alike, made once."""

    def __init__(self, found: Sequence[Found]) -> None:
        self.found = found
        self.configs: dict[str, Config] = {}
        self._counts: dict[str, tuple[Training | None, Cost]] = {}
        self._images: dict[str, tuple[int, int, int, str]] = {}
        self._trained: set[str] = set()
        self._validations: dict[Any, Any] = {}
        self._speeds: dict[str, Speed] = {}

    def entries(self, cell: str, config: Config) -> list[Entry]:
        """A run, after those that it needs and that no other has needed so far."""
        defense, _ = _make(config)()
        entries = []
        for stage in stages.needed(config, defense.added_terms()):
            if config_hash(stage, without=NOT_TRAINING) not in self._trained:
                entries.append(self._entry(f"before: {stage['choices']['defense']}", stage, _make(stage)()[0]))
        return [*entries, self._entry(cell, stages.identify_surrogate(config)[0], defense)]

    def _entry(self, cell: str, config: Config, defense: Defense) -> Entry:
        key = run_key(config, config["choices"])
        run = f"{key}-{config_hash(config)}"
        self.configs[run] = config
        train, validation, test, why = self.images(config)
        at = standing(config, key=key, processes=_processes(config, defense), found=self.found, epochs_of=_epochs_of)
        if why and at.state not in ("done", "running"):
            at = Standing("no data", why=why)
        alike = config_hash(config, without=("seed", "dataset.seed"))
        if alike not in self._counts:
            size = size_of(config, train, validation) if train else None
            self._counts[alike] = (
                _count(config, size, self._validations) if size else None,
                _evaluation(config, test) if test else Cost(),
            )
        training, evaluation = self._counts[alike]
        training_hash = config_hash(config, without=NOT_TRAINING)
        trains = training_hash not in self._trained
        self._trained.add(training_hash)
        data = config["dataset"]
        images = OFFICIAL.get(str(data["name"]), (train + validation,))[0]
        return Entry(
            cell=cell,
            seed=int(config["seed"]),
            run=run,
            epochs=training.size.epochs if training else int(config["optim"]["epochs"]),
            standing=at,
            training=training,
            evaluation=evaluation.total,
            evaluation_calls=evaluation.calls,
            speed=None,
            data_bytes=images * int(data["channels"]) * int(data["image_size"]) ** 2,
            trains=trains,
        )

    def images(self, config: Config) -> tuple[int, int, int, str]:
        """Training, validation and test images, 0 where that is not known, and what is missing of the data."""
        node = config["dataset"]
        key = json.dumps([node[name] for name in IMAGES_OF])
        if key not in self._images:
            official, test = OFFICIAL.get(str(node["name"]), (0, 0))
            rest = official - int(node["val_size"])
            by_number = node["train_size"] or max(0, round(rest * float(node["fraction"])))
            found = (min(int(by_number), max(rest, 0)), int(node["val_size"]) if official else 0, test, "")
            try:
                data = io.build_data(node)
                data.setup("fit")
                found = (len(data.train_index), len(data.val_index), test, "")
                if not test:
                    data.setup("test")
                    found = (*found[:2], data.test_dataloader().num_images, "")
            except OSError as error:
                found = (*found[:3], str(error))
            self._images[key] = found
        return self._images[key]

    def measured(self, config: Config) -> Speed:
        """Some steps of a network on this machine, now."""
        name = _network(config)
        if name not in self._speeds:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            train, validation, _, _ = self.images(config)
            size = size_of(config, max(train, 1), validation)
            count = _count(config, replace(size, epochs=1, validation=0, validations=0))
            per_image = count.step.total / size.batch
            few = max(2, math.floor(CALIBRATING_FLOP / per_image))
            batch = size.batch if device.type == "cuda" else min(size.batch, few)
            bf16 = config["trainer"]["precision"] != "32-true"
            timed = replace(size, batch=batch)
            seconds, steps = time_step(_make(config, weights=True), timed, device=device, bf16=bf16)
            rate = per_image * batch / seconds
            where, choices = hardware(device), config["choices"]
            how = (
                f"{choices['model']} at {flop(rate)}FLOP/s, measured now on {where.get('gpu') or where['cpu']} "
                f"({where['threads']} threads): {steps} step{'s' * (steps > 1)} of {batch} images, {choices['defense']}"
            )
            self._speeds[name] = Speed(rate, rate, rate, how)
        return self._speeds[name]

    def remembered(self) -> Callable[[Config], Speed | None]:
        """What the finished runs of this machine say, by network; a network without any gets the others' mean."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        here = hardware(device)
        for each in sorted(self.found, key=lambda each: each.record.date):
            if each.record.hardware == here and (speed := _speed_of_run(each)):
                config, rate = speed
                self._speeds[_network(config)] = rate
        known = list(self._speeds.values())

        def speed_of(config: Config) -> Speed | None:
            if not known:
                return None
            own = self._speeds.get(_network(config))
            return own or Speed(
                fp32=statistics.fmean(speed.fp32 for speed in known),
                bf16=statistics.fmean(speed.bf16 for speed in known),
                evaluation=statistics.fmean(speed.evaluation for speed in known),
                how=f"no run of {config['choices']['model']} here: the mean of the others'",
            )

        return speed_of


# ---------------------------------------------------------------- what a configuration makes
def _make(config: Config, *, weights: bool = False) -> Make:
    """Gives its defense and the callbacks that compute; without weights, on the meta device."""

    def make() -> tuple[Defense, list[Callback]]:
        with torch.device("cpu" if weights else "meta"):
            net = io.build_net(config["model"])
        defense = io.build_defense(config, net)
        defense.optimisation = io.build("optim", config["optim"])
        defense.inspect_every = config["trainer"]["inspect_every"]
        budget: InnerMaximisation = io.build("attack", config["attack"])
        others = [io.build(f"callback.{name}", node) for name, node in config["callback"].items()]
        return defense, [AdversarialExamples(budget, seed=config["seed"]), *others]

    return make


def _count(config: Config, size: Size, validations: dict[Any, Any] | None = None) -> Training:
    bf16 = config["trainer"]["precision"] != "32-true"
    return count_training(_make(config), size, bf16=bf16, validations=validations)


def _evaluation(config: Config, test: int) -> Cost:
    """Of an evaluation at most; that of transfer attacks as if the surrogate were of the network's size."""
    attacks = {name: attack.describe() for name, attack in io.build_attacks(config["evaluation"]).items()}
    asked = {CLEAN: {"attack": CLEAN}, **attacks}, config["evaluation"]
    with torch.device("meta"):
        net = io.build_net(config["model"])
    size = size_of(config, 1, 0)
    forward = count_forward(net, size)
    forwards = evaluation_forwards(*asked, images=test, num_classes=size.num_classes)
    calls = evaluation_calls(*asked, images=test, num_classes=size.num_classes, forward=forward.calls)
    return replace(forward * forwards, calls=calls)


def _processes(config: Config, defense: Defense) -> int | None:
    """That train, where their number can change a result."""
    batch_norm = any(isinstance(module, _BatchNorm | _DropoutNd) for module in defense.net.modules())
    joint = bool(io.build("attack", config["attack"]).joint)
    return checks.process_count(config["trainer"]) if batch_norm or joint else None


def _network(config: Config) -> str:
    """What a speed belongs to: a network on images of a size."""
    return f"{config['choices']['model']} {config['dataset']['image_size']} {config['trainer']['precision']}"


def _epochs_of(path: Path) -> int:
    return io.read_checkpoint(path).epoch


# ---------------------------------------------------------------- devices and runs that say how fast they are
def _read_devices() -> dict[str, dict[str, float]]:
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(io.conf_dir()) / "plan.yaml"))
    return {name: {key: float(value) for key, value in values.items()} for name, values in node["devices"].items()}


def _named_device(name: str, efficiency: float | None) -> Speed:
    """A device's nominal speed.

    Raises:
        ValueError: there is none of this name, or a share that cannot be.
    """
    devices = _read_devices()
    if name not in devices:
        near = near_to(name, list(devices))
        raise ValueError(f"device={name}: expected one of {', '.join(devices)} (conf/plan.yaml){near}")
    values = devices[name]
    share = values["efficiency"] if efficiency is None else efficiency
    if not 0 < share <= 1:
        raise ValueError(f"efficiency={share}: expected a share of the peak in (0, 1]")
    fp32, bf16 = values["fp32"], values["bf16"]
    launch = values.get("launch", 0.0)
    waits = f", or {1e6 * launch:g} us an operation where that takes longer, as in small networks," if launch else ","
    how = (
        f"{share:.0%} of the nominal {fp32 / 1e12:g} TFLOP/s ({bf16 / 1e12:g} in bfloat16){waits} not measured: "
        "calibrate=true on the device itself"
    )
    return Speed(fp32 * share, bf16 * share, fp32 * share, how, launch)


def _speed_of_run(found: Found) -> tuple[Config, Speed] | None:
    """A finished run's configuration and speed, by its images per second and its attacks' seconds.

    Returns:
        None where the run did not write them.
    """
    folder, record = found.path.parent, found.record
    try:
        config = json.loads((folder / CONFIG).read_text())["config"]
        with (folder / "metrics.csv").open() as file:
            logged = [float(row[SPEED]) for row in csv.DictReader(file) if row.get(SPEED)]
        size = size_of(config, OFFICIAL[config["dataset"]["name"]][0], 0)
        count = _count(config, replace(size, epochs=1, validation=0, validations=0))
    except (OSError, ValueError, KeyError):  # of another version, or not a run's folder
        return None
    rows = {row.name: row for row in record.attacks if row.seconds and not row.name.startswith("worst of")}
    seconds = sum(row.seconds for row in rows.values())
    if not logged or not seconds:
        return None
    rate = count.step.total / size.batch * statistics.median(logged)
    plain = {**config, "evaluation": {**config["evaluation"], **stages.PLAIN_EVALUATION}}
    bound = _evaluation(plain, rows[CLEAN].n).total
    how = f"{config['choices']['model']} at {rate / 1e9:.3g} GFLOP/s, by {found.path}"
    return config, Speed(rate, rate, bound / seconds, how)


# ---------------------------------------------------------------- the command line
def _configuration(job: Job) -> Config:
    try:
        config = io.compose_run(job.overrides)
        checks.check(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"cell {job.cell}: {io.explain(error)} (table.rows=[...] says which cells)") from error
    return config


def _with_seed(config: Config, seed: int) -> Config:
    """The same cell with another seed of training, which the data's own follows."""
    other: dict[str, Any] = copy.deepcopy(dict(config))
    if other["dataset"]["seed"] == other["seed"]:
        other["dataset"]["seed"] = seed
    return other | {"seed": seed}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(f"{__doc__}\n{OPTIONS}")
        return
    options = {"format": "terminal", "records": "", "device": "", "efficiency": "", "calibrate": "false"}
    io.quiet()
    io.reuse_memory()  # a calibration is to be as fast as training
    try:
        own, overrides, folders = cells.split_arguments(given, options)
        if own["format"] not in FORMATS:
            raise TableError(f"format={own['format']}: expected one of {', '.join(FORMATS)}")
        if own["calibrate"] not in ("true", "false"):
            raise ValueError(f"calibrate={own['calibrate']}: expected true or false")
        if own["efficiency"] and not own["device"]:
            raise ValueError(f"efficiency={own['efficiency']}: of which device? give device= too")
        made = plan(
            overrides,
            folders,
            device=own["device"] or None,
            efficiency=float(own["efficiency"]) if own["efficiency"] else None,
            calibrate=own["calibrate"] == "true",
        )
    except (*io.USER_ERRORS, TableError) as error:
        sys.exit(f"error: {io.explain(error)}")
    print(render(made, own["format"]), end="")


if __name__ == "__main__":
    main()
