"""What is the user's own mistake, and how it is said: the cause, the keys and names there are, the nearest of them."""

from __future__ import annotations

import difflib
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from mi_at.defenses.base import NonFiniteLossError
from mi_at.io.conf import conf_dir, names_in

USER_ERRORS = (
    ValueError,
    OSError,
    NonFiniteLossError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)


def message(error: BaseException) -> str:
    """What a command that fails says last."""
    return f"error: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where)"


def explain(error: BaseException) -> str:
    """What a user's mistake is: the cause of what Hydra wraps, and the keys there are where one is unknown."""
    while isinstance(error, HydraException) and isinstance(error.__cause__, USER_ERRORS):
        error = error.__cause__
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and isinstance(error.parent_node, DictConfig):
        known, where = sorted(str(key) for key in error.parent_node), str(error.full_key).rpartition(".")[0]
        near = guess(str(error.key), known)
        has = ", ".join(known) or f"none so far; +{error.full_key}=<value> adds it"
        return f"unknown key {error.full_key}: {where or 'the configuration'} has {has}{near}"
    if "Cannot merge DictConfig with ListConfig" in str(error):
        key = str(error).partition("full_key: ")[2].split()[0]
        if key.startswith("table."):
            return f"{key}=[...]: the table's own; table.rows=[...] says which of its rows are wanted"
        return f"{key}=[...]: names of files are chosen with a slash, {key.replace('.', '/')}=[...]"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: {error.full_key}=<path>"
    if isinstance(error, HydraException) and "INTERVAL_SWEEP" in str(error):
        return "interval() is for a search: give sweep=optuna too, or values: a=1,2"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).strip("/").rpartition("/")
        if group == "hydra/launcher":
            return _launcher_missing(name)
        if known := names_in(group):
            elsewhere = [other for other in ("defense", "regularizer", "callback") if name in names_in(other)]
            near = f"; did you mean {elsewhere[0]}={name}?" if elsewhere else guess(name, known)
            return f"{group}={name}: expected one of {', '.join(known)}{near}"
    if 'not detect "srun"' in str(error):  # submitit's words
        return f"{error} (this machine has no Slurm: launcher=joblib runs here)"
    return str(error)


def _launcher_missing(name: str) -> str:
    known = names_in("launcher")
    for launcher in known:
        node = OmegaConf.load(Path(conf_dir()) / "launcher" / f"{launcher}.yaml")
        if {"override /hydra/launcher": name} in node.defaults:
            return f"launcher={launcher}: its plugin is not installed: pip install 'mi_at[launchers]'"
    return f"hydra/launcher={name}: expected launcher= and one of {', '.join(known)}{guess(name, known)}"


def guess(word: str, known: list[str]) -> str:
    """What may have been meant, as the end of a message; empty where nothing known is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
