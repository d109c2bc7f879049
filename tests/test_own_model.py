"""A network, a data set and pictures of one's own, through the real commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mi_at
from mi_at.results.records import read_record
from tests.commands import command, tiny

PACKAGE = '''
"""A user's own package."""
import torch
from torch import nn

class Net(nn.Module):
    """Takes what it asks for by name."""

    def __init__(self, num_classes, in_channels=1, hidden=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        self.layers[1] = nn.Linear(64 * in_channels, hidden)

    def forward(self, x):
        return self.layers(x)

class Lazy(nn.Module):
    """Leaves every size to the images."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
        )

    def forward(self, x):
        return self.layers(x)

class LazyWide(Lazy):
    """Takes images of another kind."""

    def forward(self, x):
        return super().forward(x.view(-1, 3, 8, 9))

class LazyUnused(Lazy):
    """Has a layer that is not used."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.spare = nn.LazyLinear(3)

class Fixed(nn.Module):
    """Takes nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1) - 0.5)

class Pair(Fixed):
    """Gives more than logits."""

    def forward(self, x):
        return super().forward(x), x

class Wide(Fixed):
    """Takes other images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(65, 10)

class Needy(Fixed):
    """Wants what is not there."""

    def __init__(self, depth):
        super().__init__()

class NoModule:
    """Is no network."""
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with my_package in it, which the tests can import too."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def own(*overrides: str) -> list[str]:
    """Without the options of the yaml's own model."""
    return [override for override in tiny(*overrides) if not override.startswith("model.width")]


@pytest.mark.parametrize("name", ["Net", "Fixed", "Lazy"])
def test_a_network_of_ones_own_trains_and_is_evaluated(folder: Path, name: str) -> None:
    run = ("run_dir=run", f"model._target_=my_package.{name}", "optim.lr=0.2")
    done = command(folder, *own(*run, "evaluation=quick", "evaluation.autoattack_n=2"))
    assert (done.code, done.err) == (0, "")
    record = read_record(folder / "run/record.json")
    assert record.config["model"]["_target_"] == f"my_package.{name}"
    net = mi_at.load(folder / "run/best.ckpt")
    assert type(net).__name__ == name
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    again = command(folder, "checkpoint=run/best.ckpt", "evaluation=none", "evaluation.n=10", module="mi_at.evaluate")
    assert again.code == 0, again.err
    (other,) = (folder / "run/evaluations").rglob("record.json")
    assert read_record(other)["clean"].correct == record["clean"].correct


def test_an_option_of_its_own(folder: Path) -> None:
    run = ("run_dir=run", "model._target_=my_package.Net", "+model.hidden=7", "callback=ema", "defense=trades_awp")
    done = command(folder, *own(*run))
    assert (done.code, done.err) == (0, "")
    assert mi_at.load(folder / "run/best.ckpt").layers[1].out_features == 7  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Pair", ("model: Pair gives tuple", "digits has 10 classes", "return the logits alone")),
        ("Wide", ("model: Wide does not take images (2, 1, 8, 8) of digits",)),
        ("LazyWide", ("model: the size of layer layers.0 (LazyConv2d) ", "LazyWide does not take", "(2, 1, 8, 8)")),
        ("LazyUnused", ("model: a forward does not reach layer spare (LazyLinear)", "give the layer its size")),
        ("Needy", ("model: ", "depth")),
        ("NoModule", ("model._target_=my_package.NoModule: expected a torch.nn",)),
        ("Missing", ("model._target_=my_package.Missing", "importable class")),
    ],
)
def test_a_network_that_does_not_fit_is_refused(folder: Path, name: str, words: tuple[str, ...]) -> None:
    done = command(folder, *own(f"model._target_=my_package.{name}"))
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert not (folder / "runs").exists()


# ---------------------------------------------------------------- pictures
def make_pictures(root: Path, *, per_class: int, splits: tuple[str, ...] = ("",)) -> None:
    """Bright and dark pictures of several sizes, in colour and in grey."""
    random = np.random.default_rng(0)
    for split in splits:
        for name, level in (("bright", 200), ("dark", 40)):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                shape = (20 + number % 5, 24) if number % 2 else (18, 18, 3)
                pixels = (level + random.integers(-30, 30, shape)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.{'png' if number % 3 else 'jpg'}")


@pytest.mark.parametrize("splits", [("",), ("train", "test")], ids=["one folder", "train and test"])
def test_pictures_of_ones_own(tmp_path: Path, splits: tuple[str, ...]) -> None:
    make_pictures(tmp_path / "pictures", per_class=40, splits=splits)
    before = sorted((tmp_path / "pictures").rglob("*"))
    options = ["dataset=folder", "dataset.root=pictures", "dataset.image_size=16", "dataset.val_size=10"]
    options += ["dataset.train_size=40", "dataset.batch_size=8", "attack.eps=4/255", "attack.step_size=2/255"]
    options += ["run_dir=run", "optim.epochs=4", "optim.lr=0.05", "evaluation.n=10"]
    done = command(tmp_path, *tiny(*options))
    assert (done.code, done.err) == (0, "")
    record = read_record(tmp_path / "run/record.json")
    assert record.config["dataset"]["num_classes"] == 2
    assert record["clean"].accuracy >= 0.8, "bright and dark are easy to tell apart"
    assert sorted((tmp_path / "pictures").rglob("*")) == before
    net = mi_at.load(tmp_path / "run/best.ckpt")
    assert net(torch.rand(3, 3, 16, 16)).shape == (3, 2)
    moved = (tmp_path / "pictures").rename(tmp_path / "moved")
    overrides = ("checkpoint=run/best.ckpt", f"dataset.root={moved}", "evaluation=none", "evaluation.n=10")
    again = command(tmp_path, *overrides, module="mi_at.evaluate")
    assert again.code == 0, again.err
    (other,) = (tmp_path / "run/evaluations").rglob("record.json")
    assert read_record(other)["clean"].correct == record["clean"].correct
