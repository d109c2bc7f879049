"""Between the command line, the disk and the rest: configurations, what they build, checkpoints that carry theirs."""

from mi_at.io.building import build, build_attacks, build_data, build_defense, build_net
from mi_at.io.checkpoints import (
    Checkpoint,
    CheckpointError,
    Weights,
    load,
    load_defense,
    load_own,
    load_weights,
    named_as,
    read_checkpoint,
    read_weights,
)
from mi_at.io.command import FailedJobError, quiet, reuse_memory, run_command
from mi_at.io.conf import conf_dir, names_in, options_of, plain, recipe_keys, register_resolvers
from mi_at.io.configuration import (
    EXTRAS,
    compose,
    compose_run,
    composing,
    fill_classes,
    resolve,
    resolve_evaluation,
)
from mi_at.io.errors import USER_ERRORS, explain, message
from mi_at.io.serving import Served, Surrogate, adaptive_attacks, bind, guides_of, load_surrogate, serve

__all__ = [
    "EXTRAS",
    "USER_ERRORS",
    "Checkpoint",
    "CheckpointError",
    "FailedJobError",
    "Served",
    "Surrogate",
    "Weights",
    "adaptive_attacks",
    "bind",
    "build",
    "build_attacks",
    "build_data",
    "build_defense",
    "build_net",
    "compose",
    "compose_run",
    "composing",
    "conf_dir",
    "explain",
    "fill_classes",
    "guides_of",
    "load",
    "load_defense",
    "load_own",
    "load_surrogate",
    "load_weights",
    "message",
    "named_as",
    "names_in",
    "options_of",
    "plain",
    "quiet",
    "read_checkpoint",
    "read_weights",
    "recipe_keys",
    "register_resolvers",
    "resolve",
    "resolve_evaluation",
    "reuse_memory",
    "run_command",
    "serve",
]
