"""Random crop with zero padding and horizontal flip for a whole batch at once, on the tensor's own device.

The parameters are drawn on the CPU for the global batch, so they depend neither on the number of processes
nor on the device; the images are then moved by one gather, without Python per image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_at.data.seeding import keyed_generator


def draw_crop_flip(count: int, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Parameters of `crop_flip` for `count` images.

    Args:
        count: images of the global batch.
        pad: pixels of zero padding on each side, >= 0; offsets are uniform in 0..2 pad.
        flip: whether half of the images are mirrored; with False none is.
        generator: a CPU generator.

    Returns:
        [3, count] int64: rows of vertical offsets, horizontal offsets, and 0 or 1 for mirrored.

    Example:
        >>> draw_crop_flip(4, pad=0, flip=False, generator=torch.Generator().manual_seed(0)).tolist()
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (1, count), generator=generator)
    return torch.cat((offsets, mirrored if flip else torch.zeros_like(mirrored)))


def draw_for_batch(
    count: int, *, pad: int, flip: bool, seed: int, epoch: int, batch: int, purpose: str = "augment"
) -> Tensor:
    """The parameters of one global batch: a pure function of (seed, purpose, epoch, batch).

    Args:
        count: images of the global batch.
        pad: as in `draw_crop_flip`.
        flip: as in `draw_crop_flip`.
        seed: the run's seed.
        epoch: from 0.
        batch: place of the batch in the epoch, from 0.
        purpose: a word that keeps other draws with the same numbers apart.

    Returns:
        [3, count] int64 on the CPU.
    """
    return draw_crop_flip(count, pad=pad, flip=flip, generator=keyed_generator(seed, purpose, epoch, batch))


def crop_flip(images: Tensor, parameters: Tensor, *, pad: int) -> Tensor:
    """Pad with zeros, cut a window of the original size per image, then mirror it where asked.

    Args:
        images: [B, C, H, W] of any dtype.
        parameters: [3, B] int64 on the images' device, as `draw_crop_flip` gives them.
        pad: the padding they were drawn for.

    Returns:
        [B, C, H, W], same dtype and device.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> crop_flip(image, torch.tensor([[1], [1], [1]]), pad=1).tolist()  # in place, mirrored
        [[[[2, 1], [4, 3]]]]
        >>> crop_flip(image, torch.tensor([[0], [1], [0]]), pad=1).tolist()  # one row down
        [[[[0, 0], [1, 2]]]]
    """
    if images.ndim != 4 or parameters.shape != (3, len(images)):
        raise ValueError(
            f"images {list(images.shape)} with parameters {list(parameters.shape)}: expected [B, C, H, W] with [3, B]"
        )
    count, channels, height, width = images.shape
    top, left, mirrored = (row[:, None] for row in parameters)
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left + torch.where(mirrored > 0, width - 1 - columns, columns)
    # One flat gather is nearly three times as fast on a CPU as strided windows followed by a flip.
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, height * width)
    padded = F.pad(images, (pad, pad, pad, pad)).view(count, channels, -1)
    return padded.gather(2, pixels.expand(-1, channels, -1)).view_as(images)
