"""What an evaluation costs at most: every attack on every image, to its last step.

An upper bound, for the evaluator attacks only what is still right, and AutoAttack's parts only what the part before
left over. A gradient costs two forwards of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mi_at.evaluation.outcomes import CLEAN

APGD_STEPS, FAB_STEPS = 100, 100  # of pyautoattack's versions standard, plus and rand
PLUS_RESTARTS, RAND_SAMPLES = 5, 20
PARTS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
CHECKS = 14  # forwards that AutoAttack makes besides: is the network random, what is left to attack
GRID = 100 + 4 * 20 + 20  # gradients of the audit beside its options': unbounded, four radii, FGSM and lesser ones
OWN_CALLS = 33  # operations of a step beside the network's, counted in a PGD step
ADAPTIVE = 2 * 50 * 2  # its two attacks on the defense, whose loss sees two views


def passes(description: Mapping[str, Any], num_classes: int) -> tuple[int, int]:
    """Gradients and forwards per image, at most.

    Args:
        description: what an attack says of itself (`EvalAttack.describe`).
        num_classes: K.

    Example:
        >>> passes({"attack": "pgd", "steps": 50, "restarts": 10}, 10)
        (500, 20)
        >>> passes({"attack": "clean"}, 10)
        (0, 1)
    """
    kind = str(description["attack"])
    kind = str(description["kind"]) if kind == "transfer" else kind
    if kind == CLEAN:
        return 0, 1
    steps, starts = int(description.get("steps") or 1), int(description.get("restarts") or 1)
    if kind == "autoattack":
        return _autoattack(description, num_classes)
    if kind == "fab":
        return _fab(steps, min(int(description["targets"]), num_classes - 1), num_classes)
    times = {
        "cw_l2": int(description.get("binary_search") or 1),
        "eot": int(description.get("samples") or 1),
        "adaptive": 2,  # the loss of the training sees the clean images too
        "representation": max(1, int(description.get("guides") or 1)),
    }
    every_iterate = steps if description.get("iterate") == "worst" or description.get("minimum_norm") else 1
    return steps * starts * times.get(kind, 1), starts * (every_iterate + 1)


def _fab(steps: int, targets: int, num_classes: int) -> tuple[int, int]:
    """A step of FAB is a backward pass per class, of FAB-T one, and a forward of what it found."""
    if targets:
        return steps * targets, (steps + 4) * targets + 2
    return steps * (num_classes + 1) // 2, 2 * steps + 4


def _autoattack(description: Mapping[str, Any], num_classes: int) -> tuple[int, int]:
    version = str(description["version"])
    starts = PLUS_RESTARTS if version == "plus" else 1
    samples = RAND_SAMPLES if version == "rand" else 1
    targets = min(int(description["targets"]), num_classes - 1)
    fab, fab_t = _fab(FAB_STEPS, 0, num_classes), _fab(FAB_STEPS, targets, num_classes)
    cost = {
        "apgd-ce": (APGD_STEPS * starts * samples + 1, 2 * starts),
        "apgd-dlr": (APGD_STEPS * starts * samples + 1, 2 * starts),
        "apgd-t": ((APGD_STEPS + 1) * targets, 2 * targets),
        "fab": (fab[0] * starts, fab[1] * starts),
        "fab-t": fab_t,
        "square": (0, int(description["queries"]) + 2),
    }
    parts = [cost[part] for part in description.get("attacks") or PARTS.get(version, tuple(cost))]
    return sum(gradients for gradients, _ in parts), sum(forwards for _, forwards in parts) + CHECKS


def evaluation_forwards(
    attacks: Mapping[str, Mapping[str, Any]], evaluation: Mapping[str, Any], *, images: int, num_classes: int
) -> float:
    """An upper bound of an evaluation's forwards, over all its images.

    Args:
        attacks: what each says of itself, by name, "clean" among them.
        evaluation: resolved: `n`, `n_of`, and what it adds to its attacks.
        images: of the test split.
        num_classes: K.

    Example:
        >>> attacks = {"clean": {"attack": "clean"}, "pgd_20": {"attack": "pgd", "steps": 20}}
        >>> evaluation_forwards(attacks, {"n": None, "n_of": {"pgd_20": 10}}, images=100, num_classes=10)
        520.0
    """
    parts = _parts(attacks, evaluation, images, num_classes)
    return float(sum(part.images * (2 * part.gradients + part.forwards) for part in parts))


def evaluation_calls(
    attacks: Mapping[str, Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    *,
    images: int,
    num_classes: int,
    forward: float,
) -> float:
    """Operations that an evaluation asks a device for, one after another: batch by batch, step by step.

    Args:
        attacks: what each says of itself, by name, "clean" among them.
        evaluation: resolved: `batch_size` beside what `evaluation_forwards` reads.
        images: of the test split.
        num_classes: K.
        forward: operations of one forward of the network.

    Example:
        >>> evaluation_calls({"clean": {"attack": "clean"}}, {"batch_size": 50}, images=100, num_classes=10, forward=7)
        80.0
    """
    size = evaluation.get("batch_size")
    total = 0.0
    for part in _parts(attacks, evaluation, images, num_classes):
        batches = math.ceil(part.images / size) if isinstance(size, int) else 1
        total += batches * (part.gradients * (2 * forward + OWN_CALLS) + part.forwards * (forward + OWN_CALLS))
    return total


@dataclass(frozen=True)
class _Part:
    """Of an evaluation: gradients and forwards for each of so many images."""

    images: int
    gradients: int
    forwards: int


def _parts(
    attacks: Mapping[str, Mapping[str, Any]], evaluation: Mapping[str, Any], images: int, num_classes: int
) -> list[_Part]:
    n = min(int(evaluation.get("n") or images), images)
    parts = []
    for name, description in attacks.items():
        of_attack = min(int((evaluation.get("n_of") or {}).get(name) or n), n)
        parts.append(_Part(of_attack, *passes(description, num_classes)))
    parts.append(_Part(n, 0, len(evaluation.get("information") or ())))
    if isinstance(robust := evaluation.get("robust_ncmi"), Mapping):
        rounds, steps = int(robust.get("rounds") or 5), int(robust.get("steps") or 20)
        parts.append(_Part(min(int(robust.get("n") or n), n), rounds * steps, 2 * rounds))
    if isinstance(audit := evaluation.get("audit"), Mapping):
        steps, starts = int(audit.get("steps") or 50), int(audit.get("restarts") or 10)
        gradients = steps * (1 + 4 + starts) + GRID + ADAPTIVE
        parts.append(_Part(min(int(audit.get("n") or n), n), gradients, int(audit.get("queries") or 1000) + steps))
    return parts
