"""From a network to a number: evaluate on the test split, audit it, write the record, print the table."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mi_at.data.batch import Batch
from mi_at.evaluation.audit import audit, training_notes
from mi_at.evaluation.evaluate import evaluate
from mi_at.evaluation.information import full_set_information
from mi_at.evaluation.mutual_information import mutual_information
from mi_at.evaluation.outcomes import CLEAN, EvalAttack, EvaluationResult
from mi_at.results.examples import EXAMPLES, write_examples
from mi_at.results.outputs import OUTPUTS, write_outputs
from mi_at.results.page import PAGE, write_page
from mi_at.results.records import Record, git_at_start, make_record, write_record
from mi_at.results.terminal import print_table

STATE = "record.state"
"""Folder beside the record where an evaluation that is interrupted keeps how far it came."""


class Split(Protocol):
    """What is evaluated: an `ImageDataModule`, or images at hand."""

    def setup(self, stage: str) -> None:
        """Read the test split."""

    def test_dataloader(self) -> Iterable[Batch]:
        """The test split in its fixed order."""
        ...


def measure(
    net: nn.Module,
    attacks: Mapping[str, EvalAttack],
    data: Split,
    *,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    path: Path,
    device: torch.device | str = "cpu",
    processes: int = 1,
    processes_matter: bool = False,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
    sharing: int = 1,
    adaptive: Mapping[str, EvalAttack] | None = None,
    variants: Mapping[str, nn.Module] | None = None,
    critics: Mapping[str, nn.Module] | None = None,
) -> Record:
    """Evaluate a network on the test split and keep what was found.

    An evaluation that was interrupted goes on where it was, if the same one is started again.

    Args:
        net: logits out.
        attacks: by name.
        data: its test split is read here, after training.
        config: resolved; its `evaluation` node says how many samples, in which batches, with which seed, and what
            else is wanted: the audit, information, the robust NCMI.
        checkpoint: which weights: at least {"rule": ...}.
        path: of the record; the per-sample outcomes, the strongest examples and a page to read go beside it.
        device: to evaluate on.
        processes: that trained.
        processes_matter: whether their number can change the result.
        training: notes on the run.
        progress: show it.
        sharing: processes that share the evaluation.
        adaptive: for the audit: attacks made for the defense; None: none are known.
        variants: for the audit: other versions of the network, {} where there are none; None: not known.
        critics: for the mutual information: the estimators of defense=mi_estimators.

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
    state = path.parent / STATE
    record, result = assess(
        net,
        attacks,
        data,
        config=config,
        checkpoint=checkpoint,
        device=device,
        processes=processes,
        processes_matter=processes_matter,
        training=training,
        progress=progress,
        sharing=sharing,
        state=state,
        adaptive=adaptive,
        variants=variants,
        critics=critics,
    )
    if outputs := config["evaluation"].get("outputs"):
        x, _, _ = first_samples(data, len(result.label))
        write_outputs(path.with_name(OUTPUTS), net, x, result, attacks=attacks, **outputs)
    write_examples(path.with_name(EXAMPLES), result)
    write_record(path, record, result)
    shutil.rmtree(state, ignore_errors=True)
    print_table(record)
    write_page(path.with_name(PAGE), [path])
    return record


def assess(
    net: nn.Module,
    attacks: Mapping[str, EvalAttack],
    data: Split,
    *,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    device: torch.device | str = "cpu",
    processes: int = 1,
    processes_matter: bool = False,
    training: Mapping[str, Any] | None = None,
    progress: bool = True,
    sharing: int = 1,
    state: Path | None = None,
    adaptive: Mapping[str, EvalAttack] | None = None,
    variants: Mapping[str, nn.Module] | None = None,
    critics: Mapping[str, nn.Module] | None = None,
) -> tuple[Record, EvaluationResult]:
    """`measure` without a disk: what was found, and the outcomes per sample.

    Args:
        net: logits out.
        attacks: by name.
        data: its test split is read here.
        config: as `measure` takes it.
        checkpoint: as `measure` takes it.
        device: to evaluate on.
        processes: that trained.
        processes_matter: whether their number can change the result.
        training: notes on the run.
        progress: show it.
        sharing: processes that share the evaluation.
        state: folder of what is kept of an unfinished evaluation; None: nothing is.
        adaptive: as `measure` takes it.
        variants: as `measure` takes it.
        critics: as `measure` takes it.
    """
    git_at_start()
    settings = config["evaluation"]
    of, estimated = list(settings.get("information") or ()), list(settings.get("mutual_information") or ())
    shown = list((settings.get("outputs") or {}).get("of") or ())
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
        num_classes=getattr(data, "num_classes", None),
        processes=sharing,
        survivors=bool(settings.get("survivors")),
        state=state,
        keep_images=[name for name in dict.fromkeys([*of, *estimated, *shown]) if name != CLEAN],
    )
    samples = functools.cache(lambda: first_samples(data, len(result.label)))
    information: dict[str, Any] = {}
    if of or settings.get("robust_ncmi"):
        x, y, _ = samples()
        information = full_set_information(
            net,
            x,
            y,
            of=of,
            images=result.images,
            robust=_robust(settings),
            batch_size=result.batch_size,
        )
    if estimated:
        x, _, _ = samples()
        information["mutual_information"] = {
            name: mutual_information(net, critics or {}, x[: len(result.images[name])], result.images[name])
            for name in estimated
        }
    audited: dict[str, Any] = {}
    if settings.get("audit"):
        x, y, ids = samples()
        audited = audit(
            net,
            x,
            y,
            ids,
            eps=settings["eps"],
            norm=settings["norm"],
            step_size=settings["step_size"],
            result=result,
            training=training_notes(config, checkpoint, training),
            variants=variants,
            adaptive=adaptive,
            dataset=config["dataset"].get("name"),
            seed=settings["seed"],
            device=device,
            state=state,
            progress=progress,
            **(settings["audit"] if isinstance(settings["audit"], Mapping) else {}),
        ).plain()
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
        information=information,
        audit=audited,
    )
    return record, result


def first_samples(data: Split, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first n samples of the test split: x [n, C, H, W], y [n] and their places [n], on the CPU."""
    parts, found = [], 0
    for batch in data.test_dataloader():
        parts.append((batch.x.cpu(), batch.y.cpu(), batch.index.cpu()))
        found += len(batch.y)
        if found >= n:
            break
    x, y, index = (torch.cat(tensors)[:n] for tensors in zip(*parts, strict=True))
    return x, y, index


def _robust(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of the robust NCMI: those of the protocol's ball, and what `robust_ncmi` says beside."""
    wanted = settings.get("robust_ncmi")
    if not wanted:
        return None
    ball = {key: settings[key] for key in ("eps", "norm", "step_size")}
    return {**ball, "seed": settings["seed"], **(wanted if isinstance(wanted, Mapping) else {})}
