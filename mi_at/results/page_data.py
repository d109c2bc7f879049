"""What a page shows, worked out from records and per-sample outcomes: plain numbers, no markup."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import CLEAN, Examples
from mi_at.functional.geometry import parse_eps
from mi_at.results.records import AttackRecord, Record, flat
from mi_at.results.terminal import BARE_FROM, NOT_RUN, ball

WORST = "worst_of"
# What else of an attack's description makes two rows different measurements.
SEVERITIES = ("fail", "warn", "not checked", "info", "pass")  # the gravest first
FINDING = ("check", "severity", "measured", "threshold", "meaning", "todo")
_TOLD = 3  # settings that a name can hold
Outcomes = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A record and what lies beside it.

    Attributes:
        record: the numbers.
        outcomes: per sample; None where there are none.
        examples: by attack; empty where there are none.
    """

    record: Record
    outcomes: Outcomes | None = None
    examples: Mapping[str, Examples]


def radius(row: AttackRecord) -> float | None:
    """A row's eps as a number; None without an attack or a bound."""
    return None if row.eps is None or row.name == CLEAN else parse_eps(row.eps)


def kind(row: AttackRecord) -> str:
    """A row's kind: "clean", "attack" or "worst"."""
    return "clean" if row.name == CLEAN else "worst" if row.attack == WORST else "attack"


def title(row: AttackRecord) -> str:
    """A row's name; a worst case is called by the number of its members."""
    return f"worst of {len(row.description['members'])} attacks" if row.attack == WORST else row.name


def bounded(row: AttackRecord) -> bool:
    """Whether its attack may move an image by no more than so much; of the clean images too."""
    return row.name == CLEAN or row.eps is not None or row.description.get("budget") is not None


def threat(row: AttackRecord) -> str:
    """A row's norm and eps, in words.

    Worded for a heading, such as "linf, eps 8/255".
    """
    return "no attack" if row.name == CLEAN else ball(row.description)


def attacked(record: Record) -> dict[str, list[AttackRecord]]:
    """The rows under attack by threat model: the evaluation's own first, then in the record's order."""
    groups: dict[str, list[AttackRecord]] = {}
    for row in record.attacks:
        if row.name != CLEAN:
            groups.setdefault(threat(row), []).append(row)
    own = record.config.get("evaluation")
    wanted = own.get("eps") if isinstance(own, Mapping) else None

    def rank(rows: Sequence[AttackRecord]) -> tuple[bool, bool, int]:
        eps = radius(rows[0])
        asked = eps is not None and wanted is not None and _same(eps, wanted)
        return (not asked, eps is None, -max(len(row.description.get("members", ())) for row in rows))

    return dict(sorted(groups.items(), key=lambda item: rank(item[1])))


def strongest(record: Record, *, least: int = 1) -> AttackRecord | None:
    """The row to quote: of the first threat model, the worst case of most attacks, else the lowest accuracy.

    Args:
        record: where to look.
        least: images it must have been run on.

    Returns:
        None where there is none.
    """
    for rows in attacked(record).values():
        bounded = [row for row in rows if radius(row) and row.n >= least]
        if bounded:
            return min(bounded, key=lambda row: (-len(row.description.get("members", ())), row.accuracy))
    return None


def for_counts(record: Record) -> AttackRecord | None:
    """The row that classes are counted under: the strongest on many images, else the strongest."""
    return strongest(record, least=BARE_FROM) or strongest(record)


# ---------------------------------------------------------------- per sample


def predictions(row: AttackRecord, outcomes: Outcomes | None) -> np.ndarray | None:
    """What the network said of the first n images under a row's attack, [n].

    Args:
        row: of the record.
        outcomes: of the same record.

    Returns:
        None where the outcomes do not have it, or do not give the record's number.
    """
    if outcomes is None or "label" not in outcomes:
        return None
    label = outcomes["label"][: row.n]
    members = row.description["members"] if row.attack == WORST else [row.name]
    parts = [outcomes[key] for name in [CLEAN, *members] if (key := f"{name}.prediction") in outcomes]
    if len(parts) <= len(members) or any(len(part) < row.n for part in parts):
        return None
    clean, *parts = (part[: row.n] for part in parts)
    found = clean.copy()
    # Backwards, so that the first attack that breaks a sample has the last word on it, as in the evaluator.
    for part in reversed(parts):
        broken = (part != label) & (clean == label)
        found[broken] = part[broken]
    return found if len(label) == row.n and int((found == label).sum()) == row.correct else None


def classes(outcomes: Outcomes, prediction: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Per class: its number, images, right when clean, right under attack.

    Args:
        outcomes: with labels and clean predictions.
        prediction: [n] under attack, of the first n images.
    """
    n = len(prediction)
    label, clean = outcomes["label"][:n], outcomes["clean.prediction"][:n]
    return [
        (int(k), int(of.sum()), int((clean[of] == k).sum()), int((prediction[of] == k).sum()))
        for k in np.unique(label)
        for of in [label == k]
    ]


def confusion(outcomes: Outcomes, prediction: np.ndarray) -> np.ndarray:
    """[K, K] counts, true class by predicted class; K is the highest class seen, plus one."""
    label = outcomes["label"][: len(prediction)]
    size = int(max(label.max(), prediction.max())) + 1
    return np.bincount(label * size + prediction, minlength=size * size).reshape(size, size)


def clean_at(record: Record, outcomes: Outcomes | None, n: int) -> tuple[int, int] | None:
    """How many of the first n images are right when clean, and n; None where it is not known."""
    row = next((row for row in record.attacks if row.name == CLEAN), None)
    if row is not None and row.n == n:
        return row.correct, n
    if row is None or (found := predictions(row, outcomes)) is None or outcomes is None or len(found) < n:
        return None
    return int((found[:n] == outcomes["label"][:n]).sum()), n


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Attacks that differ in one setting only.

    Attributes:
        over: "eps" or "steps".
        name: what they have in common.
        norm: of the budget.
        eps: of all, as the user wrote it; None where it is what differs.
        points: setting, right, n, and the row's name, in the order of the setting.
        n: images, the same at every point.
    """

    over: str
    name: str
    norm: str | None
    eps: float | str | None
    points: tuple[tuple[float, int, str], ...]
    n: int

    def intervals(self) -> list[tuple[float, float, float, float]]:
        """Setting, accuracy and its 95 % interval, point by point."""
        return [(x, correct / self.n, *wilson(correct, self.n)) for x, correct, _ in self.points]


def curves(record: Record, outcomes: Outcomes | None, over: str) -> list[Curve]:
    """Accuracy over eps, or over steps: the rows whose descriptions differ in nothing else.

    A step size may stay as it is or keep its proportion to what differs (a fraction of eps, eps over steps).
    Over eps a curve begins with the clean accuracy at 0.

    Args:
        record: where to look.
        outcomes: its outcomes, for clean accuracy on fewer images.
        over: "eps" or "steps".

    Returns:
        The curves of two and more points.

    Raises:
        ValueError: another setting.
    """
    if over not in ("eps", "steps"):
        raise ValueError(f"over={over!r}: expected eps or steps")
    groups: dict[str, dict[float, AttackRecord]] = {}
    for row in record.attacks:
        value = radius(row) if over == "eps" else row.steps
        if kind(row) != "attack" or value is None or row.eps is None:
            continue
        rest = {k: v for k, v in row.description.items() if k not in ("name", "step_size", over)}
        for rule in _step_rules(row, over, value):
            key = json.dumps([rule, row.n, row.attack, rest], sort_keys=True, default=str)
            groups.setdefault(key, {}).setdefault(float(value), row)
    found: list[Curve] = []
    taken: list[set[str]] = []
    for rows in sorted(groups.values(), key=len, reverse=True):
        names = {row.name for row in rows.values()}
        if len(rows) < 2 or any(names <= other for other in taken):
            continue
        taken.append(names)
        first = next(iter(rows.values()))
        points = [(value, row.correct, row.name) for value, row in sorted(rows.items())]
        clean = clean_at(record, outcomes, first.n)
        if over == "eps" and clean is not None and points[0][0] > 0:
            points.insert(0, (0.0, clean[0], CLEAN))
        found.append(
            Curve(over, _in_common(names), first.norm, None if over == "eps" else first.eps, tuple(points), first.n)
        )
    order = {row.name: place for place, row in enumerate(record.attacks)}
    return sorted(found, key=lambda curve: min(order[name] for *_, name in curve.points if name != CLEAN))


def _step_rules(row: AttackRecord, over: str, value: float) -> list[str]:
    if row.step_size is None or not value:  # at eps 0 there is no scale
        return ["no step size"]
    step = parse_eps(row.step_size)
    scaled = step / value if over == "eps" else step * value
    return [f"step {step:.6g}", f"scaled {scaled:.6g}"]


def _in_common(names: set[str]) -> str:
    """What names begin with: pgd_10 and pgd_20 are pgd.

    Example:
        >>> _in_common({"pgd_10", "pgd_20"}), _in_common({"pgd_40_eps_0.0625", "pgd_40_eps_0.125"})
        ('pgd', 'pgd_40_eps')
    """
    ordered = sorted(names)
    length = next(
        (i for i, (a, b) in enumerate(zip(ordered[0], ordered[-1], strict=False)) if a != b),
        min(len(ordered[0]), len(ordered[-1])),
    )
    start = ordered[0][:length]
    if any(name[length : length + 1].isdigit() for name in names):  # cut within a number
        start = start.rstrip("0123456789.")
    return start.rstrip("_-. ,=") or ordered[0]


# ---------------------------------------------------------------- audit


def verdict(record: Record) -> str | None:
    """The audit's verdict; None where it was not run."""
    if not record.audit:
        return None
    return str(
        record.audit.get("verdict") or min((f["severity"] for f in findings(record)), key=_rank, default="not checked")
    )


def findings(record: Record) -> list[dict[str, str]]:
    """What the audit found, the gravest first, every part as text; none where it was not run.

    A part that is missing is `-`.
    """
    listed = record.audit.get("findings")
    made = [
        {part: _text(item.get(part)) for part in FINDING}
        for item in (listed if isinstance(listed, list | tuple) else ())
        if isinstance(item, Mapping)
    ]
    return sorted(made, key=lambda item: _rank(item["severity"]))


def _rank(severity: str) -> int:
    """A severity that is not known counts as grave."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else 0


def _text(value: Any) -> str:
    if value is None or value == "":
        return NOT_RUN
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- several records


@dataclass(frozen=True)
class Column:
    """One measurement that several records may have: the same attack at the same settings on the same n.

    Attributes:
        name: of the row.
        rows: a row for each record, None where it has none.
    """

    name: str
    rows: tuple[AttackRecord | None, ...]

    @property
    def any(self) -> AttackRecord:
        """A row that is there."""
        return next(row for row in self.rows if row is not None)


def columns(records: Sequence[Record]) -> list[Column]:
    """Every measurement in any of the records; rows of another eps, n or setting are a column of their own."""
    firsts: list[AttackRecord] = []  # of each measurement
    for record in records:
        for row in record.attacks:
            if not any(_one_measurement(first, row) for first in firsts):
                firsts.append(row)
    # Clean first, worst cases last, else as they come.
    firsts.sort(key=lambda first: (first.name != CLEAN, first.attack == WORST))
    return [
        Column(
            first.name,
            tuple(next((row for row in record.attacks if _one_measurement(first, row)), None) for record in records),
        )
        for first in firsts
    ]


def _one_measurement(one: AttackRecord, two: AttackRecord) -> bool:
    return one.name == two.name and not one.unlike(two)


def trade_off(found: Sequence[Column]) -> tuple[Column, Column] | None:
    """The columns of clean accuracy and of the strongest attack that most records, two at least, have in common."""
    clean = [column for column in found if column.name == CLEAN]
    robust = [column for column in found if radius(column.any)]

    def shared(column: Column) -> int:
        return sum(row is not None for row in column.rows)

    if not clean or not robust:
        return None
    x = max(clean, key=shared)

    def rank(column: Column) -> tuple[int, int, float]:
        both = sum(row is not None and other is not None for row, other in zip(column.rows, x.rows, strict=True))
        mean = np.mean([row.accuracy for row in column.rows if row is not None])
        return both, len(column.any.description.get("members", ())), -float(mean)

    y = max(robust, key=rank)
    return (x, y) if rank(y)[0] >= 2 else None


def short_names(records: Sequence[Record]) -> list[str]:
    """Names as short as they can be told apart by: what is the same in all is left out.

    Records of one name get the settings that differ among them, up to _TOLD of them, or else their number.
    """
    parts = []
    for record in records:
        method = str(record.names.get("weights") or record.names.get("defense", record.key))
        added = record.names.get("regularizer")
        if added and added != "none":
            extra = added if isinstance(added, str) else ",".join(map(str, added))
            method += "+" + extra.strip("[]").replace(",", "+")
        chosen = (str(record.names.get(group, "")) for group in ("dataset", "model", "evaluation"))
        rule = str(record.checkpoint.get("rule", ""))
        parts.append([method, *chosen, f"s{record.seed}", record.budget, rule])
    differing = [place for place in range(len(parts[0])) if place == 0 or len({part[place] for part in parts}) > 1]
    names = [" ".join(filter(None, (part[place] for place in differing))) for part in parts]
    for name in [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        alike = [place for place, other in enumerate(names) if other == name]
        for place, settings in zip(alike, _differing_settings([records[place] for place in alike]), strict=True):
            names[place] = f"{name} {settings}".rstrip()
    return [
        f"{name} #{names[:place].count(name) + 1}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _differing_settings(records: Sequence[Record]) -> list[str]:
    """Each record's values of the settings that are not the same in all, "alpha=0 beta=0"; "" where too many."""
    configs = [flat(record.config) for record in records]
    keys = [
        key for key in sorted(set().union(*configs)) if len({str(config.get(key, NOT_RUN)) for config in configs}) > 1
    ]
    keys = [key for key in keys if not key.startswith("evaluation.")] or keys  # what was trained comes first
    shown = keys if len(keys) <= _TOLD else []
    return [" ".join(f"{key.rpartition('.')[2]}={config.get(key, NOT_RUN)}" for key in shown) for config in configs]


def same_images(a: Outcomes, b: Outcomes, n: int) -> bool:
    """Whether the first n outcomes of both are of the same images with the same labels."""
    return all(
        key in a and key in b and len(a[key]) >= n and len(b[key]) >= n and np.array_equal(a[key][:n], b[key][:n])
        for key in ("index", "label")
    )


def _same(a: float, b: Any) -> bool:
    try:
        return abs(a - parse_eps(b)) < 1e-9
    except ValueError:
        return False
