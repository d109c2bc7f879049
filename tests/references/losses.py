"""Literal transcriptions of the training losses, one loop over samples and one over classes.

Written from the printed equations, not from ``mi_at``. Every function takes nested lists of Python floats
(fast, for values) or of 0-dimensional float64 tensors (slow, for gradients): ``rows(t)`` gives the first,
``rows(t, grad=True)`` the second. Sources:

* MIMAE-AT: Atsague et al., "A Mutual Information Regularization for Adversarial Training", eq. 9-14, Table 1.
* MART: Wang et al., ICLR 2020, eq. 9-11 and the constants of the published implementation
  (1.0001, 1e-12 in the boosted cross-entropy; 1e-12 and 1.0000001 in the weighted KL).
* TRADES: Zhang et al., ICML 2019, eq. 5.
* MI from a joint of class assignments: Ji et al., ICCV 2019 (IIC), eq. 3.
"""

import math
from typing import Any

import torch

Number = Any  # float or 0-dimensional float64 tensor
Row = list[Number]
Rows = list[Row]


def rows(logits: torch.Tensor, grad: bool = False) -> Rows:
    """A [B, C] tensor as nested lists: floats, or scalars that keep their graph."""
    logits = logits.double()
    if grad:
        return [[logits[i, k] for k in range(logits.shape[1])] for i in range(logits.shape[0])]
    return [[float(v) for v in row] for row in logits.tolist()]


def _log(v: Number) -> Number:
    return torch.log(v) if isinstance(v, torch.Tensor) else math.log(v)


def _exp(v: Number) -> Number:
    return torch.exp(v) if isinstance(v, torch.Tensor) else math.exp(v)


def value_of(v: Number) -> float:
    """The number itself, for comparisons that carry no gradient."""
    return float(v.detach()) if isinstance(v, torch.Tensor) else float(v)


def log_softmax(z: Row) -> Row:
    """log p_k = z_k - log sum_j exp(z_j), with the largest logit taken out for range."""
    top = max(value_of(v) for v in z)
    total: Number = 0.0
    for v in z:
        total = total + _exp(v - top)
    log_total = _log(total)
    return [v - top - log_total for v in z]


def softmax(z: Row) -> Row:
    return [_exp(v) for v in log_softmax(z)]


def mean(values: Row) -> Number:
    total: Number = 0.0
    for v in values:
        total = total + v
    return total / len(values)


def largest_other(z: Row, y: int) -> int:
    """Index of max_{k != y} z_k, the lowest one of a tie."""
    best = -1
    for k in range(len(z)):
        if k != y and (best < 0 or value_of(z[k]) > value_of(z[best])):
            best = k
    return best


# ---------------------------------------------------------------- per-sample pieces


def cross_entropy(z: Row, y: int) -> Number:
    """Eq. 9: -log p_y."""
    return -log_softmax(z)[y]


def boosted_cross_entropy(z: Row, y: int) -> Number:
    """Eq. 10 with MART's constants: -log p_y - log(1.0001 - max_{k != y} p_k + 1e-12)."""
    p = softmax(z)
    return cross_entropy(z, y) - _log(1.0001 - p[largest_other(p, y)] + 1e-12)


def kl(z_p: Row, z_q: Row) -> Number:
    """KL(softmax(z_p) || softmax(z_q)) = sum_c p_c (log p_c - log q_c)."""
    log_p, log_q = log_softmax(z_p), log_softmax(z_q)
    total: Number = 0.0
    for c in range(len(z_p)):
        total = total + _exp(log_p[c]) * (log_p[c] - log_q[c])
    return total


def mart_weighted_kl(z: Row, z_adv: Row, y: int) -> Number:
    """sum_c p_c(x) (log p_c(x) - log(p_c(x') + 1e-12)) * (1.0000001 - p_y(x))."""
    log_p, p, q = log_softmax(z), softmax(z), softmax(z_adv)
    total: Number = 0.0
    for c in range(len(z)):
        total = total + p[c] * (log_p[c] - _log(q[c] + 1e-12))
    return total * (1.0000001 - p[y])


# ---------------------------------------------------------------- information


def joint_distribution(p: Rows, q: Rows) -> Rows:
    """Eq. 13: P_ab = 1/m sum_i p_a(x_i) q_b(x'_i) of probabilities; (P + P^T) / 2; divided by its total."""
    m, classes = len(p), len(p[0])
    joint: Rows = []
    for a in range(classes):
        row: Row = []
        for b in range(classes):
            total: Number = 0.0
            for i in range(m):
                total = total + p[i][a] * q[i][b]
            row.append(total / m)
        joint.append(row)
    symmetric = [[(joint[a][b] + joint[b][a]) / 2 for b in range(classes)] for a in range(classes)]
    mass: Number = 0.0
    for row in symmetric:
        for v in row:
            mass = mass + v
    return [[v / mass for v in row] for row in symmetric]


def mutual_information(joint: Rows) -> Number:
    """Eq. 14 in nats: sum_ab P_ab ln(P_ab / (P_a P_b)), with 0 ln 0 = 0."""
    n_rows, n_cols = len(joint), len(joint[0])
    row_sum: Row = []
    for a in range(n_rows):
        total: Number = 0.0
        for b in range(n_cols):
            total = total + joint[a][b]
        row_sum.append(total)
    col_sum: Row = []
    for b in range(n_cols):
        total = 0.0
        for a in range(n_rows):
            total = total + joint[a][b]
        col_sum.append(total)
    information: Number = 0.0
    for a in range(n_rows):
        for b in range(n_cols):
            if value_of(joint[a][b]) > 0.0:
                information = information + joint[a][b] * (_log(joint[a][b]) - _log(row_sum[a]) - _log(col_sum[b]))
    return information


# ---------------------------------------------------------------- training losses


def ce_loss(z: Rows, y: list[int]) -> dict[str, Number]:
    return {"natural": mean([cross_entropy(z[i], y[i]) for i in range(len(y))])}


def standard_at_loss(z_adv: Rows, y: list[int]) -> dict[str, Number]:
    """Table 1, Standard AT: CE(p(x'), y)."""
    return {"adversarial": mean([cross_entropy(z_adv[i], y[i]) for i in range(len(y))])}


def trades_loss(z: Rows, z_adv: Rows, y: list[int], *, beta: float) -> dict[str, Number]:
    """Table 1, TRADES: CE(p(x), y) + beta KL(p(x) || p(x'))."""
    m = len(y)
    return {
        "natural": mean([cross_entropy(z[i], y[i]) for i in range(m)]),
        "kl": beta * mean([kl(z[i], z_adv[i]) for i in range(m)]),
    }


def ib_rar_trades_loss(z: Rows, z_adv: Rows, y: list[int]) -> dict[str, Number]:
    """What IB-RAR's code calls TRADES: CE(p(x'), y) + 0.5 KL(p(x) || p(x'))."""
    divergences = []
    for i in range(len(y)):
        p, q = softmax(z[i]), softmax(z_adv[i])
        divergences.append(sum(p[k] * (_log(p[k]) - _log(q[k])) for k in range(len(p))))
    return {
        "adversarial": mean([-log_softmax(z_adv[i])[y[i]] for i in range(len(y))]),
        "kl": 0.5 * mean(divergences),
    }


def mart_loss(z: Rows, z_adv: Rows, y: list[int], *, beta: float) -> dict[str, Number]:
    """Table 1, MART: BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x))."""
    m = len(y)
    return {
        "adversarial": mean([boosted_cross_entropy(z_adv[i], y[i]) for i in range(m)]),
        "kl": beta * mean([mart_weighted_kl(z[i], z_adv[i], y[i]) for i in range(m)]),
    }


def alp_loss(z: Rows, z_adv: Rows, y: list[int], *, alpha: float) -> dict[str, Number]:
    """Table 1, ALP: CE(p(x'), y) + alpha |f(x') - f(x)|^2, a mean over batch and classes."""
    m, classes = len(y), len(z[0])
    squares = [(z_adv[i][c] - z[i][c]) ** 2 for i in range(m) for c in range(classes)]
    return {
        "adversarial": mean([cross_entropy(z_adv[i], y[i]) for i in range(m)]),
        "logit": alpha * mean(squares),
    }


def mma_simplified_loss(z: Rows, z_adv: Rows, y: list[int]) -> dict[str, Number]:
    """Table 1, MMA: CE(p(x'), y) 1(f(x) = y) + CE(p(x), y) 1(f(x) != y); argmax ties to the lower class."""
    m = len(y)
    right: Number = 0.0
    wrong: Number = 0.0
    for i in range(m):
        predicted = 0
        for k in range(1, len(z[i])):
            if value_of(z[i][k]) > value_of(z[i][predicted]):
                predicted = k
        if predicted == y[i]:
            right = right + cross_entropy(z_adv[i], y[i])
        else:
            wrong = wrong + cross_entropy(z[i], y[i])
    return {"adversarial": right / m, "natural": wrong / m}


def mimae_loss(
    z: Rows,
    z_adv: Rows,
    y: list[int],
    *,
    lambda_mi: float,
    beta: float,
    adversarial_term: str = "bce",
    logit_term: str = "mae",
    mae_reduction: str = "mean",
) -> dict[str, Number]:
    """Eq. 11: BCE(p(x'), y) - lambda MI(p(x), p(x')) + beta |f(x') - f(x)|_1, with its switches."""
    m, classes = len(y), len(z[0])
    per_sample = boosted_cross_entropy if adversarial_term == "bce" else cross_entropy
    adversarial = mean([per_sample(z_adv[i], y[i]) for i in range(m)])
    joint = joint_distribution([softmax(row) for row in z], [softmax(row) for row in z_adv])
    distance: Number = 0.0
    for i in range(m):
        for c in range(classes):
            gap = z_adv[i][c] - z[i][c]
            if logit_term == "mae":
                distance = distance + abs(gap)
            elif logit_term == "mse":
                distance = distance + gap * gap
    distance = distance / m
    if mae_reduction == "mean":
        distance = distance / classes
    return {
        "adversarial": adversarial,
        "mi": -lambda_mi * mutual_information(joint),
        "logit": beta * distance,
    }


def total(terms: dict[str, Number]) -> Number:
    """The loss: the sum of its terms."""
    value: Number = 0.0
    for term in terms.values():
        value = value + term
    return value


def mma_full_loss(
    z: Rows, z_boundary: Rows, y: list[int], within: list[bool], *, clean_weight: float
) -> dict[str, Number]:
    """Ding et al. 2020: (1 - w) [CE(boundary) if right and within, CE(x) if wrong] + w CE(x)."""
    m = len(y)
    margin: Number = 0.0
    for i in range(m):
        right = all(k == y[i] or value_of(z[i][k]) < value_of(z[i][y[i]]) for k in range(len(z[i])))
        if not right:
            margin = margin + cross_entropy(z[i], y[i])
        elif within[i]:
            margin = margin + cross_entropy(z_boundary[i], y[i])
    return {
        "margin": (1.0 - clean_weight) * margin / m,
        "natural": clean_weight * mean([cross_entropy(z[i], y[i]) for i in range(m)]),
    }
