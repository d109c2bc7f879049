"""What the checks of an audit share: the network, the samples it gets right, and attacks that several of them read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.packing import BatchSize, Kept, tensor
from mi_at.attacks.pgd import PGD
from mi_at.evaluation.evaluate import evaluate
from mi_at.evaluation.identity import identify, key_of
from mi_at.evaluation.outcomes import AttackResult, EvalAttack, EvaluationResult, radius
from mi_at.evaluation.pieces import Pieces, fingerprint
from mi_at.functional import random
from mi_at.functional.geometry import ascent_direction, project, start_noise

# Leaves room for 2**40 ids below the step in the key of a stochastic layer's noise (as in attacks/active.py).
_STEP = 1 << 40


class NothingRightError(ValueError):
    """The network gets no sample right, so that no attack can be held against it."""


@dataclass(frozen=True)
class Trace:
    """One ascent of the cross-entropy, looked at in every step.

    Attributes:
        wrong: [m, steps + 1] bool, whether the iterate is misclassified, the start first.
        value: [m, steps + 1] float32, its cross-entropy.
    """

    wrong: Tensor
    value: Tensor


@dataclass(kw_only=True)
class Case:
    """One network under audit.

    Attributes:
        net: logits; frozen, in eval mode (the audit sees to it).
        x: [N, C, H, W] float in [0, 1], all samples at hand; y, ids: [N] int64. On the CPU.
        base: places in x of the samples that the checks attack: right when clean, among the first few.
        looked: places in x of the samples that were looked at for that.
        eps, norm, step_size, steps: of the ascent that is audited.
        restarts, queries: of the repetition from many starts, and of Square.
        seed: of all noise.
        batch: how many samples at once.
        device: of the network.
        num_classes: of the network.
        state: folder of what is finished, for an audit that was interrupted; None: nothing is kept.
        dataset: its name, where it is known.
        result: of an evaluation on the same split.
        training: notes of the training; `audit` says which keys are read.
        variants: other networks to make the attack on, by name; None: not said.
        adaptive: attacks made for this defense, by name; None: none were given.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor
    base: Tensor
    looked: Tensor
    eps: float
    norm: str
    step_size: float
    steps: int
    restarts: int
    queries: int
    seed: int
    batch: BatchSize
    device: torch.device
    num_classes: int
    state: Path | None = None
    dataset: str | None = None
    result: EvaluationResult | None = None
    training: Mapping[str, Any] | None = None
    variants: Mapping[str, nn.Module] | None = None
    adaptive: Mapping[str, EvalAttack] | None = None
    _broken: dict[str, Tensor] = field(default_factory=dict)

    # ---------------------------------------------------------------- attacks that the audit runs
    def pgd(self, **changes: Any) -> PGD:
        """The audited ascent, with other settings where they are given."""
        values: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "step_size": self.step_size, "steps": self.steps}
        return PGD(**{**values, **changes})

    def run(self, attack: EvalAttack, *, net: nn.Module | None = None, places: Tensor | None = None) -> Tensor:
        """[m] bool: which samples an attack breaks, those of the base unless others are given."""
        places = self.base if places is None else places
        if not len(places):
            raise NothingRightError("the network gets none of the samples right")
        result = evaluate(
            self.net if net is None else net,
            {"attack": attack},
            [(self.x[places], self.y[places], self.ids[places])],
            device=self.device,
            seed=self.seed,
            batch_size=self.batch.size,
            progress=False,
            keep=0,
            state=self.state,
        )
        # The last row of a minimum-norm attack is the one within its radius.
        row = list(result.attacks.values())[-1]
        return ~row.correct & result.clean.correct

    def broken(self, name: str) -> Tensor:
        """[m] bool of an attack that several checks read: "fgsm", "margin" or "restarts" (those after the trace's)."""
        if name not in self._broken:
            attacks: dict[str, EvalAttack] = {
                "fgsm": FGSM(eps=self.eps, norm=self.norm),
                "margin": self.pgd(objective="margin", iterate="worst"),
                "restarts": self.pgd(restarts=max(1, self.restarts - 1)),
            }
            self._broken[name] = self.run(attacks[name])
        return self._broken[name]

    @cached_property
    def trace(self) -> Trace:
        """Four times the audited number of steps, from one random start."""
        if not len(self.base):
            raise NothingRightError("the network gets none of the samples right")
        samples = self.x[self.base], self.y[self.base], self.ids[self.base]
        pieces = Pieces(self.state)
        key = ""
        if pieces.folder is not None:
            identity, *_ = identify(self.net, *samples, device=self.device, seed=self.seed)
            key = fingerprint(key_of(pieces, identity), self.eps, self.norm, self.step_size, self.steps, self.seed)

        def compute(number: int) -> Kept:
            wrong, value = self.batch.map(self._ascend, *samples)
            return {"wrong": wrong, "value": value}

        kept = next(kept for _, kept in pieces.run([f"trace-{key}"], compute))
        return Trace(tensor(kept, "wrong"), tensor(kept, "value"))

    def last(self, steps: int | None = None) -> Tensor:
        """[m] bool: wrong at the iterate of that step; None: the audited last one."""
        return self.trace.wrong[:, self.steps if steps is None else steps]

    def worst(self, steps: int | None = None) -> Tensor:
        """[m] bool: wrong at any iterate up to that step."""
        return self.trace.wrong[:, : (self.steps if steps is None else steps) + 1].any(dim=1)

    def by_gradients(self) -> Tensor:
        """[m] bool: broken by any gradient attack of the audit's own."""
        return self.worst(4 * self.steps) | self.broken("margin") | self.broken("restarts")

    def _ascend(self, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, y, ids = x.to(self.device), y.to(self.device), ids.to(self.device)
        shape, noise = x.shape[1:], random.key(self.seed, "audit")
        uniform, gaussian = random.uniform(ids, shape, noise), random.gaussian(ids, shape, noise + 1)
        x_adv = project(
            x + start_noise("uniform", uniform, gaussian, self.eps, self.norm).to(x), x, self.eps, self.norm
        )
        wrong, values = [], []
        for step in range(4 * self.steps + 1):
            x_adv = x_adv.detach().requires_grad_()
            with random.keyed(ids + step * _STEP, noise):
                logits = self.net(x_adv)
            value = F.cross_entropy(logits.float(), y, reduction="none")
            wrong.append((logits.detach().argmax(dim=1) != y).cpu())
            values.append(value.detach().float().cpu())
            if step < 4 * self.steps:
                (gradient,) = torch.autograd.grad(value.sum(), x_adv)
                x_adv = project(
                    x_adv.detach() + self.step_size * ascent_direction(gradient, self.norm), x, self.eps, self.norm
                )
        return torch.stack(wrong, dim=1), torch.stack(values, dim=1)

    # ---------------------------------------------------------------- what an evaluation found
    def rows(self) -> list[AttackResult]:
        """The evaluation's attacks in the audited threat model."""
        if self.result is None:
            return []
        return [row for row in self.result.attacks.values() if self._same_ball(row.description)]

    def _same_ball(self, description: Mapping[str, Any]) -> bool:
        eps = radius(description)
        return eps is not None and abs(eps - self.eps) < 1e-9 and description.get("norm") == self.norm

    def right_when_clean(self, n: int) -> Tensor:
        """[n] bool of the evaluation's first n samples."""
        if self.result is None:
            raise ValueError("no evaluation was given")
        return self.result.clean.correct[:n]

    def at_base(self, row: AttackResult) -> Tensor:
        """[m] bool: which samples of the base an attack of the evaluation broke; those it did not run on: not."""
        if self.result is None:
            raise ValueError("no evaluation was given")
        fallen = (~row.correct & self.right_when_clean(row.n)).nonzero().squeeze(1)
        return torch.isin(self.ids[self.base], self.result.index[fallen])


def kind(description: Mapping[str, Any]) -> str:
    """Whether an attack needs the network's gradients: "gradient", "black box", or "both" (AutoAttack with Square).

    Example:
        >>> kind({"attack": "autoattack", "attacks": ["square"]}), kind({"attack": "pgd"})
        ('black box', 'gradient')
    """
    name = str(description.get("attack"))
    parts: Sequence[str] = description.get("attacks") or ()
    if name == "autoattack" and "square" in parts:
        return "black box" if set(parts) == {"square"} else "both"
    black = name in ("square", "transfer") or description.get("surrogate") not in (None, False, "")
    return "black box" if black else "gradient"
