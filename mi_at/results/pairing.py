"""Two sides of a comparison: the records of one configuration, a seed each, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.records import AttackRecord, Record, config_hash, flat, read_outcomes, read_record, seed_keys
from mi_at.results.statistics import Difference, holm, paired_over_images, paired_over_seeds

RECORD = "record.json"
UNION = "worst of"


class ComparisonError(ValueError):
    """Records that cannot be compared; the message names them and why."""


@dataclass(frozen=True)
class Side:
    """Runs of one configuration that differ in their seed alone.

    Attributes:
        records: by seed, ascending.
        outcomes: per-sample outcomes of each, in the same order.
        name: readable, without the seed.
    """

    records: tuple[Record, ...]
    outcomes: tuple[Mapping[str, np.ndarray], ...]
    name: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of training."""
        return tuple(record.seed for record in self.records)


@dataclass(frozen=True)
class Row:
    """One attack on both sides.

    Attributes:
        name: of the attack; a worst case is called by its number of members.
        n: images.
        a, b: mean accuracies over the seeds, in [0, 1].
        difference: b - a, paired.
        p: of no difference, adjusted for the number of attacks by Holm's rule; None where there is none.
        both_clean: accuracies of a and b, and their number of images, among those that both get right when clean: at
            the same clean accuracy, 100 %; means over the seeds. None for clean accuracy itself.
        matched: b - a among these images, paired; None as `both_clean`.
        says: what the attack says of itself.
    """

    name: str
    n: int
    a: float
    b: float
    difference: Difference
    p: float | None
    both_clean: tuple[float, float, int] | None
    matched: Difference | None = None
    says: Mapping[str, Any] = field(default_factory=dict)


def read_side(path: str | Path, seeds: Collection[int] | None = None) -> Side:
    """The records of a path: a record.json, a run folder, or a folder of run folders that differ in their seed.

    Args:
        path: of them.
        seeds: that are wanted; None: all there are.

    Raises:
        ComparisonError: no record there, a seed that is not there, or records of several configurations.
        RecordError: a record or its outcomes are damaged.
    """
    path = Path(path)
    if path.is_file():
        found = [path]
    elif (path / RECORD).is_file():
        found = [path / RECORD]
    else:
        found = sorted(path.glob(f"*/{RECORD}"))
    if not found:
        raise ComparisonError(f"{path}: no {RECORD} there: give a record, a run folder, or a folder of run folders")
    records = sorted(((read_record(place), place) for place in found), key=lambda pair: pair[0].seed)
    kinds = {config_hash(record.config, without=seed_keys(record.config)) for record, _ in records}
    if len(kinds) > 1:
        keys = ", ".join(record.key for record, _ in records)
        raise ComparisonError(f"{path} holds several configurations ({keys}): one side of a comparison is one of them")
    there = [record.seed for record, _ in records]
    if len(set(there)) < len(there):
        raise ComparisonError(f"{path} holds several runs of one seed ({there}): give one of them")
    if seeds is not None:
        if lacking := sorted(set(seeds) - set(there)):
            raise ComparisonError(f"{path}: no run of seed {lacking[0]}: it has {', '.join(map(str, there))}")
        records = [(record, place) for record, place in records if record.seed in seeds]
    first = records[0][0]
    name = first.key.removesuffix(f"-s{first.seed}")
    outcomes = tuple(read_outcomes(place.with_suffix(".npz")) for _, place in records)
    return Side(tuple(record for record, _ in records), outcomes, name)


def compare(a: Side, b: Side) -> tuple[list[Row], list[str]]:
    """Every attack that was run alike on both sides.

    Args:
        a: the first side.
        b: the second.

    Returns:
        The rows, and a sentence for each attack that cannot be compared.

    Raises:
        ComparisonError: different data, budgets or seeds, or no attack in common.
    """
    one, two = a.records[0], b.records[0]
    facts = {
        "dataset": (one.names.get("dataset"), two.names.get("dataset")),
        "split": (one.split, two.split),
        "budget": (one.budget, two.budget),
        "seeds": (a.seeds, b.seeds),
    }
    for what, (first, second) in facts.items():
        if first != second and (what != "seeds" or max(len(a.seeds), len(b.seeds)) > 1):
            both = ",".join(str(seed) for seed in a.seeds if seed in b.seeds)
            mend = f"; --seeds {both} compares those that both have" if what == "seeds" and both else ""
            raise ComparisonError(f"{what}: {first} and {second}: only what was measured alike can be compared{mend}")
    found, apart, unequal = [], [], set()
    for row in one.attacks:
        other = next((candidate for candidate in two.attacks if candidate.name == row.name), None)
        if other is None:
            apart.append(f"{row.name}: only the first was attacked with it")
        elif unlike := row.unlike(other):
            apart.append(f"{row.name}: " + ", ".join(unlike))
            unequal.add(row.name)
        elif members := sorted(unequal & set(row.description.get("members", ()))):
            apart.append(f"{row.name}: {', '.join(members)} is not the same attack on both")
        else:
            found.append(_row(a, b, row))
    names = {row.name for row in one.attacks}
    apart += [f"{row.name}: only the second was attacked with it" for row in two.attacks if row.name not in names]
    if not found:
        raise ComparisonError("no attack was run alike on both: " + "; ".join(apart))
    known = [row for row in found if row.p is not None]
    adjusted = dict(zip([row.name for row in known], holm([row.p or 0.0 for row in known]), strict=True))
    return [replace(row, p=adjusted.get(row.name)) for row in found], apart


def _row(a: Side, b: Side, attack: AttackRecord) -> Row:
    n = attack.n
    right = [[_right(record, outcomes, attack) for record, outcomes in _runs(side)] for side in (a, b)]
    mean_a, mean_b = (float(np.mean([outcome.mean() for outcome in side])) for side in right)
    title = attack.name
    if title.startswith(UNION):
        title = f"worst of {len(attack.description['members'])} (n {n})"
    clean = [
        [outcomes[f"{CLEAN}.prediction"][:n] == outcomes["label"][:n] for outcomes in side.outcomes] for side in (a, b)
    ]
    both = [one & two for one, two in zip(*clean, strict=True)]
    gap = _gap(*right)
    if attack.name == CLEAN or not all(images.any() for images in both):
        return Row(title, n, mean_a, mean_b, gap, gap.p, None, says=attack.description)
    chosen = [[outcome[images] for outcome, images in zip(side, both, strict=True)] for side in right]
    at_a, at_b = (float(np.mean([outcome.mean() for outcome in side])) for side in chosen)
    images = round(float(np.mean([images.sum() for images in both])))
    return Row(title, n, mean_a, mean_b, gap, gap.p, (at_a, at_b, images), _gap(*chosen), attack.description)


def _gap(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Difference:
    """Of several seeds over the seeds, of one over its images."""
    if len(a) > 1:
        fewest = min(map(len, a))
        return paired_over_seeds(*([outcome.mean() for outcome in side] for side in (a, b)), n=fewest)
    return paired_over_images(a[0], b[0])


def _runs(side: Side) -> list[tuple[Record, Mapping[str, np.ndarray]]]:
    return list(zip(side.records, side.outcomes, strict=True))


def _right(record: Record, outcomes: Mapping[str, np.ndarray], attack: AttackRecord) -> np.ndarray:
    """[n] bool, by the outcomes beside the record; a worst case is right where all its members are."""
    label = outcomes["label"][: attack.n]
    members = attack.description["members"] if attack.name.startswith(UNION) else [attack.name]
    right = np.ones(attack.n, bool)
    for name in members:
        if f"{name}.prediction" not in outcomes:
            raise ComparisonError(f"{record.key}: the outcomes lack {name}: evaluate it again")
        right &= outcomes[f"{name}.prediction"][: attack.n] == label
    return right


def differences(a: Record, b: Record) -> list[tuple[str, Any, Any]]:
    """Keys of the configurations that differ, with both values; `-` where one has no such key."""
    one, two = flat(a.config), flat(b.config)
    rows = [(key, one.get(key, "-"), two.get(key, "-")) for key in sorted(one.keys() | two.keys())]
    return [row for row in rows if row[1] != row[2]]


def term_shares(records: Sequence[Record]) -> dict[str, tuple[float, float | None]]:
    """Mean share of the loss, and ratio of the gradient norm where it was read, by term, over the runs."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, values in (record.training.get("terms") or {}).items():
            kind, _, term = key.partition("/")
            if kind in ("share", "gradient") and isinstance(values, Mapping):
                shares, ratios = found.setdefault(term, ([], []))
                (shares if kind == "share" else ratios).append(float(values["mean"]))
    return {
        term: (float(np.mean(shares)) if shares else 0.0, float(np.mean(ratios)) if ratios else None)
        for term, (shares, ratios) in found.items()
    }
