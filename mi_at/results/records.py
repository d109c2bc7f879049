"""Records: one measured evaluation as a JSON document, with the per-sample outcomes beside it.

A record says how its number came about: attacks, eps, n, split, checkpoint rule, seeds, commit, resolved
configuration and its hash, versions, hardware. It is written whole or not at all, and checked when read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import CLEAN, AttackResult, EvaluationResult
from mi_at.functional.geometry import parse_eps
from mi_at.version import __version__

SCHEMA = 1

NOT_HASHED: tuple[str, ...] = (
    # where things go, and how they are shown
    "hydra",
    "logger",
    "runs",
    "run_dir",
    "output",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.inspect_every",
    "evaluation.progress",
    # what a run is called (what was chosen stands in the groups themselves), and what it belongs to
    "choices",
    "tags",
    "group",
    "table",
    "cell",
    # how it continues, and what else it keeps
    "resume",
    "checkpoint",
    "keep_epochs",
    "save_every_n_steps",
    "probe",
    "probe_ncmi",
    # where it runs: the same numbers on any number of processes (DESIGN: exceptions pass `processes`)
    "device",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    # where the official data lie; a folder of one's own pictures (dataset=folder) is its root, which stays
    "dataset.root",
    "dataset.download",
    "dataset.placement",
    "dataset.eval_batch_size",
)
"""Keys, with all below them, that cannot change a number."""

OFF: Mapping[str, Any] = {
    "evaluation.audit": False,
    "evaluation.information": [],
    "evaluation.robust_ncmi": False,
    "evaluation.surrogate": None,
    "evaluation.survivors": False,
    "evaluation.outputs": False,
    "evaluation.mutual_information": [],
    # of namid, in either place (no other defense has an option of this name)
    "regularizer.namid.information": "both",
    "defense.information": "both",
    # of trades
    "defense.ce_view": "clean",
    "defense.attack_objective": "kl",
    # of any attack: what its class takes where nothing is said
    "evaluation.attacks.*.restarts": 1,
    "evaluation.attacks.*.kappa": 0.0,
    "evaluation.attacks.autoattack.attacks": None,
    "evaluation.attacks.autoattack.queries": 5000,
    "evaluation.attacks.autoattack.targets": 9,
}
"""Options that change nothing at these values: left out there, so that what had no such option keeps its hash."""

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scikit-learn",
    "pyautoattack",
)


class RecordError(ValueError):
    """A record that cannot be read or written; the message names the file and what to do."""


SETTINGS = ("attack", "norm", "eps", "steps", "step_size", "n")
NOT_SETTINGS = ("name", "guides", "library", "batch_size", "seed", "fallback", "raw_accuracy", "members")
"""What two rows must have in common to be one measurement; and what of their descriptions need not be equal."""


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """One row: an attack, what it was, and the number.

    Attributes:
        name: in the evaluation's config ("pgd_20"); "clean", and "worst of a, b" for worst cases.
        attack: the kind of attack ("pgd").
        norm, eps, steps, step_size: as it described itself; None where it has none.
        n: the first n samples of the split.
        correct: how many stayed right.
        accuracy: correct / n, in [0, 1].
        interval: 95 % Wilson interval of the accuracy.
        max_distance: the farthest an image moved, in the attack's norm.
        unmoved: right samples that came back as they were.
        seconds: wall-clock time.
        flags: what is doubtful about the number; messages: a sentence per flag, where there is one.
        description: all that the attack said of itself.
    """

    name: str
    attack: str
    norm: str | None
    eps: float | str | None
    steps: int | None
    step_size: float | str | None
    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    max_distance: float
    unmoved: int
    seconds: float
    flags: tuple[str, ...] = ()
    messages: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    def unlike(self, other: AttackRecord) -> list[str]:
        """Settings in which two rows are not one measurement, ["steps 20 and 40"]; empty where they are.

        What an older record does not know counts as equal.
        """
        one, two = self.description, other.description
        pairs = {what: (getattr(self, what), getattr(other, what)) for what in SETTINGS}
        pairs |= {what: (one[what], two[what]) for what in one.keys() & two.keys() - {*SETTINGS, *NOT_SETTINGS}}
        pairs["of"] = (one.get("of"), two.get("of"))
        return [f"{what} {a} and {b}" for what, (a, b) in sorted(pairs.items()) if _canonical(a) != _canonical(b)]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured evaluation of one network.

    Attributes:
        key: readable name of the run (`run_key`).
        names: what was chosen from each config group, e.g. {"defense": "mimae", "evaluation": "quick"}.
        split: which data; the test split of the data set.
        order: which samples and in what order.
        attacks: the rows.
        checkpoint: {"rule": "best" or "last" or an epoch, "epoch": ..., "step": ...}: which weights, and why.
        seed: of training. evaluation_seed: of the attacks' noise.
        budget: "paper", "short" or "smoke".
        processes: that trained. git: {"commit": None outside a checkout, "dirty": ...}.
        config_hash: of `config`, and of `processes` where they matter.
        config: resolved, without the keys that cannot change a number.
        versions, hardware: what it ran on.
        seconds: the evaluation's time. date: UTC, ISO 8601.
        training: notes of the run, e.g. shares of the loss terms, precision of the attack, hours.
        tags: what the run belongs to, e.g. {"table": "mimae_t8", "cell": "mimae"}.
        information: CMI, separation and NCMI of all outputs, by attack and "clean", where they were asked for.
        audit: {"verdict", "findings", ...} (`mi_at.evaluation.audit_findings.Audit.plain`), where there was one.
        identity: of the network and the samples (`mi_at.evaluation.outcomes.Identity.plain`).
        schema: of this document.
    """

    key: str
    names: dict[str, Any]
    split: str
    order: str
    attacks: tuple[AttackRecord, ...]
    checkpoint: dict[str, Any]
    seed: int
    evaluation_seed: int
    budget: str
    processes: int
    git: dict[str, Any]
    config_hash: str
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    date: str
    training: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    information: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __getitem__(self, name: str) -> AttackRecord:
        """The row of an attack.

        Raises:
            KeyError: no such row; the message lists the names.
        """
        for row in self.attacks:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: expected one of {', '.join(row.name for row in self.attacks)}")


def make_record(
    result: EvaluationResult,
    *,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    names: Mapping[str, Any] | None = None,
    split: str = "test",
    processes: int = 1,
    processes_matter: bool = False,
    device: torch.device | str = "cpu",
    training: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    information: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
) -> Record:
    """Everything a number needs to be believed.

    Args:
        result: the outcomes.
        config: the resolved configuration (`OmegaConf.to_container(cfg, resolve=True)`).
        checkpoint: which weights: at least {"rule": ...}.
        names: what was chosen from each config group; see `run_key`.
        split: the evaluated split.
        processes: that trained.
        processes_matter: whether their number could change the number, and so is part of the hash.
        device: that evaluated.
        training: notes on the run.
        tags: what it belongs to.
        information: of all outputs (`mi_at.evaluation.information`).
        audit: what it found (`Audit.plain()`).

    Returns:
        The record; its values are plain.

    Raises:
        RecordError: a value that JSON has no word for.
    """
    if "rule" not in checkpoint:
        raise RecordError(f"checkpoint={dict(checkpoint)}: expected a key 'rule' (best, last, epoch_076)")
    evaluated = _plain(hashed_part(config), "config")
    return Record(
        key=run_key(config, names),
        names=_plain(dict(names or {}), "names"),
        split=split,
        order="the first n samples of the split, in the order of its files",
        attacks=tuple(_row(row) for row in result.rows()),
        checkpoint=_plain(dict(checkpoint), "checkpoint"),
        seed=int(config.get("seed", 0)),
        evaluation_seed=result.seed,
        budget=str(config.get("budget", "paper")),
        processes=processes,
        git=dict(git_at_start()),
        config_hash=config_hash(config, processes=processes if processes_matter else None),
        config=evaluated,
        versions=versions(),
        hardware=hardware(device),
        seconds=round(result.seconds, 3),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        training=_plain(dict(training or {}), "training"),
        tags=_plain(dict(tags or {}), "tags"),
        information=_plain(dict(information or {}), "information"),
        audit=_plain(dict(audit or {}), "audit"),
        identity=result.identity.plain() if result.identity else {},
    )


def _row(result: AttackResult) -> AttackRecord:
    description = _plain(dict(result.description), f"description of {result.name}")
    low, high = result.interval
    return AttackRecord(
        name=result.name,
        attack=str(description.get("attack", result.name)),
        norm=description.get("norm"),
        eps=description.get("eps"),
        steps=description.get("steps"),
        step_size=description.get("step_size"),
        n=result.n,
        correct=int(result.correct.sum()),
        accuracy=result.accuracy,
        interval=(low, high),
        max_distance=result.max_distance,
        unmoved=0 if result.name == CLEAN else result.unmoved,
        seconds=round(result.seconds, 3),
        flags=result.flags,
        messages=dict(result.messages),
        description=description,
    )


# ------------------------------------------------------------------------------------------ names and hashes


def run_key(config: Mapping[str, Any], names: Mapping[str, Any] | None = None) -> str:
    """A readable name of a run: `<defense>[+<regularizer>...]-<dataset>-<model>-s<seed>`.

    Args:
        config: the resolved configuration.
        names: what was chosen from the groups defense, dataset, model and regularizer; where one is missing,
            the section's `name`, or the last part of its `_target_` in snake case.

    Example:
        >>> run_key({"seed": 0}, {"defense": "mimae", "dataset": "cifar100", "model": "wrn34_10"})
        'mimae-cifar100-wrn34_10-s0'
        >>> config = {"defense": "ce", "dataset": {"name": "digits"}, "model": {"_target_": "my.Net"},
        ...           "regularizer": {"mi": {}}, "seed": 1}
        >>> run_key(config)
        'ce+mi-digits-net-s1'

    A network trained elsewhere has neither: `<file of weights>-<dataset>-<model>`.

        >>> run_key(config, {"weights": "theirs"})
        'theirs-digits-net'
    """
    names = names or {}
    if "weights" in names:
        return "-".join(_name(group, config, names) for group in ("weights", "dataset", "model"))
    defense, dataset, model = (_name(group, config, names) for group in ("defense", "dataset", "model"))
    added = names.get("regularizer", list(config.get("regularizer") or {}))
    regularizers = added.split(",") if isinstance(added, str) else list(added or ())
    first = "+".join([defense, *(name for name in regularizers if name != "none")])
    return f"{first}-{dataset}-{model}-s{config.get('seed', 0)}"


def _name(group: str, config: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    section = names.get(group, config.get(group))
    if isinstance(section, Mapping):
        target = str(section.get("_target_", "unnamed")).rsplit(".", 1)[-1]
        section = section.get("name") or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", target).lower()
    # Names become folders.
    return re.sub(r"[^\w.+-]", "_", str(section))


def config_hash(config: Mapping[str, Any], *, without: Sequence[str] = (), processes: int | None = None) -> str:
    """Twelve hexadecimal digits of SHA-256 over all that can change a number.

    1, 1.0 and "1/1" are the same number; the order of keys does not matter.

    Args:
        config: the resolved configuration, plain values.
        without: more keys to leave out, e.g. "evaluation" for the hash of a training run.
        processes: number of processes, where it can change a number (dropout or batch norm under DDP, attacks
            in train mode); None leaves it out.

    Example:
        >>> config_hash({"seed": 0, "logger": "csv"}) == config_hash({"logger": None, "seed": 0.0})
        True
    """
    content: Any = _canonical(hashed_part(config, without))
    if processes is not None and processes != 1:
        content = [content, {"processes": processes}]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys in which two seeds of one experiment differ; a data set takes the run's seed unless it is given its own.

    Example:
        >>> seed_keys({"seed": 1, "dataset": {"seed": 1}}), seed_keys({"seed": 1, "dataset": {"seed": 7}})
        (('seed', 'dataset.seed'), ('seed',))
    """
    own = (config.get("dataset") or {}).get("seed") == config.get("seed")
    return ("seed", "dataset.seed") if own else ("seed",)


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's values by their whole keys; an empty section is a value.

    Example:
        >>> flat({"optim": {"lr": 0.1, "extra": {}}, "seed": 0})
        {'optim.lr': 0.1, 'optim.extra': {}, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def hashed_part(config: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration without the keys that cannot change a number; empty sections stay."""
    left_out = {*NOT_HASHED, *without}
    dataset = config.get("dataset")
    if isinstance(dataset, Mapping) and dataset.get("name") == "folder":
        left_out.discard("dataset.root")
    return _pruned(config, left_out, "")


def _pruned(section: Mapping[str, Any], left_out: set[str], prefix: str) -> dict[str, Any]:
    return {
        str(key): _pruned(value, left_out, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in section.items()
        if f"{prefix}{key}" not in left_out and not _is_off(f"{prefix}{key}", value)
    }


def _is_off(key: str, value: Any) -> bool:
    any_attack = re.sub(r"^(evaluation\.attacks)\.[^.]*\.", r"\1.*.", key)
    return any(name in OFF and OFF[name] == value for name in (key, any_attack))


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*/\s*\d+\s*", value):
        value = parse_eps(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return value if isinstance(value, str | bool | None) else str(value)


# -------------------------------------------------------------------------------------- where a number came
# from


def git_state() -> dict[str, Any]:
    """The commit of the checkout this package lies in, and whether files differ; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    # A package installed into an environment inside some other repository is not a checkout.
    if top is None or Path(top) / "mi_at" != package:
        return {"commit": None, "dirty": None}
    status = _git(package, "status", "--porcelain")
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@functools.cache
def git_at_start() -> Mapping[str, Any]:
    """`git_state` when this was first called; the commands call it as they start.

    The code that runs is that of then, whatever has been checked out or edited hours later.
    """
    return git_state()


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those a number depends on; absent ones are left out."""
    found = {"python": platform.python_version(), "mi_at": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    # The wheel's metadata may lack the local part that tells a CUDA build.
    found["torch"] = str(torch.__version__)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ran: the device, the processor and its cores, the GPU where one was used."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------ on
# disk


def write_record(path: str | Path, record: Record, result: EvaluationResult | None = None) -> Path:
    """Write a record, and the per-sample outcomes first, beside it, with the ending .npz.

    Args:
        path: of the JSON document.
        record: what to write.
        result: the outcomes.

    Returns:
        The path of the record.

    Raises:
        RecordError: the folder cannot be written; a previous record is intact.
    """
    path = Path(path)
    if result is not None:
        write_outcomes(path.with_suffix(".npz"), result)
    text = json.dumps(asdict(record), indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())
    return path


def read_record(path: str | Path) -> Record:
    """Read and check a record, its counts also against the outcomes beside it, where they are.

    Raises:
        RecordError: missing, half-written, edited, or of another schema; the message names the file.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"{path}: not a whole record ({error}): set it aside and run again") from error
    if not isinstance(document, dict):
        raise RecordError(f"{path}: not a record: expected a JSON object, found {type(document).__name__}")
    if document.get("schema") != SCHEMA:
        raise RecordError(f"{path}: schema {document.get('schema')!r}, expected {SCHEMA}: run again or upgrade mi_at")
    rows = document.get("attacks")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{path}: attacks: expected a list of results")
    attacks = tuple(_read_row(path, row) for row in rows)
    record: Record = _build(path, "record", Record, {**document, "attacks": attacks})
    expected = {config_hash(record.config), config_hash(record.config, processes=record.processes)}
    if record.config_hash not in expected:
        raise RecordError(f"{path}: config_hash {record.config_hash} is not that of its config: was it edited?")
    for what in ("seed", "budget"):
        said, configured = getattr(record, what), record.config.get(what, getattr(record, what))
        if said != configured:
            raise RecordError(f"{path}: {what} {said}, but {configured} in its config: was it edited?")
    beside = path.with_suffix(".npz")
    if beside.is_file():
        _check_counts(path, record, read_outcomes(beside))
    return record


def _check_counts(path: Path, record: Record, outcomes: Mapping[str, np.ndarray]) -> None:
    for row in record.attacks:
        prediction = outcomes.get(f"{row.name}.prediction")
        if prediction is None:  # a worst case follows from the others
            continue
        correct = int((prediction == outcomes["label"][: len(prediction)]).sum())
        if (row.correct, row.n) != (correct, len(prediction)):
            raise RecordError(
                f"{path}: {row.name}: {row.correct} right of {row.n}, but {correct} of {len(prediction)} in the "
                "outcomes beside it: was it edited?"
            )


def _read_row(path: Path, row: dict[str, Any]) -> AttackRecord:
    values = {**row, "interval": tuple(row.get("interval", ())), "flags": tuple(row.get("flags", ()))}
    found: AttackRecord = _build(path, f"attacks: {row.get('name', '?')}", AttackRecord, values)
    if not (found.n >= 1 and 0 <= found.correct <= found.n):
        raise RecordError(f"{path}: {found.name}: {found.correct} right of n={found.n} cannot be")
    expected = (found.correct / found.n, *wilson(found.correct, found.n))
    if len(found.interval) != 2 or not np.allclose((found.accuracy, *found.interval), expected, atol=1e-9):
        raise RecordError(f"{path}: {found.name}: accuracy or interval are not those of {found.correct} of {found.n}")
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "None": (type(None),),
    "dict": (dict,),
    "tuple": (tuple,),
}


def _build(path: Path, where: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from a JSON object; every field there, none unknown, of the right type."""
    known = {item.name: item for item in fields(kind)}
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(values)):
        raise RecordError(f"{path}: {where} lacks {', '.join(missing)}: set it aside and run again")
    if unknown := sorted(set(values) - set(known)):
        raise RecordError(f"{path}: {where} has unknown {', '.join(unknown)}: was it written by a newer mi_at?")
    for name, value in values.items():
        # Annotations are strings here: "dict[str, Any]" -> dict, "float | str | None" -> its parts.
        allowed = [part.strip().split("[")[0] for part in str(known[name].type).split(" | ")]
        types = tuple(t for part in allowed for t in _TYPES[part])
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise RecordError(f"{path}: {where}: {name}={value!r}: expected {known[name].type}")
    return kind(**values)


def write_outcomes(path: str | Path, result: EvaluationResult) -> Path:
    """Write the per-sample outcomes: index, label, and per attack `<name>.prediction`, `<name>.distance`.

    An attack on the first n samples has arrays of length n. Worst cases follow from the others.

    Raises:
        RecordError: the folder cannot be written.
    """
    arrays = {"index": result.index.numpy(), "label": result.label.numpy()}
    for row in (result.clean, *result.attacks.values()):
        arrays[f"{row.name}.prediction"] = row.prediction.numpy()
        arrays[f"{row.name}.distance"] = row.distance.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def read_outcomes(path: str | Path) -> dict[str, np.ndarray]:
    """Read the per-sample outcomes of a record.

    Raises:
        RecordError: missing or half-written; the message names the file.
    """
    if not Path(path).is_file():
        raise RecordError(f"{path}: there is no such file: the command that made the record makes it again")
    try:
        with np.load(Path(path), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a broken zip shows itself in many ways
        raise RecordError(f"{path}: not a whole file of outcomes ({error}): set it aside and run again") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename over it: whole or not at all."""
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(part).chmod(0o666 & ~_umask())  # mkstemp makes files private
        Path(part).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        kept = "the previous file is intact" if path.exists() else "there was none before"
        raise RecordError(f"could not write {path}: {error.strerror or error}; {kept}") from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system allows it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _plain(value: Any, where: str) -> Any:
    """JSON's own types; numbers that are not finite become words, since JSON has none for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, where) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Path):
        return str(value)
    raise RecordError(f"{where}={value!r}: a record holds plain values, found {type(value).__name__}")
