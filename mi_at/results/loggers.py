"""Where a run's numbers go while it trains: metrics.csv, Weights & Biases, TensorBoard.

Each maker is a `_target_` of conf/logger/; `build` hands it what it asks for. W&B never asks a question and
never makes a run wait: without a login, or where it cannot be reached, the run is recorded offline.
"""

from __future__ import annotations

import contextlib
import csv as csv_format
import hashlib
import importlib.util
import inspect
import io
import netrc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from mi_at.evaluation.outcomes import CLEAN, Examples
from mi_at.functional.geometry import parse_eps
from mi_at.results.examples import beside
from mi_at.results.page_data import FINDING, Outcomes, classes, curves, findings, for_counts, predictions, verdict
from mi_at.results.page_pictures import amplification, caption, strip
from mi_at.results.records import Record
from mi_at.results.terminal import NOT_RUN

MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT = 30.0  # seconds that W&B may take to begin a run
FINISH_TIMEOUT = 300.0  # seconds that the last upload may take; what is missing then, `wandb sync` brings
DATA_DIR = "WANDB_DATA_DIR"
PUBLIC_HOST = "api.wandb.ai"
EVALUATION = "evaluation"
COLUMNS = ("attack", "norm", "eps", "steps", "n", "accuracy", "flags", "audit")


# ---------------------------------------------------------------- makers


def csv(*, folder: str | Path) -> Logger:
    """metrics.csv in the run folder.

    Args:
        folder: the run folder.

    Returns:
        A logger.
    """
    return MetricsFile(folder)


def tensorboard(*, folder: str | Path) -> Logger:
    """TensorBoard's files in <folder>/tensorboard.

    Args:
        folder: the run folder.

    Returns:
        A logger.

    Raises:
        ImportError: the package is missing.
    """
    _require("tensorboard", "mi_at[tensorboard]")
    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", default_hp_metric=False)


def wandb(
    *,
    folder: str | Path,
    key: str,
    config_hash: str,
    project: str,
    entity: str | None = None,
    mode: str = "auto",
    tags: Sequence[str] = (),
    group: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Logger:
    """A run of Weights & Biases; started anew with the same key and configuration, it goes on.

    Args:
        folder: the run folder; W&B's files go to <folder>/wandb.
        key: name of the run.
        config_hash: with the key it makes the run's id.
        project: of W&B.
        entity: a user or team; None: the login's own.
        mode: "online", "offline", "disabled" or "auto": the environment's WANDB_MODE where it is set, else
            online with a login and offline without.
        tags: what the run belongs to: paper, table, cell.
        group: the sweep.
        config: the resolved configuration, plain values.

    Returns:
        A logger; the run begins with its first use.

    Raises:
        ValueError: an unknown mode, or online without a login.
        ImportError: the package is missing.
    """
    if mode not in MODES:
        raise ValueError(f"logger.wandb.mode={mode!r}: expected one of {', '.join(MODES)}")
    _require("wandb", "wandb")
    asked, may_fall_back = _mode(mode)
    return WandbRun(
        name=key,
        save_dir=folder,
        id=run_id(key, config_hash),
        project=project,
        entity=entity,
        mode=asked,
        tags=list(tags),
        group=group,
        config=dict(config or {}),
        may_fall_back=may_fall_back,
    )


def build(
    makers: Mapping[str, Callable[..., Logger]],
    *,
    folder: str | Path,
    key: str,
    config_hash: str,
    tags: Sequence[str] = (),
    group: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """The loggers of a run: each maker gets those of these facts that it takes.

    Args:
        makers: by name, their own options filled in (`instantiate(node, _partial_=True)`).
        folder: the run folder.
        key: name of the run.
        config_hash: of its configuration.
        tags: what it belongs to.
        group: its sweep.
        config: the resolved configuration, plain values.

    Returns:
        The loggers, in order.

    Example:
        >>> [logger.name for logger in build({"csv": csv}, folder="runs/a", key="a", config_hash="0")]
        ['csv']
    """
    facts = {
        "folder": folder,
        "key": key,
        "config_hash": config_hash,
        "tags": tags,
        "group": group,
        "config": config,
    }
    loggers = []
    for maker in makers.values():
        accepted = inspect.signature(maker).parameters
        loggers.append(maker(**{name: fact for name, fact in facts.items() if name in accepted}))
    return loggers


# ---------------------------------------------------------------- the end of a run


@rank_zero_only
def log_evaluation(
    loggers: Iterable[Logger], record: Record, *, step: int | None = None, path: str | Path | None = None
) -> None:
    """Log a record, then close the loggers: `test/<attack>` in percent everywhere, and in W&B all that its page shows.

    That is a table of the numbers and, where the record or what lies beside it has them, the audit, accuracy by class,
    curves over eps and steps, and the strongest examples.

    Args:
        loggers: of the run.
        record: its evaluation.
        step: finished steps of training; None: where each logger stands.
        path: of the record on disk; the outcomes and examples beside it are logged too.

    Raises:
        RecordError: what lies beside the record is damaged.
    """
    loggers = list(loggers)
    names = [_in_a_name(row.name) for row in record.attacks]
    accuracies = {f"test/{name}": 100 * row.accuracy for name, row in zip(names, record.attacks, strict=True)}
    outcomes, examples = (None, {}) if path is None else beside(path)
    for logger in loggers:
        logger.log_metrics(accuracies, step)
        if isinstance(logger, WandbLogger):
            logger.log_table(EVALUATION, columns=list(COLUMNS), data=_rows(record), step=step)
            for name, (columns, data) in _tables(record, outcomes).items():
                logger.log_table(f"{EVALUATION}/{name}", columns=columns, data=data, step=step)
            for name, found in examples.items():
                _log_examples(logger, name, found, step)
        if isinstance(logger, WandbRun):
            for over in ("eps", "steps"):
                if data := _curves(record, outcomes, over):
                    logger.log_curves(f"{EVALUATION}/over_{over}", [over, "accuracy", "curve"], data, step)
    finish(loggers)


def _log_examples(logger: WandbLogger, name: str, found: Examples, step: int | None) -> None:
    """Clean, adversarial and difference side by side, with what the network says."""
    if not len(found.label):
        return
    factor = amplification(found.x, found.x_adv)
    places = range(len(found.label))
    words = [f"{caption(found, place)}; difference x {factor:g}" for place in places]
    strips = [strip(found, place, factor) for place in places]
    logger.log_image(f"{EVALUATION}/examples/{_in_a_name(name)}", strips, step, caption=words)


def _in_a_name(text: str) -> str:
    """With what W&B has no place for in a name replaced."""
    return re.sub(r"[^\w.+-]+", "_", text)


@rank_zero_only
def finish(loggers: Iterable[Logger], *, failed: bool = False) -> None:
    """Close the loggers, so that what they wrote is complete; a second call does nothing.

    Args:
        loggers: of the run.
        failed: whether the run did.
    """
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbRun):
            logger.finish(failed=failed)


@contextlib.contextmanager
def ended_on_failure(loggers: Sequence[Logger]) -> Iterator[None]:
    """Whatever fails in this block, an interrupt too, ends the loggers as failed; else they stay open.

    Args:
        loggers: of the run.

    Example:
        >>> with ended_on_failure([]):
        ...     raise KeyError("no such attack")
        Traceback (most recent call last):
        KeyError: 'no such attack'
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what failed first is what is told
            finish(loggers, failed=True)
        raise


def _rows(record: Record) -> list[list[Any]]:
    """A cell per column of `COLUMNS`; W&B wants one type a column, so a fraction becomes a number."""
    return [
        [
            row.name,
            None if row.name == CLEAN else row.norm,
            None if row.name == CLEAN or row.eps is None else parse_eps(row.eps),
            row.steps,
            row.n,
            100 * row.accuracy,
            " ".join(row.flags),
            verdict(record) or NOT_RUN,
        ]
        for row in record.attacks
    ]


def _tables(record: Record, outcomes: Outcomes | None) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of the other tables, by name; without those there is nothing for."""
    made: dict[str, tuple[list[str], list[list[Any]]]] = {}
    if listed := findings(record):
        made["audit"] = list(FINDING), [[item[part] for part in FINDING] for item in listed]
    row = for_counts(record)
    found = None if row is None else predictions(row, outcomes)
    if row is not None and found is not None and outcomes is not None:
        columns = ["class", "n", "clean", "robust", "attack"]
        made["classes"] = (
            columns,
            [[k, n, 100 * clean / n, 100 * robust / n, row.name] for k, n, clean, robust in classes(outcomes, found)],
        )
    return made


def _curves(record: Record, outcomes: Outcomes | None, over: str) -> list[list[Any]]:
    """Setting, accuracy in percent and name, point by point."""
    return [
        [float(x), 100 * y, f"{curve.name} ({curve.norm}, n {curve.n})"]
        for curve in curves(record, outcomes, over)
        for x, y, _, _ in curve.intervals()
    ]


# ---------------------------------------------------------------- metrics.csv


class MetricsFile(Logger):
    """A CSV file with a row per step and a column per metric, complete on disk after every call.

    A resumed run keeps the earlier rows and replaces those of steps that it takes again.

    Args:
        folder: where metrics.csv lies.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._path = self._folder / "metrics.csv"
        self._columns: list[str] = []
        self._last: dict[str, str] = {}
        self._tail = 0  # where the last row begins, in bytes
        self._opened = False

    @property
    def name(self) -> str:
        """Its kind."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Write values into the row of a step.

        Args:
            metrics: by name.
            step: finished steps; None: the last row's.
        """
        if not self._opened:
            self._open(step)
        step = int(self._last.get("step", 0)) if step is None else step
        # Nine digits give a float32 back exactly.
        row = {name: f"{float(value):.9g}" for name, value in metrics.items()} | {"step": str(step)}
        same = bool(self._last) and int(self._last["step"]) == step
        row = self._last | row if same else row
        self._last = row
        if set(row) <= set(self._columns) and self._path.is_file():
            with self._path.open("r+b") as file:
                self._tail = file.seek(self._tail) if same else file.seek(0, os.SEEK_END)
                file.write(self._lines([row]))
                file.truncate()
        else:
            rows = self._read()
            self._write([*(rows[:-1] if same else rows), row])

    def _open(self, step: int | None) -> None:
        rows = self._read()
        kept = [row for row in rows if step is None or int(row["step"]) < step]
        if kept:
            self._write(kept)
            self._last = {name: value for name, value in kept[-1].items() if value}
        elif rows:
            self._path.unlink()
        self._opened = True

    def _read(self) -> list[dict[str, str]]:
        if not self._path.is_file():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        # A line without its end was being written when the process was killed.
        rows = list(csv_format.DictReader(line for line in lines if line.endswith("\n")))
        return [row for row in rows if (row.get("step") or "").isdigit()]

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Write the whole file, or leave the one that is there."""
        names = sorted({name for row in rows for name in row} - {"epoch", "step"})
        self._columns = ["epoch", "step", *names]
        head = self._lines([dict(zip(self._columns, self._columns, strict=True)), *rows[:-1]])
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        part.write_bytes(head + self._lines(rows[-1:]))
        part.replace(self._path)
        self._tail = len(head)

    def _lines(self, rows: Iterable[Mapping[str, str]]) -> bytes:
        text = io.StringIO(newline="")
        csv_format.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


# ---------------------------------------------------------------- W&B


class WandbRun(WandbLogger):
    """Lightning's W&B logger with a run of its own that begins without questions and can be finished.

    Args:
        name, save_dir, id, project: as `WandbLogger` takes them.
        entity, mode, tags, group, config: as `wandb.init` takes them.
        may_fall_back: whether a run that cannot begin online is recorded offline instead of failing.
    """

    _running: ClassVar[int] = 0

    def __init__(
        self,
        *,
        name: str,
        save_dir: str | Path,
        id: str,
        project: str,
        entity: str | None,
        mode: str,
        tags: list[str],
        group: str | None,
        config: dict[str, Any],
        may_fall_back: bool,
    ) -> None:
        super().__init__(
            name=name,
            save_dir=save_dir,
            id=id,
            project=project,
            entity=entity,
            mode=mode,
            tags=tags,
            group=group,
            config=config,
            allow_val_change=True,  # a resumed run may have been given more epochs or other devices
            reinit="create_new",  # neither takes over nor ends a run that somebody else began in this process
        )
        self._wandb_init.pop("anonymous", None)  # W&B has given it up, and says so at every start
        self._may_fall_back = may_fall_back

    def __getstate__(self) -> dict[str, Any]:
        """Without the run: the process that receives the logger begins its own, under the same id."""
        return self.__dict__ | {"_experiment": None}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun at first use; on all processes but the first a dummy.

        Raises:
            ConnectionError: online was asked for and W&B cannot be reached.
        """
        if self._experiment is None:
            self._experiment = self._begin()
            WandbRun._running += 1
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    @property
    def place(self) -> str:
        """Where to look: the run's address, or how to upload it; empty while there is no run."""
        if self._experiment is None or self._wandb_init["mode"] == "disabled":
            return ""
        if self._wandb_init["mode"] == "offline":
            return f"wandb sync {Path(self._experiment.dir).parent}"
        return str(self._experiment.url)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """As `WandbLogger` does, with the table's files in the run folder."""
        with self._own_data():
            super().log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_curves(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """Log a chart of lines.

        Args:
            key: its name.
            columns: of x, of y, and of the line's name.
            data: rows of them.
            step: finished steps; None: where the run stands.
        """
        import wandb as library

        x, y, line = columns
        with self._own_data():
            table = library.Table(columns=list(columns), data=data)
            chart: dict[str, Any] = {key: library.plot.line(table, x, y, stroke=line, title=key)}
            self.log_metrics(chart, step)

    @contextlib.contextmanager
    def _own_data(self) -> Iterator[None]:
        """Tables' files go into the run folder; W&B would put them into the home."""
        given = os.environ.get(DATA_DIR)
        os.environ[DATA_DIR] = given or str(Path(self._wandb_init["dir"]).absolute() / "wandb")
        try:
            yield
        finally:
            if given is None:
                del os.environ[DATA_DIR]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning's end of a fit: the run goes on until `finish`, unless training failed."""
        super().finalize(status)
        if status == "failed":
            self.finish(failed=True)

    @rank_zero_only
    def finish(self, *, failed: bool = False) -> None:
        """End the run; what is logged afterwards resumes it."""
        if self._experiment is None:
            return
        self._experiment.finish(exit_code=int(failed))
        self._experiment = None
        WandbRun._running -= 1
        import wandb as library

        # W&B's service completes the file a moment later: end it too, unless somebody else has a run there.
        if not WandbRun._running and library.run is None:
            library.teardown()

    def _begin(self) -> Any:
        import wandb as library

        Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
        settings = library.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            login_timeout=1.0,
        )
        try:
            return library.init(**self._wandb_init, settings=settings)
        except (library.Error, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if self._wandb_init["mode"] != "online":
                raise ValueError(f"logger.wandb: W&B refuses the run: {reason}") from error
            if not self._may_fall_back:
                raise ConnectionError(
                    f"logger.wandb.mode=online: W&B could not begin the run ({reason}); "
                    "check the login (wandb login), or record offline with logger.wandb.mode=offline"
                ) from error
        rank_zero_warn(
            f"W&B could not begin the run ({reason}); it is recorded offline, upload it later with "
            f"`wandb sync {self._save_dir}/wandb/offline-run-*`"
        )
        # Its service still holds the id for the run that could not begin.
        library.teardown()
        self._wandb_init["mode"] = "offline"
        return library.init(**self._wandb_init, settings=settings)


def run_id(key: str, config_hash: str) -> str:
    """The id of a W&B run: readable, and one for each pair of key and configuration.

    Example:
        >>> run_id("mimae-digits-cnn_tiny-s0", "1f2e3d4c")
        'mimae-digits-cnn_tiny-s0-8058d19aba4f'
    """
    digest = hashlib.sha256(f"{key}\n{config_hash}".encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', key)[:48]}-{digest}"


def _mode(asked: str) -> tuple[str, bool]:
    """The mode W&B gets, and whether it may turn into offline.

    Raises:
        ValueError: online without a login.
    """
    source = f"logger.wandb.mode={asked}"
    if asked == "auto":
        given = os.environ.get("WANDB_MODE", "")
        asked = {"run": "online", "dryrun": "offline"}.get(given, given) or "auto"
        source = f"WANDB_MODE={given}"
        if asked not in MODES:
            raise ValueError(f"{source}: expected online, offline or disabled")
    if asked == "auto":
        return ("online", True) if _logged_in() else ("offline", False)
    if asked == "online" and not _logged_in():
        raise ValueError(f"{source}: nobody is logged in to W&B; run `wandb login`, or record offline (mode=offline)")
    return asked, False


def _logged_in() -> bool:
    """Whether W&B would find credentials, in the places where it looks for them itself."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb as library

    settings = library.setup().settings
    if settings.api_key:
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == library.Settings.model_fields["base_url"].default:
        hosts.append(PUBLIC_HOST)  # the address may be a newer one than the login was stored under
    given = os.environ.get("NETRC")
    for place in [given] if given else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            stored = netrc.netrc(os.fspath(Path(place).expanduser()))
            return any(stored.authenticators(host) for host in hosts)
    return False


def _require(package: str, distribution: str) -> None:
    """Say how to get a missing package.

    Raises:
        ImportError: it is missing.
    """
    found = importlib.util.find_spec(package)
    # A folder of that name, such as W&B makes, is found too, but has no file of its own.
    if found is None or found.origin is None:
        raise ImportError(f"logger={package} needs the package {package}: pip install '{distribution}'")
