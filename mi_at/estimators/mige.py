"""MIGE: the gradient of mutual information from scores, without a critic.

Paper: Wen et al., Mutual information gradient estimation for representation learning, ICLR 2020, eq. 5-8; the scores by
the spectral Stein gradient estimator, Shi et al., A spectral approach to gradient estimation for implicit
distributions, ICML 2018, eq. 11-14.
grad I(z; z') = grad H(z) + grad H(z') - grad H(z, z'), and grad H(z) = - E[grad_z ln q(z) dz].

Differences from the papers: the kernel's width is the median distance of the samples (Shi et al., section 5) also in
high dimensions, where Wen et al. project at random first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_stein_score(x: Tensor, *, share: float = 0.99) -> Tensor:
    """grad ln q at samples of q (Shi et al. 2018, eq. 11-14).

    With the eigenvectors U and eigenvalues of the Gaussian kernel matrix K of the samples, psi_j = sqrt(M) u_j at the
    samples and beta_j = - 1/M sum_m grad psi_j(x_m); the score is sum_j beta_j psi_j over the largest eigenvalues.

    Args:
        x: [M, d] samples, M >= 2.
        share: of the sum of the eigenvalues that is kept, in (0, 1].

    Returns:
        [M, d] in float64, detached.

    Raises:
        ValueError: not [M, d] with two samples or more, or a share out of range.

    Example:
        >>> x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
        >>> score = spectral_stein_score(x)  # of a standard normal: -x
        >>> bool(((score + x.double()).square().mean() < 0.1).item())
        True
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"expected samples [M, d] with M of 2 or more, got {tuple(x.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share in (0, 1]")
    x = x.detach().double()
    count = len(x)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = distances[*torch.triu_indices(count, count, offset=1, device=x.device)]
    variance = pairs.median().square().clamp_min(torch.finfo(x.dtype).tiny)
    kernel = (-distances.square() / (2 * variance)).exp()
    values, vectors = torch.linalg.eigh(kernel)
    largest = values.clamp_min(0).flip(0)
    before = (largest.cumsum(0) - largest).flip(0)  # the sum of the eigenvalues above each one
    kept = before < share * largest.sum()
    inverse = torch.where(kept & (values > 0), 1 / values.clamp_min(torch.finfo(x.dtype).tiny), 0)
    # sum_m grad_x k(x_m, x_n) = sum_m (x_n - x_m) K_mn / variance
    pull = (kernel.sum(dim=1, keepdim=True) * x - kernel @ x) / variance
    return -vectors @ (inverse[:, None] * (vectors.T @ pull))


def mige_mutual_information(z: Tensor, z2: Tensor, *, share: float = 0.99) -> Tensor:
    """A scalar whose gradient estimates that of I(z; z2); its value is 0, for MIGE estimates no value.

    Args:
        z: [B, d], of the global batch.
        z2: [B, e], whose row i belongs to row i of z.
        share: of the eigenvalues, see `spectral_stein_score`.

    Returns:
        Scalar 0 in float64, with gradients to z and z2: nats per unit of z.

    Raises:
        ValueError: not two matrices with as many rows, two or more.

    Example:
        >>> z = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
        >>> value = mige_mutual_information(z, z.detach() + noise)
        >>> (gradient,) = torch.autograd.grad(value, z)
        >>> value.item(), bool((gradient * z).sum() > 0)  # a larger z stands out of the noise
        (0.0, True)
    """
    if z.ndim != 2 or z2.ndim != 2 or len(z) != len(z2):
        raise ValueError(f"expected two matrices with as many rows, got {tuple(z.shape)} and {tuple(z2.shape)}")
    both = torch.cat([z, z2], dim=1).double()
    joint = spectral_stein_score(both, share=share)
    apart = torch.cat([spectral_stein_score(z, share=share), spectral_stein_score(z2, share=share)], dim=1)
    # Entropy falls along the score: grad I = E[(joint - apart) d(z, z2)].
    surrogate = ((joint - apart) * both).sum(dim=1).mean()
    return surrogate - surrogate.detach()
