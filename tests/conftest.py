"""What every test may use: one thread a process, real data, composed configurations, process groups."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]

# Set before torch is imported, and inherited by the commands that tests start from other folders.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
os.environ["WANDB_MODE"] = "offline"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.commands import FORKED  # noqa: E402

# Bits of a convolution depend on the number of threads; golden outputs are taken with one.
torch.set_num_threads(1)

# One file per set, in the layout torchvision reads.
DATA_FILES = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
}


# ---------------------------------------------------------------- real data
def _data_root() -> Path:
    """Where the package itself looks: MI_AT_DATA, or data/ in the checkout."""
    return Path(os.environ.get("MI_AT_DATA") or REPO / "data")


def _missing(names: tuple[str, ...]) -> list[str]:
    """Those of the data sets `names` (all of them if empty) that are not under the data root."""
    unknown = sorted(set(names) - set(DATA_FILES))
    if unknown:
        raise pytest.UsageError(f"realdata{names}: unknown {unknown}; known: {sorted(DATA_FILES)}")
    root = _data_root()
    return [name for name in names or DATA_FILES if not (root / DATA_FILES[name]).is_file()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect a test marked realdata whose sets are not there."""
    absent = []
    for item in items:
        names = tuple(name for mark in item.iter_markers("realdata") for name in mark.args)
        if item.get_closest_marker("realdata") and _missing(names):
            absent.append(item)
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]


def _data_report() -> str:
    missing = _missing(())
    if not missing:
        return "real data: mnist, cifar10 and cifar100 are there"
    where = "under MI_AT_DATA" if os.environ.get("MI_AT_DATA") else "in data/, and MI_AT_DATA is not set"
    return f"real data: no {', '.join(missing)} {where}; the realdata tests that need them are deselected"


def pytest_report_header() -> str:
    """Say at the top which data sets the tests will find."""
    return _data_report()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say it again at the end, where it is read."""
    if _missing(()):
        terminalreporter.write_line(_data_report())


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of MNIST/raw, cifar-10-batches-py and cifar-100-python; for tests marked realdata."""
    return _data_root()


# ---------------------------------------------------------------- configurations and runs
@pytest.fixture
def compose() -> Iterator[Callable[..., Any]]:
    """`compose(["defense=trades"], "train")`: configuration and HydraConfig as the entry point sees them."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from mi_at import io

    io.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):

        def composed(overrides: Sequence[str] = (), config_name: str = "train") -> Any:
            cfg = hydra_compose(config_name, overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return cfg

        yield composed
    HydraConfig.instance().cfg = None


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the working directory, so that a run leaves nothing in the checkout."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---------------------------------------------------------------- process groups
def _member(fn: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    """One process of a group: run fn, leave its result or its traceback in a file."""
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=world_size
        )
        torch.save(fn(rank, world_size, *args), folder / f"result_{rank}.part")
        (folder / f"result_{rank}.part").rename(folder / f"result_{rank}")
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
        sys.exit(1)


@pytest.fixture
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`spawn(fn, world_size, *args)`: `fn(rank, world_size, *args)` in a gloo group, its results by rank.

    `fn` is a module-level function (it travels by name), its result anything that torch.save takes. Starting
    a group costs seconds: let one call run all the cases of a test and return a dict of their results.
    """

    def spawned(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
        folder = tmp_path_factory.mktemp("group")
        members = [
            FORKED.Process(target=_member, args=(fn, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for member in members:
            member.start()
        try:
            _join(members, folder, timeout)
        finally:
            for member in members:
                member.kill()
                member.join()
        # weights_only=False: the files were written by this very test.
        return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world_size)]

    return spawned


def _join(members: list[Any], folder: Path, timeout: float) -> None:
    """Wait for all members; the first that fails ends the wait, for the others may hang in a collective."""
    deadline = time.monotonic() + timeout
    while any(member.is_alive() for member in members):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end within {timeout} s: is there a collective that not all ranks make?")
        if any(member.exitcode for member in members):
            time.sleep(1.0)  # the traceback of the cause may be a moment behind that of its victim
            break
        time.sleep(0.02)
    failures = []
    for rank, member in enumerate(members):
        if member.exitcode:
            error = folder / f"error_{rank}"
            cause = error.read_text() if error.is_file() else "no traceback"
            failures.append(f"rank {rank} (exit code {member.exitcode}):\n{cause}")
    if failures:
        raise RuntimeError("\n".join(["the process group failed", *failures]))
