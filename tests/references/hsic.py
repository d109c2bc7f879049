"""Literal transcriptions of HSIC, its normalised form, kernel widths and IB-RAR's terms and mask: loops over lists.

Written from the printed equations, not from ``mi_at``: every function takes nested lists of Python floats, every
matrix product is three loops and every inverse an elimination. Sources:

* HSIC: Gretton et al., ALT 2005, definition 2 (biased, (m - 1)^-2).
* normalised HSIC: HSIC bottleneck, Ma et al., AAAI 2020, section 3: tr(R_x R_y), R = K_c (K_c + eps m I)^-1.
* width by neighbours: the text of shared_info (mean distance to the 10 nearest).
* terms, mask: IB-RAR, eq. 1-3.
"""

import math

Matrix = list[list[float]]


def matmul(a: Matrix, b: Matrix) -> Matrix:
    return [[sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]


def trace(a: Matrix) -> float:
    return sum(a[i][i] for i in range(len(a)))


def inverse(a: Matrix) -> Matrix:
    """Gauss-Jordan with pivoting."""
    m = len(a)
    rows = [list(row) + [1.0 if i == j else 0.0 for j in range(m)] for i, row in enumerate(a)]
    for i in range(m):
        best = max(range(i, m), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        pivot = rows[i][i]
        rows[i] = [v / pivot for v in rows[i]]
        for r in range(m):
            if r != i:
                factor = rows[r][i]
                rows[r] = [v - factor * w for v, w in zip(rows[r], rows[i], strict=True)]
    return [row[m:] for row in rows]


def centring(m: int) -> Matrix:
    """H = I - 1 1^T / m."""
    return [[(1.0 if i == j else 0.0) - 1.0 / m for j in range(m)] for i in range(m)]


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((v - w) ** 2 for v, w in zip(a, b, strict=True)))


def gaussian(x: Matrix, width: float) -> Matrix:
    """k(a, b) = exp(-|a - b|^2 / (2 width^2))."""
    return [[math.exp(-(distance(a, b) ** 2) / (2 * width**2)) for b in x] for a in x]


def linear(x: Matrix) -> Matrix:
    """k(a, b) = a . b."""
    return [[sum(v * w for v, w in zip(a, b, strict=True)) for b in x] for a in x]


def hsic(x: Matrix, z: Matrix, sigma_x: float, sigma_z: float) -> float:
    """(m - 1)^-2 tr(K H L H)."""
    m = len(x)
    h = centring(m)
    product = matmul(matmul(matmul(gaussian(x, sigma_x), h), gaussian(z, sigma_z)), h)
    return trace(product) / (m - 1) ** 2


def kernel(x: Matrix, name: str, sigma: float) -> Matrix:
    """By name; Gaussian of variance 2 sigma^2 d."""
    return linear(x) if name == "linear" else gaussian(x, sigma * math.sqrt(len(x[0])))


def r_matrix(k: Matrix, eps: float) -> Matrix:
    """K_c (K_c + eps m I)^-1, K_c = H K H."""
    m = len(k)
    h = centring(m)
    kc = matmul(matmul(h, k), h)
    return matmul(kc, inverse([[kc[i][j] + (eps * m if i == j else 0.0) for j in range(m)] for i in range(m)]))


def normalized_hsic(
    x: Matrix, z: Matrix, sigma: float = 5.0, eps: float = 1e-5, kernel_x: str = "gaussian", kernel_z: str = "gaussian"
) -> float:
    """tr(R_x R_z)."""
    return trace(matmul(r_matrix(kernel(x, kernel_x, sigma), eps), r_matrix(kernel(z, kernel_z, sigma), eps)))


def knn_width(x: Matrix, k: int) -> float:
    """Mean over samples of the mean distance to the k nearest others."""
    total = 0.0
    for i, a in enumerate(x):
        others = sorted(distance(a, b) for j, b in enumerate(x) if j != i)
        total += sum(others[:k]) / k
    return total / len(x)


def one_hot(labels: list[int], classes: int) -> Matrix:
    return [[1.0 if label == k else 0.0 for k in range(classes)] for label in labels]


def ib_rar_terms(
    layers: list[Matrix], images: Matrix, labels: Matrix, alpha: float, beta: float, label_kernel: str = "linear"
) -> tuple[float, float]:
    """+ alpha sum_l I(X, T_l) and - beta sum_l I(Y, T_l) (eq. 1)."""
    of_x = sum(normalized_hsic(images, layer) for layer in layers)
    of_y = sum(normalized_hsic(labels, layer, kernel_x=label_kernel) for layer in layers)
    return alpha * of_x, -beta * of_y


def ib_rar_mask(channels: list[Matrix], labels: Matrix, fraction: float) -> list[bool]:
    """phi_c = 1 if I(f_c, Y) is not among the lowest part of all channels (eq. 3)."""
    values = [normalized_hsic(channel, labels, kernel_z="linear") for channel in channels]
    drop = max(1, int(fraction * len(channels)))
    lowest = sorted(range(len(channels)), key=lambda c: (round(values[c], 6), c))[:drop]
    return [c not in lowest for c in range(len(channels))]
