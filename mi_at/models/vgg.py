"""VGG with batch norm: Simonyan and Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556.

Configurations D (VGG16) and E (VGG19) of the paper's Table 1, with batch norm and other heads.
Five blocks of 3x3 convolutions (with bias), each followed by batch norm and ReLU, a 2x2 max-pool at the end
of each block, then the mean over the pixels that are left. "VGG16" names several networks; these two are

* VGG16, ib_rar's (section 3): hidden layers 512 -> 4096 -> 4096, each linear-BN-ReLU, then the head; no
  dropout.
* VGG19, namid's surrogate: the head sits on the 512 pooled channels, no hidden linear layer.

Image sizes: pooling rounds up (`ceil_mode`), so that five poolings leave at least one pixel at any size: 28
px go 14, 7, 4, 2, 1, where rounding down would leave nothing; 32 and 64 px are the same either way. Weight
init: PyTorch's defaults, as ib_rar's released code trains (`init: kaiming` for He-normal convolutions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mi_at.models.base import Classifier, init_weights, scale_width

BLOCK_CHANNELS = (64, 128, 256, 512, 512)


class VGG(Classifier):
    """A VGG with `depths` convolutions in its five blocks and `hidden` linear layers; any image size.

    Taps: `block1` ... `block5` after the max-pool, `last_conv` = the last convolution after BN and ReLU,
    before the gate and the last max-pool, `fc1`, `fc2` (VGG16) after BN and ReLU, `features` = what the
    head reads.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels and the size of the hidden linear layers.
        init: `pytorch` (PyTorch's defaults, as released) or `kaiming` (fan_out, batch norm 1 / 0, biases 0).
        mean: input normalisation, None for none.
        std: see `mean`.
    """

    depths: ClassVar[tuple[int, ...]]
    hidden: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        init: str = "pytorch",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        blocks: list[nn.Module] = []
        current = in_channels
        for full, depth in zip(BLOCK_CHANNELS, self.depths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(depth):
                channels = scale_width(full, width)
                layers += [
                    nn.Conv2d(current, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                current = channels
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        last_conv_channels = current
        hidden: list[nn.Module] = []
        for full in self.hidden:
            units = scale_width(full, width)
            hidden.append(nn.Sequential(nn.Linear(current, units), nn.BatchNorm1d(units), nn.ReLU(inplace=True)))
            current = units
        self.fcs = nn.ModuleList(hidden)
        conv_names = [f"block{i}" for i in range(1, len(blocks) + 1)]
        fc_names = [f"fc{i}" for i in range(1, len(hidden) + 1)]
        self.finish(
            taps=(*conv_names[:-1], "last_conv", conv_names[-1], *fc_names, "features"),
            aliases=("last_conv", "features"),  # features is fc2, or block5 without its pixels
            feature_dim=current,
            last_conv_channels=last_conv_channels,
        )
        init_weights(self, init)

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W] -> features [B, D]."""
        h = x
        for i, block in enumerate(self.blocks, start=1):
            h = block(h)
            if i == len(self.blocks):
                if taps is not None:
                    taps["last_conv"] = h
                h = self.last_conv_gate(h)
            h = self.pool(h)
            if taps is not None:
                taps[f"block{i}"] = h
        h = h.mean(dim=(2, 3))
        for i, fc in enumerate(self.fcs, start=1):
            h = fc(h)
            if taps is not None:
                taps[f"fc{i}"] = h
        if taps is not None:
            taps["features"] = h
        return h


class VGG16(VGG):
    """VGG-16 with two hidden linear layers of 4096: 33,663,050 parameters at 3 channels and 10 classes.

    Its hidden layers hold batch norm, so a batch in training mode needs at least 2 images.

    >>> import torch
    >>> net = VGG16(num_classes=10, in_channels=1, image_size=28, width=0.0625).eval()
    >>> logits, taps = net.forward_taps(torch.rand(2, 1, 28, 28), ["block5", "fc1", "fc2"])
    >>> [tuple(t.shape) for t in taps.values()]
    [(2, 32, 1, 1), (2, 256), (2, 256)]
    """

    depths = (2, 2, 3, 3, 3)
    hidden = (4096, 4096)


class VGG19(VGG):
    """VGG-19 with the head on the pooled channels: 20,040,522 parameters at 3 channels and 10 classes."""

    depths = (2, 2, 4, 4, 4)
    hidden = ()
