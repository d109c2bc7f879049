"""A picture of what the network is judged on: clean images, adversarial ones, and the difference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from mi_at.data.batch import Batch

PREFERRED_VIEWS = ("cross_entropy", "adversarial")  # validation's, training's
CELL = 64  # pixels an image is enlarged to, at least
GAP = 2


class SampleGrid(Callback):
    """Write samples.png into the run folder: a column per image; clean, adversarial, amplified difference.

    The images are the first of the first validation batch, as the selection attack left them; without a
    validation split the first of the epoch's first training batch. A batch without adversarial views
    (defense=ce without validation) gives no picture. Loggers that take images (W&B, TensorBoard) get it too,
    as "samples".

    Args:
        folder: the run folder.
        every_n_epochs: finished epochs between pictures; the last epoch has one in any case.
        n: images.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, folder: str | Path, *, every_n_epochs: int = 1, n: int = 8) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("n", n)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.path, self.every_n_epochs, self.n = Path(folder) / "samples.png", every_n_epochs, n
        self._pair: tuple[Tensor, Tensor] | None = None
        self._validates = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the first images of the epoch, as long as there was no validation."""
        if batch_idx == 0 and not self._validates and self._due(trainer):
            self._keep(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the training images."""
        self._write(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images of the split."""
        self._validates = True
        if batch_idx == dataloader_idx == 0 and self._due(trainer):
            self._keep(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation images."""
        self._write(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return False
        finished = trainer.current_epoch + 1
        return finished % self.every_n_epochs == 0 or finished == trainer.max_epochs

    def _keep(self, batch: Batch) -> None:
        view = next((name for name in (*PREFERRED_VIEWS, *batch.views) if name in batch.views), None)
        if view is not None:
            # Copies: slices of the views would keep a whole batch alive until the epoch's end.
            self._pair = batch.x[: self.n].detach().clone(), batch.views[view][: self.n].detach().clone()

    def _write(self, trainer: Trainer) -> None:
        if self._pair is None:
            return
        picture = draw(*self._pair)
        self._pair = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        picture.save(part, format="png")
        part.replace(self.path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(picture)
                logger.experiment.add_image("samples", pixels, trainer.global_step, dataformats="HWC")


def draw(clean: Tensor, adversarial: Tensor) -> Image.Image:
    """The grid of images: rows clean, adversarial, and their difference.

    The difference is stretched per image: its largest component becomes black or white, none is mid-grey.

    Args:
        clean: [n, C, H, W] in [0, 1].
        adversarial: the same images under attack.

    Returns:
        An RGB picture; small images are enlarged by a whole factor, each pixel a square.

    Example:
        >>> x = torch.zeros(3, 1, 8, 8)
        >>> draw(x, x).size
        (200, 200)
    """
    clean, adversarial = clean.float().cpu(), adversarial.float().cpu()
    difference = adversarial - clean
    largest = difference.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    rows = torch.stack([clean, adversarial, 0.5 + 0.5 * difference / largest])
    if rows.shape[2] != 3:  # what is neither grey nor RGB is shown as its mean
        rows = rows.mean(dim=2, keepdim=True).expand(-1, -1, 3, -1, -1)
    height, width = rows.shape[-2:]
    factor = max(1, -(-CELL // max(height, width)))
    rows = rows.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    height, width = height * factor + GAP, width * factor + GAP
    canvas = torch.ones(3, 3 * height + GAP, rows.shape[1] * width + GAP)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * height + GAP, column * width + GAP
            canvas[:, top : top + height - GAP, left : left + width - GAP] = image
    pixels = (canvas.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
