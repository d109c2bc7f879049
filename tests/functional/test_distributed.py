"""Gathering the global batch: values everywhere, gradients through the own shard, uneven and empty shards."""

from typing import Any

import pytest
import torch

from mi_at.functional.distributed import gather, own_shard, rank, shard_sizes, world_size

TOTALS = [7, 3, 2]  # over three processes: uneven, one each, one process without a sample


def test_alone_it_is_the_identity():
    x = torch.rand(4, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather(x) is x
    assert gather(x, 4) is x
    assert torch.equal(own_shard(x), x)


@pytest.mark.parametrize("total", range(12))
@pytest.mark.parametrize("parts", range(1, 6))
def test_sizes_are_those_of_tensor_split(total, parts):
    assert shard_sizes(total, parts) == [len(shard) for shard in torch.arange(total).tensor_split(parts)]


def batch(total: int) -> torch.Tensor:
    return torch.rand(total, 2, generator=torch.Generator().manual_seed(total), dtype=torch.float64)


def coupled(x: torch.Tensor) -> torch.Tensor:
    """A value of the batch that is no sum over samples."""
    return x.mean(0).square().sum() + x.max() * x.std()


def member(index: int, parts: int) -> dict[str, Any]:
    results: dict[str, Any] = {"world": (rank(), world_size())}
    for total in TOTALS:
        mine = batch(total).tensor_split(parts)[index].clone().requires_grad_(True)
        for known in (total, None):
            whole = gather(mine, known)
            gradient = torch.autograd.grad(coupled(whole), mine)[0]
            results[f"{total}-{known}"] = (whole.detach(), gradient, own_shard(batch(total)))
    try:
        gather(torch.zeros(2, 1), 9)
    except ValueError as error:
        results["error"] = str(error)
    return results


@pytest.mark.ddp
def test_three_processes_hold_one_batch(spawn):
    results = spawn(member, 3)
    for total in TOTALS:
        whole = batch(total).requires_grad_(True)
        gradients = torch.autograd.grad(coupled(whole), whole)[0].tensor_split(3)
        for index, result in enumerate(results):
            assert result["world"] == (index, 3)
            for known in (total, None):
                values, gradient, shard = result[f"{total}-{known}"]
                assert torch.equal(values, whole.detach())
                torch.testing.assert_close(gradient, gradients[index], rtol=0, atol=1e-14)
                assert torch.equal(shard, whole.detach().tensor_split(3)[index])
    for index, result in enumerate(results):
        assert f"process {index} holds 2 of 9 samples, expected 3" in result["error"]
