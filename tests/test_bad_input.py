"""What is wrong is refused before training, with one message that says what it is, and nothing on disk is lost."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import Command, Done, command, tiny

REFUSED: dict[str, tuple[str, ...]] = {
    # names, with the choices
    "defense=no_such": ("defense=no_such: expected one of ", "mimae", "standard_at", "trades_awp"),
    "defense=hbar": ("defense=hbar: expected one of ", "did you mean regularizer=hbar?"),
    "dataset=no_such": ("dataset=no_such: expected one of ", "digits", "cifar100"),
    "model=no_such": ("model=no_such: expected one of ", "cnn_tiny", "wrn34_10"),
    "optim=no_such": ("optim=no_such: expected one of ", "adam", "sgd"),
    "attack=no_such": ("attack=no_such: expected one of ", "fgsm", "pgd"),
    "regularizer=no_such": ("regularizer=no_such: expected one of ", "mi", "none"),
    "callback=[ema,no_such]": ("callback=no_such: expected one of awp, ema, information_plane, none, swa",),
    "evaluation=no_such": ("evaluation=no_such: expected one of ", "quick", "none"),
    "defense=mimea": ("defense=mimea", "did you mean mimae?"),
    "recipe=no_such": ("recipe=no_such", "mimae_cifar100_wrn34_10", "head_to_head_mnist_cnn4", "none"),
    "defense.lamda_mi=1": ("unknown key defense.lamda_mi", "adversarial_term", "did you mean lambda_mi?"),
    "attack.step=1": ("unknown key attack.step", "step_size, steps", "did you mean steps?"),
    "datset=digits": ("unknown key datset", "did you mean dataset?"),
    "defense=ce defense.beta=1": ("unknown key defense.beta",),
    # what an evaluation records for figures
    "evaluation=chosen evaluation/attacks=[fgsm] evaluation.mutual_information=[fgsm]": (
        "evaluation.mutual_information=['fgsm'] is estimated by defense=mi_estimators",
        "set it to []",
    ),
    "evaluation=chosen +evaluation.outputs.of=[pgd_20]": ("outputs.of=pgd_20: expected some of clean",),
    # what its attacks need
    "evaluation=black_box": ("evaluation.attacks.transfer_pgd_20 is made on another network", "evaluation.surrogate="),
    "evaluation=chosen evaluation/attacks=[representation] evaluation.attacks.representation.tap=no_such": (
        "attack representation: tap='no_such': expected one of conv1, conv2",
    ),
    "evaluation.outputs=true": ("evaluation.outputs has no of", "{of: [clean]}"),
    "probe_ncmi=yes_please": ("probe_ncmi=yes_please", "true or false"),
    # the attack
    "attack.eps=-0.1": ("attack.eps=-0.1", "0 or more"),
    "attack.eps=8": ("attack.eps=8", "did you mean 8/255?"),
    "attack.eps=nan": ("attack.eps=nan", "0 or more"),
    "attack.eps=much": ("attack.eps='much'", "a number"),
    "attack.step_size=0": ("attack.step_size=0", "positive", "2/255"),
    "attack.step_size=-2/255": ("attack.step_size=-", "positive"),
    "attack.step_size=8": ("attack.step_size=8", "did you mean 8/255?"),
    "attack.norm=l2 attack.eps=128/255 attack.step_size=15": ("attack.step_size=15", "did you mean 15/255?"),
    "attack.steps=-1": ("attack.steps=-1", "0 or more"),
    "attack.steps=1.5": ("attack.steps=1.5", "a whole number"),
    "attack.norm=l1": ("norm='l1'", "linf, l2"),
    "attack.init=random": ("attack.init='random'", "uniform, gaussian, zero"),
    "attack.mode=train": ("attack.mode='train'", "eval, train_no_track"),
    "attack.precision=fp16": ("attack.precision='fp16'", "fp32 or bf16"),
    "attack.warmup_epochs=-1": ("attack.warmup_epochs=-1", "0 or more"),
    # weights of terms
    "defense.lambda_mi=-0.1": ("defense.lambda_mi=-0.1", "0 or more"),
    "defense.beta=-1": ("defense.beta=-1", "0 or more"),
    "defense.beta=nan": ("defense.beta=nan", "0 or more"),
    "defense.beta=much": ("defense.beta='much'", "a number"),
    "defense=trades defense.beta=-1": ("defense.beta=-1", "0 or more"),
    "defense=mart defense.beta=-1": ("defense.beta=-1", "0 or more"),
    "defense=alp defense.alpha=-1": ("defense.alpha=-1", "0 or more"),
    "defense=mma defense.variant=half": ("defense.variant='half'", "simplified, full"),
    "defense.logit_term=l1": ("defense.logit_term='l1'", "mae, mse, none"),
    "regularizer=mi regularizer.mi.lambda_mi=-1": ("regularizer.mi.lambda_mi=-1", "0 or more"),
    "regularizer=mi regularizer.mi.lambda_mi=nan": ("regularizer.mi.lambda_mi=nan", "0 or more"),
    # batches
    "dataset.batch_size=2000": ("dataset.batch_size=2000", "at most 60", "digits"),
    "dataset.batch_size=1": ("dataset.batch_size=1", "mutual information of defense=mimae", "2 or more"),
    "defense=trades regularizer=mi dataset.batch_size=1": ("dataset.batch_size=1", "regularizer.mi", "2 or more"),
    "dataset.batch_size=1.5": ("dataset.batch_size=1.5", "a whole number"),
    "trainer.accumulate_grad_batches=2": ("trainer.accumulate_grad_batches=2", "the whole batch at once"),
    "dataset.val_size=5000": ("dataset.val_size=5000", "0 to 1436"),
    "dataset.fraction=40": ("dataset.fraction=40", "(0, 1]"),
    "dataset.train_size=5000": ("dataset.train_size=5000", "1 to 1417"),
    # the network
    "model.num_classes=5": ("gives (2, 5)", "digits has 10 classes", "model.num_classes=10"),
    "model.num_classes=20": ("gives (2, 20)", "digits has 10 classes", "model.num_classes=10"),
    "model.in_channels=3": ("channels=1", "expected channels=3", "in_channels=1"),
    "model.image_size=16": ("8x8", "expected 16x16"),
    "model=cnn4": ("8x8", "CNN4 needs at least 16x16", "cnn_tiny"),
    "model.width=0": ("width is 0", "> 0"),
    "model._target_=no_such.Net": ("model._target_=no_such.Net", "importable class"),
    # devices and the trainer
    "trainer.accelerator=gpu trainer.devices=99": ("trainer.devices=99", "this machine has"),
    "trainer.accelerator=gpu trainer.devices=[0,98]": ("trainer.devices=[0, 98]", "this machine has"),
    "trainer.accelerator=abacus": ("trainer.accelerator=abacus", "cpu"),
    "trainer.devices=0": ("trainer.devices=0", "a number of devices"),
    "trainer.devices=two": ("trainer.devices=two", "a number of devices"),
    "trainer.strategy=no_such": ("strategy='no_such'", "ddp"),
    "trainer.precision=bf16-true": ("trainer.precision=bf16-true", "bf16-mixed"),
    "trainer.precision=16-mixed": ("trainer.precision=16-mixed", "bf16-mixed"),
    "trainer.max_steps=few": ("trainer.max_steps=few", "1 or more"),
    "trainer.max_epochs=0": ("trainer.max_epochs=0", "1 or more"),
    "trainer.limit_train_batches=0": ("trainer.limit_train_batches=0", "a number of batches"),
    "trainer.gradient_clip_val=-1": ("trainer.gradient_clip_val=-1", "0 or more"),
    "trainer.gradient_clip_val=much": ("trainer.gradient_clip_val=much", "0 or more"),
    "trainer.limit_train_batches=few": ("trainer.limit_train_batches=few", "a number of batches"),
    "trainer.limit_val_batches=few": ("trainer.limit_val_batches=few", "a number of batches"),
    "trainer.check_val_every_n_epoch=0": ("trainer.check_val_every_n_epoch=0", "1 or more"),
    "trainer.devices=[a]": ("trainer.devices=['a']", "a list of them"),
    "trainer.num_nodes=two": ("trainer.num_nodes=two", "1 or more"),
    "trainer.accelerator=tpu": ("trainer.accelerator=tpu", "auto, cpu or gpu"),
    "trainer.compile=perhaps": ("trainer.compile=perhaps", "true or false"),
    "optim.lr=0": ("optim.lr=0", "positive"),
    "optim.lr=fast": ("optim.lr='fast'", "a number"),
    "optim.momentum=-1": ("optim.momentum=-1", "[0, 1)"),
    "optim=adam optim.betas=[0.9]": ("optim.betas=[0.9]", "two shares"),
    "optim.epochs=0": ("optim.epochs=0", "1 or more"),
    "optim.schedule=linear": ("optim.schedule='linear'", "cosine", "one_cycle"),
    "optim.milestones=[90,75]": ("optim.milestones=[90, 75]", "rising"),
    # what is kept and measured
    "seed=-1": ("seed=-1", "a whole number from 0"),
    "resume=perhaps": ("resume=perhaps", "true or false"),
    "keep_epochs=[0]": ("keep_epochs=[0]", "from 1 on"),
    "keep_epochs=[101]": ("keep_epochs=[101]", "after epoch 100"),
    "dataset.val_size=3": ("dataset.val_size=3", "10 classes"),
    "save_every_n_steps=-1": ("save_every_n_steps=-1", "or 0"),
    "select=first": ("select=first", "auto, best or last"),
    "select=best dataset.val_size=0": ("select=best", "set dataset.val_size"),
    "evaluation=quick probe=[pgd_21]": ("probe=['pgd_21']", "fgsm, pgd_20, cw_inf, autoattack"),
    "evaluation=quick probe=[fgsm] dataset.val_size=0": ("probe=['fgsm']", "set dataset.val_size"),
    "evaluation.n=0": ("n=0", "1 or more"),
    "evaluation.n=1000": ("n=1000", "360"),
    "evaluation=quick evaluation.eps=8": ("evaluation.attacks.fgsm.eps=8", "did you mean 8/255?"),
    "evaluation=quick evaluation.step_size=8": ("step_size=8", "did you mean 8/255?"),
    "evaluation=quick evaluation.attacks.pgd_20.steps=many": ("evaluation.attacks.pgd_20.steps='many'", "whole"),
    "callback=[ema,swa]": ("callback=[ema,swa]", "choose one"),
    "callback=ema callback.ema.decay=2": ("callback.ema.decay=2", "[0, 1)"),
    "callback=ema callback.ema.start_epoch=-1": ("callback.ema.start_epoch=-1", "0 or more"),
    "callback=swa callback.swa.start_epoch=-1": ("callback.swa.start_epoch=-1", "0 or more"),
    "callback=awp callback.awp.gamma=2": ("callback.awp.gamma=2", "[0, 1)"),
    "callback=awp callback.awp.warmup_epochs=-1": ("callback.awp.warmup_epochs=-1", "0 or more"),
    "logger=wandb logger.wandb.mode=sometimes": ("logger.wandb.mode='sometimes'", "offline"),
    # files
    "init_from=no_such.ckpt": ("checkpoint no_such.ckpt does not exist",),
    "dataset=folder": ("dataset.root",),
    "dataset=folder dataset.root=no_such": ("not found: no_such", "Set dataset.root"),
    "dataset=cifar10 dataset.root=no_such": ("no_such/cifar-10-batches-py", "MI_AT_DATA", "dataset.download=true"),
    "dataset=mnist model=cnn4 dataset.root=no_such": ("no_such/MNIST/raw", "MI_AT_DATA", "dataset.download=true"),
    "dataset.download=true": ("dataset.download=true", "cannot fetch digits"),
    "runs=/dev/null/runs": ("cannot write the run folder /dev/null/runs", "choose another runs= or run_dir="),
}


def refused(done: Done, *words: str) -> None:
    """One message, without a traceback, that has these words; and the exit status of an error."""
    assert done.code == 1, done.err
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1
    assert done.err.startswith("error: "), "nothing before it"


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused_before_training(tmp_path: Path, overrides: str) -> None:
    done = command(tmp_path, *tiny(*overrides.split()))
    refused(done, *REFUSED[overrides])
    assert list(tmp_path.iterdir()) == [], "no run folder was made"


def test_a_missing_package_is_one_message_too(tmp_path: Path) -> None:
    refused(command(tmp_path, *tiny("trainer.strategy=deepspeed")), "deepspeed")


def test_the_whole_story_on_request(tmp_path: Path) -> None:
    done = command(tmp_path, *tiny("attack.eps=8"), HYDRA_FULL_ERROR="1")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "did you mean 8/255?" in done.err


# ---------------------------------------------------------------- data
def test_files_that_are_not_the_official_ones(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (root / "cifar-10-batches-py").mkdir(parents=True, exist_ok=True)
        (root / "cifar-10-batches-py" / name).write_bytes(b"something else")
    (root / "cifar-10-batches-py/batches.meta").write_bytes(b"something else")
    (root / "MNIST/raw").mkdir(parents=True)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        kind = "idx3" if "images" in name else "idx1"
        (root / f"MNIST/raw/{name}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    done = command(tmp_path, *tiny("dataset=cifar10", f"dataset.root={root}"))
    refused(done, "cifar-10-batches-py/", "expected md5 ", "found ", "14 bytes")
    done = command(tmp_path, *tiny("dataset=mnist", "model=cnn4", f"dataset.root={root}"))
    refused(done, "MNIST/raw/", "expected", "found")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [root]


OWN_DATA = """
import torch
from mi_at.data.digits import Digits
from mi_at.data.base import Images

class Floats(Digits):
    def read(self, split):
        images = super().read(split)
        return Images(images.x * 1.0, images.y, images.classes)
"""


def test_images_outside_the_range(tmp_path: Path) -> None:
    """Images are bytes, which are in [0, 1] once divided by 255: floats of any range are refused."""
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    done = command(tmp_path, *tiny("dataset._target_=own_data.Floats"))
    refused(done, "images torch.float32", "expected torch.uint8")
    np.savez(tmp_path / "extra.npz", image=np.full((20, 8, 8, 1), 3.5), label=np.zeros(20, int))
    done = command(tmp_path, *tiny(f"dataset.extra={tmp_path / 'extra.npz'}"))
    refused(done, "extra.npz", "float64", "expected")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- checkpoints
class Code:
    """What a hostile file would have in it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in run/."""
    folder = tmp_path_factory.mktemp("trained")
    done = command(folder, *tiny("run_dir=run"))
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def bad_checkpoints(trained: Path, tmp_path: Path) -> dict[str, tuple[str, ...]]:
    """Files in the current folder that are no good, and what is said of them."""
    whole = (trained / "run/best.ckpt").read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": Code()}, tmp_path / "code.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Code()))
    torch.save({"state_dict": {"net.head.weight": torch.zeros(1)}}, tmp_path / "bare.ckpt")
    return {
        "truncated.ckpt": ("truncated.ckpt is truncated or damaged",),
        "empty.ckpt": ("empty.ckpt is truncated or damaged",),
        "code.ckpt": ("code.ckpt contains pickled code", "refused"),
        "pickle.ckpt": ("pickle.ckpt contains pickled code", "refused"),
        "bare.ckpt": ("bare.ckpt",),  # weights of a network that nothing is known of
        "no_such.ckpt": ("no_such.ckpt does not exist",),
    }


def test_bad_checkpoints_are_refused(bad_checkpoints: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    for name, words in bad_checkpoints.items():
        refused(command(tmp_path, *tiny(f"init_from={name}")), *words)
        refused(command(tmp_path, f"checkpoint={name}", module="mi_at.evaluate"), *words)
    refused(command(tmp_path, *tiny("init_from=bare.ckpt")), "bare.ckpt was not written by mi_at")
    refused(command(tmp_path, "checkpoint=bare.ckpt", module="mi_at.evaluate"), "say which model they are for")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(bad_checkpoints) - {"no_such.ckpt"})


def test_a_checkpoint_of_another_model(trained: Path, tmp_path: Path) -> None:
    best = trained / "run/best.ckpt"
    refused(
        command(tmp_path, *tiny(f"init_from={best}", "model.batch_norm=true")),
        "best.ckpt (of mi_at.models.cnn.CNNTiny) does not fit the network CNNTiny",
        "missing: ",
    )
    refused(command(tmp_path, *tiny(f"init_from={best}", "model.width=0.5")), "of another shape", "instead of")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- folders and disks
def test_a_run_folder_of_another_configuration(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained / "run").rglob("*")}
    refused(command(trained, *tiny("run_dir=run", "defense.beta=2")), "run holds a run of another", "another run_dir=")
    refused(command(trained, *tiny("run_dir=.")), "holds no run of mi_at", "another run_dir=")
    assert {path: path.stat().st_mtime_ns for path in (trained / "run").rglob("*")} == before


def test_a_run_folder_in_which_another_process_trains(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "trained.json").unlink()
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        done = command(tmp_path, *tiny("run_dir=run", "resume=true"))
    finally:
        os.close(handle)
    assert done.code == 1
    assert f"another process is training in {run}" in done.err
    assert "run (another process is at it)" in done.out
    assert command(tmp_path, *tiny("run_dir=run", "resume=true")).code == 0, "nothing is left behind"


def test_a_record_that_cannot_be_written_is_known_before_the_evaluation(trained: Path, tmp_path: Path) -> None:
    done = command(tmp_path, f"checkpoint={trained}/run/best.ckpt", "output=/dev/null/out", module="mi_at.evaluate")
    refused(done, "cannot write the record to /dev/null/out", "choose another output=")
    assert "evaluation:" not in done.out


def test_a_damaged_run_folder(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{")
    refused(command(tmp_path, *tiny("run_dir=run")), "run/config.json is damaged", "another run_dir=")
    shutil.copyfile(trained / "run/config.json", tmp_path / "run/config.json")
    (tmp_path / "run/record.json").write_text("{")
    done = command(tmp_path, *tiny("run_dir=run"))
    assert done.code == 0, done.err
    assert "run/record.json: not a whole record" in done.err
    assert "it is record.json.damaged now" in done.err
    assert json.loads((tmp_path / "run/record.json").read_text())["attacks"]


LONG = ("run_dir=run", "optim.epochs=30", "+callback.interrupt._target_=tests.own.Interrupt")


def started(folder: Path) -> Command:
    """A run of many epochs that waits, stopped, with last.ckpt of its first epoch written."""
    going = Command(folder, *tiny(*LONG), INTERRUPT="STOP:train_batch_start:3")
    going.until((folder / "run/best.ckpt").is_file)
    going.until((folder / "run/last.ckpt").is_file)
    going.until(going.is_stopped)
    return going


def assert_intact(folder: Path, last: bytes) -> None:
    """The checkpoint is the one of before, and the run goes on from it."""
    assert (folder / "run/last.ckpt").read_bytes() == last
    torch.load(io.BytesIO(last), weights_only=True)
    done = command(folder, *tiny(*LONG), "resume=true", INTERRUPT="TERM:train_batch_start:7")
    assert done.code == 143, done.err


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    going = started(tmp_path)
    last = (tmp_path / "run/last.ckpt").read_bytes()
    resource.prlimit(going.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    going.send(signal.SIGCONT)
    refused(going.wait(), "could not save run/last.ckpt", "File too large", "the previous one is intact")
    assert not list((tmp_path / "run").glob("*.part"))
    assert_intact(tmp_path, last)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    going = started(small_disk)
    last = (small_disk / "run/last.ckpt").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "fill").write_bytes(bytes(700_000))
    going.send(signal.SIGCONT)
    done = going.wait()
    assert done.code == 1
    assert "No space left on device" in done.err
    (small_disk / "fill").unlink()
    assert_intact(small_disk, last)


def test_a_disk_that_becomes_unwritable(small_disk: Path) -> None:
    going = started(small_disk)
    last = (small_disk / "run/last.ckpt").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    going.send(signal.SIGCONT)
    assert going.wait().code == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_intact(small_disk, last)


# ---------------------------------------------------------------- non-finite losses
PLANTED = ("+regularizer.planted._target_=tests.own.Planted", "run_dir=run")


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_term(tmp_path: Path) -> None:
    """Noticed where the terms are inspected: here in every step."""
    done = command(tmp_path, *tiny(*PLANTED, "+regularizer.planted.at_step=4", "trainer.inspect_every=1"))
    refused(done, "the term 'planted' of the loss was not finite at step 4", "optim.lr")
    last = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert not (tmp_path / "run/record.json").exists()


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path: Path, save_every: int) -> None:
    """Without a look at every step the note is read before a checkpoint would be written."""
    done = command(
        tmp_path, *tiny(*PLANTED, "+regularizer.planted.at_step=4", f"save_every_n_steps={save_every}"), INTERRUPT=""
    )
    refused(done, "the term 'planted' of the loss was not finite at step 4")
    last = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert last["global_step"] == (4 if save_every else 3)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
