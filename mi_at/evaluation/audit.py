"""The audit: is it robustness, or do the attacks fail? Every check of docs/AUDIT.md on one network.

Sources of the practice: AutoAttack's own warnings (Croce and Hein 2020), Carlini et al. 2019 (On evaluating adversarial
robustness), Athalye et al. 2018 (Obfuscated gradients), Tramer et al. 2020 (On adaptive attacks), Pintor et al. 2022
(Indicators of attack failure).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.inner import check_eps, check_step
from mi_at.attacks.packing import BatchSize
from mi_at.evaluation import audit_attacks, audit_network, audit_reading
from mi_at.evaluation.audit_case import Case
from mi_at.evaluation.audit_findings import Audit, Check, Finding
from mi_at.evaluation.evaluate import fitting_batch_size
from mi_at.evaluation.outcomes import EvalAttack, EvaluationResult
from mi_at.evaluation.running import logits_of, prepared
from mi_at.functional.geometry import check_norm

CHECKS: tuple[tuple[Check, Callable[[Case], Finding]], ...] = (
    *audit_reading.CHECKS,
    *audit_network.CHECKS,
    *audit_attacks.CHECKS,
)
"""In the order in which they run: what only reads, what only looks at the network, what attacks it."""


def audit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ids: Tensor | None = None,
    *,
    eps: float | str,
    norm: str = "linf",
    result: EvaluationResult | None = None,
    training: Mapping[str, Any] | None = None,
    variants: Mapping[str, nn.Module] | None = None,
    adaptive: Mapping[str, EvalAttack] | Sequence[EvalAttack] | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    n: int = 200,
    steps: int = 50,
    step_size: float | str | None = None,
    restarts: int = 10,
    queries: int = 1000,
    seed: int = 0,
    batch_size: int | str = 250,
    state: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Audit:
    """Tell robustness from attacks that fail.

    The network comes back as it was; every noise is drawn by the seed.

    Args:
        net: images [B, C, H, W] in [0, 1] -> logits [B, K]; moved to `device`.
        x: [N, C, H, W] float in [0, 1], the first samples of the split.
        y: [N] int64.
        ids: [N] int64, their places in the split; None: 0 ... N - 1.
        eps: radius of the threat model, > 0; a number or a fraction.
        norm: "linf" or "l2".
        result: of an evaluation of the same network on the same split: some checks read its attacks.
        training: notes of the training, all optional (`training_notes` makes them of a run): "terms" (the defense's
            `term_history`), "validation" and "validation_last" (best and last robust accuracy on validation, per cent),
            "selected_on" ("validation", "test" or "nothing"), "attack" (its "norm", "eps", "steps", "step_size").
        variants: other versions of the network by name (raw weights, without a mask, its mean): attacks on them are
            tried on `net`. Those without a channel mask or a sampled latent are found by themselves. {}: there are
            none; None: not said.
        adaptive: attacks made for this defense (its training loss, its features, expectation over noise).
        dataset: its name; on "mnist" black-box attacks may find a little more.
        only: names of the checks to run; the others are "not checked". None: all.
        n: samples that the audit's own attacks look at, at most.
        steps: K of the audited ascent; it is followed for 4 K.
        step_size: of it; None: eps / 4.
        restarts: starts that are held against one.
        queries: of Square, where the evaluation has no black-box attack.
        seed: of all noise.
        batch_size: samples at once, or "auto".
        state: a folder for what is finished: an audit that was killed goes on from there. None: nothing is kept.
        device: where to run; None: where the network is.
        progress: a line per check, on standard error.

    Returns:
        A finding per check, in the order of `CHECKS`; one that could not run says why.

    Raises:
        ValueError: a setting out of range, or images, labels and ids that do not belong together.
        EvaluationError: logits of clean images that are not finite or of the wrong shape.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> found = audit(net, torch.rand(8, 1, 2, 2), torch.arange(8) % 3, eps=0.1, steps=2, queries=1, progress=False)
        >>> found["adaptive"].severity
        'not checked'
    """
    radius = float(check_eps(eps, check_norm(norm)))
    if not radius:
        raise ValueError(f"eps={eps}: expected a radius above 0: at 0 there is nothing to audit")
    step = float(check_step(radius / 4 if step_size is None else step_size, steps, norm))
    for name, value in {"n": n, "steps": steps, "restarts": restarts, "queries": queries}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    if unknown := sorted(set(only or ()) - {check.name for check, _ in CHECKS}):
        known = ", ".join(check.name for check, _ in CHECKS)
        raise ValueError(f"only={unknown}: expected names of checks, {known}")
    ids = torch.arange(len(y)) if ids is None else ids
    if not len(x) == len(y) == len(ids) or not len(y) or not x.is_floating_point():
        raise ValueError(
            f"{len(x)} images of {x.dtype}, {len(y)} labels, {len(ids)} ids: expected as many, 1 or more, of float"
        )
    if device is None:
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    device = torch.device(device)
    net.to(device)
    started = time.perf_counter()
    findings: list[Finding] = []
    with prepared(net, seed):
        # `clone` makes tensors of inference mode ordinary ones.
        x, y, ids = x.detach().cpu().clone(), y.detach().cpu().long(), ids.detach().cpu().long()
        batch = BatchSize(fitting_batch_size(net, x, device) if isinstance(batch_size, str) else batch_size)
        looked = torch.arange(min(n, len(y)))
        logits = batch.map(
            lambda x, ids: logits_of(net, x.to(device), ids, seed, "of clean images").cpu(), x[looked], ids[looked]
        )
        case = Case(
            net=net,
            x=x,
            y=y,
            ids=ids,
            base=looked[logits.argmax(dim=1) == y[looked]],
            looked=looked,
            eps=radius,
            norm=norm,
            step_size=step,
            steps=steps,
            restarts=restarts,
            queries=queries,
            seed=seed,
            batch=batch,
            device=device,
            num_classes=logits.shape[1],
            state=state,
            dataset=dataset,
            result=result,
            training=training,
            variants=variants,
            adaptive=_named(adaptive),
        )
        for number, (check, look) in enumerate(CHECKS, start=1):
            began = time.perf_counter()
            if only is None or check.name in only:
                finding = _look(case, check, look)
            else:
                finding = check.unknown("left out by only=", "leave out only=")
            findings.append(finding)
            if progress:
                took = f"{time.perf_counter() - began:.1f} s"
                line = f"audit {number}/{len(CHECKS)} {check.name}: {finding.severity}, {finding.measured} ({took})"
                sys.stderr.write(line + "\n")
    settings = {"n": len(looked), "right": len(case.base), "eps": radius, "norm": norm, "steps": steps}
    settings |= {"step_size": step, "restarts": restarts, "queries": queries, "seed": seed}
    return Audit(findings=tuple(findings), settings=settings, seconds=time.perf_counter() - started)


def training_notes(
    config: Mapping[str, Any], checkpoint: Mapping[str, Any], training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `audit` reads of a training, from the parts of a record.

    Args:
        config: resolved; "attack" and "dataset.val_size" are read.
        checkpoint: {"rule": "best", "last" or an epoch, ...}.
        training: a record's notes.

    Example:
        >>> notes = training_notes({"dataset": {"val_size": 1000}}, {"rule": "best"}, {"validation": 41.0})
        >>> notes["selected_on"], notes["validation"]
        ('validation', 41.0)
    """
    found = dict(training or {})
    if config.get("attack"):
        found.setdefault("attack", config["attack"])
    rule = str(checkpoint.get("rule"))
    if rule == "best":
        # Without a validation split only the test split is left to choose on.
        found.setdefault("selected_on", "validation" if (config.get("dataset") or {}).get("val_size") else "test")
    elif rule == "last":
        found.setdefault("selected_on", "nothing")
    return found


def _look(case: Case, check: Check, look: Callable[[Case], Finding]) -> Finding:
    try:
        return look(case)
    except Exception as error:  # a check that fails is never silent, and never stops the others
        what = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return check.unknown(f"{type(error).__name__}: {what}", "mend what the message names, and audit again")


def _named(attacks: Mapping[str, EvalAttack] | Sequence[EvalAttack] | None) -> dict[str, EvalAttack] | None:
    """Attacks by name; those of a sequence by their own, numbered where two share one."""
    if attacks is None:
        return None
    if isinstance(attacks, Mapping):
        return dict(attacks)
    named: dict[str, EvalAttack] = {}
    for attack in attacks:
        name = str(getattr(attack, "name", None) or attack.describe().get("attack", "attack"))
        if name in named:
            name = f"{name} {len(named) + 1}"
        named[name] = attack
    return named
