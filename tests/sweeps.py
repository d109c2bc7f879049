"""A sweep of eight cells, and what its records are worth comparing by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.commands import TINY, Done
from tests.own_table import search, write_table

DEFENSES = ("standard_at", "trades", "mart", "alp", "mimae", "shared_info", "mma", "ce")
TIMES = (
    "seconds",
    "date",
    "hours",
    "hours_of_last_start",
    "images_per_second",
    "group",
)  # a group is named by the time
# An attack too, so that a kill finds the evaluation at work.
TYPED = ("table=own", *TINY, "evaluation=chosen", "evaluation/attacks=[pgd_10,fgsm]")


def eight_cells(folder: Path) -> list[str]:
    """Write the table; the command line that runs it there."""
    cells = {defense: [f"defense={defense}"] for defense in DEFENSES}
    write_table(folder, cells=cells, seeds=[0], shared=["dataset=digits", "model=cnn_tiny"])
    return ["-m", search(folder), *TYPED]


def started(folder: Path, *arguments: str, **environment: str) -> Done:
    """The command as a shell starts it: launchers start processes of their own, which are not to be forks of a test."""
    done = subprocess.run(
        [sys.executable, "-m", "mi_at.train", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record by its run, with the outcome of every image, without times."""
    found = {}
    for path in sorted((folder / "runs").glob("*/record.json")):
        outcomes = np.load(path.with_suffix(".npz"))
        document = untimed(json.loads(path.read_text()))
        found[path.parent.name] = document | {"outcomes": {name: outcomes[name].tolist() for name in outcomes.files}}
    return found


def untimed(value: Any) -> Any:
    """Without what the clock says."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMES}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value
