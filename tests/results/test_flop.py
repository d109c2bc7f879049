"""The counter against arithmetic, and hollow tensors against real ones: shapes, FLOP, and the bytes that lived."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mi_at.models.cnn import CNNTiny
from mi_at.results.flop import FlopCount, Hollow, hollow, hollow_out


def test_products_and_convolutions_count_two_per_multiplication() -> None:
    with FlopCount() as count:
        torch.ones(2, 3) @ torch.ones(3, 5)
        nn.functional.conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), padding=1)
        torch.ones(7) * torch.ones(7)
    assert count.flop == 2 * 2 * 3 * 5 + 2 * 3 * 4 * 4 * 2 * 3 * 3


def test_types_are_told_apart() -> None:
    with FlopCount() as count, torch.autocast("cpu", dtype=torch.bfloat16):
        torch.ones(2, 3) @ torch.ones(3, 5)
        with torch.autocast("cpu", enabled=False):
            torch.ones(2, 2) @ torch.ones(2, 2)
    assert count.of == {torch.bfloat16: 60, torch.float32: 16}


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x @ x.transpose(0, 1),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "view": lambda x: x.view(-1)[3:].unsqueeze(0),
    "softmax in float64": lambda x: x.double().softmax(dim=1),
    "factory": lambda x: torch.zeros_like(x) + x.new_full((1,), 2.0),
    "with a real tensor": lambda x: x + torch.arange(4),
    "real to it": lambda x: torch.ones(3, 4).to(x) * x,
    "factor": lambda x: torch.linalg.cholesky(x @ x.transpose(0, 1)),
    "sort": lambda x: x.sort(dim=1).values,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_hollow_goes_where_real_goes(name: str) -> None:
    real = torch.rand(3, 4) + torch.eye(3, 4)
    with FlopCount() as counted:
        expected = OPERATIONS[name](real)
    with FlopCount() as count:
        for _ in range(2):  # the second time from memory
            found = OPERATIONS[name](hollow(real))
    assert isinstance(found, Hollow)
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert count.flop == 2 * counted.flop


def test_what_is_read() -> None:
    x = hollow(torch.zeros(3, 4))
    assert x.sum().item() == 1.0
    assert not (x < 0).any()  # nothing is wrong
    assert (x > 0).all()  # all is right
    assert x[x > 0].shape == (12,)
    assert x[(x > 0).any(dim=1)].shape == (3, 4)


def gradients(net: nn.Module, x: Tensor) -> FlopCount:
    with FlopCount() as count:
        x = x.detach().requires_grad_()
        nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 10).backward()
    return count


def test_a_network_costs_the_same_without_values() -> None:
    net, x = CNNTiny(num_classes=10, in_channels=1, image_size=8), torch.rand(4, 1, 8, 8)
    real = gradients(net, x)
    hollow_out(net)
    assert all(isinstance(value, Hollow) for value in [*net.parameters(), *net.buffers()])
    assert gradients(net, hollow(x)).flop == real.flop > 0


def test_bytes_that_live_at_once() -> None:
    x = hollow(torch.zeros(1000))
    with FlopCount() as count:
        first = x + 1  # 4,000 bytes
        second = first.double()  # 8,000
        del first
        third = second + 1  # 8,000
        del second, third
    assert count.peak == 16_000
