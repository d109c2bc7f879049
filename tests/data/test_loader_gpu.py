"""The loader on a GPU: the CPU's bits, and no synchronisation in a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mi_at.data.loader import Augmentation, DeviceLoader, ImageStore

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(device: str, placement: str, parts: int = 1) -> DeviceLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(1000) % 10
    cut = [(images, labels)] if parts == 1 else [(images[:600], labels[:600]), (images[600:], labels[600:])]
    store = ImageStore(cut, device=device, placement=placement)
    return DeviceLoader(
        store, torch.arange(1000), batch_size=128, seed=0, augmentation=Augmentation(), rank=1, world_size=3
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("placement", ["auto", "device", "memory"])
def test_equals_the_cpu(placement: str, parts: int) -> None:
    loader = make("cuda", placement, parts)
    assert loader.store.resident == (placement != "memory")
    for ours, theirs in zip(loader, make("cpu", "auto"), strict=True):
        assert ours.x.device.type == "cuda"
        assert torch.equal(ours.x.cpu(), theirs.x)
        assert torch.equal(ours.y.cpu(), theirs.y)
        assert torch.equal(ours.index.cpu(), theirs.index)


@pytest.mark.parametrize("placement", ["device", "memory"])
def test_no_step_synchronises(placement: str, request: pytest.FixtureRequest) -> None:
    loader = make("cuda", placement)
    torch.cuda.synchronize()
    request.getfixturevalue("no_synchronisation")
    for _ in range(2):
        for batch in loader:
            assert len(batch)
