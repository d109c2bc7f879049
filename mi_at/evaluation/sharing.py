"""Several processes for one evaluation: each computes the pieces that no other one is at."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi_at.evaluation.outcomes import EvaluationError
from mi_at.evaluation.pieces import Pieces
from mi_at.evaluation.progress import Progress
from mi_at.evaluation.running import Plan, Runner, prepared


@contextmanager
def helpers(net: nn.Module, plan: Plan, device: torch.device, folder: Path, processes: int) -> Iterator[None]:
    """Have processes - 1 others work on a plan while the block does.

    On CPUs the threads are divided among the processes; of GPUs each process takes one, in turn.

    Args:
        net: as it is evaluated; it is copied to the others.
        plan: what to do.
        device: of this process.
        folder: of the pieces.
        processes: this one among them.

    Raises:
        EvaluationError: the network or an attack cannot be sent to another process.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // processes)
    started: list[Any] = []
    context = torch.multiprocessing.get_context("spawn")
    try:
        for rank in range(1, processes):
            arguments = (net, plan, _device_of(device, rank), folder, share)
            worker = context.Process(target=_work, args=arguments, daemon=True, name=f"evaluation-{rank}")
            try:
                worker.start()
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise EvaluationError(
                    f"processes={processes}: the network or an attack cannot be sent to another process ({error}); "
                    "define its class at the top of a module, or use processes=1"
                ) from error
            started.append(worker)
        if device.type == "cpu":
            torch.set_num_threads(share)
        yield
        for worker in started:
            worker.join()
    finally:
        torch.set_num_threads(threads)
        for worker in started:
            worker.terminate()
            worker.join()


def _device_of(device: torch.device, rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    first = device.index or 0
    return torch.device("cuda", (first + rank) % torch.cuda.device_count())


def _work(net: nn.Module, plan: Plan, device: torch.device, folder: Path, threads: int) -> None:
    """What another process does; what it fails at is left to the first one, which then fails itself and says why."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        net.to(device)
        with prepared(net, plan.seed), Progress(dict.fromkeys(plan.attacks, 1.0), enabled=False) as bar:
            Runner(net, plan, device, Pieces(folder), bar).run_free()
    except Exception as error:
        print(f"evaluation: a helping process ended: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children: they watch it."""
    parent: Any = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
