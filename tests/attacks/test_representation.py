"""The representation attack: closed form, the oracle, guides by sample, the training form, contract and refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, InnerMaximisation
from mi_at.attacks.representation import (
    Representation,
    RepresentationMaximisation,
    guided_by_first_half,
    representation,
    representation_attack,
    representation_lbfgs,
    towards,
)
from mi_at.callbacks.adversarial_examples import AdversarialExamples, craft
from mi_at.data.batch import Batch
from mi_at.defenses.standard_at import StandardAT
from mi_at.evaluation.evaluate import evaluate
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from tests.callbacks import fits
from tests.references import representation as reference


class Scaled(nn.Module):
    """The feature layer is the image times a number."""

    tap_names = ("features",)

    def forward_taps(self, x: Tensor, names: object = None) -> tuple[Tensor, dict[str, Tensor]]:
        return x.flatten(1)[:, :2], {"features": 3 * x}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]


def network() -> CNNTiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CNNTiny(num_classes=3, in_channels=1, image_size=8, width=0.3).eval().requires_grad_(False)


def pictures(n: int = 6, seed: int = 0, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("eps", [8 / 255, 0.3])
def test_the_closed_form(eps: float) -> None:
    """L-BFGS-B exactly; sign steps to the last step's length, and exactly where the guide is out of reach."""
    net = Scaled()
    x, guides = pictures(4, side=3, dtype=torch.float64), pictures(4, seed=1, side=3, dtype=torch.float64)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 0.5])
    expected = torch.stack(
        [
            torch.tensor(reference.nearest(a.flatten().tolist(), b.flatten().tolist(), eps), dtype=torch.float64)
            for a, b in zip(x, guides, strict=True)
        ]
    ).view_as(x)
    exact = representation_lbfgs(net, x, guides, tap="features", eps=eps, steps=50)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)
    step = eps / 40
    close = representation_attack(net, x, guides, tap="features", eps=eps, step_size=step, steps=60)
    assert float((close - expected).abs().max()) <= step + 1e-12
    far = (guides - x).abs() > eps + step
    torch.testing.assert_close(close[far], expected[far], rtol=0, atol=1e-12)
    objective = towards(net, "features", guides)
    for i in range(4):
        by_hand = reference.distance((3 * exact[i]).flatten().tolist(), (3 * guides[i]).flatten().tolist())
        assert -float(objective(exact)[i]) == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tap", ["features", "last_conv"])
def test_against_the_oracle(tap: str) -> None:
    """40 sign steps come within 10 % of what L-BFGS-B takes off the distance; both keep each image's box."""
    net = network()
    x, guides = pictures(), pictures(seed=1)
    eps = 10 / 255
    objective = towards(net, tap, guides)
    before = -objective(x)
    after = {}
    for name, x_adv in (
        ("pgd", representation_attack(net, x, guides, tap=tap, eps=eps, step_size=eps / 10, steps=40)),
        ("lbfgs", representation_lbfgs(net, x, guides, tap=tap, eps=eps, steps=40)),
    ):
        after[name] = -objective(x_adv)
        for i in range(len(x)):
            for pixel, (low, high) in zip(
                x_adv[i].flatten().tolist(), reference.box(x[i].flatten().tolist(), eps), strict=True
            ):
                assert low - 1e-6 <= pixel <= high + 1e-6
        assert (after[name] < 0.9 * before).all()
    gained = (before - after["pgd"]) / (before - after["lbfgs"])
    assert float(gained.min()) > 0.9


def test_the_closest_iterate_is_kept() -> None:
    net = network()
    x, guides = pictures(), pictures(seed=1)
    objective = towards(net, "features", guides)
    options = {"tap": "features", "eps": 0.1, "step_size": 0.1, "steps": 7}
    best = objective(representation_attack(net, x, guides, **options))
    reached = [objective(x)]
    for steps in range(1, 8):
        x_adv = representation_attack(net, x, guides, iterate="last", **options | {"steps": steps})
        reached.append(objective(x_adv))
    torch.testing.assert_close(best, torch.stack(reached).amax(0))


class TestGuides:
    labels = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1])

    def attack(self, **options: object) -> Representation:
        settings = {"eps": 0.1, "steps": 3} | options
        return Representation(**settings).with_guides(pictures(8, seed=3), self.labels)

    def test_another_class_by_seed_and_id(self) -> None:
        attack = self.attack()
        y, ids = torch.arange(600) % 3, torch.arange(600)
        chosen = attack.choose(y, ids=ids, seed=0)
        assert (self.labels[chosen] != y).all()
        order = torch.randperm(600)[:50]
        assert torch.equal(attack.choose(y[order], ids=ids[order], seed=0), chosen[order])
        assert not torch.equal(attack.choose(y, ids=ids, seed=1), chosen)

    def test_each_is_as_likely(self) -> None:
        """Of class 0 the guides of 1 and 2 are six: a hundred each of 600, within four standard deviations."""
        chosen = self.attack().choose(torch.zeros(600, dtype=torch.int64), ids=torch.arange(600), seed=0)
        counts = torch.bincount(chosen, minlength=8)
        assert counts[[0, 4]].sum() == 0
        assert (counts[self.labels != 0] - 100).abs().max() < 4 * (600 * 1 / 6 * 5 / 6) ** 0.5

    def test_none_bound_or_none_of_another_class(self) -> None:
        net, x, y = network(), pictures(2), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=r"attack r has no guide images: bind some, attack\.with_guides"):
            Representation(eps=0.1, steps=2, name="r")(net, x, y, ids=y, seed=0)
        same = Representation(eps=0.1, steps=2).with_guides(pictures(3), torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="all 3 guide images are of class 1"):
            same(net, x, y, ids=y, seed=0)
        with pytest.raises(ValueError, match="guide images, 3 labels"):
            Representation(eps=0.1, steps=2).with_guides(pictures(2), torch.ones(3))
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            Representation(eps=0.1, steps=2).with_guides(pictures(2) + 1, torch.ones(2))

    @pytest.mark.parametrize("method", ["pgd", "lbfgs"])
    def test_it_approaches_that_guide(self, method: str) -> None:
        net, attack = network(), self.attack(method=method, steps=8)
        x, y, ids = pictures(4), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 9, 1, 3])
        x_adv = attack(net, x, y, ids=ids, seed=0)
        guides = pictures(8, seed=3)[attack.choose(y, ids=ids, seed=0)]
        objective = towards(net, "features", guides)
        assert (objective(x_adv) > objective(x)).all()
        alone = attack(net, x[1:2], y[1:2], ids=ids[1:2], seed=0)
        assert float(((alone - x_adv[1:2]).abs() > 1e-3).float().mean()) < 0.02

    @pytest.mark.parametrize(("method", "norm"), [("pgd", "linf"), ("pgd", "l2"), ("lbfgs", "linf")])
    def test_through_the_evaluator(self, method: str, norm: str) -> None:
        """It checks budget and range."""
        net = network()
        x = pictures(9)
        y = net(x).argmax(1)
        labels = torch.arange(8) % 3
        attack = Representation(eps=0.2, steps=4, method=method, norm=norm, name="r")
        attack = attack.with_guides(pictures(8, seed=3), labels)
        result = evaluate(net, {"r": attack}, [Batch(x=x, y=y, index=torch.arange(9))], progress=False)
        said = result["r"].description
        assert said["guides"] == 8
        assert said["method"] == method
        assert ("step_size" in said) == (method == "pgd")
        assert float(result["r"].distance.max()) <= 0.2 + 1e-6
        assert float(result["r"].distance.max()) > 0

    def test_nothing_to_do(self) -> None:
        net, attack = network(), self.attack(eps=0.0)
        x, y = pictures(2), torch.tensor([0, 1])
        assert torch.equal(attack(net, x, y, ids=y, seed=0), x)
        assert self.attack()(net, x[:0], y[:0], ids=y[:0], seed=0).shape == (0, 1, 8, 8)
        for options in ({"eps": 0.0, "steps": 3}, {"eps": 0.1, "steps": 0}):
            assert torch.equal(representation_lbfgs(net, x, x.flip(0), tap="features", **options), x)


class TestTraining:
    def test_the_first_half_guides_the_second(self) -> None:
        """Through the callback's own crafting, with the attack group's budget; odd batches count round."""
        defense = StandardAT().attach(network())
        budget = InnerMaximisation(norm="linf", eps="10/255", step_size="1/255", steps=20)
        for size in (6, 7):
            x = pictures(size)
            inner = guided_by_first_half(defense.net, "features")
            x_adv = craft(defense, x, inner, budget, ids=torch.arange(size), seed=0)
            half = size // 2
            assert torch.equal(x_adv[:half], x[:half])
            assert float((x_adv - x).abs().max()) <= 10 / 255 + 1e-6
            pairs = reference.first_half_guides([[float(i)] for i in range(size)])
            for place in range(half, size):
                guide = int(pairs[place][1][0])
                target = representation(defense.net, "features", x[guide : guide + 1]).flatten().tolist()
                before, after = (
                    reference.distance(representation(defense.net, "features", z).flatten().tolist(), target)
                    for z in (x[place : place + 1], x_adv[place : place + 1])
                )
                assert after < 0.9 * before

    def test_its_objective_is_what_it_raises(self) -> None:
        net, x = network(), pictures(5)
        inner = guided_by_first_half(net, "features")
        values = inner.objective(x)
        assert values[:2].tolist() == [0.0, 0.0]
        torch.testing.assert_close(values[2:], towards(net, "features", x[[0, 1, 0]])(x[2:]))

    def test_one_image_has_no_guide(self) -> None:
        inner = guided_by_first_half(network(), "features")
        x = pictures(1)
        budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.1, steps=1)
        assert torch.equal(inner.generate(x, budget, lambda radius: torch.zeros_like(x)), x)


def test_as_the_attack_group_it_takes_the_place_of_what_a_method_asks_for() -> None:
    batch = fits.batches(1, 6)[0]
    defense = StandardAT().attach(network(), optimisation=SGD(lr=0.1, epochs=1, schedule="constant"))
    budget = RepresentationMaximisation(norm="linf", eps="10/255", step_size="5/510", steps=20)
    trainer: Any = SimpleNamespace(current_epoch=0, num_training_batches=1)
    AdversarialExamples(budget).on_train_batch_start(trainer, defense, batch, 0)
    found = batch.views["adversarial"]
    assert torch.equal(found[:3], batch.x[:3])
    options = {"tap": "features", "eps": "10/255", "step_size": "5/510", "steps": 20, "iterate": "last"}
    assert torch.equal(found[3:], representation_attack(defense.net.eval(), batch.x[3:], batch.x[:3], **options))
    assert (budget.joint, InnerMaximisation.joint) == (True, False)


def test_a_checkpoint_is_chosen_by_pgd_all_the_same() -> None:
    defense = StandardAT().attach(network(), optimisation=SGD(lr=0.1, epochs=1, schedule="constant"))
    views = []
    for kind in (InnerMaximisation, RepresentationMaximisation):
        batch = fits.batches(1, 6)[0]
        AdversarialExamples(kind(norm="linf", eps=0.1, step_size=0.1, steps=1))._select(defense, batch)
        views.append(batch.views)
    assert all(torch.equal(views[0][name], views[1][name]) for name in views[0])


def test_a_method_with_a_search_of_its_own_is_refused() -> None:
    own = Inner(lambda x: x.flatten(1).sum(1), generate=lambda x, budget, start: x)
    with pytest.raises(ValueError, match="a search of its own; use attack=pgd"):
        RepresentationMaximisation(norm="linf", eps=0.1, step_size=0.1, steps=1).search_for(own, network())


def test_refusals() -> None:
    net, x = network(), pictures(2)
    with pytest.raises(ValueError, match="tap='conv9': expected one of"):
        representation_attack(net, x, x, tap="conv9", eps=0.1, step_size=0.1, steps=1)
    with pytest.raises(ValueError, match="the network has no taps"):
        representation_lbfgs(nn.Flatten(), x, x, tap="features", eps=0.1, steps=1)
    for attack in (
        lambda **o: representation_attack(net, x, x[:1], tap="features", step_size=0.1, **o),
        lambda **o: representation_lbfgs(net, x, x[:1], tap="features", **o),
    ):
        with pytest.raises(ValueError, match=r"guides of shape \[1, 1, 8, 8\] for images \[2, 1, 8, 8\]"):
            attack(eps=0.1, steps=1)
    for options, message in (
        ({"eps": -0.1}, "attack.eps=-0.1"),
        ({"steps": -1}, "attack.steps=-1"),
        ({"method": "adam"}, "method='adam': expected one of pgd, lbfgs"),
        ({"method": "lbfgs", "norm": "l2"}, "its box is that of linf"),
        ({"method": "lbfgs", "step_size": 0.1}, "finds its own steps"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"step_size": 0.0}, "attack.step_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Representation(**{"eps": 0.1, "steps": 2} | options)


def test_lbfgs_keeps_to_the_range_while_it_searches() -> None:
    """Clamping in the end is not the same: a network must not be asked about images that do not exist."""
    seen: list[Tensor] = []

    class Watched(Scaled):
        def forward_taps(self, x: Tensor, names: object = None) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(x.detach())
            return super().forward_taps(x, names)

    x, guides = torch.full((1, 1, 2, 2), 0.1), torch.full((1, 1, 2, 2), 5.0)
    representation_lbfgs(Watched(), x, -guides, tap="features", eps=0.4, steps=5)
    tried = torch.cat(seen[1:])  # the first are the guides
    assert float(tried.min()) == 0.0


def test_the_default_step_and_the_last_iterate_of_training() -> None:
    assert Representation(eps=0.2, steps=20).step_size == pytest.approx(0.05)
    net, x = Scaled(), torch.full((4, 1, 2, 2), 0.5)
    x[:2] += 0.05  # the guides, which a step of 0.2 leaps over at every second step
    settings = {"tap": "features", "eps": 0.3, "step_size": 0.2, "steps": 1}
    budget = InnerMaximisation(norm="linf", eps=0.3, step_size=0.2, steps=1)
    generate = guided_by_first_half(net, "features").generate
    assert generate is not None
    got = generate(x, budget, lambda radius: torch.zeros_like(x))[2:]
    last, worst = (representation_attack(net, x[2:], x[:2], **settings, iterate=name) for name in ("last", "worst"))
    assert torch.equal(got, last)
    assert not torch.equal(worst, last)
