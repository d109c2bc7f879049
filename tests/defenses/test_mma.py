"""The margin search of mma on a network whose boundary is known: what is found, what counts, what is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import craft
from mi_at.data.batch import Batch
from mi_at.data.loader import DeviceLoader, ImageStore
from mi_at.defenses.mma import MMA
from mi_at.regularizers.base import Views
from tests.callbacks import fits


class Threshold(nn.Module):
    """Class 1 where the only pixel is above the image's own boundary: one of class 0 has the distance as its margin."""

    def __init__(self, boundaries: Tensor) -> None:
        super().__init__()
        self.boundaries = boundaries

    def forward(self, x: Tensor) -> Tensor:
        beyond = x.flatten() - self.boundaries
        return torch.stack([torch.zeros_like(beyond), 10 * beyond], dim=1)


CASES = {  # pixel, boundary, class: the margin, and whether it is below 0.5
    "crossed by the attack": (0.80, 0.84, 0, 0.04, True),
    "crossed on the way on": (0.50, 0.70, 0, 0.20, True),
    "boundary outside [0, 1]": (0.90, 1.60, 0, 0.525, False),
    "too far": (0.10, 0.90, 0, 0.525, False),
    "wrong": (0.40, 0.60, 1, 0.00, True),
}


def searched(norm: str = "linf") -> tuple[MMA, Batch, Tensor]:
    defense = MMA(variant="full", max_margin=0.5, min_margin=0.05, bisection_steps=20)
    pixel, boundary, y, margin, _ = (torch.tensor(column) for column in zip(*CASES.values(), strict=True))
    defense.attach(Threshold(boundary))
    x = pixel.view(-1, 1, 1, 1)
    batch = Batch(x=x, y=y, index=torch.arange(len(y)) + 3)
    (inner,) = defense.all_adversaries(batch).values()
    budget = InnerMaximisation(norm=norm, eps=0.1, step_size=0.1, steps=4)
    batch.views["adversarial"] = craft(defense, x, inner, budget, ids=batch.index, seed=0)
    return defense, batch, margin


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_counts_is_a_boundary_that_was_found(norm: str) -> None:
    """A point that [0, 1] cuts short of any boundary is nearer than the maximum, and no margin."""
    defense, batch, margin = searched(norm)
    found = (batch.views["adversarial"] - batch.x).flatten()
    within = torch.tensor([case[-1] for case in CASES.values()])
    right = batch.y == 0
    torch.testing.assert_close(found[within], margin[within], rtol=0, atol=1e-5)
    assert found[2] == pytest.approx(0.1), "cut short"
    views = Views(defense.net, batch)
    terms = defense.loss(views)
    at_boundary = nn.functional.cross_entropy(views.logits("adversarial"), batch.y, reduction="none")
    clean = nn.functional.cross_entropy(views.logits("clean"), batch.y, reduction="none")
    expected = 2 / 3 * (at_boundary * (right & within) + clean * ~right).mean()
    torch.testing.assert_close(terms["margin"], expected)


def test_what_is_remembered() -> None:
    """The next search starts within the margin, or as far as a search goes where there was none."""
    defense, batch, margin = searched()
    defense.loss(Views(defense.net, batch))
    assert defense.margins[:3].tolist() == [pytest.approx(0.05)] * 3, "of samples not yet seen: the smallest"
    torch.testing.assert_close(defense.margins[3:], margin, rtol=0, atol=1e-5)
    checkpoint: dict[str, Tensor] = {}
    defense.on_save_checkpoint(checkpoint)
    kept = checkpoint["mma_margins"]
    defense.margins.zero_()
    assert kept[3:].any(), "a copy"
    assert kept.device.type == "cpu"
    defense.on_load_checkpoint(checkpoint)
    assert torch.equal(defense.margins, kept)


def test_margins_up_to_the_whole_range_may_be_searched() -> None:
    """The search goes 5 % further than the maximum, but no step is longer than [0, 1] is wide."""
    defense = MMA(variant="full", max_margin=1.0, min_margin=0.9)
    defense.attach(Threshold(torch.tensor([0.8])))
    batch = Batch(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), index=torch.tensor([0]))
    (inner,) = defense.all_adversaries(batch).values()
    budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.1, steps=1)
    for _ in range(2):
        batch.views["adversarial"] = craft(defense, batch.x, inner, budget, ids=batch.index, seed=0)
        defense.loss(Views(defense.net, batch))
        defense.margins.fill_(1.05)
    assert float(batch.views["adversarial"]) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("own_loader", [True, False], ids=["the project's loader", "another one"])
def test_a_loader_that_knows_its_images_makes_room_for_all_at_once(tmp_path: Path, own_loader: bool) -> None:
    defense = MMA(variant="full")
    images = torch.randint(0, 256, (40, 1, fits.SIDE, fits.SIDE), dtype=torch.uint8)
    store = ImageStore([(images, torch.arange(40) % fits.CLASSES)])
    data = fits.Loaded(DeviceLoader(store, torch.arange(12), batch_size=6, seed=0)) if own_loader else None
    fits.fit(tmp_path, [], epochs=2, train=2, val=0, defense=fits.module(defense=defense), data=data)
    assert len(defense.margins) == (40 if own_loader else 12)
    assert (defense.margins[:12] != torch.tensor(0.005)).any()
    assert (defense.margins[12:] == torch.tensor(0.005)).all()
