"""Lower bounds of mutual information from the scores of a critic, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def donsker_varadhan(joint: Tensor, marginal: Tensor) -> Tensor:
    """E_joint[T] - ln E_marginal[exp T] (Donsker and Varadhan; MINE, NAMID eq. 11).

    Args:
        joint: [N] scores of pairs that belong together.
        marginal: [M] scores of pairs drawn independently.

    Returns:
        Scalar in nats; at most the mutual information, in expectation over the samples up to a bias of order 1/M.

    Raises:
        ValueError: one of them is empty or not a vector.

    Example:
        >>> round(donsker_varadhan(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.0, 0.0])).item(), 4)
        2.0
    """
    if joint.ndim != 1 or marginal.ndim != 1 or not len(joint) or not len(marginal):
        raise ValueError(
            f"donsker_varadhan needs two vectors of scores, got {tuple(joint.shape)} and {tuple(marginal.shape)}"
        )
    return joint.mean() - (marginal.logsumexp(dim=0) - math.log(len(marginal)))


def local_donsker_varadhan(scores: Tensor) -> Tensor:
    """The Donsker-Varadhan estimate of every sample, mean over the locations of its image (NAMID).

    E_i = mean_k (u_iik - ln 1/(B-1) sum_{j != i} exp u_ijk): the negatives of an output are the patches of all other
    images of the batch, which is the global one.

    Args:
        scores: [B, B, L], u_ijk of the output of sample i and the patch at location k of image j.

    Returns:
        [B] nats.

    Raises:
        ValueError: no [B, B, L] scores, or fewer than two samples.

    Example:
        >>> scores = torch.zeros(3, 3, 2) + torch.eye(3)[:, :, None]
        >>> local_donsker_varadhan(scores).tolist()
        [1.0, 1.0, 1.0]
    """
    others = _off_diagonal(scores).logsumexp(dim=1) - math.log(len(scores) - 1)
    return (_diagonal(scores) - others).mean(dim=1)


def pooled_donsker_varadhan(scores: Tensor) -> Tensor:
    """The Donsker-Varadhan estimate of a batch: one expectation over all pairs of different samples (WMIM).

    Args:
        scores: [B, B, L] as of `local_donsker_varadhan`.

    Returns:
        Scalar in nats, mean over the locations; at most the mean of `local_donsker_varadhan`, because the logarithm
        is concave.

    Raises:
        ValueError: as `local_donsker_varadhan`.

    Example:
        >>> pooled_donsker_varadhan(torch.zeros(3, 3, 2) + torch.eye(3)[:, :, None]).item()
        1.0
    """
    count = len(scores) * (len(scores) - 1)
    others = _off_diagonal(scores).flatten(0, 1).logsumexp(dim=0) - math.log(max(count, 1))
    return (_diagonal(scores).mean(dim=0) - others).mean()


def info_nce(scores: Tensor) -> Tensor:
    """InfoNCE: mean_i ln(exp u_ii / (1/B sum_j exp u_ij)) (van den Oord et al. 2018).

    Args:
        scores: [B, B], u_ij of sample i of the one variable and sample j of the other.

    Returns:
        Scalar in nats, at most ln B.

    Raises:
        ValueError: `scores` is not a square matrix.

    Example:
        >>> round(info_nce(1000 * torch.eye(4)).exp().item(), 4)
        4.0
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise ValueError(f"info_nce needs a square [B, B] matrix of scores, got {tuple(scores.shape)}")
    return (scores.diagonal() - scores.logsumexp(dim=1)).mean() + math.log(len(scores))


def _diagonal(scores: Tensor) -> Tensor:
    """[B, L]: the scores of pairs that belong together."""
    return scores.diagonal().T


def _off_diagonal(scores: Tensor) -> Tensor:
    """The scores with those of the pairs that belong together at -inf, where they add nothing to a sum of exp."""
    if scores.ndim != 3 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"expected scores [B, B, L], got {tuple(scores.shape)}")
    if len(scores) < 2:
        raise ValueError("an estimate of one sample has no negatives: use batches of 2 or more")
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)[:, :, None]
    return scores.masked_fill(own, -math.inf)
