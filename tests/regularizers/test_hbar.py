"""HBaR: the HSIC bottleneck of all hidden layers on the clean forward, on any defense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.base import Views
from mi_at.regularizers.hbar import HsicBottleneck
from tests.references import hsic as ref

K, M = 3, 8
HIDDEN = ("conv1", "conv2", "conv3", "fc1")


def network() -> CNNTiny:
    torch.manual_seed(0)
    return CNNTiny(num_classes=K, in_channels=1, image_size=8, width=0.4).double()


def batch_of(m: int = M) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(m, 1, 8, 8, generator=generator, dtype=torch.float64)
    adversarial = (x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return Batch(x=x, y=torch.arange(m) % K, index=torch.arange(m), views={"adversarial": adversarial})


def attached(defense: Defense, **options: Any) -> Defense:
    return defense.attach(network(), regularizers={"hbar": HsicBottleneck(**options)})


def seen(defense: Defense, batch: Batch) -> tuple[Views, dict[str, Tensor]]:
    views = Views(defense.net, batch, defense.needed_taps)
    return views, defense.all_terms(views)


def rows(tensor: Tensor) -> list[list[float]]:
    return tensor.detach().double().flatten(1).tolist()


@pytest.mark.parametrize("base", [StandardAT, CE, Trades])
@pytest.mark.parametrize("view", ["clean", "adversarial"])
@pytest.mark.parametrize("label_kernel", ["linear", "gaussian"])
def test_the_terms_are_those_of_the_equation(base: type[Defense], view: str, label_kernel: str) -> None:
    defense, batch = attached(base(), lambda_x=0.3, lambda_y=0.7, view=view, label_kernel=label_kernel), batch_of()
    views, terms = seen(defense, batch)
    layers = [rows(views.tap(view, name)) for name in HIDDEN]
    images = rows(batch.x if view == "clean" else batch.views[view])
    expected = ref.ib_rar_terms(layers, images, ref.one_hot(batch.y.tolist(), K), 0.3, 0.7, label_kernel)
    assert terms["hbar/hsic_x"].item() == pytest.approx(expected[0], abs=1e-8)
    assert terms["hbar/hsic_y"].item() == pytest.approx(expected[1], abs=1e-8)
    alone = base().attach(network()).all_terms(Views(network(), batch))
    assert set(terms) == {*alone, "hbar/hsic_x", "hbar/hsic_y"}
    assert terms["loss"].item() == pytest.approx(alone["loss"].item() + sum(expected), abs=1e-8)


def test_the_clean_forward_follows_the_adversarial_one() -> None:
    """So batch norm's statistics move in that order, as in the authors' code."""
    views, _ = seen(attached(StandardAT()), batch_of())
    assert list(views.computed()) == ["adversarial", "clean"]
    views, _ = seen(attached(StandardAT(), view="adversarial"), batch_of())
    assert list(views.computed()) == ["adversarial"]


def test_the_terms_train_the_network() -> None:
    defense = attached(StandardAT(), lambda_x=0.3, lambda_y=0.7)
    _, terms = seen(defense, batch_of())
    for name in ("hbar/hsic_x", "hbar/hsic_y"):
        gradients = torch.autograd.grad(terms[name], list(defense.net.convs.parameters()), retain_graph=True)
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_the_weights_do_not_depend_on_the_batch() -> None:
    terms = seen(attached(CE(), lambda_x=1.0, lambda_y=0.0), batch_of(4))[1]
    assert set(terms) == {"ce", "hbar/hsic_x", "loss"}
    layers = [rows(Views(network(), batch_of(4), HIDDEN).tap("clean", name)) for name in HIDDEN]
    expected, _ = ref.ib_rar_terms(layers, rows(batch_of(4).x), ref.one_hot([0, 1, 2, 0], K), 1.0, 0.0)
    assert terms["hbar/hsic_x"].item() == pytest.approx(expected, abs=1e-8)


def test_layers() -> None:
    assert attached(CE()).needed_taps == HIDDEN
    chosen = attached(CE(), layers=["fc1", "conv2"])
    assert chosen.needed_taps == ("fc1", "conv2")
    assert chosen.added_terms()["hbar"].settings() == {"layers": ["fc1", "conv2"]}


def test_at_zero_it_is_the_base_loss_and_needs_no_batch() -> None:
    defense, batch = attached(StandardAT(), lambda_x=0.0, lambda_y=0.0), batch_of(1)
    views, terms = seen(defense, batch)
    assert set(terms) == {"ce", "loss"}
    assert list(views.computed()) == ["adversarial"]
    assert defense.coupled_terms() == ""
    for options in ({}, {"lambda_x": 0.0}, {"lambda_y": 0.0}):
        assert attached(StandardAT(), **options).coupled_terms() == "the terms of regularizer.hbar"
    assert set(attached(CE(), view="adversarial").all_adversaries(batch)) == {"adversarial"}
    without: list[dict[str, Any]] = [{"view": "clean"}, {"view": "adversarial", "lambda_x": 0.0, "lambda_y": 0.0}]
    for options in without:
        assert not attached(CE(), **options).all_adversaries(batch)


@pytest.mark.parametrize(("options", "message"), [
    ({"lambda_x": -1.0}, r"lambda_x=-1.0: expected 0 or more"),
    ({"lambda_y": float("nan")}, r"lambda_y=nan: expected 0 or more"),
    ({"sigma": 0.0}, r"sigma=0.0: expected more than 0"),
    ({"eps": -1e-5}, r"eps=-1e-05: expected more than 0"),
    ({"view": "both"}, r"view=both: expected one of clean, adversarial"),
    ({"label_kernel": "cosine"}, r"label_kernel=cosine: expected one of gaussian, linear"),
    ({"layers": "fc1"}, r"layers=fc1: expected a list of taps such as \[fc1,fc2\], or null"),
    ({"layers": []}, r"layers=\[\]: expected a list of taps"),
    ({"layers": ["fc1", "fc1"]}, r"layers=\['fc1', 'fc1'\]: expected each tap once"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"regularizer.hbar.{message}"):
        HsicBottleneck(**options)


def test_networks_and_batches_that_do_not_fit() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, K))
    with pytest.raises(ValueError, match=r"regularizer.hbar needs a network with named hidden layers.*Sequential"):
        CE().attach(plain, regularizers={"hbar": HsicBottleneck()})
    with pytest.raises(ValueError, match=r"layers=\['fc9'\]: expected taps of CNNTiny, which has no fc9: conv1,"):
        attached(CE(), layers=["fc9"])
    one_class = batch_of()
    one_class.y = torch.zeros_like(one_class.y)
    for batch, message in ((one_class, "all 8 samples of a batch are of one class"), (batch_of(1), "one sample")):
        with pytest.raises(ValueError, match=message):
            seen(attached(CE()), batch)
