"""Natural and adversarial mutual information as estimators give them per sample, accumulated (NAMID eq. 5-9)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MutualInformationEstimates(Metric):
    """Means of the natural and of the adversarial estimate over the (selected) samples, and how many they were.

    Example:
        >>> metric = MutualInformationEstimates()
        >>> metric.update(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'natural': 3.0, 'adversarial': 0.5, 'samples': 2.0}
    """

    is_differentiable = False
    full_state_update = False
    natural: Tensor
    adversarial: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("natural", "adversarial", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, natural: Tensor, adversarial: Tensor, selected: Tensor | None = None) -> None:
        """Add samples.

        Args:
            natural: [B] estimates of the natural mutual information, nats.
            adversarial: [B] estimates of the adversarial one.
            selected: [B] bool, which samples count; None: all.

        Raises:
            ValueError: not as many values of each.
        """
        shapes = [tuple(t.shape) for t in (natural, adversarial, selected) if t is not None]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"expected one value per sample, [B] each, got {', '.join(map(str, shapes))}")
        weights = torch.ones_like(natural, dtype=torch.float64) if selected is None else selected.double()
        self.natural += torch.where(weights > 0, natural.detach().double(), 0.0).sum()
        self.adversarial += torch.where(weights > 0, adversarial.detach().double(), 0.0).sum()
        self.samples += weights.sum()

    def compute(self) -> dict[str, Tensor]:
        """{"natural", "adversarial"}: means in nats, not a number without samples; "samples": how many. float64."""
        return {
            "natural": self.natural / self.samples,
            "adversarial": self.adversarial / self.samples,
            "samples": self.samples,
        }
