"""The vocabulary of inner maximisations: what is maximised (a defense says), and how (the attack group says)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mi_at.attacks.contexts import MODES
from mi_at.functional.geometry import check_norm, parse_eps

Objective = Callable[[Tensor], Tensor]
"""x [B, C, H, W] -> one value per sample [B], or a scalar for an objective joint over the batch; maximised."""

Start = Callable[["float | Tensor"], Tensor]
"""radius (a number, or one per sample) -> start perturbation [B, C, H, W]."""

INITS = ("uniform", "gaussian", "zero")


@dataclass(frozen=True)
class Inner:
    """One inner maximisation that a defense or regularizer asks for.

    Attributes:
        objective: what is maximised.
        init: the method's own start ("uniform", "gaussian", "zero"), used where `attack.init` is null.
        mode: the method's own mode of the network ("eval", "train_no_track"), used where `attack.mode` is null.
        generate: a search of the method's own, (x, budget, start) -> x_adv, where start(radius) draws its start noise;
            None: projected gradient ascent.
    """

    objective: Objective
    init: str = "uniform"
    mode: str = "eval"
    generate: Callable[[Tensor, InnerMaximisation, Start], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class InnerMaximisation:
    """The `attack` group: the budget of the training attack.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixels of [0, 1], a number or a fraction ("8/255").
        step_size: a number or a fraction; > 0, under l_inf at most 1, under l_2 at most 2 eps or 1.
        steps: >= 0.
        init: "uniform", "gaussian", "zero", or None for the method's own.
        mode: "eval", "train_no_track", or None for the method's own.
        precision: "fp32" or "bf16" of the attack.
        warmup_epochs: eps grows linearly from 0 over this many epochs.

    Raises:
        ValueError: a value out of range; the message names it and the likely mistake.

    Example:
        >>> InnerMaximisation(norm="linf", eps="8/255", step_size="2/255", steps=10).eps == 8 / 255
        True
        >>> InnerMaximisation(norm="linf", eps=8, step_size=2, steps=10)
        Traceback (most recent call last):
        ValueError: attack.eps=8: pixels are in [0, 1]; did you mean 8/255?
    """

    norm: str
    eps: float
    step_size: float
    steps: int
    init: str | None = None
    mode: str | None = None
    precision: str = "fp32"
    warmup_epochs: int = 0

    joint: ClassVar[bool] = False
    """Whether an image's search depends on the others of its process's share of a batch."""

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        check_norm(self.norm)
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        object.__setattr__(self, "step_size", check_step(self.step_size, self.steps, self.norm, eps=self.eps))
        if not self.warmup_epochs:  # a radius that still grows may be shorter than its step
            check_reach(self.step_size, self.steps, self.norm, self.eps)
        if self.init is not None and self.init not in INITS:
            raise ValueError(f"attack.init={self.init!r}: expected null or one of {', '.join(INITS)}")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"attack.mode={self.mode!r}: expected null or one of {', '.join(MODES)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"attack.precision={self.precision!r}: expected fp32 or bf16")
        if self.warmup_epochs < 0:
            raise ValueError(f"attack.warmup_epochs={self.warmup_epochs}: expected 0 or more")

    def search_for(self, inner: Inner, net: Any) -> Inner:
        """The search that is run where a method asks for one; a budget of its own kind may put another in its place.

        Args:
            inner: what the method asks for.
            net: the bare network.
        """
        return inner

    def eps_at(self, epoch: float) -> float:
        """The radius after `epoch` epochs (a fraction counts steps within one): linear warm-up, then eps.

        Example:
            >>> InnerMaximisation(norm="linf", eps=0.3, step_size=0.1, steps=1, warmup_epochs=2).eps_at(1.0)
            0.15
        """
        return self.eps * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else self.eps


def check_eps(eps: Any, norm: str, samples: int | None = None) -> Any:
    """Parse a radius and refuse the usual mistakes.

    Args:
        eps: a number, a fraction or one radius per sample [B]; on an accelerator the values of the latter are not
            looked at: it would wait for the device.
        norm: "linf" or "l2".
        samples: B, where it is known.

    Raises:
        ValueError: negative, not finite, or an l_inf radius above 1; not one per sample.
    """
    if isinstance(eps, Tensor):
        low, high = _range_of("eps", eps, samples)
        _check_eps(low, norm)
        _check_eps(high, norm)
        return eps
    return _check_eps(eps, norm)


def check_step(step_size: Any, steps: int, norm: str, samples: int | None = None, *, eps: Any = None) -> Any:
    """Parse a step size and check it with the number of steps.

    Args:
        step_size: as `check_eps` takes a radius.
        steps: number of steps.
        norm: "linf" or "l2"; under l_2 a length grows with the number of pixels and has no bound of its own.
        samples: B, where it is known.
        eps: the radius, where it is known: in a ball of 0 a step may be 0 too.

    Raises:
        ValueError: steps < 0, or a step size that is not positive and finite, or above 1 under l_inf; not one per
            sample.
    """
    if steps < 0:
        raise ValueError(f"attack.steps={steps}: expected 0 or more")
    if isinstance(step_size, Tensor):
        low, high = _range_of("step_size", step_size, samples)
        _check_step(low, steps, norm)
        _check_step(high, steps, norm)
        return step_size
    still = not isinstance(eps, Tensor) and eps == 0
    return _check_step(step_size, 0 if still else steps, norm)


def check_reach(step_size: float, steps: int, norm: str, eps: float) -> None:
    """Refuse an l_2 step that is longer than the ball is wide and than a pixel's range: a forgotten /255.

    Raises:
        ValueError: naming both.
    """
    if norm == "l2" and steps and eps and step_size > max(1.0, 2 * eps):
        raise ValueError(
            f"attack.step_size={step_size:g}: the l2 ball of attack.eps={eps:g} is {2 * eps:g} wide; "
            f"did you mean {step_size:g}/255?"
        )


def _check_eps(eps: Any, norm: str) -> float:
    value = parse_eps(eps)
    if not 0 <= value < float("inf"):
        raise ValueError(f"attack.eps={eps}: expected a radius of 0 or more")
    if norm == "linf" and value > 1:
        raise ValueError(f"attack.eps={eps}: pixels are in [0, 1]; did you mean {eps}/255?")
    return value


def _check_step(step_size: Any, steps: int, norm: str) -> float:
    value = parse_eps(step_size)
    if (steps and not 0 < value < float("inf")) or not value >= 0:
        raise ValueError(f"attack.step_size={step_size}: expected a positive number or fraction such as 2/255")
    if norm == "linf" and value > 1:
        raise ValueError(f"attack.step_size={step_size}: pixels are in [0, 1]; did you mean {step_size}/255?")
    return value


def _range_of(name: str, values: Tensor, samples: int | None) -> tuple[float, float]:
    """Smallest and largest of one value per sample; (1, 1), which is always right, where looking would wait."""
    if values.ndim != 1 or (samples is not None and len(values) != samples):
        expected = f"[{'B' if samples is None else samples}]"
        raise ValueError(
            f"attack.{name} of shape {list(values.shape)}: expected a number, or one per sample {expected}"
        )
    if values.device.type != "cpu" or not len(values):
        return 1.0, 1.0
    low, high = (float(value) for value in values.detach().aminmax())
    return low, high
