"""The train command from end to end: what every run leaves behind, and what each option does to it."""

from __future__ import annotations

import csv
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mi_at
from mi_at.data.digits import Digits
from mi_at.results.page_evaluation import command as page_command
from mi_at.results.records import Record, read_record
from tests.commands import Done, command, tiny

CONF = Path(__file__).parents[1] / "conf"
DEFENSES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml") if path.stem != "mi_estimators")
REGULARIZERS = sorted(path.stem for path in (CONF / "regularizer").glob("*.yaml") if path.stem not in ("none", "mi"))
BASES = ("standard_at", "trades", "mart", "trades_awp")
WITHOUT_ATTACK = ("clean_ncmi", "hbar", "ib_rar")  # terms that the papers also add to natural training
FILES = {"best.ckpt", "last.ckpt", "config.json", "metrics.csv", "trained.json"}
FILES |= {"record.json", "record.npz", "record.html", "examples.npz"}


def learning(method: str, group: str) -> list[str]:
    """Options with which namid's estimators learn something in so short a run; else they are refused."""
    if method != "namid":
        return []
    key = "defense" if group == "defense" else "regularizer.namid"
    return [f"{key}.estimator_objective=eq4", f"{key}.estimator_epochs=20"]


def train(where: Path, *overrides: str, folder: Path | None = None, quiet: bool = True) -> Path:
    """Train in a run folder of one's own, by default below `where`; that folder."""
    folder = folder or where / "run"
    done = command(where, *tiny(f"run_dir={folder}", *overrides))
    assert done.code == 0, done.err
    if quiet:
        assert done.err == "", "nothing to complain about"
    return folder


def only_run(done: Done, folder: Path) -> Path:
    assert done.code == 0, done.err
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "multirun")
    return run


def metrics(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


def values(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(run) if row.get(name)]


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / f"{name}.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    tensors = {key: value for key, value in one.items() if isinstance(value, torch.Tensor)}  # beside extra states
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in tensors.items())


def test_images(n: int) -> torch.Tensor:
    data = Digits(batch_size=500)
    data.setup("test")
    images: torch.Tensor = next(iter(data.test_dataloader())).x[:n]
    return images


test_images.__test__ = False  # type: ignore[attr-defined]


# ---------------------------------------------------------------- every method
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where namid runs, so that its stages are trained once."""
    return tmp_path_factory.mktemp("place")


@pytest.mark.parametrize("regularizer", ["none", "mi"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_a_run_leaves_everything_behind(place: Path, tmp_path: Path, defense: str, regularizer: str) -> None:
    where = place if defense == "namid" else tmp_path
    attacked = regularizer == "none"
    options = [f"defense={defense}", f"regularizer={regularizer}", *(["evaluation=quick"] if attacked else [])]
    options += learning(defense, "defense")
    done = command(where, *tiny(*options, "trainer.log_every_n_steps=1"))
    assert done.err == ""
    key = f"{defense}{'' if attacked else '+mi'}-digits-cnn_tiny-s0"
    (run,) = (where / "runs").glob(f"{key}-*")  # namid's stages lie beside it
    # ce never makes an adversarial image of its own, but validation does; ib_rar is also evaluated without its mask
    others = {"evaluations"} if defense == "ib_rar" else set()
    assert {path.name for path in run.iterdir()} == FILES | {"samples.png"} | others

    losses = values(run, "train/loss")
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert ("train/mi" in metrics(run)[0]) == (regularizer == "mi" or defense == "mimae")
    assert len(values(run, "val/robust")) == 2
    assert len(values(run, "train/clean")) in (1, 2)  # rarely where a method never looks at clean images
    assert all(0 <= accuracy <= 100 for accuracy in values(run, "train/clean"))

    for name in ("best", "last"):
        loaded = torch.load(run / f"{name}.ckpt", weights_only=True)
        assert loaded["mi_at"]["config"]["defense"]["_target_"].startswith("mi_at.defenses.")
    record = read_record(run / "record.json")
    assert record.key == key
    assert record.checkpoint["rule"] == "best"
    assert record.training["steps"] == 6
    names = ["clean", "fgsm", "pgd_20", "cw_inf", "autoattack", "worst of fgsm, pgd_20, cw_inf, autoattack"]
    assert [row.name for row in record.attacks] == (names if attacked else ["clean"])
    assert f"{record['clean'].accuracy * 100:.1f} [" in done.out
    assert "run folder: " in done.out

    net = mi_at.load(run / "best.ckpt")
    assert not net.training
    with torch.no_grad():
        prediction = net(test_images(10)).argmax(dim=1)
    outcomes = np.load(run / "record.npz")
    assert prediction.tolist() == outcomes["clean.prediction"].tolist()
    assert record["clean"].correct == int((outcomes["clean.prediction"] == outcomes["label"]).sum())


@pytest.mark.parametrize(
    ("base", "regularizer"),
    [(base, term) for term in REGULARIZERS for base in (*BASES, *(["ce"] if term in WITHOUT_ATTACK else []))],
)
def test_every_term_on_every_base(place: Path, base: str, regularizer: str) -> None:
    options = [f"defense={base}", f"regularizer={regularizer}", *learning(regularizer, "regularizer")]
    done = command(place, *tiny(*options, "trainer.log_every_n_steps=1"))
    assert done.code == 0, done.err
    assert done.err == ""
    (run,) = (place / "runs").glob(f"{base}+{regularizer}-digits-cnn_tiny-s0-*")
    losses = values(run, "train/loss")
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert any(name.startswith(f"train/{regularizer}") for name in metrics(run)[0])
    assert read_record(run / "record.json").training["steps"] == 6
    net = mi_at.load(run / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(net(test_images(4)), mi_at.load(run / "last.ckpt")(test_images(4)))


@pytest.mark.parametrize("name", ["ib_rar", "namid", "ncmi", "ncmi_relaxed"])
def test_a_paper_under_its_own_name_is_standard_at_with_its_term(place: Path, tmp_path: Path, name: str) -> None:
    own = train(place, f"defense={name}", *learning(name, "defense"), folder=tmp_path / "own")
    options = ["defense=standard_at", f"regularizer={name}", *learning(name, "regularizer")]
    added = train(place, *options, folder=tmp_path / "added")
    assert same(weights(own), weights(added))
    assert values(own, "train/loss") == values(added, "train/loss")


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As it is typed; the other tests fork it."""
    arguments = [sys.executable, "-m", "mi_at.train", *tiny()]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run folder: runs/mimae-digits-cnn_tiny-s0-" in done.stdout
    again = command(tmp_path, *tiny())
    assert "(finished)" in again.out


def test_the_command_on_a_page_is_that_of_the_run(tmp_path: Path) -> None:
    done = command(tmp_path, *tiny("defense.beta=2", "runs=elsewhere", "tags=[mine]", "evaluation=quick"))
    assert done.code == 0, done.err
    (run,) = (tmp_path / "elsewhere").iterdir()
    record = read_record(run / "record.json")
    words = shlex.split(page_command(record) or "")
    assert words[:3] == ["python", "-m", "mi_at.train"]
    assert "defense.beta=2" in words
    assert not any(word.startswith(("runs=", "tags=")) for word in words)
    assert "(finished)" in command(tmp_path, *words[3:], "runs=elsewhere").out


# ---------------------------------------------------------------- names, seeds
def test_the_run_folder_is_a_function_of_what_can_change_the_training(tmp_path: Path) -> None:
    stop = ("runs=/dev/null", "trainer.enable_progress_bar=true")  # the folder is named before it cannot be made

    def named(*overrides: str) -> str:
        done = command(tmp_path, *tiny(*stop, *overrides))
        assert done.code == 1
        (line,) = [line for line in done.out.splitlines() if line.startswith("  run ")]
        return line.split()[1].rpartition("/")[2]

    first = named()
    assert first == named()
    same_training = ["logger=none", "tags=[a]", "resume=true", "save_every_n_steps=7", "keep_epochs=[1]"]
    assert named(*same_training, "evaluation=quick", "select=last", "attack.eps=15/100") == first
    for other in ("seed=1", "defense.beta=2", "attack.steps=3", "optim.lr=0.06", "dataset.train_size=50"):
        assert named(other) != first


def test_the_same_seed_gives_the_same_bits_and_another_others(tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / str(number)).mkdir()
        runs.append(train(tmp_path / str(number), f"seed={seed}"))
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))
    assert (runs[0] / "samples.png").read_bytes() == (runs[1] / "samples.png").read_bytes()


# ---------------------------------------------------------------- length
@pytest.mark.parametrize(("steps", "rule"), [(1, "last"), (4, "best")])
def test_max_steps(tmp_path: Path, steps: int, rule: str) -> None:
    """Also where training ends before the first validation, without a complaint."""
    run = train(tmp_path, f"trainer.max_steps={steps}")
    record = read_record(run / "record.json")
    assert (record.checkpoint["rule"], record.training["steps"]) == (rule, steps)
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == steps
    assert (run / "best.ckpt").exists() == (rule == "best")
    assert (record.training["validation"] is None) == (rule == "last")


@pytest.mark.parametrize("options", [("dataset.val_size=0",), ("trainer.limit_val_batches=0",)])
def test_without_validation_the_last_weights_are_evaluated(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = train(tmp_path, *options)
    assert not (run / "best.ckpt").exists()
    assert read_record(run / "record.json").checkpoint == {"rule": "last", "epoch": 2, "step": 6}
    assert (run / "samples.png").is_file()


def test_validation_every_second_epoch(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.check_val_every_n_epoch=2", "optim.epochs=3")
    assert len(values(run, "val/robust")) == 1
    assert read_record(run / "record.json").checkpoint == {"rule": "best", "epoch": 2, "step": 6}


def test_epochs_that_are_kept_are_counted_in_the_papers_run(tmp_path: Path) -> None:
    run = train(tmp_path, "keep_epochs=[1,50,76]", "optim.epochs=4")
    found = {path.name: torch.load(path, weights_only=True)["epoch"] + 1 for path in run.glob("epoch_*.ckpt")}
    assert found == {"epoch_001.ckpt": 1, "epoch_050.ckpt": 2, "epoch_076.ckpt": 3}
    mi_at.load(run / "epoch_050.ckpt")


# ---------------------------------------------------------------- weights
def test_init_from_starts_at_other_weights(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = train(tmp_path / "a")
    still = ("optim.lr=1e-12", "optim.weight_decay=0", "optim.momentum=0", "seed=5")
    second = train(tmp_path / "b", f"init_from={first / 'best.ckpt'}", *still)
    best, moved = weights(first, "best"), weights(second)
    for name, value in best.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        ("callback=ema", "callback.ema.decay=0.5"),
        ("callback=swa", "callback.swa.start_epoch=50"),
        ("callback=[ema,awp]", "callback.awp.warmup_epochs=0"),
        ("model.batch_norm=true", "callback=[awp,swa]", "callback.awp.warmup_epochs=0", "callback.swa.start_epoch=1"),
    ],
    ids=["ema", "swa", "ema and awp", "awp and swa with batch norm"],
)
def test_averaged_and_perturbed_weights(tmp_path: Path, options: tuple[str, ...]) -> None:
    """What is served is the average; the raw weights are kept to go on from."""
    run = train(tmp_path, *options)
    last = torch.load(run / "last.ckpt", weights_only=True)
    raw, average = last["current_model_state"], last["state_dict"]
    assert raw.keys() == average.keys()
    assert not same(raw, average)
    served = mi_at.load(run / "last.ckpt").state_dict()
    assert all(torch.equal(value, average[f"net.{name}"]) for name, value in served.items())


@pytest.mark.slow
def test_a_compiled_network_keeps_its_names(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.compile=true", quiet=False)
    assert weights(run).keys() == {f"net.{name}" for name in mi_at.load(run / "best.ckpt").state_dict()}


# ---------------------------------------------------------------- the attack, precision, optimisation
OPTIONS: dict[str, tuple[str, ...]] = {
    "bf16": ("trainer.precision=bf16-mixed", "attack.precision=bf16", "trainer.channels_last=true"),
    "bf16 with an fp32 attack": ("trainer.precision=bf16-mixed",),
    "l2": ("attack.norm=l2", "attack.eps=0.5", "attack.step_size=0.1", "evaluation=quick"),
    "fgsm": ("attack=fgsm",),
    "train mode": ("attack.mode=train_no_track", "model.batch_norm=true"),
    "uniform start": ("attack.init=uniform", "attack.warmup_epochs=50"),
    "no attack": ("attack.eps=0", "attack.steps=0"),
    "adam": ("optim=adam", "trainer.gradient_clip_val=1"),
    "augmented": ("dataset.augment=true", "dataset.pad=1", "dataset.flip=true", "dataset.drop_last=true"),
    "part of the data": ("dataset.fraction=0.4", "dataset.train_size=null"),
    "one image is left over": ("dataset.train_size=61",),  # it joins the batch before
    "steps of an epoch": ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tmp_path: Path, case: str) -> None:
    run = train(tmp_path, *OPTIONS[case], "trainer.log_every_n_steps=1")
    assert all(math.isfinite(loss) for loss in values(run, "train/loss"))
    record = read_record(run / "record.json")
    if case.startswith("bf16"):
        expected = ("bf16-mixed", "bf16" if case == "bf16" else "fp32")
        assert (record.training["precision"], record.training["attack_precision"]) == expected
        assert all(value.dtype == torch.float32 for value in weights(run).values())
    if case == "l2":
        assert {row.norm for row in record.attacks if row.name != "clean"} == {"linf"}, "of the evaluation's own"


RATES = {  # of 4 epochs at lr 0.05; milestones are those of 100 epochs
    "constant": [0.05, 0.05, 0.05, 0.05],
    "multistep": [0.05, 0.05, 0.05, 0.005],
    "step": [0.05, 0.005, 0.0005, 0.00005],
    "cosine": [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)],
}


@pytest.mark.parametrize("schedule", [*RATES, "one_cycle"])
def test_schedules(tmp_path: Path, schedule: str) -> None:
    run = train(tmp_path, f"optim.schedule={schedule}", "optim.epochs=4", "dataset.train_size=20", "defense=ce")
    rates = values(run, "lr-SGD")
    if schedule == "one_cycle":
        assert rates[0] == pytest.approx(0.05 / 25)
        assert max(rates) == pytest.approx(0.05, rel=0.3)
        assert rates[-1] < max(rates)
    else:
        assert rates == pytest.approx(RATES[schedule])


def test_the_probe_records_attacks_on_validation(tmp_path: Path) -> None:
    run = train(tmp_path, "evaluation=quick", "probe=[pgd_20,fgsm]")
    lines = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert values(run, "probe/pgd_20") == [line["pgd_20"] for line in lines]
    (tmp_path / "plain").mkdir()
    assert same(weights(run), weights(train(tmp_path / "plain", "evaluation=quick"))), "training is not disturbed"


@pytest.mark.slow
def test_loggers(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    run = train(tmp_path, "logger=[wandb,tensorboard]", "evaluation=quick")
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert list((run / "tensorboard").glob("events.*"))
    assert metrics(run)


def test_no_logger(tmp_path: Path) -> None:
    run = train(tmp_path, "logger=none")
    assert {path.name for path in run.iterdir()} == (FILES | {"samples.png"}) - {"metrics.csv"}


def test_shares_of_terms_are_logged_where_they_were_measured(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.inspect_every=4", "trainer.log_every_n_steps=1")
    rows = [row for row in metrics(run) if row["share/mae"]]
    assert [row["step"] for row in rows] == ["0", "4"]
    for row in rows:
        assert sum(float(row[f"share/{term}"]) for term in ("bce", "mi", "mae")) == pytest.approx(1, abs=1e-6)
    terms = read_record(run / "record.json").training["terms"]
    assert terms["gradient/bce"]["max"] == pytest.approx(max(float(row["gradient/bce"]) for row in rows))
    assert len(values(run, "train/loss")) == 6, "a step has one row"


# ---------------------------------------------------------------- what terms leave in a record
def test_what_terms_made_of_their_options_and_read_is_recorded(tmp_path: Path) -> None:
    options = ["regularizer=[ib_rar,namid]", "regularizer.ib_rar.layers=robust", *learning("namid", "regularizer")]
    run = train(tmp_path, "defense=standard_at", *options, "trainer.inspect_every=2", "trainer.log_every_n_steps=1")
    training = read_record(run / "record.json").training
    used = {"layers": ["conv3", "fc1"], "batch_scale": True, "alpha_used": pytest.approx(0.04), "batch": 20}
    assert training["settings"] == {"ib_rar": used}
    selected = training["readings"]["namid/selected"]
    rows = [float(row["train/namid/selected"]) for row in metrics(run) if row["step"] in ("0", "2", "4")]
    rows = [value for value in rows if value == value]
    assert (selected["min"], selected["max"]) == (min(rows), max(rows))
    assert set(training["readings"]) == {f"namid/{name}" for name in NAMID_READS}
    assert not any(name.startswith("reading") for name in training["terms"])


NAMID_READS = ("selected", "natural_clean", "natural_adversarial", "adversarial_clean", "adversarial_adversarial")


@pytest.mark.parametrize(("options", "label"), [
    (["defense=ib_rar"], "without the mask"),
    (["defense=standard_at", "regularizer=ib_rar", "regularizer.ib_rar.mask.at_test=false"], "with the mask"),
])  # fmt: skip
def test_ib_rar_is_recorded_with_and_without_its_mask(tmp_path: Path, options: list[str], label: str) -> None:
    key = "defense" if options == ["defense=ib_rar"] else "regularizer.ib_rar"
    run = train(tmp_path, *options, f"{key}.mask.fraction=0.5", "evaluation=quick", "optim.epochs=8")
    main, (other,) = read_record(run / "record.json"), map(read_record, (run / "evaluations").glob("*/record.json"))
    assert [row.name for row in other.attacks] == ["clean", "fgsm", "pgd_20", "cw_inf", "worst of fgsm, pgd_20, cw_inf"]
    assert other.checkpoint == {**main.checkpoint, "served": label}
    node = other.config["defense"] if key == "defense" else other.config["regularizer"]["ib_rar"]
    assert node["mask"]["at_test"] == (label == "with the mask")
    net: Any = mi_at.load(run / "best.ckpt")
    masked = label == "without the mask"
    assert (net.last_conv_gate.on, other.config_hash != main.config_hash) == (masked, True)
    found = {}
    for record, on in ((main, masked), (other, not masked)):
        net.last_conv_gate.on = on
        with torch.no_grad():
            found[on] = net(test_images(10)).argmax(dim=1).tolist()
        path = run if record is main else next((run / "evaluations").iterdir())
        assert np.load(path / "record.npz")["clean.prediction"].tolist() == found[on]
    assert found[True] != found[False]


def test_a_mask_that_is_never_at_test_leaves_one_record(tmp_path: Path) -> None:
    for number, options in enumerate((["defense.mask.fraction=0"], ["defense.mask.applied=refresh"])):
        (tmp_path / str(number)).mkdir()
        assert not (train(tmp_path / str(number), "defense=ib_rar", *options) / "evaluations").exists()


# ---------------------------------------------------------------- several runs
def test_a_multirun_records_every_combination(tmp_path: Path) -> None:
    overrides = [o for o in tiny() if not o.startswith(("defense", "seed"))]
    done = command(tmp_path, "-m", "defense=standard_at,trades", "seed=0,1", *overrides)
    assert done.code == 0, done.err
    records = [read_record(path) for path in (tmp_path / "runs").glob("*/record.json")]
    keys = [f"{defense}-digits-cnn_tiny-s{seed}" for defense in ("standard_at", "trades") for seed in (0, 1)]
    assert sorted(record.key for record in records) == keys
    groups = {record.tags["group"] for record in records}
    assert len(groups) == 1, "one group for the sweep"
    assert None not in groups


def test_a_multirun_with_a_job_that_fails_finishes_the_others(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "defense.beta=1,-1,2", *tiny())
    assert done.code == 1
    assert "error: defense.beta=-1: expected 0 or more" in done.err
    assert "Traceback" not in done.err
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 2


def test_a_multirun_on_several_processes_is_refused(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "seed=0,1", *tiny("trainer=ddp"))
    assert done.code == 1
    assert "trainer.devices=2 in a multirun" in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "runs").glob("*/config.json"))


# ---------------------------------------------------------------- learning
@pytest.mark.slow
def test_robust_training_pays_on_digits(tmp_path: Path) -> None:
    """The defaults: without a defense the network falls, with it it stands."""
    records: dict[str, Record] = {}
    for defense in ("ce", "mimae"):
        done = command(tmp_path, f"defense={defense}")
        assert done.code == 0, done.err
        (path,) = (tmp_path / "runs").glob(f"{defense}-*/record.json")
        records[defense] = read_record(path)
    ce, mimae = records["ce"], records["mimae"]
    assert ce["pgd_20"].accuracy < 0.30
    assert mimae["clean"].accuracy >= 0.90
    for attack in ("pgd_20", "autoattack"):
        assert mimae[attack].accuracy >= ce[attack].accuracy + 0.40


@pytest.mark.slow
@pytest.mark.realdata("cifar10")
def test_resnet18_takes_real_steps_on_real_cifar10(tmp_path: Path, data_root: Path) -> None:
    few = ["dataset.batch_size=16", "dataset.val_size=20", "trainer.limit_val_batches=1", "evaluation=none"]
    few += ["evaluation.n=16", "trainer.max_steps=8", "trainer.log_every_n_steps=1", "dataset.train_size=32"]
    few += ["dataset.augment=false", f"dataset.root={data_root}", "trainer.enable_progress_bar=false"]
    done = command(tmp_path, "model=resnet18", "dataset=cifar10", "defense=mimae", *few, "optim.lr=0.01")
    run = only_run(done, tmp_path)
    losses = values(run, "train/loss")
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    assert read_record(run / "record.json").config["attack"]["eps"] == 0.031


@pytest.mark.slow
@pytest.mark.realdata("cifar100")
def test_the_users_command_takes_real_steps_on_real_cifar100(tmp_path: Path, data_root: Path) -> None:
    users = ["defense=mimae", "dataset=cifar100", "model=wrn34_10"]
    few = ["dataset.batch_size=2", "dataset.val_size=100", "trainer.limit_val_batches=0", "evaluation=none"]
    few += ["evaluation.n=4", "trainer.max_steps=3", "save_every_n_steps=1", f"dataset.root={data_root}"]
    few += ["trainer.enable_progress_bar=false", "+callback.interrupt._target_=tests.own.Interrupt"]
    killed = command(tmp_path, *users, *few, INTERRUPT="TERM:train_batch_start:1")
    assert killed.code == 143, killed.err
    done = command(tmp_path, *users, *few, "resume=true", INTERRUPT="")
    run = only_run(done, tmp_path)
    record: Any = read_record(run / "record.json")
    assert (record.checkpoint["step"], record["clean"].n) == (3, 4)
    assert record.names["recipe"] == "mimae_cifar100_wrn34_10"
