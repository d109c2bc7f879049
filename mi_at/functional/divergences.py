"""Cross-entropies and divergences between the outputs of a classifier, from logits, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mi_at.functional.checks import say_where_known
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


def symmetrised_kl(mu: Tensor, sigma: Tensor, mu2: Tensor, sigma2: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of KL(p || q) and KL(q || p) of Gaussians with diagonal covariance (shared_info eq. 15-16, D_SKL).

    Per dimension 1/4 [(s/s2 - s2/s)^2 + (m - m2)^2 (1/s^2 + 1/s2^2)], the logarithms of the two cancel; summed over
    dimensions. Scaling all four arguments together changes nothing.

    Args:
        mu: [B, d] means of p.
        sigma: [B, d] standard deviations of p, > 0.
        mu2: [B, d] of q.
        sigma2: [B, d] of q, > 0.
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats, non-negative; a scalar or [B]. Gradients flow through both sides.

    Raises:
        ValueError: four tensors that are not of one shape [B, d], or (on a CPU) a deviation that is not positive.

    Example:
        >>> one, two = torch.ones(1, 3), 2 * torch.ones(1, 3)
        >>> symmetrised_kl(one, one, two, one).item()  # unit shift in 3 dimensions: 3 / 2
        1.5
    """
    _check_gaussians(mu, sigma, mu2, sigma2)
    spread = (sigma / sigma2 - sigma2 / sigma).square()
    shift = ((mu - mu2) / sigma).square() + ((mu - mu2) / sigma2).square()
    return _reduce((spread + shift).sum(dim=1) / 4, reduction)


def symmetrised_kl_categorical(logits_p: Tensor, logits_q: Tensor, reduction: str = "mean") -> Tensor:
    """Mean of KL(p || q) and KL(q || p) between softmax outputs (shared_info A.4: D_SKL on p(y|x)).

    Args:
        logits_p: [B, C] float.
        logits_q: [B, C] float.
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats, non-negative; a scalar or [B]. Gradients flow through both sides.

    Example:
        >>> p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> torch.equal(symmetrised_kl_categorical(p, q), kl_divergence(p, q))
        True
    """
    log_p, log_q = F.log_softmax(logits_p, dim=1), F.log_softmax(logits_q, dim=1)
    return _reduce(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1) / 2, reduction)


def kl_to_standard_normal(mu: Tensor, sigma: Tensor, reduction: str = "mean") -> Tensor:
    """KL(N(mu, diag sigma^2) || N(0, I)), the rate of a variational bottleneck (Alemi et al. 2017 eq. 17).

    Args:
        mu: [B, d].
        sigma: [B, d], > 0.
        reduction: "mean" over the batch or "none" for one value per sample [B].

    Returns:
        Nats, non-negative, summed over dimensions; a scalar or [B].

    Raises:
        ValueError: two tensors that are not of one shape [B, d], or (on a CPU) a deviation that is not positive.

    Example:
        >>> kl_to_standard_normal(torch.zeros(2, 5), torch.ones(2, 5)).item()
        0.0
    """
    _check_gaussians(mu, sigma)
    return _reduce((mu.square() + sigma.square() - 1 - 2 * sigma.log()).sum(dim=1) / 2, reduction)


def _check_gaussians(*arguments: Tensor) -> None:
    """Means and deviations in turn."""
    shapes = [tuple(argument.shape) for argument in arguments]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(f"expected means and deviations of one shape [B, d], got {', '.join(map(str, shapes))}")
    for sigma in arguments[1::2]:
        say_where_known(sigma, lambda s: ~(s > 0), "expected deviations > 0")


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return values.mean()
    if reduction == "none":
        return values
    raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
