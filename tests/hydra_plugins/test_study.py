"""sweep=optuna, by its command: what is proposed, what a failed trial does, and what is refused."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.mi_at_sweeper.study import StudySweeper, distribution, score
from tests.commands import TINY, Done, command

SEARCH = ("-m", "sweep=optuna", "hydra.sweep.dir=study", "defense=mimae", *TINY, "evaluation=none")


def study(folder: Path, *typed: str) -> Done:
    return command(folder, *SEARCH, *typed)


def trials(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "study/study.json").read_text()))


def records(folder: Path) -> dict[float, tuple[dict[str, Any], int]]:
    """Record and its time, by lambda_mi."""
    paths = list((folder / "runs").glob("*/record.json"))
    found = [(json.loads(path.read_text()), path.stat().st_mtime_ns) for path in paths]
    return {record["config"]["defense"]["lambda_mi"]: (record, when) for record, when in found}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Five trials, of which those below 0 fail."""
    folder = tmp_path_factory.mktemp("searched")
    # Enough of a training that the trials differ.
    typed = ("defense.lambda_mi=interval(-1.5,1)", "hydra.sweeper.n_trials=5", "optim.lr=0.2", "dataset.train_size=200")
    return folder, study(folder, *typed)


def test_a_failed_trial_ends_nothing_and_each_other_has_the_score_of_its_run(searched: tuple[Path, Done]) -> None:
    folder, done = searched
    assert done.code == 0, done.err
    found = trials(folder)
    assert len(found) == 5
    assert {trial["state"] for trial in found} == {"complete", "fail"}, "the interval holds both kinds"
    made = records(folder)
    for trial in found:
        value = trial["params"]["defense.lambda_mi"]
        assert -1.5 <= value <= 1
        if value < 0:
            assert trial["state"] == "fail"
            assert f"trial {trial['number']}: defense.lambda_mi={value}: failed: defense.lambda_mi={value}" in done.err
        else:
            assert trial["value"] == made[value][0]["training"]["validation"]
    assert len(made) == sum(trial["state"] == "complete" for trial in found)


def test_the_best_is_the_highest_and_its_command_is_printed(searched: tuple[Path, Done]) -> None:
    folder, done = searched
    best = max((trial for trial in trials(folder) if trial["value"] is not None), key=lambda trial: trial["value"])
    *_, said, line = done.out.strip().splitlines()
    assert said.startswith("best of 5 trials, ")
    assert said.endswith(f" failed: {best['value']:.2f} % robust on validation")
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "mi_at.train"]
    assert f"defense.lambda_mi={best['params']['defense.lambda_mi']}" in words
    assert not [word for word in words if word.startswith(("sweep=", "launcher="))]


def test_the_same_command_again_proposes_the_same_and_runs_nothing_twice(searched: tuple[Path, Done]) -> None:
    folder, _ = searched
    before, made = trials(folder), records(folder)
    typed = ("defense.lambda_mi=interval(-1.5,1)", "hydra.sweeper.n_trials=5", "optim.lr=0.2", "dataset.train_size=200")
    assert study(folder, *typed).code == 0
    assert trials(folder) == before
    assert records(folder) == made


def test_proposals_follow_the_scores() -> None:
    """As the sweeper asks and tells: with a peak at 0.3 the later proposals lie nearer to it than the first."""
    sweeper = StudySweeper(n_trials=40, n_jobs=1, sampler="tpe", seed=0)
    study = optuna.create_study(direction="maximize", sampler=sweeper._sampler())
    space = {"x": distribution(OverridesParser.create().parse_override("x=interval(0,1)"))}
    far = []
    for _ in range(40):
        trial = study.ask(space)
        far.append(abs(trial.params["x"] - 0.3))
        study.tell(trial, 100 - 100 * far[-1])
    assert sum(far[-15:]) < 0.7 * sum(far[:15])


# ---------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a=interval(0.05,1)", FloatDistribution(0.05, 1.0)),
        ("a=interval(1,10)", FloatDistribution(1.0, 10.0)),
        ("a=int(interval(1,10))", IntDistribution(1, 10)),
        ("a=tag(log,interval(1e-4,1))", FloatDistribution(1e-4, 1.0, log=True)),
        ("a=range(1,10,2)", IntDistribution(1, 9, step=2)),
        ("a=range(0.5,1,0.25)", CategoricalDistribution(["0.5", "0.75"])),
        ("a=8/255,4/255", CategoricalDistribution(["8/255", "4/255"])),
        ("a=choice(x,3)", CategoricalDistribution(["x", "3"])),
    ],
)
def test_what_is_typed_is_what_is_searched(typed: str, expected: Any) -> None:
    assert distribution(OverridesParser.create().parse_override(typed)) == expected


@pytest.mark.parametrize("typed", ["a=interval(1,1)", "a=interval(2,1)", "a=tag(log,interval(0,1))"])
def test_an_empty_interval_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match=r"expected interval\(low,high\) with low < high, above 0 with log"):
        distribution(OverridesParser.create().parse_override(typed))


@pytest.mark.parametrize(("value", "expected"), [(41.5, 41.5), (None, None), (float("nan"), None)])
def test_a_run_without_a_number_is_a_failed_trial(value: float | None, expected: float | None) -> None:
    found, problem = score(JobReturn(status=JobStatus.COMPLETED, _return_value=value))
    assert found == expected
    assert (problem == "") == (expected is not None)


# ---------------------------------------------------------------- bad input
REFUSED = {
    (): "sweep=optuna has nothing to search: give a value as 'defense.lambda_mi=interval(0.05,1)'",
    ("seed=0,1,2",): "sweep=optuna over seed would choose the luckiest one: give a single seed",
    ("defense.lambda_mi=interval(1,0)",): "expected interval(low,high) with low < high",
    ("defense.lambda_mi=interval(0,1)", "dataset.val_size=0"): "there is none: dataset.val_size=",
    ("defense.lamda_mi=interval(0,1)",): "lamda_mi",
    ("defense.lambda_mi=interval(0,1)", "table=mimae_t5"): "sweep=optuna beside table=mimae_t5: leave out one of them",
    ("defense.lambda_mi=interval(0,1)", "hydra.sweeper.n_trials=0"): "hydra.sweeper.n_trials=0: expected 1 or more",
    ("defense.lambda_mi=interval(0,1)", "hydra.sweeper.sampler=tp"): "sampler=tp: expected one of tpe, random, qmc",
}


@pytest.mark.parametrize("typed", REFUSED, ids=lambda typed: " ".join(typed) or "nothing")
def test_what_cannot_be_searched_is_said_before_anything_runs(typed: tuple[str, ...], tmp_path: Path) -> None:
    done = study(tmp_path, *typed)
    assert done.code == 1
    assert REFUSED[typed] in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


def test_an_interval_without_a_study_says_what_is_missing(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "defense=mimae", "defense.lambda_mi=interval(0,1)", *TINY)
    assert done.code == 1
    assert "interval() is for a search: give sweep=optuna too" in done.err


def test_a_study_of_failures_only_ends_with_status_1(tmp_path: Path) -> None:
    done = study(tmp_path, "defense.lambda_mi=interval(-2,-1)", "hydra.sweeper.n_trials=2")
    assert done.code == 1
    assert "error: none of 2 trials has ended well" in done.err


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    sweeper = StudySweeper(n_trials=1, n_jobs=1, sampler="tpe", seed=0)
    with pytest.raises(ValueError, match=r"sweep=optuna: Optuna is not installed: pip install 'mi_at\[launchers\]'"):
        sweeper.setup(hydra_context=None, task_function=None, config=None)  # type: ignore[arg-type]
