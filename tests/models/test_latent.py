"""The stochastic layer between features and head: what it draws, when it draws, and how a network takes it in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.contexts import attacking
from mi_at.functional import random
from mi_at.models.latent import CHOICES, TAPS, StochasticLatent, latent_size, latent_takes
from tests.models.helpers import NAMES, build, narrow

SIZES = {"cnn4": 128, "resnet18": 256, "wrn34_10": 320, "wrn28_10": 320, "preact_resnet18": 256, "cnn_tiny": 64}


def layer(**options: object) -> tuple[StochasticLatent, Tensor]:
    torch.manual_seed(0)
    return StochasticLatent(6, 4, **options), torch.randn(5, 6)  # type: ignore[arg-type]


def images(name: str, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the layer
def test_mean_and_deviation_are_the_halves_of_one_linear_layer() -> None:
    latent, h = layer()
    out = h @ latent.linear.weight.T + latent.linear.bias
    mu, sigma = latent.distribution(h)
    torch.testing.assert_close(mu, out[:, :4])
    torch.testing.assert_close(sigma, (1 + out[:, 4:].exp()).log() + 1e-3)


def test_the_offset_makes_the_start_narrow() -> None:
    latent, h = layer(std_offset=5.0)
    wide, _ = layer()
    torch.testing.assert_close(latent.distribution(h)[0], wide.distribution(h)[0])
    raw = wide.linear(h)[:, 4:]
    torch.testing.assert_close(latent.distribution(h)[1], F.softplus(raw - 5) + 1e-3)


def test_sigma_is_above_its_floor_whatever_comes_in() -> None:
    latent, h = layer()
    sigma = latent.distribution(1e4 * h)[1]
    assert sigma.min() >= 1e-3
    assert sigma.isfinite().all()


def test_a_sample_is_mean_plus_deviation_times_noise() -> None:
    latent, h = layer()
    ids = torch.arange(5)
    mu, sigma = latent.distribution(h)
    with random.keyed(ids, 3):
        z = latent(h)
    with random.keyed(ids, 3):
        noise = random.normal_like(mu)
    torch.testing.assert_close(z, mu + sigma * noise)
    assert noise.abs().max() > 0.1


def test_samples_have_the_stated_distribution() -> None:
    latent, h = layer()
    many = h[:1].expand(40_000, 6)
    with random.keyed(torch.arange(40_000), 0), torch.no_grad():
        z = latent(many)
    mu, sigma = latent.distribution(h[:1])
    torch.testing.assert_close(z.mean(dim=0), mu[0], rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(dim=0), sigma[0], rtol=0.03, atol=0)


def test_noise_belongs_to_the_sample_and_not_to_its_batch() -> None:
    latent, h = layer()
    with random.keyed(torch.arange(5), 3):
        whole = latent(h)
    with random.keyed(torch.tensor([2, 3]), 3):
        part = latent(h[2:4])
    torch.testing.assert_close(whole[2:4], part, rtol=0, atol=1e-6)
    with random.keyed(torch.arange(5), 4):
        assert not torch.equal(latent(h), whole)


def test_train_draws_and_eval_takes_the_mean() -> None:
    latent, h = layer()
    assert not torch.equal(latent.train()(h), latent(h))
    assert torch.equal(latent.eval()(h), latent.distribution(h)[0])
    drawing, _ = layer(test="sample")
    assert not torch.equal(drawing.eval()(h), drawing(h))
    assert drawing.train().samples
    assert drawing.eval().samples


@pytest.mark.parametrize("test", CHOICES)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_decides_over_mode_and_option(test: str, training: bool) -> None:
    latent, _ = layer(test=test)
    latent.train(training)
    before = latent.samples
    with latent.using("mean"):
        assert not latent.samples
        with latent.using("sample"):
            assert latent.samples
        assert not latent.samples
    assert latent.samples == before
    with pytest.raises(KeyError), latent.using("sample"):
        raise KeyError
    assert latent.samples == before


def test_gradients_reach_both_halves_and_the_features() -> None:
    latent, h = layer()
    h.requires_grad_(True)
    with random.keyed(torch.arange(5), 0):
        latent(h).sum().backward()
    assert latent.linear.weight.grad is not None
    assert h.grad is not None
    assert (latent.linear.weight.grad.abs().sum(dim=1) > 0).all()
    assert (h.grad.abs().sum(dim=1) > 0).all()


def test_it_computes_in_float32_under_autocast_and_in_float64_where_given() -> None:
    latent, h = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mu, sigma = latent.eval().distribution(h)
        rounded, _ = latent.distribution(h.bfloat16())
    assert mu.dtype == sigma.dtype == rounded.dtype == torch.float32
    assert torch.equal(mu, latent.distribution(h)[0])
    wide = latent.double().train()
    with random.keyed(torch.arange(5), 0):
        assert wide(h.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticLatent(6, 0), "latent of size 0 on features of size 6: expected 1 or more"),
        (lambda: StochasticLatent(6, 2, test="mode"), "latent 'mode': expected one of mean, sample"),
        (lambda: StochasticLatent(6, 2, std_offset=float("nan")), "std_offset=nan: expected a finite number"),
        (lambda: layer()[0].using("both").__enter__(), "latent 'both': expected one of mean, sample"),
    ],
)
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# ---------------------------------------------------------------- in a network
@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_it(name: str) -> None:
    net = narrow(name)
    taps, hidden = net.tap_names, net.hidden_names
    x = images(name)
    plain = net.eval()(x)
    assert torch.equal(plain, net.head(net.features(x))), "identity until a method asks for it"
    latent = net.insert_latent(dim=7)
    assert net.latent is latent
    assert net.tap_names == (*taps, *TAPS)
    assert net.hidden_names == (*hidden, "latent")
    assert (net.head.in_features, net.head.out_features) == (7, 10)
    logits, found = net.eval().forward_taps(x)
    assert tuple(found) == net.tap_names
    assert torch.equal(logits, net(x))
    assert torch.equal(found["latent"], found["latent_mean"])
    torch.testing.assert_close(found["latent_mean"], latent.distribution(found["features"])[0])
    torch.testing.assert_close(logits, net.head(found["latent"]))
    assert tuple(net.forward_taps(x, ["latent_std", "features"])[1]) == ("features", "latent_std")


@pytest.mark.parametrize("name", sorted(SIZES))
def test_the_sizes_are_those_the_paper_states(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    before = sum(p.numel() for p in net.head.parameters())
    latent = net.insert_latent()
    assert latent.dim == SIZES[name] == latent_size(net.feature_dim)
    if name == "resnet18":  # shared_info's "0.26M"
        assert sum(p.numel() for p in latent.parameters()) == 512 * 512 + 512
        assert sum(p.numel() for p in net.head.parameters()) == 256 * 10 + 10 < before


def test_drawn_and_mean_forwards_agree_with_their_taps() -> None:
    net = narrow("cnn_tiny")
    net.insert_latent()
    x = images("cnn_tiny")
    with random.keyed(torch.arange(3), 0):
        logits, taps = net.train().forward_taps(x, TAPS)
    with random.keyed(torch.arange(3), 0):
        assert torch.equal(net(x), logits)
    assert not torch.equal(taps["latent"], taps["latent_mean"])
    with attacking(net):
        assert torch.equal(net(x), net(x))
    with attacking(net, "train_no_track"):
        assert not torch.equal(net(x), net(x))
        with latent_takes(net, "mean"):
            assert torch.equal(net(x), net(x))


def test_put_in_twice_it_stays_and_another_one_is_refused() -> None:
    net = narrow("cnn_tiny")
    first = net.insert_latent(dim=5)
    state = copy.deepcopy(net.state_dict())
    assert net.insert_latent(dim=5) is first
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert len(net.tap_names) == len(set(net.tap_names))
    for options in ({"dim": 6}, {"dim": 5, "std_offset": 1.0}, {"dim": 5, "test": "sample"}):
        with pytest.raises(ValueError, match=r"already has a stochastic latent .*: build the network anew"):
            net.insert_latent(**options)  # type: ignore[arg-type]


def test_it_has_the_type_of_the_network() -> None:
    net = narrow("cnn_tiny").double()
    net.insert_latent()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert net(images("cnn_tiny").double()).dtype == torch.float64


def test_a_network_without_one_is_left_alone() -> None:
    net = nn.Linear(2, 2)
    with latent_takes(net, "sample"):
        assert net(torch.ones(1, 2)).shape == (1, 2)
