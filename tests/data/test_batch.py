"""The batch: devices, shares, what it refuses."""

import pytest
import torch

from mi_at.data.batch import Batch


def make(count: int = 3) -> Batch:
    return Batch(x=torch.rand(count, 1, 8, 8), y=torch.zeros(count, dtype=torch.int64), index=torch.arange(count))


def test_length_and_defaults() -> None:
    batch = make()
    assert (len(batch), batch.global_size, batch.offset, batch.epoch, batch.batch_idx) == (3, 3, 0, 0, 0)
    batch.views["adversarial"] = batch.x + 1  # mutable: a callback puts the views in
    assert make().views == {}


def test_to_moves_everything_and_keeps_the_key() -> None:
    batch = Batch(
        x=torch.rand(2, 1, 8, 8),
        y=torch.zeros(2, dtype=torch.int64),
        index=torch.arange(2),
        views={"adversarial": torch.rand(2, 1, 8, 8)},
        global_size=5,
        offset=3,
        epoch=4,
        batch_idx=7,
    )
    assert batch.to("cpu") is batch
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.x, moved.y, moved.index, moved.views["adversarial"])} == {"meta"}
    assert (moved.global_size, moved.offset, moved.epoch, moved.batch_idx) == (5, 3, 4, 7)
    assert batch.x.device.type == "cpu"


def test_mismatched_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images, 2 labels, 3 indices"):
        Batch(x=torch.rand(3, 1, 8, 8), y=torch.zeros(2, dtype=torch.int64), index=torch.arange(3))
    with pytest.raises(ValueError, match="offset=3"):
        Batch(x=torch.rand(3, 1, 8, 8), y=torch.zeros(3), index=torch.arange(3), global_size=5, offset=3)


def test_lightning_moves_and_converts_it() -> None:
    from lightning_fabric.utilities import move_data_to_device
    from pytorch_lightning.plugins import DoublePrecision

    batch = make()
    batch.views["adversarial"] = batch.x.clone()
    assert move_data_to_device(batch, torch.device("meta")).views["adversarial"].device.type == "meta"
    double = DoublePrecision().convert_input(batch)
    assert double.x.dtype == torch.float64
    assert double.index.dtype == torch.int64
