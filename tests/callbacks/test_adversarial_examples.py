"""Views: there in every stage, within the budget, and with noise that depends on its key alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, InnerMaximisation, Objective
from mi_at.callbacks.adversarial_examples import SELECTION_STEPS, AdversarialExamples, craft
from mi_at.data.batch import Batch
from mi_at.defenses.base import SELECTION_ATTACKS, Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from mi_at.regularizers.base import Regularizer, Views
from tests.callbacks import fits

EPS = 0.1
NOISE = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS, steps=0, init="uniform")


def at(epoch: int = 0, batches: int = 4) -> Any:
    """What the callback reads of a Trainer."""
    return SimpleNamespace(current_epoch=epoch, num_training_batches=batches)


def view_of(batch: Batch, *, epoch: int = 0, place: int = 0, seed: int = 0, view: str = "adversarial") -> Tensor:
    """The noise alone: no step of the attack is taken."""
    module = fits.module(defense=Second() if view != "adversarial" else None)
    AdversarialExamples(NOISE, seed=seed).on_train_batch_start(at(epoch), module, batch, place)
    return batch.views[view]


class Second(StandardAT):
    """With a second inner maximisation."""

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        return {**super().adversaries(batch), "second": lambda x: x.flatten(1).sum(dim=1)}


def global_batch(seed: int = 0) -> Batch:
    return fits.batches(1, 6, seed=seed)[0]


def shard(whole: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(x=whole.x[part], y=whole.y[part], index=whole.index[part], global_size=len(whole), offset=start)


# ---------------------------------------------------------------- noise
@pytest.mark.parametrize("cuts", [[0, 6], [0, 3, 6], [0, 2, 4, 6], [0, 5, 6]])
def test_training_noise_does_not_depend_on_how_the_batch_is_split(cuts: list[int]) -> None:
    whole = view_of(global_batch())
    parts = [view_of(shard(global_batch(), a, b)) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("cuts", [[0, 3, 6], [0, 5, 6]])
def test_nor_do_the_views(cuts: list[int]) -> None:
    module = fits.module()
    callback = fits.attack(EPS, steps=5)
    whole = global_batch()
    callback.on_train_batch_start(at(), module, whole, 0)
    for a, b in itertools.pairwise(cuts):
        part = shard(global_batch(), a, b)
        callback.on_train_batch_start(at(), module, part, 0)
        torch.testing.assert_close(part.views["adversarial"], whole.views["adversarial"][a:b], rtol=0, atol=1e-6)


def test_training_noise_is_reproducible_and_new_for_every_key() -> None:
    first = view_of(global_batch())
    assert torch.equal(first, view_of(global_batch()))
    others = [{"epoch": 1}, {"place": 1}, {"seed": 1}, {"view": "second"}]
    noise = [first, *(view_of(global_batch(), **other) for other in others)]  # type: ignore[arg-type]
    for number, one in enumerate(noise):
        assert one.min() >= 0
        assert one.max() <= 1
        for other in noise[:number]:
            assert (one - other).abs().max() > EPS / 2


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    view_of(global_batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_noise_depends_on_the_sample_alone() -> None:
    """Not on its place in the batch, nor on the epoch."""
    module, callback = fits.module(), AdversarialExamples(NOISE)
    whole = global_batch()
    callback.on_validation_batch_start(at(), module, whole, 0)
    order = torch.tensor([4, 1, 5])
    picked = Batch(x=whole.x[order], y=whole.y[order], index=whole.index[order])
    callback.on_validation_batch_start(at(epoch=3), module, picked, 7)
    for name in SELECTION_ATTACKS:
        torch.testing.assert_close(picked.views[name], whole.views[name][order], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- stages
class Seen(Callback):
    """Keeps what the steps were given, and how the network was left."""

    def __init__(self) -> None:
        self.batches: dict[str, list[Batch]] = {"fit": [], "validate": [], "test": []}
        self.training: list[bool] = []

    def _keep(self, stage: str, module: LightningModule, batch: Batch) -> None:
        self.batches[stage].append(batch)
        assert all(parameter.requires_grad for parameter in module.parameters())
        self.training.append(module.training)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._keep("fit", pl_module, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *rest: Any
    ) -> None:
        self._keep("validate", pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *rest: Any
    ) -> None:
        self._keep("test", pl_module, batch)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_fit_validate_and_test_have_views(inference_mode: bool) -> None:
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        inference_mode=inference_mode,
        callbacks=[fits.attack(EPS, steps=3), seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = fits.module(epochs=1)
    trainer.fit(module, fits.Fresh(2), fits.Fresh(2, seed=1))
    fitted = len(seen.batches["validate"])
    scores = trainer.validate(module, fits.Fresh(2, seed=1), verbose=False)
    tested = trainer.test(module, fits.Fresh(2, seed=2), verbose=False)
    assert (len(seen.batches["fit"]), fitted, len(seen.batches["validate"]), len(seen.batches["test"])) == (2, 2, 4, 2)
    assert seen.training[:2] == [True, True]
    assert not any(seen.training[-2:])
    for stage, names in (
        ("fit", {"adversarial"}),
        ("validate", set(SELECTION_ATTACKS)),
        ("test", set(SELECTION_ATTACKS)),
    ):
        for batch in seen.batches[stage]:
            assert set(batch.views) == names
            for view in batch.views.values():
                moved = (view - batch.x).abs()
                assert EPS / 2 < moved.max() <= EPS + 1e-6
                assert 0 <= view.min() <= view.max() <= 1
    assert set(scores[0]) == {"val/clean", "val/cross_entropy", "val/margin", "val/robust"}
    assert scores[0]["val/robust"] <= min(scores[0]["val/cross_entropy"], scores[0]["val/margin"])
    assert set(tested[0]) == {"test/clean", "test/cross_entropy", "test/margin", "test/robust"}


def test_the_attack_makes_the_loss_larger() -> None:
    module, batch = fits.module(), global_batch()
    objective = module.all_adversaries(batch)["adversarial"].objective
    fits.attack(EPS, steps=5).on_train_batch_start(at(), module, batch, 0)
    assert (objective(batch.views["adversarial"]) > objective(batch.x)).all()


# ---------------------------------------------------------------- budget, modes, precision
def test_eps_is_warmed_up_step_by_step() -> None:
    """After s of n steps of the warm-up, s / n of the radius; the paper's epochs are scaled to the run's."""
    budget = InnerMaximisation(norm="linf", eps=EPS, step_size=1.0, steps=1, warmup_epochs=20)
    module, callback = fits.module(), AdversarialExamples(budget)
    module.attach(module.net, optimisation=SGD(lr=0.1, epochs=10, paper_epochs=100))  # 20 of 100 epochs are 2 of 10
    for step, expected in [(0, EPS / 8), (3, EPS / 2), (7, EPS), (9, EPS)]:
        batch = Batch(x=torch.full((6, 1, 8, 8), 0.5), y=torch.zeros(6, dtype=torch.long), index=torch.arange(6))
        callback.on_train_batch_start(at(epoch=step // 4, batches=4), module, batch, step % 4)
        assert (batch.views["adversarial"] - 0.5).abs().max().item() == pytest.approx(expected, rel=1e-5)


def conv(**options: Any) -> Defense:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=3, in_channels=1, image_size=8, width=0.2, **options)
    return StandardAT().attach(net, optimisation=SGD(lr=0.1, epochs=1))


@pytest.mark.parametrize("mode", [None, "eval", "train_no_track"])
def test_modes_and_batch_norm_statistics_are_left_as_they_were(mode: str | None) -> None:
    module = conv(batch_norm=True).train()
    modules = dict(module.net.named_modules())
    frozen = next(name for name, part in modules.items() if isinstance(part, nn.BatchNorm2d))
    modules[frozen].eval()  # a user's own: stays
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    modes = {name: part.training for name, part in modules.items()}
    budget = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS / 2, steps=2, mode=mode)
    AdversarialExamples(budget).on_train_batch_start(at(), module, global_batch(), 0)
    assert {name: part.training for name, part in modules.items()} == modes
    assert all(torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_the_mode_changes_what_is_attacked() -> None:
    module, views = conv(batch_norm=True).train(), []
    for mode in ("eval", "train_no_track"):
        budget, batch = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS / 2, steps=2, mode=mode), global_batch()
        AdversarialExamples(budget).on_train_batch_start(at(), module, batch, 0)
        views.append(batch.views["adversarial"])
    assert not torch.equal(*views)


def test_the_configured_start_wins_over_the_methods_own() -> None:
    module = fits.module(defense=Trades())  # starts from a Gaussian of 0.001
    for init, largest in ((None, 0.006), ("uniform", EPS), ("zero", 0.0)):
        batch = Batch(x=torch.full((6, 1, 8, 8), 0.5), y=torch.zeros(6, dtype=torch.long), index=torch.arange(6))
        budget = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS, steps=0, init=init)
        AdversarialExamples(budget).on_train_batch_start(at(), module, batch, 0)
        moved = (batch.views["adversarial"] - 0.5).abs().max()
        assert largest * 0.5 <= moved <= largest + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_selection_uses_its_own_steps_within_the_same_ball(norm: str) -> None:
    calls = []

    class Counting(StandardAT):
        def selection_adversaries(self, batch: Batch) -> dict[str, Inner]:
            def objective(x: Tensor) -> Tensor:
                calls.append(torch.is_grad_enabled())
                return -x.flatten(1).sum(dim=1)

            return {"cross_entropy": Inner(objective)}

    module, batch = fits.module(defense=Counting()), global_batch()
    budget = InnerMaximisation(norm=norm, eps=0.2, step_size=0.01, steps=1, mode="train_no_track", precision="bf16")
    AdversarialExamples(budget).on_validation_batch_start(at(), module, batch, 0)
    assert len(calls) in (SELECTION_STEPS, SELECTION_STEPS + 1)
    moved = torch.linalg.vector_norm(
        (batch.views["cross_entropy"] - batch.x).flatten(1), float("inf") if norm == "linf" else 2, dim=1
    )
    assert (moved <= 0.2 + 1e-6).all()
    assert moved.max() > 0.15


def test_the_precision_of_the_attack_is_its_own() -> None:
    seen = []

    class Looking(StandardAT):
        def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
            def objective(x: Tensor) -> Tensor:
                logits = self.net(x)
                seen.append(logits.dtype)
                return logits.float().sum(dim=1)

            return {"adversarial": Inner(objective)}

    for precision in ("fp32", "bf16"):
        budget = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS, steps=1, precision=precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # training's own must not reach the attack
            AdversarialExamples(budget).on_train_batch_start(at(), fits.module(defense=Looking()), global_batch(), 0)
    assert set(seen[: len(seen) // 2]) == {torch.float32}
    assert set(seen[len(seen) // 2 :]) == {torch.bfloat16}


# ---------------------------------------------------------------- others' inner maximisations
class Adding(Regularizer):
    def __init__(self, view: str) -> None:
        super().__init__()
        self.view = view

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        return {self.view: lambda x: -x.flatten(1).sum(dim=1)}

    def terms(self, views: Views) -> dict[str, Tensor]:
        return {self.view: views.logits(self.view).mean()}


def test_a_regularizer_adds_a_view() -> None:
    module, batch = fits.module(), global_batch()
    module.attach(module.net, regularizers={"cluster": Adding("cluster")})
    fits.attack(EPS, steps=3).on_train_batch_start(at(), module, batch, 0)
    assert list(batch.views) == ["adversarial", "cluster"]
    assert (batch.views["cluster"].mean() - batch.x.mean()) < -EPS / 2


def test_two_views_of_one_name_are_refused() -> None:
    module = fits.module()
    module.attach(module.net, regularizers={"other": Adding("adversarial")})
    with pytest.raises(ValueError, match="two inner maximisations are called 'adversarial'"):
        fits.attack().on_train_batch_start(at(), module, global_batch(), 0)


def test_a_method_with_a_search_of_its_own() -> None:
    def search(x: Tensor, budget: InnerMaximisation, start: Any) -> Tensor:
        assert budget.eps == EPS
        return (x + start(0.05)).clamp(0, 1)

    module, batch = fits.module(), global_batch()
    inner = Inner(lambda x: x.flatten(1).sum(dim=1), generate=search)
    budget = InnerMaximisation(norm="linf", eps=EPS, step_size=EPS, steps=3)
    view = craft(module, batch.x, inner, budget, ids=batch.index, seed=0)
    assert 0.04 < (view - batch.x).abs().max() <= 0.05 + 1e-6


def test_the_attack_of_hooks_and_its_time() -> None:
    module, callback, batch = fits.module(), fits.attack(EPS, steps=3), global_batch()
    attacked = callback.attack_of(module)(lambda x: x.flatten(1).sum(dim=1), batch)
    assert torch.equal(attacked, callback.attack_of(module)(lambda x: x.flatten(1).sum(dim=1), batch))
    assert (attacked - batch.x).mean() > EPS / 2
    assert callback.take_seconds() == 0, "outside training steps nothing is counted"
    callback.on_train_batch_start(at(), module, batch, 0)
    assert callback.take_seconds() > 0
    assert callback.take_seconds() == 0
