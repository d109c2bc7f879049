"""Launchers: the same cells give the same records, one that fails stops no other, and what is missing is named."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.mi_at_launcher.ray import RayLauncher
from mi_at import io
from mi_at.results.records import config_hash
from tests.commands import TINY, command
from tests.conftest import REPO
from tests.own_table import search, write_table
from tests.sweeps import DEFENSES, eight_cells, records, started

NO_RAY = "Ray is an extra of its own: pip install 'mi_at[ray]'"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason=NO_RAY)
INTERRUPT = "+callback.interrupt._target_=tests.own.Interrupt"
LOCAL_RAY = ("launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")
LAUNCHERS = [
    pytest.param(("launcher=joblib", "hydra.launcher.n_jobs=2"), id="joblib"),
    pytest.param(("launcher=submitit_local",), id="submitit_local"),
    pytest.param(("launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.partition=long"), id="slurm"),
    pytest.param(LOCAL_RAY, id="ray", marks=needs_ray),
]

# The commands of Slurm that submitit calls, on this machine: each task of the array is a process in the background.
SLURM = """
    #!/bin/bash
    here=$(dirname "$0")
    task() {
      export SLURM_JOB_ID=$((100 + $1)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$1 SLURM_NTASKS=1 SLURM_NNODES=1
      export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NAME=mi_at
      setsid bash "$here/script" >>"$here/log" 2>&1 </dev/null &
    }
    case $(basename "$0") in
    sbatch)
      cp "$1" "$here/script"
      last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
      for number in $(seq 0 "$last"); do task "$number"; done
      echo "Submitted batch job 7" ;;
    srun)
      while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
      exec "$@" ;;
    scontrol)
      echo "$*" >>"$here/requeued"
      task "${2#7_}" ;;
    sacct)
      echo "JobID|State|NodeList" ;;
    esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Slurm's commands, on the path."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "slurm").write_text(textwrap.dedent(SLURM).lstrip())
    (folder / "slurm").chmod(0o755)
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (folder / name).symlink_to("slurm")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep in one process."""
    folder = tmp_path_factory.mktemp("one_by_one")
    done = command(folder, *eight_cells(folder))
    assert done.code == 0, done.err
    return folder


# ---------------------------------------------------------------- the same records
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_makes_the_same_eight_records(
    launcher: tuple[str, ...], one_by_one: Path, slurm: Path, tmp_path: Path
) -> None:
    done = started(tmp_path, *eight_cells(tmp_path), *launcher)
    assert done.code == 0, done.out + done.err
    expected = records(one_by_one)
    assert len(expected) == len(DEFENSES)
    assert records(tmp_path) == expected
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/record.json")}
    again = started(tmp_path, *eight_cells(tmp_path), "table.rows=[ce,trades]", *launcher)
    assert again.code == 0, again.out + again.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/record.json")} == times


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cell_that_fails_stops_no_other_and_is_named(launcher: tuple[str, ...], slurm: Path, tmp_path: Path) -> None:
    cells = {
        "negative": ["defense=trades", "defense.beta=-1"],
        "broken": ["defense=ce", "+callback.broken._target_=tests.own.Broken"],
        "plain": ["defense=ce"],
    }
    write_table(tmp_path, cells=cells, seeds=[0])
    done = started(tmp_path, "-m", search(tmp_path), "table=own", *TINY, *launcher)
    assert done.code == 1
    assert [name.split("-")[0] for name in records(tmp_path)] == ["ce"]
    summary = done.err[done.err.index("2 of 3 runs of table own failed:") :]
    assert "  negative seed=0: defense.beta=-1" in summary
    assert "  broken seed=0: RuntimeError: broken on purpose" in summary
    left = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/multirun/*/*/error.txt")}
    assert {number: text.splitlines()[2] for number, text in left.items()}["1"] == "broken on purpose"
    assert sorted(left) == ["0", "1"]


@needs_ray
@pytest.mark.slow
def test_ray_starts_a_cluster_of_its_own_whatever_was_there_before(tmp_path: Path) -> None:
    write_table(tmp_path, cells={"plain": ["defense=ce"]}, seeds=[0])
    gone = {"RAY_ADDRESS": "127.0.0.1:1"}
    done = started(tmp_path, "-m", search(tmp_path), "table=own", *TINY, *LOCAL_RAY, **gone)
    assert done.code == 0, done.out + done.err


# ---------------------------------------------------------------- Slurm
@pytest.mark.slow
def test_the_script_for_slurm_asks_for_what_was_configured_and_starts_this_python(slurm: Path, tmp_path: Path) -> None:
    write_table(tmp_path, cells={"ce": ["defense=ce"], "at": ["defense=standard_at"]}, seeds=[0])
    options = ("gpus_per_node=1", "partition=long", "timeout_min=90", "mem_gb=16", "array_parallelism=5")
    typed = [f"hydra.launcher.{option}" for option in options]
    done = started(tmp_path, "-m", search(tmp_path), "table=own", *TINY, "launcher=slurm", *typed)
    assert done.code == 0, done.out + done.err
    script = (slurm / "script").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M))
    kept = ("array", "gpus-per-node", "partition", "time", "mem", "cpus-per-task", "nodes", "ntasks-per-node", "signal")
    assert {key: asked[key] for key in kept} == {
        "array": "0-1%2",
        "gpus-per-node": "1",
        "partition": "long",
        "time": "90",
        "mem": "16GB",
        "cpus-per-task": "4",
        "nodes": "1",
        "ntasks-per-node": "1",
        "signal": "USR2@180",
    }
    (line,) = (line for line in script.splitlines() if line.startswith("srun "))
    assert f"{shlex.quote(sys.executable)} -u -m submitit.core._submit" in line


@pytest.mark.slow
def test_a_slurm_job_at_its_time_limit_saves_goes_back_into_the_queue_and_continues(
    slurm: Path, tmp_path: Path
) -> None:
    cells = {"trades": ["defense=trades"], "ce": ["defense=ce"]}
    write_table(tmp_path, cells=cells, seeds=[0])
    # At step 4 of 6 each job gets what Slurm sends 180 s before its time is over.
    typed = ["-m", search(tmp_path), "table=own", *TINY, "launcher=slurm", INTERRUPT]
    done = started(tmp_path, *typed, INTERRUPT="USR2:train_batch_end:4")
    assert done.code == 0, done.out + done.err
    assert sorted((slurm / "requeued").read_text().split("\n")) == ["", "requeue 7_0", "requeue 7_1"]
    logs = (slurm / "log").read_text()
    assert logs.count("preempted: saved ") == 2
    assert logs.count("(resumed)") == 2
    assert len(records(tmp_path)) == 2


# ---------------------------------------------------------------- configuration
@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "conf/launcher").glob("*.yaml")))
def test_every_launcher_composes_and_leaves_a_run_what_it_is(name: str, compose: Callable[..., Any]) -> None:
    plain, launched = (io.resolve(compose([f"launcher={each}"])) for each in ("basic", name))
    assert launched["choices"] == plain["choices"]
    assert config_hash(launched) == config_hash(plain)
    assert launched["trainer"]["enable_progress_bar"] is (name == "basic")


# ---------------------------------------------------------------- bad input
def test_an_unknown_launcher_names_those_there_are(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "launcher=jobli", "seed=0,1", *TINY)
    assert done.code == 1
    known = "basic, joblib, ray, slurm, submitit_local"
    assert f"launcher=jobli: expected one of {known}; did you mean joblib?" in done.err
    done = command(tmp_path, "-m", "hydra/launcher=jobli", "seed=0,1", *TINY)
    assert done.code == 1
    assert f"hydra/launcher=jobli: expected launcher= and one of {known}; did you mean joblib?" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("joblib", "hydra_joblib_launcher"),
        ("slurm", "hydra_submitit_launcher"),
        ("submitit_local", "hydra_submitit_launcher"),
    ],
)
def test_a_launcher_that_is_not_installed_says_what_to_install(launcher: str, package: str, tmp_path: Path) -> None:
    # An empty package of its name comes first on the path of the command, which is the folder it runs in.
    (tmp_path / "hydra_plugins" / package).mkdir(parents=True)
    (tmp_path / "hydra_plugins" / package / "__init__.py").touch()
    done = started(tmp_path, "-m", f"launcher={launcher}", "seed=0,1", *TINY)  # where no plugin is found already
    assert done.code == 1
    assert f"launcher={launcher}: its plugin is not installed: pip install 'mi_at[launchers]'" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


def test_without_ray_its_launcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    launcher = RayLauncher(ray={"init": {}, "remote": {}})
    with pytest.raises(ValueError, match=r"launcher=ray: Ray is not installed: pip install 'mi_at\[ray\]'"):
        launcher.setup(hydra_context=None, task_function=None, config=None)  # type: ignore[arg-type]


def test_slurm_where_there_is_none_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "launcher=slurm", "seed=0,1", *TINY, PATH=str(tmp_path))
    assert done.code == 1
    assert 'error: launcher=slurm: Could not detect "srun"' in done.err
    assert "this machine has no Slurm: launcher=joblib runs here" in done.err
    assert "Traceback" not in done.err
    done = command(tmp_path, "-m", "launcher=slurm", "table=mimae_t8", "budget=smoke", PATH=str(tmp_path))
    assert "this machine has no Slurm: launcher=joblib runs here" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("typed", ["launcher=joblib", "sweep=optuna"])
def test_what_only_a_multirun_heeds_is_refused_without_m(typed: str, tmp_path: Path) -> None:
    done = command(tmp_path, typed, *TINY)
    assert done.code == 1
    assert f"{typed} is for many runs: give -m too, python -m mi_at.train -m {typed}" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_ends_joblib_with_one_sentence_and_the_same_command_runs_the_rest(tmp_path: Path) -> None:
    write_table(tmp_path, cells={"ce": ["defense=ce"], "at": ["defense=standard_at"]}, seeds=[0])
    typed = ["-m", search(tmp_path), "table=own", *TINY, "launcher=joblib", "hydra.launcher.n_jobs=2", INTERRUPT]
    killed = started(tmp_path, *typed, INTERRUPT="KILL:train_batch_end:4")
    assert killed.code == 1
    assert "error: JoblibLauncher has given up (TerminatedWorkerError: " in killed.err
    assert "what is finished is kept, the same command runs the rest" in killed.err
    done = started(tmp_path, *typed)
    assert done.code == 0, done.err
    assert len(records(tmp_path)) == 2
