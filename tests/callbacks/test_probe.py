"""An evaluation on validation during training: the right weights, the right number, once per epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.callbacks.checkpoints import Last
from mi_at.callbacks.probe import Probe
from mi_at.callbacks.weight_averaging import EMA
from mi_at.evaluation import evaluate
from mi_at.metrics import NormalizedCMI
from tests.callbacks import fits

ATTACKS = {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, step_size=0.05, steps=3)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "probe.jsonl").read_text().splitlines()]


class Copies(Callback):
    """The network as it is in each validation."""

    def __init__(self) -> None:
        self.nets: list[nn.Module] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            net = nn.Sequential(nn.Flatten(), nn.Linear(fits.SIDE**2, fits.CLASSES))
            net.load_state_dict(pl_module.net.state_dict())
            self.nets.append(net)


@pytest.mark.parametrize("ema_first", [True, False])
def test_it_is_the_evaluation_of_the_weights_that_are_served(tmp_path: Path, ema_first: bool) -> None:
    probe, copies, ema = Probe(ATTACKS, folder=tmp_path), Copies(), EMA(decay=0.9)
    callbacks = [ema, probe, copies] if ema_first else [probe, copies, ema]
    defense = fits.module(epochs=2)
    trainer = fits.fit(tmp_path, callbacks, epochs=2, defense=defense)
    assert [(line["epoch"], line["step"]) for line in lines(tmp_path)] == [(1, 4), (2, 8)]
    for line, net in zip(lines(tmp_path), copies.nets, strict=True):
        result = evaluate(net, ATTACKS, fits.batches(2, seed=1), progress=False)
        expected = {"clean": result.clean, **result.attacks}
        for name, attack in expected.items():
            assert line[name] == pytest.approx(100 * attack.accuracy, abs=1e-3)
    assert float(trainer.callback_metrics["probe/pgd"]) == pytest.approx(lines(tmp_path)[-1]["pgd"], abs=1e-3)
    # At the end Lightning copies the average over the weights: the last validation saw the same.
    for mine, served in zip(copies.nets[-1].parameters(), defense.net.parameters(), strict=True):
        torch.testing.assert_close(mine, served)


def test_only_right_samples_are_attacked_and_wrong_ones_count(tmp_path: Path) -> None:
    seen = []

    def unchanged(net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        assert not net.training
        assert torch.is_grad_enabled()
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert (net(x).argmax(dim=1) == y).all()
        assert len(ids) == len(x)
        assert seed == 7
        seen.append(len(x))
        return x

    fits.fit(tmp_path, [Probe({"unchanged": unchanged}, folder=tmp_path, seed=7)], epochs=1)
    (line,) = lines(tmp_path)
    assert line["unchanged"] == line["clean"] == pytest.approx(100 * sum(seen) / 12, abs=1e-3)
    assert 0 < line["clean"] < 100


def test_training_has_the_same_bits_with_it(tmp_path: Path) -> None:
    def draws(net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        net.train()  # and does not put it back
        return (x + 0.01 * torch.rand_like(x)).clamp(0, 1)

    weights, drawn = [], []
    for callbacks in ([], [Probe({"draws": draws}, folder=tmp_path)]):
        defense = fits.module()
        fits.fit(tmp_path, callbacks, epochs=2, defense=defense)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in defense.net.parameters()]))
        drawn.append(torch.rand(3))
        assert all(parameter.requires_grad for parameter in defense.net.parameters())
    assert torch.equal(*weights)
    assert torch.equal(*drawn)


def test_a_resumed_run_records_each_epoch_once(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fits.fit(whole, [Probe(ATTACKS, folder=whole), Last(whole)], epochs=3)

    class Killed(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                raise RuntimeError("killed")

    defense = fits.module(epochs=3)
    callbacks = [Probe(ATTACKS, folder=parts), Last(parts)]
    fits.fit(parts, callbacks, epochs=1, defense=defense)
    checkpoint = (parts / "last.ckpt").read_bytes()
    with pytest.raises(RuntimeError, match="killed"):
        fits.fit(parts, [*callbacks, Killed()], epochs=3, ckpt=parts / "last.ckpt")
    assert len(lines(parts)) == 2
    # The second epoch is done again, as if its checkpoint had not been written.
    (parts / "last.ckpt").write_bytes(checkpoint)
    fits.fit(parts, [Probe(ATTACKS, folder=parts), Last(parts)], epochs=3, ckpt=parts / "last.ckpt")
    assert lines(parts) == lines(whole)
    assert list(parts.glob("*.part")) == []


def test_every_n_epochs_and_the_last(tmp_path: Path) -> None:
    fits.fit(tmp_path, [Probe(ATTACKS, folder=tmp_path, every_n_epochs=2)], epochs=5)
    assert [line["epoch"] for line in lines(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("loader", [None, []], ids=["none", "empty"])
def test_without_validation_it_refuses_to_start(tmp_path: Path, loader: list[Any] | None) -> None:
    from pytorch_lightning import Trainer

    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    callbacks = [fits.attack(), Probe(ATTACKS, folder=tmp_path)]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, num_sanity_val_steps=0, inference_mode=False, **options)
    with pytest.raises(ValueError, match=r"probe=\['fgsm', 'pgd'\].*set dataset.val_size"):
        trainer.fit(fits.module(), fits.Fresh(2), loader)


@pytest.mark.parametrize(
    ("attacks", "options", "message"),
    [
        ({}, {}, r"probe=\[\]: expected one attack or more"),
        ({"clean": FGSM(eps=0.1)}, {}, "none named 'clean'"),
        (ATTACKS, {"every_n_epochs": 0}, "every_n_epochs=0: expected 1 or more"),
    ],
)
def test_bad_options(attacks: dict[str, Callable[..., Tensor]], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(attacks, folder="run", **options)


def _two_shards(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    """The hooks of one validation on this process's share of 12 images: 7 and 5 of them."""
    from pytorch_lightning.trainer.states import TrainerFn

    from mi_at.data.batch import Batch

    whole = fits.batches(1, 12, seed=1)[0]
    share = slice(0, 7) if rank == 0 else slice(7, 12)
    batch = Batch(x=whole.x[share], y=whole.y[share], index=whole.index[share])
    logged: dict[str, Tensor] = {}
    module: Any = SimpleNamespace(net=fits.module().net, device="cpu")
    module.log_dict = lambda values, batch_size: logged.update(values)
    trainer: Any = SimpleNamespace(
        sanity_checking=False,
        current_epoch=0,
        max_epochs=1,
        global_step=4,
        is_global_zero=rank == 0,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    probe = Probe(ATTACKS, folder=folder / str(rank))
    probe.on_validation_start(trainer, module)
    probe.on_validation_batch_end(trainer, module, None, batch, 0)
    probe.on_validation_epoch_end(trainer, module)
    return {name: float(value) for name, value in logged.items()}


@pytest.mark.ddp
def test_two_processes_give_the_number_of_one(tmp_path: Path, spawn: Callable[..., list[Any]]) -> None:
    first, second = spawn(_two_shards, 2, tmp_path)
    result = evaluate(fits.module().net, ATTACKS, fits.batches(1, 12, seed=1), progress=False)
    expected = {f"probe/{name}": 100 * attack.accuracy for name, attack in result.attacks.items()}
    assert first == second == pytest.approx({"probe/clean": 100 * result.clean.accuracy, **expected})
    assert (tmp_path / "0" / "probe.jsonl").exists()
    assert not (tmp_path / "1").exists()


def test_ncmi_is_of_every_image_and_changes_no_accuracy(tmp_path: Path) -> None:
    copies, found = Copies(), {}
    for ncmi in (False, True):
        callbacks = [Probe(ATTACKS, folder=tmp_path / str(ncmi), ncmi=ncmi), copies]
        fits.fit(tmp_path, callbacks, epochs=1, defense=fits.module(epochs=1))
        (found[ncmi],) = lines(tmp_path / str(ncmi))
    (line, net) = (found[True], copies.nets[-1])
    assert {name: line[name] for name in found[False]} == found[False]
    batches = fits.batches(2, seed=1)
    for name in ("clean", *ATTACKS):
        metric = NormalizedCMI(num_classes=fits.CLASSES)
        for batch in batches:
            x = batch.x if name == "clean" else ATTACKS[name](net, batch.x, batch.y, ids=batch.index, seed=0)
            metric.update(net(x).softmax(dim=1), batch.y)
        assert line[f"{name} ncmi"] == pytest.approx(float(metric.compute()), abs=1e-5)
    assert line["clean ncmi"] != pytest.approx(line["pgd ncmi"], abs=1e-5)


def test_an_image_that_is_wrong_when_clean_counts_as_wrong_though_an_attack_helps_it(tmp_path: Path) -> None:
    def helps(net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        return 100 * net[1].weight[y].view_as(x)  # type: ignore[index]

    fits.fit(tmp_path, [Probe({"helps": helps}, folder=tmp_path, ncmi=True)], epochs=1)
    (line,) = lines(tmp_path)
    assert 0 < line["helps"] == line["clean"] < 100
    assert line["helps ncmi"] < line["clean ncmi"], "the outputs themselves were taken as they are"
