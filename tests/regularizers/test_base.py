"""What a regularizer may rely on: views forwarded once and in order, its hooks, and its state in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, Objective
from mi_at.callbacks.checkpoints import Last
from mi_at.data.batch import Batch
from mi_at.defenses.standard_at import StandardAT
from mi_at.models.cnn import CNNTiny
from mi_at.optim import SGD
from mi_at.regularizers.base import Context, Regularizer, Views
from tests.callbacks import fits

STEPS, EPOCHS = 3, 2


class Noting(Regularizer):
    """Writes down what is called, and keeps a centroid and a count, which travel in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.register_buffer("centroid", torch.zeros(fits.CLASSES))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.centroid: Tensor
        self.count: Tensor

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        return {"cluster": lambda x: net(x).sum(dim=1)}

    def terms(self, views: Views) -> dict[str, Tensor]:
        distance = (views.logits("cluster") - self.centroid).square().mean()
        return {"noting": 0.1 * distance, "size": 0.01 * views.logits("clean").square().mean()}

    def on_fit_start(self, ctx: Context) -> None:
        images = sum(len(batch) for batch in ctx.train_batches(4, False))
        drawn = ctx.draw_per_class(2)
        attacked = ctx.attack(lambda x: ctx.net(x).sum(dim=1), drawn)
        self.calls.append(("start", images, drawn.y.tolist(), bool((attacked != drawn.x).any())))

    def after_step(self, ctx: Context, batch: Batch) -> None:
        assert not torch.is_grad_enabled()
        self.calls.append("step")
        self.centroid.lerp_(ctx.net(batch.x).mean(dim=0), 0.5)
        self.count += 1

    def on_epoch_end(self, ctx: Context) -> None:
        self.calls.append(("epoch", ctx.epoch))


def fit(folder: Path, regularizer: Noting, *, epochs: int = EPOCHS, ckpt: Path | None = None) -> StandardAT:
    torch.manual_seed(0)
    module = StandardAT()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, fits.CLASSES))
    optimisation = SGD(lr=0.1, epochs=EPOCHS, schedule="constant")
    module.attach(net, optimisation=optimisation, regularizers={"noting": regularizer})
    examples = fits.attack()
    module.context = lambda epoch: Context(
        net=net,
        epoch=epoch,
        scaled=round,
        train_batches=lambda size, augment: iter(fits.batches(2, size)),
        draw_per_class=lambda n: Batch(
            x=torch.full((fits.CLASSES * n, 1, 8, 8), 0.5),
            y=torch.arange(fits.CLASSES).repeat_interleave(n),
            index=torch.arange(fits.CLASSES * n),
        ),
        attack=examples.attack_of(module),
    )
    fits.fit(
        folder,
        [Last(folder, every_n_steps=1)],
        epochs=epochs,
        train=STEPS,
        val=1,
        defense=module,
        ckpt=ckpt,
        examples=examples,
    )
    return module


def test_hooks_are_called_when_they_should(tmp_path: Path) -> None:
    regularizer = Noting()
    module = fit(tmp_path, regularizer)
    start = ("start", 8, [0, 0, 1, 1, 2, 2], True)
    assert regularizer.calls == [start, *["step"] * STEPS, ("epoch", 1), *["step"] * STEPS, ("epoch", 2)]
    assert module.trainer.global_step == EPOCHS * STEPS


def test_its_state_travels_in_the_checkpoint_and_the_start_is_not_repeated(tmp_path: Path) -> None:
    whole, first, second = Noting(), Noting(), Noting()
    fit(tmp_path / "whole", whole)
    fit(tmp_path / "half", first, epochs=1)
    fit(tmp_path / "half", second, ckpt=tmp_path / "half/last.ckpt")
    assert second.calls == [*["step"] * STEPS, ("epoch", 2)]
    assert int(second.count) == int(whole.count) == EPOCHS * STEPS
    assert torch.equal(second.centroid, whole.centroid)
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "half")]
    assert {"regularizers.noting.centroid", "regularizers.noting.count"} <= set(states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_terms_are_named_after_their_regularizer() -> None:
    batch = fits.batches(1)[0]
    batch.views = {"adversarial": batch.x, "cluster": batch.x}
    module = fits.module()
    module.attach(module.net, regularizers={"noting": Noting()})
    terms = module.all_terms(Views(module.net, batch))
    assert list(terms) == ["ce", "loss", "noting", "noting/size"]
    assert terms["loss"].item() == pytest.approx(sum(terms[name].item() for name in ("ce", "noting", "noting/size")))


# ---------------------------------------------------------------- views
class Counting(nn.Module):
    """A classifier that notes each forward."""

    tap_names = ("hidden",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 5), nn.Linear(5, fits.CLASSES)
        self.seen: list[Tensor] = []

    def forward_taps(self, x: Tensor, names: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(x)
        hidden = self.first(x.flatten(1))
        return self.head(hidden), {"hidden": hidden}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]


def test_a_view_is_forwarded_once_in_the_order_it_is_asked_for() -> None:
    net, batch = Counting(), fits.batches(1)[0]
    batch.views["adversarial"] = batch.x + 0.1
    seen = Views(net, batch)
    assert net.seen == []
    adversarial = seen.logits("adversarial")
    clean = seen.logits("clean")
    assert seen.logits("adversarial") is adversarial
    assert [x.data_ptr() for x in net.seen] == [batch.views["adversarial"].data_ptr(), batch.x.data_ptr()]
    assert list(seen.computed()) == ["adversarial", "clean"]
    assert seen.computed()["clean"] is clean
    assert seen.y is batch.y


def test_taps_come_from_the_forward_of_the_logits() -> None:
    net, batch = Counting(), fits.batches(1)[0]
    seen = Views(net, batch, ("hidden",))
    tap = seen.tap("clean", "hidden")
    torch.testing.assert_close(net.head(tap), seen.logits("clean"))
    assert len(net.seen) == 1


def test_half_precision_outputs_become_float32() -> None:
    net, batch = Counting(), fits.batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = Views(net, batch, ("hidden",))
        assert net(batch.x).dtype == torch.bfloat16
        assert seen.logits("clean").dtype == seen.tap("clean", "hidden").dtype == torch.float32
    with torch.autocast("cpu", enabled=False):  # the state at construction counts
        assert not torch.equal(Views(net, batch).logits("clean"), seen.logits("clean"))


def test_a_tap_the_network_has_not_is_refused() -> None:
    class Tapping(StandardAT):
        taps = ("block9",)

    net = CNNTiny(num_classes=3, in_channels=1, image_size=8, width=0.2)
    with pytest.raises(ValueError, match=r"no tap 'block9'; its taps are conv1, .*features"):
        Tapping().attach(net)
    with pytest.raises(ValueError, match="its taps are none"):
        Tapping().attach(nn.Linear(1, 1))


def test_defaults() -> None:
    regularizer = Regularizer()
    batch = fits.batches(1)[0]
    assert regularizer.adversaries(nn.Identity(), batch) == {}
    assert (regularizer.taps, regularizer.coupled, regularizer.settings()) == ((), "", {})
    with pytest.raises(NotImplementedError):
        regularizer.terms(Views(nn.Identity(), batch))
