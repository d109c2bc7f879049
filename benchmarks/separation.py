"""Time of the separation of a batch: class sums against matrices of all pairs, forward and backward.

The peers are written from the equation (robust NCMI eq. 18): a matrix product p ln p^T masked to pairs of different
label, and the same with the pairs' cross-entropies as one [B, B, C] tensor. Values and gradients are compared first.
Rounds alternate, so that a slow moment of the machine hits all; one thread, CPU time, float64 as in training.

    python benchmarks/separation.py [--rounds 9] [--batch-size 512] [--classes 100]

Exit code 1 if class sums are not 5 times faster than the faster peer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from mi_at.functional.information import LOG_FLOOR, separation

GOAL = 5.0
Function = Callable[[Tensor, Tensor], Tensor]


def product(p: Tensor, y: Tensor) -> Tensor:
    different = y.unsqueeze(1) != y.unsqueeze(0)
    return -((p @ p.clamp_min(LOG_FLOOR).log().T) * different).sum() / len(p) ** 2


def pairs(p: Tensor, y: Tensor) -> Tensor:
    different = y.unsqueeze(1) != y.unsqueeze(0)
    crossed = -(p.unsqueeze(1) * p.clamp_min(LOG_FLOOR).log().unsqueeze(0)).sum(dim=2)
    return (crossed * different).sum() / len(p) ** 2


def seconds(function: Function, p: Tensor, y: Tensor, repeats: int) -> float:
    """CPU time of one forward and backward."""
    start = time.process_time()
    for _ in range(repeats):
        torch.autograd.grad(function(p, y), p)
    return (time.process_time() - start) / repeats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, classes = options.batch_size, options.classes
    p = (3 * torch.randn(batch, classes, dtype=torch.float64)).softmax(dim=1).requires_grad_(True)
    y = torch.randint(classes, (batch,))
    functions: dict[str, tuple[Function, int]] = {
        "class sums": (lambda p, y: separation(p, y, classes), 50),
        "matrix product": (product, 10),
        "all pairs": (pairs, 1),
    }
    value = separation(p, y, classes)
    (gradient,) = torch.autograd.grad(value, p)
    for function, _ in functions.values():
        found = function(p, y)
        torch.testing.assert_close(found, separation(p, y, classes), rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, p)[0], gradient, rtol=1e-8, atol=1e-14)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(options.rounds + 1):
        for name, (function, repeats) in functions.items():
            spent = seconds(function, p, y, repeats)
            if turn:  # the first round warms up
                times[name].append(spent)
    print(f"B {batch}, C {classes}, float64, one thread, torch {torch.__version__}, {options.rounds} rounds")
    ours = times["class sums"]
    ratios = {name: median(a / b for a, b in zip(values, ours, strict=True)) for name, values in times.items()}
    for name, values in times.items():
        print(f"  {name:<15} {1e3 * median(values):>9.3f} ms   {ratios[name]:>8.1f} x")
    ratio = min(ratios["matrix product"], ratios["all pairs"])
    print(f"  ratio to the faster peer {ratio:.1f} (goal {GOAL:.0f})")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
