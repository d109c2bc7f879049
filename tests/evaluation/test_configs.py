"""conf/evaluation: every file has the same keys, its attacks can be built and run, and say what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mi_at.evaluation import evaluate
from tests.evaluation.nets import images, loader, predicted, small_conv

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "evaluation"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DATASET = {"eps": "8/255", "norm": "linf", "step_size": "2/255"}


def load(name: str) -> DictConfig:
    cfg = OmegaConf.create({"dataset": DATASET, "evaluation": OmegaConf.load(FOLDER / f"{name}.yaml")})
    OmegaConf.resolve(cfg)
    return cfg.evaluation


def attacks(name: str) -> dict[str, Any]:
    # One by one: Hydra would turn dataclasses inside a mapping back into config nodes.
    return {key: instantiate(attack) for key, attack in load(name).attacks.items()}


def test_the_protocols_are_there() -> None:
    assert set(NAMES) >= {"quick", "none", "head_to_head_short", "mimae", "mimae_mnist"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_attacks(name: str) -> None:
    cfg = load(name)
    assert {"n", "n_of", "batch_size", "seed", "attacks"} <= set(cfg)
    assert set(cfg.n_of) <= set(cfg.attacks)
    for key, attack in attacks(name).items():
        description = attack.describe()
        assert key.isidentifier()
        assert isinstance(description["eps"], float)
        assert description["norm"] in ("linf", "l2")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "head_to_head_short"])
def test_runs(name: str) -> None:
    cfg, net, x = load(name), small_conv(), images(6, side=8)
    built = attacks(name)
    if "autoattack" in built:
        built["autoattack"] = instantiate(cfg.attacks.autoattack, queries=5, attacks=["apgd-ce", "square"])
    y = predicted(net, x)
    result = evaluate(net, built, loader(x, y), n=6, n_of=cfg.n_of, batch_size=cfg.batch_size, progress=False)
    assert list(result.attacks) == list(cfg.attacks)


def test_quick_is_what_the_demo_shows() -> None:
    built = attacks("quick")
    assert list(built) == ["fgsm", "pgd_20", "cw_inf", "autoattack"]
    assert {attack.eps for attack in built.values()} == {8 / 255}
    assert (built["pgd_20"].steps, built["pgd_20"].objective) == (20, "cross_entropy")
    assert (built["cw_inf"].steps, built["cw_inf"].objective) == (20, "margin")
    assert built["autoattack"].version == "standard"
    assert built["autoattack"].queries == 5000


def flagged(name: str) -> set[str]:
    net, x = small_conv(), images(2, side=8)
    result = evaluate(net, attacks(name), loader(x, predicted(net, x)), progress=False)
    return {row.name for row in result.attacks.values() if "reach" in row.flags}


def test_mimae_as_printed_carries_its_reach_flags() -> None:
    # METHODS A2, A9: the paper's own settings cannot cross these balls; the added columns can.
    assert flagged("mimae") == {"pgd_l2"}
    assert flagged("mimae_mnist") == {"fgsm_as_printed", "pgd_20", "pgd_40", "cw_inf", "pgd_l2"}
    assert set(attacks("mimae_mnist")) - flagged("mimae_mnist") == {"fgsm", "pgd_40_honest"}


def test_head_to_head_short_is_the_protocol_of_methods_a10() -> None:
    cfg, built = load("head_to_head_short"), attacks("head_to_head_short")
    assert dict(cfg.n_of) == dict.fromkeys(["pgd_50x10", "cw_50x10", "square", "autoattack"], 200)
    assert all((built[name].steps, built[name].restarts) == (50, 10) for name in ("pgd_50x10", "cw_50x10"))
    assert built["square"].attacks == ("square",)
    assert built["square"].queries == 5000
    net, x = small_conv(), images(3, side=8)
    small = {name: built[name] for name in ("fgsm", "pgd_20", "pgd_50x10")}
    result = evaluate(net, small, loader(x, predicted(net, x)), n_of={"pgd_50x10": 2}, progress=False)
    assert [row.n for row in result.worst_cases()] == [3, 2]
    assert torch.equal(result.index, torch.arange(3))
