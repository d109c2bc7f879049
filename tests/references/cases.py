"""Shared inputs of the comparisons: (name, logits, adversarial logits, labels) over shapes and scales."""

import torch
from torch import Tensor

SHAPES = [(1, 2), (2, 3), (5, 2), (3, 10), (8, 3), (17, 10), (4, 100), (17, 100)]
SCALES = [0.3, 3.0, 15.0]


def draw(
    batch: int, classes: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, adversarial logits close to them, labels)."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * batch + classes)
    z = scale * torch.randn(batch, classes, generator=g, dtype=torch.float64)
    z_adv = z + 0.5 * scale * torch.randn(batch, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (batch,), generator=g)
    return z.to(dtype), z_adv.to(dtype), y


def extreme(classes: int, size: float = 80.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Saturated logits of +-size: right, wrong, flipped between the views, flat, one class out."""
    flat = torch.zeros(classes, dtype=torch.float64)
    low = torch.full((classes,), -size, dtype=torch.float64)
    first, last, hole = low.clone(), low.clone(), -low
    first[0], last[-1], hole[0] = size, size, -size
    z = torch.stack([first, first, last, first, flat, flat, hole, hole, flat + size])
    z_adv = torch.stack([first, last, first, flat, first, flat, hole, last, flat - size])
    y = torch.tensor([0, 0, 0, 0, 0, classes - 1, 0, classes - 1, 0])
    return z.to(dtype), z_adv.to(dtype), y


def cases() -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Every shape at every scale with its own seed, and the saturated batches."""
    out = []
    for b, (batch, classes) in enumerate(SHAPES):
        for s, scale in enumerate(SCALES):
            out.append((f"B{batch}-C{classes}-x{scale:g}", *draw(batch, classes, 10 * b + s, scale)))
    for classes in (2, 3, 10):
        for size in (30.0, 80.0):
            out.append((f"extreme-C{classes}-x{size:g}", *extreme(classes, size)))
    return out
