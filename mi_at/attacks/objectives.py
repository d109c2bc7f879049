"""Objectives an attacker maximises: closures x -> one value per sample. The network's logits are taken in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.inner import Objective
from mi_at.functional import divergences, margins

NAMES = ("cross_entropy", "margin", "dlr")


def by_name(name: str, net: Callable[[Tensor], Tensor], y: Tensor, kappa: float = 0.0) -> Objective:
    """The objective of an evaluation attack by its name in a yaml.

    Raises:
        ValueError: an unknown name; the message lists the choices.
    """
    if name == "cross_entropy":
        return cross_entropy(net, y)
    if name == "margin":
        return margin(net, y, kappa)
    if name == "dlr":
        return dlr(net, y)
    raise ValueError(f"objective={name!r}: expected one of {', '.join(NAMES)}")


def cross_entropy(net: Callable[[Tensor], Tensor], y: Tensor) -> Objective:
    """-log p_y(x): what PGD maximises (Madry et al. 2018; MIMAE-AT eq. 12)."""
    y = _ordinary(y)
    return lambda x: divergences.cross_entropy(_logits(net(x)), y, reduction="none")


def kl_to(net: Callable[[Tensor], Tensor], logits: Tensor) -> Objective:
    """KL(softmax(logits) || p(x)): what TRADES maximises, `logits` those of the clean images, held fixed."""
    with torch.inference_mode(False):  # a constant of the graphs to come
        log_p = F.log_softmax(_logits(logits.detach()), dim=1)
        p = log_p.exp()
    # The entropy of p is constant, but keeps the value a divergence that can be read.
    return lambda x: (p * (log_p - F.log_softmax(_logits(net(x)), dim=1))).sum(dim=1)


def margin(net: Callable[[Tensor], Tensor], y: Tensor, kappa: float = 0.0) -> Objective:
    """The Carlini-Wagner margin with confidence kappa: CW-inf is PGD on it."""
    y = _ordinary(y)
    return lambda x: margins.cw_margin(_logits(net(x)), y, kappa)


def dlr(net: Callable[[Tensor], Tensor], y: Tensor) -> Objective:
    """The difference-of-logits ratio."""
    y = _ordinary(y)
    return lambda x: margins.dlr(_logits(net(x)), y)


def check_tap(net: Any, tap: str) -> None:
    """Refuse a layer that a network does not name.

    Raises:
        ValueError: naming those it has.
    """
    names = getattr(net, "tap_names", None)
    if names is None or tap not in names:
        raise ValueError(f"tap={tap!r}: expected one of {', '.join(names or ('(the network has no taps)',))}")


def representation_distance(net: Any, tap: str, target: Tensor) -> Objective:
    """Squared distance between a tap's output and a target representation.

    Args:
        net: a network with `forward_taps` (`mi_at.models.base.Classifier`).
        tap: name of a tap.
        target: [B, ...] of the tap's shape; to approach it, minimise, i.e. negate.

    Raises:
        ValueError: the network has no such tap.
    """
    check_tap(net, tap)
    target = _ordinary(target)

    def distance(x: Tensor) -> Tensor:
        difference = net.forward_taps(x, (tap,))[1][tap] - target
        # A sum of squares in bfloat16 would be too coarse.
        difference = difference.float() if difference.dtype.itemsize < 4 else difference
        return difference.flatten(1).square().sum(dim=1)

    return distance


def frozen_logits(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of x without a graph, in the network's present mode."""
    with torch.no_grad():
        return _logits(net(x))


def _ordinary(tensor: Tensor) -> Tensor:
    """A copy that may enter a graph, of a tensor made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _logits(logits: Tensor) -> Tensor:
    # bfloat16 logits are too coarse for a softmax; float64 stays (gradient checks).
    return logits.float() if logits.dtype.itemsize < 4 else logits
