"""A job as a command: what libraries say is kept short, mistakes end as one message, exit statuses tell how it went."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mi_at.io.conf import conf_dir, register_resolvers
from mi_at.io.errors import USER_ERRORS, explain, message

ERROR = "error.txt"
"""What a failed job of a sweep leaves in <runs>/multirun/<when>/<number>."""


def quiet() -> None:
    """Silence what libraries say at every start; warnings about the user's own settings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    for text in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*recommended to use .*sync_dist=True.*",  # every process logs the metric of all of them
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*Total length of `list` across ranks is zero.*",  # dataset.val_size=0
        ".*module.s. in eval mode at the start of training.*",  # frozen estimators and reference networks
    ):
        warnings.filterwarnings("ignore", text)


def reuse_memory() -> None:
    """Have glibc keep freed memory: to give a step's tensors back and fault them in anew takes a fifth of it on a CPU.

    MALLOC_MMAP_THRESHOLD_ in the environment wins.
    """
    largest = 32 << 20  # that glibc takes
    options = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, largest)}  # as in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or set(options) & set(os.environ):
        return
    for name, (option, value) in options.items():
        mallopt(option, value)
        os.environ[name] = str(value)  # for processes that this one starts


class FailedJobError(RuntimeError):
    """A job of a multirun that failed and has said why.

    Attributes:
        busy: folder of the run, where all that was wrong is that another process is at it.
    """

    def __init__(self, text: str = "", busy: str | None = None) -> None:
        super().__init__(text, busy)  # both, so that it can be pickled
        self.busy = busy

    def __str__(self) -> str:
        return str(self.args[0])


def _leave(error: BaseException) -> None:
    """Keep what a job of a multirun failed with: what it was, what was wrong, and where."""
    job = HydraConfig.get()
    text = f"{shlex.join(job.overrides.task)}\n\n{explain(error)}\n\n{''.join(traceback.format_exception(error))}"
    with contextlib.suppress(OSError):  # it was said; a full disk is no other error
        Path(job.runtime.output_dir, ERROR).write_text(text)


def run_command(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """The command line of a job: what is the user's own mistake ends as one message and exit status 1.

    In a multirun a job that fails says why at once and leaves `ERROR` in its folder of the sweep, the others go on, and
    the exit status is 1 in the end.

    Args:
        job: called with the composed configuration.
        config_name: "train" or "evaluate".
    """
    register_resolvers()
    reuse_memory()
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on instead of printing them itself

    @functools.wraps(job)
    def reported(cfg: DictConfig) -> Any:
        quiet()
        register_resolvers()  # a launcher may have started a process for the job
        try:
            return job(cfg)
        except USER_ERRORS as error:
            if traced:
                raise
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                sys.exit(message(error))
            busy = getattr(error, "folder", None)
            if busy is None:
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)
                _leave(error)
            raise FailedJobError(explain(error), busy) from error
        except Exception as error:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            # Said here: on its way from another process an error loses its place in the code, and some cannot be sent.
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
            _leave(error)
            raise FailedJobError(f"{type(error).__name__}: {error}") from error

    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(reported)()
    except FailedJobError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if traced:
            raise
        # A job's own error ends as FailedJobError: this one is of a file of the sweep's.
        if isinstance(error, OSError) and error.filename and {"-m", "--multirun"} & {*sys.argv}:
            error = OSError(f"{error}: a sweep's notes lie in the folder of its runs; choose another runs=")
        sys.exit(message(error))
    except RuntimeError as error:
        launcher = next((word for word in sys.argv if word.startswith(("launcher=", "hydra/launcher="))), None)
        if traced or launcher is None:
            raise
        sys.exit(message(ValueError(f"{launcher}: {explain(error)}")))  # such as Slurm's where there is no Slurm
