"""What an evaluation gives beside accuracies: two rows of minimum-norm attacks, examples, images, survivors, flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationError, EvaluationResult, Examples, evaluate
from tests.evaluation.nets import Halfspace, Planted, images, loader, predicted, small_conv

PGD_WORST = PGD(eps=0.02, step_size=0.005, steps=6, iterate="worst")


def run(net: nn.Module, attacks: dict, x: Tensor, y: Tensor, **options: Any) -> EvaluationResult:
    return evaluate(net, attacks, loader(x, y), **{"progress": False, **options})


@pytest.fixture
def half() -> tuple[Halfspace, Tensor, Tensor]:
    net, x = Halfspace(), images(61, low=0.3, high=0.7)
    y = predicted(net, x)
    y[::6] = 1 - y[::6]
    return net, x, y


@pytest.fixture(scope="module")
def conv() -> tuple[nn.Module, Tensor, Tensor]:
    net, x = small_conv(), images(80, side=8)
    y = predicted(net, x)
    y[::7] = (y[::7] + 1) % 10
    return net, x, y


# ---------------------------------------------------------------- minimum norm
@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The exact nearest adversarial image of Halfspace under l2, a hair behind the boundary; none beyond `reach`."""

    minimum_norm: ClassVar[bool] = True
    within: float | None = None
    reach: float = 10.0

    def __call__(self, net: Any, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        distance = net.falls_within(x, y)["l2"]
        away = net.weight / net.weight.norm() * (1 - 2 * y.view(-1, 1))
        moved = x + (away * (distance + 1e-4).view(-1, 1)).view_as(x)
        return torch.where((distance < self.reach).view(-1, 1, 1, 1), moved, x)

    def describe(self) -> dict[str, Any]:
        return {"attack": "nearest", "name": "nearest", "norm": "l2", "eps": None, "within": self.within, "steps": 1}


def test_minimum_norm_attacks_have_two_rows(half) -> None:
    net, x, y = half
    distance = net.falls_within(x, y)["l2"]
    within, reach = 0.1, 0.2
    other = PGD(eps=within, step_size=0.02, steps=10, norm="l2")
    result = run(net, {"near": Nearest(within=within, reach=reach), "pgd": other}, x, y)
    assert list(result.attacks) == ["near", "near within", "pgd"]
    right = distance > 0
    far, near = result["near"], result["near within"]
    assert torch.equal(far.correct, right & (distance >= reach))
    assert torch.equal(near.correct, right & (distance + 1e-4 > within))
    assert 0 < far.accuracy < near.accuracy < result.clean.accuracy
    found = right & (distance < reach)
    assert torch.allclose(far.distance[found], distance[found], atol=2e-4)
    assert float(far.distance[~found].abs().max()) == 0.0
    assert float(near.distance.max()) <= within
    assert far.description["eps"] is None
    assert near.description["eps"] == within
    assert near.description["name"] == near.name == "near within"
    # The steps of a minimum-norm attack say nothing about a radius.
    assert far.flags == near.flags == ()
    # Only the second row has a threat model.
    (union,) = result.worst_cases()
    assert union.description["members"] == ["near within", "pgd"]
    assert torch.equal(union.correct, near.correct & result["pgd"].correct)


def test_without_a_radius_there_is_one_row_and_no_union(half) -> None:
    net, x, y = half
    result = run(net, {"near": Nearest(), "pgd": PGD(eps=0.1, step_size=0.02, steps=10, norm="l2")}, x, y)
    assert list(result.attacks) == ["near", "pgd"]
    assert result.worst_cases() == []
    with pytest.raises(EvaluationError, match="named 'near within', as the second row of 'near'"):
        run(net, {"near": Nearest(within=0.1), "near within": FGSM(eps=0.1)}, x, y)


# ---------------------------------------------------------------- examples and images
def test_examples_are_the_most_confident_of_the_broken(conv) -> None:
    net, x, y = conv
    attacks = {"fgsm": FGSM(eps=0.04), "worst": PGD_WORST, "none": Planted(lambda net, x, y: x)}
    for keep, batch_size in ((8, 16), (8, 500), (3, 7)):
        result = run(net, attacks, x, y, keep=keep, batch_size=batch_size)
        assert set(result.examples) == set(attacks)
        for name, attack in (("fgsm", attacks["fgsm"]), ("worst", attacks["worst"])):
            examples = result.examples[name]
            x_adv = attack(net, x, y, ids=torch.arange(len(x)), seed=0)
            with torch.no_grad():
                confidence, prediction = net(x_adv).softmax(dim=1).max(dim=1)
            broken = (~result[name].correct & result.clean.correct).nonzero().squeeze(1)
            assert len(broken) > keep
            expected = broken[confidence[broken].argsort(descending=True)[:keep]]
            assert torch.equal(examples.index, expected)
            assert torch.equal(examples.label, y[expected])
            assert torch.equal(examples.clean_prediction, y[expected])
            assert torch.equal(examples.prediction, prediction[expected])
            assert torch.equal(examples.x, x[expected])
            assert torch.allclose(examples.x_adv, x_adv[expected], atol=2e-6)
            assert torch.allclose(examples.confidence, confidence[expected], atol=1e-5)
        assert len(result.examples["none"].index) == 0
        assert result.examples["none"].x_adv.shape == (0, 1, 8, 8)
    assert run(net, {"fgsm": FGSM(eps=0.04)}, x, y, keep=0).examples["fgsm"].x.shape == (0, 1, 8, 8)


def test_examples_of_a_minimum_norm_attack_keep_to_their_row(half) -> None:
    net, x, y = half
    result = run(net, {"near": Nearest(within=0.1)}, x, y, keep=100)
    moved = (result.examples["near within"].x_adv - result.examples["near within"].x).flatten(1).norm(dim=1)
    assert 0 < len(moved) < len(result.examples["near"].index)
    assert float(moved.max()) <= 0.1


def test_images_of_every_sample_wrong_ones_too(conv) -> None:
    net, x, y = conv
    attack = PGD(eps=0.03, step_size=0.01, steps=4)
    whole = {"pgd": attack, "aa": AutoAttack(eps=0.03, attacks=["apgd-ce"], batch_size=16), "other": FGSM(eps=0.03)}
    result = run(net, whole, x, y, keep_images=("pgd", "aa"), n_of={"aa": 50}, batch_size=9)
    assert set(result.images) == {"pgd", "aa"}
    expected = attack(net, x, y, ids=torch.arange(len(x)), seed=0)
    assert torch.allclose(result.images["pgd"], expected, atol=2e-6)
    wrong = ~result.clean.correct
    assert (result.images["pgd"] != x)[wrong].flatten(1).any(dim=1).all()
    # What was wrong when clean stays wrong in the row, whatever its image does.
    assert torch.equal(result["pgd"].prediction[wrong], result.clean.prediction[wrong])
    assert torch.equal(result["pgd"].prediction, run(net, {"pgd": attack}, x, y)["pgd"].prediction)
    # AutoAttack's image is the clean one where it broke nothing.
    moved = (result.images["aa"] != x[:50]).flatten(1).any(dim=1)
    assert torch.equal(moved, result.clean.correct[:50] & ~result["aa"].correct)
    assert moved.any()


def test_images_need_an_attack_that_does_not_stop(conv) -> None:
    net, x, y = conv
    for attack in (PGD_WORST, PGD(eps=0.1, step_size=0.1, steps=1, restarts=2)):
        with pytest.raises(EvaluationError, match="keep_images names pgd, which stops at the first success"):
            run(net, {"pgd": attack}, x, y, keep_images=("pgd",))
    with pytest.raises(EvaluationError, match=r"keep_images names pgd_40: expected one of pgd"):
        run(net, {"pgd": PGD_WORST}, x, y, keep_images=("pgd_40",))


# ---------------------------------------------------------------- the same answer
ATTACKS = {
    "worst": PGD(eps=0.02, step_size=0.005, steps=4, iterate="worst"),
    "starts": PGD(eps=0.02, step_size=0.005, steps=3, restarts=3),
    "margin": PGD(eps=0.02, step_size=0.005, steps=3, objective="margin", kappa=50.0, restarts=2, iterate="worst"),
    "fgsm": FGSM(eps=0.02),
    "l2": PGD(eps=0.1, step_size=0.03, steps=3, norm="l2", iterate="worst"),
}


def same(one: EvaluationResult, other: EvaluationResult, names: Any = ATTACKS) -> None:
    for name in names:
        assert torch.equal(one[name].prediction, other[name].prediction), name
        assert torch.allclose(one[name].distance, other[name].distance, atol=2e-6), name
        assert torch.equal(one.examples[name].index, other.examples[name].index), name


def test_same_outcomes_with_and_without_active_set_in_any_batches(conv) -> None:
    net, x, y = conv
    expected = run(net, ATTACKS, x, y, batch_size=500, active=False)
    assert all(0.1 < expected[name].accuracy < expected.clean.accuracy for name in ATTACKS)
    for options in (
        {"batch_size": 16},
        {"batch_size": 500},
        {"batch_size": 16, "active": False},
        {"batch_size": "auto"},
    ):
        same(run(net, ATTACKS, x, y, **options), expected)


def test_union_is_the_same_on_survivors(conv) -> None:
    net, x, y = conv

    def paint(by: float) -> Planted:
        """Brighter or darker: neither breaks all that the other one does."""
        return Planted(lambda net, x, y: (x + by).clamp(0, 1), eps=0.06)

    attacks = {
        "one": paint(0.06),
        "two": paint(-0.06),
        "other_ball": FGSM(eps=0.07),
        "three": PGD(eps=0.06, step_size=0.03, steps=2, restarts=2, iterate="worst"),
        "fgsm": FGSM(eps=0.06),
    }
    alone = run(net, attacks, x, y)
    spared = run(net, attacks, x, y, survivors=True)
    (one,), (other,) = alone.worst_cases(), spared.worst_cases()
    assert one.name == other.name == "worst of one, two, three, fgsm"
    assert torch.equal(one.prediction, other.prediction)
    assert torch.allclose(one.distance, other.distance, atol=2e-6)
    assert all(alone[name].accuracy > one.accuracy for name in ("one", "two"))
    # The last row of the threat model is the union, and each says that it is no attack alone.
    assert torch.equal(spared["fgsm"].prediction, other.prediction)
    assert [name for name in attacks if spared[name].description.get("of") == "survivors"] == ["two", "three", "fgsm"]
    assert torch.equal(spared["two"].correct, alone["one"].correct & alone["two"].correct)
    assert spared["two"].accuracy < min(alone["one"].accuracy, alone["two"].accuracy)
    assert not any("of" in alone[name].description for name in attacks)
    assert spared["two"].name == "two"


def test_survivors_are_packed_over_the_whole_set_and_counted_per_n(half) -> None:
    net, x, y = half
    first = Planted(lambda net, x, y: FGSM(eps=0.02)(net, x, y, ids=y, seed=0), eps=0.02)
    second, fewer = Planted(lambda net, x, y: x, eps=0.02), Planted(lambda net, x, y: x, eps=0.02)
    wider = Planted(lambda net, x, y: x, eps=0.03)
    attacks = {"first": first, "fewer": fewer, "wider": wider, "second": second}
    result = run(net, attacks, x, y, survivors=True, n_of={"fewer": 30}, batch_size=10)
    survivors = result["first"].correct.nonzero().squeeze(1)
    right = result.clean.correct.nonzero().squeeze(1)
    assert 0 < len(survivors) < len(right)
    assert torch.equal(torch.cat(second.ids), survivors)
    assert [len(ids) for ids in second.ids[:-1]] == [10] * (len(second.ids) - 1)
    assert torch.equal(torch.cat(wider.ids), right)  # another ball
    assert torch.equal(torch.cat(fewer.ids), right[right < 30])  # another n
    assert "of" not in result["fewer"].description


def test_attack_whose_images_are_wanted_runs_on_all_even_so(conv) -> None:
    net, x, y = conv
    attacks = {"fgsm": FGSM(eps=0.03), "pgd": PGD(eps=0.03, step_size=0.01, steps=4)}
    spared = run(net, attacks, x, y, survivors=True, keep_images=("pgd",))
    same(spared, run(net, attacks, x, y), attacks)
    assert "of" not in spared["pgd"].description


def test_minimum_norm_attacks_spare_later_ones_what_is_within(half) -> None:
    net, x, y = half
    later = Planted(lambda net, x, y: x, eps=0.1, norm="l2")
    result = run(net, {"near": Nearest(within=0.1), "later": later}, x, y, survivors=True)
    assert torch.equal(torch.cat(later.ids), result["near within"].correct.nonzero().squeeze(1))
    assert torch.equal(result["later"].correct, result["near within"].correct)


# ---------------------------------------------------------------- fixed blocks
@dataclass(frozen=True)
class Coupled:
    """Its result depends on its companions; keeps the ids of every call."""

    batch_coupled: ClassVar[bool] = True
    batch_size: int | None = None
    calls: list[list[int]] = field(default_factory=list)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        self.calls.append(ids.tolist())
        return (x + 0.1 * (x.mean() - x).sign()).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        return {"attack": "coupled", "name": "coupled", "norm": "linf", "eps": 0.1}


def test_batch_coupled_attacks_keep_fixed_blocks_with_the_wrong_ones(half) -> None:
    net, x, y = half
    attack = Coupled()
    result = run(net, {"fgsm": FGSM(eps=0.1), "coupled": attack}, x, y, batch_size=16, survivors=True)
    assert attack.calls == [list(range(16)), list(range(16, 32)), list(range(32, 48)), list(range(48, 61))]
    assert result["coupled"].description["batch_size"] == 16
    wrong = ~result.clean.correct
    assert torch.equal(result["coupled"].prediction[wrong], result.clean.prediction[wrong])
    own = Coupled(batch_size=40)
    assert run(net, {"coupled": own}, x, y, batch_size=16)["coupled"].description["batch_size"] == 40
    assert [len(ids) for ids in own.calls] == [40, 21]
    own = Coupled(batch_size=20)
    run(net, {"coupled": own}, x, y)
    assert [len(ids) for ids in own.calls] == [20, 20, 21], "61 = 3 x 20 + 1, and one alone has no companions"


# ---------------------------------------------------------------- memory
class Small(nn.Module):
    """A network that runs out of memory above so many images."""

    def __init__(self, net: nn.Module, fits: int) -> None:
        super().__init__()
        self.net, self.fits = net, fits

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.net(x)


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(conv, capsys: pytest.CaptureFixture[str]) -> None:
    net, x, y = conv
    expected = run(net, ATTACKS, x, y, batch_size=500)
    # The clean pass meets the limit first; an attack that needs more than it comes later.
    hungry = Planted(lambda net, x, y: net(torch.cat([x, x]))[: len(x)] is None or x, eps=0.1)
    result = run(Small(net, 11), {**ATTACKS, "hungry": hungry}, x, y, batch_size=64, progress=True)
    same(result, expected)
    assert result.batch_size == 4
    assert "evaluation: hungry: out of memory: 4 samples at once from here on" in capsys.readouterr().err


def test_memory_that_runs_out_is_flagged_where_it_changes_the_result(conv) -> None:
    net, x, y = conv
    attacks = {"aa": AutoAttack(eps=0.02, attacks=["apgd-ce"], batch_size=40), "coupled": Coupled(batch_size=40)}
    result = run(Small(net, 16), attacks, x, y, batch_size=8)
    assert result["aa"].flags == ("memory",)
    assert "a batch of 40 did not fit into memory and was attacked in parts of" in result["aa"].messages["memory"]
    assert result["aa"].accuracy < result.clean.accuracy
    plenty = run(net, attacks, x, y, batch_size=8)
    assert plenty["aa"].flags == plenty["coupled"].flags == ()


# ---------------------------------------------------------------- flags and refusals
def test_probabilities_are_flagged_on_every_row(conv) -> None:
    net, x, y = conv
    result = run(nn.Sequential(net, nn.Softmax(dim=1)), {"fgsm": FGSM(eps=0.02), "pgd": PGD_WORST}, x, y)
    assert len(result.rows()) == 4
    for row in result.rows():
        assert "softmax" in row.flags, row.name
        assert row.messages["softmax"].startswith("the network returns a probability distribution, not logits")
        assert 0 <= row.accuracy <= 1
    for other in (net, nn.Sequential(net, nn.LogSoftmax(dim=1)), nn.Sequential(net, nn.Sigmoid()), Centred(net)):
        assert run(other, {"fgsm": FGSM(eps=0.02)}, x, y)["fgsm"].flags == ()


class Centred(nn.Module):
    """Logits that add up to 1, as any may."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z - z.mean(dim=1, keepdim=True) + 1 / z.shape[1]


def test_one_output_that_is_no_distribution_is_enough_not_to_flag(conv) -> None:
    _, x, y = conv

    class Almost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = x.flatten(1)[:, :10].softmax(dim=1)
            return torch.where(x.flatten(1)[:, :1] > 0.99, 2 * p, p)

    x = x.clone()
    x[0, 0, 0, 0] = 1.0
    assert run(Almost(), {}, x, y).clean.flags == ()
    x[:, 0, 0, 0] *= 0.9
    assert run(Almost(), {}, x, y).clean.flags == ("softmax",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 100}, r"the network has 10 classes, the data set 100: is it a network for another data set\?"),
        ({"batch_size": 0}, r"batch_size=0: expected 1 or more, or auto"),
        ({"batch_size": "big"}, r"batch_size=big: expected 1 or more, or auto"),
        ({"processes": 0}, r"processes=0: expected 1 or more"),
        ({"keep": -1}, r"keep=-1: expected 0 or more"),
    ],
)
def test_settings_out_of_range(conv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(conv[0], {}, conv[1], conv[2], **options)


def bad(x: Tensor, y: Tensor, index: Tensor) -> Callable[[], object]:
    return lambda: evaluate(small_conv(), {}, [(x, y, index)], progress=False)


def test_samples_that_do_not_fit_the_network_or_each_other() -> None:
    y, index = torch.zeros(4, dtype=torch.long), torch.arange(4)
    with pytest.raises(EvaluationError, match=r"the network fails on images \(4, 3, 8, 8\): .*channels"):
        bad(torch.rand(4, 3, 8, 8), y, index)()
    with pytest.raises(EvaluationError, match=r"the network fails on images \(4, 1, 16, 16\): .*multiplied"):
        bad(torch.rand(4, 1, 16, 16), y, index)()
    two = [(torch.rand(2, 1, s, s), y[:2], index[:2] + s) for s in (8, 9)]
    with pytest.raises(EvaluationError, match=r"images are \(1, 9, 9\) after \(1, 8, 8\): expected one shape"):
        evaluate(small_conv(), {}, two, progress=False)
    with pytest.raises(EvaluationError, match=r"labels are torch.float32 \(4,\) for 4 images: expected integers \[B\]"):
        bad(torch.rand(4, 1, 8, 8), y.float(), index)()
    with pytest.raises(EvaluationError, match=r"labels are torch.int64 \(4, 10\)"):
        bad(torch.rand(4, 1, 8, 8), nn.functional.one_hot(y, 10), index)()
    with pytest.raises(EvaluationError, match=r"indices are torch.int64 \(3,\) for 4 images"):
        bad(torch.rand(4, 1, 8, 8), y, index[:3])()


def test_budgets_of_another_kind_are_the_attacks_own(conv) -> None:
    net, x, y = conv
    moves = Planted(lambda net, x, y: (x + 0.3).clamp(0, 1), eps=0.01, norm="wasserstein")
    row = run(net, {"moves": moves}, x, y)["moves"]
    assert row.max_distance == pytest.approx(0.3)  # in l_inf
    with pytest.raises(EvaluationError, match="left the pixel range"):
        run(net, {"moves": Planted(lambda net, x, y: x + 1, eps=0.01, norm="wasserstein")}, x, y)


def test_a_number_of_its_own_may_be_left_open(conv) -> None:
    net, x, y = conv
    result = run(net, {"fgsm": FGSM(eps=0.02)}, x, y, n=20, n_of={"fgsm": None})
    assert result["fgsm"].n == 20


def test_examples_are_exported() -> None:
    assert {"index", "label", "clean_prediction", "prediction", "x", "x_adv"} <= set(Examples.__dataclass_fields__)
