"""Every network of conf/model: shapes, taps, gate, checks of the input, options."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from torch import Tensor, nn

from mi_at.models import Classifier, Normalize
from tests.models.helpers import NAMES, RESNETS, build, narrow

BLOCKS = {"resnet18": 8, "resnet50": 16, "preact_resnet18": 8, "preact_resnet34": 16}
BLOCKS |= {"wrn28_10": 12, "wrn34_10": 15, "vgg16": 5, "vgg19": 5}


def blocks(first: int, last: int) -> list[str]:
    return [f"block{i}" for i in range(first, last + 1)]


# ---------------------------------------------------------------- any image
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_takes_any_image(name: str, size: int, channels: int) -> None:
    net = narrow(name, classes=7, channels=channels, size=size).eval()
    x = torch.rand(2, channels, size, size)
    features = net.features(x)
    assert features.shape == (2, net.feature_dim)
    logits = net(x)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.equal(logits, net.head(features))
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", NAMES)
def test_takes_images_that_are_not_square(name: str) -> None:
    net = narrow(name, size=[24, 40]).eval()
    assert net.image_size == (24, 40)
    assert net(torch.rand(2, 3, 24, 40)).shape == (2, 10)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 11])
def test_cnn_tiny_takes_small_images(size: int) -> None:
    assert narrow("cnn_tiny", channels=1, size=size)(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", [*RESNETS, "vgg16", "vgg19"])
def test_deep_networks_take_8_pixels(name: str) -> None:
    assert narrow(name, channels=1, size=8).eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_cnn4_says_which_images_are_too_small() -> None:
    assert narrow("cnn4", size=16)(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    with pytest.raises(InstantiationException, match="image_size is 15x16, but CNN4 needs at least 16x16"):
        narrow("cnn4", size=[15, 16])


# ---------------------------------------------------------------- taps
def expected_taps(name: str) -> list[str]:
    if name == "cnn4":
        return ["conv1", "conv2", "conv3", "last_conv", "conv4", "fc1", "fc2", "features"]
    if name == "cnn_tiny":
        return ["conv1", "conv2", "last_conv", "conv3", "fc1", "features"]
    n = BLOCKS[name]
    if name.startswith("resnet"):
        return ["stem", *blocks(1, n - 1), "last_conv", f"block{n}", "features"]
    if name.startswith("vgg"):
        hidden = ["fc1", "fc2"] if name == "vgg16" else []
        return [*blocks(1, 4), "last_conv", "block5", *hidden, "features"]
    return ["stem", *blocks(1, n), "last_conv", "features"]


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_ordered_and_leave_the_forward_as_it_is(name: str) -> None:
    net = narrow(name).eval()
    x = torch.rand(3, 3, 32, 32)
    logits, taps = net.forward_taps(x)
    assert torch.equal(logits, net(x))
    assert list(taps) == list(net.tap_names) == expected_taps(name)
    assert type(taps) is dict
    assert torch.equal(taps["features"], net.features(x))
    assert taps["last_conv"].ndim == 4
    assert taps["last_conv"].shape[:2] == (3, net.last_conv_channels)
    assert all(tap.shape[0] == 3 for tap in taps.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_network_records_its_taps_in_the_order_of_tap_names(name: str) -> None:
    net = narrow(name).eval()
    taps: dict[str, Tensor] = {}
    net.body(torch.rand(2, 3, 32, 32), taps)
    assert list(taps) == list(net.tap_names)


@pytest.mark.parametrize("name", NAMES)
def test_relu_taps_are_not_negative(name: str) -> None:
    """A tap is recorded after its activation; stem and blocks of pre-activation networks are bare by
    design."""
    net = narrow(name).eval()
    _, taps = net.forward_taps(torch.rand(3, 3, 32, 32))
    bare = {"stem", *blocks(1, 16)} if name.startswith(("preact", "wrn")) else set()
    for tap, value in taps.items():
        assert bool((value < 0).any()) == (tap in bare), tap


def test_shapes_of_the_taps_that_papers_name() -> None:
    x = torch.rand(2, 3, 32, 32)
    _, taps = build("resnet18", width=0.0625).eval().forward_taps(x)
    assert [tuple(taps[name].shape[1:]) for name in ("stem", "block2", "block4", "block6", "block8")] == [
        (4, 32, 32),
        (4, 32, 32),
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
    ]
    _, taps = build("vgg16", width=0.0625).eval().forward_taps(x)
    assert [tuple(taps[f"block{i}"].shape[1:]) for i in range(1, 6)] == [
        (4, 16, 16),
        (8, 8, 8),
        (16, 4, 4),
        (32, 2, 2),
        (32, 1, 1),
    ]
    assert taps["fc1"].shape == taps["fc2"].shape == (2, 256)
    assert taps["last_conv"].shape == (2, 32, 2, 2)
    _, taps = build("wrn28_10", width=0.025).eval().forward_taps(x)
    assert [tuple(taps[name].shape[1:]) for name in ("stem", "block4", "block8", "block12", "last_conv")] == [
        (4, 32, 32),
        (4, 32, 32),
        (8, 16, 16),
        (16, 8, 8),
        (16, 8, 8),
    ]
    _, taps = build("cnn4", channels=1, size=28).eval().forward_taps(torch.rand(2, 1, 28, 28))
    assert [tuple(taps[f"conv{i}"].shape[1:]) for i in range(1, 5)] == [
        (32, 26, 26),
        (32, 24, 24),
        (64, 10, 10),
        (64, 8, 8),
    ]
    assert taps["fc1"].shape == taps["fc2"].shape == (2, 200)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_names_count_every_layer_once(name: str) -> None:
    net = narrow(name)
    once = [tap for tap in expected_taps(name) if tap != "last_conv"]
    if not name.startswith(("resnet", "preact", "wrn")):
        once.remove("features")
    assert list(net.hidden_names) == once


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_from_every_tap_to_input_and_weights(name: str) -> None:
    net = narrow(name, **({"dropout": 0.0} if name == "cnn4" else {})).train()
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    first = next(net.parameters())
    _, taps = net.forward_taps(x)
    for tap, value in taps.items():
        grad_x, grad_weight = torch.autograd.grad(value.square().sum(), [x, first], retain_graph=True)
        assert grad_x.abs().sum() > 0, tap
        assert grad_weight.abs().sum() > 0, tap


@pytest.mark.parametrize("name", NAMES)
def test_taps_and_logits_are_one_forward(name: str) -> None:
    net = narrow(name, **({"dropout": 0.0} if name == "cnn4" else {})).train()
    twin = copy.deepcopy(net)
    x = torch.rand(4, 3, 32, 32)
    logits, _ = net.forward_taps(x)
    assert torch.equal(logits, twin(x))
    state, expected = net.state_dict(), twin.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(int(v) == 1 for key, v in state.items() if key.endswith("num_batches_tracked"))


def test_asked_taps_only_in_the_order_of_the_network() -> None:
    net = narrow("resnet18").eval()
    _, taps = net.forward_taps(torch.rand(2, 3, 32, 32), ["features", "block3"])
    assert list(taps) == ["block3", "features"]
    _, taps = net.forward_taps(torch.rand(2, 3, 32, 32), [])
    assert taps == {}


def test_unused_activations_are_freed_during_the_forward() -> None:
    """Only the tap that was asked for outlives the body, so a big batch without gradients fits."""
    net = narrow("resnet18").eval()
    alive: list[weakref.ref[Tensor]] = []
    for block in net.get_submodule("blocks").children():
        block.register_forward_hook(lambda _m, _i, out: alive.append(weakref.ref(out)))
    count: list[int] = []
    net.head.register_forward_hook(lambda *_: count.append(sum(ref() is not None for ref in alive)))
    with torch.no_grad():
        _, taps = net.forward_taps(torch.rand(2, 3, 32, 32), ["block2"])
    assert count == [1]
    assert alive[1]() is taps["block2"]


@pytest.mark.parametrize("name", NAMES)
def test_no_taps_no_cost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = narrow(name).eval()
    seen: list[object] = []
    body = net.body

    def spy(x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        seen.append(taps)
        return body(x, taps)

    monkeypatch.setattr(net, "body", spy)
    x = torch.rand(2, 3, 32, 32)
    net(x)
    net.features(x)
    assert seen == [None, None]


def test_an_unknown_tap_is_named() -> None:
    net = narrow("cnn_tiny")
    with pytest.raises(ValueError, match=r"CNNTiny has no tap \['block1'\]; its taps are \['conv1'"):
        net.forward_taps(torch.rand(1, 3, 32, 32), ["conv1", "block1"])
    with pytest.raises(ValueError, match="expected a list of taps"):
        net.forward_taps(torch.rand(1, 3, 32, 32), "conv1")


# ---------------------------------------------------------------- the gate after the last convolution
class Mask(nn.Module):
    """What ib_rar puts there: one factor per channel."""

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.keep.view(1, -1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_on_the_last_convolution_reaches_everything_behind_it(name: str) -> None:
    net = narrow(name).eval()
    x = torch.rand(4, 3, 32, 32)
    logits, taps = net.forward_taps(x)
    channel = int(taps["last_conv"].sum(dim=(0, 2, 3)).argmax())
    keep = torch.ones(net.last_conv_channels)
    net.last_conv_gate = Mask(keep)
    assert torch.equal(net(x), logits)
    keep[channel] = 0
    masked_logits, masked = net.forward_taps(x)
    assert not torch.equal(masked_logits, logits)
    assert torch.equal(masked["last_conv"], taps["last_conv"])  # ungated, so a masked channel can come back
    behind = net.tap_names[net.tap_names.index("last_conv") + 1 :]
    for tap in behind:
        if masked[tap].shape[1] == net.last_conv_channels and not tap.startswith("fc"):
            assert taps[tap][:, channel].abs().sum() > 0, tap
            assert masked[tap][:, channel].abs().sum() == 0, tap
    before = net.tap_names[: net.tap_names.index("last_conv")]
    assert all(torch.equal(masked[tap], taps[tap]) for tap in before)


@pytest.mark.parametrize("name", NAMES)
def test_an_all_zero_mask_silences_the_convolutions(name: str) -> None:
    """Nothing but the gate leads from the convolutions to the logits: no sample differs any more."""
    net = narrow(name).eval()
    net.last_conv_gate = Mask(torch.zeros(net.last_conv_channels))
    logits = net(torch.rand(4, 3, 32, 32))
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


# ---------------------------------------------------------------- checks of the input
def test_a_wrong_input_names_what_was_found_and_expected() -> None:
    net = narrow("resnet18")
    with pytest.raises(ValueError, match=r"found images with channels=1 .* expected channels=3.*in_channels=1"):
        net(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"found images of 28x28 pixels, expected 32x32.*image_size=\[28,28\]"):
        net(torch.rand(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"found an input of shape \[3, 32, 32\], expected 4 dimensions"):
        net.features(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"found an input of torch.uint8, expected floats in \[0, 1\]"):
        net.forward_taps(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "num_classes is 1, expected at least 2"),
        ({"channels": 0}, "in_channels is 0, expected at least 1"),
        ({"size": 1}, "image_size is 1x1, but CNNTiny needs at least 2x2"),
        ({"size": [8, 8, 8]}, r"image_size is \[8, 8, 8\], expected one number or"),
        ({"width": 0}, "width is 0, expected a multiplier > 0"),
        ({"width": -1.0}, "width is -1.0, expected a multiplier > 0"),
        ({"width": float("nan")}, "width is nan, expected a multiplier > 0"),
        ({"activation": "gelu"}, r"activation is 'gelu', expected one of \['relu', 'swish'\]"),
        ({"mean": 0.5}, "mean is 0.5 and std is None: give both"),
        ({"mean": [0.5, 0.5], "std": 1.0}, "mean has 2 values, expected 3"),
        ({"mean": 0.5, "std": [0.2, 0.2]}, "std has 2 values, expected 3"),
        ({"mean": 0.5, "std": 0.0}, r"std is \[0.0, 0.0, 0.0\], expected every value > 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InstantiationException) as caught:
        build("cnn_tiny", **options)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match=message):
        raise caught.value.__cause__


def test_dropout_and_init_are_checked() -> None:
    with pytest.raises(InstantiationException, match=r"dropout is 1.0, expected a probability in \[0, 1\)"):
        build("cnn4", dropout=1.0)
    with pytest.raises(InstantiationException, match=r"dropout is -0.1, expected a probability in \[0, 1\)"):
        build("wrn28_10", width=0.1, dropout=-0.1)
    with pytest.raises(InstantiationException, match=r"init is 'xavier', expected one of \['kaiming', 'pytorch'\]"):
        build("resnet18", width=0.1, init="xavier")


# ---------------------------------------------------------------- normalisation
@pytest.mark.parametrize("name", NAMES)
def test_no_normalisation_by_default(name: str) -> None:
    assert isinstance(narrow(name).normalize, nn.Identity)


def test_normalisation_is_the_first_layer_and_holds_no_parameters() -> None:
    plain = narrow("resnet18").eval()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    normalised = narrow("resnet18", mean=mean, std=std).eval()
    assert isinstance(normalised.normalize, Normalize)
    assert [name for name, _ in normalised.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert set(normalised.state_dict()) - set(plain.state_dict()) == {"normalize.mean", "normalize.std"}
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.equal(normalised(x), plain(by_hand))
    assert torch.equal(normalised.features(x), plain.features(by_hand))
    assert torch.equal(normalised.forward_taps(x)[1]["stem"], plain.forward_taps(by_hand)[1]["stem"])


# ---------------------------------------------------------------- options
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("wrn", "preact"))] + ["cnn_tiny"])
def test_swish_replaces_every_relu(name: str) -> None:
    relu, swish = narrow(name).eval(), narrow(name, activation="swish").eval()
    assert not any(isinstance(m, nn.ReLU) for m in swish.modules())
    assert sum(isinstance(m, nn.SiLU) for m in swish.modules()) == sum(isinstance(m, nn.ReLU) for m in relu.modules())
    swish.load_state_dict(relu.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(swish(x), relu(x))


@pytest.mark.parametrize(("name", "dropout"), [("cnn4", 0.5), ("wrn28_10", 0.3)])
def test_dropout_acts_in_training_only(name: str, dropout: float) -> None:
    net, x = narrow(name, dropout=dropout), torch.rand(4, 3, 32, 32)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), net(x))
    assert torch.equal((without := narrow(name, dropout=0.0).train())(x), without(x))


def test_cnn_tiny_has_batch_norm_only_when_asked() -> None:
    assert not any(isinstance(m, nn.BatchNorm2d) for m in narrow("cnn_tiny").modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in narrow("cnn_tiny", batch_norm=True).modules()) == 3


def test_width_scales_every_layer_but_input_and_output() -> None:
    full, half = build("vgg16", width=0.25), build("vgg16", width=0.125)
    for (name, a), (_, b) in zip(full.named_parameters(), half.named_parameters(), strict=True):
        assert a.shape[0] == 2 * b.shape[0] or name.startswith("head."), name
    assert narrow("resnet18", width=0.001).last_conv_channels == 4


def test_cnn4_starts_with_a_head_of_zeros() -> None:
    net = build("cnn4")
    assert not net.head.weight.any()
    assert not net.head.bias.any()
    assert net(torch.rand(2, 3, 32, 32)).abs().max() == 0


@pytest.mark.parametrize("name", RESNETS)
def test_convolutions_start_he_normal_with_fan_out(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, width=0.25)
    conv = max((m for m in net.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert not net.head.bias.any()
    default = build(name, width=0.25, init="pytorch")
    assert default.head.bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_network_and_it_travels(name: str) -> None:
    net, twin = narrow(name).eval(), narrow(name).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x), twin(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    net = narrow(name).eval()
    x = torch.rand(2, 3, 32, 32)
    expected = net(x)
    found = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_one_linear_layer(name: str) -> None:
    net = narrow(name, classes=5)
    assert isinstance(net, Classifier)
    assert isinstance(net.head, nn.Linear)
    assert (net.head.in_features, net.head.out_features) == (net.feature_dim, 5)
