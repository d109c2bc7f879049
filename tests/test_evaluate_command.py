"""python -m mi_at.evaluate: the numbers of the end of training again, other attacks, other places."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mi_at
from mi_at.results.measure import STATE
from mi_at.results.records import Record, read_record
from mi_at.results.runs import RECORD
from tests.commands import Command, Done, command, tiny

CONF = Path(__file__).resolve().parents[1] / "conf"
QUICK = ("evaluation=quick", "evaluation.n=10", "evaluation.autoattack_n=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    done = command(folder, *tiny("run_dir=run", "optim.epochs=8", "dataset.train_size=200", *QUICK))
    assert done.code == 0, done.err
    return folder / "run"


def evaluate(folder: Path, *overrides: str) -> Done:
    return command(folder, *overrides, module="mi_at.evaluate")


def record_of(done: Done, folder: Path) -> tuple[Path, Record]:
    """The record, where the header says it is."""
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("  record ")]
    path = folder / line.split()[1]
    return path, read_record(path)


def test_the_numbers_are_those_of_the_end_of_training(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.ckpt", tmp_path / "best.ckpt")
    path, again = record_of(evaluate(tmp_path, "checkpoint=best.ckpt", *QUICK), tmp_path)
    first = read_record(trained / "record.json")
    assert path.parent.parent == tmp_path / "evaluations"
    assert path.parent.name.startswith("best-quick-")
    assert [(row.name, row.n, row.correct, row.eps) for row in again.attacks] == [
        (row.name, row.n, row.correct, row.eps) for row in first.attacks
    ]
    one, other = np.load(trained / "record.npz"), np.load(path.with_suffix(".npz"))
    assert one.files == other.files
    assert all(np.array_equal(one[name], other[name]) for name in one.files)
    assert again.checkpoint == first.checkpoint
    assert again.config_hash == first.config_hash
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.ckpt", "evaluations"]


def test_other_weights_under_the_same_name_are_evaluated(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.ckpt", tmp_path / "best.ckpt")
    options = ("checkpoint=best.ckpt", "evaluation=none")
    _, first = record_of(evaluate(tmp_path, *options), tmp_path)
    assert "attacks anew" in evaluate(tmp_path, *options).out
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    for name, value in content["state_dict"].items():
        content["state_dict"][name] = torch.zeros_like(value)
    torch.save(content, tmp_path / "best.ckpt")
    anew = evaluate(tmp_path, *options)
    assert "attacks anew" not in anew.out
    _, other = record_of(anew, tmp_path)
    assert other["clean"].correct < first["clean"].correct
    assert other.checkpoint == first.checkpoint, "a file says nothing of it"


def test_what_is_missing_beside_a_record_is_made_again(trained: Path, tmp_path: Path) -> None:
    options = ("checkpoint=best.ckpt", "evaluation=none", f"output={tmp_path}")
    path, _ = record_of(evaluate(trained, *options), trained)
    page, outcomes = path.with_name("record.html"), path.with_suffix(".npz")
    page.unlink()
    assert "attacks anew" in evaluate(trained, *options).out
    assert page.is_file()
    outcomes.write_bytes(b"half a file")
    assert "attacks anew" not in evaluate(trained, *options).out
    assert np.load(outcomes)["label"].shape == (360,)


def test_a_surrogate_from_python(trained: Path) -> None:
    """Of a named data set, and of images at hand."""
    net = mi_at.load(trained / "best.ckpt")
    given = [f"evaluation.surrogate={trained / 'last.ckpt'}", "evaluation/attacks=[transfer_pgd_20]"]
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    for data, eps in (("digits", None), ((x, y), 0.1)):
        found = mi_at.robustness(net, data, evaluation="chosen", eps=eps, n=6, overrides=given, progress=False)
        assert found["transfer_pgd_20"].description["surrogate"]["name"] == "mimae-digits-cnn_tiny"
        assert "own_surrogate" not in found["transfer_pgd_20"].flags


def test_a_surrogate_that_is_no_run(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.ckpt", tmp_path / "best.ckpt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "theirs.pt")
    options = ("checkpoint=best.ckpt", "evaluation=black_box", "evaluation.n=4", f"output={tmp_path}/out")
    theirs = evaluate(tmp_path, *options, "evaluation.surrogate=theirs.pt")
    assert theirs.code == 1
    assert "evaluation.surrogate: checkpoint theirs.pt was not written by mi_at" in theirs.err
    assert "'evaluation.surrogate={model: resnet50, defense: ce}' trains one" in theirs.err


def test_another_evaluation_lies_beside_it(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir() if path.is_file()}
    paths = set()
    fgsm = ("evaluation=chosen", "evaluation/attacks=[fgsm]", "evaluation.n=10")
    for options in (fgsm, ("evaluation=none",), (*fgsm, "evaluation.eps=0.05"), (*fgsm, "evaluation.seed=1")):
        path, record = record_of(evaluate(trained.parent, "checkpoint=run/last.ckpt", *options), trained.parent)
        paths.add(path)
        assert path.parent.parent == trained / "evaluations"
        assert record.checkpoint["rule"] == "last"
        assert record.names["evaluation"] == options[0].partition("=")[2]
    assert len(paths) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_attacks_by_name_in_one_command(trained: Path, tmp_path: Path) -> None:
    """Every name there is but the slowest: a list longer than a file's name may be."""
    slow = {"autoattack", "autoattack_plus", "autoattack_rand", "cw_l2_search", "cw_l2_targets", "square"}
    stems = {path.stem for path in (CONF / "evaluation" / "attacks").glob("[!_]*.yaml")}
    names = sorted(stems - slow)
    options = ["evaluation=chosen", f"evaluation/attacks=[{','.join(names)}]", "evaluation.n=4", f"output={tmp_path}"]
    done = evaluate(trained, "checkpoint=best.ckpt", "evaluation.surrogate=last.ckpt", *options)
    _, record = record_of(done, trained)
    assert len(",".join(names)) > 255
    assert slow < stems
    assert set(names) <= {row.name for row in record.attacks}


def test_a_smaller_ball_is_easier(trained: Path, tmp_path: Path) -> None:
    found = []
    for eps in ("0", "0.02", "80/255"):
        attacks = ("evaluation=chosen", "evaluation/attacks=[pgd_20]", "evaluation.n=40", f"evaluation.eps={eps}")
        _, record = record_of(evaluate(trained, "checkpoint=best.ckpt", *attacks, f"output={tmp_path}"), trained)
        found.append(record["pgd_20"].accuracy)
        clean = record["clean"].accuracy
    assert found[0] == clean
    assert found == sorted(found, reverse=True)
    assert found[2] < found[0]


def test_output_and_data_from_elsewhere(trained: Path, tmp_path: Path) -> None:
    """The folder of the data is the machine's, not the checkpoint's."""
    done = evaluate(
        trained.parent, "checkpoint=run/best.ckpt", f"output={tmp_path}", "dataset.root=elsewhere", "evaluation=none"
    )
    path, record = record_of(done, trained.parent)
    assert path.parent.parent == tmp_path
    assert record.key == "mimae-digits-cnn_tiny-s0"
    assert list(json.loads(path.read_text())["tags"]) == ["tags", "group"]


@pytest.mark.realdata("mnist")
def test_data_that_lie_elsewhere_on_this_machine(data_root: Path, tmp_path: Path) -> None:
    """A checkpoint whose data root is not here finds its data by MI_AT_DATA; one whose root is here keeps it."""
    there = tmp_path / "there"
    there.symlink_to(data_root)
    few = ("dataset=mnist", f"dataset.root={there}", "dataset.train_size=40", "evaluation=none", "run_dir=run")
    done = command(tmp_path, *tiny(*few))
    assert done.code == 0, done.err
    options = ("checkpoint=run/best.ckpt", "evaluation=none", "evaluation.n=20")
    kept = command(tmp_path, *options, module="mi_at.evaluate", MI_AT_DATA="nowhere")
    assert kept.code == 0, kept.err
    there.unlink()
    lost = command(tmp_path, *options, module="mi_at.evaluate", MI_AT_DATA="nowhere")
    assert "nowhere/MNIST/raw" in lost.err
    found = command(tmp_path, *options, module="mi_at.evaluate", MI_AT_DATA=str(data_root))
    assert found.code == 0, found.err


def test_a_killed_evaluation_goes_on_where_it_was(trained: Path, tmp_path: Path) -> None:
    """And ends with the record of one that nothing happened to."""
    options = ["checkpoint=best.ckpt", "evaluation=chosen", "evaluation/attacks=[pgd_100,cw_50x10]", "evaluation.n=120"]
    options += ["evaluation.batch_size=10", "evaluation.attacks.cw_50x10.restarts=3"]
    running = Command(trained, *options, f"output={tmp_path}/killed", module="mi_at.evaluate")

    def pieces() -> dict[Path, int]:
        found = (path for path in (tmp_path / "killed").rglob("*.npz") if STATE in path.parts)
        return {path: path.stat().st_mtime_ns for path in found}

    running.until(lambda: len(pieces()) >= 2)
    running.send(signal.SIGKILL)
    assert running.wait().code == 128 + signal.SIGKILL
    kept = pieces()
    assert not list(tmp_path.rglob(RECORD))

    running = Command(trained, *options, f"output={tmp_path}/killed", module="mi_at.evaluate")
    running.until(lambda: len(pieces()) > len(kept))
    assert {path: time for path, time in pieces().items() if path in kept} == kept, "none is computed again"
    path, found = record_of(running.wait(), trained)
    other, expected = record_of(evaluate(trained, *options, f"output={tmp_path}/whole"), trained)
    assert numbers(found) == numbers(expected)
    one, two = np.load(path.with_suffix(".npz")), np.load(other.with_suffix(".npz"))
    assert all(np.array_equal(one[name], two[name]) for name in two.files)
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(
        entry.name for entry in other.parent.iterdir()
    )
    assert not list(tmp_path.rglob(STATE))


def numbers(record: Record) -> dict[str, Any]:
    """A record without its clock."""
    plain = dataclasses.asdict(record)
    for row in plain["attacks"]:
        del row["seconds"]
    return {key: value for key, value in plain.items() if key not in ("seconds", "date")}


def test_processes_share_an_evaluation(trained: Path, tmp_path: Path) -> None:
    options = ["checkpoint=best.ckpt", "evaluation=chosen", "evaluation/attacks=[pgd_20,fgsm]", "evaluation.n=60"]
    options += ["evaluation.batch_size=5"]
    done = [
        evaluate(trained, *options, *shared, f"output={tmp_path}/{len(shared)}")
        for shared in ([], ["trainer=ddp", "trainer.devices=2"])
    ]
    alone, together = (record_of(each, trained)[1] for each in done)
    assert numbers(alone) == numbers(together)
    assert "a helping process ended" not in done[1].err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("processes=0", "processes=0: expected a whole number >= 1, or auto"),
        ("processes=many", "processes=many: expected"),
        ("trainer.devices=1.5", "processes=1.5: expected"),
    ],
)
def test_a_number_of_processes_that_cannot_be(trained: Path, option: str, message: str) -> None:
    ended = evaluate(trained, "checkpoint=best.ckpt", option)
    assert ended.code == 1
    assert message in ended.err


def test_a_network_is_its_own_best_surrogate(trained: Path, tmp_path: Path) -> None:
    """A transfer attack that is made on the network itself is the attack; on another one it finds less."""
    options = ["evaluation=chosen", "evaluation/attacks=[pgd_20,transfer_pgd_20]", "evaluation.n=60"]
    found = {}
    for name in ("best", "last"):
        run = shutil.copy(trained / "best.ckpt", tmp_path / "network.ckpt")
        other = shutil.copy(trained / f"{name}.ckpt", tmp_path / f"{name}_elsewhere.ckpt")
        path, found[name] = record_of(
            evaluate(tmp_path, f"checkpoint={run}", *options, f"evaluation.surrogate={other}"), tmp_path
        )
        assert "elsewhere" not in path.read_text(), "a path is no part of a record"
    assert found["best"]["transfer_pgd_20"].correct == found["best"]["pgd_20"].correct
    assert found["best"]["transfer_pgd_20"].description["surrogate"]["name"] == "mimae-digits-cnn_tiny"
    assert "own_surrogate" in found["best"]["transfer_pgd_20"].flags
    assert "own_surrogate" not in found["last"]["transfer_pgd_20"].flags
    assert found["last"]["pgd_20"].correct == found["best"]["pgd_20"].correct
    assert found["last"].config_hash != found["best"].config_hash
    done = evaluate(trained, "checkpoint=best.ckpt", "evaluation=black_box")
    assert (done.code, "evaluation.surrogate=" in done.err, "Traceback" in done.err) == (1, True, False)


def test_the_audit_is_part_of_the_record(trained: Path, tmp_path: Path) -> None:
    options = ["evaluation=audit", "evaluation.n=40", "evaluation.audit.n=10", "evaluation.audit.steps=3"]
    options += ["evaluation.audit.restarts=2", "evaluation.audit.queries=3", f"output={tmp_path}"]
    done = evaluate(trained, "checkpoint=best.ckpt", *options)
    _, record = record_of(done, trained)
    assert record.audit["settings"]["n"] == 10
    findings = {finding["check"]: finding for finding in record.audit["findings"]}
    assert f"audit: {record.audit['verdict']}" in done.out
    assert findings["adaptive"]["severity"] != "not checked", "a run carries its training loss"
    assert findings["selection"]["severity"] == "pass"
    assert findings["terms"]["severity"] != "not checked", "the notes of its training are beside it"


def test_information_is_part_of_the_record(trained: Path, tmp_path: Path) -> None:
    options = ["evaluation=chosen", "evaluation/attacks=[pgd_10]", "evaluation.n=40", f"output={tmp_path}"]
    options += [
        "evaluation.information=[clean,pgd_10]",
        "+evaluation.robust_ncmi.rounds=1",
        "+evaluation.robust_ncmi.steps=2",
    ]
    _, record = record_of(evaluate(trained, "checkpoint=best.ckpt", *options), trained)
    assert list(record.information) == ["clean", "pgd_10", "robust_ncmi"]
    assert [row["n"] for row in record.information.values()] == [40, 40, 40]
    assert record.information["pgd_10"]["ncmi"] != record.information["clean"]["ncmi"]
    assert (record.information["robust_ncmi"]["rounds"], record.information["robust_ncmi"]["steps"]) == (1, 2)
    done = evaluate(trained, "checkpoint=best.ckpt", "evaluation=quick", "evaluation.information=[pgd_40]")
    assert (done.code, "pgd_40" in done.err, "Traceback" in done.err) == (1, True, False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("checkpoint=run/best.ckpt", "device=cuda:98"), ("device=cuda:98", "this machine has cpu")),
        (("checkpoint=run/best.ckpt", "evaluation=no_such"), ("evaluation=no_such: expected one of", "quick")),
        (("checkpoint=run/best.ckpt", "evaluation.n=1000"), ("n=1000", "360")),
        (("checkpoint=run/best.ckpt", "evaluation.eps=8"), ("eps=8", "did you mean 8/255?")),
        (("checkpoint=run/best.ckpt", "eps=8/255"), ("unknown key eps", "evaluation")),
        (("checkpoint=run/best.ckpt", "dataset.rot=a"), ("unknown key dataset.rot", "did you mean root?")),
        ((), ("checkpoint",)),
    ],
)
def test_what_is_wrong_is_refused(trained: Path, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = set(trained.parent.rglob("*"))
    done = evaluate(trained.parent, *overrides)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert set(trained.parent.rglob("*")) == before
