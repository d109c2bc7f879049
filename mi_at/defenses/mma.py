"""mma: max-margin adversarial training.

Paper: Ding et al., MMA training: direct input space margin maximization, ICLR 2020, sections 2-3.
`variant=full` searches each sample's margin and minimises CE at the boundary found, while the margin is below
`max_margin`: loss = 2/3 [CE(boundary) on right samples + CE(x) on wrong ones] + 1/3 CE(x).
`variant=simplified` is Table 1 of MIMAE-AT and SharedInfo: CE(p(x'), y) on samples the network gets right clean,
CE(p(x), y) on the others, x' at the fixed eps of the attack.

Differences from the authors' code (full): the search starts at each sample's last margin, as there, but from a
uniform start within it; the bisection runs in eval mode as the search does (there in train mode).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, InnerMaximisation, Objective, Start
from mi_at.attacks.pgd import pgd
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense, require_one_of
from mi_at.functional.distributed import gather
from mi_at.functional.divergences import cross_entropy
from mi_at.functional.geometry import norm, parse_eps, per_sample
from mi_at.functional.margins import soft_logit_margin
from mi_at.regularizers.base import Views


def mma_simplified_loss(logits: Tensor, logits_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Mean of CE(p(x'), y) where the clean prediction is right and CE(p(x), y) where it is wrong.

    Args:
        logits: [B, K] of the clean images.
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.

    Returns:
        {"adversarial", "ce", "loss"}: scalars, nats; both terms are divided by B.

    Example:
        >>> z, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> terms = mma_simplified_loss(z, torch.zeros(2, 2), y)
        >>> round(terms["adversarial"].item(), 4), round(terms["ce"].item(), 4)  # ln 2 / 2 and 2.1269 / 2
        (0.3466, 1.0635)
    """
    right = (logits.argmax(dim=1) == y).to(logits.dtype)
    adversarial = (right * cross_entropy(logits_adv, y, reduction="none")).mean()
    clean = ((1 - right) * cross_entropy(logits, y, reduction="none")).mean()
    return {"adversarial": adversarial, "ce": clean, "loss": adversarial + clean}


def mma_full_loss(
    logits: Tensor, logits_boundary: Tensor, y: Tensor, within: Tensor, *, clean_weight: float
) -> dict[str, Tensor]:
    """(1 - w) [sum of CE(boundary) over right samples with margin below the maximum + CE(x) over wrong] / B + w CE(x).

    Args:
        logits: [B, K] of the clean images.
        logits_boundary: [B, K] at the boundary points found.
        y: [B] int64.
        within: [B] bool, the margin found is below the maximum.
        clean_weight: w in [0, 1]; 1/3 in the authors' code.

    Returns:
        {"margin", "ce", "loss"}: scalars, nats, weights applied.

    Example:
        >>> z, y = torch.zeros(1, 2), torch.tensor([0])
        >>> terms = mma_full_loss(z, z, y, torch.tensor([True]), clean_weight=0.0)
        >>> round(terms["loss"].item(), 4)
        0.6931
    """
    right = logits.argmax(dim=1) == y
    ce = cross_entropy(logits, y, reduction="none")
    at_boundary = cross_entropy(logits_boundary, y, reduction="none") * (right & within)
    margin = (1 - clean_weight) * (at_boundary + ce * ~right).mean()
    clean = clean_weight * ce.mean()
    return {"margin": margin, "ce": clean, "loss": margin + clean}


class MMA(Defense):
    """Ding et al. 2020.

    Args:
        variant: "simplified" | "full".
        max_margin: d_max of the hinge, in pixels; 12/255 on CIFAR and 0.45 on MNIST in SharedInfo's Table 3.
        min_margin: smallest radius of a search; 0.005 in the authors' code.
        bisection_steps: 10 in the authors' code.
        clean_weight: share of CE(x); 1/3 in the authors' code.

    Raises:
        ValueError: a number out of range or an unknown variant.
    """

    def __init__(
        self,
        *,
        variant: str = "simplified",
        max_margin: float | str = "12/255",
        min_margin: float = 0.005,
        bisection_steps: int = 10,
        clean_weight: float = 1 / 3,
    ) -> None:
        super().__init__()
        require_one_of(("simplified", "full"), variant=variant)
        self.variant, self.max_margin, self.min_margin = variant, parse_eps(max_margin), min_margin
        self.bisection_steps, self.clean_weight = bisection_steps, clean_weight
        if not 0 < min_margin < self.max_margin:
            raise ValueError(f"defense.max_margin={max_margin}: expected more than defense.min_margin={min_margin} > 0")
        if bisection_steps < 1:
            raise ValueError(f"defense.bisection_steps={bisection_steps}: expected 1 or more")
        if not 0 <= clean_weight <= 1:
            raise ValueError(f"defense.clean_weight={clean_weight}: expected a share in [0, 1]")
        self.margins = torch.empty(0)  # last margin found of each training sample, by its index; on the device
        self._samples_known = False
        self._norm = "linf"
        self._crossed = torch.empty(0)

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy at fixed eps, or the search for each sample's margin."""
        if self.variant == "simplified":
            return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="gaussian")}

        def slm(x: Tensor) -> Tensor:
            return soft_logit_margin(self.net(x).float(), batch.y)

        def search(x: Tensor, budget: InnerMaximisation, start: Start) -> Tensor:
            return self._search(slm, x, batch.index, budget, start)

        return {"adversarial": Inner(slm, generate=search)}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """The chosen variant on the global batch."""
        logits, logits_adv = views.logits("clean"), views.logits("adversarial")
        if self.variant == "simplified":
            return mma_simplified_loss(logits, logits_adv, views.y)
        distance = norm(views.images("adversarial") - views.images("clean"), self._norm)
        # Where the search found no boundary, the point's distance is none of it: [0, 1] may have cut it short.
        margins = gather(torch.where(self._crossed, distance, self.largest), len(views.y))
        self._remember(gather(views.batch.index, len(views.y)), margins.detach())
        within = margins < self.max_margin
        return mma_full_loss(logits, logits_adv, views.y, within, clean_weight=self.clean_weight)

    def take_as_searched(self, batch: Batch) -> None:
        """The images of an attack on the loss count as boundary points, at the distance they have."""
        self._crossed = torch.ones(len(batch), dtype=torch.bool, device=batch.x.device)
        self._norm = self.config.get("attack", {}).get("norm", self._norm)

    @property
    def largest(self) -> float:
        """How far a search goes."""
        return 1.05 * self.max_margin

    def on_train_start(self) -> None:
        """Room for all training samples at once, where their loader says how many there are."""
        super().on_train_start()
        store = getattr(self.trainer.train_dataloader, "store", None)
        if store is not None:
            self.expect(len(store))

    def expect(self, samples: int) -> None:
        """Announce that indices are below `samples`: then no step has to wait for the device to look at them."""
        self._grow(samples)
        self._samples_known = True

    def _search(self, slm: Objective, x: Tensor, index: Tensor, budget: InnerMaximisation, start: Start) -> Tensor:
        """The point where the soft logit margin changes sign on the way to an adversarial example (AN-PGD)."""
        self._norm = budget.norm
        self._make_room(index)
        self.margins = self.margins.to(x.device)
        radius = self.margins[index].to(x).clamp(self.min_margin, self.largest)
        step_size = 2.5 * radius / max(budget.steps, 1)
        if budget.norm == "linf":  # where [0, 1] ends, so does every step
            radius, step_size = radius.clamp_max(1.0), step_size.clamp_max(1.0)
        delta = start(radius)
        x_adv = pgd(slm, x, eps=radius, step_size=step_size, steps=budget.steps, norm=budget.norm, init=delta)
        with torch.no_grad():
            right, crossed = slm(x) < 0, slm(x_adv) > 0
            direction = x_adv - x
            length = norm(direction, budget.norm).clamp_min(1e-12)
            low, high = torch.zeros_like(length), torch.where(crossed, torch.ones_like(length), self.largest / length)
            for _ in range(self.bisection_steps):
                middle = (low + high) / 2
                beyond = slm((x + per_sample(middle, x) * direction).clamp(0, 1)) > 0
                low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
                crossed = crossed | beyond
            boundary = (x + per_sample(high, x) * direction).clamp(0, 1)
            self._crossed = crossed | ~right  # a wrong sample's margin is 0, where it is
            return torch.where(right.view(-1, *(1,) * (x.ndim - 1)), boundary, x)

    def _make_room(self, index: Tensor) -> None:
        if not self._samples_known:
            self._grow(int(index.max()) + 1)

    def _grow(self, size: int) -> None:
        """Room for `size` samples; new ones start at the smallest radius."""
        if len(self.margins) < size:
            more = self.margins.new_full((size - len(self.margins),), self.min_margin)
            self.margins = torch.cat([self.margins, more])

    def _remember(self, index: Tensor, margins: Tensor) -> None:
        self._make_room(index)
        self.margins[index] = margins.float()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The margins travel with the rest of the state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["mma_margins"] = self.margins.to("cpu", copy=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the margins back."""
        super().on_load_checkpoint(checkpoint)
        self.margins = checkpoint["mma_margins"]
