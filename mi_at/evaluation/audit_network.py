"""Checks that look at the network itself, with a few forwards and one gradient: outputs, noise, companions, slope."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mi_at.evaluation.audit_case import Case
from mi_at.evaluation.audit_findings import POINTS, Check, Finding, points
from mi_at.evaluation.evaluate import SOFTMAX, SOFTMAX_TOLERANCE
from mi_at.evaluation.outcomes import EvaluationError
from mi_at.evaluation.running import SAME, input_gradient, isolated, spread, without_gradient

# docs/AUDIT.md; AutoAttack warns at the first image.
ZERO_WARN, ZERO_FAIL = 0.01, 0.10
FORWARDS = 5
FEW = 64  # images of a forward that is compared; enough companions for a statistic over the batch

OUTPUTS = Check(
    name="softmax",
    threshold="logits, not probabilities; logarithms find 1 point and 2 standard errors more: fail",
    fine="the network returns logits",
    bad=SOFTMAX,
    todo="leave the softmax out of the network, and evaluate again",
)
STOCHASTIC = Check(
    name="stochastic",
    threshold=f"{SAME:g} of the logits' spread over {FORWARDS} forwards",
    fine="equal images give equal logits",
    bad="the network draws noise at test: an attack that sees one draw is weak, and its plain number is not quotable",
    todo="quote an attack on the expectation (EOT, 20 draws) and AutoAttack's version rand instead",
)
COMPANIONS = Check(
    name="batch_coupled",
    threshold=f"{SAME:g} of the logits' spread; every module in eval mode",
    fine="a sample's logits are its own",
    bad="a sample's logits depend on the others of its batch: an image is not attacked in the company it is judged in",
    todo="use running statistics at test, and nothing that is computed from the batch or its labels",
)
ZERO_GRAD = Check(
    name="zero_grad",
    threshold=f"{100 * ZERO_WARN:g} % warn, {100 * ZERO_FAIL:g} % fail",
    fine="the cross-entropy has a gradient at the images",
    bad="the gradient is zero for whole images: gradient attacks see nothing there and report robustness",
    todo="attack without the step that has no gradient, or through a differentiable stand-in (BPDA), and with Square",
)


class _Logarithm(nn.Module):
    """Logits of a network that returns probabilities."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        p: Tensor = self.net(x)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def softmax(case: Case) -> Finding:
    """Whether the outputs are probabilities, and what that hides."""
    logits = _logits(case, case.x[case.looked])
    probability = (logits >= 0).all(dim=1) & ((logits.double().sum(dim=1) - 1).abs() < SOFTMAX_TOLERANCE)
    measured = f"{100 * float(probability.float().mean()):.1f} % of the outputs are probability distributions"
    if not bool(probability.all()):
        return OUTPUTS.says("pass", measured)
    if not len(case.base):
        return OUTPUTS.says("warn", measured)
    try:
        gain = points(case.run(case.pgd(), net=_Logarithm(case.net)), case.last())
    except (RuntimeError, EvaluationError) as error:  # without gradients; zero_grad says so
        return OUTPUTS.says("warn", f"{measured}; {error}")
    return OUTPUTS.says(
        "fail" if gain.above(POINTS) else "warn", f"{measured}; on their logarithms the attack finds more: {gain}"
    )


def stochastic(case: Case) -> Finding:
    """Equal forwards."""
    found = _noise(case)
    measured = f"{FORWARDS} forwards differ by {found:.1e} of the logits' spread"
    if found <= SAME:
        return STOCHASTIC.says("pass", measured)
    told = [row.description for row in case.rows()] + [attack.describe() for attack in (case.adaptive or {}).values()]
    expectation = [d for d in told if "eot" in str(d.get("attack")) or d.get("version") == "rand"]
    if expectation:
        names = ", ".join(str(d.get("name") or d.get("attack")) for d in expectation)
        return STOCHASTIC.says("warn", f"{measured}; attacked in expectation by {names}", todo=f"quote {names} alone")
    return STOCHASTIC.says("fail", measured)


def batch_coupled(case: Case) -> Finding:
    """The same samples in other company."""
    training = [name or "the network" for name, module in case.net.named_modules() if module.training]
    if training:
        return COMPANIONS.says("fail", f"in train mode at test: {', '.join(training[:3])}")
    x = case.x[case.looked[:FEW]]
    if len(x) < 2:
        return COMPANIONS.unknown("one image has no companions", "audit 2 images or more")
    kept = torch.arange(len(x)) % 2 == 0
    others = 1 - x.flip(0)  # not images of the set: a statistic of the batch moves
    with isolated(case.seed):
        usual = _logits(case, x)
    with isolated(case.seed):
        changed = _logits(case, torch.where(kept.view(-1, 1, 1, 1), x, others))
    gap = (changed - usual)[kept].abs().max()
    how = "with other companions"
    if _noise(case) <= SAME:  # noise is drawn by place
        turned = (_logits(case, x.flip(0)).flip(0) - usual).abs().max()
        how = "in another order" if float(turned) > float(gap) else how
        gap = torch.maximum(gap, turned)
    found = float(gap) / spread(usual)
    return COMPANIONS.says("fail" if found > SAME else "pass", f"logits differ by {found:.1e} of their spread {how}")


def zero_grad(case: Case) -> Finding:
    """Images without an input gradient."""
    if not len(case.base):
        return ZERO_GRAD.unknown("the network gets none of the images right", "audit a trained network")
    zero = case.batch.map(
        lambda x, y: without_gradient(input_gradient(case.net, x.to(case.device), y)),
        case.x[case.base],
        case.y[case.base],
    )
    found = float(zero.float().mean())
    severity = "fail" if found > ZERO_FAIL else "warn" if found > ZERO_WARN else "pass"
    return ZERO_GRAD.says(severity, f"{100 * found:.1f} % of {len(zero)} images have no usable gradient")


def _noise(case: Case) -> float:
    """How far equal forwards lie apart, at most, in units of the logits' spread."""
    x = case.x[case.looked[:FEW]]
    draws = torch.stack([_logits(case, x) for _ in range(FORWARDS)])
    return float((draws - draws[0]).abs().max()) / spread(draws[0])


def _logits(case: Case, x: Tensor) -> Tensor:
    """[n, K] float32 on the CPU, with the noise that the network draws."""
    with torch.no_grad():
        found: Tensor = case.batch.map(lambda x: case.net(x.to(case.device)).float().cpu(), x)
    return found


CHECKS: tuple[tuple[Check, Callable[[Case], Finding]], ...] = (
    (OUTPUTS, softmax),
    (STOCHASTIC, stochastic),
    (COMPANIONS, batch_coupled),
    (ZERO_GRAD, zero_grad),
)
