"""Crops and flips: batched, equal to a slow transcription, drawn for the global batch."""

import pytest
import torch
from torch import Tensor

from mi_at.data.augment import crop_flip, draw_crop_flip, draw_for_batch


def slow_crop_flip(images: Tensor, parameters: Tensor, pad: int) -> Tensor:
    """Image by image, pixel by pixel."""
    out = torch.zeros_like(images)
    _, channels, height, width = images.shape
    for b, (top, left, mirrored) in enumerate(parameters.T.tolist()):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    row = i + top - pad
                    column = (width - 1 - j if mirrored else j) + left - pad
                    if 0 <= row < height and 0 <= column < width:
                        out[b, c, i, j] = images[b, c, row, column]
    return out


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (4, False), (0, True), (0, False), (2, True)])
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 1, 7, 9)])
def test_equals_the_slow_transcription(shape: tuple[int, ...], pad: int, flip: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    parameters = draw_crop_flip(len(images), pad=pad, flip=flip, generator=generator)
    assert torch.equal(crop_flip(images, parameters, pad=pad), slow_crop_flip(images, parameters, pad))


def test_equals_torchvision() -> None:
    from torchvision.transforms.v2 import functional as F

    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    parameters = draw_crop_flip(9, pad=4, flip=True, generator=torch.Generator().manual_seed(0))
    assert parameters[2].any()
    assert not parameters[2].all()
    for image, ours, (top, left, mirrored) in zip(
        images, crop_flip(images, parameters, pad=4), parameters.T.tolist(), strict=True
    ):
        cut = F.crop(F.pad(image, [4]), top, left, 32, 32)
        assert torch.equal(ours, F.horizontal_flip(cut) if mirrored else cut)


def test_parameters_cover_their_range_evenly() -> None:
    drawn = draw_crop_flip(18_000, pad=4, flip=True, generator=torch.Generator().manual_seed(0))
    for row in drawn[:2]:
        counts = row.bincount(minlength=9)
        assert len(counts) == 9
        assert (counts - 2000).abs().max() < 250
    assert abs(drawn[2].float().mean() - 0.5) < 0.02
    assert not draw_crop_flip(100, pad=4, flip=False, generator=torch.Generator().manual_seed(0))[2].any()


def test_draw_is_a_function_of_its_key() -> None:
    options = {"pad": 4, "flip": True}
    first = draw_for_batch(64, seed=0, epoch=1, batch=2, **options)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(first, draw_for_batch(64, seed=0, epoch=1, batch=2, **options))
    for other in ({"seed": 1}, {"epoch": 2}, {"batch": 3}, {"purpose": "augment_pass"}):
        assert not torch.equal(first, draw_for_batch(64, **{"seed": 0, "epoch": 1, "batch": 2, **options, **other}))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\] with \[3, B\]"):
        crop_flip(torch.zeros(4, 3, 8, 8), torch.zeros(3, 5, dtype=torch.int64), pad=1)
