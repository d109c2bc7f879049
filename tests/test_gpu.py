"""Training on a GPU: the CPU's numbers, data that stay there, no step that waits, bf16, channels_last, compile, resume.

Needs torch, pytorch-lightning and torchmetrics alone (and scikit-learn for one test).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from benchmarks.step import Ours
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.checkpoints import AtomicCheckpointIO, Last
from mi_at.callbacks.speed import Speed
from mi_at.data.batch import Batch
from mi_at.data.loader import Augmentation, DeviceLoader, ImageStore
from mi_at.defenses.alp import Alp
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.mart import Mart
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.mma import MMA
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.resnet import ResNet18
from mi_at.optim import SGD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is False"),
]

DEFENSES: dict[str, Callable[[], Defense]] = {
    "ce": CE,
    "standard_at": StandardAT,
    "trades": Trades,
    "mart": Mart,
    "alp": Alp,
    "mma": MMA,
    "mimae": Mimae,
}


def searching() -> MMA:
    """The full margin search, told how many samples there are, as a fit does."""
    defense = MMA(variant="full")
    defense.expect(256)
    return defense


STEPS = DEFENSES | {"mma_full": searching}


def network(device: str = "cuda") -> nn.Module:
    """A narrow ResNet-18: convolutions, batch norm and shortcuts of the real one."""
    torch.manual_seed(0)
    return ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.25).to(device)


def batch(device: str = "cuda", images: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, 32, 32, generator=generator)
    return Batch(x=x, y=torch.arange(images) % 10, index=torch.arange(images)).to(device)


def loader(batches: int, *, device: str = "cuda") -> DeviceLoader:
    """Random images that lie on the device, cropped and flipped."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 32, 32), generator=generator, dtype=torch.uint8)
    store = ImageStore([(images, torch.arange(256) % 10)], device=device, placement="device")
    return DeviceLoader(
        store, torch.arange(256), batch_size=32, seed=0, augmentation=Augmentation(), batches_per_epoch=batches
    )


def attack(steps: int = 2) -> AdversarialExamples:
    return AdversarialExamples(InnerMaximisation(norm="linf", eps=8 / 255, step_size=4 / 255, steps=steps))


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """As `mi_at.train` makes it."""
    given: dict[str, Any] = {"max_epochs": 1, "logger": False, "log_every_n_steps": 50, **options}
    return Trainer(
        **given,
        accelerator="gpu",
        devices=1,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, Last) for callback in callbacks),
    )


def attached(defense: Defense, net: nn.Module) -> Defense:
    return defense.attach(net, optimisation=SGD(lr=0.05, epochs=2, schedule="constant"))


@pytest.fixture
def watched() -> Iterator[Callable[[str], None]]:
    """Sets what happens when the host waits for the device: "error" or "default"; "default" again at the end."""
    torch.cuda.synchronize()
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("name", DEFENSES)
def test_a_step_gives_what_the_cpu_gives(name: str) -> None:
    """In float64, where only a pixel whose gradient vanishes could be moved another way."""
    views: dict[str, dict[str, Tensor]] = {}
    results: dict[str, dict[str, Tensor]] = {}
    for device in ("cpu", "cuda"):
        data = batch(device, images=8)
        data.x = data.x.double()
        ours = Ours(DEFENSES[name](), network(device).double())
        loss = ours(data)
        views[device] = {view: images.cpu() for view, images in data.views.items()}
        weights = {key: value.detach().cpu() for key, value in ours.defense.net.named_parameters()}
        results[device] = {"loss": loss.cpu(), **weights}
    torch.testing.assert_close(views["cuda"], views["cpu"], rtol=0, atol=1e-7)
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", DEFENSES)
def test_bf16_and_channels_last_train(name: str) -> None:
    ours, data = Ours(DEFENSES[name](), network(), bf16=True), batch()
    losses = [float(ours(data)) for _ in range(15)]
    assert losses[-1] < losses[0]
    weights = dict(ours.defense.net.named_parameters())
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())
    assert weights["blocks.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    view = data.views.get("adversarial", data.x)
    assert view.dtype == torch.float32
    assert float((view - data.x).abs().max()) <= 8 / 255 + 1e-6


def test_compiled_it_is_the_same_network() -> None:
    plain, compiled = network(), network()
    compiled.compile()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    ours = {"plain": Ours(StandardAT(), plain), "compiled": Ours(StandardAT(), compiled)}
    losses = {name: [float(step(batch())) for _ in range(3)] for name, step in ours.items()}
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=0.05)


# ---------------------------------------------------------------- waiting
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_device(name: str, bf16: bool, watched: Callable[[str], None]) -> None:
    ours, source = Ours(STEPS[name](), network(), bf16=bf16), iter(loader(20))
    ours.defense.inspect_every = 0
    for _ in range(3):
        ours(next(source))
    torch.cuda.synchronize()
    watched("error")
    for _ in range(5):
        ours(next(source))
    watched("default")
    assert float(ours(next(source))) > 0


class Watch(Callback):
    """An error if anything waits for the device from the beginning of one batch to the end of another."""

    def __init__(self, first: int, last: int, watched: Callable[[str], None]) -> None:
        self.first, self.last, self.watched, self.batches = first, last, watched, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            torch.cuda.synchronize()
            self.watched("error")
        self.batches += self.first <= batch_idx <= self.last

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            self.watched("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["standard_at", "mimae", "mma_full"])
def test_no_step_of_a_fit_waits_for_the_device(
    name: str, precision: str, watched: Callable[[str], None], tmp_path: Path
) -> None:
    from pytorch_lightning.loggers import CSVLogger

    examples, watch = attack(), Watch(3, 15, watched)
    fit = trainer(tmp_path, watch, examples, Speed(examples), precision=precision, logger=CSVLogger(tmp_path))
    fit.fit(attached(STEPS[name](), network()), loader(20))
    assert watch.batches == 13
    assert fit.global_step == 20
    assert float(fit.callback_metrics["train/loss"]) < float("inf")


def test_a_wait_would_be_seen(watched: Callable[[str], None]) -> None:
    value = torch.ones((), device="cuda")
    watched("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


# ---------------------------------------------------------------- data, time, resume
def test_data_lie_on_the_device(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from mi_at.data.digits import Digits

    class Look(Callback):
        places: set[str] = set()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
            self.places |= {tensor.device.type for tensor in (batch.x, batch.y, batch.index)}

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data, look = Digits(batch_size=200, val_size=180), Look()
    trainer(tmp_path, look, attack()).fit(attached(StandardAT(), net), datamodule=data)
    assert look.places == {"cuda"}
    store = data.train_dataloader().store
    assert store.resident
    assert store.device.type == "cuda"


def test_the_attack_is_timed_by_events() -> None:
    ours, data = Ours(StandardAT(), network()), batch()
    ours(data)
    ours.examples.take_seconds()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        ours(data)
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    assert 0 < ours.examples.take_seconds() < elapsed
    assert ours.examples.take_seconds() == 0


class Again:
    """The same batches every epoch."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        return iter([batch() for _ in range(4)])


def test_resumed_it_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """Dropout draws from the GPU's generator, whose state is in the checkpoint."""

    def fit(folder: Path, epochs: int, ckpt: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0 if ckpt is None else 1)  # a resumed run must not depend on it
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10))
        nn.init.zeros_(net[2].weight)
        run = trainer(folder, attack(), Last(folder, every_n_steps=0), max_epochs=epochs)
        run.fit(attached(StandardAT(), net), Again(), ckpt_path=ckpt, weights_only=True)
        return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}

    whole = fit(tmp_path / "whole", 2)
    first = fit(tmp_path / "parts", 1)
    resumed = fit(tmp_path / "parts", 2, tmp_path / "parts" / "last.ckpt")
    checkpoint = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert "cuda" in checkpoint["rng"]
    for name, value in whole.items():
        assert not torch.equal(first[name], value)
        assert torch.equal(resumed[name], value)
