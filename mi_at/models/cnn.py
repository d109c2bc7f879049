"""Small convolutional networks: CNN4 for MNIST and CNNTiny for 8x8 digits and quick experiments.

CNN4 is the "SmallCNN" of TRADES (Zhang et al., ICML 2019, https://arxiv.org/abs/1901.08573, section 5.1),
which has the layers of Carlini and Wagner 2017 (https://arxiv.org/abs/1608.04644, Table 1);
mimae and shared_info call it the 4-layer CNN. CNNTiny is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from mi_at.models.base import Classifier, check_dropout, make_activation, scale_width


def init_fan_in(layers: nn.Module) -> None:
    """He-normal weights (variance 2 / fan_in) and zero biases for convolutions and linear layers."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class CNN4(Classifier):
    """Four 3x3 convolutions without padding (32, 32, 64, 64) and two hidden linear layers (200, 200).

    Max-pool after the second and the fourth convolution, ReLU everywhere, dropout between the hidden linear
    layers: 312,202 parameters at 1 channel, 28 px and 10 classes. Images of at least 16 px. Weight init:
    convolutions He-normal with fan_in and bias 0, hidden linear layers PyTorch's default, the head exactly
    zero: before the first update all logits are 0 and the gradient with respect to the input is 0.

    Taps: `conv1` ... `conv4` after ReLU (before the max-pool), `last_conv` = `conv4` before the gate,
    `fc1`, `fc2` after ReLU (before dropout), `features` = `fc2`.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels and the size of the hidden linear layers.
        dropout: probability between `fc1` and `fc2`, in training mode only; 0 switches it off.
        mean: input normalisation, None for none.
        std: see `mean`.

    >>> import torch
    >>> net = CNN4(num_classes=10, in_channels=1, image_size=28)
    >>> net(torch.rand(2, 1, 28, 28)).abs().max().item(), net.feature_dim
    (0.0, 200)
    """

    min_size = 16

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        dropout: float = 0.5,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        narrow, wide, hidden = (scale_width(c, width) for c in (32, 64, 200))
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(in_channels, narrow, 3),
                nn.Conv2d(narrow, narrow, 3),
                nn.Conv2d(narrow, wide, 3),
                nn.Conv2d(wide, wide, 3),
            ]
        )
        self.act = make_activation("relu")
        self.pool = nn.MaxPool2d(2)
        # two unpadded convolutions take 4 pixels, the pool halves and rounds down; twice
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in self.image_size)
        self.fc1 = nn.Linear(wide * rows * columns, hidden)
        self.dropout: nn.Module = nn.Dropout(p) if (p := check_dropout(dropout)) > 0 else nn.Identity()
        self.fc2 = nn.Linear(hidden, hidden)
        self.finish(
            taps=("conv1", "conv2", "conv3", "last_conv", "conv4", "fc1", "fc2", "features"),
            aliases=("last_conv", "features"),
            feature_dim=hidden,
            last_conv_channels=wide,
        )
        init_fan_in(self.convs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W] -> features [B, D]."""
        h = x
        for i, conv in enumerate(self.convs, start=1):
            h = self.act(conv(h))
            if i == 4:
                if taps is not None:
                    taps["last_conv"] = h
                h = self.last_conv_gate(h)
            if taps is not None:
                taps[f"conv{i}"] = h
            if i % 2 == 0:
                h = self.pool(h)
        h = self.act(self.fc1(h.flatten(1)))
        if taps is not None:
            taps["fc1"] = h
        features: Tensor = self.act(self.fc2(self.dropout(h)))
        if taps is not None:
            taps["fc2"] = features
            taps["features"] = features
        return features


class CNNTiny(Classifier):
    """Three 3x3 convolutions (16, 32, 64) and one hidden linear layer (128), for 8x8 digits on one CPU core.

    Padding 1 throughout, a 2x2 max-pool after the second convolution, an average pool to at most 4x4 after
    the third: 155,786 parameters at 1 channel, 8 px and 10 classes. No batch norm by default, so a batch is
    never coupled and training equals on any number of processes. Any image of at least 2 px. Weight init:
    convolutions and hidden linear layer He-normal with fan_in and bias 0 (with fan_out the signal fades and
    training at eps 0.2 may not start), the head PyTorch's default.

    Taps: `conv1` ... `conv3` after the activation (before the pool), `last_conv` = `conv3` before the gate,
    `fc1` after its activation, `features` = `fc1`.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        image_size: pixels, one number or (height, width).
        width: multiplies every number of channels and the size of the hidden linear layer.
        activation: `relu` or `swish` (SiLU).
        batch_norm: batch norm after every convolution.
        mean: input normalisation, None for none.
        std: see `mean`.

    >>> import torch
    >>> net = CNNTiny(num_classes=10, in_channels=1, image_size=8)
    >>> net(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    min_size = 2

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        width: float = 1.0,
        activation: str = "relu",
        batch_norm: bool = False,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)
        channels = [in_channels, *(scale_width(c, width) for c in (16, 32, 64))]
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm),
                nn.BatchNorm2d(after) if batch_norm else nn.Identity(),
                make_activation(activation),
            )
            for before, after in itertools.pairwise(channels)
        )
        self.pool = nn.MaxPool2d(2)
        # a plain average pool: the adaptive one has no deterministic backward on GPUs
        halves = [side // 2 for side in self.image_size]
        kernel = [math.ceil(side / 4) for side in halves]
        self.last_pool = nn.AvgPool2d((kernel[0], kernel[1]), ceil_mode=True)
        pixels = math.prod(math.ceil(side / k) for side, k in zip(halves, kernel, strict=True))
        hidden = scale_width(128, width)
        self.fc1 = nn.Sequential(nn.Linear(channels[-1] * pixels, hidden), make_activation(activation))
        self.finish(
            taps=("conv1", "conv2", "last_conv", "conv3", "fc1", "features"),
            aliases=("last_conv", "features"),
            feature_dim=hidden,
            last_conv_channels=channels[-1],
        )
        init_fan_in(self.convs)
        init_fan_in(self.fc1)

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W] -> features [B, D]."""
        h = x
        for i, conv in enumerate(self.convs, start=1):
            h = conv(h)
            if i == 3:
                if taps is not None:
                    taps["last_conv"] = h
                h = self.last_conv_gate(h)
            if taps is not None:
                taps[f"conv{i}"] = h
            if i == 2:
                h = self.pool(h)
        features: Tensor = self.fc1(self.last_pool(h).flatten(1))
        if taps is not None:
            taps["fc1"] = features
            taps["features"] = features
        return features
