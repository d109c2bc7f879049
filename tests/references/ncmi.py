"""Literal transcriptions of robust NCMI: eq. 15-18, 40 and 48, Algorithms 1 and 2. Loops over samples and classes.

Written from the paper, not from ``mi_at``; rows as in ``losses``. ``batches`` are lists of (x, y, view) tensors, where
the network's outputs are asked for by a function; what is drawn or attacked is handed in, so that only the algorithm's
own bookkeeping is transcribed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.references.losses import Number, Row, Rows, _log, value_of

CLAMP = 1e-8


def log_clamped(v: Number) -> Number:
    return _log(v) if value_of(v) > CLAMP else _log(CLAMP)


def cross_entropy(p: Row, q: Row) -> Number:
    """Eq. 2, the logarithm clamped."""
    return sum(-p[i] * log_clamped(q[i]) for i in range(len(p)))


def divergence(p: Row, q: Row) -> Number:
    """Eq. 3, the logarithm of q clamped."""
    return sum(p[i] * (_log(p[i]) - log_clamped(q[i])) for i in range(len(p)) if value_of(p[i]) > 0)


def centroid(rows: Rows, labels: list[int], label: int) -> Row:
    """Eq. 15."""
    members = [row for row, y in zip(rows, labels, strict=True) if y == label]
    return [sum(row[i] for row in members) / len(members) for i in range(len(rows[0]))]


def cmi(rows: Rows, labels: list[int]) -> Number:
    """Eq. 17, not clamped: a centroid is zero only where its members are."""
    total: Number = 0.0
    for row, y in zip(rows, labels, strict=True):
        s = centroid(rows, labels, y)
        total = total + sum(row[i] * (_log(row[i]) - _log(s[i])) for i in range(len(row)) if value_of(row[i]) > 0)
    return total / len(rows)


def separation(rows: Rows, labels: list[int], *, pairs: bool = False, logs: Rows | None = None) -> Number:
    """Eq. 18; `logs` stands for the rows inside the logarithm, where they are held fixed."""
    total, count = 0.0, 0
    for j, row in enumerate(rows):
        for k, other in enumerate(logs or rows):
            if labels[j] != labels[k]:
                total = total + cross_entropy(row, other)
                count += 1
    return total / (count if pairs else len(rows) ** 2)


def batch_loss(
    rows: Rows, labels: list[int], centroids: Rows, *, alpha: float, beta: float, logs: Rows | None = None
) -> Number:
    """Eq. 40, times 1/|B| as in eq. 39."""
    n = len(rows)
    total: Number = 0.0
    for j, row in enumerate(rows):
        total = total + alpha * divergence(row, centroids[labels[j]])
        for k, other in enumerate(logs or rows):
            if labels[j] != labels[k]:
                total = total - beta / n * cross_entropy(row, other)
    return total / n


def channel(rows: Rows, labels: list[int]) -> Rows:
    """Eq. 48: q(x_j | i, y_j) over P(x_j | y_j), that is f(x'_j)[i] / P(i | y_j); [n][C]."""
    return [
        [row[i] / centroid(rows, labels, y)[i] for i in range(len(row))] for row, y in zip(rows, labels, strict=True)
    ]


Outputs = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_rows(rows: list[Tensor]) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total / len(rows)


def class_centroids(outputs: Outputs, x: Tensor, y: Tensor, classes: int) -> list[Tensor]:
    """Algorithm 1, lines 1-3; Algorithm 2, line 15."""
    return [mean_rows([outputs(x[j : j + 1])[0] for j in range(len(x)) if int(y[j]) == i]) for i in range(classes)]


def algorithm_1(
    net: nn.Module,
    outputs: Outputs,
    data: tuple[Tensor, Tensor],
    epochs: list[list[tuple[Tensor, Tensor]]],
    classes: int,
    *,
    adversary: Callable[[Tensor, Tensor, list[Tensor], int, int], tuple[Tensor, Tensor]],
    update: Callable[[Tensor, Tensor, Tensor, list[Tensor]], None],
    tau: float,
) -> list[list[Tensor]]:
    """Centroids after each step, the start first.

    Args:
        net: moved by `update` in place.
        outputs: probabilities of images by the network as it is, in eval mode.
        data: the training set.
        epochs: mini-batches (x, y) of each epoch.
        classes: C.
        adversary: (x, y, Q', epoch, batch) -> (G1(x), G(x)), lines 7-8.
        update: one step on the loss of line 10, given G1(x), G(x), y, Q'.
        tau: tau_Q.
    """
    Q = class_centroids(outputs, *data, classes)
    history = [list(Q)]
    for e, batches in enumerate(epochs):
        for b, (x, y) in enumerate(batches):
            x_hat, x_prime = adversary(x, y, Q, e, b)
            update(x_hat, x_prime, y, Q)
            for i in range(classes):
                members = [x_prime[j : j + 1] for j in range(len(x)) if int(y[j]) == i]
                if len(members) == 0:
                    continue
                Q[i] = tau * Q[i] + (1 - tau) * mean_rows([outputs(one)[0] for one in members])
            history.append(list(Q))
    return history


def algorithm_2(
    net: nn.Module,
    outputs: Outputs,
    data: tuple[Tensor, Tensor],
    epochs: list[list[tuple[Tensor, Tensor]]],
    large: list[tuple[Tensor, Tensor]],
    classes: int,
    *,
    adversary: Callable[[Tensor, Tensor, Any, int, int], tuple[Tensor, Any]],
    update: Callable[[Tensor, Any, Tensor, Any], None],
    maximise: Callable[[Tensor, Tensor, list[Tensor], int], Tensor],
) -> list[list[Tensor]]:
    """Centroids after each epoch; arguments as in `algorithm_1`.

    Args:
        net: moved by `update` in place.
        outputs: as above.
        data: the training set.
        epochs: mini-batches of each epoch.
        large: mini-batches of 4|B| of the training set, lines 19-21.
        classes: C.
        adversary: with Q' = None in the first epoch it gives (G1(x), None).
        update: without G(x) a step on the base loss, line 10.
        maximise: (x, y, Q', epoch) -> G(x) of a large batch, line 20.
    """
    Q: list[Tensor] | None = None
    history = []
    for number, batches in enumerate(epochs):
        e = number + 1
        for b, (x, y) in enumerate(batches):
            if e > 1:
                x_hat, x_prime = adversary(x, y, Q, number, b)
                update(x_hat, x_prime, y, Q)
            else:
                x_hat, _ = adversary(x, y, None, number, b)
                update(x_hat, None, y, None)
        if e == 1:
            Q = class_centroids(outputs, *data, classes)
        assert Q is not None
        dummy = [torch.zeros(classes, dtype=Q[0].dtype) for _ in range(classes)]
        for x, y in large:
            x_prime = maximise(x, y, Q, number)
            for j in range(len(x)):
                dummy[int(y[j])] = dummy[int(y[j])] + outputs(x_prime[j : j + 1])[0]
        Q = [row / row.sum() for row in dummy]
        history.append(list(Q))
    return history
