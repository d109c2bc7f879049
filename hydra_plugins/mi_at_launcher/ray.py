"""hydra/launcher: ray. Each job is a task of a Ray cluster: one on this machine, or one that is there already.

The options are those of hydra-ray-launcher 1.2.2, which cannot be used: it asks for cloudpickle below 3 and, for its
Amazon part, for a botocore of before python-dateutil 3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

NODE = {
    "_target_": "hydra_plugins.mi_at_launcher.ray.RayLauncher",
    "ray": {"init": {"address": "local"}, "remote": {}},
}
ConfigStore.instance().store(group="hydra/launcher", name="ray", node=NODE, provider="mi_at")


class RayLauncher(Launcher):
    """Run the jobs on a Ray cluster; one whose process dies is a failed job and stops no other.

    Args:
        ray: init, the arguments of `ray.init` (address: "local" starts a cluster on this machine, "auto" or an
            address takes one that is there), and remote, the options of a task. A task gets a GPU where the cluster
            has any and remote does not say.
    """

    def __init__(self, ray: Mapping[str, Any]) -> None:
        self.options = ray

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives.

        Raises:
            ValueError: Ray is not installed.
        """
        if importlib.util.find_spec("ray") is None:
            raise ValueError("launcher=ray: Ray is not installed: pip install 'mi_at[ray]'")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs.

        Args:
            job_overrides: of each job.
            initial_job_idx: number of the first.

        Returns:
            What became of them, in the same order.
        """
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two runs may print the same line
        import ray
        from ray.exceptions import RayError

        options: Any = OmegaConf.to_container(OmegaConf.create(dict(self.options)), resolve=True)
        if not ray.is_initialized():
            try:
                ray.init(**options["init"])
            except Exception as error:  # Ray's own have no common type
                raise OSError(f"launcher=ray: Ray did not start: {' '.join(str(error).split())}") from error
        # With no GPU asked for, Ray hides those there are.
        remote = {"num_gpus": 1 if ray.cluster_resources().get("GPU") else 0, **options["remote"]}
        task = ray.remote(**remote)(_run)
        print(f"Ray runs {len(job_overrides)} jobs on {ray.cluster_resources().get('CPU', 0):.0f} CPUs", flush=True)
        running = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            print(f"\t#{number} : {' '.join(filter_overrides(overrides))}", flush=True)
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"ray_{number}", number
            made = (self.hydra_context, config, self.task_function, Singleton.get_state(), str(Path.cwd()))
            running.append(task.remote(*made))
        ended = []
        for job in running:
            try:
                ended.append(ray.get(job))
            except RayError as error:
                ended.append(JobReturn(status=JobStatus.FAILED, _return_value=OSError(_last_line(error))))
        return ended


def _run(
    context: HydraContext, config: DictConfig, task: TaskFunction, singletons: Mapping[Any, Any], folder: str
) -> JobReturn:
    """One job, in a worker of the cluster, in the folder where the sweep was started."""
    os.chdir(folder)  # relative paths are the user's; a cluster has begun elsewhere
    setup_globals()
    Singleton.set_state(singletons)
    HydraConfig.instance().set_config(config)
    return run_job(
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if len(lines) == 1 else f'{lines[0]} ... {lines[-1]}' if lines else ''}"
