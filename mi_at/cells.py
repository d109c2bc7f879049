"""What a command line asks for: a table, its cells, the jobs that a sweep with the same arguments would run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm  # type: ignore[import-untyped]

from mi_at import io
from mi_at.results.records import NOT_HASHED
from mi_at.results.reported import FOLDER
from mi_at.results.tables import Job, Table, TableError, key_of, read_table

MEASURED = FOLDER.parent / "measured"
"""Records of real runs that the project keeps."""
OF_A_SWEEP = ("launcher", "sweep")
"""Choices of a command with -m, which one run alone does not take."""
OF_THE_COMMAND = ("hydra", "table")
"""Keys that no job of a table has."""
Item = TypeVar("Item")


def split_arguments(
    given: Sequence[str], own: Mapping[str, str], *, measured: Path | None = None
) -> tuple[dict[str, str], list[str], list[str]]:
    """What a command line says to the command itself, and what to Hydra.

    Args:
        given: "key=value" each.
        own: the command's own options and their defaults, `records` among them: other folders of records.
        measured: searched beside the folder of the runs where none is typed, if any.

    Returns:
        The own options, the overrides, and the folders that hold records.

    Raises:
        ValueError: a misspelt option, or a folder of `records` that does not exist.

    Example:
        >>> split_arguments(["seed=0", "format=csv", "records=[.]"], {"format": "terminal", "records": ""})
        ({'format': 'csv', 'records': '[.]'}, ['seed=0'], ['.'])
    """
    options, overrides = dict(own), []
    for argument in given:
        key, equals, value = argument.partition("=")
        if key in own and equals:
            options[key] = unquoted(value)
        elif near := difflib.get_close_matches(key, own, n=1, cutoff=0.85):
            raise ValueError(f"{argument}: unknown; did you mean {near[0]}=?")
        else:
            overrides.append(argument)
    runs = next((unquoted(o.partition("=")[2]) for o in overrides if key_of(o) == "runs"), "runs")
    folders = listed(options["records"])
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        first = Path(missing[0])
        way = (
            f"{first} is a file; its folder is wanted, {first.parent}"
            if first.is_file()
            else f"there is no folder {first}"
        )
        raise ValueError(f"records={options['records']}: {way}")
    return options, overrides, folders or [runs, *([] if measured is None else [str(measured)])]


def unquoted(value: str) -> str:
    """A value without the quotes that Hydra takes off: runs='my runs' is the folder "my runs".

    Example:
        >>> unquoted("'my runs'"), unquoted("my runs"), unquoted("'")
        ('my runs', 'my runs', "'")
    """
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def listed(value: str) -> list[str]:
    """The parts of a list as it is typed.

    Example:
        >>> listed("[a, b]"), listed("a"), listed("")
        (['a', 'b'], ['a'], [])
    """
    return [part.strip(" '\"") for part in value.strip("[]").split(",") if part.strip()]


def typed_words(without: Sequence[str] = ()) -> list[str]:
    """What this process's command line says of its numbers, without paths: a record may be shown to others.

    Args:
        without: further keys that say nothing of them.
    """
    said = []
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key == "checkpoint":
            said.append(f"{key}={Path(value).name}")
        elif os.path.isfile(value):  # noqa: PTH113  Path.is_file() raises for a list of attacks longer than a file name
            said.append(f"{key}=<file>")
        elif not is_within(key_of(override), (*NOT_HASHED, *OF_A_SWEEP, *without)):
            said.append(override)
    return said


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Whether a key is one of some, or below one.

    Example:
        >>> is_within("hydra.searchpath", ["hydra"]), is_within("runs", ["run"])
        (True, False)
    """
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def bar(items: Collection[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on standard error where that is a terminal."""
    shown: Iterable[Item] = tqdm(items, desc=what, disable=None, leave=False)
    return shown


def composed(overrides: Sequence[str]) -> tuple[Table, list[Job]]:
    """A table as a command line asks for it, and the jobs that a sweep with the same arguments would run.

    Args:
        overrides: table=<name>, and what else is typed.

    Raises:
        TableError: no table, or one that is asked for what it has not.
        ValueError: an unknown name or key; the message names those there are.
    """
    one_table(overrides)
    cfg, typed = compose_table(overrides)
    table = table_of(cfg)
    return table, table.jobs(typed, cfg.hydra.runtime.choices)


def left_to_cells(arguments: Sequence[str]) -> list[str]:
    """A command line of a table, on which Hydra leaves the values within a group to the cells.

    Before anything else Hydra sets what was typed in the defaults, which lack keys that a cell has. What is a choice,
    of one value too, it leaves to the jobs.

    Args:
        arguments: of a command; without a table, or for one run alone, they stay as they are.

    Example:
        >>> left_to_cells(["-m", "table=ncmi_t2", "regularizer.ncmi.alpha=0.2", "seed=0", "attack.eps=4/255,8/255"])
        ['-m', 'table=ncmi_t2', 'regularizer.ncmi.alpha=choice(0.2)', 'seed=0', 'attack.eps=4/255,8/255']
        >>> left_to_cells(["-m", "table=ib_rar_t4", "regularizer.ib_rar.layers=null"])[2]
        "regularizer.ib_rar.layers=choice('null')"
    """
    if named_table(arguments) is None or not {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_as_choice(argument) for argument in arguments]


def as_typed(override: str) -> str:
    """What `left_to_cells` made of an override, undone.

    Example:
        >>> as_typed("attack.eps=choice(4/255)"), as_typed("attack.eps=choice(4/255,8/255)")
        ('attack.eps=4/255', 'attack.eps=choice(4/255,8/255)')
    """
    key, _, value = override.partition("=choice(")
    typed = f"{key}={value.removesuffix(')')}"
    return typed if value and _as_choice(typed) == override else override


def _as_choice(override: str) -> str:
    key, _, value = override.partition("=")
    if "." not in key or not value or key.startswith(("-", "~")) or is_within(key_of(override), OF_THE_COMMAND):
        return override
    try:
        several = OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:  # Hydra says what is wrong with it
        return override
    if value == "null":
        value = "'null'"  # Hydra takes no null for a choice, and leaves the quotes away afterwards
    return override if several else f"{key}=choice({value})"


def compose_table(overrides: Sequence[str]) -> tuple[DictConfig, list[list[str]]]:
    """The configuration of what has one value, and all combinations of what was typed."""
    parsed = OverridesParser.create().parse_overrides([_as_choice(override) for override in overrides])
    single = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    cfg = hydra.compose("train", overrides=single, return_hydra_config=True)
    return cfg, BasicSweeper.split_arguments(parsed, None)[0]


def table_of(cfg: DictConfig) -> Table:
    """The table of a composed configuration."""
    node: Any = OmegaConf.to_container(cfg.table, resolve=False)  # interpolations are the job's to resolve
    return read_table(node)


def named_table(overrides: Sequence[str]) -> str | None:
    """The table that is asked for; None where none is.

    Example:
        >>> named_table(["budget=short", "table=mimae_t5"]), named_table(["seed=0"])
        ('mimae_t5', None)
    """
    name = next((override.partition("=")[2] for override in overrides if key_of(override) == "table"), "none")
    return None if name in ("none", "") else name


def one_table(overrides: Sequence[str]) -> None:
    """Refuse a command line that does not name one table.

    Raises:
        TableError: no table, or several; the message names those there are, or what was meant.
    """
    named = [override for override in overrides if key_of(override) == "table"]
    if len(named) > 1 or "," in (named_table(overrides) or ""):
        raise TableError(f"{' '.join(named)}: one table at a time")
    if named_table(overrides) is None:
        names = table_names()
        for override in overrides:
            word, _, value = override.partition("=")
            if word in names or (value in names and difflib.get_close_matches(word, ["table"])):
                raise TableError(f"{override}: unknown; did you mean table={value or word}?")
        raise TableError(f"which table? table= one of {', '.join(names)}")


def table_names() -> list[str]:
    """Tables that there are."""
    return [name for name in io.names_in("table") if name != "none"]
