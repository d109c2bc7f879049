"""ResNet for small images: He et al., CVPR 2016, https://arxiv.org/abs/1512.03385.

The ImageNet networks of the paper's Table 1 with the stem of its CIFAR networks (section 4.2).
The stem is one 3x3 convolution of stride 1 without pooling, then four groups of blocks of 64, 128, 256, 512
channels, the last three starting with stride 2, then the mean over pixels. ResNet-18 is the network of
mimae, shared_info, namid and ib_rar, ResNet-50 the surrogate of mimae and shared_info. Projection shortcuts
(1x1 convolution and batch norm) wherever the shape changes; a bottleneck strides in its 3x3 convolution.

Differences: namid's released stem has no padding (30x30 maps), ib_rar's returns log-probabilities; here
padding is 1 and the output is logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mi_at.models.base import Classifier, init_weights, scale_width


class _Projection(nn.Sequential):
    """Shortcut where the shape changes: 1x1 convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm; ReLU after the sum with the shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else _Projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        h = self.act(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        out: Tensor = self.act(h + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, the last to 4 times the channels; ReLU after the sum with the shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else _Projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, 4 C, H / stride, W / stride]."""
        h = self.act(self.bn1(self.conv1(x)))
        h = self.act(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        out: Tensor = self.act(h + self.shortcut(x))
        return out


class ResNet(Classifier):
    """A ResNet with `depths` blocks in its four groups; any image size.

    Taps: `stem` and `block1` ... `blockN` after their ReLU, `last_conv` = the last block before the gate,
    `features` = mean over pixels.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels.
        init: `kaiming` (fan_out, batch norm 1 / 0, biases 0) or `pytorch` (PyTorch's defaults, as most
            released AT code).
        mean: input normalisation, None for none.
        std: see `mean`.
    """

    block: ClassVar[type[BasicBlock] | type[Bottleneck]] = BasicBlock
    depths: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        init: str = "kaiming",
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        current = scale_width(64, width)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, current, 3, padding=1, bias=False),
            nn.BatchNorm2d(current),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        for group, depth in enumerate(self.depths):
            channels = scale_width(64 * 2**group, width)
            for i in range(depth):
                blocks.append(self.block(current, channels, stride=2 if group > 0 and i == 0 else 1))
                current = channels * self.block.expansion
        self.blocks = nn.ModuleList(blocks)
        names = [f"block{i}" for i in range(1, len(blocks) + 1)]
        self.finish(
            taps=("stem", *names[:-1], "last_conv", names[-1], "features"),
            feature_dim=current,
            last_conv_channels=current,
        )
        init_weights(self, init)

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W] -> features [B, D]."""
        h: Tensor = self.stem(x)
        if taps is not None:
            taps["stem"] = h
        for i, block in enumerate(self.blocks, start=1):
            h = block(h)
            if i == len(self.blocks):
                if taps is not None:
                    taps["last_conv"] = h
                h = self.last_conv_gate(h)
            if taps is not None:
                taps[f"block{i}"] = h
        features = h.mean(dim=(2, 3))
        if taps is not None:
            taps["features"] = features
        return features


class ResNet18(ResNet):
    """ResNet-18, basic blocks [2, 2, 2, 2]: 11,173,962 parameters at 3 channels and 10 classes.

    >>> import torch
    >>> net = ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.125)
    >>> logits, taps = net.forward_taps(torch.rand(2, 3, 32, 32), ["block8", "features"])
    >>> logits.shape, taps["block8"].shape, taps["features"].shape
    (torch.Size([2, 10]), torch.Size([2, 64, 4, 4]), torch.Size([2, 64]))
    """


class ResNet50(ResNet):
    """ResNet-50, bottlenecks [3, 4, 6, 3]: 23,520,842 parameters at 3 channels and 10 classes."""

    block = Bottleneck
    depths = (3, 4, 6, 3)
