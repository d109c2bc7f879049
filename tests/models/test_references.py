"""The forward of each family against something that was not written for it.

ResNet and VGG against torchvision's networks with the weights carried over; the pre-activation families
against a literal transcription of their equations on the state dict.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.models import Classifier
from tests.models.helpers import build
from tests.models.test_golden import sine_weights, wave

torchvision = pytest.importorskip("torchvision")

X = 0.5 + 0.5 * wave((2, 3, 32, 32), 0.0)


def carry_over(source: nn.Module, target: nn.Module) -> None:
    """Copy the state tensor by tensor, in order."""
    state = source.state_dict()
    target_state = target.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in target_state.values()]
    target.load_state_dict(dict(zip(target_state, state.values(), strict=True)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [False, True])
def test_resnet_is_torchvisions_with_a_small_stem(name: str, training: bool) -> None:
    ours = sine_weights(build(name, width=1.0 if name == "resnet18" else 0.5)).train(training)
    kind = torchvision.models.resnet
    if name == "resnet18":
        theirs = kind.ResNet(kind.BasicBlock, [2, 2, 2, 2], num_classes=10)
        stem = 64
    else:  # torchvision's width_per_group narrows the 3x3 convolutions only, so take the blocks one by one
        theirs = half_resnet50()
        stem = 32
    theirs.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs = theirs.double().train(training)
    carry_over(ours, theirs)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-9, atol=1e-9)


def half_resnet50() -> nn.Module:
    kind = torchvision.models.resnet
    net = kind.ResNet(kind.Bottleneck, [3, 4, 6, 3], num_classes=10)
    net.bn1 = nn.BatchNorm2d(32)
    net.fc = nn.Linear(1024, 10)
    net.inplanes = 32
    for i, (planes, depth) in enumerate(zip((32, 64, 128, 256), (3, 4, 6, 3), strict=True), start=1):
        setattr(net, f"layer{i}", net._make_layer(kind.Bottleneck, planes, depth, stride=1 if i == 1 else 2))
    return net


@pytest.mark.parametrize(("name", "size"), [("vgg16", 32), ("vgg19", 32), ("vgg16", 64)])
def test_vggs_convolutions_are_torchvisions(name: str, size: int) -> None:
    ours = sine_weights(build(name, size=size)) if name == "vgg19" else sine_weights(headless_vgg16(size))
    ours = ours.eval()
    theirs = getattr(torchvision.models, f"{name}_bn")(num_classes=10, init_weights=False).features.double().eval()
    carry_over(ours.get_submodule("blocks"), theirs)
    x = X if size == 32 else 0.5 + 0.5 * wave((1, 3, 64, 64), 0.0)
    _, taps = ours.forward_taps(x)
    torch.testing.assert_close(taps["block5"], theirs(x), rtol=1e-9, atol=1e-9)
    if name == "vgg19":
        torch.testing.assert_close(ours(x), ours.head(theirs(x).mean(dim=(2, 3))), rtol=1e-9, atol=1e-9)


def headless_vgg16(size: int) -> Classifier:
    """VGG16 with hidden layers of 4 units: the full ones take a second to fill."""
    from mi_at.models.vgg import VGG16

    class Headless(VGG16):
        hidden = (4, 4)

    return Headless(num_classes=10, in_channels=3, image_size=size)


def test_vgg16s_hidden_layers() -> None:
    """ib_rar: linear - batch norm - ReLU, twice, and one linear layer; no dropout."""
    net = sine_weights(build("vgg16", width=0.0625)).eval()
    logits, taps = net.forward_taps(X)
    state = net.state_dict()
    h = taps["block5"].mean(dim=(2, 3))
    for i in range(2):
        h = F.linear(h, state[f"fcs.{i}.0.weight"], state[f"fcs.{i}.0.bias"])
        h = F.batch_norm(
            h,
            state[f"fcs.{i}.1.running_mean"],
            state[f"fcs.{i}.1.running_var"],
            state[f"fcs.{i}.1.weight"],
            state[f"fcs.{i}.1.bias"],
        ).relu()
        torch.testing.assert_close(taps[f"fc{i + 1}"], h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, F.linear(h, state["head.weight"], state["head.bias"]))


def preactivation(
    state: dict[str, Tensor], x: Tensor, strides: list[int], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """x_{l+1} = h(x_l) + W2 a(BN(W1 a(BN(x_l)))), h a 1x1 convolution of a(BN(x_l)) where the shape
    changes."""

    def bn(h: Tensor, name: str) -> Tensor:
        shift, scale = state[f"{name}.running_mean"], (state[f"{name}.running_var"] + 1e-5).sqrt()
        h = (h - shift.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1)
        return h * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)

    x = F.conv2d(x, state["stem.weight"], padding=1)
    for i, stride in enumerate(strides):
        a = activation(bn(x, f"blocks.{i}.bn1"))
        h = F.conv2d(a, state[f"blocks.{i}.conv1.weight"], stride=stride, padding=1)
        h = F.conv2d(activation(bn(h, f"blocks.{i}.bn2")), state[f"blocks.{i}.conv2.weight"], padding=1)
        projection = state.get(f"blocks.{i}.projection.weight")
        x = h + (x if projection is None else F.conv2d(a, projection, stride=stride))
    features = activation(bn(x, "bn")).mean(dim=(2, 3))
    return F.linear(features, state["head.weight"], state["head.bias"])


STRIDES = {
    "preact_resnet18": [1, 1, 2, 1, 2, 1, 2, 1],
    "preact_resnet34": [1] * 3 + [2, 1, 1, 1] + [2, 1, 1, 1, 1, 1] + [2, 1, 1],
    "wrn28_10": [1, 1, 1, 1] + [2, 1, 1, 1] * 2,
    "wrn34_10": [1, 1, 1, 1, 1] + [2, 1, 1, 1, 1] * 2,
}


@pytest.mark.parametrize("activation", ["relu", "swish"])
@pytest.mark.parametrize("name", sorted(STRIDES))
def test_preactivation_networks_follow_their_equations(name: str, activation: str) -> None:
    net = sine_weights(build(name, width=0.125 if "resnet" in name else 0.0625, activation=activation)).eval()
    function = {"relu": torch.relu, "swish": lambda h: h * torch.sigmoid(h)}[activation]
    expected = preactivation(net.state_dict(), X, STRIDES[name], function)
    torch.testing.assert_close(net(X), expected, rtol=1e-9, atol=1e-9)
