"""One run on two machines ends where it ends on one: here two groups of processes that share nothing but the folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mi_at import io
from mi_at.train import first_process
from tests.commands import command

SETTINGS = (
    "budget=smoke",
    "model.width=0.5",
    "dataset.train_size=149",  # batches of 53 and 43: uneven over two
    "dataset.batch_size=53",
    "attack.steps=3",
    "evaluation.n=5",
    "trainer.enable_progress_bar=false",
    "run_dir=run",
)
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2")


def free_port() -> str:
    """Below those that the system gives to connections: none of another test takes it before the run listens."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return str(port)


def by_hand(node: int, port: str) -> tuple[list[str], dict[str, str]]:
    return ["-m", "mi_at.train"], {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def by_torchrun(node: int, port: str) -> tuple[list[str], dict[str, str]]:
    options = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    return ["-m", "torch.distributed.run", *options, f"--master-port={port}", "-m", "mi_at.train"], {}


def by_srun(node: int, port: str) -> tuple[list[str], dict[str, str]]:
    tasks = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "run", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    return ["-m", "mi_at.train"], {**tasks, **job, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def on_two_machines(folder: Path, start: object, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    port = free_port()
    running = []
    for node in range(2):
        arguments, environment = start(node, port)  # type: ignore[operator]
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}
        line = [sys.executable, *arguments, *TWO, *SETTINGS, *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(line, cwd=folder, env=variables, text=True, **pipes))  # type: ignore[call-overload]
    with ThreadPoolExecutor() as both:  # the pipes of both are read at once
        return list(both.map(functools.partial(ended, running), running))


def ended(
    all_of_them: Sequence[subprocess.Popen[str]], process: subprocess.Popen[str]
) -> subprocess.CompletedProcess[str]:
    """What a process said; where it failed, the others, which would wait for it, are ended."""
    said = process.communicate(timeout=900)
    if process.returncode:
        for other in all_of_them:
            other.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("start", [by_hand, by_torchrun, by_srun])
def test_two_machines_end_where_one_does_and_write_one_record(start: object, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    started = on_two_machines(two, start)
    assert [done.returncode for done in started] == [0, 0], [done.stderr for done in started]
    alone = command(one, *SETTINGS)
    assert alone.code == 0, alone.err
    (record,), (expected,) = (list(folder.rglob("record.json")) for folder in (two, one))
    documents = [json.loads(path.read_text()) for path in (record, expected)]
    assert documents[0]["config_hash"] == documents[1]["config_hash"]
    for name in ("last.ckpt", "best.ckpt"):
        found, wanted = (io.read_checkpoint(folder / "run" / name) for folder in (two, one))
        assert (found.step, found.epoch) == (wanted.step, wanted.epoch)
        for key, value in wanted.net_state.items():
            torch.testing.assert_close(found.net_state[key], value, rtol=0, atol=1e-5)

    # Trained but not evaluated, then finished: the first machine does what is left, the second nothing.
    record.unlink()
    for state in ("trained", "finished"):
        before = record.stat().st_mtime_ns if record.is_file() else None
        ended = on_two_machines(two, start, "resume=true")
        assert [done.returncode for done in ended] == [0, 0], [done.stderr for done in ended]
        texts = [done.stdout for done in ended]
        assert [f"({state})" in text for text in texts] == [True, False]
        assert ["run folder:" in text for text in texts] == [state == "trained", False]
        assert before in (None, record.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "1", "LOCAL_RANK": "0"}, True),
    ],
    ids=str,
)
def test_the_first_process_of_all_machines(
    environment: Mapping[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert first_process() is expected
