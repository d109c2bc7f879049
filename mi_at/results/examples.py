"""The strongest adversarial examples of an evaluation, in a file beside its record."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from mi_at.evaluation.outcomes import EvaluationResult, Examples
from mi_at.results.records import RecordError, read_outcomes, write_atomically

EXAMPLES = "examples.npz"
FIELDS = tuple(item.name for item in fields(Examples))


def write_examples(path: str | Path, result: EvaluationResult | Mapping[str, Examples]) -> Path:
    """Write an evaluation's examples, whole or not at all: per attack `<name>.index`, `<name>.x_adv` and so on.

    Args:
        path: of the file; `EXAMPLES` beside the record by custom.
        result: the evaluation, or its examples by attack; there may be none.

    Returns:
        The path.

    Raises:
        RecordError: the folder cannot be written, or images and labels do not belong together.
    """
    examples = result.examples if isinstance(result, EvaluationResult) else result
    arrays: dict[str, np.ndarray] = {}
    for name, found in examples.items():
        _check(name, found)
        arrays |= {f"{name}.{part}": getattr(found, part).detach().cpu().numpy() for part in FIELDS}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def read_examples(path: str | Path) -> dict[str, Examples]:
    """Read examples.

    Returns:
        By attack, in the order of the evaluation.

    Raises:
        RecordError: missing, half-written or incomplete; the message names the file.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, values in read_outcomes(path).items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = torch.from_numpy(values)
    for name, found in parts.items():
        if set(found) != set(FIELDS):
            raise RecordError(f"{path}: {name} has {', '.join(sorted(found))}, expected {', '.join(FIELDS)}")
    made = {name: Examples(**found) for name, found in parts.items()}
    for name, examples in made.items():
        _check(f"{path}: {name}", examples)
    return made


def beside(path: str | Path) -> tuple[dict[str, np.ndarray] | None, dict[str, Examples]]:
    """What lies beside a record: the outcomes per sample, None where there are none, and the examples.

    Args:
        path: of the record.

    Raises:
        RecordError: a file is damaged.
    """
    outcomes, examples = Path(path).with_suffix(".npz"), Path(path).with_name(EXAMPLES)
    return (
        read_outcomes(outcomes) if outcomes.is_file() else None,
        read_examples(examples) if examples.is_file() else {},
    )


def _check(name: str, examples: Examples) -> None:
    shapes = {part: tuple(getattr(examples, part).shape) for part in FIELDS}
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or len(shapes["x"]) != 4 or shapes["x"] != shapes["x_adv"]:
        raise RecordError(f"examples of {name}: expected k labels and [k, C, H, W] images, found {shapes}")
