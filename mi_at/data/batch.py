"""The batch that every part of mi_at hands on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """One process's share of a global batch.

    Attributes:
        x: [b, C, H, W] float32 in [0, 1], the clean images.
        y: [b] int64 in [0, K), the labels.
        index: [b] int64, the images' places in the official training (or test) split; extra images follow it.
        views: other versions of the same images by name ("adversarial", "cluster"), each [b, C, H, W].
        global_size: B, the images of the global batch over all processes (b where left at 0).
        offset: where this share begins in the global batch, in [0, B - b].
        epoch: the epoch this batch belongs to, from 0.
        batch_idx: its place in the epoch, from 0. With `epoch` it is the key of the noise drawn for it.

    Raises:
        ValueError: the labels or indices do not match the images, or the share does not lie in the global
            batch.

    Example:
        >>> batch = Batch(x=torch.zeros(2, 1, 8, 8), y=torch.tensor([3, 1]), index=torch.tensor([7, 4]))
        >>> len(batch), batch.global_size, batch.offset
        (2, 2, 0)
    """

    x: Tensor
    y: Tensor
    index: Tensor
    views: dict[str, Tensor] = field(default_factory=dict)
    global_size: int = 0
    offset: int = 0
    epoch: int = 0
    batch_idx: int = 0

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.index):
            raise ValueError(f"{len(self.x)} images, {len(self.y)} labels, {len(self.index)} indices: expected as many")
        self.global_size = self.global_size or len(self.x)
        if not 0 <= self.offset <= self.global_size - len(self.x):
            raise ValueError(f"offset={self.offset}: no room there for {len(self.x)} images of {self.global_size}")

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device, views included; itself where it is there already.

        Args:
            device: where to.
            non_blocking: do not wait for the copy (from pinned memory).

        Returns:
            A batch; `self`, unchanged, if nothing had to be moved.
        """
        tensors = [self.x, self.y, self.index, *self.views.values()]
        x, y, index, *views = (t.to(device, non_blocking=non_blocking) for t in tensors)
        if all(new is old for new, old in zip((x, y, index, *views), tensors, strict=True)):
            return self
        moved = dict(zip(self.views, views, strict=True))
        return dataclasses.replace(self, x=x, y=y, index=index, views=moved)
