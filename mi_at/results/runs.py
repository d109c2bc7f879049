"""Run folders: one per configuration, so that a run is recognised, resumed, or refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mi_at.results.records import RecordError, config_hash, read_record

RECORD = "record.json"
CONFIG = "config.json"
LAST = "last.ckpt"
BEST = "best.ckpt"
TRAINED = "trained.json"
EVALUATIONS = "evaluations"

NOT_TRAINING = ("evaluation", "select")
"""What changes a number but not the training: a run is trained once and may be evaluated in several ways."""


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says what to do."""


class RunBusyError(RunError):
    """Another process is at this run, or has just been: whoever shares work with it comes back later.

    Attributes:
        folder: of the run.
    """

    def __init__(self, text: str, folder: str) -> None:
        super().__init__(text, folder)  # both, so that it can be pickled
        self.folder = folder

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Run:
    """A run's place on disk.

    Attributes:
        folder: holds config.json, last.ckpt, best.ckpt, metrics.csv, samples.png, trained.json and record.json.
        key: readable name, such as mimae-digits-cnn_tiny-s0.
        hash: of everything in the configuration that can change the training.
        state: "new", "resumed" (last.ckpt is there and is continued), "trained" (trained.json is there: only this
            evaluation is missing) or "finished" (this evaluation's record is there).
        record: the result of this evaluation: record.json in the folder; where another evaluation's lies there,
            evaluations/<name>-<hash>/record.json.
    """

    folder: Path
    key: str
    hash: str
    state: str
    record: Path

    def make(self, config: Mapping[str, Any], *, alone: bool = True) -> None:
        """Make the folder, write config.json into a new one, and keep it for this process until it ends.

        Args:
            config: resolved configuration, plain values.
            alone: False where another process of the same run keeps it.

        Raises:
            OSError: it cannot be written.
            RunBusyError: another process trains in it, or has done so since `find_run` looked.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / CONFIG).is_file():
                write_json(self.folder / CONFIG, {"hash": self.hash, "key": self.key, "config": config})
        except OSError as error:
            why = error.strerror or error
            raise OSError(
                f"cannot write the run folder {self.folder}: {why}; choose another runs= or run_dir="
            ) from error
        if alone and _keep(self.folder) and self._moved_on():
            self.let_go()
            text = f"another process has trained in {self.folder} meanwhile: start this one again"
            raise RunBusyError(text, str(self.folder))

    def let_go(self) -> None:
        """Let other processes have the folder; where this one never kept it, nothing happens."""
        handle = _kept.pop(self.folder.resolve(), None)
        if handle is not None:
            os.close(handle)

    def _moved_on(self) -> bool:
        """Whether there is more in the folder than `find_run` found."""
        state = _state(self.folder, self.record)
        return STATES.index(state) > STATES.index(self.state)

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / LAST

    def checkpoint(self, select: str) -> Path:
        """The weights that are evaluated.

        Args:
            select: "best", "last", or "auto": best where there was a validation split.
        """
        best = self.folder / BEST
        return best if select == "best" or (select == "auto" and best.is_file()) else self.last

    def read_training(self) -> dict[str, Any]:
        """What `write_training` kept."""
        notes: dict[str, Any] = json.loads((self.folder / TRAINED).read_text())
        return notes

    def write_training(self, notes: Mapping[str, Any]) -> None:
        """Keep that training is complete, and what is worth knowing about it."""
        write_json(self.folder / TRAINED, notes)


def find_run(
    config: Mapping[str, Any],
    *,
    key: str,
    parent: Path,
    folder: Path | None = None,
    resume: bool = False,
    processes: int | None = None,
) -> Run:
    """Find the run folder of a configuration and what can be done in it; nothing is written (see `Run.make`).

    A record that cannot be read is set aside, and said: the run is evaluated again.

    Args:
        config: resolved configuration, plain values.
        key: readable name.
        parent: folder of run folders.
        folder: a folder of the user's own instead of <parent>/<key>-<hash>.
        resume: continue from last.ckpt where there is one.
        processes: that train, where their number can change a result.

    Returns:
        The run; a new one's folder does not exist yet.

    Raises:
        RunError: the folder belongs to another configuration, holds something else, or holds an unfinished run
            that was not asked to be resumed.
    """
    digest = config_hash(config, without=NOT_TRAINING, processes=processes)
    path = folder or parent / f"{key}-{digest}"
    existing = path / CONFIG
    if existing.is_file():
        found = _read_hash(existing)
        if found != digest:
            raise RunError(
                f"{path} holds a run of another configuration ({found}, not {digest}): choose another run_dir="
            )
    elif path.is_dir() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run of mi_at: choose another run_dir=")
    record = _place_of_record(config, path, processes)
    state = _state(path, record)
    if state == "resumed" and not resume:
        raise RunError(
            f"{path} holds an unfinished run of this configuration: resume=true continues it; delete the folder to"
            " start anew"
        )
    return Run(path, key, digest, state, record)


def look(config: Mapping[str, Any], *, key: str, parent: Path, processes: int | None = None) -> Run:
    """As `find_run`, without touching or refusing anything: a record that cannot be read is as none.

    Args:
        config: resolved configuration, plain values.
        key: readable name.
        parent: folder of run folders.
        processes: that train, where their number can change a result.
    """
    whole = config_hash(config, processes=processes)
    digest = config_hash(config, without=NOT_TRAINING, processes=processes)
    path = parent / f"{key}-{digest}"
    places = path / RECORD, path / EVALUATIONS / f"{config['choices']['evaluation']}-{whole}" / RECORD
    own = next((place for place in places if _is_record_of(place, whole)), places[1])
    return Run(path, key, digest, _state(path, own), own)


def _is_record_of(path: Path, digest: str) -> bool:
    try:
        return read_record(path).config_hash == digest
    except RecordError:
        return False


def is_kept(folder: str | Path) -> bool:
    """Whether a process, this one too, keeps a run folder: it trains there or evaluates."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(handle)
    return False


def wait_for_others(folder: str | Path) -> None:
    """Sleep until no other process keeps a run folder; return at once where it has none or no locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def let_go_of_all() -> None:
    """Let other processes have every folder that this one still keeps, such as those of runs that failed."""
    while _kept:
        os.close(_kept.popitem()[1])


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            json.dump(document, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


STATES = ("new", "resumed", "trained", "finished")


def _state(folder: Path, record: Path) -> str:
    """How far a run is, one of `STATES`."""
    if (folder / TRAINED).is_file():
        return "finished" if record.is_file() and record.with_suffix(".npz").is_file() else "trained"
    return "resumed" if (folder / LAST).is_file() else "new"


_kept: dict[Path, int] = {}


def _keep(folder: Path) -> bool:
    """Lock a folder; the system lets go of it when the process ends, however it does.

    Returns:
        Whether it was not kept before.
    """
    folder = folder.resolve()
    if folder in _kept:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return False  # a file system without locks
        text = f"another process is training in {folder}: wait for it, or choose another run_dir="
        raise RunBusyError(text, str(folder)) from error
    _kept[folder] = handle
    return True


def _place_of_record(config: Mapping[str, Any], folder: Path, processes: int | None) -> Path:
    """Where this evaluation's record is or will be: nothing another evaluation wrote is replaced."""
    digest = config_hash(config, processes=processes)
    first = folder / RECORD
    _set_aside_damaged(first)
    _set_aside_damaged(folder / EVALUATIONS / f"{config['choices']['evaluation']}-{digest}" / RECORD)
    if not first.is_file() or _read_hash(first, "config_hash") == digest:
        return first
    return folder / EVALUATIONS / f"{config['choices']['evaluation']}-{digest}" / RECORD


def _set_aside_damaged(path: Path) -> None:
    """Rename a record that cannot be read."""
    if not path.is_file():
        return
    try:
        read_record(path)
    except RecordError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"{error}; it is {aside.name} now, and the run is evaluated again", file=sys.stderr)


def _read_hash(path: Path, key: str = "hash") -> str:
    try:
        return str(json.loads(path.read_text())[key])
    except (ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}): move the folder away or choose another run_dir=") from error
