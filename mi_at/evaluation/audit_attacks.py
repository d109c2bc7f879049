"""Checks that attack the network: does an attack that must be stronger find more, and one that must be weaker less?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.contexts import attacking
from mi_at.attacks.pgd import PGD
from mi_at.evaluation.audit_case import Case, kind
from mi_at.evaluation.audit_findings import POINTS, Check, Finding, points, share
from mi_at.evaluation.running import logits_of
from mi_at.models.base import Classifier
from mi_at.models.latent import StochasticLatent

# docs/AUDIT.md: on MNIST at 0.3 the clipped first layers of honest networks hide a little from gradients.
MNIST_POINTS = 4.0
# docs/AUDIT.md; Wong et al. 2020 (Fast is better than free): FGSM stays high where PGD falls to 0.
OVERFITTED_POINTS = 25.0
# docs/AUDIT.md.
RESTART_POINTS = 2.0
SILENT_POINTS = 0.5
UNBOUNDED_SHARE = 1.0
STILL_GROWING = 0.01
SATURATED_SHARE = 0.05
# At linf 0.5 every image can be moved to uniform grey: nothing can tell the classes apart.
UNBOUNDED_EPS, UNBOUNDED_STEPS, UNBOUNDED_STEP_SIZE = 0.5, 100, 0.025
# Multiples of eps over which accuracy must fall; 20 steps of eps / 8 reach 2.5 eps.
GRID, GRID_STEPS = (0.25, 0.5, 1.0, 2.0), 20
TEMPERATURES = (10.0, 100.0, 1000.0)

_TWO_ERRORS = "and 2 standard errors"
_EVALUATE = "give result=, of evaluation=standard"

ONE_STEP = Check(
    name="one_step",
    threshold=f"FGSM below PGD by {POINTS:g} point {_TWO_ERRORS}: fail; above it by {OVERFITTED_POINTS:g}: warn",
    fine="one step finds less than many, and not much less",
    bad="one step finds more than many: the ascent goes wrong",
    todo="shorten the steps, look at the gradients along the ascent, and attack with Square",
)
STEPS = Check(
    name="steps",
    threshold=f"{POINTS:g} point {_TWO_ERRORS} between K and 4 K steps: lower warn, higher fail",
    fine="the attack has converged",
    bad="the attack has not converged: more steps find more",
    todo="quote the attack with more steps",
)
SILENT_SUCCESS = Check(
    name="silent_success",
    threshold=f"{SILENT_POINTS} points {_TWO_ERRORS}",
    fine="what the ascent breaks on its way is broken at its end",
    bad="the ascent breaks samples on its way and loses them again: the last iterate hides successes",
    todo="count a sample as broken at its first misclassified iterate (iterate=worst), and shorten the last steps",
)
INCOMPLETE = Check(
    name="incomplete",
    threshold=f"{100 * STILL_GROWING:g} % in the last 10 % of the steps",
    fine="the cross-entropy of what stays right has stopped growing",
    bad="the cross-entropy of what stays right still grows when the attack stops",
    todo="take more steps",
)
RESTARTS = Check(
    name="restarts",
    threshold=f"{RESTART_POINTS:g} points {_TWO_ERRORS}",
    fine="one start finds what many find",
    bad="many starts find more than one: the landscape is rugged",
    todo="quote the attack with restarts, or AutoAttack",
)
UNBOUNDED = Check(
    name="unbounded",
    threshold=f"{UNBOUNDED_SHARE:g} % {_TWO_ERRORS} left at linf {UNBOUNDED_EPS}; accuracy falls as eps grows",
    fine="an attack with room enough breaks everything, and more room never helps the network",
    bad="samples survive where every image can be made grey: the attack fails, the network is not robust",
    todo="find what hides the gradient (a step without one, noise, a look-up, labels), and attack around it",
)
SATURATION = Check(
    name="saturation",
    threshold=f"probability 1 in float32 for {100 * SATURATED_SHARE:g} % of images, and {POINTS:g} point {_TWO_ERRORS}",
    fine="the scale of the logits hides nothing",
    bad="the logits are so large that the softmax has no gradient in float32: divided, the same attack finds more",
    todo="attack the margin or the DLR, which do not saturate, or divide the logits by a constant in the attack",
)
TRANSFER_FAILURE = Check(
    name="transfer_failure",
    threshold=f"{POINTS:g} point {_TWO_ERRORS}",
    fine="the attack on the network itself is the strongest",
    bad="an attack made on another version of the network beats the direct one: what differs hides the gradient",
    todo="attack through that version, and count both",
)
BLACK_BOX = Check(
    name="black_box",
    threshold=f"{POINTS:g} point {_TWO_ERRORS}; on MNIST up to {MNIST_POINTS:g}: info",
    fine="gradients find what can be found without them",
    bad="samples fall without gradients that no gradient attack breaks: the gradients are masked",
    todo="quote the worst case with the black-box attack, and find what masks the gradient",
)
ADAPTIVE = Check(
    name="adaptive",
    threshold=f"{POINTS:g} point {_TWO_ERRORS} beyond the standard attacks",
    fine="attacks made for this defense find no more than the standard ones",
    bad="an attack made for this defense breaks what the standard ones leave",
    todo="quote the worst case with the adaptive attacks",
)
MADE_FOR_A_DEFENSE = ("adaptive", "feature_shift", "representation", "eot")
"""Kinds of attacks (`describe()["attack"]`) that do not count as standard."""
GIVE_ADAPTIVE = (
    "give adaptive=: PGD on the training loss, on the features at the regularized tap, on the margin, with every term "
    "left out in turn, and in expectation where the network draws noise"
)


# ---------------------------------------------------------------- one ascent, looked at closely
def one_step(case: Case) -> Finding:
    """FGSM against PGD, in the evaluation where both ran, else on the audit's own."""
    rows = case.rows()
    many = [row for row in rows if row.description.get("attack") == "pgd" and int(row.description["steps"]) > 1]
    single = [row for row in rows if row.description.get("attack") == "fgsm"]
    if many and single:
        pgd = max(many, key=lambda row: (int(row.description["steps"]) * int(row.description["restarts"]), row.n))
        n = min(pgd.n, single[0].n)
        base = case.right_when_clean(n)
        by_one, by_many = ~single[0].correct[:n][base], ~pgd.correct[:n][base]
        names = f"{single[0].name} and {pgd.name} of the evaluation"
    else:
        by_one, by_many = case.broken("fgsm"), case.last()
        names = f"FGSM and PGD-{case.steps}"
    if not len(by_one):
        return ONE_STEP.unknown("the network gets none of the images right", "audit a trained network")
    below, above = points(by_one, by_many), points(by_many, by_one)
    measured = f"{names}: {_left(by_one)} and {_left(by_many)} of the right ones stay; FGSM is higher by {above}"
    if below.above(POINTS):
        return ONE_STEP.says("fail", measured)
    if above.above(OVERFITTED_POINTS):
        return ONE_STEP.says(
            "warn",
            measured,
            meaning="the network withstands one step and falls to many: catastrophic overfitting to a one-step attack",
            todo="train with several steps, and never quote FGSM",
        )
    return ONE_STEP.says("pass", measured)


def steps(case: Case) -> Finding:
    """K against 4 K steps."""
    few, many = case.last(), case.last(4 * case.steps)
    measured = f"{case.steps} steps leave {_left(few)}, {4 * case.steps} leave {_left(many)}: {points(many, few)}"
    if points(few, many).above(POINTS):
        return STEPS.says(
            "fail",
            measured,
            meaning="more steps find less: the ascent does not follow the gradient",
            todo="shorten the steps; look for noise and for gradients that are not those of the network",
        )
    return STEPS.says("warn" if points(many, few).above(POINTS) else "pass", measured)


def silent_success(case: Case) -> Finding:
    """The last iterate against any."""
    lost = points(case.worst(), case.last())
    return SILENT_SUCCESS.says(
        "warn" if lost.above(SILENT_POINTS) else "pass", f"broken on the way and right at the end: {lost}"
    )


def incomplete(case: Case) -> Finding:
    """Whether the objective of what stays right still grows when the attack stops."""
    value = case.trace.value[~case.worst(), : case.steps + 1]
    if not len(value):
        return INCOMPLETE.says("pass", "nothing stays right")
    before = value[:, : case.steps + 1 - max(1, round(0.1 * case.steps))].amax(dim=1).double().mean()
    after = value.amax(dim=1).double().mean()
    # Below a thousandth of a nat, growth is that of rounding.
    growth = float((after - before) / before.clamp_min(1e-3))
    measured = f"mean of the largest cross-entropy so far grows by {100 * growth:.2f} % ({len(value)} images)"
    return INCOMPLETE.says("warn" if growth > STILL_GROWING else "pass", measured)


def restarts(case: Case) -> Finding:
    """One start against many."""
    if case.restarts < 2:
        return RESTARTS.unknown("one start is no more than one", "give restarts=10")
    gain = points(case.broken("restarts") | case.last(), case.last())
    measured = f"{case.restarts} starts find more than one: {gain}"
    return RESTARTS.says("warn" if gain.above(RESTART_POINTS) else "pass", measured)


# ---------------------------------------------------------------- where everything must fall
def unbounded(case: Case) -> Finding:
    """Accuracy over eps, and where there is room for everything."""
    big: dict[str, Any] = {
        "eps": UNBOUNDED_EPS,
        "norm": "linf",
        "steps": UNBOUNDED_STEPS,
        "step_size": UNBOUNDED_STEP_SIZE,
        "iterate": "worst",
    }
    left = ~(case.run(PGD(**big)) | case.run(PGD(**big, objective="margin")))
    grid = sorted({min(1.0, factor * case.eps) if case.norm == "linf" else factor * case.eps for factor in GRID})
    fallen = [case.run(case.pgd(eps=eps, step_size=eps / 8, steps=GRID_STEPS, iterate="worst")) for eps in grid]
    curve = ", ".join(f"{_left(broken)} at {eps:.3g}" for eps, broken in zip(grid, fallen, strict=True))
    measured = f"left at linf {UNBOUNDED_EPS}: {share(left)}; over eps: {curve}"
    if share(left).above(UNBOUNDED_SHARE):
        return UNBOUNDED.says("fail", measured)
    rises = [
        points(fallen[small], fallen[large]) for small in range(len(grid)) for large in range(small + 1, len(grid))
    ]
    if any(rise.above(POINTS) for rise in rises):
        return UNBOUNDED.says(
            "fail", measured, meaning="accuracy rises with eps: the attack fails where it has more room"
        )
    return UNBOUNDED.says("pass", measured)


# ---------------------------------------------------------------- other ways to the same network
class _Divided(nn.Module):
    """Logits divided by a temperature; 0: in float64 instead."""

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits / self.temperature if self.temperature else logits.double()

    def extra_repr(self) -> str:
        """Tells what was found with one temperature from what was found with another."""
        return f"temperature={self.temperature}"


def saturation(case: Case) -> Finding:
    """The same attack on logits that are divided, where the softmax is exactly 1."""
    x, ids = case.x[case.base], case.ids[case.base]
    logits = case.batch.map(
        lambda x, ids: logits_of(case.net, x.to(case.device), ids.to(case.device), case.seed, "").cpu(), x, ids
    )
    saturated = float((logits.softmax(dim=1).amax(dim=1) == 1).float().mean())
    measured = f"probability exactly 1 for {100 * saturated:.1f} % of the images"
    if saturated <= SATURATED_SHARE:
        return SATURATION.says("pass", measured)
    gains = {
        "in float64" if not temperature else f"logits / {temperature:g}": points(
            case.run(case.pgd(), net=_Divided(case.net, temperature)), case.last()
        )
        for temperature in (0.0, *TEMPERATURES)
    }
    name, best = max(gains.items(), key=lambda item: item[1].value)
    return SATURATION.says(
        "fail" if best.above(POINTS) else "pass", f"{measured}; the same attack with {name} finds more: {best}"
    )


@dataclass(frozen=True, eq=False)
class _Via:
    """An attack made on another network."""

    attack: PGD
    net: nn.Module

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        with attacking(self.net):
            return self.attack(self.net, x, y, ids=ids, seed=seed)

    def describe(self) -> Mapping[str, Any]:
        return {**self.attack.describe(), "surrogate": True}


def transfer_failure(case: Case) -> Finding:
    """Attacks made on other versions of the network."""
    variants = {**own_variants(case.net), **(case.variants or {})}
    if not variants:
        if case.variants is not None:
            return TRANSFER_FAILURE.says("pass", "the network has no other version")
        return TRANSFER_FAILURE.unknown(
            "no other version of the network is known",
            "give variants=: raw weights where they are averaged, without its mask, with its mean; {}: there are none",
        )
    gains = {}
    for name, variant in variants.items():
        by_way = case.run(_Via(case.pgd(), variant.to(case.device)))
        gains[name] = points(by_way, case.last())
    measured = "; ".join(f"made on {name}, the attack finds more: {gain}" for name, gain in gains.items())
    return TRANSFER_FAILURE.says("fail" if any(gain.above(POINTS) for gain in gains.values()) else "pass", measured)


def own_variants(net: nn.Module) -> dict[str, nn.Module]:
    """Other versions that a network of mi_at has: without its channel mask, and with the mean of its latent.

    Example:
        >>> own_variants(nn.Linear(1, 1))
        {}
    """
    found: dict[str, nn.Module] = {}
    if not isinstance(net, Classifier):
        return found
    if not isinstance(net.last_conv_gate, nn.Identity):
        found["the unmasked network"] = unmasked = copy.deepcopy(net)
        unmasked.last_conv_gate = nn.Identity()
    if isinstance(net.latent, StochasticLatent) and net.latent.test == "sample":
        found["the mean network"] = mean = copy.deepcopy(net)
        if isinstance(mean.latent, StochasticLatent):
            mean.latent.test = "mean"
    return found


def black_box(case: Case) -> Finding:
    """What falls without gradients and with none."""
    rows = [row for row in case.rows() if kind(row.description) == "black box"]
    names = ", ".join(row.name for row in rows) or f"Square with {case.queries} queries"
    if rows:
        n = min(row.n for row in rows)
        fallen = torch.stack([~row.correct[:n] for row in rows]).any(dim=0) & case.right_when_clean(n)
        base, ids = case.right_when_clean(n), _result_ids(case, n)
    else:
        square = AutoAttack(
            eps=case.eps,
            norm=case.norm,
            attacks=["square"],
            queries=case.queries,
            batch_size=case.batch.size,
            name="square",
        )
        fallen, ids = case.run(square), case.ids[case.base]
        base = torch.ones(len(ids), dtype=torch.bool)
    if not bool(base.any()):
        return BLACK_BOX.unknown("the network gets none of the images right", "audit a trained network")
    alone = fallen & ~torch.isin(ids, _by_gradients(case))
    # A last try with the strongest gradient attacks on the few that are left.
    places = torch.isin(case.ids, ids[alone]).nonzero().squeeze(1)
    if len(places):
        strongest = AutoAttack(
            eps=case.eps, norm=case.norm, attacks=["apgd-ce", "apgd-t"], batch_size=case.batch.size, name="apgd"
        )
        alone &= ~torch.isin(ids, case.ids[places[case.run(strongest, places=places)]])
    found = share(alone[base])
    measured = f"{names}: {found} broken by no gradient attack"
    if not found.above(POINTS):
        return BLACK_BOX.says("pass", measured)
    if case.dataset == "mnist" and found.value <= MNIST_POINTS:
        return BLACK_BOX.says("info", measured, meaning="usual on MNIST, where honest networks clip what they see")
    return BLACK_BOX.says("fail", measured)


def adaptive(case: Case) -> Finding:
    """Attacks made for this defense, given or in the evaluation, against all others."""
    rows = case.rows()
    made_for_it = [row for row in rows if row.description.get("attack") in MADE_FOR_A_DEFENSE]
    if not case.adaptive and not made_for_it:
        return ADAPTIVE.unknown("no attack made for this defense was given", GIVE_ADAPTIVE)
    standard = case.by_gradients()
    for row in rows:
        if not any(row is other for other in made_for_it):
            standard = standard | case.at_base(row)
    fallen = {row.name: case.at_base(row) for row in made_for_it}
    fallen |= {name: case.run(attack) for name, attack in (case.adaptive or {}).items()}
    beyond = share(torch.stack(list(fallen.values())).any(dim=0) & ~standard)
    each = ", ".join(f"{name} leaves {_left(broken)}" for name, broken in fallen.items())
    measured = f"{each}; the standard ones leave {_left(standard)}; broken by adaptive ones alone: {beyond}"
    return ADAPTIVE.says("fail" if beyond.above(POINTS) else "pass", measured)


def _by_gradients(case: Case) -> Tensor:
    """Ids of the samples that a gradient attack breaks, the evaluation's and the audit's own."""
    own = case.ids[case.base[case.by_gradients()]]
    if case.result is None:
        return own
    rows = [row for row in case.rows() if kind(row.description) == "gradient"]
    return torch.cat([own, *(case.result.index[: row.n][~row.correct] for row in rows)])


def _result_ids(case: Case, n: int) -> Tensor:
    if case.result is None:
        raise ValueError("no evaluation was given")
    return case.result.index[:n]


def _left(broken: Tensor) -> str:
    return f"{100 * float((~broken).float().mean()):.1f} %"


CHECKS: tuple[tuple[Check, Callable[[Case], Finding]], ...] = (
    (ONE_STEP, one_step),
    (STEPS, steps),
    (SILENT_SUCCESS, silent_success),
    (INCOMPLETE, incomplete),
    (RESTARTS, restarts),
    (UNBOUNDED, unbounded),
    (SATURATION, saturation),
    (TRANSFER_FAILURE, transfer_failure),
    (BLACK_BOX, black_box),
    (ADAPTIVE, adaptive),
)
