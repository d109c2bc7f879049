"""Networks that seem robust and are not, each with the one fault that an audit must name; and networks of one pixel."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Around(nn.Module):
    """A network with something done to its images before and to its logits after."""

    def __init__(
        self,
        net: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def saturated(net: nn.Module) -> nn.Module:
    return Around(net, after=lambda z: 1e4 * z)


def noisy(net: nn.Module) -> nn.Module:
    return Around(net, before=lambda x: x + 0.1 * torch.randn_like(x))


def quantised(net: nn.Module) -> nn.Module:
    return Around(net, before=lambda x: (4 * x).round() / 4)


def rounded(net: nn.Module) -> nn.Module:
    return Around(net, after=lambda z: z.round())


def detached(net: nn.Module) -> nn.Module:
    return Around(net, before=lambda x: x.detach())


def no_number(net: nn.Module) -> nn.Module:
    """The same logits, with a gradient that is not a number."""
    return Around(net, before=lambda x: x + 0 * (x - x).sqrt())


def probabilities(net: nn.Module) -> nn.Module:
    return Around(net, after=lambda z: z.softmax(dim=1))


def batch_normalised(net: nn.Module) -> nn.Module:
    return Around(net, after=nn.BatchNorm1d(10, affine=False, track_running_stats=False))


class AlwaysDropout(nn.Dropout):
    """A layer that does not leave train mode; with p = 0 nothing else would show it."""

    def train(self, mode: bool = True) -> "AlwaysDropout":
        return super().train(True)


def in_train_mode(net: nn.Module) -> nn.Module:
    return Around(net, after=AlwaysDropout(0.0))


class LabelMask(nn.Module):
    """A mask of the channels before the head that lets through only what speaks for a label it should not know."""

    def __init__(self, net: nn.Module, labels: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor) -> Tensor:
        weight = self.net.head.weight
        favours = weight[self.labels(x)] - weight.mean(dim=0) > 0
        return self.net.head(self.net.features(x) * favours)


def labels_by_place(net: nn.Module, y: Tensor) -> nn.Module:
    """The labels are those of the batch as it is expected to come."""
    return LabelMask(net, lambda x: y[: len(x)])


def labels_by_look_up(net: nn.Module, images: Tensor, y: Tensor) -> nn.Module:
    """The label is that of the nearest image that the network has stored."""
    stored = images.flatten(1)
    return LabelMask(net, lambda x: y[torch.cdist(x.detach().flatten(1), stored).argmin(dim=1)])


class Steps(nn.Module):
    """A channel mask that is the identity but for its gradient, which is zero."""

    def forward(self, h: Tensor) -> Tensor:
        return (64 * h).floor() / 64


class OnePixel(nn.Module):
    """Two classes of one pixel around 0.5: class 1 where height(u) > 0, u the distance from 0.5 in units of eps."""

    def __init__(self, eps: float, height: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.eps, self.height = eps, height

    def forward(self, x: Tensor) -> Tensor:
        h = self.height((x.flatten(1)[:, 0] - 0.5) / self.eps)
        return torch.stack([-h, h], dim=1)
