"""Ascent over starts, the training loss and the feature distance as attacks: known optima, contracts, refusals."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.adaptive import Adaptive, FeatureShift, feature_shift
from mi_at.attacks.pgd import PGD, pgd
from mi_at.attacks.restarts import Ascent
from mi_at.data.batch import Batch
from mi_at.defenses.standard_at import StandardAT
from mi_at.evaluation.evaluate import evaluate
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.ncmi import NCMI
from tests.attacks.test_linear_model import Y, images, linear, normal

IDS = torch.tensor([11, 3, 8, 40, 5])


def network(classes: int = 3, seed: int = 0) -> CNNTiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNNTiny(num_classes=classes, in_channels=1, image_size=8, width=0.2).eval()


def pictures(n: int = 7, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=g), torch.arange(n) % 3, torch.randperm(100, generator=g)[:n]


def ce_loss(net: nn.Module):
    """The training loss of standard_at, written out: a mean over the batch."""
    return lambda x, y, ids: lambda x_adv: objectives.cross_entropy(net, y)(x_adv).mean()


class Bent(nn.Module):
    """Two classes; the second's logit is the larger of two linear functions (seen from class 0 it is convex)."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.pieces = nn.Parameter(torch.stack([first, second]))

    def forward(self, x: Tensor) -> Tensor:
        high = (x.flatten(1) @ self.pieces.T).amax(dim=1)
        return torch.stack([torch.zeros_like(high), high], dim=1)


class TestKnownOptima:
    @pytest.mark.parametrize("eps", [0.03, 0.3])
    @pytest.mark.parametrize("init", ["uniform", "gaussian", "zero"])
    def test_linf_on_a_linear_model_exactly(self, eps: float, init: str) -> None:
        net, x = linear(2), images()
        expected = (x + eps * normal(net, Y).sign()).clamp(0, 1)
        attack = Adaptive(eps=eps, step_size=eps / 4, steps=9, init=init, restarts=2).with_training_loss(ce_loss(net))
        torch.testing.assert_close(attack(net, x, Y, ids=IDS, seed=0), expected, rtol=0, atol=1e-15)

    def test_l2_on_a_linear_model_within_a_percent(self) -> None:
        net, x = linear(2), images(low=0.4, high=0.6)
        w = normal(net, Y)
        for objective in ("adaptive", "margin"):  # PGD-l2 on the Carlini-Wagner margin too
            eps = 0.3
            if objective == "adaptive":
                attack = Adaptive(eps=eps, step_size=eps / 4, steps=20, norm="l2").with_training_loss(ce_loss(net))
            else:
                attack = PGD(eps=eps, step_size=eps / 4, steps=20, norm="l2", objective="margin", kappa=50.0)
            x_adv = attack(net, x, Y, ids=IDS, seed=0)
            margin = objectives.margin(net, Y, 1e9)
            gain = (margin(x_adv) - margin(x)).detach() / (eps * w.flatten(1).norm(dim=1))
            assert float(gain.min()) >= 0.99
            assert float(gain.max()) <= 1 + 1e-9

    def test_restarts_find_the_better_piece(self) -> None:
        """From one side of the bend a climb ends at the lower of two optima; of many starts some end at the higher."""
        first, second = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([-1.5, 0.0, 0.0, 0.1])
        net = Bent(first, second).double()
        x = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64).view(1, 1, 2, 2).repeat(40, 1, 1, 1)
        x[:, 0, 0, 0] = 0.2  # f1 = .2, f2 = -.25: on the first piece
        y, ids = torch.zeros(40, dtype=torch.int64), torch.arange(40)
        eps = 0.2
        optimum = 0.4  # max(0.4, -1.5 * 0 + 0.07)
        once = Adaptive(eps=eps, step_size=0.05, steps=12).with_training_loss(ce_loss(net))(net, x, y, ids=ids, seed=0)
        many = Adaptive(eps=eps, step_size=0.05, steps=12, restarts=8)
        several = many.with_training_loss(ce_loss(net))(net, x, y, ids=ids, seed=0)
        reached = [net(found)[:, 1].detach() for found in (once, several)]
        assert float(reached[0].min()) < 0.1, "some single starts end on the wrong side"
        torch.testing.assert_close(reached[1], torch.full_like(reached[1], optimum), rtol=0, atol=1e-12)

    def test_features_of_a_linear_layer_go_to_a_corner(self) -> None:
        """One feature, w x: its distance is largest at x +- eps sign(w), on the side of the start."""

        class OneFeature(nn.Module):
            tap_names = ("features",)

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))

            def forward_taps(self, x: Tensor, names: object = None) -> tuple[Tensor, dict[str, Tensor]]:
                feature = (x.flatten(1) @ self.weight)[:, None]
                return torch.cat([feature, -feature], dim=1), {"features": feature}

            def forward(self, x: Tensor) -> Tensor:
                return self.forward_taps(x)[0]

        net = OneFeature()
        x = 0.4 + 0.2 * pictures()[0]
        y, ids = torch.arange(7) % 2, torch.arange(7)
        x_adv = FeatureShift(eps=0.1, step_size=0.05, steps=5)(net, x, y, ids=ids, seed=0)
        reached = feature_shift(net, "features", x)(x_adv)
        torch.testing.assert_close(reached, (0.1 * net.weight.abs().sum()).square().expand(7), rtol=1e-4, atol=0)


class TestAscent:
    def test_the_start_that_ends_with_the_largest_margin(self) -> None:
        """Also where it is not the last, and whatever the objective says."""
        net = network()
        x, y, ids = pictures()
        ascent = Ascent(eps=0.2, step_size=0.05, steps=3, restarts=4)
        objective, margin = objectives.dlr(net, y), objectives.margin(net, y, float("inf"))
        best = ascent.ascend(lambda s: objective, lambda s: margin, x, ids=ids, seed=5)
        singles = []
        for restart in range(4):
            start = ascent._start(x, ids, 5 * 1009 + restart)
            x_adv = pgd(objective, x, eps=0.2, step_size=0.05, steps=3, init=start)
            singles.append(margin(x_adv).detach())
        assert len({int(k) for k in torch.stack(singles).argmax(0)}) > 1
        torch.testing.assert_close(margin(best).detach(), torch.stack(singles).amax(0))

    def test_logits_that_are_no_numbers_win(self) -> None:
        x, _, ids = pictures(2)
        calls = iter([torch.tensor([torch.nan, 1.0]), torch.tensor([5.0, 2.0])])
        ascent = Ascent(eps=0.2, step_size=0.1, steps=1, restarts=2)
        total = lambda z: z.flatten(1).sum(1)  # noqa: E731
        best = ascent.ascend(lambda s: total, lambda s: lambda z: next(calls), x, ids=ids, seed=0)
        first = Ascent(eps=0.2, step_size=0.1, steps=1).ascend(lambda s: total, lambda s: total, x, ids=ids, seed=0)
        assert torch.equal(best[0], first[0])
        assert not torch.equal(best[1], first[1])

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("init", ["uniform", "gaussian", "zero"])
    def test_starts_are_those_of_pgd(self, norm: str, init: str) -> None:
        """Noise of the same distribution, by (seed, id); another seed, another start."""
        net = network()
        x, y, ids = pictures()
        settings = {"eps": 0.2, "step_size": 0.05, "steps": 2, "norm": norm, "init": init}
        ours = Adaptive(**settings).with_training_loss(ce_loss(net))(net, x, y, ids=ids, seed=3)
        theirs = PGD(**settings)(net, x, y, ids=ids, seed=3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


ATTACKS = {
    "adaptive": lambda net, **o: Adaptive(**o).with_training_loss(ce_loss(net)),
    "feature_shift": lambda net, **o: FeatureShift(tap="last_conv", **o),
}


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("norm", ["linf", "l2"])
class TestContract:
    def attack(self, net: nn.Module, name: str, norm: str, options: dict | None = None):
        settings = {"eps": 0.1 if norm == "linf" else 0.5, "step_size": 0.03, "steps": 4, "norm": norm, "restarts": 2}
        return ATTACKS[name](net, **settings | (options or {}))

    def test_through_the_evaluator(self, name: str, norm: str) -> None:
        """Its budget and range are checked there."""
        net = network()
        x, y, _ = pictures(20)
        attack = self.attack(net, name, norm)
        result = evaluate(net, {name: attack}, [Batch(x=x, y=y, index=torch.arange(20))], progress=False)
        assert result[name].accuracy <= result.clean.accuracy
        assert result[name].description["eps"] == attack.eps
        assert result[name].description["attack"] == name
        plain = [isinstance(v, bool | int | float | str | type(None)) for v in result[name].description.values()]
        assert all(plain), result[name].description

    def test_neither_batch_nor_order_matter(self, name: str, norm: str) -> None:
        net = network()
        x, y, ids = pictures()
        attack = self.attack(net, name, norm)
        whole = attack(net, x, y, ids=ids, seed=0)
        order = torch.tensor([4, 0, 6, 2])
        # Bits of a convolution depend on the batch, and a sign on bits: a pixel or two may go the other way.
        some = attack(net, x[order], y[order], ids=ids[order], seed=0)
        assert float(((some - whole[order]).abs() > 1e-5).float().mean()) < 0.01
        other = attack(net, x, y, ids=ids, seed=1)
        assert not torch.equal(other, whole)

    def test_it_climbs(self, name: str, norm: str) -> None:
        net = network()
        x, y, ids = pictures()
        x_adv = self.attack(net, name, norm, {"restarts": 1})(net, x, y, ids=ids, seed=0)
        objective = objectives.cross_entropy(net, y) if name == "adaptive" else feature_shift(net, "last_conv", x)
        assert (objective(x_adv) > objective(x)).all()

    def test_no_budget_no_change(self, name: str, norm: str) -> None:
        net = network()
        x, y, ids = pictures()
        assert torch.equal(self.attack(net, name, norm, {"eps": 0.0})(net, x, y, ids=ids, seed=0), x)
        assert self.attack(net, name, norm)(net, x[:0], y[:0], ids=ids[:0], seed=0).shape == (0, 1, 8, 8)

    def test_what_it_refuses(self, name: str, norm: str) -> None:
        net = network()
        for options, message in (
            ({"eps": -1.0}, "attack.eps"),
            ({"steps": -1}, "attack.steps"),
            ({"restarts": 0}, "restarts=0"),
            ({"init": "ones"}, "init='ones'"),
            ({"norm": "l1"}, "norm='l1'"),
        ):
            with pytest.raises(ValueError, match=message):
                self.attack(net, name, norm, options)


def test_adaptive_without_a_training_loss() -> None:
    x, y, ids = pictures(2)
    with pytest.raises(ValueError, match=r"attack adaptive has no training loss: bind one, attack\.with_training_loss"):
        Adaptive(eps=0.1, step_size=0.1, steps=1)(network(), x, y, ids=ids, seed=0)
    with pytest.raises(ValueError, match=r"attack\.batch_size=0"):
        Adaptive(eps=0.1, step_size=0.1, steps=1, batch_size=0)


def test_features_need_a_start_and_a_tap() -> None:
    x, y, ids = pictures(2)
    with pytest.raises(ValueError, match="no slope at the clean image"):
        FeatureShift(eps=0.1, step_size=0.1, steps=1, init="zero")
    with pytest.raises(ValueError, match="tap='conv9': expected one of"):
        FeatureShift(eps=0.1, step_size=0.1, steps=1, tap="conv9")(network(), x, y, ids=ids, seed=0)
    with pytest.raises(ValueError, match="the network has no taps"):
        feature_shift(nn.Flatten(), "features", x)


def test_a_coupled_loss_in_fixed_blocks() -> None:
    """The evaluator hands over blocks of the attack's own size: its result does not depend on the evaluation's."""
    net = network()
    term = NCMI(alpha=1.0, beta=2.0)
    defense = StandardAT().attach(net, regularizers={"ncmi": term})
    term.centroids.copy_(torch.softmax(torch.eye(3, dtype=torch.float64), dim=1))
    x, y, _ = pictures(23)
    attack = Adaptive(eps=0.1, step_size=0.03, steps=4, batch_size=8).with_training_loss(defense.training_objective)
    batches = [Batch(x=x, y=y, index=torch.arange(23))]
    results = [
        evaluate(net, {"adaptive": attack}, batches, progress=False, batch_size=size, keep_images=("adaptive",))
        for size in (3, 50)
    ]
    assert torch.equal(results[0].images["adaptive"], results[1].images["adaptive"])
    assert results[0]["adaptive"].description["batch_size"] == 8
    block = slice(8, 16)
    alone = attack(net, x[block], y[block], ids=torch.arange(23)[block], seed=0)
    assert torch.equal(results[0].images["adaptive"][block], alone)
    slopes = []
    for first in (8, 4):  # the same four samples in two blocks of eight
        chosen = torch.arange(first, first + 8)
        leaf = x[chosen].clone().requires_grad_(True)
        loss = defense.training_objective(x[chosen], y[chosen], chosen)(leaf)
        slopes.append(torch.autograd.grad(loss, leaf)[0])
    assert not torch.allclose(slopes[0][:4], slopes[1][4:], rtol=1e-4, atol=0), "companions do matter"


def test_a_bound_attack_can_be_sent_to_another_process() -> None:
    net = network()
    defense = StandardAT().attach(net, regularizers={"ncmi": NCMI()})
    attack = Adaptive(eps=0.1, step_size=0.03, steps=2).with_training_loss(defense.training_objective)
    x, y, ids = pictures()
    again = pickle.loads(pickle.dumps(attack))
    assert torch.equal(again(net, x, y, ids=ids, seed=0), attack(net, x, y, ids=ids, seed=0))


def test_it_is_the_loss_of_training_that_is_climbed_and_not_the_cross_entropy() -> None:
    """A loss that knows images, labels and ids: darker where the label is 0, brighter elsewhere, id by id."""
    x, y, ids = pictures(6)
    told: list[tuple[Tensor, Tensor, Tensor]] = []

    def make(x: Tensor, y: Tensor, ids: Tensor):
        told.append((x, y, ids))
        sign = torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1)
        return lambda x_adv: (sign * x_adv).sum()

    attack = Adaptive(eps=0.1, step_size=0.05, steps=5).with_training_loss(make)
    x_adv = attack(network(), x, y, ids=ids, seed=0)
    expected = (x + 0.1 * torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(got, given) for got, given in zip(told[0], (x, y, ids), strict=True))
