"""hydra/sweeper: cells. The cells of a table are a list, no grid: each is a job with overrides of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.mi_at_sweeper._jobs import run_all, why

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
        from mi_at.cells import as_typed, one_table
        from mi_at.io import ERROR, FailedJobError, explain
        from mi_at.results.tables import key_of, read_table

        chosen = self.config.hydra.runtime.choices
        if chosen.get("sweep", "none") != "none":
            raise ValueError(f"sweep={chosen.sweep} beside table={chosen.table}: leave out one of them")
        one_table(arguments)
        # Interpolations in a cell's overrides are the job's to resolve.
        node: Any = OmegaConf.to_container(self.config.table, resolve=False)
        table = read_table(node)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = self.split_arguments(parser.parse_overrides(arguments), None)[0]
        jobs = table.jobs(typed, chosen)
        # Each cell is composed once, so that a misspelt value is known before anything runs.
        for cell, overrides in {job.cell: job.overrides for job in jobs}.items():
            try:
                self.validate_batch_is_legal([list(overrides)])
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(f"cell {cell}: {explain(error)} (table.rows=[...] says which cells run)") from error
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")

        results = run_all(self.launcher, [job.overrides for job in jobs])
        ended = zip(jobs, results, strict=True)
        failed = [(job, result) for job, result in ended if result.status != JobStatus.COMPLETED]
        if failed:
            print(f"\n{len(failed)} of {len(jobs)} runs of table {table.name} failed:", file=sys.stderr)
        for job, result in failed:
            print(f"  {job.cell} seed={job.seed}: {why(result)}", file=sys.stderr)
        if failed:
            if any(folder.glob(f"*/{ERROR}")):
                print(f"  where each of them failed: {folder}/*/{ERROR}", file=sys.stderr)
            raise FailedJobError
        # How they were launched a report does not take; every value it does.
        path = [override for override in self.config.hydra.overrides.hydra if key_of(override) == "hydra.searchpath"]
        # Of several values a report shows one.
        first = {key_of(override): override for override in typed[0]}
        several = {key_of(o) for combination in typed for o in combination if o != first[key_of(o)]} - {"seed"}
        words = [first[key_of(o)] if key_of(o) in several else as_typed(o) for o in arguments]
        shown = [*path, *(word for word in words if key_of(word) != "launcher")]
        each = f" with the first {' and '.join(sorted(several))}" if several else ""
        many = (
            f"all {len(jobs)} runs of table {table.name} are" if len(jobs) > 1 else f"the run of table {table.name} is"
        )
        print(f"\n{many} finished; what {'they' if len(jobs) > 1 else 'it'} measured{each}:")
        print(f"  {shlex.join(['python', '-m', 'mi_at.report', *shown])}", flush=True)
        return results
