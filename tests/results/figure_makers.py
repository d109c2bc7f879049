"""Filled tables of figures with numbers of one's own, and the files that lie beside their records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mi_at.results.measured import Filled, Found, Line
from mi_at.results.records import AttackRecord, Record
from mi_at.results.tables import Table, read_table
from tests.results.makers import record

CLASSES = 4
Numbers = Callable[[int, int, int], float]


FOLDER = Path(__file__).resolve().parents[2] / "conf" / "table"


def table_of(name: str) -> Table:
    """A table of conf/, composed without Hydra, which takes a second for each."""
    return read_table(_node(name))


def _node(name: str) -> dict[str, Any]:
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    node: dict[str, Any] = {}
    for included in document.get("defaults", []):
        if isinstance(included, str) and included != "_self_":
            node = _merged(node, _node(included))
    return {key: value for key, value in _merged(node, document["table"]).items() if value != "???"}


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for key, value in two.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def wave(cell: int, attack: int, seed: int) -> float:
    """Some accuracy in per cent."""
    return 30 + 20 * math.sin(cell) + 2 * seed - attack


def filled(
    table: Table,
    folder: Path,
    *,
    numbers: Numbers = wave,
    seeds: Sequence[int] = (0,),
    cells: Sequence[str] | None = None,
    information: Mapping[str, Any] | None = None,
    n: int = 1000,
) -> Filled:
    """A table in which some cells were measured.

    Args:
        table: which.
        folder: where its run folders are made.
        numbers: (place of the cell, of the attack, seed) -> per cent.
        seeds: of each.
        cells: that were measured; None: all.
        information: of every record.
        n: images.
    """
    made = Filled(table, "smoke")
    first = record()
    for place, cell in enumerate(table.cells.values()):
        measured = cells is None or cell.name in cells
        for number, attack in enumerate(table.more):
            values = {seed: numbers(place, number, seed) for seed in seeds} if measured else {}
            count = n if values else None
            names = (cell.name, cell.row, "digits", "cnn_tiny", attack, attack)
            made.lines.append(Line(*names, None, values, count, (), None))
        if measured:
            own = [_record(first, table, seed, information or {}) for seed in seeds]
            made.records[cell.name] = [Found(_place(folder, cell.name, each.seed), each) for each in own]
    return made


def _place(folder: Path, cell: str, seed: int) -> Path:
    path = folder / f"{cell}-s{seed}" / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _record(first: Record, table: Table, seed: int, information: Mapping[str, Any]) -> Record:
    rows = tuple(_row(first.attacks[0], attack) for attack in table.more)
    return replace(first, seed=seed, attacks=rows, information=dict(information))


def _row(first: AttackRecord, attack: str) -> AttackRecord:
    last = attack.rpartition("_")[2]
    says: dict[str, Any] = {"tap": attack.split("_")[0]}
    if last.replace(".", "").isdigit():
        says["steps" if "steps" in attack else "eps"] = float(last)
    return replace(first, name=attack, description=says, eps=10 / 255)


def probed(made: Filled, attack: str, epochs: int = 8) -> None:
    """Write probe.jsonl beside every record."""
    for place, records in enumerate(made.records.values()):
        lines = [
            {"epoch": e, "step": 10 * e, "clean": 40 + 5 * e, attack: 20 + 3 * e + place, f"{attack} ncmi": 0.5 / e}
            for e in range(1, epochs + 1)
        ]
        _write(records[0].path.with_name("probe.jsonl"), lines)


def planes(made: Filled, points: int = 60) -> None:
    """Write information_plane.jsonl beside every record."""
    for place, records in enumerate(made.records.values()):
        lines = [
            {"epoch": 0, "step": 50 * k, "xt": 30 + k / 2 + 5 * place, "yt": 9 * (1 - math.exp(-k / 20)) - place}
            for k in range(1, points + 1)
        ]
        _write(records[0].path.with_name("information_plane.jsonl"), lines)


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def outputs(made: Filled, names: Sequence[str], *, n: int = 80, images: int = 0) -> None:
    """Write outputs.npz beside every record."""
    random = np.random.default_rng(0)
    for records in made.records.values():
        label = random.integers(CLASSES, size=n)
        arrays: dict[str, np.ndarray] = {"label": label, "index": np.arange(n)}
        for name in names:
            sure = random.normal(size=(n, CLASSES)) + 2 * np.eye(CLASSES)[label]
            arrays |= {f"{name}.logits": sure.astype(np.float32)}
            arrays |= {f"{name}.features": (sure @ random.normal(size=(CLASSES, 12))).astype(np.float16)}
            if images:
                arrays |= {f"{name}.{part}": random.random((images, 3, 8, 8), np.float32) for part in ("x", "guide")}
        np.savez(records[0].path.with_name("outputs.npz"), allow_pickle=False, **arrays)
