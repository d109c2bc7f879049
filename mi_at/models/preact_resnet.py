"""Pre-activation ResNet: He et al., ECCV 2016, https://arxiv.org/abs/1603.05027; ncmi's main network.

As ResNet for small images, but each block is BN-act-conv-BN-act-conv with the sum left bare, and one BN-act
before the mean over pixels. Where the shape changes the shortcut is a 1x1 convolution (no batch norm) of
the block's first activation, elsewhere it is the block's input. `swish` is what ncmi uses with synthetic
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mi_at.models.base import Classifier, init_weights, make_activation, scale_width


class PreActBlock(nn.Module):
    """BN-act-conv3x3-BN-act-conv3x3 plus the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = make_activation(activation)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        h = self.act1(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(h)
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(h)))) + shortcut
        return out


class PreActResNet(Classifier):
    """A pre-activation ResNet with `depths` blocks in its four groups; any image size.

    Taps: `stem` (the first convolution, bare) and `block1` ... `blockN` (the bare sums), `last_conv` =
    after the final batch norm and activation, before the gate, `features` = mean over pixels.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels.
        activation: `relu` or `swish` (SiLU).
        init: `kaiming` (fan_out, batch norm 1 / 0, biases 0) or `pytorch` (PyTorch's defaults, as ncmi's
            released code).
        mean: input normalisation, None for none.
        std: see `mean`.
    """

    depths: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        activation: str = "relu",
        init: str = "kaiming",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        current = scale_width(64, width)
        self.stem = nn.Conv2d(in_channels, current, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for group, depth in enumerate(self.depths):
            channels = scale_width(64 * 2**group, width)
            for i in range(depth):
                blocks.append(PreActBlock(current, channels, 2 if group > 0 and i == 0 else 1, activation))
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


class PreActResNet18(PreActResNet):
    """PreAct-ResNet-18, blocks [2, 2, 2, 2]: 11,172,170 parameters at 3 channels and 10 classes.

    >>> import torch
    >>> net = PreActResNet18(num_classes=10, in_channels=3, image_size=32, width=0.125, activation="swish")
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """


class PreActResNet34(PreActResNet):
    """PreAct-ResNet-34, blocks [3, 4, 6, 3]: 21,280,330 parameters at 3 channels and 10 classes."""

    depths = (3, 4, 6, 3)
