"""NAMID's term: transcription, gradients, the frozen estimators, what is selected, cost, and its state."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from mi_at.data.batch import Batch
from mi_at.defenses.ce import CE
from mi_at.defenses.mart import Mart
from mi_at.defenses.mi_estimators import MIEstimators
from mi_at.defenses.namid import Namid as NamidDefense
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.selection import broken_by_attack
from mi_at.models.cnn import CNNTiny
from mi_at.models.resnet import ResNet18
from mi_at.regularizers.base import Context, Views
from mi_at.regularizers.namid import Namid, namid_loss
from tests.references import namid as ref
from tests.test_flop import FlopCount, Reads, batch, step_of

CLASSES = 4


def estimates(count: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Natural and adversarial information, each of clean and adversarial outputs."""
    generator = torch.Generator().manual_seed(seed)
    return list(scale * torch.randn(4, count, generator=generator, dtype=torch.float64))


def ours(values: list[Tensor], selected: list[bool], **options: Any) -> dict[str, Tensor]:
    n, n_adv, a, a_adv = values
    natural, adversarial = {"clean": n, "adversarial": n_adv}, {"clean": a, "adversarial": a_adv}
    return namid_loss(natural, adversarial, torch.tensor(selected), **options)


OPTIONS = [
    {"alpha": 5.0, "lambda_mi": 0.1},
    {"alpha": 0.7, "lambda_mi": 2.0, "lambda_term": "paper"},
    {"alpha": 1.0, "lambda_mi": 0.3, "lambda_term": "off"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_the_terms_equal_the_transcription(options: dict[str, Any], seed: int) -> None:
    values = estimates(7, seed, 3.0)
    selected = [[True] * 7, [False, True, True, False, True, False, False], [False] * 6 + [True]][seed % 3]
    found = ours(values, selected, **options)
    n, n_adv, a, a_adv = (v.tolist() for v in values)
    expected = ref.namid_terms((n, n_adv), (a, a_adv), selected, **options)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lowered", [-1.0, 1.0])  # both sides of the hinge
def test_gradients(options: dict[str, Any], lowered: float) -> None:
    values = estimates(5, 1)
    values[3] += lowered - values[3].mean()
    values = [v.requires_grad_() for v in values]
    selected = [True, False, True, True, False]

    def loss(*v: Tensor) -> Tensor:
        return sum(ours(list(v), selected, **options).values(), torch.zeros(())) + 0.0 * sum(x.sum() for x in v)

    assert gradcheck(loss, values)


def test_it_raises_natural_and_lowers_adversarial_information() -> None:
    values = [v.requires_grad_() for v in estimates(4, 0)]
    (values[3].data).abs_()
    term = ours(values, [True] * 4, alpha=2.0, lambda_mi=0.5)["information"]
    n_adv, a_adv = torch.autograd.grad(term, (values[1], values[3]))
    assert torch.equal(n_adv, torch.full((4,), -0.25, dtype=torch.float64))
    assert torch.equal(a_adv, torch.full((4,), 0.25, dtype=torch.float64))


def test_only_the_estimate_that_falls_is_hinged() -> None:
    low = torch.full((3,), -9.0, dtype=torch.float64)
    high = -low
    clipped = ours([high, high, low, low], [True] * 3, alpha=1.0, lambda_mi=1.0)["information"]
    assert clipped.item() == -9.0
    paper = ours([high, high, low, low], [True] * 3, alpha=1.0, lambda_mi=1.0, lambda_term="paper")["information"]
    assert paper.item() == -18.0


@pytest.mark.parametrize("chosen", [0, 1])
def test_too_few_selected_give_zero_with_its_gradients(chosen: int) -> None:
    values = [v.requires_grad_() for v in estimates(3, 0)]
    terms = ours(values, [i < chosen for i in range(3)], alpha=5.0, lambda_mi=0.1)
    assert terms["cosine_natural"].item() == terms["cosine_adversarial"].item() == 0.0
    gradients = torch.autograd.grad(terms["cosine_natural"] + terms["cosine_adversarial"], values)
    assert all(torch.equal(g, torch.zeros(3, dtype=torch.float64)) for g in gradients)
    assert (terms["information"].item() == 0.0) is (chosen == 0)


# ---------------------------------------------------------------- the regularizer
def digits(count: int = 12, *, seed: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, size, size, generator=generator)
    made = Batch(x=x, y=torch.randint(CLASSES, (count,), generator=generator), index=torch.arange(count))
    made.views["adversarial"] = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return made


def network(seed: int = 0) -> CNNTiny:
    """Of decided and varied opinions, so that what is selected varies."""
    torch.manual_seed(seed)
    net = CNNTiny(num_classes=CLASSES, in_channels=1, image_size=8, width=0.25)
    with torch.no_grad():
        features = net.features(digits(64, seed=9).x)
        net.head.weight.normal_().div_(features.std())
        net.head.bias.copy_(-net.head.weight @ features.mean(dim=0))
    return net


def stage_two(seed: int = 1, **options: Any) -> dict[str, Any]:
    """What a finished run of mi_estimators holds; its batch-norm statistics have seen images."""
    defense = MIEstimators(**{"hsize": 8, **options})
    defense.inspect_every = 0
    defense.attach(network(seed))
    defense.train()
    for step in range(3):
        defense.training_step(digits(20, seed=step), step)
    return defense.state_dict()


def equipped(net: nn.Module | None = None, **options: Any) -> Namid:
    term = Namid(**{"hsize": 8, "alpha": 2.0, "lambda_mi": 0.3, **options})
    term.adapt(network() if net is None else net)
    term.take(stage_two())
    return term


def labelled(net: nn.Module, data: Batch) -> Batch:
    """With labels of which every third is not what the network says; which of the others an attack breaks, varies."""
    with torch.no_grad():
        data.y = net(data.x).argmax(dim=1)
        data.y[::3] = (data.y[::3] + 1) % CLASSES
        selected = broken_by_attack(net(data.x), net(data.views["adversarial"]), data.y)
    assert 2 <= selected.sum() < len(data)
    return data


@pytest.mark.parametrize("selection", ["current", "reference"])
def test_terms_are_those_of_the_critics_scores(selection: str) -> None:
    net = network().double()
    term = equipped(net, selection=selection).double()
    data = digits(9)
    data.x, data.views["adversarial"] = data.x.double(), 1 - data.x.double()
    judge = net if selection == "current" else term.reference
    data = labelled(judge, data)
    found = term.terms(Views(net, data))

    x, adv = data.x, data.views["adversarial"]
    outputs = [net(x).tolist(), net(adv).tolist()]

    def literal(critic: nn.Module, former: Tensor) -> tuple[list[float], list[float]]:
        state = {name: v.tolist() for name, v in critic.state_dict().items() if isinstance(v, Tensor)}
        # the transcription of the convolutions is slow: it has its own test
        patches = critic.embed_images(former).tolist()  # type: ignore[operator]
        pairs = []
        for z in outputs:
            whole = [ref._embed(row, "whole", state) for row in z]
            u = [
                [[sum(a * p[h][k] for h, a in enumerate(g)) for k in range(len(p[0]))] for p in patches] for g in whole
            ]
            pairs.append(ref.local_donsker_varadhan(u))
        return pairs[0], pairs[1]

    selected = ref.selection(judge(x).tolist(), judge(adv).tolist(), data.y.tolist())
    assert 2 <= sum(selected) < 9
    expected = ref.namid_terms(
        literal(term.natural, x), literal(term.adversarial, adv - x), selected, alpha=2.0, lambda_mi=0.3
    )
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-8)
    assert term.readings()["selected"].item() == sum(selected)


def test_the_gradient_reaches_the_network_through_both_views_and_nothing_else() -> None:
    net = network()
    term, data = equipped(net), digits()
    seen = Views(net, labelled(net, data))
    gradients = torch.autograd.grad(sum(term.terms(seen).values(), torch.zeros(())), list(seen.computed().values()))
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not any(p.requires_grad for p in term.parameters())


def test_the_estimators_stay_as_they_are() -> None:
    net = network()
    term = Namid(hsize=8)
    defense = StandardAT().attach(net, regularizers={"namid": term})
    term.take(stage_two())
    before = {name: v.clone() for name, v in term.state_dict().items() if isinstance(v, Tensor)}
    defense.train()
    assert not any(module.training for module in term.modules())
    defense.inspect_every = 0
    defense.training_step(labelled(net, digits()), 0).backward()
    after = term.state_dict()
    assert all(torch.equal(after[name], v) for name, v in before.items())
    assert all(p not in set(term.parameters()) for p in defense.trained_parameters())


@pytest.mark.parametrize("defense", [StandardAT, Trades, Mart, CE])
def test_it_adds_to_the_loss_of_any_defense(defense: type) -> None:
    net = network()
    made, data = defense(), labelled(net, digits())
    term = Namid(hsize=8)
    made.attach(net, regularizers={"namid": term})
    term.take(stage_two())
    terms = made.all_terms(Views(net, data))
    alone = defense().attach(net).all_terms(Views(net, data))
    own = {name for name in terms if name.startswith("namid/")}
    assert own == {"namid/cosine_natural", "namid/cosine_adversarial", "namid/information"}
    assert terms["loss"].item() == pytest.approx(alone["loss"].item() + sum(terms[n].item() for n in own), rel=1e-5)
    assert set(made.readings()) >= {"namid/selected", "namid/natural_adversarial"}


def test_the_defense_is_standard_at_with_the_regularizer() -> None:
    losses = []
    for build in (lambda: NamidDefense(hsize=8, alpha=2.0), lambda: StandardAT()):
        net, made = network(), build()
        added = {} if isinstance(made, NamidDefense) else {"namid": Namid(hsize=8, alpha=2.0)}
        made.attach(net, regularizers=added)
        made.inspect_every = 0
        term = made.added_terms()["namid"]
        assert isinstance(term, Namid)
        term.take(stage_two())
        loss = made.training_step(labelled(net, digits()), 0)
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in net.parameters()), *sorted(made.state_dict())])
    for first, second in zip(*losses, strict=True):
        assert first == second if isinstance(first, str) else torch.equal(first, second)


def test_at_zero_it_is_the_base_loss_and_forwards_nothing() -> None:
    net = network()
    term = Namid(alpha=0.0)
    made = StandardAT().attach(net, regularizers={"namid": term})
    seen = Views(net, digits())
    assert set(made.all_terms(seen)) == {"ce", "loss"}
    assert set(seen.computed()) == {"adversarial"}
    assert term.coupled == ""
    assert list(term.parameters()) == []
    term.on_fit_start(Any)  # type: ignore[arg-type]  # nothing is missing


def test_a_batch_of_one_gives_zero() -> None:
    net = network()
    term = equipped(net)
    terms = term.terms(Views(net, digits(1)))
    assert {value.item() for value in terms.values()} == {0.0}
    sum(terms.values(), torch.zeros(())).backward()


def test_training_without_estimators_is_refused() -> None:
    term = Namid(hsize=8)
    term.adapt(network())
    with pytest.raises(ValueError, match=r"no trained estimators: use mi_at\.train"):
        term.on_fit_start(Context)  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["current", "reference"])
def test_the_checkpoint_needs_no_other_file(selection: str) -> None:
    net = network()
    first = equipped(net, selection=selection)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = Namid(hsize=8, alpha=2.0, lambda_mi=0.3, selection=selection)
    second.adapt(net)
    second.load_state_dict(torch.load(saved, weights_only=True))
    second.on_fit_start(Context)  # type: ignore[arg-type]
    data = labelled(net, digits())
    a, b = (term.terms(Views(net, data)) for term in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_estimators_for_something_else_are_refused() -> None:
    term = Namid(hsize=16)
    term.adapt(network())
    with pytest.raises(ValueError, match="trained for hsize=8 instead of 16"):
        term.take(stage_two())
    reference = Namid(hsize=8, selection="reference")
    reference.adapt(CNNTiny(num_classes=CLASSES, in_channels=1, image_size=8))
    with pytest.raises(ValueError, match="Error"):
        reference.take(stage_two())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"regularizer.namid.alpha=-1.0: expected 0 or more"),
        ({"lambda_mi": float("nan")}, r"regularizer.namid.lambda_mi=nan: expected 0 or more"),
        ({"lambda_term": "clip"}, r"regularizer.namid.lambda_term='clip': expected one of clipped, paper, off"),
        ({"selection": "all"}, r"regularizer.namid.selection='all': expected one of current, reference"),
        (
            {"estimator_objective": "eq6"},
            r"estimator_objective='eq6': expected one of eq5, eq4, eq4_selected, released",
        ),
        ({"hsize": 0}, r"regularizer.namid.hsize=0: expected 1 or more"),
        ({"estimator_epochs": 0}, r"regularizer.namid.estimator_epochs=0: expected 1 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Namid(**options)
    with pytest.raises(ValueError, match=message.replace("regularizer.namid.", "defense.")):
        NamidDefense(**options)


# ---------------------------------------------------------------- cost
HSIZE = 256


@pytest.fixture(scope="module")
def resnet() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(num_classes=10, in_channels=3, image_size=32)


def test_a_step_costs_26_forwards_and_two_estimates(resnet: ResNet18) -> None:
    """An estimate: patches embedded once, without gradients; both views' outputs scored, with gradients to them."""
    term = Namid(hsize=HSIZE)
    run, data = step_of(StandardAT(), resnet, namid=term), batch()
    with FlopCount() as forward, torch.no_grad():
        resnet(data.x)
    outputs = [torch.randn(len(data), 10, requires_grad=True) for _ in range(2)]
    with FlopCount() as estimate:
        with torch.no_grad():
            patches = term.natural.embed_images(data.x)  # type: ignore[operator]
        columns = patches.transpose(0, 1).flatten(1)
        for z in outputs:
            (term.natural.embed_outputs(z) @ columns).sum().backward()  # type: ignore[operator]
    with FlopCount() as count:
        run(data)
    assert count.flop == pytest.approx(26 * forward.flop + 2 * estimate.flop, rel=0.01)
    assert estimate.flop > 0.005 * forward.flop


def test_a_step_reads_nothing_back() -> None:
    torch.manual_seed(0)
    net = ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.1)
    run = step_of(StandardAT(), net, namid=Namid(hsize=8))
    run(batch(4))
    with Reads() as reads:
        run(batch(4))
    assert reads.places <= {"_mix_int", "check_images"}


@pytest.mark.parametrize("kept", ["natural", "adversarial"])
def test_without_one_information_the_terms_of_the_other_are_left(kept: str) -> None:
    """NAMID, Figure 5."""
    values, selected = estimates(6, 2), [True, True, False, True, True, False]
    values[3].abs_()  # above the hinge
    both = ours(values, selected, alpha=2.0, lambda_mi=0.5)
    one = ours(values, selected, alpha=2.0, lambda_mi=0.5, information=kept)
    assert set(one) == {f"cosine_{kept}", "information"}
    assert torch.equal(one[f"cosine_{kept}"], both[f"cosine_{kept}"])
    other = ours(
        values, selected, alpha=2.0, lambda_mi=0.5, information={"natural": "adversarial"}.get(kept, "natural")
    )
    assert (one["information"] + other["information"]).item() == pytest.approx(both["information"].item(), abs=1e-6)
    assert (one["information"] < 0) == (kept == "natural") or values[1].mean() < 0
    with pytest.raises(ValueError, match="information='neither': expected one of both, natural, adversarial"):
        Namid(information="neither")
