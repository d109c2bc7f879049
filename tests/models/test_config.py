"""conf/model: every file stands alone and names real options."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from mi_at.models import Classifier
from tests.models.helpers import CONF, NAMES, config


def snake(class_name: str) -> str:
    return class_name.lower().replace("_", "")


def test_the_ten_networks_of_the_papers_are_there() -> None:
    expected = "cnn4 cnn_tiny preact_resnet18 preact_resnet34 resnet18 resnet50 vgg16 vgg19 wrn28_10 wrn34_10"
    assert set(expected.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_lists_every_option_with_its_default(name: str) -> None:
    written = config(name)
    node = OmegaConf.to_container(written)
    assert isinstance(node, dict)
    net_class = get_class(str(node.pop("_target_")))
    assert issubclass(net_class, Classifier)
    assert snake(net_class.__name__) == name.replace("_", "")
    parameters = inspect.signature(net_class).parameters
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
    assert set(node) == set(parameters)
    for option, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert written[option] == parameter.default, option


@pytest.mark.parametrize("name", NAMES)
def test_instantiates_full_size(name: str) -> None:
    with torch.device("meta"):
        net = instantiate(config(name, classes=100, channels=1, size=64))
    assert (net.num_classes, net.in_channels, net.image_size) == (100, 1, (64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_takes_lists_as_omegaconf_gives_them(name: str) -> None:
    overrides: dict[str, Any] = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "width": 0.05}
    net = instantiate(config(name, size=[32, 48], **overrides)).eval()
    assert net(torch.rand(2, 3, 32, 48)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_a_comment_says_where_the_network_is_from(name: str) -> None:
    first = (CONF / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "arXiv:" in first or "our own" in first


def test_models_need_torch_alone() -> None:
    """The package imports without Lightning, Hydra and the rest."""
    code = """
import sys
for name in ("pytorch_lightning", "lightning", "hydra", "omegaconf", "torchvision", "torchmetrics", "wandb"):
    sys.modules[name] = None
import torch, mi_at.models
from mi_at.models import cnn, preact_resnet, resnet, vgg, wide_resnet
print(cnn.CNNTiny(num_classes=3, in_channels=1, image_size=8)(torch.rand(2, 1, 8, 8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([2, 3])"
