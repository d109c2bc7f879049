"""Checks that only read: the evaluation that is audited, and the notes of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mi_at.evaluation.audit_case import Case, kind
from mi_at.evaluation.audit_findings import Check, Finding, share
from mi_at.evaluation.outcomes import out_of_reach

# docs/AUDIT.md: below it the 95 % interval of an accuracy is wider than 6 points (+-3.1 at 50 %).
SMALL_N = 1000
# docs/AUDIT.md: with fewer, one image is more than 5 points, and no check can pass for certain.
FEW_RIGHT = 20
# docs/AUDIT.md; AutoAttack claims to hold what PGD finds.
SUBSUMPTION_POINTS = 0.3
# docs/AUDIT.md: a term below a thousandth of loss and gradient cannot be told from rounding in bfloat16.
INERT = 1e-3
# docs/AUDIT.md.
DOMINATING = 0.95
# docs/AUDIT.md; Rice et al. 2020 (Overfitting in adversarially robust deep learning) find 5 to 10 on CIFAR-10.
OVERFIT_POINTS = 3.0

N_SMALL = Check(
    name="n_small",
    threshold=f"{SMALL_N} images",
    fine="there are enough images to print the bare number",
    bad="the number has a wide interval",
    todo="quote the interval, which is printed instead of the bare number, or evaluate on more images",
)
REACH = Check(
    name="reach",
    threshold="steps x step size >= eps",
    fine="every ascent can cross the ball it searches",
    bad="an ascent is too short to cross the ball that it claims to search: its number is one of a smaller ball",
    todo="take more steps or longer ones",
)
SUBSUMPTION = Check(
    name="subsumption",
    threshold=f"{SUBSUMPTION_POINTS} points and 2 standard errors",
    fine="AutoAttack breaks what PGD breaks",
    bad="PGD breaks samples that AutoAttack does not: AutoAttack fails on this network",
    todo="quote the worst case per sample over all attacks, and find out why AutoAttack fails (noise, clipping, scale)",
)
SELECTION = Check(
    name="selection",
    threshold="never on the test split",
    fine="the test images had no say in which weights are evaluated",
    bad="the weights were chosen on the test split: the number is optimistic",
    todo="choose on a validation split (dataset.val_size), or take the last weights (select=last)",
)
OVERFIT = Check(
    name="overfit",
    threshold=f"{OVERFIT_POINTS:g} points of robust accuracy between best and last",
    fine="the best and the last weights are about as robust",
    bad="robust overfitting: the last weights are less robust than the best",
    todo="evaluate the best weights as well, stop earlier, or regularize more",
)
TERMS = Check(
    name="terms",
    threshold=f"above {INERT:g} of loss and gradient; at most {DOMINATING:g}",
    fine="every term of the loss has a say",
    bad="a term of the loss has next to no say: what it is for cannot explain the number",
    todo="check its weight and its scale, and train without it to see what it does",
)


def n_small(case: Case) -> Finding:
    """Rows on few images, or few that the audit's own attacks can look at."""
    if len(case.base) < FEW_RIGHT:
        return N_SMALL.says(
            "info",
            f"{len(case.base)} of the {len(case.looked)} images looked at are right when clean",
            meaning="the audit's own attacks have hardly an image to break: that they find nothing says little",
            todo=f"audit with a larger n= (images that are right: {FEW_RIGHT} or more), or train for longer",
        )
    if case.result is None:
        return N_SMALL.unknown("no evaluation was given", "give result=, the evaluation that is audited")
    rows = [case.result.clean, *case.result.attacks.values()]
    small = [f"{row.name} {row.n}" for row in rows if row.n < SMALL_N]
    if small:
        return N_SMALL.says("info", f"images: {', '.join(small)}")
    return N_SMALL.says("pass", f"at least {min(row.n for row in rows)} images")


def reach(case: Case) -> Finding:
    """Attacks of the evaluation and of the training that cannot cross their ball."""
    short, looked = [], []
    if case.result is not None:
        looked.append("the evaluation")
        for row in case.result.attacks.values():
            if "reach" in row.flags:
                short.append(_ascent(row.name, row.description))
    trained_with = (case.training or {}).get("attack")
    if trained_with:
        looked.append("the training")
        if out_of_reach(trained_with):
            short.append(_ascent("the training's attack", trained_with))
    if short:
        return REACH.says("warn", "; ".join(short))
    if not looked:
        return REACH.unknown("no evaluation and no training attack were given", "give result= and training=")
    return REACH.says("pass", f"no short ascent in {' and in '.join(looked)}")


def _ascent(name: str, description: Mapping[str, Any]) -> str:
    return f"{name}: {description['steps']} steps of {description['step_size']} for eps {description['eps']}"


def subsumption(case: Case) -> Finding:
    """What PGD breaks and AutoAttack does not."""
    rows = case.rows()
    pgd = [row for row in rows if row.description.get("attack") == "pgd"]
    whole = [row for row in rows if kind(row.description) == "both"]
    if not pgd or not whole:
        return SUBSUMPTION.unknown(
            f"the evaluation has {len(pgd)} PGD attacks and {len(whole)} AutoAttacks with all components in this ball",
            "evaluate with evaluation=standard and give its result",
        )
    auto = max(whole, key=lambda row: row.n)
    by_pgd = [row for row in pgd if row.n >= auto.n]
    base = case.right_when_clean(auto.n)
    if not by_pgd or not bool(base.any()):
        return SUBSUMPTION.unknown(
            f"no PGD ran on the {auto.n} images of {auto.name}, or the network gets none of them right",
            "evaluate PGD on at least as many images",
        )
    fallen = torch.stack([~row.correct[: auto.n] for row in by_pgd]).any(dim=0)[base]
    found = share(fallen & auto.correct[base])
    union = int((auto.correct & torch.stack([row.correct[: auto.n] for row in by_pgd]).all(dim=0)).sum())
    measured = (
        f"{found} broken by PGD alone; {auto.name} {100 * auto.accuracy:.1f} %, union {100 * union / auto.n:.1f} %"
    )
    return SUBSUMPTION.says("fail" if found.above(SUBSUMPTION_POINTS) else "pass", measured)


def selection(case: Case) -> Finding:
    """On which images the checkpoint was chosen."""
    on = (case.training or {}).get("selected_on")
    if on == "test":
        return SELECTION.says("fail", "chosen on the test split")
    if on in ("validation", "nothing"):
        return SELECTION.says("pass", "chosen on validation" if on == "validation" else "the last weights, not chosen")
    return SELECTION.unknown(
        "how the weights were chosen is not known",
        "say it: training={'selected_on': 'validation', 'test' or 'nothing'}",
    )


def overfit(case: Case) -> Finding:
    """Best against last robust accuracy on validation."""
    notes = case.training or {}
    best, last = notes.get("validation"), notes.get("validation_last")
    if best is None or last is None:
        return OVERFIT.unknown(
            f"robust accuracy on validation: best {_number(best)}, last {_number(last)}",
            "train with a validation split; mi_at notes both in trained.json: audit best.ckpt in its run's folder",
        )
    gap = float(best) - float(last)
    return OVERFIT.says(
        "warn" if gap > OVERFIT_POINTS else "pass", f"best {_number(best)} %, last {_number(last)} %: {gap:.1f} points"
    )


def _number(value: Any) -> str:
    return "not known" if value is None else f"{float(value):.1f}"


def terms(case: Case) -> Finding:
    """Terms of the loss that do nothing, or everything."""
    history: Mapping[str, Mapping[str, float]] | None = (case.training or {}).get("terms")
    if history is None:
        return TERMS.unknown(
            "the training left no history of its terms",
            "train with mi_at, which notes it in trained.json: audit best.ckpt in its run's folder",
        )
    names = [key.partition("/")[2] for key in history if key.startswith("share/")]
    if len(names) < 2:
        return TERMS.says("pass", "the loss has one term")

    def largest(name: str) -> float:
        """The largest say a term ever had."""
        return max(float(history.get(f"{part}/{name}", {}).get("max", 0.0)) for part in ("share", "gradient"))

    def mean(part: str, name: str) -> float:
        return float(history.get(f"{part}/{name}", {}).get("mean", 0.0))

    inert = [name for name in names if largest(name) < INERT]
    found = [f"{name} is inert (at most {largest(name):.1e} of loss and gradient)" for name in inert]
    for name in names:
        # A term that is small in value may still steer: the others must be small in gradient too.
        steered = max(mean("gradient", other) for other in names if other != name)
        if mean("share", name) > DOMINATING and steered < 1 - DOMINATING:
            found.append(
                f"{name} dominates ({mean('share', name):.3f} of the loss, the others' gradient {steered:.3f})"
            )
    if found:
        return TERMS.says("warn", "; ".join(found))
    return TERMS.says("pass", ", ".join(f"{name} {mean('share', name):.3f}" for name in names) + " of the loss")


CHECKS: tuple[tuple[Check, Callable[[Case], Finding]], ...] = (
    (N_SMALL, n_small),
    (REACH, reach),
    (SUBSUMPTION, subsumption),
    (SELECTION, selection),
    (OVERFIT, overfit),
    (TERMS, terms),
)
