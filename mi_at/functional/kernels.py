"""Dependence measures from kernel matrices: HSIC and its normalised form, and rules for the width of a kernel.

Samples are rows: x is [..., m, d], leading dimensions are a batch (layers, channels) and are solved in one go.
Everything of size m x m is float64, whatever comes in, and so are the results: R below divides by eps m = 1e-3.

Sources: Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms, ALT 2005 (HSIC, biased
estimate); Fukumizu et al., Kernel measures of conditional dependence, NeurIPS 2007 (the normalised form), as the
HSIC bottleneck (Ma et al., AAAI 2020), HBaR and IB-RAR use it.

Differences from their code: it inverts each matrix in float32 on the CPU; here a Cholesky factor is made once for each
matrix, on its device. It centres one side of K; both sides give the same trace and keep the matrix symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mi_at.functional.checks import say_where_known

KERNELS = ("gaussian", "linear")


def hsic(x: Tensor, z: Tensor, *, sigma_x: float | Tensor, sigma_z: float | Tensor) -> Tensor:
    """HSIC(x, z) = tr(K H L H) / (m - 1)^2, the biased estimate, Gaussian kernels exp(-|a - b|^2 / (2 sigma^2)).

    Args:
        x: [..., m, d] samples of the first variable.
        z: [..., m, e] samples of the second, in the same order.
        sigma_x: width of x's kernel, > 0, in the units of x: a number, or one for each leading index [...].
        sigma_z: width of z's kernel.

    Returns:
        [...] float64, in [0, 1): 0 where either is constant.

    Raises:
        ValueError: fewer than 2 samples, different numbers of samples, a width of 0, or (on a CPU) NaN.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> round(hsic(x, x, sigma_x=1.0, sigma_z=1.0).item(), 4)
        0.2109
        >>> hsic(x, torch.ones(4, 1), sigma_x=1.0, sigma_z=1.0).item()
        0.0
    """
    m = _same_samples(x, z)
    kernel_x, kernel_z = gaussian_kernel(x, width=sigma_x), gaussian_kernel(z, width=sigma_z)
    return (centred(kernel_x) * centred(kernel_z)).sum(dim=(-2, -1)) / (m - 1) ** 2


def normalized_hsic(
    x: Tensor,
    z: Tensor,
    *,
    sigma: float = 5.0,
    eps: float = 1e-5,
    kernel_x: str = "gaussian",
    kernel_z: str = "gaussian",
) -> Tensor:
    """tr(R_x R_z), R = K_c (K_c + eps m I)^-1, K_c the centred kernel matrix.

    A Gaussian kernel has variance 2 sigma^2 d, d the dimension of its own argument.

    Args:
        x: [..., m, d] samples of the first variable.
        z: [..., m, e] samples of the second, in the same order; its leading dimensions broadcast against x's.
        sigma: width per square root of a dimension, > 0 (IB-RAR and HBaR: 5).
        eps: ridge, > 0 (1e-5).
        kernel_x: "gaussian" or "linear" (k(a, b) = a.b).
        kernel_z: the same for z; labels go in one-hot.

    Returns:
        [...] float64 in [0, m - 1): not divided by m, so that it grows with the batch, at most the rank of either
        kernel (for K classes: K - 1).

    Raises:
        ValueError: fewer than 2 samples, different numbers of samples, a width or eps that is not positive, an unknown
            kernel, or (on a CPU) NaN.

    Example:
        >>> labels = torch.eye(3).repeat(4, 1)
        >>> round(normalized_hsic(labels, labels, kernel_x="linear", kernel_z="linear").item(), 4)  # K - 1
        1.9999
        >>> normalized_hsic(torch.ones(12, 5), labels, kernel_z="linear").item()
        0.0
    """
    _same_samples(x, z)
    smoothers = [
        smoother(kernel_matrix(values, kernel=kernel, sigma=sigma), eps=eps)
        for values, kernel in ((x, kernel_x), (z, kernel_z))
    ]
    return (smoothers[0] * smoothers[1]).sum(dim=(-2, -1))


def bottleneck(
    layers: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    sigma: float = 5.0,
    eps: float = 1e-5,
    kernel_labels: str = "linear",
) -> tuple[Tensor, Tensor]:
    """sum_l HSIC(X, T_l) and sum_l HSIC(Y, T_l), normalised, of an information bottleneck over layers.

    Every kernel matrix is made and factored once, those of all layers in one batch: as many as layers plus two.

    Args:
        layers: outputs T_l, each [m, d_l].
        x: [m, d] images.
        labels: [m, K] one-hot.
        sigma: width per square root of a dimension, > 0.
        eps: ridge, > 0.
        kernel_labels: "linear" or "gaussian".

    Returns:
        Two float64 scalars as of `normalized_hsic`, with gradients to the layers (and to x, where it has one).

    Raises:
        ValueError: no layer, or as `normalized_hsic`.

    Example:
        >>> labels = torch.eye(3).repeat(4, 1)
        >>> both = bottleneck([torch.ones(12, 5), labels], labels, labels)
        >>> [round(value.item(), 2) for value in both]  # a constant layer knows nothing
        [1.99, 2.0]
    """
    if not layers:
        raise ValueError("expected at least one layer")
    _same_samples(x, labels)
    for layer in layers:
        _same_samples(x, layer)
    each = torch.stack([kernel_matrix(layer, kernel="gaussian", sigma=sigma) for layer in layers])
    total = smoother(each, eps=eps).sum(dim=0)
    of_x = smoother(kernel_matrix(x, kernel="gaussian", sigma=sigma), eps=eps)
    of_labels = smoother(kernel_matrix(labels, kernel=kernel_labels, sigma=sigma), eps=eps)
    return (of_x * total).sum(), (of_labels * total).sum()


def channel_dependence(
    maps: Tensor, z: Tensor, *, sigma: float = 5.0, eps: float = 1e-5, kernel_z: str = "gaussian"
) -> Tensor:
    """Normalised HSIC(f_c, z) of every channel: `normalized_hsic` of each, without gradient, in one batched solve.

    With R_z = U U^T and lambda = eps m, tr(R_c R_z) = |U|^2 - lambda tr(U^T (K_c + lambda I)^-1 U) on what is
    orthogonal to 1. There the inverse is that of the kernel without centring, less the part along 1: one Cholesky
    factor and one triangular solve of as many columns as U has, at most e for a linear kernel.

    Args:
        maps: [m, C, ...] outputs of a convolution; a channel's pixels are its dimensions.
        z: [m, e], such as labels in one-hot; its kernel has at most rank e if it is linear.
        sigma: width per square root of a dimension, > 0.
        eps: ridge, > 0.
        kernel_z: "gaussian" or "linear".

    Returns:
        [C] float64 in [0, m - 1), exact to about 1e-9.

    Raises:
        ValueError: maps without pixels, or as `normalized_hsic`.

    Example:
        >>> labels = torch.eye(2).repeat(3, 1)
        >>> maps = torch.stack([labels, torch.ones(6, 2)], dim=1)  # two channels of two pixels, the second dead
        >>> channel_dependence(maps, labels, kernel_z="linear").round(decimals=2).abs().tolist()
        [1.0, 0.0]
    """
    if maps.ndim < 3:
        raise ValueError(f"expected the maps of a convolution, [m, C, ...], got {tuple(maps.shape)}")
    with torch.no_grad():
        maps = maps.flatten(2).transpose(0, 1)
        m = _same_samples(maps, z)
        width = scaled_width(maps, sigma)
        factor = _smoother_factor(z, kernel=kernel_z, sigma=sigma, eps=eps)
        sides = torch.cat([torch.ones_like(factor[:, :1]), factor], dim=1)
        # A CPU takes them in parts that stay in its cache, for a matrix is read several times; a GPU all at once.
        parts = maps.split(_PART if maps.device.type == "cpu" else len(maps))
        removed = [_removed(part, sides, width=width, ridge=eps * m) for part in parts]
        return _finite(factor.square().sum() - eps * m * torch.cat(removed))


def _smoother_factor(z: Tensor, *, kernel: str, sigma: float, eps: float) -> Tensor:
    """U with U U^T = R_z: [m, e] for a linear kernel, else [m, m]."""
    _require_ridge(eps)
    ridge = eps * z.shape[0]
    if kernel == "linear":  # Z (Z^T Z + lambda I)^-1 Z^T, Z the centred rows
        z = _finite(z.double() - z.double().mean(dim=0))
        factor, _ = torch.linalg.cholesky_ex(z.mT @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device))
        return torch.linalg.solve_triangular(factor, z.mT, upper=False).mT
    values, vectors = torch.linalg.eigh(centred(kernel_matrix(z, kernel=kernel, sigma=sigma)))
    values = values.clamp_min(0)
    return vectors * (values / (values + ridge)).sqrt()


def _removed(x: Tensor, sides: Tensor, *, width: float, ridge: float) -> Tensor:
    """tr(U^T H (K_c + ridge)^-1 H U) of each of [c, m, d]; `sides` is [1, U]."""
    x = x.double()
    x = (x - x.mean(dim=-2, keepdim=True)) / width
    half, one = x.square().sum(dim=-1, keepdim=True) / 2, torch.ones_like(x[..., :1])
    exponent = torch.cat([x, -half, one], dim=-1) @ torch.cat([x, one, -half], dim=-1).mT  # -|a - b|^2 / (2 width^2)
    kernel = exponent.exp_()
    kernel.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    solved = torch.linalg.solve_triangular(factor, sides.expand(len(x), -1, -1), upper=False)
    along, across = solved[..., :1], solved[..., 1:]
    constant = (along.mT @ across).square().sum(dim=(-2, -1)) / along.square().sum(dim=(-2, -1))
    removed = across.square().sum(dim=(-2, -1)) - constant
    return removed.masked_fill(failed != 0, math.nan)


_PART = 16


def kernel_matrix(x: Tensor, *, kernel: str, sigma: float) -> Tensor:
    """Kernel matrix by name; "gaussian" has the dimension-scaled width.

    Args:
        x: [..., m, d].
        kernel: "gaussian" or "linear".
        sigma: width per square root of a dimension; "linear" has none.

    Returns:
        [..., m, m] float64.

    Raises:
        ValueError: an unknown kernel, fewer than 2 samples, a width that is not positive, or (on a CPU) NaN.

    Example:
        >>> kernel_matrix(torch.eye(2), kernel="linear", sigma=5.0).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: expected one of {', '.join(KERNELS)}")
    return linear_kernel(x) if kernel == "linear" else gaussian_kernel(x, width=scaled_width(x, sigma))


def gaussian_kernel(x: Tensor, *, width: float | Tensor) -> Tensor:
    """exp(-|a - b|^2 / (2 width^2)) between all rows.

    Args:
        x: [..., m, d].
        width: > 0, in the units of x: a number, or one for each leading index [...].

    Returns:
        [..., m, m] float64 in (0, 1], 1 on the diagonal.

    Raises:
        ValueError: fewer than 2 samples, a width that is not positive (on a GPU a tensor's zero gives NaN instead:
            looking would wait for the device), or (on a CPU) NaN.

    Example:
        >>> round(gaussian_kernel(torch.tensor([[0.0], [1.0]]), width=1.0)[0, 1].log().item(), 6)
        -0.5
    """
    if isinstance(width, Tensor):
        say_where_known(width, lambda w: w == 0, f"expected a kernel width > 0, got {_ZERO_WIDTH}")
        say_where_known(width, lambda w: ~(w > 0), "expected a kernel width > 0, got a negative one or NaN")
        width = width.double()[..., None, None]
    elif not 0 < width < math.inf:
        raise ValueError(f"expected a kernel width > 0, got {_ZERO_WIDTH if width == 0 else width}")
    kernel = torch.exp(-squared_distances(x) / (2 * width**2))
    return _finite(kernel)


def linear_kernel(x: Tensor) -> Tensor:
    """Inner products of all rows: [..., m, d] -> [..., m, m] float64.

    Raises:
        ValueError: fewer than 2 samples, or (on a CPU) NaN.

    Example:
        >>> linear_kernel(torch.tensor([[1.0], [3.0]])).tolist()
        [[1.0, 3.0], [3.0, 9.0]]
    """
    _samples(x)
    x = x.double()
    return _finite(x @ x.mT)


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances of all rows: [..., m, d] -> [..., m, m] float64, 0 on the diagonal.

    Raises:
        ValueError: fewer than 2 samples.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
        [[0.0, 25.0], [25.0, 0.0]]
    """
    _samples(x)
    distances: Tensor = _SquaredDistances.apply(x)
    return distances


class _SquaredDistances(torch.autograd.Function):
    """Forward in float64, without a float64 copy of all of x. Backward one product in the type of x.

    The gradient is a product of the Laplacian of dD and x, whose rounding no division by a ridge follows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        first = x[..., :1, :].double()  # less it no distance changes, and an offset common to all costs no digits
        products = x.new_zeros(*x.shape[:-1], x.shape[-2], dtype=torch.float64)
        for part, offset in zip(x.split(_COLUMNS, dim=-1), first.split(_COLUMNS, dim=-1), strict=True):
            moved = part.to(torch.float64, copy=True).sub_(offset)
            products += moved @ moved.mT
        squares = products.diagonal(dim1=-2, dim2=-1)
        return squares[..., :, None] + squares[..., None, :] - 2 * products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        both = gradient + gradient.mT
        laplacian = torch.diag_embed(both.sum(dim=-1)) - both
        exact = torch.promote_types(x.dtype, torch.float32)
        return ((2 * laplacian).to(exact) @ x.to(exact)).to(x.dtype)


_COLUMNS = 2048  # of which a copy in float64 stays in a CPU's cache


def centred(kernel: Tensor) -> Tensor:
    """H K H, H = I - 1/m: rows and columns of [..., m, m] sum to 0.

    Example:
        >>> centred(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    rows = kernel - kernel.mean(dim=-1, keepdim=True)
    return rows - rows.mean(dim=-2, keepdim=True)


def smoother(kernel: Tensor, *, eps: float = 1e-5) -> Tensor:
    """R = K_c (K_c + eps m I)^-1 by one Cholesky factor for each matrix.

    Args:
        kernel: [..., m, m] symmetric positive semi-definite.
        eps: ridge, > 0.

    Returns:
        [..., m, m] float64, symmetric, eigenvalues in [0, 1); 0 where the kernel is constant. NaN where the kernel is
        not positive semi-definite, so that no wrong number passes for a right one.

    Raises:
        ValueError: eps is not positive.

    Example:
        >>> smoother(torch.eye(2), eps=0.5).diagonal().sum().round(decimals=6).item()  # eigenvalues 0 and 1, ridge 1
        0.5
    """
    _require_ridge(eps)
    solved: Tensor = _Smoother.apply(kernel.double(), eps * kernel.shape[-1])
    return solved


class _Smoother(torch.autograd.Function):
    """R = I - lambda A^-1, A = K_c + lambda I, so dR = (I - R) dK_c (I - R) / lambda: no further solve backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, ridge: float) -> Tensor:
        within = centred(kernel)
        shifted = within.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        # Without the check of errors, which would wait for the device; its verdict is put in as NaN.
        factor, failed = torch.linalg.cholesky_ex(shifted)
        factor.masked_fill_((failed != 0)[..., None, None], math.nan)
        solved = torch.cholesky_solve(within, factor)
        ctx.save_for_backward(solved)
        ctx.ridge = ridge
        return solved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (solved,) = ctx.saved_tensors
        rest = torch.eye(solved.shape[-1], dtype=solved.dtype, device=solved.device) - solved
        return centred(rest.mT @ gradient @ rest.mT) / ctx.ridge, None


def knn_width(x: Tensor, k: int = 10) -> Tensor:
    """Mean distance of a sample to its k nearest neighbours, itself excluded, averaged over samples.

    Args:
        x: [..., m, d].
        k: neighbours, 1 <= k < m.

    Returns:
        [...] float64 in the units of x, without gradient: a width is a setting.

    Raises:
        ValueError: k out of range, fewer than 2 samples; on a CPU also NaN, or all samples equal.

    Example:
        >>> knn_width(torch.tensor([[0.0], [1.0], [3.0]]), k=1).item()  # (1 + 1 + 2) / 3
        1.3333333333333333
    """
    m = _samples(x)
    if not 1 <= k < m:
        raise ValueError(
            f"k={k} nearest neighbours: expected 1 <= k < {m}, the number of samples: a smaller k or a larger batch"
        )
    squared = squared_distances(x.detach())
    say_where_known(squared, _not_finite, _NOT_FINITE)
    own = torch.eye(m, dtype=torch.bool, device=x.device)
    nearest = squared.masked_fill(own, math.inf).topk(k, dim=-1, largest=False).values
    width = nearest.clamp_min(0).sqrt().mean(dim=(-2, -1))
    say_where_known(width, lambda w: w == 0, f"expected a kernel width > 0, got {_ZERO_WIDTH}")
    return width


def scaled_width(x: Tensor, sigma: float = 5.0) -> float:
    """Width sigma sqrt(d), so that the kernel's variance is 2 sigma^2 d.

    Args:
        x: [..., m, d].
        sigma: width per square root of a dimension, > 0.

    Returns:
        The width, in the units of x.

    Raises:
        ValueError: sigma is not positive, or d is 0.

    Example:
        >>> scaled_width(torch.zeros(3, 4), sigma=5.0)
        10.0
    """
    if not 0 < sigma < math.inf or not x.shape[-1]:
        raise ValueError(f"sigma={sigma} in {x.shape[-1]} dimensions: expected a width > 0 (the papers' is 5)")
    return sigma * math.sqrt(x.shape[-1])


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Labels as rows of a kernel matrix, for a term that needs to tell classes apart.

    Args:
        y: [m] int64 in [0, classes).
        classes: K.

    Returns:
        [m, K] float64.

    Raises:
        ValueError: one sample, or (on a CPU) all of one class.

    Example:
        >>> one_hot(torch.tensor([0, 1]), 3).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if len(y) < 2:
        raise ValueError(
            "a batch of one sample, where a kernel matrix needs at least 2: choose a dataset.batch_size that does not "
            "leave one over"
        )
    say_where_known(
        y,
        lambda y: (y == y[0]).all(),
        f"all {len(y)} samples of a batch are of one class and say nothing of labels; expected two classes in every "
        "batch: choose another dataset.batch_size",
    )
    return functional.one_hot(y, classes).double()


_ZERO_WIDTH = "0: all samples are equal (a dead layer?), or the width was given as 0"
_NOT_FINITE = (
    "a kernel matrix is not finite: the samples hold NaN or infinity (training diverged?); lower optim.lr or the "
    "term's weight"
)


def _samples(x: Tensor) -> int:
    """Number of samples of [..., m, d]."""
    if x.ndim < 2:
        raise ValueError(f"expected samples as rows, [..., m, d], got {tuple(x.shape)}: flatten(1) images or maps")
    m = x.shape[-2]
    if m < 2:
        raise ValueError(f"a kernel matrix needs at least 2 samples, got {m}: choose another batch size")
    return m


def _same_samples(x: Tensor, z: Tensor) -> int:
    m = _samples(x)
    if _samples(z) != m:
        raise ValueError(
            f"expected as many samples in both, got {m} and {z.shape[-2]} in {tuple(x.shape)} and {tuple(z.shape)}: "
            "[..., m, d] has samples as rows, so flatten(1) images or maps"
        )
    return m


def _require_ridge(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps}: expected a ridge > 0 (the papers' is 1e-5)")


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _finite(kernel: Tensor) -> Tensor:
    say_where_known(kernel, _not_finite, _NOT_FINITE)
    return kernel
