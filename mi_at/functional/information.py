"""Information quantities of discrete class assignments, in nats."""

from __future__ import annotations

import torch
from torch import Tensor


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
