"""Every defense as the framework runs it: found by its yaml, attached to a network, taken through training steps."""

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
from mi_at.attacks.inner import Inner, InnerMaximisation, Objective
from mi_at.callbacks.adversarial_examples import craft
from mi_at.data.batch import Batch
from mi_at.defenses.base import ADVERSARIAL, SELECTION_ATTACKS, Defense, NonFiniteLossError
from mi_at.defenses.standard_at import StandardAT, StandardATWith
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from mi_at.regularizers.base import Regularizer, Views
from mi_at.regularizers.mi import MutualInformation
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from tests.callbacks import fits

CONF = Path(__file__).resolve().parents[2] / "conf"
# mi_estimators trains no network, and has tests of its own.
NAMES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml") if path.stem != "mi_estimators")
VARIANTS = {
    "mma": ("defense.variant=full",),
    "mimae": ("defense.adversarial_term=ce", "defense.logit_term=mse"),
    "trades": ("recipe=_ib_rar_trades",),
    "mart": ("recipe=_ib_rar_mart",),
}
CASES = [(name, ()) for name in NAMES] + [(name, VARIANTS[name]) for name in NAMES if name in VARIANTS]
BUDGET = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=3)
Compose = Callable[..., Any]


class Recording(CNNTiny):
    """Notes the images of every forward in train mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__(num_classes=fits.CLASSES, in_channels=1, image_size=8, width=0.2, **options)
        self.seen: list[Tensor] = []

    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        if self.training:
            self.seen.append(x)
        return super().body(x, taps)


def build(compose: Compose, name: str, overrides: tuple[str, ...] = (), **options: Any) -> Defense:
    node = io.plain(compose([f"defense={name}", *overrides]))["defense"]
    torch.manual_seed(0)
    defense: Defense = io.build("defense", node)
    return defense.attach(Recording(**options), optimisation=SGD(lr=0.1, epochs=1))


def prepared(defense: Defense) -> Batch:
    """A batch with the views that the defense wants."""
    batch = fits.batches(1, 8)[0]
    for view, inner in defense.all_adversaries(batch).items():
        batch.views[view] = craft(defense, batch.x, inner, BUDGET, ids=batch.index, seed=0)
    return batch


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_a_training_step(name: str, overrides: tuple[str, ...], compose: Compose) -> None:
    defense = build(compose, name, overrides)
    batch = prepared(defense)
    for view in batch.views.values():
        assert 0 <= view.min() <= view.max() <= 1
        if not overrides:  # a margin search goes as far as it must
            assert (view - batch.x).abs().max() <= BUDGET.eps + 1e-6
    terms = defense.all_terms(Views(defense.net, batch, defense.needed_taps))
    assert all(value.shape == () and value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    parts = [value.item() for term, value in terms.items() if term != "loss"]
    assert terms["loss"].item() == pytest.approx(sum(parts), rel=1e-6)
    loss = defense.training_step(batch, 0)
    assert loss.item() == pytest.approx(terms["loss"].item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in defense.net.parameters())
    assert any(p.grad.any() for p in defense.net.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_views_go_through_the_network_one_by_one_clean_first(
    name: str, overrides: tuple[str, ...], compose: Compose
) -> None:
    """Batch-norm statistics depend on the order, and on views never being concatenated."""
    defense = build(compose, name, overrides, batch_norm=True).train()
    net = defense.net
    assert isinstance(net, Recording)
    batch = prepared(defense)
    assert net.seen == [], "an attack leaves train mode alone"
    tracked = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked) == 0 for m in tracked if m.num_batches_tracked is not None)
    defense.all_terms(Views(net, batch, defense.needed_taps))
    images = {"clean": batch.x, **batch.views}
    order = [next(view for view, x in images.items() if torch.equal(x, seen)) for seen in net.seen]
    assert len(order) == len(set(order))
    if isinstance(defense, StandardATWith):  # the base loss, then the views of the term
        assert order[0] == ADVERSARIAL
        assert set(order[1:]) <= {"clean", "cluster"}
    else:
        assert order in (["clean"], [ADVERSARIAL], ["clean", ADVERSARIAL])


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_the_loss_is_in_float32_whatever_training_is_in(
    name: str, overrides: tuple[str, ...], compose: Compose
) -> None:
    defense = build(compose, name, overrides)
    batch = prepared(defense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = Views(defense.net, batch, defense.needed_taps)
        terms = defense.all_terms(views)
    assert all(value.dtype == torch.float32 for value in terms.values())
    exact = defense.all_terms(Views(defense.net, batch, defense.needed_taps))
    assert terms["loss"].item() != exact["loss"].item(), "the forwards were in bfloat16"
    assert terms["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_training_lowers_the_loss(name: str, overrides: tuple[str, ...], compose: Compose) -> None:
    defense = build(compose, name, overrides)
    optimizer = torch.optim.SGD(defense.net.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = defense.training_step(prepared(defense), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_inner_maximisations_touch_nothing(name: str, compose: Compose) -> None:
    defense = build(compose, name, batch_norm=True).train()
    before, state = copy.deepcopy(defense.net.state_dict()), torch.get_rng_state()
    prepared(defense)
    assert all(torch.equal(value, before[key]) for key, value in defense.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in defense.net.parameters())
    assert defense.net.training


def test_trades_as_ib_rars_code_has_it(compose: Compose) -> None:
    """Another loss, and an attack on the cross-entropy from a uniform start; only what is named differs."""
    plain, released = build(compose, "trades"), build(compose, "trades", ("recipe=_ib_rar_trades",))
    assert io.plain(compose(["defense=trades", "recipe=_ib_rar_trades"]))["attack"]["init"] == "uniform"
    batch = fits.batches(1, 8)[0]
    x = batch.views["probe"] = (batch.x + 0.1).clamp(0, 1)
    (inner,) = released.all_adversaries(batch).values()
    expected = nn.functional.cross_entropy(released.net(x), batch.y, reduction="none")
    torch.testing.assert_close(inner.objective(x), expected)
    (divergence,) = plain.all_adversaries(batch).values()
    assert not torch.allclose(divergence.objective(x), expected)
    batch.views = {ADVERSARIAL: x}
    terms = {name: of.all_terms(Views(of.net, batch)) for name, of in (("plain", plain), ("released", released))}
    assert terms["released"]["kl"].item() == pytest.approx(terms["plain"]["kl"].item() * 0.5 / 6.0)
    assert terms["released"]["ce"].item() == pytest.approx(expected.mean().item())
    for option in ("ce_view", "attack_objective"):
        with pytest.raises(ValueError, match=f"defense.{option}='nat': expected one of"):
            build(compose, "trades", (f"defense.{option}=nat",))


# ---------------------------------------------------------------- what the base adds
class Three(StandardAT):
    """Three terms of known shares."""

    def loss(self, views: Views) -> dict[str, Tensor]:
        base = views.logits("clean").square().mean() + 1
        terms = {"a": 1.0 * base, "b": -2.0 * base, "c": 5.0 * base}
        return terms | {"loss": sum(terms.values(), start=base * 0)}


def test_shares_and_gradient_ratios() -> None:
    defense = fits.module(defense=Three())
    terms = defense.all_terms(Views(defense.net, fits.batches(1)[0]))
    found = {name: value.item() for name, value in defense.term_shares(terms).items()}
    shares = {"share/a": 1 / 8, "share/b": 2 / 8, "share/c": 5 / 8}
    ratios = {"gradient/a": 1 / 4, "gradient/b": 2 / 4, "gradient/c": 5 / 4}
    assert found == pytest.approx(shares | ratios, rel=1e-5)


def test_the_history_of_terms(tmp_path: Path) -> None:
    defense = fits.module(defense=Three())
    assert defense.term_history() == {}
    defense.inspect_every = 2
    fits.fit(tmp_path, [], epochs=2, train=3, val=0, defense=defense)
    history = defense.term_history()
    assert history["share/c"] == pytest.approx({"min": 5 / 8, "mean": 5 / 8, "max": 5 / 8})
    assert set(history) == {f"{kind}/{term}" for kind in ("share", "gradient") for term in "abc"}
    assert defense.reading_history() == defense.settings() == {}


class Reading(Regularizer):
    """Reads the number of its call, and says what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def terms(self, views: Views) -> dict[str, Tensor]:
        self.calls += 1
        return {"d": views.logits("adversarial").sum() * 0}

    def readings(self) -> dict[str, Tensor]:
        return {"calls": torch.tensor(self.calls)}

    def settings(self) -> dict[str, Any]:
        return {"made_of": ["a", "b"]}


def test_the_history_of_readings_and_the_settings_of_terms(tmp_path: Path) -> None:
    defense = fits.module(defense=StandardAT())
    added: dict[str, Regularizer] = {"reading": Reading(), "mi": MutualInformation()}
    defense.attach(defense.net, optimisation=defense.optimisation, regularizers=added)
    defense.inspect_every = 2
    fits.fit(tmp_path, [], epochs=2, train=3, val=0, defense=defense)
    assert defense.reading_history() == {"reading/calls": {"min": 1.0, "mean": 3.0, "max": 5.0}}
    assert not any("reading/" in name and "calls" in name for name in defense.term_history())
    assert defense.settings() == {"reading": {"made_of": ["a", "b"]}}


def test_one_term_has_no_shares(tmp_path: Path) -> None:
    defense = fits.module()
    defense.inspect_every = 1
    fits.fit(tmp_path, [], epochs=1, train=2, val=0, defense=defense)
    assert defense.term_history() == {}


class Bad(StandardAT):
    """Its second term is not finite in one step, then is again."""

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.at, self.value = at, value

    def loss(self, views: Views) -> dict[str, Tensor]:
        good = super().loss(views)["ce"]
        second = good * 0 + (self.value if self.global_step == self.at else 0.0)
        return {"loss": good + second, "ce": good, "second": second}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("inspect", [0, 1, 50])
def test_the_first_term_that_is_not_finite_is_named(tmp_path: Path, value: float, inspect: int) -> None:
    """At the latest at the end of the epoch; the blame is not on the sum."""
    defense = fits.module(defense=Bad(1, value))
    defense.inspect_every = inspect
    with pytest.raises(NonFiniteLossError, match="the term 'second' of the loss was not finite at step 1;"):
        fits.fit(tmp_path, [], epochs=2, train=4, val=0, defense=defense)
    assert defense.current_epoch == 0


def test_selection_is_by_the_worst_of_two_attacks() -> None:
    defense, batch = fits.module(), fits.batches(1, 30)[0]
    inner = defense.selection_adversaries(batch)
    assert tuple(inner) == SELECTION_ATTACKS == ("cross_entropy", "margin")
    for name in inner:
        batch.views[name] = batch.x.clone()
    with torch.no_grad():
        right = defense.net(batch.x).argmax(dim=1) == batch.y
        assert 2 < right.sum() < 29
        places = right.nonzero().flatten()
        wrong = next(x for x, bad in zip(batch.x, ~right, strict=True) if bad)
    # one right image falls to one attack, another to the other; a wrong one is never won back
    for name, place in zip(inner, places, strict=False):
        label = batch.y[place]
        candidates = [x for x in batch.x if int(defense.net(x[None]).argmax()) != int(label)] or [wrong]
        batch.views[name][place] = candidates[0]
    defense.validation_step(batch, 0)
    accuracy = {name: metric.compute().item() * 30 for name, metric in defense._selection.items()}
    count = int(right.sum())
    assert accuracy == pytest.approx(
        {"clean": count, "cross_entropy": count - 1, "margin": count - 1, "robust": count - 2}, abs=1e-3
    )


def test_a_regularizer_finds_an_adversarial_view_on_any_defense(compose: Compose) -> None:
    """Cross-entropy's, where the method makes none; its own, where it does."""
    for name in NAMES:
        defense = build(compose, name)
        own = set(defense.all_adversaries(fits.batches(1)[0]))
        defense.attach(defense.net, regularizers={"mi": MutualInformation()})
        assert set(defense.all_adversaries(fits.batches(1)[0])) == own | {ADVERSARIAL}
        assert "mi" in defense.all_terms(Views(defense.net, prepared(defense), defense.needed_taps))


def test_two_terms_with_one_second_attack_are_refused_before_training() -> None:
    terms = {"ncmi": NCMI(), "ncmi_relaxed": NCMIRelaxed()}
    with pytest.raises(ValueError, match=r"ncmi and ncmi_relaxed both make the view 'cluster': choose one of them"):
        fits.module().attach(fits.module().net, regularizers=terms)


def test_an_error_in_a_term_says_in_which_and_when() -> None:
    class Refusing(Regularizer):
        def terms(self, views: Views) -> dict[str, Tensor]:
            raise ValueError("it cannot be")

    class RefusingDefense(StandardAT):
        def loss(self, views: Views) -> dict[str, Tensor]:
            raise ValueError("it cannot be")

    batch = fits.batches(1)[0]
    batch.views, batch.epoch, batch.batch_idx = {ADVERSARIAL: batch.x}, 2, 4
    defense = fits.module()
    defense.attach(defense.net, regularizers={"mine": Refusing()})
    with pytest.raises(ValueError, match=r"^mine in epoch 3, batch 5: it cannot be$"):
        defense.all_terms(Views(defense.net, batch))
    own = RefusingDefense().attach(defense.net)
    with pytest.raises(ValueError, match=r"^RefusingDefense in epoch 3, batch 5: it cannot be$"):
        own.all_terms(Views(own.net, batch))


def test_a_term_may_not_be_called_as_an_accuracy() -> None:
    class Named(Regularizer):
        def terms(self, views: Views) -> dict[str, Tensor]:
            return {"clean": views.logits("clean").mean()}

    defense = fits.module()
    defense.attach(defense.net, regularizers={"clean": Named()})
    with pytest.raises(ValueError, match="a term of the loss is called 'clean', as a logged accuracy is"):
        defense.all_terms(Views(defense.net, prepared(defense)))


def test_attach_is_needed() -> None:
    with pytest.raises(ValueError, match="the defense has no optimiser: pass optimisation="):
        StandardAT().configure_optimizers()
    with pytest.raises(NotImplementedError):
        Defense().adversaries(fits.batches(1)[0])
    with pytest.raises(NotImplementedError):
        Defense().loss(Views(nn.Identity(), fits.batches(1)[0]))


def test_forward_is_the_network() -> None:
    defense, batch = fits.module(), fits.batches(1)[0]
    assert torch.equal(defense(batch.x), defense.net(batch.x))


def test_frozen_weights_stay_frozen() -> None:
    defense = fits.module()
    first = next(defense.net.parameters()).requires_grad_(False)
    configured: Any = defense.configure_optimizers()
    optimised = [p for group in configured["optimizer"].param_groups for p in group["params"]]
    assert all(p is not first for p in optimised)
    with attacking(defense.net):
        pass
    assert not first.requires_grad


def test_an_objective_or_an_inner_maximisation() -> None:
    class Plain(StandardAT):
        def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
            return {"adversarial": lambda x: self.net(x).sum(dim=1)}

    (inner,) = fits.module(defense=Plain()).all_adversaries(fits.batches(1)[0]).values()
    assert isinstance(inner, Inner)
    assert (inner.init, inner.mode, inner.generate) == ("uniform", "eval", None)


def test_a_loss_without_its_sum_is_refused_by_name() -> None:
    class Forgetful(StandardAT):
        def loss(self, views: Views) -> dict[str, Tensor]:
            return {"ce": super().loss(views)["ce"]}

    batch = Batch(x=torch.rand(2, 1, 8, 8), y=torch.tensor([0, 1]), index=torch.arange(2))
    batch.views[ADVERSARIAL] = batch.x
    defense = Forgetful().attach(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    with pytest.raises(ValueError, match=r"Forgetful\.loss returned ce: expected 'loss' among them"):
        defense.all_terms(Views(defense.net, batch))
