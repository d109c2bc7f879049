"""Width and distance of the clusters of outputs, accumulated: CMI, separation and NCMI (robust NCMI eq. 15-18).

The values are those of `mi_at.functional.information` on all samples at once. Kept are sums per class, K x (2 K + 1)
numbers, so that no output is stored and processes add theirs. Feed clean outputs, or those under any attack: of every
sample, without early stopping, the returned image where an attack gave up (the clean one).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from mi_at.functional.information import LOG_FLOOR, NOT_PROBABILITIES, class_sums, no_probabilities


class _Clusters(Metric):
    """Sums over the samples of each class.

    Args:
        num_classes: K, >= 2.

    Raises:
        ValueError: fewer than 2 classes.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor
    probs: Tensor
    logs: Tensor
    negative_entropy: Tensor

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: expected 2 or more")
        self.num_classes = num_classes
        square = torch.zeros(num_classes, num_classes, dtype=torch.float64)
        self.add_state("counts", square[0].clone(), dist_reduce_fx="sum")
        self.add_state("probs", square.clone(), dist_reduce_fx="sum")
        self.add_state("logs", square.clone(), dist_reduce_fx="sum")
        self.add_state("negative_entropy", square[0, 0].clone(), dist_reduce_fx="sum")

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            probs: [B, K] probabilities, softmax(logits) taken once.
            labels: [B] int64.

        Raises:
            ValueError: rows that are no probabilities, or labels that do not fit.
        """
        probs = probs.detach().double()
        if probs.ndim != 2 or probs.shape[1] != self.num_classes:
            raise ValueError(f"expected [B, {self.num_classes}] probabilities, got {tuple(probs.shape)}")
        if bool(no_probabilities(probs).any()):
            raise ValueError(NOT_PROBABILITIES)
        tiny = torch.finfo(probs.dtype).tiny
        self.counts += class_sums(torch.ones_like(probs[:, 0]), labels, self.num_classes)
        self.probs += class_sums(probs, labels, self.num_classes)
        self.logs += class_sums(probs.clamp_min(LOG_FLOOR).log(), labels, self.num_classes)
        self.negative_entropy += (probs * probs.clamp_min(tiny).log()).sum()

    def _cmi(self) -> Tensor:
        n = self._samples()
        tiny = torch.finfo(self.probs.dtype).tiny
        centroids = self.probs / self.counts.clamp_min(1).unsqueeze(1)
        width = self.negative_entropy - (self.probs * centroids.clamp_min(tiny).log()).sum()
        return (width / n).clamp_min(0)  # rounding leaves -1e-17 where it is 0

    def _separation(self) -> Tensor:
        n = self._samples()
        if bool((self.counts == n).any()):
            raise ValueError("all samples are of one class, so nothing to separate: give samples of 2 classes or more")
        return ((self.probs - self.probs.sum(dim=0)) * self.logs).sum() / n**2

    def _samples(self) -> Tensor:
        n = self.counts.sum()
        if not bool(n):
            raise ValueError("no samples: call update(probs, labels) first")
        return n


class ConditionalMutualInformation(_Clusters):
    """I(X; Y^ | Y), the width of the clusters, in [0, ln K] nats; low is robust.

    Example:
        >>> metric = ConditionalMutualInformation(num_classes=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> round(metric.compute().item(), 4)
        0.6931
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar, float64.

        Raises:
            ValueError: no samples.
        """
        return self._cmi()


class Separation(_Clusters):
    """Gamma, the mean cross-entropy between outputs of different classes, >= 0, in nats; high is robust.

    Example:
        >>> metric = Separation(num_classes=2)
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> round(metric.compute().item(), 4)  # half of the pairs, ln 2 each
        0.3466
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Scalar, float64.

        Raises:
            ValueError: no samples, or samples of one class only.
        """
        return self._separation()


class NormalizedCMI(_Clusters):
    """NCMI = CMI / separation, >= 0; low is robust.

    Example:
        >>> metric = NormalizedCMI(num_classes=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute().item()
        0.0
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar, float64.

        Raises:
            ValueError: no samples, or samples of one class only.
        """
        return self._cmi() / self._separation()
