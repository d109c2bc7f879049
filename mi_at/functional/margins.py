"""Margins between logits: what Carlini-Wagner and AutoAttack's DLR attacks maximise."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_other(values: Tensor, y: Tensor) -> Tensor:
    """The largest entry of each row that is not at the label.

    Args:
        values: [B, C] logits or probabilities, C >= 2.
        y: [B] int64, labels in [0, C).

    Returns:
        [B].

    Example:
        >>> largest_other(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).item()
        2.0
    """
    label = torch.nn.functional.one_hot(y, values.shape[1]).bool()
    return values.masked_fill(label, -torch.inf).amax(dim=1)


def logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: negative where the sample is classified correctly.

    Args:
        logits: [B, C] float, C >= 2.
        y: [B] int64, labels in [0, C).

    Returns:
        [B].

    Example:
        >>> logit_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).item()
        -1.0
    """
    return largest_other(logits, y) - logits.gather(1, y[:, None]).squeeze(1)


def cw_margin(logits: Tensor, y: Tensor, kappa: float = 0.0) -> Tensor:
    """Carlini-Wagner margin min(max_{k != y} z_k - z_y, kappa), to be maximised by an attacker.

    With kappa 0 the gradient vanishes once the margin is positive: the sample is misclassified. With kappa 50 it never
    does for usual logits (the two conventions of the papers). Where logits tie, as those of half precision do, the
    first class wins, so that the gradient is still there.

    Args:
        logits: [B, C] float, C >= 2.
        y: [B] int64, labels in [0, C).
        kappa: confidence, >= 0.

    Returns:
        [B], at most kappa.

    Example:
        >>> cw_margin(torch.tensor([[1.0, 5.0]]), torch.tensor([0])).item()
        0.0
    """
    return at_most(logit_margin(logits, y), kappa)


def at_most(values: Tensor, limit: float) -> Tensor:
    """min(value, limit), with a gradient at the limit itself, where that of torch's clamp is 0.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> torch.autograd.grad(at_most(values, 2.0).sum(), values)[0]
        tensor([1., 1., 0.])
    """
    return torch.where(values > limit, limit, values)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)) (Croce and Hein 2020, eq. 6).

    Invariant under shifts and positive scalings of the logits.

    Args:
        logits: [B, C] float, C >= 3.
        y: [B] int64, labels in [0, C).

    Returns:
        [B], to be maximised by an attacker; positive where the sample is misclassified.

    Raises:
        ValueError: fewer than 3 classes.

    Example:
        >>> round(dlr(torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([0])).item(), 4)
        -0.5
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr needs at least 3 classes, got {logits.shape[1]}: use the margin objective instead")
    top = logits.topk(3, dim=1).values
    return logit_margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def soft_logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """log sum_{k != y} exp z_k - z_y: a smooth upper bound of the logit margin (Ding et al. 2020, section 2.3).

    Args:
        logits: [B, C] float, C >= 2.
        y: [B] int64, labels in [0, C).

    Returns:
        [B]; CE = softplus of it.

    Example:
        >>> soft_logit_margin(torch.tensor([[3.0, 1.0]]), torch.tensor([0])).item()
        -2.0
    """
    label = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).logsumexp(dim=1) - logits.gather(1, y[:, None]).squeeze(1)
