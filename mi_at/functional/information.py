"""Information quantities of discrete class assignments, in nats.

CMI, separation and NCMI are float32 where outputs come in half precision, else of the outputs' own type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mi_at.functional.checks import say_where_known


def joint_distribution(p: Tensor, q: Tensor) -> Tensor:
    """Joint distribution of two class assignments over a batch (MIMAE-AT eq. 13, after IIC).

    P = 1/B sum_i p_i q_i^T, symmetrised to (P + P^T)/2 and renormalised. The batch is the global one: with
    several processes gather p and q first (`mi_at.functional.distributed.gather`).

    Args:
        p: [B, C] probabilities of the first view.
        q: [B, C] probabilities of the second view.

    Returns:
        [C, C], symmetric, non-negative, sums to 1.

    Raises:
        ValueError: p and q are not two [B, C] tensors of one shape.

    Example:
        >>> eye = torch.eye(3)
        >>> torch.allclose(joint_distribution(eye, eye), eye / 3)
        True
    """
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(
            f"joint_distribution needs two [B, C] tensors of one shape, got {tuple(p.shape)} and {tuple(q.shape)}"
        )
    joint = p.T @ q
    joint = (joint + joint.T) / 2
    return joint / joint.sum()


def mutual_information(joint: Tensor) -> Tensor:
    """Mutual information sum_ij P_ij ln(P_ij / (P_i P_j)) of a joint distribution (MIMAE-AT eq. 14).

    Args:
        joint: [C, C] non-negative, sums to 1.

    Returns:
        Scalar in [0, ln C] nats.

    Raises:
        ValueError: `joint` is not a square matrix.

    Example:
        >>> round(mutual_information(torch.eye(4) / 4).exp().item(), 4)
        4.0
        >>> round(mutual_information(torch.full((4, 4), 1 / 16)).item(), 6) + 0.0
        0.0
    """
    if joint.ndim != 2 or joint.shape[0] != joint.shape[1]:
        raise ValueError(f"mutual_information needs a square [C, C] matrix, got {tuple(joint.shape)}")
    tiny = torch.finfo(joint.dtype).tiny  # keeps 0 log 0 at 0, out of place
    rows, columns = joint.sum(dim=1, keepdim=True), joint.sum(dim=0, keepdim=True)
    log_ratio = joint.clamp_min(tiny).log() - rows.clamp_min(tiny).log() - columns.clamp_min(tiny).log()
    return (joint * log_ratio).sum()


LOG_FLOOR = 1e-8
"""Probabilities are taken to be at least this inside a logarithm (the authors' code of robust NCMI)."""


def class_sums(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class, in O(B D).

    Args:
        values: [B, D] or [B].
        labels: [B] int64 in [0, num_classes).
        num_classes: C.

    Returns:
        [C, D] or [C]; zeros for a class without a row.

    Raises:
        ValueError: not one label per row, labels that are not int64, or (on a CPU) out of range.

    Example:
        >>> class_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
        tensor([5., 0., 2.])
    """
    if labels.ndim != 1 or len(labels) != len(values):
        raise ValueError(f"expected one label per row, got {tuple(labels.shape)} labels for {tuple(values.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"expected int64 labels, got {labels.dtype}: labels.long()")
    say_where_known(
        labels,
        lambda y: (y < 0) | (y >= num_classes),
        f"expected labels in [0, {num_classes}), the number of classes; found others",
    )
    return values.new_zeros(num_classes, *values.shape[1:]).index_add(0, labels, values)


def class_means(probs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Centroids of the clusters, s_y = 1/|D_y| sum of f(x_j) over class y (robust NCMI eq. 15).

    Args:
        probs: [B, D] probabilities.
        labels: [B] int64 in [0, num_classes).
        num_classes: C.

    Returns:
        ([C, D] means, zeros for a class without a sample; [C] samples per class).

    Example:
        >>> class_means(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1]), 2)
        (tensor([[0.0000, 0.0000],
                [0.7500, 0.2500]]), tensor([0., 2.]))
    """
    sums = class_sums(probs, labels, num_classes)
    counts = class_sums(torch.ones_like(probs[:, 0]), labels, num_classes)
    return sums / counts.clamp_min(1).unsqueeze(1), counts


def conditional_mutual_information(probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """I(X; Y^ | Y) = 1/n sum_j D(f(x_j) || s_{y_j}), how wide the clusters of outputs are (robust NCMI eq. 15-17).

    Args:
        probs: [B, D] probabilities of the clean or of attacked samples (softmax taken once), of the whole set.
        labels: [B] int64 in [0, num_classes).
        num_classes: C.

    Returns:
        Scalar in [0, ln D] nats, but for rounding (float32: down to -1e-6).

    Raises:
        ValueError: `probs` is no [B, D] matrix of probabilities with a label per row.

    Example:
        >>> probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> round(conditional_mutual_information(probs, torch.tensor([0, 0, 1]), 2).item(), 4)  # 2/3 ln 2
        0.4621
    """
    probs = _outputs(probs)
    tiny = torch.finfo(probs.dtype).tiny  # keeps 0 log 0 at 0
    centroids, _ = class_means(probs, labels, num_classes)
    log_ratio = probs.clamp_min(tiny).log() - centroids.clamp_min(tiny).log()[labels]
    return (probs * log_ratio).sum() / len(probs)


def separation(
    probs: Tensor, labels: Tensor, num_classes: int, *, norm: str = "batch_sq", detach_log: bool = False
) -> Tensor:
    """Gamma = 1/n^2 sum over ordered pairs of different label of H(f(x_j), f(x_k)) (robust NCMI eq. 18).

    The pairs are never formed: with p_j = f(x_j), sum_{y_j != y_k} p_j . ln p_k is the product, class by class, of the
    sum of p over the other classes with the sum of ln p over the class, O(B D).

    Args:
        probs: [B, D] probabilities.
        labels: [B] int64 in [0, num_classes).
        num_classes: C.
        norm: "batch_sq" divides by n^2 (eq. 18, 40), "pairs" by the number of pairs (as released).
        detach_log: no gradient through ln p_k (as released).

    Returns:
        Scalar >= 0, in nats; 0 with fewer than two classes. Logarithms are clamped at ln 1e-8.

    Raises:
        ValueError: an unknown `norm`, or `probs` is no [B, D] matrix of probabilities with a label per row.

    Example:
        >>> probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
        >>> round(separation(probs, torch.tensor([0, 1]), 2).item(), 4)  # (H(p, q) + H(q, p)) / 4
        0.3825
    """
    probs = _outputs(probs)
    if norm not in ("batch_sq", "pairs"):
        raise ValueError(f"norm={norm!r}: expected one of batch_sq, pairs")
    log_probs = probs.clamp_min(LOG_FLOOR).log()
    sums = class_sums(probs, labels, num_classes)
    log_sums = class_sums(log_probs.detach() if detach_log else log_probs, labels, num_classes)
    total = ((sums - sums.sum(dim=0)) * log_sums).sum()
    if norm == "batch_sq":
        return total / len(probs) ** 2
    counts = class_sums(torch.ones_like(probs[:, 0]), labels, num_classes)
    return total / (len(probs) ** 2 - counts.square().sum()).clamp_min(1)


def normalized_cmi(probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """NCMI = I(X; Y^ | Y) / Gamma, low where clusters are narrow and far apart (robust NCMI eq. 14, 17, 18).

    Args:
        probs: [B, D] probabilities of the clean or of attacked samples, of the whole set.
        labels: [B] int64 in [0, num_classes).
        num_classes: C.

    Returns:
        Scalar >= 0; not finite with fewer than two classes.

    Raises:
        ValueError: `probs` is no [B, D] matrix of probabilities with a label per row.

    Example:
        >>> probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> normalized_cmi(probs, torch.tensor([0, 0, 1]), 2).item()
        0.0
    """
    return conditional_mutual_information(probs, labels, num_classes) / separation(probs, labels, num_classes)


ROW_TOLERANCE = 1e-2
"""How far a row of probabilities may be from 1: half precision leaves a few thousandths."""
NOT_PROBABILITIES = "expected probabilities, rows of 0 or more that sum to 1: pass softmax(logits), once"


def no_probabilities(probs: Tensor) -> Tensor:
    """[B] bool: rows of [B, C] that have a negative number or do not sum to 1, as logits have and do not."""
    return (probs.amin(dim=1) < 0) | ~((probs.sum(dim=1) - 1).abs() <= ROW_TOLERANCE)


def _outputs(probs: Tensor) -> Tensor:
    """In float32 or better."""
    if probs.ndim != 2 or not probs.numel():
        raise ValueError(f"expected [B, C] probabilities with B > 0, got {tuple(probs.shape)}")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    # NaN passes: a training that diverged is told by its loss.
    say_where_known(probs, lambda p: no_probabilities(p) & ~p.amin(dim=1).isnan(), NOT_PROBABILITIES)
    return probs
