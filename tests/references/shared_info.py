"""Literal transcriptions for shared_info and vib: loops over samples and dimensions, no vectorised algebra.

Written from the printed equations, not from ``mi_at``. Matrices are nested lists of floats or of 0-dimensional float64
tensors, as in ``tests.references.losses``. Sources:

* Yu et al., "Improving adversarial robustness by learning shared information", eq. 15-16, 19, sections 4.1 and 4.3;
  the sign of the kernel's exponent, which its A.3 lacks, from Gretton et al., ALT 2005.
* The normalised form: Fukumizu et al., NeurIPS 2007, with a plain matrix inverse.
* The variational bottleneck: Alemi et al., ICLR 2017, eq. 17, with the closed form of the KL.
"""

import math

import torch

from tests.references.losses import Number, Row, Rows, _exp, _log, cross_entropy, log_softmax, mean, value_of


def gaussian_kl(mu: Row, sigma: Row, mu2: Row, sigma2: Row) -> Number:
    """KL(N(mu, diag sigma^2) || N(mu2, diag sigma2^2)), the textbook form."""
    total: Number = 0.0
    for m, s, m2, s2 in zip(mu, sigma, mu2, sigma2, strict=True):
        total = total + _log(s2 / s) + (s * s + (m - m2) * (m - m2)) / (2 * s2 * s2) - 0.5
    return total


def symmetrised_kl(mu: Rows, sigma: Rows, mu2: Rows, sigma2: Rows) -> Row:
    """D_SKL of each sample: "obtained by averaging" the two."""
    return [
        (gaussian_kl(m, s, m2, s2) + gaussian_kl(m2, s2, m, s)) / 2
        for m, s, m2, s2 in zip(mu, sigma, mu2, sigma2, strict=True)
    ]


def categorical_kl(z: Row, z2: Row) -> Number:
    """sum_k p_k (log p_k - log q_k)."""
    total: Number = 0.0
    for log_p, log_q in zip(log_softmax(z), log_softmax(z2), strict=True):
        total = total + _exp(log_p) * (log_p - log_q)
    return total


def symmetrised_kl_categorical(z: Rows, z2: Rows) -> Row:
    """The same between the outputs (A.4)."""
    return [(categorical_kl(a, b) + categorical_kl(b, a)) / 2 for a, b in zip(z, z2, strict=True)]


def rate(mu: Rows, sigma: Rows) -> Row:
    """KL to N(0, I) of each sample."""
    return [gaussian_kl(m, s, [0.0] * len(m), [1.0] * len(m)) for m, s in zip(mu, sigma, strict=True)]


def squared_distance(a: Row, b: Row) -> Number:
    total: Number = 0.0
    for u, v in zip(a, b, strict=True):
        total = total + (u - v) * (u - v)
    return total


def width(z: Rows, k: int) -> float:
    """Section 4.1: "for each sample, we evaluate its k nearest distances and take the mean", averaged over samples."""
    means = []
    for i, a in enumerate(z):
        others = sorted(math.sqrt(value_of(squared_distance(a, b))) for j, b in enumerate(z) if j != i)
        means.append(sum(others[:k]) / k)
    return sum(means) / len(means)


def kernel(z: Rows, sigma: float) -> Rows:
    """exp(-|a - b|^2 / (2 sigma^2))."""
    return [[_exp(-squared_distance(a, b) / (2 * sigma * sigma)) for b in z] for a in z]


def product(a: Rows, b: Rows) -> Rows:
    size = len(a)
    return [[sum((a[i][k] * b[k][j] for k in range(size)), start=0.0) for j in range(size)] for i in range(size)]


def centring(size: int) -> Rows:
    """H = I - 1 1^T / m."""
    return [[(1.0 if i == j else 0.0) - 1.0 / size for j in range(size)] for i in range(size)]


def trace(a: Rows) -> Number:
    return sum((a[i][i] for i in range(len(a))), start=0.0)


def hsic_trace(z: Rows, z2: Rows, k: int) -> Number:
    """tr(K H L H)."""
    h = centring(len(z))
    k_h = product(kernel(z, width(z, k)), h)
    l_h = product(kernel(z2, width(z2, k)), h)
    return trace(product(k_h, l_h))


def hsic(z: Rows, z2: Rows, k: int, scale: str) -> Number:
    """The three scales."""
    size = len(z)
    if scale == "trace":
        return hsic_trace(z, z2, k)
    if scale == "biased":
        return hsic_trace(z, z2, k) / (size - 1) ** 2
    parts = []
    for values in (z, z2):
        h = centring(size)
        within = product(product(h, kernel(values, width(values, k))), h)
        matrix = torch.stack([torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in row]) for row in within])
        parts.append(matrix @ torch.linalg.inv(matrix + 1e-5 * size * torch.eye(size, dtype=torch.float64)))
    return torch.trace(parts[0] @ parts[1])


def beta_of(epoch: int, beta: float) -> float:
    """Section 4.1 at 100 epochs or more: 1e-3, from epoch 10 exponentially up to beta in 90 epochs, then constant."""
    if epoch <= 10:
        return 1e-3
    if epoch <= 100:
        return 1e-3 * math.exp(math.log(beta / 1e-3) * (epoch - 10) / 90)
    return beta


def loss(
    z: Rows, z_adv: Rows, y: list[int], *, alpha: float, beta: float, lam: float, skl: Number, mi: Number
) -> Number:
    """Eq. 16."""
    adversarial = mean([cross_entropy(row, label) for row, label in zip(z_adv, y, strict=True)])
    clean = mean([cross_entropy(row, label) for row, label in zip(z, y, strict=True)])
    return alpha * adversarial + (1 - alpha) * clean + beta * skl - lam * mi
