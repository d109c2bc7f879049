"""What a table's runs are and cost before they are run: how far each is, FLOP, hours, memory; and its text."""

from __future__ import annotations

import csv
import io as streams
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mi_at.data.loader import batches_with_extra
from mi_at.results.measured import Found
from mi_at.results.records import config_hash
from mi_at.results.rehearsal import Cost, Size, Training
from mi_at.results.runs import is_kept, look
from mi_at.results.terminal import NOT_RUN, columns, markdown_row

FORMATS = ("terminal", "markdown", "csv")
HEADINGS = (
    "cell",
    "runs",
    "FLOP an epoch",
    "epochs",
    "training FLOP",
    "evaluation <=",
    "training time",
    "evaluation <=",
    "GiB",
)
CSV = (
    "cell",
    "seed",
    "run",
    "state",
    "epoch",
    "epochs",
    "record",
    "flop_step",
    "flop_epoch",
    "flop_validation",
    "flop_training",
    "flop_evaluation_at_most",
    "flop_to_do_at_most",
    "hours_training",
    "hours_evaluation_at_most",
    "memory_gib",
)
OFFICIAL = {
    "digits": (1437, 360),
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
    "tiny_imagenet": (100_000, 10_000),
}
"""Images of the official splits, training and test."""
GIB = 2**30


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        state: "done", "trained" (only this evaluation is missing), "interrupted", "running" (another process keeps
            its folder), "new", or "no data".
        record: where it is done.
        epoch: finished epochs of an interrupted run, or of a running one that has saved any.
        why: what is missing.
    """

    state: str
    record: Path | None = None
    epoch: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Speed:
    """FLOP per second that are reached.

    Attributes:
        fp32, bf16: of training.
        evaluation: of an evaluation's upper bound.
        how: where the numbers come from.
        launch: seconds from one operation to the next of those too small to keep the device busy.
    """

    fp32: float
    bf16: float
    evaluation: float
    how: str
    launch: float = 0.0

    def hours(self, cost: Cost) -> float:
        """Of training: a device computes, or waits for what it is to do next, whichever takes longer."""
        return max(cost.fp32 / self.fp32 + cost.bf16 / self.bf16, cost.calls * self.launch) / 3600


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        cell: of the table, or "before it: ..." for what other runs need.
        seed: of training.
        run: its readable name.
        epochs: that it trains.
        standing: how far it is.
        training: what it costs; None where the size of its data is not known.
        evaluation: FLOP at most.
        speed: of the device for it; None: not known.
        data_bytes: of the images, where they lie on the device.
        trains: False where an entry before it is the same training, evaluated in another way.
        evaluation_calls: operations of the evaluation, which a GPU waits for when they are small; at most.
    """

    cell: str
    seed: int
    run: str
    epochs: int
    standing: Standing
    training: Training | None
    evaluation: float
    speed: Speed | None
    data_bytes: int = 0
    trains: bool = True
    evaluation_calls: float = 0.0

    @property
    def share_to_train(self) -> float:
        """Of the training that is still to do, in [0, 1]."""
        if self.standing.state in ("done", "trained") or not self.trains:
            return 0.0
        return 1 - (self.standing.epoch or 0) / self.epochs

    @property
    def hours(self) -> float | None:
        """Of training, the whole of it."""
        return self.speed.hours(self.training.total) if self.speed and self.training else None

    @property
    def evaluation_hours(self) -> float | None:
        """At most."""
        if self.speed is None:
            return None
        return max(self.evaluation / self.speed.evaluation, self.evaluation_calls * self.speed.launch) / 3600

    @property
    def to_do(self) -> float:
        """FLOP of what is not done, at most."""
        if self.standing.state == "done":
            return 0.0
        return (self.training.total.total * self.share_to_train if self.training else 0.0) + self.evaluation

    @property
    def memory(self) -> int | None:
        """Bytes on the device at the peak."""
        return self.training.memory + self.data_bytes if self.training else None


@dataclass
class Plan:
    """A table's runs, and what is to be said of them.

    Attributes:
        title: of the table.
        entries: what other runs need first, then the table's.
        device: what hours are of; memory: its bytes, None where it is not known.
        notes: sentences.
    """

    title: str
    entries: list[Entry]
    device: str
    memory: float | None = None
    notes: list[str] = field(default_factory=list)


def standing(
    config: Mapping[str, Any],
    *,
    key: str,
    processes: int | None,
    found: Sequence[Found],
    epochs_of: Callable[[Path], int],
) -> Standing:
    """How far a run is.

    Args:
        config: resolved, with its stages named (`mi_at.stages.resolve`).
        key: its readable name.
        processes: that train, where their number can change a result.
        found: records, those of other folders too.
        epochs_of: finished epochs of a checkpoint.
    """
    run = look(config, key=key, parent=Path(config["runs"]), processes=processes)
    digest = config_hash(config, processes=processes)
    if run.state == "finished":
        return Standing("done", run.record)
    if elsewhere := next((each.path for each in found if each.record.config_hash == digest), None):
        return Standing("done", elsewhere)
    if is_kept(run.folder):
        return Standing("running", epoch=_epochs(run.last, epochs_of))
    if run.state == "trained":
        return Standing("trained")
    if run.state == "resumed":
        return Standing("interrupted", epoch=_epochs(run.last, epochs_of))
    return Standing("new")


def _epochs(last: Path, epochs_of: Callable[[Path], int]) -> int | None:
    try:
        return epochs_of(last)
    except (OSError, ValueError):  # not there yet, or damaged: the run itself says so
        return None


def size_of(config: Mapping[str, Any], train: int, validation: int) -> Size:
    """How much a training does.

    Args:
        config: resolved.
        train: images of the training set, extra ones left out.
        validation: images of the validation split.
    """
    data, trainer, epochs = config["dataset"], config["trainer"], int(config["optim"]["epochs"])
    batch = int(data["batch_size"])
    extra = bool(data["extra"])
    steps = data["batches_per_epoch"] or (batches_with_extra(train + validation, batch) if extra else None)
    images = steps * batch if steps else train // batch * batch if data["drop_last"] else train
    limit, of_validation = trainer["limit_train_batches"], trainer["limit_val_batches"]
    images = min(images, limit * batch) if isinstance(limit, int) else int(images * min(limit, 1))
    eval_batch = int(data.get("eval_batch_size") or batch)
    validation = min(validation, of_validation * eval_batch) if isinstance(of_validation, int) else validation
    whole = int(trainer["max_epochs"])
    epochs = whole if whole > 0 else epochs
    if (most := int(trainer["max_steps"])) > 0:
        epochs = max(1, min(epochs, -(-most // max(1, -(-images // batch)))))
    return Size(
        train=train,
        images=images,
        batch=min(batch, images),
        validation=validation,
        eval_batch=eval_batch,
        validations=epochs // int(trainer["check_val_every_n_epoch"]),
        epochs=epochs,
        channels=int(data["channels"]),
        image_size=int(data["image_size"]),
        num_classes=int(data["num_classes"]),
    )


# ---------------------------------------------------------------- how it is shown
def render(plan: Plan, form: str) -> str:
    """The plan as text.

    Args:
        plan: what to show.
        form: one of `FORMATS`.

    Returns:
        Lines, ending with a newline.
    """
    if form == "csv":
        return _csv(plan.entries)
    cells = {entry.cell: [other for other in plan.entries if other.cell == entry.cell] for entry in plan.entries}
    rows = [_row(cell, entries) for cell, entries in cells.items()]
    totals = [
        _total("all runs", plan.entries, lambda entry: float(entry.trains), lambda entry: 1.0),
        _total(
            "still to do",
            plan.entries,
            lambda entry: entry.share_to_train,
            lambda entry: float(entry.standing.state != "done"),
        ),
    ]
    notes = [*plan.notes, *_notes(plan)]
    if form == "markdown":
        table = [HEADINGS, ["---", "---", *["---:"] * (len(HEADINGS) - 2)], *rows, *totals]
        lines = [markdown_row(row) for row in table]
        return "\n".join([f"**{plan.title}**", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"
    lines = columns([HEADINGS, *rows, *totals], right=range(2, len(HEADINGS)))
    rule = "-" * len(lines[0])
    return "\n".join([plan.title, *lines[: -len(totals)], rule, *lines[-len(totals) :], *notes]) + "\n"


def flop(value: float) -> str:
    """FLOP in three digits.

    Example:
        >>> flop(0), flop(45.97e15), flop(1234.0)
        ('0', '46.0 P', '1.23 k')
    """
    for sign, unit in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{value / unit:#.3g}".rstrip(".") + f" {sign}"
    return f"{value:.0f}"


def duration(hours: float | None) -> str:
    """A time in two digits.

    Example:
        >>> duration(None), duration(1e-5), duration(0.01), duration(0.5), duration(47.2), duration(1234.0)
        ('-', '< 1 s', '36 s', '30 min', '47 h', '1,234 h')
    """
    if hours is None:
        return NOT_RUN
    seconds = 3600 * hours
    if seconds < 1:
        return "< 1 s" if seconds else "0"
    value, unit = (seconds, "s") if seconds < 100 else (seconds / 60, "min") if seconds < 6000 else (hours, "h")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def _gib(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value / GIB:.2f}" if value < 10 * GIB else f"{value / GIB:.0f}"


def _row(cell: str, entries: Sequence[Entry]) -> tuple[str, ...]:
    first = entries[0]
    cost = first.training
    return (
        cell,
        "; ".join(f"{words}{_times(count)}" for words, count in Counter(map(_state, entries)).items()),
        flop(cost.per_epoch.total) if cost else NOT_RUN,
        str(first.epochs),
        flop(cost.total.total) if cost else NOT_RUN,
        flop(first.evaluation) if first.evaluation else NOT_RUN,
        duration(first.hours),
        duration(first.evaluation_hours) if first.evaluation else NOT_RUN,
        _gib(first.memory),
    )


def _times(count: int) -> str:
    return f" x {count}" if count > 1 else ""


def _state(entry: Entry) -> str:
    at = entry.standing
    of = f" at epoch {at.epoch} of {entry.epochs}" if at.epoch is not None else ""
    return {
        "done": "done",
        "trained": "trained, not evaluated",
        "interrupted": f"interrupted{of}",
        "running": f"running{of}",
        "new": "never run",
        "no data": "data missing",
    }[at.state]


def _total(
    name: str, entries: Sequence[Entry], trains: Callable[[Entry], float], evaluates: Callable[[Entry], float]
) -> tuple[str, ...]:
    """The sum over runs, each by the share of it that counts."""
    training = sum(entry.training.total.total * trains(entry) for entry in entries if entry.training)
    hours = [entry.hours * trains(entry) for entry in entries if entry.hours is not None]
    evaluations = [entry.evaluation_hours * evaluates(entry) for entry in entries if entry.evaluation_hours is not None]
    running = sum(1 for entry in entries if trains(entry) or evaluates(entry))
    return (
        name,
        f"{running} runs",
        "",
        "",
        flop(training),
        flop(sum(entry.evaluation * evaluates(entry) for entry in entries)),
        duration(sum(hours) if hours else None),
        duration(sum(evaluations) if evaluations else None),
        _gib(max((entry.memory for entry in entries if entry.memory), default=None)),
    )


def _notes(plan: Plan) -> list[str]:
    """Records, what is missing, and what the numbers are."""
    done = [e for e in plan.entries if e.standing.record is not None]
    notes = [f"done: {e.cell}, seed {e.seed}: {e.standing.record}" for e in done]
    notes += [
        f"{e.cell}, seed {e.seed}: a training that stands above, counted once" for e in plan.entries if not e.trains
    ]
    missing = {entry.standing.why: entry.cell for entry in reversed(plan.entries) if entry.standing.state == "no data"}
    notes += [f"data missing: {cell}: {why}" for why, cell in reversed(missing.items())]
    speeds = dict.fromkeys(entry.speed.how for entry in plan.entries if entry.speed is not None)
    notes += [f"time on {plan.device}: {how}" for how in speeds]
    if not speeds:
        notes.append("time: calibrate=true measures this machine, device=<name> estimates another")
    if plan.memory is not None and (
        large := [e.cell for e in plan.entries if e.memory and e.memory > 0.9 * plan.memory]
    ):
        cells = ", ".join(dict.fromkeys(large))
        notes.append(f"memory: {cells}: more than 90 % of the {plan.memory / GIB:.0f} GiB of {plan.device}")
    return [
        *notes,
        "FLOP: convolutions and matrix products, 2 per multiplication and addition; one run's, the foot all runs'",
        "training: counted in a rehearsal of its steps, validation and what epochs end with included",
        "evaluation: at most, as if every attack ran to its last step on every image",
        "GiB: weights, gradients, optimiser, images and what a step holds; a GPU's libraries take some more",
    ]


def _csv(entries: Sequence[Entry]) -> str:
    """A line per run, values in full; empty where there is none."""
    stream = streams.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV)
    for entry in entries:
        cost, at = entry.training, entry.standing
        values = {
            "cell": entry.cell,
            "seed": entry.seed,
            "run": entry.run,
            "state": at.state,
            "epoch": at.epoch,
            "epochs": entry.epochs,
            "record": at.record,
            "flop_step": cost and cost.step.total,
            "flop_epoch": cost and cost.per_epoch.total,
            "flop_validation": cost and cost.validation.total,
            "flop_training": cost and cost.total.total,
            "flop_evaluation_at_most": entry.evaluation,
            "flop_to_do_at_most": entry.to_do,
            "hours_training": entry.hours,
            "hours_evaluation_at_most": entry.evaluation_hours,
            "memory_gib": entry.memory and entry.memory / GIB,
        }
        writer.writerow(["" if values[name] is None else values[name] for name in CSV])
    return stream.getvalue()
