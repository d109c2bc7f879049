"""hydra/sweeper: study. The values that give the highest robust accuracy on validation, proposed by Optuna.

hydra-optuna-sweeper 1.3.0 does this with Optuna below 3 (2.10.1, of 2022, and its 14 packages); this one takes today's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.mi_at_sweeper._jobs import run_all, why

NODE = {
    "_target_": "hydra_plugins.mi_at_sweeper.study.StudySweeper",
    "n_trials": 20,
    "n_jobs": 1,
    "sampler": "tpe",
    "seed": 0,
}
ConfigStore.instance().store(group="hydra/sweeper", name="study", node=NODE, provider="mi_at")
SAMPLERS = ("tpe", "random", "qmc")


class StudySweeper(Sweeper):
    """Run trials one batch after another; one that fails is told to Optuna as failed and ends nothing.

    Proposals depend on the seed and on the results alone: the same command again proposes the same, and a run that is
    finished is not run again.

    Args:
        n_trials: in all.
        n_jobs: proposed and launched at a time.
        sampler: one of `SAMPLERS`.
        seed: of the proposals.
    """

    def __init__(self, *, n_trials: int, n_jobs: int, sampler: str, seed: int) -> None:
        self.n_trials, self.n_jobs, self.sampler, self.seed = n_trials, n_jobs, sampler, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives.

        Raises:
            ValueError: Optuna is not installed, or an option is out of range.
        """
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("sweep=optuna: Optuna is not installed: pip install 'mi_at[launchers]'")
        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"hydra.sweeper.{key}={value}: expected 1 or more")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"hydra.sweeper.sampler={self.sampler}: expected one of {', '.join(SAMPLERS)}")
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        """Run the trials.

        Args:
            arguments: what was typed: an interval, range or list of choices is searched, the rest is every trial's.

        Returns:
            The best trial: its number, value (percent) and params.

        Raises:
            ValueError: nothing to search, a search over seeds, or runs that have no validation score.
            FailedJobError: no trial has ended well.
        """
        import optuna

        # Here and not above: Hydra imports its plugins at every start, and this brings torch along.
        from mi_at.io import FailedJobError

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = parser.parse_overrides(arguments)
        space = {each.get_key_element(): distribution(each) for each in typed if each.is_sweep_override()}
        fixed = [str(each.input_line) for each in typed if not each.is_sweep_override()]
        self._check(space, fixed)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=self._sampler())
        while (told := len(study.trials)) < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - told))]
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            for trial, result in zip(trials, run_all(self.launcher, jobs, told), strict=True):
                value, problem = score(result)
                if value is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, value)
                said = f"failed: {problem}" if value is None else f"{value:.2f} % robust on validation"
                stream = sys.stderr if value is None else sys.stdout
                print(f"trial {trial.number}: {' '.join(words(trial.params))}: {said}", file=stream, flush=True)
            self._write(study.trials)
        done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        if not done:
            print(f"error: none of {self.n_trials} trials has ended well", file=sys.stderr)
            raise FailedJobError
        best = study.best_trial
        failed = f", {self.n_trials - len(done)} failed" if len(done) < self.n_trials else ""
        print(f"\nbest of {self.n_trials} trials{failed}: {best.value:.2f} % robust on validation")
        own = [word for word in fixed if word.partition("=")[0] not in ("sweep", "launcher")]
        print(f"  {shlex.join(['python', '-m', 'mi_at.train', *own, *words(best.params)])}", flush=True)
        return {"number": best.number, "value": best.value, "params": best.params}

    def _check(self, space: Mapping[str, Any], fixed: Sequence[str]) -> None:
        """Refuse a study that cannot find anything, before a run starts; the first combination is composed."""
        chosen = self.config.hydra.runtime.choices
        if chosen.get("table", "none") != "none":
            raise ValueError(f"sweep={chosen.sweep} beside table={chosen.table}: leave out one of them")
        if not space:
            raise ValueError(
                "sweep=optuna has nothing to search: give a value as 'defense.lambda_mi=interval(0.05,1)', "
                "'defense.beta=tag(log,interval(0.1,10))', 'attack.steps=int(interval(1,10))' or defense=trades,mart"
            )
        if "seed" in space:
            raise ValueError("sweep=optuna over seed would choose the luckiest one: give a single seed")
        first = [f"{key}={_some_value(each)}" for key, each in space.items()]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, [*fixed, *first])
        if not config.dataset.val_size:
            raise ValueError("sweep=optuna compares runs on the validation split, and there is none: dataset.val_size=")

    def _sampler(self) -> Any:
        from optuna import samplers

        if self.sampler == "random":
            return samplers.RandomSampler(seed=self.seed)
        if self.sampler == "qmc":
            return samplers.QMCSampler(seed=self.seed, scramble=True)
        # Trials that still run count as bad ones, so that a batch does not ask the same thing several times.
        return samplers.TPESampler(seed=self.seed, constant_liar=self.n_jobs > 1)

    def _write(self, trials: Sequence[Any]) -> None:
        """study.json in the sweep's folder: every trial so far."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"number": trial.number, "state": trial.state.name.lower(), "value": trial.value, "params": trial.params}
            for trial in trials
        ]
        (folder / "study.json").write_text(json.dumps(rows, indent=2))


def distribution(override: Override) -> Any:
    """What Optuna draws a value from.

    Args:
        override: `interval(a,b)` (of whole numbers: `int(interval(a,b))`; by magnitude: `tag(log,interval(a,b))`),
            `range(a,b,step)` without b, as in Python, or choices.

    Raises:
        ValueError: an empty interval.
    """
    from optuna import distributions

    value, key = override.value(), override.get_key_element()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if low is None or high is None or not low < high or (log and low <= 0):
            raise ValueError(f"{override.input_line}: expected interval(low,high) with low < high, above 0 with log")
        kind = distributions.IntDistribution if isinstance(low, int) and isinstance(high, int) else None
        return (kind or distributions.FloatDistribution)(low, high, log=log)
    choices = list(override.sweep_iterator())
    if not choices:
        raise ValueError(f"{override.input_line}: {key} has no value to choose from")
    if isinstance(value, RangeSweep) and not value.shuffle and all(isinstance(each, int) for each in choices):
        return distributions.IntDistribution(min(choices), max(choices), step=abs(int(value.step)))
    return distributions.CategoricalDistribution([str(each) for each in choices])


def score(result: JobReturn) -> tuple[float | None, str]:
    """The number that a run returns; why there is none."""
    if result.status != JobStatus.COMPLETED:
        return None, why(result)
    value = result.return_value
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None, f"its validation score is {value}"
    return float(value), ""


def words(params: Mapping[str, Any]) -> list[str]:
    """Values as they are typed."""
    return [f"{key}={value}" for key, value in params.items()]


def _some_value(each: Any) -> Any:
    return each.choices[0] if hasattr(each, "choices") else each.low
