"""From a network to a number: evaluate on the test split, write the record, print the table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi_at.data.base import ImageDataModule
from mi_at.evaluation.evaluate import evaluate
from mi_at.evaluation.outcomes import EvalAttack
from mi_at.results.records import Record, make_record, write_record
from mi_at.results.terminal import print_table


def measure(
    net: nn.Module,
    attacks: Mapping[str, EvalAttack],
    data: ImageDataModule,
    *,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    path: Path,
    device: torch.device | str = "cpu",
    processes: int = 1,
    processes_matter: bool = False,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Record:
    """Evaluate a network on the test split and keep what was found.

    Args:
        net: logits out.
        attacks: by name.
        data: its test split is read here, after training.
        config: resolved; its `evaluation` node says how many samples, in which batches, with which seed.
        checkpoint: which weights: at least {"rule": ...}.
        path: of the record; the per-sample outcomes go beside it.
        device: to evaluate on.
        processes: that trained.
        processes_matter: whether their number can change the result.
        training: notes on the run.
        progress: show it.

    Returns:
        The record, as written.

    Raises:
        OSError: it could not be written; this is known before the evaluation begins.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot write the record to {path.parent}: {why}; choose another output= or run_dir=") from error
    settings = config["evaluation"]
    data.setup("test")
    result = evaluate(
        net,
        attacks,
        data.test_dataloader(),
        device=device,
        seed=settings["seed"],
        n=settings["n"],
        n_of=settings["n_of"],
        batch_size=settings["batch_size"],
        progress=progress,
    )
    record = make_record(
        result,
        config=config,
        checkpoint=checkpoint,
        names=config["choices"],
        processes=processes,
        processes_matter=processes_matter,
        device=device,
        training=training,
        tags={"tags": list(config.get("tags", ())), "group": config.get("group")},
    )
    write_record(path, record, result)
    print_table(record)
    return record
