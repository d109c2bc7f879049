"""hydra/sweeper: cells. The cells of a table are a list, no grid: each is a job with overrides of its own."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

# No dataclass: Hydra reads its plugins in a way that these do not stand.
NODE = {"_target_": "hydra_plugins.mi_at_sweeper.cells.CellsSweeper", "max_batch_size": None, "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=NODE, provider="mi_at")


class CellsSweeper(BasicSweeper):
    """Run the cells of `table=<name>`, each with every seed; a cell that fails does not stop the others.

    A cell that another process works at comes last, after that process.
    """

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Launch a job for each cell.

        Args:
            arguments: what was typed.

        Returns:
            What became of the jobs, in the order of the cells.

        Raises:
            TableError: a table, row or group that cannot be used so.
            FailedJobError: some cells failed; which and why was printed.
        """
        if self.config is None or self.launcher is None or self.hydra_context is None:
            raise RuntimeError("setup() comes first")
        # Here and not above: Hydra imports its plugins at every start, and this brings torch along.
        from mi_at.io import FailedJobError
        from mi_at.results.runs import let_go_of_all, wait_for_others
        from mi_at.results.tables import read_table

        # Interpolations in a cell's overrides are the job's to resolve.
        node: Any = OmegaConf.to_container(self.config.table, resolve=False)
        table = read_table(node)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = self.split_arguments(parser.parse_overrides(arguments), None)[0]
        jobs = table.jobs(typed, self.config.hydra.runtime.choices)
        # Each cell is composed once, so that a misspelt value is known before anything runs.
        self.validate_batch_is_legal(
            [list(overrides) for overrides in {job.cell: job.overrides for job in jobs}.values()]
        )
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")

        ended: dict[int, JobReturn] = {}
        waiting, first = list(range(len(jobs))), 0
        while waiting:
            batch = [list(jobs[place].overrides) for place in waiting]
            results = dict(zip(waiting, self.launcher.launch(batch, initial_job_idx=first), strict=True))
            first += len(batch)
            ended |= results
            let_go_of_all()
            busy = {
                place: folder for place, result in results.items() if (folder := getattr(_error(result), "busy", None))
            }
            waiting = list(busy)
            for other in list(busy.values())[:1]:
                wait_for_others(other)
        failed = {place: result for place, result in ended.items() if result.status != JobStatus.COMPLETED}
        if failed:
            print(f"\n{len(failed)} of {len(jobs)} runs of table {table.name} failed:", file=sys.stderr)
        for place, result in sorted(failed.items()):
            seed = next(part for part in jobs[place].overrides if part.startswith("seed="))
            print(f"  {jobs[place].cell} {seed}: {_why(_error(result))}", file=sys.stderr)
        if failed:
            raise FailedJobError
        return [ended[place] for place in sorted(ended)]


def _error(result: JobReturn) -> BaseException | None:
    """What a job ended with; None where it ended well."""
    return result._return_value if result.status == JobStatus.FAILED else None


def _why(error: BaseException | None) -> str:
    """A sentence; for what is no mistake of the user's, the place in the code too."""
    from mi_at.io import FailedJobError

    if isinstance(error, FailedJobError | ValueError | OSError):
        return str(error)
    if error is None:
        return "ended without a result"
    lines = traceback.format_exception(error)
    return f"{type(error).__name__}: {error}\n{''.join(lines)}"
