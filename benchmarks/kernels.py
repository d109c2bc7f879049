"""The HSIC terms and the channel mask of IB-RAR side by side with loops in the order of public code.

Every round runs every variant once, and ratios are medians over rounds of the ratio within a round: in CPU time on one
thread, or in time between two waits for the device on a GPU.

    python benchmarks/kernels.py [--rounds 9] [--device cuda] [--json FILE]

Exit code 1 if a ratio misses what it must be. Against a loop that does the same work one CPU core does not reach 20 for
the mask; two parts of it are timed alone, and benchmarks/README.md says where the time goes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step import Ratio, cpu_info  # the file beside this one
from torch import Tensor
from torch.nn import functional as F

from mi_at.functional.kernels import bottleneck, channel_dependence

IMAGES, CLASSES, CHANNELS = 100, 10, 512
SIGMA, EPS = 5.0, 1e-5
# VGG16 at 32x32: what a hidden layer puts out for one image, and the last convolution's maps.
LAYERS = ((64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1), (4096,), (4096,))
MAPS = (CHANNELS, 2, 2)


# ---------------------------------------------------------------- the order of public code
def r_matrix(x: Tensor, *, linear: bool = False) -> Tensor:
    """K H (K H + eps m I)^-1 by an inverse, in the precision of x."""
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    if linear:
        kernel = x @ x.T
    else:
        squares = x.square().sum(dim=1, keepdim=True)
        distances = (squares + squares.T - 2 * x @ x.T).abs()
        kernel = torch.exp(-distances / (2 * SIGMA**2 * x.shape[1]))
    one_side = kernel @ (eye - 1 / len(x))
    return one_side @ torch.inverse(one_side + EPS * len(x) * eye)


def public_hsic(x: Tensor, z: Tensor, *, linear: bool = False) -> Tensor:
    """tr(R_x R_z), both matrices made for this one value: two inverses."""
    return (r_matrix(x) * r_matrix(z, linear=linear).T).sum()


def terms_public(layers: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Two calls for each layer: four inverses."""
    calls = [0.1 * public_hsic(layer, x) - public_hsic(layer, y, linear=True) for layer in layers]
    return torch.stack(calls).sum()


def terms_by_layer(layers: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """One inverse for each layer and kernel: the layer's, the images' and the labels'."""
    total = x.new_zeros(())
    for layer in layers:
        own, of_x, of_y = r_matrix(layer), r_matrix(x), r_matrix(y, linear=True)
        total = total + 0.1 * (own * of_x.T).sum() - (own * of_y.T).sum()
    return total


def mask_public(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """As IB-RAR's code scores channels: each by HSIC(f, Y) and by HSIC(f, X), four inverses a channel."""
    scores = [(public_hsic(f, y, linear=True), public_hsic(f, x)) for f in maps.flatten(2).unbind(dim=1)]
    return torch.tensor([[float(a), float(b)] for a, b in scores])


def mask_loop(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """HSIC(f, Y) of each channel in turn, two inverses a channel."""
    return torch.stack([public_hsic(f, y, linear=True) for f in maps.flatten(2).unbind(dim=1)])


PARTS = ("part of it: kernel matrices", "part of it: Cholesky factors")


def channel_kernels(maps: Tensor) -> list[Tensor]:
    """Shifted Gaussian kernel matrices of all channels, 16 at a time, that the mask's factors are made of."""
    made = []
    for part in maps.flatten(2).transpose(0, 1).double().split(16 if maps.device.type == "cpu" else maps.shape[1]):
        part = (part - part.mean(dim=1, keepdim=True)) / (SIGMA * part.shape[2] ** 0.5)
        half, one = part.square().sum(dim=2, keepdim=True) / 2, torch.ones_like(part[..., :1])
        kernel = (torch.cat([part, -half, one], dim=2) @ torch.cat([part, one, -half], dim=2).mT).exp_()
        kernel.diagonal(dim1=1, dim2=2).add_(EPS * IMAGES)
        made.append(kernel)
    return made


# ---------------------------------------------------------------- measuring
def trained(make: Callable[..., Tensor], layers: list[Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    """The terms and their gradient to the layers."""
    return lambda: torch.autograd.grad(make([layer.flatten(1) for layer in layers], x, y), layers)


def ours(layers: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    of_x, of_y = bottleneck(layers, x, y, sigma=SIGMA, eps=EPS)
    return 0.1 * of_x - of_y


def both_scores(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """As `mask.rule=label_and_input` with a linear label kernel."""
    of_y = channel_dependence(maps, y, sigma=SIGMA, eps=EPS, kernel_z="linear")
    return torch.stack([of_y, channel_dependence(maps, x, sigma=SIGMA, eps=EPS)])


def variants(device: torch.device) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(IMAGES, *shape, generator=generator).relu().to(device)

    x = torch.rand(IMAGES, 3 * 32 * 32, generator=generator).to(device)
    y = F.one_hot(torch.arange(IMAGES) % CLASSES, CLASSES).float().to(device)
    layers, maps = [draw(*shape).requires_grad_() for shape in LAYERS], draw(*MAPS)
    made = channel_kernels(maps)
    double, x64, y64 = [layer.detach().double().requires_grad_() for layer in layers], x.double(), y.double()
    return {
        "terms": trained(ours, layers, x, y),
        "terms, an inverse for each layer and kernel": trained(terms_by_layer, layers, x, y),
        "terms, an inverse for each layer and kernel, float64": trained(terms_by_layer, double, x64, y64),
        "terms, public order": trained(terms_public, layers, x, y),
        "mask": lambda: channel_dependence(maps, y, sigma=SIGMA, eps=EPS, kernel_z="linear"),
        "mask, loop": lambda: mask_loop(maps, x, y),
        "mask, loop, float64": lambda: mask_loop(maps.double(), x64, y64),
        "mask by labels and images": lambda: both_scores(maps, x, y),
        "mask, public order": lambda: mask_public(maps, x, y),
        PARTS[0]: lambda: channel_kernels(maps),
        PARTS[1]: lambda: [torch.linalg.cholesky_ex(part) for part in made],
    }


def measure(rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant by round, after one that warms up."""
    torch.set_num_threads(1)
    runs = variants(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                run()
                torch.cuda.synchronize(device)
                taken = time.perf_counter() - start
            else:
                start = time.process_time()
                run()
                taken = time.process_time() - start
            if number:
                seconds[name].append(taken)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/kernels.py --device cuda: no GPU here; nothing was measured")
        return 0
    device = torch.device(options.device)
    seconds = measure(options.rounds, device)

    def ratio(slow: str, fast: str) -> float:
        return median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    ratios = [
        *(Ratio(f"{name} / ours", ratio(name, "terms"), 1.5) for name in seconds if name.startswith("terms,")),
        *(Ratio(f"{name} / ours", ratio(name, "mask"), 20.0) for name in seconds if name.startswith("mask,")),
        Ratio("mask, public order / ours by both", ratio("mask, public order", "mask by labels and images"), 20.0),
    ]
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_info("model name")
    print(f"HSIC terms of {len(LAYERS)} layers, mask of {CHANNELS} channels, batch {IMAGES}, {where}")
    for name, values in seconds.items():
        print(f"  {name:<56} {1e3 * median(values):>9.2f} ms")
    for line in ratios:
        print(line.line())
    result: dict[str, Any] = {"device": where, "torch": torch.__version__, "rounds": options.rounds}
    result |= {"seconds": seconds, "ratios": {line.what: line.value for line in ratios}}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(line.met for line in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
