"""The folder conf/: where it is, what can be chosen in it, which keys its files set, the resolvers they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mi_at.functional.geometry import parse_eps


def conf_dir() -> str:
    """The configuration folder: inside an installed package, or beside it in a checkout; absolute.

    Raises:
        FileNotFoundError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/train.yaml inside or beside {package}: reinstall mi_at")


def names_in(group: str) -> list[str]:
    """The names that a group of conf/ can be chosen by."""
    return sorted(path.stem for path in (Path(conf_dir()) / group).glob("[!_]*.yaml"))


def plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """A configuration as dictionaries, lists, numbers and text, interpolations resolved."""
    values = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(values, dict):
        raise ValueError(f"expected a configuration with keys, got a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def recipe_keys(recipe: str) -> list[str]:
    """Dotted keys that a recipe sets, those of the recipes it includes among them."""
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "recipe" / f"{recipe}.yaml"))
    # An included group (/callback/ema) is no recipe.
    included = [name for name in node.pop("defaults", []) if name != "_self_" and not name.startswith("/")]
    keys = [f"{group}.{key}" for group, values in node.items() if isinstance(values, dict) for key in values]
    return [*(key for name in included for key in recipe_keys(name)), *keys]


def options_of(group: str, name: str) -> list[str]:
    """Keys of a group's file, such as conf/optim/adam.yaml, those of the files it includes among them."""
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / group / f"{name}.yaml"))
    included = [other for other in node.pop("defaults", []) if other != "_self_"]
    return [*(key for other in included for key in options_of(group, other)), *node]


def register_resolvers() -> None:
    """Resolvers that conf/ uses.

    `${mul:a,b}` multiplies numbers or fractions; `${multiples:a,[b,c]}` is the list of a b and a c; `${larger:a,b}` is
    the larger of two numbers; `${if_l2:norm,eps}` is eps where the norm is l2, else null; `${by_budget:p,s,t}` is s at
    budget short, t at smoke, p at others and where there is none, as in an evaluation.
    """
    OmegaConf.register_new_resolver("multiples", lambda a, b: [parse_eps(a) * parse_eps(v) for v in b], replace=True)
    OmegaConf.register_new_resolver("larger", max, replace=True)
    OmegaConf.register_new_resolver("if_l2", lambda norm, eps: eps if norm == "l2" else None, replace=True)
    OmegaConf.register_new_resolver("mul", lambda a, b: parse_eps(a) * parse_eps(b), replace=True)
    OmegaConf.register_new_resolver(
        "by_budget",
        lambda paper, short, smoke, *, _root_: {"short": short, "smoke": smoke}.get(
            str(OmegaConf.select(_root_, "budget")), paper
        ),
        replace=True,
    )
