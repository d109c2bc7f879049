"""Cross-entropies and divergences between the outputs of a classifier, from logits, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mi_at.functional.margins import largest_other


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy -log p_y.

    Args:
        logits: [B, C] float.
        y: [B] int64, labels in [0, C).
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats, non-negative; a scalar or [B].

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).exp().round().item()
        4.0
    """
    return F.cross_entropy(logits, y, reduction=reduction)


def boosted_cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Boosted cross-entropy -log p_y - log(1 - max_{k != y} p_k) (MIMAE-AT eq. 10; MART eq. 6).

    The constants 1.0001 and 1e-12, which keep the second logarithm finite, are those of MART's public code.

    Args:
        logits: [B, C] float, C >= 2.
        y: [B] int64, labels in [0, C).
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats; a scalar or [B].

    Example:
        >>> logits = torch.tensor([[2.0, 2.0]])
        >>> round(boosted_cross_entropy(logits, torch.tensor([0])).item(), 3)  # 2 log 2, up to the constants
        1.386
    """
    probs = F.softmax(logits, dim=1)
    margin = -torch.log(1.0001 - largest_other(probs, y) + 1e-12)
    return _reduce(F.cross_entropy(logits, y, reduction="none") + margin, reduction)


def kl_divergence(logits_p: Tensor, logits_q: Tensor, reduction: str = "mean") -> Tensor:
    """KL(p || q) between the softmax outputs of two batches of logits.

    Args:
        logits_p: [B, C] float, the first argument p.
        logits_q: [B, C] float, the second argument q.
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats, non-negative; a scalar or [B]. Gradients flow through both sides.

    Example:
        >>> kl_divergence(torch.zeros(3, 5), torch.zeros(3, 5)).item()
        0.0
    """
    log_p, log_q = F.log_softmax(logits_p, dim=1), F.log_softmax(logits_q, dim=1)
    return _reduce((log_p.exp() * (log_p - log_q)).sum(dim=1), reduction)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return values.mean()
    if reduction == "none":
        return values
    raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
