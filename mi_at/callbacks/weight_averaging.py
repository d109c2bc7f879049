"""Weight averaging through Lightning's own callbacks, with buffers that are no averages copied instead."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_avg_fn, update_bn

from mi_at.functional.distributed import world_size
from mi_at.regularizers.base import TrainingRule


class EMA(WeightAveraging):
    """Exponential moving average of weights and batch-norm statistics, updated after every step.

    Validation, the checkpoint's `state_dict` and the final evaluation use the averaged weights; training and its
    attacks use the raw ones.

    Args:
        decay: tau in [0, 1).
        start_epoch: epochs of the paper before averaging starts.
        warmup: in step t of averaging, min(tau, (1 + t) / (10 + t)) in place of tau: a short memory at first, so that
            the first weights do not stay in the average for 1 / (1 - tau) steps.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, decay: float = 0.999, start_epoch: int = 0, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callback.ema.decay={decay}: expected a factor in [0, 1)")
        if start_epoch < 0:
            raise ValueError(f"callback.ema.start_epoch={start_epoch}: expected 0 or more")
        average = functools.partial(warming_average, decay) if warmup else get_ema_avg_fn(decay)
        super().__init__(use_buffers=True, avg_fn=average)
        self.start_epoch = start_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average; before the start it is a copy."""
        if trainer.current_epoch < cast(TrainingRule, pl_module).scaled(self.start_epoch):
            _copy(pl_module, self._average_model)
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        _copy_integers(pl_module, self._average_model)


def warming_average(decay: float, average: Tensor, value: Tensor, step: Tensor | int) -> Tensor:
    """d average + (1 - d) value, where d = min(decay, (1 + t) / (10 + t)).

    Args:
        decay: tau in [0, 1).
        average: [...] so far.
        value: [...] of this step.
        step: t, the values averaged before this one; [] integer, where a tensor.

    Returns:
        [...].

    Example:
        >>> warming_average(0.999, torch.zeros(1), torch.ones(1), 8)  # d = 9 / 18
        tensor([0.5000])
    """
    # A tensor stays on its device: nothing waits for it.
    factor = torch.as_tensor((1 + step) / (10 + step)).clamp_max(decay)
    return factor * average + (1 - factor) * value


class SWA(WeightAveraging):
    """Plain average of the weights at the ends of epochs from `start_epoch` on.

    The average of batch-norm statistics is not the statistics of the averaged network: they are measured anew after
    each update, in one pass over the training images.

    Args:
        start_epoch: finished epochs of the paper after which averaging starts.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, start_epoch: int = 75) -> None:
        if start_epoch < 0:
            raise ValueError(f"callback.swa.start_epoch={start_epoch}: expected 0 or more")
        super().__init__(use_buffers=False)
        self.start_epoch = start_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """At the end of an epoch, from the start on."""
        return epoch_idx is not None and epoch_idx + 1 >= self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Scale the start to this run's number of epochs."""
        super().setup(trainer, pl_module, stage)
        self._start = cast(TrainingRule, pl_module).scaled(self.start_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Until the first update the average is a copy: validation comes before the end of the epoch."""
        if trainer.current_epoch < max(self._start, 1):
            _copy(pl_module, self._average_model)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average, and its batch-norm statistics."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.should_update(epoch_idx=trainer.current_epoch):
            average: Any = self._average_model
            _measure_statistics(average.module.net, trainer)


@torch.no_grad()
def _measure_statistics(net: nn.Module, trainer: Trainer) -> None:
    """Batch norm's running statistics of `net` on the training images, the same on every process."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    update_bn((batch.x for batch in data.train_batches(augment=True)), net)
    if world_size() > 1:
        for statistics in (buffer for module in norms for buffer in module.buffers() if buffer.is_floating_point()):
            dist.all_reduce(statistics)
            statistics.div_(world_size())


@torch.no_grad()
def _copy(source: nn.Module, average: Any) -> None:
    for target, value in zip(_tensors(average.module), _tensors(source), strict=True):
        target.copy_(value)


@torch.no_grad()
def _copy_integers(source: nn.Module, average: Any) -> None:
    """Masks, indices and counters have no average."""
    for target, value in zip(average.module.buffers(), source.buffers(), strict=True):
        if not value.is_floating_point():
            target.copy_(value)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
