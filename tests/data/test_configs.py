"""Every conf/dataset/*.yaml gives a data module of its class, and its figures are those of the class."""

from __future__ import annotations

import inspect
from fractions import Fraction
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from mi_at.data import CUSTOMARY_KEYS
from mi_at.data.base import ImageDataModule

FILES = sorted((Path(__file__).parents[2] / "conf" / "dataset").glob("*.yaml"))


def load(path: Path) -> DictConfig:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    config.root = "data" if OmegaConf.is_missing(config, "root") else config._get_node("root")
    return DictConfig(OmegaConf.merge({"seed": 5}, {"dataset": config})).dataset


def test_all_sets_are_there() -> None:
    names = ["cifar10", "cifar100", "digits", "fashion_mnist", "folder", "mnist", "svhn", "tiny_imagenet"]
    assert [path.stem for path in FILES] == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_instantiates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MI_AT_DATA", "/somewhere")
    config = load(path)
    cls = get_class(config._target_)
    assert issubclass(cls, ImageDataModule)
    assert config.name == path.stem == cls.NAME
    assert (config.num_classes, config.channels, config.image_size) == (
        cls.NUM_CLASSES,
        cls.CHANNELS,
        cls.IMAGE_SIZE,
    )
    options = {key: value for key, value in config.items() if key not in CUSTOMARY_KEYS}
    # Every option of the constructor is in the file, so that each can be overridden without a plus sign.
    assert set(options) - {"_target_"} == set(inspect.signature(cls).parameters)
    data = instantiate(options)
    assert data.seed == 5
    assert str(data.root) == ("data" if path.stem == "folder" else "/somewhere")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_customary_threat_model(path: Path) -> None:
    config = load(path)
    assert all(key in config for key in CUSTOMARY_KEYS)
    eps, step = Fraction(str(config.eps)), Fraction(str(config.step_size))
    assert config.norm == "linf"
    assert 0 < step <= eps < 1
    assert step * config.steps >= eps  # the attack can reach the border of its ball


@pytest.mark.parametrize(
    ("name", "val_size"),
    [
        ("digits", 180),
        ("mnist", 1000),
        ("fashion_mnist", 1000),
        ("cifar10", 2000),
        ("cifar100", 2000),
        ("svhn", 2000),
        ("tiny_imagenet", 2000),
    ],
)
def test_validation_sizes(name: str, val_size: int) -> None:
    assert load(next(path for path in FILES if path.stem == name)).val_size == val_size
