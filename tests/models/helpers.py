"""The networks of conf/model, built as a user's configuration builds them."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mi_at.models import Classifier

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
RESNETS = [name for name in NAMES if "resnet" in name or "wrn" in name]


def config(name: str, *, classes: int = 10, channels: int = 3, size: Any = 32, **overrides: Any) -> Any:
    """conf/model/<name>.yaml with the data set's values filled in."""
    root = OmegaConf.create({"dataset": {"num_classes": classes, "channels": channels, "image_size": size}})
    root.model = OmegaConf.load(CONF / f"{name}.yaml")
    OmegaConf.set_struct(root, True)
    for key, value in overrides.items():
        OmegaConf.update(root.model, key, value)
    return root.model


def build(name: str, *, classes: int = 10, channels: int = 3, size: Any = 32, **overrides: Any) -> Classifier:
    """The network of conf/model/<name>.yaml."""
    net: Classifier = instantiate(config(name, classes=classes, channels=channels, size=size, **overrides))
    return net


def narrow(name: str, **options: Any) -> Classifier:
    """The same, narrow enough for tests, with a head that is not zero."""
    torch.manual_seed(0)
    net = build(name, **{"width": 0.25 if name.startswith("cnn") else 0.03, **options})
    if not net.head.weight.any():
        torch.nn.init.normal_(net.head.weight)
    return net
