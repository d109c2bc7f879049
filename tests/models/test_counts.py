"""Parameters and FLOP of the full-size networks, counted on the meta device (no weights are made)."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mi_at.models import Classifier
from tests.models.helpers import NAMES, build

# At 10 classes; each number also follows from the arithmetic of `derived` below, from the papers' tables.
# resnet18, resnet50, vgg19: as quoted for the CIFAR versions.
# wrn28_10: Zagoruyko and Komodakis 2016 print 36.5 M.
# wrn34_10: TRADES' network less a sub-block that its released code builds and never runs (2,102,112 more).
# preact_resnet18: 11,171,146 is quoted for the variant without a final batch norm, which adds 2 * 512.
PARAMETERS = {
    "cnn4": 312_202,
    "cnn_tiny": 155_786,
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
    "preact_resnet18": 11_172_170,
    "preact_resnet34": 21_280_330,
    "wrn28_10": 36_479_194,
    "wrn34_10": 46_160_474,
    "vgg16": 33_663_050,
    "vgg19": 20_040_522,
}
# One forward of one image, 1 multiply-add = 2 FLOP, convolutions and linear layers, in GFLOP.
GFLOP = {
    "cnn4": 0.01990,
    "cnn_tiny": 0.001463,
    "resnet18": 1.1108,
    "resnet50": 2.5957,
    "preact_resnet18": 1.1108,
    "preact_resnet34": 2.3188,
    "wrn28_10": 10.487,
    "wrn34_10": 13.318,
    "vgg16": 0.66422,  # 0.62639 in the convolutions and 0.03783 in its three linear layers
    "vgg19": 0.79627,
}
IMAGES = {"cnn4": (1, 28), "cnn_tiny": (1, 8)}


def on_meta(name: str) -> Classifier:
    channels, size = IMAGES.get(name, (3, 32))
    with torch.device("meta"):
        return build(name, channels=channels, size=size).eval()


def conv(c_in: int, c_out: int, k: int = 3, bias: bool = False) -> int:
    return k * k * c_in * c_out + bias * c_out


def linear(d_in: int, d_out: int) -> int:
    return d_in * d_out + d_out


def bn(c: int) -> int:
    return 2 * c


def residual(depths: tuple[int, ...], *, preact: bool) -> int:
    """ResNet with basic blocks, 64 to 512 channels; before or after the sum there are as many batch norms."""
    total, c_in = conv(3, 64) + bn(512 if preact else 64) + linear(512, 10), 64
    for depth, c in zip(depths, (64, 128, 256, 512), strict=True):
        for _ in range(depth):
            total += conv(c_in, c) + conv(c, c) + (bn(c_in) + bn(c) if preact else 2 * bn(c))
            if c_in != c:
                total += conv(c_in, c, 1) + (0 if preact else bn(c))
            c_in = c
    return total


def bottleneck(depths: tuple[int, ...]) -> int:
    total, c_in = conv(3, 64) + bn(64) + linear(2048, 10), 64
    for depth, c in zip(depths, (64, 128, 256, 512), strict=True):
        for i in range(depth):
            total += conv(c_in, c, 1) + conv(c, c) + conv(c, 4 * c, 1) + 2 * bn(c) + bn(4 * c)
            total += conv(c_in, 4 * c, 1) + bn(4 * c) if i == 0 else 0
            c_in = 4 * c
    return total


def wide(depth: int, k: int) -> int:
    total, c_in = conv(3, 16) + bn(64 * k) + linear(64 * k, 10), 16
    for c in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += bn(c_in) + conv(c_in, c) + bn(c) + conv(c, c) + (conv(c_in, c, 1) if c_in != c else 0)
            c_in = c
    return total


def vgg(depths: tuple[int, ...], hidden: tuple[int, ...]) -> int:
    total, c_in = 0, 3
    for depth, c in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            total, c_in = total + conv(c_in, c, bias=True) + bn(c), c
    for d in hidden:
        total, c_in = total + linear(c_in, d) + bn(d), d
    return total + linear(c_in, 10)


def derived(name: str) -> int:
    if name == "cnn4":  # 28 -> 26 -> 24 -> 12 -> 10 -> 8 -> 4 pixels
        convs = conv(1, 32, bias=True) + conv(32, 32, bias=True) + conv(32, 64, bias=True) + conv(64, 64, bias=True)
        return convs + linear(64 * 4 * 4, 200) + linear(200, 200) + linear(200, 10)
    if name == "cnn_tiny":
        convs = conv(1, 16, bias=True) + conv(16, 32, bias=True) + conv(32, 64, bias=True)
        return convs + linear(64 * 4 * 4, 128) + linear(128, 10)
    return {
        "resnet18": residual((2, 2, 2, 2), preact=False),
        "resnet50": bottleneck((3, 4, 6, 3)),
        "preact_resnet18": residual((2, 2, 2, 2), preact=True),
        "preact_resnet34": residual((3, 4, 6, 3), preact=True),
        "wrn28_10": wide(28, 10),
        "wrn34_10": wide(34, 10),
        "vgg16": vgg((2, 2, 3, 3, 3), (4096, 4096)),
        "vgg19": vgg((2, 2, 4, 4, 4), ()),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    assert name in PARAMETERS, f"a new network: add the parameters of {name} at 10 classes, with where they are from"
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_pinned_numbers_follow_from_the_papers_tables(name: str) -> None:
    assert derived(name) == PARAMETERS[name]


class Flop(TorchDispatchMode):
    """Counts the FLOP of convolutions and matrix products; the registry's formulas need shapes only."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            op = str(func._overloadpacket)
            self.by_op[op] = self.by_op.get(op, 0) + formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", NAMES)
def test_flop_of_a_forward(name: str) -> None:
    assert name in GFLOP, f"a new network: add the GFLOP of {name} to this test"
    net = on_meta(name)
    with Flop() as plain:
        net(torch.empty(1, net.in_channels, *net.image_size, device="meta"))
    total = sum(plain.by_op.values()) / 1e9
    assert total == pytest.approx(GFLOP[name], rel=5e-4)
    with Flop() as tapped:
        net.forward_taps(torch.empty(1, net.in_channels, *net.image_size, device="meta"))
    assert tapped.by_op == plain.by_op


def test_flop_of_vgg16s_convolutions() -> None:
    """0.626 is what is quoted for VGG-16; ib_rar's hidden linear layers of 4096 come on top."""
    with Flop() as count:
        on_meta("vgg16")(torch.empty(1, 3, 32, 32, device="meta"))
    convolutions = sum(flop for op, flop in count.by_op.items() if "convolution" in op)
    linears = sum(flop for op, flop in count.by_op.items() if "mm" in op)
    assert convolutions / 1e9 == pytest.approx(0.6264, rel=5e-4)
    assert linears == 2 * (512 * 4096 + 4096 * 4096 + 4096 * 10)
    assert math.isclose(convolutions + linears, sum(count.by_op.values()))
