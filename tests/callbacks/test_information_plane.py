"""The information plane of a layer: the values are those of the kernels, and training is not disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback

from mi_at.callbacks.information_plane import FILE, InformationPlane
from mi_at.callbacks.lines import add_line
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.functional.kernels import normalized_hsic, one_hot
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from tests.callbacks import fits


def module(epochs: int = 2) -> Defense:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=fits.CLASSES, in_channels=1, image_size=fits.SIDE)
    return CE().attach(net, optimisation=SGD(lr=0.1, epochs=epochs, schedule="constant"))


class Direct(Callback):
    """The same values by the kernels themselves."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        was = pl_module.net.training
        pl_module.net.eval()
        with torch.no_grad():
            layer = pl_module.net.forward_taps(batch.x, ("features",))[1]["features"].flatten(1)
        pl_module.net.train(was)
        labels = one_hot(batch.y, fits.CLASSES)
        xt = normalized_hsic(batch.x.flatten(1), layer)
        self.values.append((float(xt), float(normalized_hsic(layer, labels, kernel_z="linear"))))


def test_it_writes_both_of_every_so_many_batches(tmp_path: Path) -> None:
    direct = Direct()
    fits.fit(tmp_path, [InformationPlane(every_n_steps=2), direct], epochs=2, train=3, val=0, defense=module())
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        xt, yt = direct.values[line["step"] - 1]
        assert (line["xt"], line["yt"]) == pytest.approx((xt, yt))
        assert xt != pytest.approx(yt)


def test_training_has_the_same_bits_with_it(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [InformationPlane(every_n_steps=1)]):
        defense = module()
        fits.fit(tmp_path, callbacks, epochs=2, train=3, val=0, defense=defense)
        weights.append(torch.cat([parameter.flatten() for parameter in defense.net.parameters()]))
        assert all(parameter.requires_grad for parameter in defense.net.parameters())
    assert torch.equal(*weights)


def test_a_layer_that_is_not_there_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"callback\.information_plane\.tap=block9: expected one of .*features"):
        fits.fit(tmp_path, [InformationPlane(tap="block9")], epochs=1, train=1, val=0, defense=module())
    with pytest.raises(ValueError, match=r"every_n_steps=0: expected 1 or more"):
        InformationPlane(every_n_steps=0)


def test_a_resumed_run_does_its_later_lines_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    for step, value in ((1, "a"), (2, "b"), (3, "c"), (2, "again")):
        add_line(path, {"step": step, "value": value})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in found] == [(1, "a"), (2, "again")]
    assert [other.name for other in path.parent.iterdir()] == ["lines.jsonl"]
