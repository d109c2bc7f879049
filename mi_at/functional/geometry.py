"""Norms, balls, steepest ascent and start noise of l_inf and l_2 threat models on images in [0, 1]."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

NORMS = ("linf", "l2")


def parse_eps(value: float | str) -> float:
    """A number or a fraction as users write it.

    Args:
        value: 0.031, "0.031" or "8/255".

    Returns:
        The number.

    Raises:
        ValueError: it is neither.

    Example:
        >>> parse_eps("8/255") == 8 / 255
        True
    """
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(Fraction(value.replace(" ", "")))
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(f"{value!r}: expected a number or a fraction such as 8/255") from None


def norm(delta: Tensor, norm: str) -> Tensor:
    """The l_inf or l_2 norm of each sample.

    Args:
        delta: [B, ...] float.
        norm: "linf" or "l2".

    Returns:
        [B].

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> norm(torch.tensor([[3.0, -4.0]]), "l2").item(), norm(torch.tensor([[3.0, -4.0]]), "linf").item()
        (5.0, 4.0)
    """
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if check_norm(norm) == "linf" else torch.linalg.vector_norm(flat, dim=1)


def project(x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Move x_adv into the ball of radius eps around x, then into [0, 1].

    The second step keeps the first: x lies in [0, 1], so clamping never increases the distance.

    Args:
        x_adv: [B, ...] float.
        x: [B, ...] float in [0, 1].
        eps: radius, >= 0, in pixels of [0, 1]; a number, or one per sample [B].
        norm: "linf" or "l2".

    Returns:
        [B, ...].

    Example:
        >>> project(torch.tensor([[0.9]]), torch.tensor([[0.5]]), 0.25, "linf").item()
        0.75
    """
    if check_norm(norm) == "linf":
        radius = per_sample(eps, x)
        return torch.clamp(x_adv, x - radius, x + radius).clamp_(0, 1)
    delta = x_adv - x
    length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
    return (x + delta * per_sample((eps / length).clamp_max(1.0), delta)).clamp_(0, 1)


def ascent_direction(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit norm along which a linear function grows fastest: sign(g), or g / |g|_2.

    Args:
        gradient: [B, ...] float; a zero gradient gives a zero direction.
        norm: "linf" or "l2".

    Returns:
        [B, ...].

    Example:
        >>> ascent_direction(torch.tensor([[3.0, -4.0]]), "l2").tolist()
        [[0.6000000238418579, -0.800000011920929]]
    """
    if check_norm(norm) == "linf":
        return gradient.sign()
    # Divide by the largest entry first: squares of tiny gradients underflow in float32.
    largest = gradient.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    gradient = gradient / per_sample(largest, gradient)
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-12)
    return gradient / per_sample(length, gradient)


def start_noise(kind: str, uniform: Tensor, gaussian: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """The start of an attack, from standard noise.

    Args:
        kind: "uniform" in the ball, "gaussian" (0.001 N(0, 1), as TRADES) or "zero".
        uniform: [B, ...] in [0, 1), used for "uniform"; under l_2 its first entry per sample sets the radius.
        gaussian: [B, ...] standard normal, used for "gaussian", and for the direction under l_2.
        eps: radius, >= 0.
        norm: "linf" or "l2".

    Returns:
        [B, ...] perturbation.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "zero":
        return torch.zeros_like(uniform)
    if kind == "gaussian":
        return 0.001 * gaussian
    if kind != "uniform":
        raise ValueError(f"init={kind!r}: expected 'uniform', 'gaussian' or 'zero'")
    if check_norm(norm) == "linf":
        return (2 * uniform - 1) * per_sample(eps, uniform)
    dimension = uniform[0].numel() if len(uniform) else 1
    radius = eps * uniform.flatten(1)[:, 0].pow(1 / dimension)  # uniform in the ball's volume
    return ascent_direction(gaussian, "l2") * per_sample(radius, gaussian)


def check_norm(norm: str) -> str:
    """Return `norm` or raise ValueError naming the choices.

    Example:
        >>> check_norm("l1")
        Traceback (most recent call last):
        ValueError: norm='l1': expected one of linf, l2
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
    return norm


def per_sample(values: float | Tensor, images: Tensor) -> float | Tensor:
    """Shape one value per sample [B] so that it broadcasts over images [B, ...]; numbers pass.

    Example:
        >>> per_sample(torch.ones(2), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return values.view(-1, *(1,) * (images.ndim - 1)) if isinstance(values, Tensor) else values
