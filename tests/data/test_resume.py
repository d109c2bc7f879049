"""A real Trainer, killed and resumed: the batches seen are those of the run that was never killed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.types import _Stateful
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mi_at.data.batch import Batch
from tests.data.makers import Plain

EPOCHS = 3
Key = tuple[int, int, tuple[int, ...], int]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


class Recorder(pl.LightningModule):
    """Notes (epoch, batch, indices, a checksum of the augmented pixels) of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen: list[Key] = []
        self.validated = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert (batch.epoch, batch.batch_idx) == (self.current_epoch, batch_idx)
        pixels = (batch.x.double() * torch.arange(1, 65).view(8, 8)).sum() * 255
        self.seen.append((batch.epoch, batch_idx, tuple(batch.index.tolist()), round(pixels.item())))
        return self.net(batch.x.mean().view(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KilledError(Exception):
    pass


class Kill(pl.Callback):
    """Saves a checkpoint at one point and dies there."""

    def __init__(self, path: Path, hook: str, epoch: int, batch: int = -1) -> None:
        self.path, self.point = path, (hook, epoch, batch)

    def _reach(self, trainer: pl.Trainer, hook: str, batch: int = -1) -> None:
        if (hook, trainer.current_epoch, batch) == self.point:
            trainer.save_checkpoint(self.path)
            raise KilledError

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        self._reach(trainer, "batch", rest[-1])  # type: ignore[arg-type]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._reach(trainer, "epoch")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._reach(trainer, "validation")


def data(val_size: int, **options: object) -> Plain:
    return Plain(batch_size=8, val_size=val_size, augment=True, pad=2, seed=3, **options)  # type: ignore[arg-type]


def fit(*callbacks: pl.Callback, val_size: int, resume: Path | None = None, **options: object) -> Recorder:
    module = Recorder()
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": checkpointing,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        **options,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)  # type: ignore[arg-type]
    try:
        trainer.fit(module, datamodule=data(val_size), ckpt_path=resume, weights_only=True if resume else None)
    except KilledError:
        assert resume is None
    return module


def test_an_uninterrupted_run_sees_every_image_once_an_epoch() -> None:
    module = fit(val_size=8)
    assert [key[:2] for key in module.seen] == [(epoch, batch) for epoch in range(EPOCHS) for batch in range(4)]
    for epoch in range(EPOCHS):
        assert len({i for key in module.seen if key[0] == epoch for i in key[2]}) == 32
    assert module.validated == 8 * EPOCHS
    assert fit(val_size=0).validated == 0


@pytest.mark.parametrize("val_size", [0, 8])
@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [
        ("batch", 0, 0),
        ("batch", 1, 1),
        ("batch", 1, 3),
        ("epoch", 0, -1),
        ("epoch", 1, -1),
        ("validation", 1, -1),
    ],
)
def test_killed_and_resumed(tmp_path: Path, hook: str, epoch: int, batch: int, val_size: int) -> None:
    if hook == "validation" and not val_size:
        return
    whole = fit(val_size=val_size).seen
    killed = fit(Kill(tmp_path / "last.ckpt", hook, epoch, batch), val_size=val_size)
    resumed = fit(val_size=val_size, resume=tmp_path / "last.ckpt")
    assert 0 < len(killed.seen) < len(whole)
    assert killed.seen + resumed.seen == whole


def test_lightnings_own_checkpoints_every_few_steps(tmp_path: Path) -> None:
    options = {
        "every_n_train_steps": 3,
        "save_top_k": -1,
        "filename": "{step}",
        "auto_insert_metric_name": False,
    }
    whole = fit(ModelCheckpoint(tmp_path, **options), val_size=8).seen
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert [int(path.stem) for path in saved] == [3, 6, 9, 12]
    for path in saved:
        assert whole[: int(path.stem)] + fit(val_size=8, resume=path).seen == whole


def test_epochs_cut_by_limit_train_batches(tmp_path: Path) -> None:
    whole = fit(val_size=0, limit_train_batches=3).seen
    assert [key[:2] for key in whole] == [(epoch, batch) for epoch in range(EPOCHS) for batch in range(3)]
    for hook, batch in (("batch", 1), ("batch", 2), ("epoch", -1)):
        path = tmp_path / f"{hook}{batch}.ckpt"
        killed = fit(Kill(path, hook, 1, batch), val_size=0, limit_train_batches=3).seen
        assert killed + fit(val_size=0, limit_train_batches=3, resume=path).seen == whole


def test_validation_within_an_epoch(tmp_path: Path) -> None:
    whole = fit(val_size=8, val_check_interval=0.5)
    path = tmp_path / "last.ckpt"
    killed = fit(Kill(path, "batch", 1, 2), val_size=8, val_check_interval=0.5)
    resumed = fit(val_size=8, val_check_interval=0.5, resume=path)
    assert killed.seen + resumed.seen == whole.seen


def test_epochs_after_a_stop_at_max_steps(tmp_path: Path) -> None:
    """max_steps ends in the middle of an epoch; a longer run takes it up there."""
    whole = fit(val_size=0).seen
    options = {"max_steps": 6, "max_epochs": None}
    first = fit(ModelCheckpoint(tmp_path, every_n_train_steps=6), val_size=0, **options).seen
    [path] = tmp_path.glob("*.ckpt")
    assert first + fit(val_size=0, resume=path).seen == whole


def test_the_loader_is_found_to_be_stateful_and_its_state_plain() -> None:
    plain = data(0)
    plain.setup("fit")
    loader = plain.train_dataloader()
    assert isinstance(loader, _Stateful)
    assert not isinstance(data_val(), _Stateful)
    assert set(loader.state_dict()) >= {"epoch", "position"}


def data_val() -> object:
    plain = data(8)
    plain.setup("fit")
    return plain.val_dataloader()


def test_the_test_split_cannot_be_reached_from_a_fit() -> None:
    class Peek(pl.Callback):
        tried = 0

        def on_train_batch_start(self, trainer: pl.Trainer, *rest: object) -> None:
            for reach in (trainer.datamodule.test_dataloader, lambda: trainer.datamodule.setup("test")):  # type: ignore[attr-defined]
                with pytest.raises(RuntimeError, match="the test split cannot be"):
                    reach()
                self.tried += 1

    peek, plain = Peek(), data(8)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[peek],
    )
    plain.setup("test")  # even if it was read before
    module = Recorder()
    trainer.fit(module, datamodule=plain)
    assert peek.tried == 8
    assert plain.reads == ["test", "train"]
    module.validated = 0
    trainer.test(module, datamodule=plain, verbose=False)
    assert module.validated == 16
    trainer.validate(module, datamodule=plain, verbose=False)
    assert module.validated == 16 + 8
