"""What the sweepers of mi_at share: launching jobs, and saying why one failed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf.errors import OmegaConfBaseException


def run_all(launcher: Launcher, jobs: Sequence[Sequence[str]], first: int = 0) -> list[JobReturn]:
    """Launch jobs; one whose run another process works at is launched again after that process.

    Args:
        launcher: Hydra's.
        jobs: overrides of each.
        first: number of the first.

    Returns:
        What became of them, in the order of the jobs.

    Raises:
        FailedJobError: the launcher itself has failed, as joblib does when one of its processes is killed; it was said.
    """
    # Here and not above: Hydra imports its plugins at every start, and this brings torch along.
    from mi_at.io import FailedJobError, explain
    from mi_at.results.runs import let_go_of_all, wait_for_others

    ended: dict[int, JobReturn] = {}
    waiting = list(range(len(jobs)))
    while waiting:
        batch = [list(jobs[place]) for place in waiting]
        try:
            results = dict(zip(waiting, launcher.launch(batch, initial_job_idx=first), strict=True))
        except (HydraException, OmegaConfBaseException):
            raise  # a configuration
        except Exception as error:
            what = (
                f"{type(launcher).__name__} has given up ({type(error).__name__}: {' '.join(explain(error).split())})"
            )
            print(f"error: {what}; what is finished is kept, the same command runs the rest", file=sys.stderr)
            raise FailedJobError from error
        first += len(batch)
        ended |= results
        let_go_of_all()
        folders = {place: getattr(failure(result), "busy", None) for place, result in results.items()}
        busy = {place: folder for place, folder in folders.items() if folder}
        waiting = list(busy)
        for other in list(busy.values())[:1]:
            wait_for_others(other)
    return [ended[place] for place in range(len(jobs))]


def failure(result: JobReturn) -> BaseException | None:
    """What a job ended with; None where it ended well."""
    return result._return_value if result.status == JobStatus.FAILED else None


def why(result: JobReturn) -> str:
    """Why a job failed."""
    error = failure(result)
    return "ended without a result" if error is None else str(error) or type(error).__name__
