"""namid's stages: trained once and found again, by hand or by themselves; what does not fit is refused beforehand."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_at import io, stages
from mi_at.defenses.base import Defense
from mi_at.regularizers.namid import Namid
from mi_at.results.records import config_hash, read_record
from mi_at.results.runs import NOT_TRAINING, find_run, write_json
from tests.commands import Done, command, tiny

Compose = Callable[..., Any]
NAMID = ("defense=namid", "defense.hsize=8")


def run(folder: Path, *overrides: str, **environment: str) -> Done:
    return command(folder, *tiny(*overrides), **environment)


def folders(folder: Path) -> dict[str, Path]:
    """Run folders by the method's name."""
    return {path.name.partition("-")[0]: path for path in (folder / "runs").iterdir() if path.is_dir()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `defense=namid` has trained itself and its stages."""
    folder = tmp_path_factory.mktemp("namid")
    done = run(folder, *NAMID)
    assert done.code == 0, done.err
    return folder


def copied(trained: Path, to: Path) -> Path:
    shutil.copytree(trained, to, dirs_exist_ok=True)
    return to


def test_stages_are_runs_beside_the_run(trained: Path) -> None:
    made = folders(trained)
    assert set(made) == {"standard_at", "mi_estimators", "namid"}
    assert all((path / "trained.json").is_file() for path in made.values())
    stage_two, namid = (weights(made[name] / "last.ckpt") for name in ("mi_estimators", "namid"))
    for estimator in ("natural", "adversarial"):  # frozen, and in the checkpoint
        own = {name: v for name, v in stage_two.items() if name.startswith(f"{estimator}.")}
        assert own
        assert all(torch.equal(namid[f"regularizers.namid.{name}"], v) for name, v in own.items())
    reference = weights(made["standard_at"] / "last.ckpt")
    assert all(torch.equal(stage_two[name], v) for name, v in reference.items() if name.startswith("net."))
    net = io.load(made["namid"] / "last.ckpt")
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_another_run_and_a_finished_one_train_no_stage_again(trained: Path, tmp_path: Path) -> None:
    here = copied(trained, tmp_path)
    before = {name: (path / "last.ckpt").stat().st_mtime_ns for name, path in folders(here).items()}
    again = run(here, *NAMID)
    assert again.code == 0, again.err
    other = run(here, *NAMID, "defense.alpha=1")
    assert other.code == 0, other.err
    assert "Trained before" not in again.out + other.out
    after = folders(here)
    assert [(after[name] / "last.ckpt").stat().st_mtime_ns for name in before if name != "namid"] == [
        before[name] for name in before if name != "namid"
    ]
    shutil.rmtree(after["standard_at"])
    shutil.rmtree(after["mi_estimators"])
    assert run(here, *NAMID).code == 0  # a finished run needs none


def test_by_hand_and_from_a_file_it_is_the_same(trained: Path, tmp_path: Path) -> None:
    """Each stage by its own command: the same folders, and the same bits in the end."""
    (tmp_path / "runs").mkdir()
    for overrides in (("defense=standard_at",), ("defense=mi_estimators", "defense.hsize=8")):
        done = run(tmp_path, *overrides)
        assert done.code == 0, done.err
        assert "Trained before" not in done.out
    made = folders(tmp_path)
    assert {path.name for path in made.values()} <= {path.name for path in folders(trained).values()}
    moved = tmp_path / "elsewhere.ckpt"
    shutil.copy(made["mi_estimators"] / "last.ckpt", moved)
    for path in (made["mi_estimators"] / "last.ckpt", moved):
        done = run(tmp_path, *NAMID, f"defense.estimators={path}")
        assert done.code == 0, done.err
    first = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith("namid-")]
    assert len(first) == 1  # where the file lies is no part of the run's name
    assert_same_weights(first[0] / "last.ckpt", folders(trained)["namid"] / "last.ckpt")


def test_the_regularizer_uses_the_same_stages(trained: Path, tmp_path: Path) -> None:
    here = copied(trained, tmp_path)
    added = ("regularizer=namid", "regularizer.namid.hsize=8")
    for defense in ("standard_at", "trades"):
        done = run(here, f"defense={defense}", *added)
        assert done.code == 0, done.err
        assert "Trained before" not in done.out
    made = folders(here)
    assert_same_weights(made["standard_at+namid"] / "last.ckpt", made["namid"] / "last.ckpt")


def test_without_weight_no_stage_is_needed(tmp_path: Path) -> None:
    done = run(tmp_path, "defense=namid", "defense.alpha=0")
    assert done.code == 0, done.err
    assert set(folders(tmp_path)) == {"namid"}
    assert run(tmp_path, "defense=standard_at").code == 0
    made = folders(tmp_path)
    found, expected = (io.read_checkpoint(made[name] / "last.ckpt") for name in ("namid", "standard_at"))
    assert all(torch.equal(found.net_state[name], value) for name, value in expected.net_state.items())


@pytest.mark.parametrize("method", ["namid", "wmim"])
def test_killed_and_resumed_it_ends_with_the_same_bits(method: str, trained: Path, tmp_path: Path) -> None:
    here = copied(trained, tmp_path)
    overrides = [
        *({"namid": NAMID, "wmim": ("regularizer=wmim", "regularizer.wmim.hsize=8")}[method]),
        "save_every_n_steps=1",
        "seed=0",
        "run_dir=run",
        "+callback.interrupt._target_=tests.own.Interrupt",
    ]
    whole = run(here, *overrides)
    assert whole.code == 0, whole.err
    (here / "run").rename(here / "whole")
    killed = run(here, *overrides, INTERRUPT="KILL:train_batch_end:5")
    assert killed.code == 128 + 9
    for stage in ("standard_at", "mi_estimators"):  # no other file is needed
        if stage in folders(here):
            shutil.rmtree(folders(here)[stage])
    resumed = run(here, *overrides, "resume=true")
    assert resumed.code == 0, resumed.err
    assert_same_weights(here / "run" / "last.ckpt", here / "whole" / "last.ckpt")
    states = [torch.load(here / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("run", "whole")]
    for name, value in states[1].items():
        if name.endswith("adam._extra_state"):
            assert value["steps"] == states[0][name]["steps"] == 6
            for number, moments in value["adam"]["state"].items():
                for key, moment in moments.items():
                    assert torch.equal(moment, states[0][name]["adam"]["state"][number][key])


def test_on_several_processes_missing_stages_are_named(tmp_path: Path) -> None:
    done = run(tmp_path, *NAMID, "trainer=ddp", "trainer.accelerator=cpu", "attack.steps=3", "seed=4")
    assert done.code == 1
    assert "standard_at-digits-cnn_tiny-s4 must be trained before" in done.err
    commands = [line.strip() for line in done.err.splitlines() if line.strip().startswith("python -m mi_at.train")]
    assert len(commands) == 2
    assert not (tmp_path / "runs").exists() or not folders(tmp_path)
    for line in commands:
        words = shlex.split(line)[3:]
        done = command(tmp_path, *words, "trainer.enable_progress_bar=false")
        assert done.code == 0, done.err
        assert "Trained before" not in done.out
    alone = run(tmp_path, *NAMID, "attack.steps=3", "seed=4")
    assert alone.code == 0, alone.err
    assert "Trained before" not in alone.out


# ---------------------------------------------------------------- what is refused, without training anything
def never(config: Mapping[str, Any]) -> None:
    raise AssertionError(f"nothing should be trained: {config['choices']}")


def assembled(compose: Compose, trained: Path, *overrides: str) -> tuple[dict[str, Any], Defense, Any, dict[str, Path]]:
    """A run up to where its stages are asked for."""
    overrides = (*tiny(*overrides), f"runs={trained / 'runs'}")
    config, files = stages.resolve(io.resolve(compose(overrides)), never)
    torch.manual_seed(0)
    defense = io.build_defense(config, io.build_net(config["model"]))
    data = io.build_data(config["dataset"])
    data.setup("fit")
    return config, defense, data, files


def equip(compose: Compose, trained: Path, *overrides: str) -> Defense:
    config, defense, data, files = assembled(compose, trained, *overrides)
    stages.equip(config, defense, data, files, never)
    return defense


def stage_two(trained: Path) -> Path:
    return folders(trained)["mi_estimators"] / "last.ckpt"


def test_estimators_are_found_and_taken(compose: Compose, trained: Path) -> None:
    defense = equip(compose, trained, *NAMID)
    term = defense.added_terms()["namid"]
    assert isinstance(term, Namid)
    assert term.trained
    saved = weights(stage_two(trained))
    assert all(
        torch.equal(v, saved[f"natural.{n}"]) for n, v in term.natural.state_dict().items() if n != "_extra_state"
    )


def test_stages_draw_nothing_from_the_runs_random_state(compose: Compose, trained: Path) -> None:
    config, defense, data, files = assembled(compose, trained, *NAMID)
    before = torch.get_rng_state()
    stages.equip(config, defense, data, files, never)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_is_named_by_its_weights(compose: Compose, trained: Path, tmp_path: Path) -> None:
    moved = shutil.copy(stage_two(trained), tmp_path / "other.ckpt")
    named = []
    for path in (stage_two(trained), moved):
        config, files = stages.resolve(io.resolve(compose(tiny(*NAMID, f"defense.estimators={path}"))), never)
        named.append(config["defense"]["estimators"])
        assert files == {"defense.estimators": Path(path)}
    assert named[0] == named[1]
    assert re.fullmatch(r"sha256:[0-9a-f]{12}", named[0])


def test_the_estimators_schedule_is_their_own(compose: Compose, trained: Path) -> None:
    base = tiny("defense=mi_estimators", "defense.reference=auto", "defense.hsize=8", "optim.lr=0.05")
    config, files = stages.resolve(io.resolve(compose([*base, f"runs={trained / 'runs'}"])), never)
    assert (config["optim"]["_target_"], config["optim"]["lr"]) == ("mi_at.optim.Adam", 0.01)
    assert config["trainer"]["max_epochs"] == config["optim"]["epochs"] == 2
    assert config["dataset"]["batch_size"] == 50
    assert files["defense.reference"] == folders(trained)["standard_at"] / "last.ckpt"
    optimisation = io.build("optim", {**config["optim"], "epochs": 25})
    assert [optimisation.scaled(epoch) for epoch in optimisation.milestones] == [10, 20]


MISFITS: dict[str, tuple[tuple[str, ...], str]] = {
    "width": (("defense.hsize=16",), r"trained for hsize=8 instead of 16; train them for this run \(estimators=auto\)"),
    "architecture": (
        ("model.width=0.5",),
        r"estimators of model.width=0.25, but this run has 0.5: train the stage for",
    ),
    "norm": (
        ("attack.norm=l2", "attack.eps=1"),
        r"estimators of attack.norm=linf, but this run has l2: train the stage",
    ),
}


@pytest.mark.parametrize("what", ["width", "architecture", "norm"])
def test_estimators_that_do_not_fit_are_refused(what: str, compose: Compose, trained: Path) -> None:
    overrides, message = MISFITS[what]
    with pytest.raises(stages.StageError, match=rf"defense\.estimators=.*last\.ckpt: .*{message}"):
        equip(
            compose, trained, "defense=namid", "defense.hsize=8", f"defense.estimators={stage_two(trained)}", *overrides
        )


def test_estimators_of_another_architecture_where_they_are_allowed(compose: Compose, trained: Path) -> None:
    file = f"defense.estimators={stage_two(trained)}"
    equip(compose, trained, *NAMID, file, "model.width=0.5", "defense.any_reference=true")
    with pytest.raises(stages.StageError, match=r"estimators of model\.width=0\.25"):  # it is to select
        equip(
            compose,
            trained,
            *NAMID,
            file,
            "model.width=0.5",
            "defense.any_reference=true",
            "defense.selection=reference",
        )


def test_estimators_of_other_data_are_refused(compose: Compose, trained: Path) -> None:
    config, defense, data, files = assembled(compose, trained, *NAMID, f"defense.estimators={stage_two(trained)}")
    config["dataset"]["name"] = "mnist"
    with pytest.raises(stages.StageError, match=r"estimators of dataset=digits, but this run has mnist"):
        stages.equip(config, defense, data, files, never)


def test_estimators_of_another_eps_are_told(
    compose: Compose, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"defense.estimators={stage_two(trained)}"
    for same in ((), ("attack.eps=15/100",)):
        equip(compose, trained, *NAMID, file, *same)
    assert "attack.eps" not in capsys.readouterr().out
    equip(compose, trained, *NAMID, file, "attack.eps=0.125")
    assert re.search(
        r"warning: defense\.estimators=.*: estimators of attack\.eps=0\.\d+, but this run has 0\.125\n",
        capsys.readouterr().out,
    )


def test_a_checkpoint_of_something_else_is_refused(compose: Compose, trained: Path) -> None:
    other = folders(trained)["standard_at"] / "last.ckpt"
    with pytest.raises(stages.StageError, match=r"a checkpoint of mi_at\.defenses\.standard_at\.StandardAT; expected"):
        equip(compose, trained, *NAMID, f"defense.estimators={other}")
    with pytest.raises(FileNotFoundError, match=r"^defense.estimators: checkpoint none\.ckpt does not .*=auto"):
        equip(compose, trained, *NAMID, "defense.estimators=none.ckpt")
    with pytest.raises(
        stages.StageError, match=r"estimators=sha256:0123 names weights, but a new run needs their file"
    ):
        equip(compose, trained, *NAMID, "defense.estimators='sha256:0123'")


def test_a_reference_of_another_architecture_is_refused(compose: Compose, trained: Path) -> None:
    reference = folders(trained)["standard_at"] / "last.ckpt"
    base = ("defense=mi_estimators", "defense.hsize=8", f"defense.reference={reference}")
    defense = equip(compose, trained, *base)
    assert torch.equal(defense.net.head.weight, weights(reference)["net.head.weight"])  # type: ignore[union-attr,arg-type]
    assert not any(p.requires_grad for p in defense.net.parameters())
    with pytest.raises(
        stages.StageError, match=r"defense\.reference=.*: network of model\.width=0\.25, but this run has"
    ):
        equip(compose, trained, *base, "model.width=0.5")


def test_estimators_that_have_learnt_nothing_are_refused(
    compose: Compose, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = torch.load(stage_two(trained), weights_only=True)
    for name in ("natural.whole.norm.weight", "natural.whole.norm.bias"):
        saved["state_dict"][name] *= 50  # so sure of itself that every other image of the class is a surprise
    path = tmp_path / "bad.ckpt"
    torch.save(saved, path)
    base = (*NAMID, f"defense.estimators={path}")
    with pytest.raises(
        stages.StageError, match=r"in 20 training images is -.* nats, and information is positive: they"
    ):
        equip(compose, trained, *base, "budget=paper", "dataset.train_size=60")
    capsys.readouterr()
    equip(compose, trained, *base)  # at budget=smoke it is only said
    assert "warning: defense.estimators=" in capsys.readouterr().out


def test_a_damaged_stage_is_trained_again(compose: Compose, trained: Path, tmp_path: Path) -> None:
    """A folder without trained.json is not finished: it is continued."""
    here = copied(trained, tmp_path)
    (folders(here)["mi_estimators"] / "trained.json").unlink()
    config, defense, data, files = assembled(compose, here, *NAMID)
    asked: list[str] = []

    def finish(stage: Mapping[str, Any]) -> None:
        asked.append(stage["choices"]["defense"])
        named, _ = stages.resolve(stage, never)
        found = find_run(named, key="mi_estimators-digits-cnn_tiny-s0", parent=here / "runs", resume=True)
        assert found.state == "resumed"
        write_json(found.folder / "trained.json", {})

    stages.equip(config, defense, data, files, finish)
    assert asked == ["mi_estimators"]
    (folders(here)["mi_estimators"] / "trained.json").unlink()
    with pytest.raises(stages.StageError, match="was stopped: start again to continue it"):
        stages.equip(config, defense, data, files, lambda stage: None)


# ---------------------------------------------------------------- the surrogate of transfer attacks
SURROGATE = "evaluation.surrogate={defense:ce,model:cnn_tiny,model.width:0.25}"
TRANSFER = (
    "evaluation=chosen",
    "evaluation/attacks=[transfer_fgsm]",
    SURROGATE,
)


@pytest.fixture(scope="module")
def transferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run has trained its surrogate."""
    folder = tmp_path_factory.mktemp("surrogate")
    done = run(folder, "defense=standard_at", *TRANSFER)
    assert done.code == 0, done.err
    assert done.out.count("Trained before, once: ce-digits-cnn_tiny-s0") == 1
    return folder


def test_a_surrogate_is_a_run_of_its_own_and_is_in_the_record(transferred: Path) -> None:
    made = folders(transferred)
    assert set(made) == {"ce", "standard_at"}
    record, own = (read_record(made[name] / "record.json") for name in ("standard_at", "ce"))
    said = {"defense": "ce", "model": "cnn_tiny", "model.width": 0.25, "run": made["ce"].name}
    assert record.config["evaluation"]["surrogate"] == said
    found = record["transfer_fgsm"].description["surrogate"]
    assert found == {"name": "ce-digits-cnn_tiny", "clean_accuracy": own["clean"].accuracy}


def test_a_surrogate_is_found_again_by_any_run_seed_or_command(transferred: Path, tmp_path: Path) -> None:
    here = copied(transferred, tmp_path)
    before = (folders(here)["ce"] / "last.ckpt").stat().st_mtime_ns
    other = run(here, "defense=mart", "seed=1", *TRANSFER)
    assert other.code == 0, other.err
    assert "Trained before" not in other.out
    by_hand = command(
        here, "defense=ce", "model=cnn_tiny", "model.width=0.25", "budget=smoke", "evaluation=none", "trainer.devices=1"
    )
    assert "(finished)" in by_hand.out
    assert (folders(here)["ce"] / "last.ckpt").stat().st_mtime_ns == before


def test_what_a_surrogate_is_changes_the_evaluation_and_not_the_training(compose: Compose, transferred: Path) -> None:
    def named(*overrides: str) -> dict[str, Any]:
        base = (*tiny("defense=standard_at", *TRANSFER), f"runs={transferred / 'runs'}")
        return stages.resolve(io.resolve(compose([*base, *overrides])), never)[0]

    first, other = named(), named("+evaluation.surrogate.optim={lr:0.01}")
    assert other["evaluation"]["surrogate"]["run"] != first["evaluation"]["surrogate"]["run"]
    assert config_hash(first) != config_hash(other)
    assert config_hash(first, without=NOT_TRAINING) == config_hash(other, without=NOT_TRAINING)
    assert stages.identify_surrogate(first)[0] == first  # once named it stays so
    assert named("seed=3")["evaluation"] == first["evaluation"]
    path = folders(transferred)["ce"] / "last.ckpt"
    config, files = stages.identify_surrogate({**first, "evaluation": {"surrogate": str(path)}})
    assert files == {"evaluation.surrogate": path}
    assert re.fullmatch(r"sha256:[0-9a-f]{12}", config["evaluation"]["surrogate"])


def test_a_surrogate_that_cannot_be_is_refused_before_anything_runs(compose: Compose, tmp_path: Path) -> None:
    def asked(surrogate: str) -> dict[str, Any]:
        base = [o for o in tiny("defense=standard_at", *TRANSFER) if o != SURROGATE]
        return io.resolve(compose([*base, f"evaluation.surrogate={surrogate}", f"runs={tmp_path / 'runs'}"]))

    with pytest.raises(ValueError, match=r"evaluation\.surrogate: defense=cee: expected one of .* did you mean ce\?"):
        stages.resolve(asked("{defense:cee}"), never)
    with pytest.raises(ValueError, match=r"evaluation\.surrogate: unknown key defense\.beta"):
        stages.resolve(asked("{defense:ce,defense.beta:1}"), never)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        stages.resolve(asked("none.ckpt"), never)
    config, files = stages.resolve(asked("{defense:ce,model:cnn_tiny}"), never)
    with pytest.raises(stages.StageError, match=r"ce-digits-cnn_tiny-s0 is not in .*: python -m mi_at\.train dataset="):
        stages.surrogate_file(config, files, train=None)
    config["trainer"] |= {"accelerator": "cpu", "devices": 2}
    with pytest.raises(stages.StageError, match=r"(?s)must be trained before, .*python -m mi_at\.train .*defense=ce"):
        stages.surrogate_file(config, files, train=never)
    assert not (tmp_path / "runs").exists()
