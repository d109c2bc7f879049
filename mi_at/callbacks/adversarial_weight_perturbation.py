"""Adversarial weight perturbation: train at weights moved uphill within a relative ball, on any rule.

Paper: Wu, Xia, Wang, Adversarial weight perturbation helps robust generalization, NeurIPS 2020, eq. 8-12.
v = gamma |w| g / |g| per tensor with more than one dimension, g the gradient of the defense's own loss on the views.

Differences from the authors' code: the direction is the gradient itself rather than the step of a proxy network's
SGD (the same up to its learning rate, which the normalisation cancels).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mi_at.attacks.contexts import untracked_statistics
from mi_at.data.batch import Batch
from mi_at.functional.distributed import world_size
from mi_at.regularizers.base import TrainingRule, Views


class AdversarialWeightPerturbation(Callback):
    """Perturb the weights before the training step and take it back right after the optimiser step.

    Place it after `AdversarialExamples`: it reads the views.

    Args:
        gamma: relative size; 0.01 on adversarial training, 0.005 on TRADES.
        warmup_epochs: epochs of the paper without perturbation.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, gamma: float = 0.005, warmup_epochs: int = 10) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"callback.awp.gamma={gamma}: expected a share in [0, 1)")
        if warmup_epochs < 0:
            raise ValueError(f"callback.awp.warmup_epochs={warmup_epochs}: expected 0 or more")
        self.gamma, self.warmup_epochs = gamma, warmup_epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Move the weights uphill; the defense undoes it after its optimiser step."""
        rule = cast(TrainingRule, pl_module)
        if trainer.current_epoch < rule.scaled(self.warmup_epochs) or not self.gamma:
            return
        weights = [w for w in rule.net.parameters() if w.requires_grad and w.ndim > 1]
        with untracked_statistics(rule.net), trainer.precision_plugin.forward_context():
            loss = rule.all_terms(Views(rule.net, batch, rule.needed_taps))["loss"]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        moved = [(w, self._perturbation(w, g)) for w, g in zip(weights, gradients, strict=True) if g is not None]
        with torch.no_grad():
            for weight, step in moved:
                weight.add_(step)
        rule.undo_before_hooks.append(lambda: _take_back(moved))

    def _perturbation(self, weight: Tensor, gradient: Tensor) -> Tensor:
        if world_size() > 1:
            dist.all_reduce(gradient)  # each process holds its shard's part of the global gradient
        weight = weight.detach()
        return self.gamma * weight.norm() * gradient / (gradient.norm() + 1e-20)


@torch.no_grad()
def _take_back(moved: list[tuple[torch.nn.Parameter, Tensor]]) -> None:
    """Subtract the perturbation; what the optimiser added stays."""
    for weight, step in moved:
        weight.sub_(step)
