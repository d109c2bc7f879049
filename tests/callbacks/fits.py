"""Tiny fits for tests: a linear network, random images, a real defense, the project's Trainer flags."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from torch import nn

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.optim import SGD

CLASSES, SIDE = 3, 8


def batches(count: int, size: int = 6, *, channels: int = 1, seed: int = 0) -> list[Batch]:
    """Random images and labels, as a loader would give them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        x = torch.rand(size, channels, SIDE, SIDE, generator=generator)
        y = torch.randint(CLASSES, (size,), generator=generator)
        made.append(Batch(x=x, y=y, index=torch.arange(size) + number * size))
    return made


class Fresh:
    """A loader that hands out new batches each time: callbacks write into them."""

    def __init__(self, count: int, size: int = 6, *, channels: int = 1, seed: int = 0) -> None:
        self._arguments: tuple[int, int, dict[str, int]] = (count, size, {"channels": channels, "seed": seed})

    def __len__(self) -> int:
        return self._arguments[0]

    def __iter__(self) -> Any:
        count, size, options = self._arguments
        return iter(batches(count, size, **options))


def attack(eps: float = 0.1, steps: int = 2) -> AdversarialExamples:
    """The callback that any of the project's fits has."""
    return AdversarialExamples(InnerMaximisation(norm="linf", eps=eps, step_size=eps / 2, steps=steps))


def module(
    *, defense: Defense | None = None, channels: int = 1, classes: int = CLASSES, epochs: int = 3, seed: int = 0
) -> Defense:
    """A defense on a linear network."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * SIDE * SIDE, classes))
    return (defense or StandardAT()).attach(net, optimisation=SGD(lr=0.1, epochs=epochs, schedule="constant"))


class Loaded(LightningDataModule):
    """Hands out one training loader, and nothing to validate on."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader


def fit(
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    epochs: int = 3,
    train: int = 4,
    val: int = 2,
    channels: int = 1,
    loggers: Sequence[Logger] = (),
    ckpt: Path | None = None,
    defense: LightningModule | None = None,
    examples: AdversarialExamples | None = None,
    data: LightningDataModule | None = None,
    options: Mapping[str, Any] | None = None,
) -> Trainer:
    """Train on random images, `train` and `val` batches of them, or on `data`."""
    given: dict[str, Any] = {
        "max_epochs": epochs,
        "log_every_n_steps": 2,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        **(options or {}),
    }
    trainer = Trainer(
        **given,
        accelerator="cpu",
        devices=1,
        callbacks=[examples or attack(), *callbacks],
        logger=list(loggers) or False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    trainer.fit(
        defense or module(channels=channels, epochs=max(1, epochs)),
        None if data else Fresh(train, channels=channels),
        Fresh(val, channels=channels, seed=1) if val and not data else None,
        datamodule=data,
        ckpt_path=ckpt,
        weights_only=True,
    )
    return trainer
