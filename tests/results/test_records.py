"""Records: round trip, whole or not at all, refused when broken; hashes that change when they must."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mi_at.evaluation.intervals import wilson
from mi_at.results import records
from mi_at.results.records import (
    RecordError,
    config_hash,
    git_state,
    make_record,
    read_outcomes,
    read_record,
    run_key,
    write_record,
)
from tests.results.makers import NAMES, config, evaluation, notes, record


# ---------------------------------------------------------------- what it says
def test_record_says_how_the_number_came_about() -> None:
    result = evaluation()
    made = record(result, training=notes(), tags={"table": "mimae_t8"}, processes=2, seed=3)
    assert made.key == "mimae-digits-cnn_tiny-s3"
    assert (made.split, made.budget, made.seed, made.processes) == ("test", "short", 3, 2)
    assert made.checkpoint == {"rule": "best", "epoch": 12}
    assert made.config_hash == config_hash(config(seed=3)) == config_hash(made.config)
    assert made.versions["torch"] == torch.__version__
    assert "python" in made.versions
    assert made.hardware["device"] == "cpu"
    assert made.hardware["cores"] >= 1
    assert made.hardware["cpu"]
    assert made.training == {"shares": {"bce": 0.75, "mi": "nan"}, "epochs": [1, 2], "precision": "fp32"}
    assert "first n" in made.order
    assert made.date.endswith("+00:00")
    assert [row.name for row in made.attacks] == ["clean", "fgsm", "pgd_20", "worst of fgsm, pgd_20"]
    row = made["pgd_20"]
    assert (row.attack, row.norm, row.eps, row.steps, row.n) == ("pgd", "linf", 0.02, 20, 20)
    assert row.correct == int(result["pgd_20"].correct.sum())
    assert row.accuracy == row.correct / 20
    assert row.interval == wilson(row.correct, 20)
    assert row.flags == ("reach",)
    assert "cannot cross" in row.messages["reach"]
    assert row.description["init"] == "uniform"
    with pytest.raises(KeyError, match="expected one of clean, fgsm"):
        made["cw"]


def test_audit_travels_with_the_record_and_old_records_have_none(tmp_path: Path) -> None:
    findings = [{"check": "reach", "severity": "pass", "measured": torch.tensor(1.5)}]
    made = record(audit={"verdict": "pass", "findings": findings})
    path = write_record(tmp_path / "record.json", made)
    assert read_record(path).audit == {"verdict": "pass", "findings": [{**findings[0], "measured": 1.5}]}
    old = json.loads(path.read_text())
    del old["audit"]
    path.write_text(json.dumps(old))
    assert read_record(path).audit == record().audit == {}


def test_nothing_of_the_machine_but_its_kind() -> None:
    made = record(config=config(dataset__root="/elsewhere/somebody/data", run_dir="/scratch/somebody", hydra={"a": 1}))
    assert "somebody" not in json.dumps(made.config)
    assert {"runs", "run_dir", "hydra", "logger", "resume"}.isdisjoint(made.config)


def test_bad_arguments() -> None:
    with pytest.raises(RecordError, match="expected a key 'rule'"):
        record(checkpoint={"epoch": 3})
    with pytest.raises(RecordError, match=r"training\.net=.*a record holds plain values, found Linear"):
        record(training={"net": torch.nn.Linear(1, 1)})


def test_git_state_is_that_of_our_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "mi_at"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(records, "__file__", str(package / "results" / "records.py"))
    assert git_state() == {"commit": None, "dirty": None}
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    state = git_state()
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (package / "__init__.py").write_text("changed = True\n")
    assert git_state() == {**state, "dirty": True}
    # Installed into an environment inside somebody's repository: not our commit.
    site = tmp_path / "venv" / "mi_at"
    site.mkdir(parents=True)
    monkeypatch.setattr(records, "__file__", str(site / "results" / "records.py"))
    assert git_state() == {"commit": None, "dirty": None}


def test_a_record_has_the_commit_its_process_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
    records.git_at_start.cache_clear()
    try:
        records.git_at_start()
        monkeypatch.setattr(records, "git_state", lambda: {"commit": "b" * 40, "dirty": True})
        assert record().git == {"commit": "a" * 40, "dirty": False}
    finally:
        records.git_at_start.cache_clear()


def test_git_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() == {"commit": None, "dirty": None}


# ---------------------------------------------------------------- on disk
def test_round_trip(tmp_path: Path) -> None:
    result = evaluation()
    made = record(result, training=notes())
    path = write_record(tmp_path / "deep" / "record.json", made, result)
    assert read_record(path) == made
    assert sorted(item.name for item in path.parent.iterdir()) == ["record.json", "record.npz"]
    outcomes = read_outcomes(path.with_suffix(".npz"))
    assert sorted(outcomes) == sorted(
        [
            "index",
            "label",
            *(f"{n}.{w}" for n in ("clean", "fgsm", "pgd_20") for w in ("prediction", "distance")),
        ]
    )
    assert np.array_equal(outcomes["index"], np.arange(40))
    assert np.array_equal(outcomes["fgsm.prediction"], result["fgsm"].prediction.numpy())
    correct = outcomes["pgd_20.prediction"] == outcomes["label"][:20]
    assert int(correct.sum()) == made["pgd_20"].correct


def test_record_is_readable_by_all_who_may_enter_the_folder(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = write_record(tmp_path / "record.json", record())
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen"])
def test_failed_write_keeps_the_previous_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = write_record(tmp_path / "record.json", record(seed=1))
    before = path.read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(records.os, step, full)
    with pytest.raises(RecordError, match=r"could not write .*record\.json: No space left.*previous file is intact"):
        write_record(path, record(seed=2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["record.json"]
    assert read_record(path).seed == 1


def test_outcomes_come_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is there is complete."""
    written: list[str] = []
    write = records.write_atomically
    monkeypatch.setattr(
        records, "write_atomically", lambda path, content: (written.append(path.name), write(path, content))
    )
    result = evaluation()
    write_record(tmp_path / "record.json", record(result), result)
    assert written == ["record.npz", "record.json"]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"could not write .*there was none before"):
        write_record(tmp_path / "file" / "record.json", record())


# ---------------------------------------------------------------- refused when broken
@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_record(tmp_path / "record.json", record())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_half_written_record(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RecordError, match=r"record\.json: not a whole record .*set it aside and run again"):
        read_record(path)


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.json: cannot be read: No such file"):
        read_record(tmp_path / "none.json")
    with pytest.raises(
        RecordError, match=r"none\.npz: there is no such file: the command that made the record makes it again"
    ):
        read_outcomes(tmp_path / "none.npz")


def test_half_written_outcomes(tmp_path: Path) -> None:
    result = evaluation()
    write_record(tmp_path / "record.json", record(result), result)
    npz = tmp_path / "record.npz"
    npz.write_bytes(npz.read_bytes()[:-40])
    with pytest.raises(RecordError, match=r"record\.npz: not a whole file of outcomes"):
        read_outcomes(npz)


def test_binary_rubbish(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00rubbish")
    with pytest.raises(RecordError, match="not a whole record"):
        read_record(path)


def drop(key: str) -> Any:
    return lambda document: document.pop(key)


def put(value: Any, *keys: str | int) -> Any:
    def edit(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("seed"), r"record lacks seed"),
        (put("0", "seed"), r"seed='0': expected int"),
        (put(True, "seed"), r"seed=True: expected int"),
        (put(2, "schema"), r"schema 2, expected 1"),
        (drop("schema"), r"schema None, expected 1"),
        (put(1, "surprise"), r"unknown surprise: was it written by a newer mi_at"),
        (put([], "attacks"), r"attacks: expected a list of results"),
        (put("all", "attacks"), r"attacks: expected a list of results"),
        (put(0.99, "attacks", 1, "accuracy"), r"fgsm: accuracy or interval are not those of \d+ of 40"),
        (put([0.0, 1.0], "attacks", 1, "interval"), r"fgsm: accuracy or interval"),
        (put(41, "attacks", 1, "correct"), r"fgsm: 41 right of n=40 cannot be"),
        (put(None, "attacks", 1, "n"), r"attacks: fgsm: n=None: expected int"),
        (put(7, "seed"), r"seed 7, but 0 in its config: was it edited"),
        (put("smoke", "budget"), r"budget smoke, but short in its config"),
        (put(0.9, "config", "defense", "lambda_mi"), r"config_hash \w{12} is not that of its config"),
    ],
)
def test_broken_or_edited_record(path: Path, edit: Any, message: str) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match=message) as caught:
        read_record(path)
    assert "record.json" in str(caught.value)


def test_not_an_object(path: Path) -> None:
    path.write_text("[1, 2]")
    with pytest.raises(RecordError, match="expected a JSON object, found list"):
        read_record(path)


# ---------------------------------------------------------------- names and hashes
@pytest.mark.parametrize(
    "changes",
    [
        {"logger": {"wandb": {"project": "p"}}},
        {"table": "mimae_t8", "cell": "a"},
        {"tags": ["paper"], "group": "sweep", "choices": {"logger": "wandb", "trainer": "ddp"}},
        {"runs": "elsewhere", "run_dir": "there", "hydra": {"job": 1}, "output": "out"},
        {"resume": True, "keep_epochs": [3], "save_every_n_steps": 5, "probe": "pgd"},
        {"device": "cuda", "checkpoint": "best.ckpt"},
        {"dataset__root": "/mnt/data", "dataset__download": True, "dataset__placement": "mmap"},
        {"trainer__accelerator": "gpu", "trainer__devices": 4, "trainer__strategy": "ddp"},
        {"trainer__enable_progress_bar": False, "evaluation__progress": False},
        {"seed": 0.0, "optim__epochs": 12.0},
    ],
)
def test_hash_ignores_what_cannot_change_a_number(changes: dict[str, Any]) -> None:
    assert config_hash(config(**changes)) == config_hash(config())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"budget": "smoke"},
        {"defense__lambda_mi": 0.6},
        {"regularizer": {"mi": {"lambda_mi": 0.4}}},
        {"optim__epochs": 13},
        {"dataset__name": "mnist"},
        {"dataset__eps": "8/255"},
        {"dataset__batch_size": 128},
        {"dataset__extra": "more.npz"},
        {"evaluation__n": 100},
        {"trainer__precision": "bf16-mixed"},
        {"init_from": "best.ckpt"},
    ],
)
def test_hash_changes_with_what_can(changes: dict[str, Any]) -> None:
    assert config_hash(config(**changes)) != config_hash(config())


def test_hash_spells_numbers_alike_but_not_other_values() -> None:
    assert config_hash({"eps": "8/255"}) == config_hash({"eps": 8 / 255}) == config_hash({"eps": " 8 / 255"})
    assert config_hash({"a": {"x": 1, "y": 2}}) == config_hash({"a": {"y": 2.0, "x": 1.0}})
    values = [None, True, 1, "1", "", [], [1], {}, {"b": 1}, "a/b"]
    assert len({config_hash({"a": value}) for value in values}) == len(values)


def test_pictures_of_ones_own_are_named_by_their_root() -> None:
    mine, yours = (config(dataset__name="folder", dataset__root=root) for root in ("cats", "dogs"))
    assert config_hash(mine) != config_hash(yours)


def test_hash_of_a_training_run_and_of_several_processes() -> None:
    other = config(evaluation__n=100)
    assert config_hash(other, without=["evaluation"]) == config_hash(config(), without=["evaluation"])
    assert config_hash(config(), processes=1) == config_hash(config())
    assert len({config_hash(config(), processes=k) for k in (1, 2, 3)}) == 3


def test_hash_is_fixed() -> None:
    """Folders and committed records carry it: a change of the rule orphans them."""
    assert config_hash({"seed": 0, "eps": "8/255", "defense": {"beta": 1}}) == "ecdc0132aa53"


def test_every_key_left_out_is_left_out() -> None:
    for dotted in records.NOT_HASHED:
        assert config_hash(config(**{dotted.replace(".", "__"): "something else"})) == config_hash(config()), dotted


@pytest.mark.parametrize(
    ("names", "changes", "expected"),
    [
        (NAMES, {}, "mimae-digits-cnn_tiny-s0"),
        ({}, {}, "mimae-digits-cnn_tiny-s0"),
        ({**NAMES, "regularizer": "none"}, {"seed": 7}, "mimae-digits-cnn_tiny-s7"),
        ({**NAMES, "regularizer": ["ncmi", "ib_rar"]}, {}, "mimae+ncmi+ib_rar-digits-cnn_tiny-s0"),
        ({**NAMES, "regularizer": "ncmi,ib_rar"}, {}, "mimae+ncmi+ib_rar-digits-cnn_tiny-s0"),
        ({**NAMES, "regularizer": "mi"}, {}, "mimae+mi-digits-cnn_tiny-s0"),
        (NAMES, {"regularizer": {"mi": {"lambda_mi": 0.4}}}, "mimae+mi-digits-cnn_tiny-s0"),
        ({**NAMES, "model": "my/net"}, {}, "mimae-digits-my_net-s0"),
    ],
)
def test_run_key(names: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    assert run_key(config(**changes), names) == expected


def test_number_of_processes_is_in_the_hash_where_it_matters(tmp_path: Path) -> None:
    plain, coupled = (record(processes=2, processes_matter=matters) for matters in (False, True))
    assert plain.config_hash == record().config_hash
    assert coupled.config_hash == config_hash(config(), processes=2) != plain.config_hash
    assert read_record(write_record(tmp_path / "record.json", coupled)) == coupled


def test_records_of_one_evaluation_are_equal_but_for_time() -> None:
    result = evaluation()
    first, second = (make_record(result, config=config(), checkpoint={"rule": "last"}) for _ in range(2))
    assert replace(first, date="") == replace(second, date="")
