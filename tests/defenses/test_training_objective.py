"""The training loss as an attack's objective, for every defense and every regularizer of conf/: its value, its slope,
and that nothing of the defense moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at import io
from mi_at.attacks.contexts import attacking
from mi_at.data.batch import Batch
from mi_at.defenses.base import AFTER_TRAINING, Defense
from mi_at.defenses.shared_info import SharedInfo
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.vib import Vib
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from mi_at.regularizers.base import Views
from mi_at.regularizers.ib_rar import InformationBottleneck
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from tests.references import losses, ncmi

CONF = Path(__file__).resolve().parents[2] / "conf"
DEFENSES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml"))
TERMS = sorted(path.stem for path in (CONF / "regularizer").glob("*.yaml") if path.stem != "none")
SMALL = {
    "namid": ("defense.hsize=8",),
    "mi_estimators": ("defense.hsize=8",),
}
CASES = [
    *[((f"defense={name}", "regularizer=none", *SMALL.get(name, ())), name) for name in DEFENSES],
    *[
        (
            (
                f"defense={base}",
                f"regularizer={term}",
                *((f"regularizer.{term}.hsize=8",) if term in ("namid", "wmim") else ()),
            ),
            f"{base}+{term}",
        )
        for base in ("standard_at", "ce")
        for term in TERMS
    ],
    (("defense=mma", "regularizer=none", "defense.variant=full"), "mma full"),
    (("defense=vib", "regularizer=none", "defense.view=adversarial", "defense.test_latent=sample"), "vib adversarial"),
    (("defense=shared_info", "regularizer=none", "defense.estimator=mine", "defense.test_latent=sample"), "mine"),
    (("defense=shared_info", "regularizer=none", "defense.estimator=mige", "defense.k=3"), "mige"),
]
# An untrained network: its outputs carry no information to speak of (mi), no sample is right and none was broken.
WITHOUT_SLOPE = {"ce+mi", "ce+namid", "mi_estimators", "mma full"}
Compose = Callable[..., Any]


def pictures(n: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=g)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=g).sign()).clamp(0, 1)
    return x, torch.arange(n) % 10, 1000 + torch.arange(n), x_adv


def build(compose: Compose, overrides: tuple[str, ...]) -> Defense:
    config = io.plain(compose(["dataset=digits", "model=cnn_tiny", "recipe=none", *overrides]))
    torch.manual_seed(0)
    defense = io.build_defense(config, CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2, batch_norm=True))
    for module in defense.modules():  # as after some training
        if isinstance(module, NCMI):
            module.centroids.copy_(torch.full((10, 10), 0.05, dtype=torch.float64) + 0.5 * torch.eye(10))
        if isinstance(module, NCMIRelaxed):
            module.started = True
    return defense


def parts(defense: Defense) -> dict[str, Any]:
    """Everything that could move, copied."""
    found: dict[str, Any] = {"state": copy.deepcopy(defense.state_dict())}
    for name, module in defense.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | Tensor | type(None))}
        found[f"attributes of {name}"] = copy.deepcopy(plain)
        found[f"keys of {name}"] = sorted(vars(module))
        found[f"identity of {name}"] = {k: id(v) for k, v in vars(module).items()}
    found["flags"] = [(p.requires_grad, p.grad is None) for p in defense.parameters()]
    found["rng"] = torch.get_rng_state()
    return found


def assert_same(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where} / {key}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), where
        for one, other in zip(before, after, strict=True):
            assert_same(one, other, where)
    else:
        assert before == after, where


@pytest.mark.parametrize(("overrides", "name"), CASES, ids=[name for _, name in CASES])
def test_every_defense_and_term(overrides: tuple[str, ...], name: str, compose: Compose) -> None:
    defense = build(compose, overrides)
    x, y, index, x_adv = pictures()
    defense.train()  # whatever mode it is in
    defense.net.train()
    before = parts(defense)
    objective = defense.training_objective(x, y, index)
    value = objective(x_adv.clone().requires_grad_(True))
    assert_same(before, parts(defense))
    assert value.shape == ()
    assert value.isfinite()
    assert torch.equal(objective(x_adv), value.detach()), "the same at every call"
    with torch.inference_mode():
        inside = defense.training_objective(x.clone(), y.clone(), index.clone())(x_adv)
    assert inside.item() == pytest.approx(value.item(), rel=1e-6)

    # The value: the whole loss, taken by hand from a copy in eval mode.
    by_hand = copy.deepcopy(defense).eval()
    by_hand._as_of = AFTER_TRAINING
    crafted = list(by_hand.all_adversaries(Batch(x=x, y=y, index=index, epoch=AFTER_TRAINING, batch_idx=1)))
    if "mma full" in name:
        by_hand._crossed = torch.ones(len(x), dtype=torch.bool)
    for module in by_hand.net.modules():  # the terms' preparations for a training batch
        if hasattr(module, "choose"):
            module.choose, module.on = None, True
    by_hand.eval()
    batch = Batch(
        x=x if crafted else x_adv,
        y=y,
        index=index,
        views=dict.fromkeys(crafted, x_adv),
        epoch=AFTER_TRAINING,
        batch_idx=1,
    )
    terms = by_hand.all_terms(Views(by_hand.net, batch, by_hand.needed_taps, seed=by_hand.config["seed"], ids=index))
    assert value.item() == pytest.approx(terms["loss"].item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(sum(v.item() for k, v in terms.items() if k != "loss"), rel=1e-4)

    # The slope: along it the loss rises as it says, where it has one.
    leaf = x_adv.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(objective(leaf), leaf)
    assert slope.isfinite().all()
    if "mige" in name:  # its value is 0 by definition
        return
    direction = slope / slope.norm().clamp_min(1e-12)
    step = 2e-3
    rise = (objective(x_adv + step * direction) - objective(x_adv - step * direction)) / (2 * step)
    assert rise.item() == pytest.approx(slope.norm().item(), rel=0.1, abs=2e-3)


@pytest.mark.parametrize(("overrides", "name"), CASES, ids=[name for _, name in CASES])
def test_ascent_raises_it(overrides: tuple[str, ...], name: str, compose: Compose) -> None:
    defense = build(compose, overrides)
    x, y, index, x_adv = pictures()
    objective = defense.training_objective(x, y, index)
    leaf = x_adv.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(objective(leaf), leaf)
    if name in WITHOUT_SLOPE:
        return
    assert slope.any(), "an attack on it goes somewhere"
    if "mige" not in name:
        assert objective(x_adv + 0.002 * slope.sign()) > objective(x_adv)


def test_against_the_transcriptions() -> None:
    """trades, and standard_at with ncmi, sample by sample from the papers' equations."""
    from mi_at.defenses.trades import Trades

    x, y, index, x_adv = pictures(6)
    y = y % 3
    torch.manual_seed(1)
    net = CNNTiny(num_classes=3, in_channels=1, image_size=8, width=0.2).eval()
    with torch.no_grad():
        z, z_adv = net(x), net(x_adv)
    rows, rows_adv, labels = losses.rows(z), losses.rows(z_adv), y.tolist()
    found = Trades(beta=6.0).attach(net).training_objective(x, y, index)(x_adv)
    expected = losses.total(losses.trades_loss(rows, rows_adv, labels, beta=6.0))
    assert found.item() == pytest.approx(losses.value_of(expected), rel=1e-5)

    term = NCMI(alpha=1.5, beta=0.7)
    defense = StandardAT().attach(net, regularizers={"ncmi": term})
    centroids = torch.softmax(torch.randn(3, 3, dtype=torch.float64), dim=1)
    term.centroids.copy_(centroids)
    probs = [losses.softmax(row) for row in rows_adv]
    concentration = sum(
        ncmi.divergence(p, c) for p, c in zip(probs, [centroids.tolist()[k] for k in labels], strict=True)
    )
    separated = ncmi.separation(probs, labels)
    expected = losses.total(losses.standard_at_loss(rows_adv, labels)) + 1.5 * concentration / 6 - 0.7 * separated
    found = defense.training_objective(x, y, index)(x_adv)
    assert found.item() == pytest.approx(losses.value_of(expected), rel=1e-5)


def test_images_stand_for_the_clean_ones_where_training_crafts_none() -> None:
    """ce with ib_rar, the network of the paper's adaptive attack without adversarial training."""
    from mi_at.defenses.ce import CE

    x, y, index, x_adv = pictures()
    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2)
    defense = CE().attach(net, regularizers={"ib_rar": InformationBottleneck(alpha=0.1, beta=1.0, batch_scale=True)})
    loss = defense.training_objective(x, y, index)
    other = defense.training_objective(x_adv, y, index)
    assert loss(x).item() == pytest.approx(other(x).item(), rel=1e-6)
    with attacking(net):
        cross_entropy = nn.functional.cross_entropy(net(x_adv), y)
    assert loss(x_adv).item() != pytest.approx(cross_entropy.item(), rel=1e-3), "the terms are in it"


def test_weights_have_their_final_values() -> None:
    """beta of shared_info begins at a thousandth."""
    x, y, index, x_adv = pictures()
    values = {}
    for beta in (0.5, 4.0):
        torch.manual_seed(0)
        net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2)
        defense = SharedInfo(beta=beta, k=3).attach(net, optimisation=SGD(lr=0.1, epochs=100))
        values[beta] = defense.training_objective(x, y, index)(x_adv).item()
        assert defense.current_epoch == 0
        assert defense.beta_now() == pytest.approx(1e-3)
    assert abs(values[4.0] - values[0.5]) > 0.01


def test_noise_is_that_of_the_sample() -> None:
    """A network that draws z at test: the loss of two samples, whichever companions or places they have."""
    x, y, index, x_adv = pictures()
    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2)
    defense = Vib(view="adversarial", test_latent="sample").attach(net)

    def of(places: list[int]) -> float:
        chosen = torch.tensor(places)
        return defense.training_objective(x[chosen], y[chosen], index[chosen])(x_adv[chosen]).item()

    assert of([1, 7]) == pytest.approx((of([1]) + of([7])) / 2, rel=1e-5)
    assert of([7, 1]) == pytest.approx(of([1, 7]), rel=1e-6)


def test_a_network_that_draws_from_torch() -> None:
    class Noisy(nn.Module):
        num_classes = 3

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)) + torch.randn(len(x), 3)

    x, y, index, x_adv = pictures()
    objective = StandardAT().attach(Noisy()).training_objective(x, y % 3, index)
    state = torch.get_rng_state()
    assert objective(x_adv).item() == objective(x_adv).item()
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_of_one_sample_or_one_class(compose: Compose) -> None:
    """The last block of an evaluation; in training such a batch is refused."""
    for overrides in (("defense=ncmi",), ("defense=shared_info",), ("defense=mimae",)):
        defense = build(compose, overrides)
        x, y, index, x_adv = pictures(3)
        for block in (slice(0, 1), slice(0, 3)):
            value = defense.training_objective(x[block], torch.zeros_like(y[block]), index[block])(x_adv[block])
            assert value.isfinite(), (overrides, block)
    defense = build(compose, ("defense=ib_rar",))
    x, y, index, x_adv = pictures(3)
    with pytest.raises(ValueError, match="are of one class"):  # labels that say nothing
        defense.training_objective(x, torch.zeros_like(y), index)(x_adv)
    with pytest.raises(ValueError, match="a batch of one sample"):  # a kernel matrix needs two
        defense.training_objective(x[:1], y[:1], index[:1])(x_adv[:1])


def test_training_goes_on_as_before(compose: Compose) -> None:
    """MMA's margins, MINE's critic and what the next step needs are those of training."""
    defense = build(compose, ("defense=mma", "defense.variant=full"))
    x, y, index, x_adv = pictures()
    defense.expect(2000)
    defense.margins[index] = 0.03
    before = defense.margins.clone()
    defense.training_objective(x, y, index)(x_adv)
    assert torch.equal(defense.margins, before)
    assert defense._crossed.shape == (0,)


def _ranks(rank: int, size: int) -> float:
    x, y, index, x_adv = pictures()
    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2)
    defense = StandardAT().attach(net, regularizers={"ncmi": NCMI(alpha=0.0, beta=1.0)})
    if rank:  # the other one never comes by
        return 0.0
    return float(defense.training_objective(x, y, index)(x_adv))


@pytest.mark.slow
@pytest.mark.ddp
def test_one_process_of_several(spawn: Callable[..., list[Any]]) -> None:
    """Evaluation after a run on several processes: nothing waits for the others."""
    assert spawn(_ranks, 2)[0] == pytest.approx(_ranks(0, 1), rel=1e-6)
