"""Networks whose robust accuracy is known in closed form, and attacks that misbehave."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.data.batch import Batch

SIDE = 4


class Halfspace(nn.Module):
    """Two classes, logits (-m, m) with m = w . x - b: a sample falls exactly if |m| < eps |w|_dual."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(SIDE * SIDE, generator=generator))
        self.bias = nn.Parameter(self.weight.detach().sum() / 2)
        self.dtype = dtype

    def margin(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight - self.bias

    def forward(self, x: Tensor) -> Tensor:
        m = self.margin(x)
        return torch.stack([-m, m], dim=1).to(self.dtype)

    def falls_within(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The exact distance to the boundary per norm; negative for what is wrong already."""
        with torch.no_grad():
            signed = self.margin(x) * (2 * y - 1)
            return {"linf": signed / self.weight.abs().sum(), "l2": signed / self.weight.norm()}


def small_conv(classes: int = 10, side: int = 8, channels: int = 1, seed: int = 0) -> nn.Sequential:
    """An untrained network with a bend or two; small enough for AutoAttack in a test."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * (side // 2) ** 2, classes),
        )


def images(n: int, *, side: int = SIDE, channels: int = 1, low: float = 0.0, high: float = 1.0) -> Tensor:
    """[n, channels, side, side] in [low, high]."""
    generator = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(n, channels, side, side, generator=generator)


def loader(x: Tensor, y: Tensor, batch_size: int = 16) -> Iterator[Batch]:
    """Batches in order."""
    for places in torch.arange(len(y)).split(batch_size):
        yield Batch(x=x[places], y=y[places], index=places)


@torch.no_grad()
def predicted(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).argmax(dim=1)


@dataclass
class Planted:
    """An attack made of a function (net, x, y) -> x_adv that claims a budget; keeps what it was given."""

    attack: Callable[[nn.Module, Tensor, Tensor], Any]
    eps: float | None = 0.1
    norm: str = "linf"

    def __post_init__(self) -> None:
        self.ids: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        self.ids.append(ids)
        self.labels.append(y)
        return self.attack(net, x, y)

    def describe(self) -> dict[str, Any]:
        return {"attack": "planted", "eps": self.eps, "norm": self.norm}
