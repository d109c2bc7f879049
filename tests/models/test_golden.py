"""Golden outputs: the forward of every network is pinned, in evaluation and in training mode.

Weights, batch-norm statistics and the input come from sines, so the numbers depend on no random generator,
and everything runs in float64, so they hold on any platform. After a change that is meant to change the
numbers: `python -m tests.models.test_golden`, and say in the commit why.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mi_at.models import Classifier
from tests.models.helpers import NAMES, build

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "models.json"
WIDTH = {"cnn4": 0.25, "cnn_tiny": 0.25, "vgg16": 0.0625, "vgg19": 0.0625, "resnet18": 0.125}
DEFAULT_WIDTH = 0.0625
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


def wave(shape: torch.Size | tuple[int, ...], phase: float) -> Tensor:
    """sin(0.7 i^1.1 + phase) over the flat index i, float64: values in [-1, 1] that do not repeat."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * index.pow(1.1) + phase).view(shape)


@torch.no_grad()
def sine_weights(net: Classifier) -> Classifier:
    """Fill every parameter and every batch-norm statistic of the network, in the order of its modules."""
    net = net.double()
    layers = [m for m in net.modules() if isinstance(m, LAYERS)]
    for phase, layer in enumerate(layers):
        weight = layer.weight
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            weight.copy_(1 + 0.2 * wave(weight.shape, phase))
            layer.running_mean.copy_(0.1 * wave(weight.shape, phase + 0.1))
            layer.running_var.copy_(1 + 0.2 * wave(weight.shape, phase + 0.2))
        else:
            weight.copy_((4 / weight[0].numel()) ** 0.5 * wave(weight.shape, phase))
        if layer.bias is not None:
            layer.bias.copy_(0.1 * wave(layer.bias.shape, phase + 0.3))
    assert sum(p.numel() for m in layers for p in m.parameters()) == sum(p.numel() for p in net.parameters())
    return net


def outputs(name: str) -> dict[str, list[float] | float]:
    channels, size = {"cnn4": (1, 28), "cnn_tiny": (1, 8)}.get(name, (3, 32))
    net = build(name, channels=channels, size=size, width=WIDTH.get(name, DEFAULT_WIDTH))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net = sine_weights(net)
    x = 0.5 + 0.5 * wave((3, channels, size, size), 0.0)
    logits, taps = net.eval().forward_taps(x)
    return {
        "eval": logits[0, :4].tolist(),
        "eval_sum_of_squares": logits.square().sum().item(),
        "features_sum_of_squares": taps["features"].square().sum().item(),
        "last_conv_sum": taps["last_conv"].sum().item(),
        "train": net.train()(x)[0, :4].tolist(),
    }


@pytest.mark.parametrize("name", NAMES)
def test_golden_output(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, f"a new network: run `python -m tests.models.test_golden` to add {name}"
    found = outputs(name)
    assert found.keys() == golden[name].keys()
    for key, value in found.items():
        assert value == pytest.approx(golden[name][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs_can_tell_networks_apart(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len({round(value, 4) for value in golden[name]["eval"]}) == 4
    others = [golden[other]["eval"] for other in NAMES if other != name]
    assert golden[name]["eval"] not in others


if __name__ == "__main__":
    rounded = {
        name: {
            key: [round(v, 8) for v in value] if isinstance(value, list) else round(value, 8)
            for key, value in outputs(name).items()
        }
        for name in NAMES
    }
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
