"""ncmi_relaxed: ncmi with centroids once an epoch, for data whose batches hold few samples of a class.

Paper: Enhancing adversarial robustness through robust information quantities (robust NCMI), eq. 40, Algorithm 2.
Term: that of ncmi, 1/|B| L_B at x' = G(x). The first epoch (or `warmup_epochs`) trains on the base loss alone. At its
end the centroids start as the mean clean output of each class; then, at once and at the end of every further epoch, G
is found over the whole training set in batches of 4|B| against the present centroids; each becomes the mean of f(x').

Differences from the paper: those of ncmi; the pass sees the images in a random order without crop and flip (the paper
does not say). The authors' code does not contain Algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.functional.distributed import gather
from mi_at.functional.information import class_sums
from mi_at.regularizers.base import Context, Views
from mi_at.regularizers.ncmi import NCMI, outputs


class NCMIRelaxed(NCMI):
    """Algorithm 2.

    Args:
        alpha: weight of the concentration (CMI); Tables 3 and 4 give it by data set and base loss.
        beta: weight of the separation. With alpha = beta = 0 there is no second attack and no term.
        warmup_epochs: epochs of the paper on the base loss alone, >= 1; 5 on Tiny-ImageNet (section 5.1).
        batch_factor: batches of the pass, in training batches, >= 1 (4 in Algorithm 2, line 19).
        separation_grad: "detached" | "both", of the loss.
        separation_norm: "batch_sq" (eq. 40) | "pairs".
        attack_separation_grad: "both" (eq. 40) | "detached", of G.
        attack_mode: "eval" | "train_no_track", of G, where attack.mode is null.

    Raises:
        ValueError: a value out of range or an unknown option.
    """

    name = "ncmi_relaxed"

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 5.0,
        warmup_epochs: int = 1,
        batch_factor: int = 4,
        separation_grad: str = "detached",
        separation_norm: str = "batch_sq",
        attack_separation_grad: str = "both",
        attack_mode: str = "eval",
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            separation_grad=separation_grad,
            separation_norm=separation_norm,
            attack_separation_grad=attack_separation_grad,
            attack_mode=attack_mode,
        )
        for key, value in (("warmup_epochs", warmup_epochs), ("batch_factor", batch_factor)):
            if value < 1:
                raise ValueError(f"regularizer.{self.name}.{key}={value}: expected 1 or more")
        self.warmup_epochs, self.batch_factor = warmup_epochs, batch_factor
        self.batch_size, self.started = 0, False

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        """G, once there are centroids (Algorithm 2, lines 5-7)."""
        return super().adversaries(net, batch) if self.started else {}

    def terms(self, views: Views) -> dict[str, Tensor]:
        """1/|B| L_B: "con" and "sep", zero until there are centroids (Algorithm 2, lines 8 and 10)."""
        if self.started:
            return super().terms(views)
        weights = {"con": self.alpha, "sep": self.beta}
        return {name: torch.zeros((), device=views.y.device) for name, weight in weights.items() if weight}

    def on_fit_start(self, ctx: Context) -> None:
        """Nothing: the centroids start after the first epoch."""

    def after_step(self, ctx: Context, batch: Batch) -> None:
        """Remember |B|; the last batch of an epoch may be smaller."""
        self.batch_size = max(self.batch_size, batch.global_size)

    def on_epoch_end(self, ctx: Context) -> None:
        """Start the centroids once, then update them over the whole training set (Algorithm 2, lines 14-28)."""
        if not self.on or ctx.epoch < ctx.scaled(self.warmup_epochs):
            return
        if self.alpha:
            if not self.started:
                self._start(ctx)
            self._update(ctx)
        self.started = True

    def _update(self, ctx: Context) -> None:
        sums = torch.zeros_like(self.centroids)
        for batch in ctx.train_batches(self.batch_factor * self.batch_size, False):
            batch = batch.to(sums.device)
            y = gather(batch.y, batch.global_size)
            inner = Inner(self._objective(ctx.net, y, batch.global_size), init="uniform", mode=self.attack_mode)
            x_adv = ctx.attack(inner, batch)
            sums += class_sums(outputs(ctx.net, batch, x_adv), y, len(sums))
        self.centroids.copy_(sums / sums.sum(dim=1, keepdim=True))

    def get_extra_state(self) -> dict[str, Any]:
        """Plain values of the checkpoint: read on the host at every step, so no tensors."""
        return {"batch_size": self.batch_size, "started": self.started}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_extra_state` gave."""
        self.batch_size, self.started = state["batch_size"], state["started"]
