"""docs/METHODS.md speaks of options that exist, with values that they take."""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mi_at import io

REPO = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (REPO / "docs" / "METHODS.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| method", "| ---"))
]
BASES = {"all": "defense=standard_at", "awp": "defense=trades_awp"}
GROUPS = ("attack", "callback", "dataset", "optim", "trainer", "select", "init_from", "recipe")


def named(row: list[str]) -> list[tuple[str, str | None]]:
    """Options of a row with their values; `a=x`, `y` means both x and y of a."""
    found: list[tuple[str, str | None]] = []
    for text in re.findall(r"`([^`]+)`", row[-1]):
        for word in text.split():
            key, _, value = word.partition("=")
            if not value and found and found[-1][1] and "." not in key and key in ("normalized", "off", "released"):
                found.append((found[-1][0], key))
            else:
                found.append((key, value or None))
    return found


_composed: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture
def plain(compose: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """A composed configuration as plain values, each once."""

    def composed(*overrides: str) -> dict[str, Any]:
        if overrides not in _composed:
            _composed[overrides] = io.plain(compose(list(overrides)))
        return copy.deepcopy(_composed[overrides])

    return composed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1][:30]}")
def test_every_option_of_the_table_exists(row: list[str], plain: Callable[..., dict[str, Any]]) -> None:
    assert len(row) == 5, row
    method = row[0]
    own = (REPO / "conf/defense" / f"{method}.yaml").is_file()
    base = BASES.get(method, f"defense={method}" if own else f"regularizer={method}")
    where = "defense" if own or method in BASES else f"regularizer.{method}"
    assert named(row) or row[-1] == "-"
    for key, value in named(row):
        if key == "recipe":
            assert (REPO / "conf/recipe" / f"{value}.yaml").is_file()
            continue
        full = key if key.split(".")[0] in GROUPS else f"{where}.{key}"
        config = plain(base, *(["callback=ema"] if full.startswith("callback.ema") else []))
        *path, last = full.split(".")
        node: Any = functools.reduce(operator.getitem, path, config)
        assert last in node, f"{full} is no option of {base}"
        if value is not None and full.startswith(where):
            node[last] = OverridesParser.create().parse_override(f"{key}={value}").value()
            built = config["defense"] if where == "defense" else config["regularizer"][method]
            io.build(where, built)


def test_the_table_knows_every_method() -> None:
    methods = {path.stem for group in ("defense", "regularizer") for path in (REPO / "conf" / group).glob("*.yaml")}
    plain_ones = {"ce", "standard_at", "none", "mi", "trades_awp", "mi_estimators"}
    assert {row[0] for row in ROWS} - {"all", "awp"} == methods - plain_ones
