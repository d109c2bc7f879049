"""Wide ResNet: Zagoruyko and Komodakis, BMVC 2016, https://arxiv.org/abs/1605.07146.

WRN-depth-k has three groups of (depth - 4) / 6 pre-activation blocks with 16k, 32k, 64k channels behind a
stem of 16, the last two groups starting with stride 2, then BN-act and the mean over pixels. Where the
shape changes the shortcut is a 1x1 convolution of the block's first activation. WRN-34-10 is the network of
TRADES (46,160,474 parameters without the unused sub-block of its released code) and of mimae, shared_info
and ncmi, WRN-28-10 that of ib_rar and ncmi with synthetic data (`activation: swish`).

Differences: no dropout by default (ib_rar's released WRN-28-10 has `dropout: 0.3`); batch norm keeps
PyTorch's momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mi_at.models.base import Classifier, check_dropout, init_weights, make_activation, scale_width


class WideBlock(nn.Module):
    """BN-act-conv3x3-BN-act-(dropout)-conv3x3 plus the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = make_activation(activation)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(activation)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        h = self.act1(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(h)
        h = self.dropout(self.act2(self.bn2(self.conv1(h))))
        out: Tensor = self.conv2(h) + shortcut
        return out


class WideResNet(Classifier):
    """WRN-`depth`-`widen_factor`; any image size.

    Taps: `stem` (the first convolution, bare) and `block1` ... `blockN` (the bare sums), `last_conv` =
    after the final batch norm and activation, before the gate, `features` = mean over pixels.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels, the stem's included (it comes on top of `widen_factor`).
        activation: `relu` or `swish` (SiLU).
        dropout: probability between the two convolutions of a block, in training mode only.
        init: `kaiming` (fan_out, batch norm 1 / 0, biases 0, as TRADES) or `pytorch` (PyTorch's defaults).
        mean: input normalisation, None for none.
        std: see `mean`.
    """

    depth: ClassVar[int]
    widen_factor: ClassVar[int]

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "kaiming",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        dropout = check_dropout(dropout)
        current = scale_width(16, width)
        self.stem = nn.Conv2d(in_channels, current, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for group in range(3):
            channels = scale_width(16 * 2**group * self.widen_factor, width)
            for i in range((self.depth - 4) // 6):
                stride = 2 if group > 0 and i == 0 else 1
                blocks.append(WideBlock(current, channels, stride, activation, dropout))
                current = channels
        self.blocks = nn.ModuleList(blocks)
        self.bn = nn.BatchNorm2d(current)
        self.act = make_activation(activation)
        names = [f"block{i}" for i in range(1, len(blocks) + 1)]
        self.finish(taps=("stem", *names, "last_conv", "features"), feature_dim=current, last_conv_channels=current)
        init_weights(self, init)

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W] -> features [B, D]."""
        h: Tensor = self.stem(x)
        if taps is not None:
            taps["stem"] = h
        for i, block in enumerate(self.blocks, start=1):
            h = block(h)
            if taps is not None:
                taps[f"block{i}"] = h
        h = self.act(self.bn(h))
        if taps is not None:
            taps["last_conv"] = h
        features = self.last_conv_gate(h).mean(dim=(2, 3))
        if taps is not None:
            taps["features"] = features
        return features


class WRN28_10(WideResNet):  # noqa: N801 - the network's name
    """WRN-28-10, 12 blocks: 36,479,194 parameters at 3 channels and 10 classes."""

    depth = 28
    widen_factor = 10


class WRN34_10(WideResNet):  # noqa: N801 - the network's name
    """WRN-34-10, 15 blocks: 46,160,474 parameters at 3 channels and 10 classes.

    >>> import torch
    >>> net = WRN34_10(num_classes=10, in_channels=3, image_size=32, width=0.025)
    >>> net(torch.rand(2, 3, 32, 32)).shape, net.feature_dim
    (torch.Size([2, 10]), 16)
    """

    depth = 34
    widen_factor = 10
