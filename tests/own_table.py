"""A table of one's own in a folder of one's own, for tests of the commands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def search(folder: Path) -> str:
    """What makes Hydra find it."""
    return f"hydra.searchpath=[file://{folder}/conf]"


def write_table(folder: Path, *, cells: Mapping[str, Any], seeds: Sequence[int], **more: Any) -> None:
    """Write conf/table/own.yaml: on digits, with the printed numbers of Table 5 of MIMAE-AT."""
    node = {
        "name": "own",
        "paper": "mimae",
        "number": 5,
        "title": "own",
        "seeds": list(seeds),
        "shared": ["dataset=digits", "model=cnn_tiny", "evaluation=none"],
        "columns": {"clean": "clean"},
        "cells": dict(cells),
        **more,
    }
    path = folder / "conf/table/own.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_dump({"defaults": ["_table", "_self_"], "table": node}, sort_keys=False)
    path.write_text("# @package _global_\n" + document)
