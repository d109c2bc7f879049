"""PGD with early success, one sample at a time, as its definition reads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def first_broken_or_highest(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: int,
    start: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: str,
) -> tuple[Tensor, int | None]:
    """One image [C, H, W]: the first misclassified iterate and its number; else that of the highest loss, None."""

    def into_the_ball(image: Tensor) -> Tensor:
        delta = image - x
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif delta.norm() > eps:
            delta = delta * (eps / delta.norm())
        return (x + delta).clamp(0, 1)

    iterate = into_the_ball(x + start)
    highest, highest_loss = iterate, -float("inf")
    for number in range(steps + 1):
        image = iterate.clone().requires_grad_()
        logits = net(image[None])
        if int(logits.argmax()) != y:
            return iterate, number
        value = loss(logits, torch.tensor([y])).sum()
        if value.item() > highest_loss:
            highest, highest_loss = iterate, value.item()
        (gradient,) = torch.autograd.grad(value, image)
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        iterate = into_the_ball(iterate + step * direction)
    return highest, None
