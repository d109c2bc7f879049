"""Projected gradient ascent under l_inf and l_2 budgets (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.active import Found, ascend_until_broken
from mi_at.attacks.inner import INITS, Objective, check_eps, check_reach, check_step
from mi_at.attacks.packing import BatchSize, Packing
from mi_at.functional import random
from mi_at.functional.geometry import ascent_direction, check_norm, per_sample, project, start_noise
from mi_at.functional.margins import logit_margin


def pgd(
    objective: Objective,
    x: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: str = "linf",
    init: str | Tensor = "uniform",
    iterate: str = "last",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise an objective over the ball of radius eps around x, within [0, 1].

    The network behind the objective is taken as it is: wrap the call in `mi_at.attacks.contexts.attacking(net)` to
    have it frozen and in eval mode. The gradient is taken with respect to the images alone.

    Args:
        objective: images -> one value per sample [B], or a scalar for an objective joint over the batch.
        x: [B, ...] float in [0, 1].
        eps: radius >= 0, a number, a fraction ("8/255") or one per sample [B].
        step_size: > 0 (or 0 where eps is), likewise; the l_inf (at most 1) or l_2 length of one step.
        steps: >= 0.
        norm: "linf" or "l2".
        init: "uniform" in the ball, "gaussian" (0.001 N(0, 1)), "zero", or a perturbation [B, ...] of one's own.
        iterate: "last", or "worst": per sample the iterate, start included, with the highest objective (one more
            forward).
        generator: source of the start noise, on the CPU; torch's global one if None.

    Returns:
        [B, ...] in [0, 1], at most eps from x, detached; x itself is not modified.

    Raises:
        ValueError: an argument out of range, images outside [0, 1], or "worst" with a joint objective.

    Example:
        >>> w = torch.tensor([1.0, -1.0])
        >>> pgd(lambda x: x @ w, torch.full((1, 2), 0.5), eps=0.25, step_size=0.25, steps=2, init="zero")
        tensor([[0.7500, 0.2500]])
    """
    eps = check_eps(eps, check_norm(norm), len(x))
    step_size = check_step(step_size, steps, norm, len(x), eps=eps)
    if iterate not in ("last", "worst"):
        raise ValueError(f"iterate={iterate!r}: expected 'last' or 'worst'")
    check_images(x)
    # Lightning's evaluation loops run in inference mode, under which no gradient exists.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach()
        delta = init if isinstance(init, Tensor) else _draw(init, x, eps, norm, generator)
        x_adv = project(x + delta.to(x), x, eps, norm)
        best, best_value = x_adv, None
        for _ in range(steps):
            x_adv.requires_grad_(True)
            value = objective(x_adv)
            (gradient,) = torch.autograd.grad(value.sum(), x_adv)
            x_adv = x_adv.detach()
            if iterate == "worst":
                best, best_value = _keep_worst(best, best_value, x_adv, value.detach())
            x_adv = project(x_adv + per_sample(step_size, x) * ascent_direction(gradient, norm), x, eps, norm)
        if iterate == "last":
            return x_adv
        with torch.no_grad():
            return _keep_worst(best, best_value, x_adv, objective(x_adv))[0]


def check_images(x: Tensor) -> None:
    """Refuse images that are not floating point in [0, 1].

    On an accelerator the range is not checked: it would wait for the device at every call; the data module checks it.

    Raises:
        ValueError: naming the type or the range found.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: expected floating-point images in [0, 1] (divide uint8 by 255)")
    if x.device.type == "cpu" and x.numel():
        low, high = (float(v) for v in x.detach().aminmax())
        if not (low >= 0 and high <= 1):
            found = f"x has values in [{low:.4g}, {high:.4g}]"
            raise ValueError(f"{found}: expected [0, 1]; put normalisation into the network")


def _draw(init: str, x: Tensor, eps: float | Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    if init not in INITS:
        raise ValueError(f"init={init!r}: expected a tensor or one of {', '.join(INITS)}")
    if init == "zero":
        return torch.zeros_like(x)
    uniform = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    gaussian = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return start_noise(init, uniform, gaussian, eps, norm)


def _keep_worst(best: Tensor, best_value: Tensor | None, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if value.ndim != 1:
        raise ValueError("iterate='worst' needs one objective value per sample; a joint objective has only 'last'")
    if best_value is None:
        return x, value
    better = value > best_value
    return torch.where(better.view(-1, *(1,) * (x.ndim - 1)), x, best), torch.where(better, value, best_value)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD as an evaluation attack: settings, and a call that does not depend on how samples are batched.

    Attributes:
        eps, step_size, steps, norm, init: as `pgd` takes them.
        iterate: "last", or "worst": a sample is broken as soon as any iterate, the start included, is
            misclassified, and the first such iterate is returned; else the one with the highest objective.
        objective: "cross_entropy", "margin" (CW-inf) or "dlr".
        kappa: confidence of the margin.
        restarts: starts, at most: per sample the result of the first that breaks it; else, of all, the one with
            the largest margin.
        name: what tables print.
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    init: str = "uniform"
    iterate: str = "last"
    objective: str = "cross_entropy"
    kappa: float = 0.0
    restarts: int = 1
    name: str = "pgd"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, check_norm(self.norm)))
        object.__setattr__(self, "step_size", check_step(self.step_size, self.steps, self.norm, eps=self.eps))
        check_reach(self.step_size, self.steps, self.norm, self.eps)
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts}: expected 1 or more")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(INITS)}")
        if self.iterate not in ("last", "worst"):
            raise ValueError(f"iterate={self.iterate!r}: expected 'last' or 'worst'")
        if self.objective not in objectives.NAMES:
            raise ValueError(f"objective={self.objective!r}: expected one of {', '.join(objectives.NAMES)}")
        if self.kappa < 0:
            raise ValueError(f"kappa={self.kappa}: expected 0 or more")

    def __call__(
        self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int, packing: Packing | None = None
    ) -> Tensor:
        """Attack images whose noise is drawn by (seed, id).

        Args:
            net: logits; frozen and in eval mode (the evaluator sees to it).
            x: [B, C, H, W] float in [0, 1].
            y: [B] int64.
            ids: [B] int64, the samples' places in their data set.
            seed: of the start noise.
            packing: how many at once; None: all. With its `active`, a start is tried on what the earlier ones
                left, and under "worst" a sample leaves the batch when it is broken; the result is the same.

        Returns:
            [B, C, H, W].
        """
        if not len(x):
            return x.detach().clone()
        packing = packing or Packing(batch=BatchSize(len(x)))
        if self.restarts == 1:
            return self._run(net, x, y, ids, seed, 0, packing).x_adv
        best = Found(
            x_adv=x.detach().clone(),
            broken=torch.zeros(len(x), dtype=torch.bool, device=x.device),
            margin=torch.full((len(x),), -torch.inf, device=x.device),
        )
        places = torch.arange(len(x), device=x.device)
        for restart in range(self.restarts):
            told = self._tell(packing, restart, int(best.broken.sum()))
            found = self._run(net, x[places], y[places.to(y.device)], ids[places.to(ids.device)], seed, restart, told)
            better = ~best.broken[places] & (found.broken | (found.margin > best.margin[places]))
            best.x_adv[places[better]] = found.x_adv[better]
            best.margin[places[better]] = found.margin[better]
            best.broken[places] |= found.broken
            if packing.active:
                places = (~best.broken).nonzero().squeeze(1)
                if not len(places):
                    break
        return best.x_adv

    @property
    def refills(self) -> bool:
        """Whether samples end at different times, so that the evaluator should hand over many at once."""
        return self.iterate == "worst" or self.restarts > 1

    def _run(
        self, net: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, restart: int, packing: Packing
    ) -> Found:
        """One start."""
        noise = seed * 1009 + restart
        if self.iterate == "worst":
            return ascend_until_broken(
                net,
                lambda network, labels: objectives.by_name(self.objective, network, labels, self.kappa),
                x,
                y,
                ids,
                start=lambda images, names: self._start(images, names, noise),
                eps=self.eps,
                step_size=self.step_size,
                steps=self.steps,
                norm=self.norm,
                packing=packing,
                seed=random.key(noise, "iterates"),
            )
        device = x.device if packing.device is None else packing.device
        done, broken_so_far = 0, 0

        def ascend(x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal done, broken_so_far
            images, labels, names = x.to(device), y.to(device), ids.to(device)
            broken, margin = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x))
            with random.keyed(names, random.key(noise, "iterates")):
                x_adv = pgd(
                    objectives.by_name(self.objective, net, labels, self.kappa),
                    images,
                    eps=self.eps,
                    step_size=self.step_size,
                    steps=self.steps,
                    norm=self.norm,
                    init=self._start(images, names, noise),
                )
                if self.restarts > 1:  # of a single start the iterate is returned whatever it does
                    logits = objectives.frozen_logits(net, x_adv)
                    margin = logit_margin(logits, labels)
                    broken = (logits.argmax(dim=1) != labels) | ~logits.isfinite().all(dim=1)
            done, broken_so_far = done + len(x), broken_so_far + int(broken.sum())
            if packing.on_progress is not None:
                packing.on_progress(done / total, broken_so_far)
            return x_adv.to(x), broken.to(x.device), margin.to(x.device)

        total = len(x)
        return Found(*packing.batch.map(ascend, x, y, ids))

    def _tell(self, packing: Packing, restart: int, broken: int) -> Packing:
        """The packing of one start: its share of the work, and what was broken before it."""
        told = packing.on_progress
        if told is None:
            return packing
        return replace(
            packing,
            on_progress=lambda share, more: told(
                (restart + share) / self.restarts, broken + (more if packing.active else 0)
            ),
        )

    def _start(self, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        shape = x.shape[1:]
        if self.init == "zero":
            return torch.zeros_like(x)
        uniform = random.uniform(ids, shape, 2 * seed).to(x)
        needs_gaussian = self.init == "gaussian" or self.norm == "l2"
        gaussian = random.gaussian(ids, shape, 2 * seed + 1).to(x) if needs_gaussian else uniform
        return start_noise(self.init, uniform, gaussian, self.eps, self.norm)

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "pgd", **asdict(self)}
