"""IB-RAR: its terms against the equations, the mask in every forward and in the checkpoint, and one process or more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

import mi_at
from mi_at.callbacks.weight_averaging import EMA
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.ib_rar import IbRar
from mi_at.defenses.mart import Mart
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.distributed import world_size
from mi_at.functional.kernels import channel_dependence
from mi_at.models.cnn import CNN4, CNNTiny
from mi_at.models.resnet import ResNet18
from mi_at.models.vgg import VGG16
from mi_at.optim import SGD
from mi_at.regularizers import ib_rar
from mi_at.regularizers.base import Context, Regularizer, Views
from mi_at.regularizers.hbar import HsicBottleneck
from mi_at.regularizers.ib_rar import ChannelGate, InformationBottleneck, MaskOptions, channel_mask
from tests import test_ddp as ddp
from tests.callbacks import fits
from tests.commands import command, tiny
from tests.references import hsic as ref

K = fits.CLASSES
M = 9


def network(seed: int = 0) -> CNNTiny:
    torch.manual_seed(seed)
    return CNNTiny(num_classes=K, in_channels=1, image_size=8, width=0.4).double()


def batch_of(m: int = M, seed: int = 0, number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(m, 1, 8, 8, generator=generator, dtype=torch.float64)
    adversarial = (x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    y = torch.arange(m) % K
    return Batch(x=x, y=y, index=torch.arange(m), views={"adversarial": adversarial}, batch_idx=number)


def context(net: nn.Module, scaled: Callable[[float], int] = round) -> Context:
    nothing: Any = None
    return Context(net=net, epoch=0, scaled=scaled, train_batches=nothing, draw_per_class=nothing, attack=nothing)


def attached(defense: Defense, net: nn.Module, **options: Any) -> tuple[Defense, InformationBottleneck]:
    term = InformationBottleneck(**options)
    return defense.attach(net, regularizers={"ib_rar": term}), term


def rows(tensor: Tensor) -> list[list[float]]:
    return tensor.detach().double().flatten(1).tolist()


def seen(defense: Defense, batch: Batch) -> tuple[Views, dict[str, Tensor]]:
    views = Views(defense.net, batch, defense.needed_taps)
    return views, defense.all_terms(views)


# ---------------------------------------------------------------- the two terms
CASES = [
    (StandardAT, ["adversarial"]),
    (CE, ["clean"]),
    (Trades, ["clean", "adversarial"]),
    (Mart, ["clean", "adversarial"]),
]


@pytest.mark.parametrize(("base", "forwarded"), CASES)
@pytest.mark.parametrize("label_kernel", ["linear", "gaussian"])
def test_the_terms_are_those_of_the_equation(base: type[Defense], forwarded: list[str], label_kernel: str) -> None:
    batch = batch_of()
    if base is CE:
        batch.views = {}
    defense, _ = attached(base(), network(), alpha=0.3, beta=0.7, label_kernel=label_kernel)
    views, terms = seen(defense, batch)
    layers = [rows(views.tap(view, name)) for view in forwarded for name in ("conv1", "conv2", "conv3", "fc1")]
    labels = ref.one_hot(batch.y.tolist(), K)
    expected = ref.ib_rar_terms(layers, rows(batch.x), labels, 0.3 * 100 / M, 0.7, label_kernel)
    assert terms["ib_rar/hsic_x"].item() == pytest.approx(expected[0], abs=1e-8)
    assert terms["ib_rar/hsic_y"].item() == pytest.approx(expected[1], abs=1e-8)
    alone = base().attach(network()).all_terms(Views(network(), batch))
    assert set(terms) == {*alone, "ib_rar/hsic_x", "ib_rar/hsic_y"}
    assert terms["loss"].item() == pytest.approx(alone["loss"].item() + sum(expected), abs=1e-8)


def test_the_terms_train_every_layer_and_only_the_adversarial_forward() -> None:
    defense, _ = attached(StandardAT(), network(), alpha=0.01, beta=1.0, layers=["fc1"])
    batch = batch_of()
    batch.x.requires_grad_()
    batch.views["adversarial"].requires_grad_()
    _, terms = seen(defense, batch)
    for name in ("ib_rar/hsic_x", "ib_rar/hsic_y"):
        moved = torch.autograd.grad(
            terms[name], [*defense.net.convs.parameters(), batch.views["adversarial"]], retain_graph=True
        )
        assert all(float(gradient.abs().max()) > 0 for gradient in moved)


def test_a_step_down_the_terms_forgets_the_image_and_learns_the_label() -> None:
    for alpha, beta, name in ((1.0, 0.0, "hsic_x"), (0.0, 1.0, "hsic_y")):
        defense, _ = attached(StandardAT(), network(), alpha=alpha, beta=beta, mask={"fraction": 0})
        batch = batch_of(24)
        values = []
        for _ in range(4):
            _, terms = seen(defense, batch)
            assert [key for key in terms if key.startswith("ib_rar/")] == [f"ib_rar/{name}"]
            values.append(terms[f"ib_rar/{name}"].item())
            gradients = torch.autograd.grad(terms[f"ib_rar/{name}"], list(defense.net.convs.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(defense.net.convs.parameters(), gradients, strict=True):
                    parameter -= 0.02 * gradient / gradient.norm()
        assert values == sorted(values, reverse=True), name
        assert (values[0] > 0) == (alpha > 0)


def test_images_of_the_x_term() -> None:
    batch = batch_of()
    values = {}
    for images in ("clean", "adversarial"):
        defense, _ = attached(StandardAT(), network(), alpha=0.3, beta=0.7, mi_input=images)
        values[images] = seen(defense, batch)[1]
    layers = [rows(Views(network(), batch, ("fc1",)).tap("adversarial", "fc1"))]
    defense, _ = attached(StandardAT(), network(), alpha=0.3, beta=0.0, mi_input="adversarial", layers=["fc1"])
    labels = ref.one_hot(batch.y.tolist(), K)
    expected, _ = ref.ib_rar_terms(layers, rows(batch.views["adversarial"]), labels, 0.3 * 100 / M, 0.0)
    assert seen(defense, batch)[1]["ib_rar/hsic_x"].item() == pytest.approx(expected, abs=1e-8)
    assert values["clean"]["ib_rar/hsic_y"].item() == values["adversarial"]["ib_rar/hsic_y"].item()
    assert values["clean"]["ib_rar/hsic_x"].item() != values["adversarial"]["ib_rar/hsic_x"].item()


@pytest.mark.parametrize(("kind", "size", "robust"), [
    (VGG16, 32, ("block5", "fc1", "fc2")), (CNN4, 28, ("conv4", "fc1", "fc2")), (CNNTiny, 8, ("conv3", "fc1")),
    (ResNet18, 32, None),
])  # fmt: skip
def test_layers(kind: type, size: int, robust: tuple[str, ...] | None) -> None:
    net = kind(num_classes=K, in_channels=1, image_size=size, width=0.1)
    _, term = attached(StandardAT(), net)
    assert term.taps == (*net.hidden_names, "last_conv")
    _, term = attached(StandardAT(), net, layers="robust")
    last = (net.hidden_names[-2], "features") if robust is None else robust
    assert term.taps == (*last, "last_conv")
    _, term = attached(StandardAT(), net, layers=["features", "last_conv"], mask={"fraction": 0})
    assert term.taps == ("features", "last_conv")
    assert term.settings() == {"layers": ["features", "last_conv"], "batch_scale": True}


# ---------------------------------------------------------------- the batch that alpha belongs to
def test_alpha_is_scaled_to_the_batch_and_recorded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defense, term = attached(StandardAT(), network(), alpha=0.01, beta=0.1)
        _, scaled = seen(defense, batch_of(20))
        seen(defense, batch_of(7))  # the end of an epoch
        plain, _ = attached(StandardAT(), network(), alpha=0.01, beta=0.1, batch_scale=False)
        seen(plain, batch_of(100))
        seen(plain, batch_of(20))
    assert term.settings()["alpha_used"] == pytest.approx(0.05)
    assert term.settings()["batch"] == 20
    plain, _ = attached(StandardAT(), network(), alpha=0.01, beta=0.1, batch_scale=False)
    with pytest.warns(UserWarning, match=r"batch_scale=false: alpha=0.01 belongs to batch 100.*which is 20; use"):
        _, unscaled = seen(plain, batch_of(20))
    assert scaled["ib_rar/hsic_x"].item() == pytest.approx(5 * unscaled["ib_rar/hsic_x"].item())
    assert scaled["ib_rar/hsic_y"].item() == unscaled["ib_rar/hsic_y"].item()


def test_the_x_term_grows_with_the_batch_and_the_scaled_one_less() -> None:
    def value(m: int, **options: Any) -> float:
        return seen(attached(StandardAT(), network(), alpha=1.0, beta=0.0, **options)[0], batch_of(m))[1][
            "ib_rar/hsic_x"
        ].item()

    with pytest.warns(UserWarning, match="belongs to batch 100"):
        unscaled = value(48, batch_scale=False) / value(24, batch_scale=False)
    assert unscaled > 1
    assert value(48) / value(24) == pytest.approx(unscaled / 2)


# ---------------------------------------------------------------- epochs
def test_terms_count_in_the_active_epochs_only() -> None:
    defense, term = attached(StandardAT(), network(), alpha=0.3, beta=0.7, active_epochs=[0, 30])
    assert term.active is not None
    term.on_fit_start(context(defense.net, scaled=lambda epoch: round(epoch / 10)))
    assert term.active.tolist() == [0, 3]
    resumed = InformationBottleneck(alpha=0.3, beta=0.7, active_epochs=[0, 30])
    resumed.load_state_dict(term.state_dict())
    again = StandardAT().attach(defense.net, regularizers={"ib_rar": resumed})
    for module in (defense, again):
        for epoch, active in ((0, True), (1, False), (3, True), (4, False)):
            batch = batch_of()
            batch.epoch = epoch
            _, terms = seen(module, batch)
            assert set(terms) == {"ce", "ib_rar/hsic_x", "ib_rar/hsic_y", "loss"}
            assert (terms["ib_rar/hsic_x"].item() != 0) == (terms["ib_rar/hsic_y"].item() != 0) == active


@pytest.mark.parametrize("base", [StandardAT, CE])
def test_with_both_weights_zero_the_mask_stays(base: type[Defense]) -> None:
    batch = batch_of()
    defense, term = attached(base(), network(), alpha=0.0, beta=0.0)
    assert term.taps == ("last_conv",)
    assert term.coupled == "the mask of regularizer.ib_rar"
    views, terms = seen(defense, batch)
    alone = base().attach(network()).all_terms(Views(network(), batch))
    assert {name: value.item() for name, value in terms.items()} == {name: v.item() for name, v in alone.items()}
    assert set(defense.all_adversaries(batch)) == set(base().attach(network()).all_adversaries(batch))
    term.after_step(context(defense.net), batch)
    view = "clean" if base is CE else "adversarial"
    maps = [rows(maps) for maps in views.tap(view, "last_conv").unbind(dim=1)]
    assert keep(defense.net) == ref.ib_rar_mask(maps, ref.one_hot(batch.y.tolist(), K), 0.05)
    nothing = InformationBottleneck(alpha=0.0, beta=0.0, mask={"fraction": 0})
    assert nothing.coupled == ""
    assert isinstance(base().attach(network(), regularizers={"ib_rar": nothing}).net.last_conv_gate, nn.Identity)


# ---------------------------------------------------------------- the mask
def gate(net: nn.Module) -> ChannelGate:
    found = net.last_conv_gate
    assert isinstance(found, ChannelGate)
    return found


def keep(net: nn.Module) -> list[bool]:
    return gate(net).keep.tolist()


@pytest.mark.parametrize(("fraction", "channels", "count"), [
    (0.05, 512, 25), (0.05, 64, 3), (0.05, 19, 1), (0.05, 4, 1), (0.02, 512, 10), (0.04, 512, 20), (0.0, 512, 0),
])  # fmt: skip
def test_how_many_channels_are_masked(fraction: float, channels: int, count: int) -> None:
    assert MaskOptions(fraction=fraction).count(channels) == count


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([3.0, 1.0 + 1e-10, 2.0, 1.0, 1.0 - 1e-10, 0.0], dtype=torch.float64)
    assert channel_mask(scores, 1).tolist() == [True, True, True, True, True, False]
    assert channel_mask(scores, 2).tolist() == [True, False, True, True, True, False]
    assert channel_mask(scores, 3).tolist() == [True, False, True, False, True, False]
    assert channel_mask(scores, 0).all()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5])
def test_the_channels_that_know_least_of_the_label_go(fraction: float) -> None:
    batch = batch_of(15)
    defense, term = attached(Trades(), network(), mask={"fraction": fraction})
    views, _ = seen(defense, batch)
    assert all(keep(defense.net)), "the gate changes after the step, not within it"
    term.after_step(context(defense.net), batch)
    maps = [rows(maps) for maps in views.tap("adversarial", "last_conv").unbind(dim=1)]
    expected = ref.ib_rar_mask(maps, ref.one_hot(batch.y.tolist(), K), fraction)
    assert keep(defense.net) == expected
    assert expected.count(False) == max(1, int(fraction * 26))


@pytest.mark.parametrize("label_kernel", ["linear", "gaussian"])
def test_the_kernel_of_the_labels_that_choose(label_kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is asked for: the two rarely choose differently."""
    asked = []

    def spy(maps: Tensor, z: Tensor, **options: Any) -> Tensor:
        asked.append((z.shape[1], options.get("kernel_z", "gaussian"), options["sigma"], options["eps"]))
        return channel_dependence(maps, z, **options)

    monkeypatch.setattr(ib_rar, "channel_dependence", spy)
    mask = {"label_kernel": label_kernel, "rule": "label_and_input"}
    defense, _ = attached(StandardAT(), network(), sigma=3.0, eps=1e-4, mask=mask)
    seen(defense, batch_of())
    assert asked == [(K, label_kernel, 3.0, 1e-4), (64, "gaussian", 3.0, 1e-4)]


def test_dead_channels_go_first_and_a_masked_channel_can_come_back() -> None:
    net, batch = network(), batch_of(15)
    defense, term = attached(StandardAT(), net, mask={"fraction": 0.08, "every": 1})  # 2 of 26
    with torch.no_grad():
        net.convs[2][0].bias[[3, 7, 11]] = -100.0
    seen(defense, batch)
    term.after_step(context(net), batch)
    assert [c for c, kept in enumerate(keep(net)) if not kept] == [3, 7]
    with torch.no_grad():
        net.convs[2][0].bias[[3, 7, 11]] = 0.5
    seen(defense, batch)  # the tap shows what is behind the mask
    term.after_step(context(net), batch)
    assert keep(net)[3] + keep(net)[7] + keep(net)[11] >= 1
    assert keep(net).count(False) == 2


def test_it_is_refreshed_every_ten_batches_from_the_batch_at_hand() -> None:
    net = network()
    defense, term = attached(StandardAT(), net, mask={"fraction": 0.3})
    changed = []
    for number in range(21):
        before = keep(net)
        batch = batch_of(15, seed=number, number=number)
        defense.all_adversaries(batch)
        seen(defense, batch)
        with torch.no_grad():
            for parameter in net.convs.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        term.after_step(context(net), batch)
        changed += [number] if keep(net) != before else []
    assert changed == [0, 10, 20]


def test_every_forward_is_masked_attacks_included_and_the_input_is_left_alone() -> None:
    net, batch = network(), batch_of()
    defense, _ = attached(StandardAT(), net)
    (inner,) = defense.all_adversaries(batch).values()
    gate(net).keep[:20] = False
    for mode in (True, False):
        net.train(mode)
        logits, taps = net.forward_taps(batch.x)
        assert taps["conv3"][:, :20].abs().max() == 0
        assert taps["last_conv"][:, :20].abs().max() > 0
        x = batch.x.clone().requires_grad_()
        assert torch.equal(net(x), logits)
        (with_mask,) = torch.autograd.grad(inner.objective(x).sum(), x)
        gate(net).keep.fill_(True)
        assert not torch.equal(net(batch.x), logits)
        (without,) = torch.autograd.grad(inner.objective(x).sum(), x)
        assert not torch.equal(with_mask, without)
        gate(net).keep[:20] = False
    x = torch.rand(2, 26, 3, 3).to(memory_format=torch.channels_last)
    before = x.clone()
    out = gate(net)(x)
    assert torch.equal(x, before)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gate(net)(x.bfloat16()).dtype == torch.bfloat16


def test_without_the_mask_at_test() -> None:
    net, batch = network(), batch_of(15)
    defense, term = attached(StandardAT(), net, mask={"fraction": 0.5, "at_test": False})
    unmasked = net(batch.x)
    defense.all_adversaries(batch)
    seen(defense, batch)
    assert gate(net).on
    term.after_step(context(net), batch)
    assert keep(net).count(False) == 13
    assert torch.equal(net(batch.x), unmasked), "validation between two batches"
    defense.all_adversaries(batch)
    assert not torch.equal(net(batch.x), unmasked), "the attack of the next batch"
    loaded, _ = attached(StandardAT(), network(), mask={"fraction": 0.5, "at_test": False})
    loaded.net.load_state_dict(net.state_dict())
    assert torch.equal(loaded.net(batch.x), unmasked)


@pytest.mark.parametrize("base", [StandardAT, Trades, CE])
def test_as_released_the_mask_lives_for_the_forward_that_chooses_it(base: type[Defense]) -> None:
    net = network()
    released = {"applied": "refresh", "fraction": 0.1, "rule": "label_and_input", "label_kernel": "gaussian"}
    defense, term = attached(base(), net, mask=released)
    for number, due in ((0, True), (1, False), (10, True)):
        batch = batch_of(15, number=number)
        if base is CE:
            batch.views = {}
        unmasked = network()
        unmasked.load_state_dict({name: v for name, v in net.state_dict().items() if "gate" not in name})
        net.eval()
        defense.all_adversaries(batch)
        assert torch.equal(net(batch.x), unmasked(batch.x)), "the attack"
        net.train()
        views, _ = seen(defense, batch)
        for view in views.computed():
            maps = views.tap(view, "last_conv")
            channels = [rows(channel) for channel in maps.unbind(dim=1)]
            labels, images = ref.one_hot(batch.y.tolist(), K), rows(batch.x)
            order_y = sorted(range(26), key=lambda c, f=channels: ref.normalized_hsic(f[c], labels))
            order_x = sorted(range(26), key=lambda c, f=channels: -ref.normalized_hsic(f[c], images))
            dropped = {*order_y[:2], *order_x[:2]} if due else set()
            shown = views.tap(view, "conv3")
            expected = torch.stack([maps[:, c] * (c not in dropped) for c in range(26)], dim=1)
            assert torch.equal(shown, expected), view
        term.after_step(context(net), batch)
        assert torch.equal(net(batch.x), unmasked(batch.x)), "between the batches"


# ---------------------------------------------------------------- state
def fitted(folder: Path, defense: Defense, *callbacks: Any, added: dict[str, Regularizer] | None = None) -> Defense:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=K, in_channels=1, image_size=8, width=0.4)
    defense.attach(net, optimisation=SGD(lr=0.05, epochs=2, schedule="constant"), regularizers=added)
    defense.context = lambda epoch: context(net)
    fits.fit(folder, callbacks, epochs=2, train=4, defense=defense)
    return defense


OPTIONS: dict[str, Any] = {"alpha": 0.01, "beta": 0.1, "layers": "robust", "mask": {"every": 3, "fraction": 0.2}}


def test_under_its_own_name_it_is_the_same_training(tmp_path: Path) -> None:
    own = fitted(tmp_path, IbRar(**copy.deepcopy(OPTIONS)))
    plain = fitted(tmp_path, StandardAT(), added={"ib_rar": InformationBottleneck(**OPTIONS)})
    first, second = own.state_dict(), plain.state_dict()
    assert first.keys() == second.keys()
    assert not first["net.last_conv_gate.keep"].all()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = CNNTiny(num_classes=K, in_channels=1, image_size=8, width=0.4)
    assert not torch.equal(first["net.convs.0.0.weight"], start.state_dict()["convs.0.0.weight"])


def test_its_own_name_takes_the_options_and_adds_the_term_once() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"^defense.alpha=-1: expected 0 or more"):
        IbRar(alpha=-1)
    with pytest.raises(ValueError, match=r"^defense.mask.at_test=no: expected true or false"):
        IbRar(mask={"at_test": "no"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        IbRar(gamma=1)
    with pytest.raises(ValueError, match=r"defense=ib_rar regularizer=ib_rar would add the same term twice"):
        IbRar().attach(net, regularizers={"ib_rar": InformationBottleneck()})
    with pytest.raises(ValueError, match=r"^defense.layers=\['conv9'\]: expected taps of CNNTiny.*conv1, conv2"):
        IbRar(layers=["conv9"]).attach(net)
    hbar = HsicBottleneck()
    both = IbRar().attach(net, regularizers={"hbar": hbar})
    assert list(both.added_terms()) == ["ib_rar", "hbar"]


class Compare(Callback):
    """After every batch: is the mask of the averaged network the last one, and are the weights others?"""

    def __init__(self, average: EMA) -> None:
        self.average, self.moved = average, False
        self.masks: list[list[bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        averaged: Any = self.average._average_model
        served, raw = averaged.module.net, pl_module.net
        assert gate(served).on
        assert keep(served) == keep(raw)
        self.masks.append(keep(served))
        self.moved |= not torch.equal(served.convs[0][0].weight, raw.convs[0][0].weight)


def test_the_served_weights_carry_the_last_mask_not_an_average(tmp_path: Path) -> None:
    average = EMA(decay=0.5)
    compare = Compare(average)
    defense = IbRar(**{**OPTIONS, "mask": {"every": 1, "fraction": 0.2}})
    fitted(tmp_path, defense, average, compare)
    assert len({tuple(mask) for mask in compare.masks}) > 1
    assert {mask.count(False) for mask in compare.masks} == {5}
    assert compare.moved


@pytest.mark.parametrize("at_test", [True, False])
def test_a_checkpoint_loads_as_the_masked_network(at_test: bool, tmp_path: Path) -> None:
    options = ["defense=ib_rar", "defense.layers=robust", "defense.mask.fraction=0.4", "run_dir=run"]
    done = command(tmp_path, *tiny(*options, f"defense.mask.at_test={str(at_test).lower()}"))
    assert done.code == 0, done.err
    net = mi_at.load(tmp_path / "run" / "last.ckpt")
    kept = keep(net)
    assert kept.count(False) == max(1, int(0.4 * len(kept)))
    x = torch.rand(3, 1, 8, 8)
    masked = net.forward_taps(x)[1]["conv3"][:, [not k for k in kept]]
    assert bool((masked == 0).all()) == at_test


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(("options", "message"), [
    ({"alpha": -0.1}, r"alpha=-0.1: expected 0 or more"),
    ({"beta": float("nan")}, r"beta=nan: expected 0 or more"),
    ({"sigma": 0.0}, r"sigma=0.0: expected more than 0"),
    ({"eps": float("inf")}, r"eps=inf: expected more than 0"),
    ({"mi_input": "both"}, r"mi_input=both: expected one of clean, adversarial"),
    ({"label_kernel": "cosine"}, r"label_kernel=cosine: expected one of gaussian, linear"),
    ({"layers": "fc1"}, r"layers=fc1: expected a list of taps such as \[fc1,fc2\], null .*robust"),
    ({"layers": []}, r"layers=\[\]: expected at least one tap"),
    ({"layers": ["fc1", "fc1"]}, r"layers=\['fc1', 'fc1'\]: expected each tap once"),
    ({"active_epochs": [0.5]}, r"active_epochs=\[0.5\]: expected a list of epochs from 0"),
    ({"active_epochs": []}, r"active_epochs=\[\]: expected a list of epochs from 0.*alpha=0 beta=0 for none"),
    ({"active_epochs": [-1]}, r"active_epochs=\[-1\]: expected a list of epochs from 0"),
    ({"mask": {"fraction": 1.0}}, r"mask.fraction=1.0: expected a part of the channels in \[0, 1\)"),
    ({"mask": {"fraction": "a"}}, r"mask.fraction=a: expected a part of the channels"),
    ({"mask": {"every": 0}}, r"mask.every=0: expected a number of batches, 1 or more"),
    ({"mask": {"every": 2.5}}, r"mask.every=2.5: expected a number of batches"),
    ({"mask": {"rule": "input"}}, r"mask.rule=input: expected one of label, label_and_input"),
    ({"mask": {"label_kernel": "rbf"}}, r"mask.label_kernel=rbf: expected one of gaussian, linear"),
    ({"mask": {"applied": "never"}}, r"mask.applied=never: expected one of always, refresh"),
    ({"mask": {"att_test": True}}, r"mask.att_test: expected one of fraction, every, rule, label_kernel, applied, at_"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"regularizer.ib_rar.{message}"):
        InformationBottleneck(**options)


def test_networks_that_do_not_fit() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, K))
    with pytest.raises(ValueError, match=r"needs a network with named hidden layers.*Sequential.*Classifier"):
        attached(StandardAT(), plain)
    with pytest.raises(
        ValueError, match=r"layers=\['fc1', 'fc9'\]: expected taps of CNNTiny, which has no fc9: conv1,"
    ):
        attached(StandardAT(), network(), layers=["fc1", "fc9"])
    taken = network()
    taken.last_conv_gate = nn.Dropout()
    with pytest.raises(ValueError, match=r"already has a Dropout behind its last convolution; use mask.fraction=0"):
        attached(StandardAT(), taken)
    attached(StandardAT(), taken, mask={"fraction": 0})
    with pytest.raises(ValueError, match=r"mask.fraction=0.6: expected at most half of the 26 channels"):
        attached(StandardAT(), network(), mask={"fraction": 0.6})


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_batches_that_say_nothing(alpha: float) -> None:
    defense, _ = attached(StandardAT(), network(), alpha=alpha, beta=10 * alpha)
    one_class = batch_of()
    one_class.y = torch.ones_like(one_class.y)
    with pytest.raises(ValueError, match=r"all 9 samples of a batch are of one class.*two classes.*dataset.batch_size"):
        seen(defense, one_class)
    with pytest.raises(ValueError, match=r"a batch of one sample.*choose a dataset.batch_size that does not leave"):
        seen(defense, batch_of(1))


def test_adversarial_images_that_nobody_makes() -> None:
    defense, _ = attached(CE(), network(), mi_input="adversarial")
    batch = batch_of()
    batch.views = {}
    with pytest.raises(ValueError, match=r"mi_input=adversarial: expected clean: the defense makes no adversarial"):
        seen(defense, batch)


# ---------------------------------------------------------------- several processes
TERMS: dict[str, Callable[[], tuple[Defense, dict[str, Regularizer]]]] = {
    "ib_rar": lambda: (IbRar(alpha=0.01, beta=0.1, mask={"every": 2, "fraction": 0.2}), {}),
    "trades+ib_rar, released": lambda: (
        Trades(),
        {
            "ib_rar": InformationBottleneck(
                alpha=0.01,
                beta=0.1,
                label_kernel="gaussian",
                mask={"every": 2, "applied": "refresh", "rule": "label_and_input", "label_kernel": "gaussian"},
            )
        },
    ),
    "ce+ib_rar": lambda: (CE(), {"ib_rar": InformationBottleneck(alpha=0.01, beta=0.1, mask={"every": 2})}),
    "standard_at+hbar": lambda: (StandardAT(), {"hbar": HsicBottleneck(lambda_x=0.01, lambda_y=0.1)}),
}


def steps(name: str, state: ddp.State) -> list[dict[str, Any]]:
    """Three steps on uneven batches: loss, gradients, views and mask of each."""
    defense, added = TERMS[name]()
    defense.inspect_every = 0
    defense.attach(ddp.network(state), regularizers=added)
    step, callback, found = ddp.wrap(defense), ddp.examples(), []
    optimizer = torch.optim.SGD(defense.net.parameters(), lr=0.02)
    for number, batch in ddp.batches(defense.net, ddp.digits().train_dataloader()):
        callback.on_train_batch_start(ddp.trainer_at(0), defense, batch, number)
        loss = ddp.backward(step, batch)
        gradients = ddp.gradients(defense)
        optimizer.step()
        with torch.no_grad():
            for term in defense.added_terms().values():
                term.after_step(context(defense.net), batch)
        masks = {key: value.clone() for key, value in defense.net.state_dict().items() if key.endswith("keep")}
        found.append({"loss": loss, "gradients": gradients, "views": dict(batch.views), "mask": masks})
    return found


def everything(rank: int, processes: int, weights: ddp.State) -> dict[str, Any]:
    assert world_size() == processes
    return {name: steps(name, weights) for name in TERMS}


@pytest.mark.ddp
@pytest.mark.parametrize("k", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_training_on_k_processes_is_training_on_one(k: int, spawn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    weights = {name: value.double() for name, value in ddp.network().state_dict().items()}
    alone = everything(0, 1, weights)
    for result in spawn(everything, k, weights, timeout=600.0):
        for name, expected in alone.items():
            for number, step in enumerate(expected):
                found = result[name][number]
                ddp.assert_same({"loss": found["loss"]}, {"loss": step["loss"]}, 1e-6)
                ddp.assert_same(found["gradients"], step["gradients"], 1e-6)
                assert found["mask"].keys() == step["mask"].keys()
                assert all(torch.equal(found["mask"][key], mask) for key, mask in step["mask"].items()), name
    assert not alone["ib_rar"][-1]["mask"]["last_conv_gate.keep"].all()
