"""Means and cosines over a part of a batch, without indexing: shapes and graph do not depend on what is selected."""

from __future__ import annotations

import torch
from torch import Tensor


def broken_by_attack(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """Samples that are right as they are and wrong under attack (NAMID eq. 6).

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.

    Returns:
        [B] bool.

    Example:
        >>> right, wrong = torch.eye(2)[[0, 0, 1]], torch.eye(2)[[1, 0, 1]]
        >>> broken_by_attack(right, wrong, torch.tensor([0, 0, 0])).tolist()
        [True, False, False]
    """
    return (logits.argmax(dim=1) == y) & (logits_adv.argmax(dim=1) != y)


def selected_mean(values: Tensor, selected: Tensor) -> Tensor:
    """Mean over the selected samples; 0, with zero gradients, where there is none.

    Args:
        values: [B] float.
        selected: [B] bool.

    Returns:
        Scalar.

    Example:
        >>> selected_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).item()
        2.0
    """
    return torch.where(selected, values, 0).sum() / selected.sum().clamp_min(1)


def selected_cosine(a: Tensor, b: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine between two vectors of per-sample values, over the selected samples.

    Args:
        a: [B] float.
        b: [B] float.
        selected: [B] bool.

    Returns:
        The cosine, a scalar in [-1, 1], and whether it means something: two samples are selected and neither vector is
        zero. Where it does not, the cosine is 1 and its gradients are zero.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 5.0])
        >>> round(selected_cosine(a, b, torch.tensor([True, True, False]))[0].item(), 4)
        0.7071
        >>> cosine, known = selected_cosine(a, b, torch.tensor([True, False, False]))
        >>> cosine.item(), known.item()
        (1.0, False)
    """
    a, b = torch.where(selected, a, 0), torch.where(selected, b, 0)
    squares = a.square().sum(), b.square().sum()
    known = (selected.sum() >= 2) & (squares[0] > 0) & (squares[1] > 0)
    # The gradient of a square root at 0 is infinite, and times 0 not a number: it never gets there.
    length, other = (torch.where(known, square, 1).sqrt() for square in squares)
    return torch.where(known, (a * b).sum() / (length * other), 1), known
