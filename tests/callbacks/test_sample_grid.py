"""samples.png: which images, in which rows, how often, and what the difference shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mi_at.callbacks.sample_grid import CELL, GAP, SampleGrid, draw
from mi_at.defenses.ce import CE
from tests.callbacks import fits


def cell(picture: Image.Image, row: int, column: int) -> np.ndarray:
    """[64, 64, 3] uint8 of one image."""
    top, left = (place * (CELL + GAP) + GAP for place in (row, column))
    return np.asarray(picture)[top : top + CELL, left : left + CELL]


def enlarged(image: torch.Tensor) -> np.ndarray:
    """[1, 8, 8] in [0, 1] -> [64, 64, 3] uint8, each pixel a square."""
    pixels = (image * 255).round().to(torch.uint8)
    factor = CELL // fits.SIDE
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).expand(3, -1, -1).permute(1, 2, 0).numpy()


class Spy(Callback):
    """Notes what was there when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.views: list[torch.Tensor] = []
        self.written: list[int] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.views.append(batch.views["cross_entropy"].clone())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path.exists():
            self.written.append(trainer.current_epoch + 1)
            self.path.unlink()


def test_rows_are_clean_adversarial_and_difference(tmp_path: Path) -> None:
    spy = Spy(tmp_path / "nothing")
    fits.fit(tmp_path, [SampleGrid(tmp_path, n=4), spy], epochs=1)
    picture = Image.open(tmp_path / "samples.png")
    assert picture.mode == "RGB"
    assert picture.size == (4 * (CELL + GAP) + GAP, 3 * (CELL + GAP) + GAP)
    clean, adversarial = fits.batches(2, seed=1)[0].x, spy.views[-1]
    assert not torch.equal(clean, adversarial)
    for column in range(4):
        np.testing.assert_array_equal(cell(picture, 0, column), enlarged(clean[column]))
        np.testing.assert_array_equal(cell(picture, 1, column), enlarged(adversarial[column]))
        difference = cell(picture, 2, column)
        assert {0, 255} & set(difference.flatten().tolist()), "stretched to the full range"
        larger = enlarged((adversarial[column] > clean[column]).float()) > 0
        assert (difference[larger] > 127).all()
        assert (difference[~larger] <= 128).all()
    assert list(tmp_path.glob("*.part")) == []


def test_no_change_is_mid_grey_and_nan_is_drawn() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert set(cell(draw(x, x), 2, 1).flatten().tolist()) == {128}
    assert draw(x, x.fill_(float("nan"))).size == draw(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)).size


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    fits.fit(tmp_path, [SampleGrid(tmp_path, n=100)], epochs=1, channels=channels)
    assert Image.open(tmp_path / "samples.png").size[0] == 6 * (CELL + GAP) + GAP, "no more than the batch has"


def test_large_images_are_not_enlarged() -> None:
    assert draw(torch.rand(1, 3, 70, 64), torch.rand(1, 3, 70, 64)).size == (64 + 2 * GAP, 3 * (70 + GAP) + GAP)


@pytest.mark.parametrize("val", [0, 2])
def test_every_n_epochs_and_the_last(tmp_path: Path, val: int) -> None:
    spy = Spy(tmp_path / "samples.png")
    # Callbacks run in order: the grid is written before the spy looks.
    fits.fit(tmp_path, [SampleGrid(tmp_path, every_n_epochs=2), spy], epochs=5, val=val)
    assert spy.written == [2, 4, 5]


def test_without_validation_training_images(tmp_path: Path) -> None:
    fits.fit(tmp_path, [SampleGrid(tmp_path)], epochs=1, val=0)
    picture = Image.open(tmp_path / "samples.png")
    np.testing.assert_array_equal(cell(picture, 0, 0), enlarged(fits.batches(1)[0].x[0]))


def test_without_views_no_picture(tmp_path: Path) -> None:
    fits.fit(tmp_path, [SampleGrid(tmp_path)], epochs=1, val=0, defense=fits.module(defense=CE()))
    assert not (tmp_path / "samples.png").exists()


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFirst(Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.setattr(type(trainer), "is_global_zero", False)

    assert rank_zero_only.rank == 0
    fits.fit(tmp_path, [NotFirst(), SampleGrid(tmp_path)], epochs=1)
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"n": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0: expected 1 or more"):
        SampleGrid("run", **options)
