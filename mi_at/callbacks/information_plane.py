"""Where a layer lies on the information plane while a network is trained (IB-RAR, Figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from mi_at.attacks.contexts import attacking
from mi_at.callbacks.lines import add_line
from mi_at.data.batch import Batch
from mi_at.functional.distributed import gather
from mi_at.functional.kernels import normalized_hsic, one_hot
from mi_at.regularizers.base import TrainingRule

FILE = "information_plane.jsonl"


class InformationPlane(Callback):
    """Write HSIC(X, T) and HSIC(Y, T) of a layer T on the batch that was just trained on.

    Normalised HSIC with the kernels of IB-RAR stands for mutual information: Gaussian on images and layer, linear on
    labels. X are the clean images, T comes from the updated network in eval mode. Training is not disturbed: same bits
    with it as without. Lines go to information_plane.jsonl in the run folder: {"epoch": finished epochs, "step":
    finished steps, "xt": ..., "yt": ...}; a resumed run replaces those of what it does again.

    Args:
        tap: name of the layer, a tap of the network.
        every_n_steps: finished steps between recordings (50 in the paper).
        sigma: width of the Gaussian kernels per square root of a dimension.

    Raises:
        ValueError: every_n_steps < 1; when training starts, a network without that tap.
    """

    def __init__(self, *, tap: str = "features", every_n_steps: int = 50, sigma: float = 5.0) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callback.information_plane.every_n_steps={every_n_steps}: expected 1 or more")
        self.tap, self.every_n_steps, self.sigma = tap, every_n_steps, sigma

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the tap."""
        names = getattr(cast(TrainingRule, pl_module).net, "tap_names", ())
        if self.tap not in names:
            known = ", ".join(names) or "(the network has no taps)"
            raise ValueError(f"callback.information_plane.tap={self.tap}: expected one of {known}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure, every so many steps."""
        if trainer.global_step % self.every_n_steps:
            return
        net: Any = cast(TrainingRule, pl_module).net
        with attacking(net), torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            layer = net.forward_taps(batch.x, (self.tap,))[1][self.tap]
            x, t, y = (gather(own, batch.global_size or None) for own in (batch.x, layer, batch.y))
            if len(y) < 2:  # one image alone depends on nothing
                return
            x, t = x.flatten(1), t.float().flatten(1)
            xt = normalized_hsic(x, t, sigma=self.sigma)
            yt = normalized_hsic(t, one_hot(y, net.num_classes), sigma=self.sigma, kernel_z="linear")
        if trainer.is_global_zero:
            line = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            add_line(Path(trainer.default_root_dir) / FILE, {**line, "xt": float(xt), "yt": float(yt)})
