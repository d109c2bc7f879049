"""conf/evaluation: every protocol composes, its attacks are built and run, and is what its paper says."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

from mi_at import io
from mi_at.defenses.standard_at import StandardAT
from mi_at.evaluation import evaluate
from mi_at.models.cnn import CNNTiny
from mi_at.results.records import config_hash
from tests.evaluation.nets import images, loader, predicted, small_conv

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "evaluation"
PROTOCOLS = io.names_in("evaluation")
ATTACKS = io.names_in("evaluation/attacks")
CHEAP = {"queries": 5, "restarts": 2, "binary_search": 2}  # of what costs more than a test has
STEPS = 3


def resolved(name: str, *overrides: str, data: str = "cifar10") -> dict[str, Any]:
    """The evaluation node as a command has it."""
    return copy.deepcopy(_resolved(name, overrides, data))


@functools.cache
def _resolved(name: str, overrides: tuple[str, ...], data: str) -> dict[str, Any]:
    cfg = io.compose(name, [f"dataset={data}", *overrides])
    parts = {"seed": 0, "dataset": cfg.dataset, "evaluation": cfg.evaluation}
    return io.resolve_evaluation(io.plain(OmegaConf.create(parts))["evaluation"])


def attacks(name: str, *overrides: str, data: str = "cifar10") -> dict[str, Any]:
    return io.build_attacks(resolved(name, *overrides, data=data))


def said(name: str, attack: str, *keys: str) -> tuple[Any, ...]:
    description = attacks(name)[attack].describe()
    return tuple(description[key] for key in keys)


def cheapened(name: str) -> dict[str, Any]:
    """The attacks of a protocol with few steps, starts and queries."""
    config = resolved(name, data="digits")
    for node in config["attacks"].values():
        for options in (node, node.get("options", {})):
            options |= {key: min(value, options[key]) for key, value in CHEAP.items() if key in options}
            if "version" in options:
                options |= {"queries": 5, "attacks": ["apgd-ce", "square"]}
            elif "steps" in options:
                options["steps"] = min(STEPS, options["steps"])
    return config


def classifier(seed: int) -> nn.Module:
    """An untrained network that has taps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.25).eval()


# ---------------------------------------------------------------- all of them
def test_the_protocols_are_there() -> None:
    general = {"quick", "none", "standard", "black_box", "adaptive", "curve", "audit", "chosen", "nearest"}
    general |= {f"head_to_head_{budget}" for budget in ("paper", "short", "smoke")}
    papers = {"mimae", "mimae_mnist", "shared_info", "shared_info_mnist", "namid", "namid_l2", "ib_rar", "ncmi"}
    assert set(PROTOCOLS) >= general | papers | {"ncmi_l2"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_keys_and_attacks(name: str) -> None:
    config, built = resolved(name), attacks(name)
    common = yaml.safe_load((FOLDER / "_protocol.yaml").read_text())
    assert set(common) <= set(config)
    assert set(config["n_of"]) <= set(config["attacks"]) == set(built)
    assert {"clean", *built} >= set(config["information"])
    for key, attack in built.items():
        description = attack.describe()
        assert description["name"] == key
        assert description["norm"] in ("linf", "l2", "wasserstein")
        assert isinstance(description.get("eps"), float) or "within" in description or "budget" in description


def test_attacks_of_ones_own_choice() -> None:
    """Each has the name of its file."""
    config = resolved("chosen", f"evaluation/attacks=[{','.join(ATTACKS)}]", "evaluation.n=7", data="digits")
    assert list(config["attacks"]) == ATTACKS
    assert config["n"] == 7
    assert {name: attack.name for name, attack in io.build_attacks(config).items()} == {name: name for name in ATTACKS}
    one = resolved("chosen", "evaluation/attacks=[ddn,pgd_20]", "evaluation.attacks.ddn.within=0.25")
    assert list(one["attacks"]) == ["ddn", "pgd_20"]
    assert one["attacks"]["ddn"]["within"] == 0.25


@pytest.mark.parametrize("name", PROTOCOLS)
def test_runs(name: str) -> None:
    """On images of the size of digits, with few steps; what is cheap enough is left as it is."""
    config, x = cheapened(name), images(6, side=8)
    for node in config["attacks"].values():
        if str(node.get("tap")).startswith("block"):  # of VGG16
            node["tap"] = "conv1"
    defense = StandardAT().attach(classifier(0))
    other = io.Surrogate(classifier(1), "other")
    net, y = defense.net, predicted(defense.net, x)
    built = io.bind(io.build_attacks(config), surrogate=other, defense=defense, guides=lambda: (x, torch.arange(6) % 3))
    result = evaluate(net, built, loader(x, y), n=6, n_of=config["n_of"], batch_size=4, progress=False)
    assert {*result.attacks} == {*built, *(f"{key} within" for key in built if getattr(built[key], "within", None))}
    assert result.clean.accuracy == 1


def test_unknown_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"evaluation=standart: expected one of .*standard.* did you mean standard\?"):
        io.compose("standart")
    with pytest.raises(
        ValueError, match=r"evaluation/attacks=pgd_30: expected one of adaptive, .*pgd_20.* did you mean pgd_50"
    ):
        io.compose("chosen", ["evaluation/attacks=[pgd_30]"])
    with pytest.raises(ValueError, match=r"unknown key evaluation.attacks.pgd_20.step: .* did you mean steps\?"):
        io.compose("quick", ["evaluation.attacks.pgd_20.step=1"])
    with pytest.raises(ValueError, match=r"evaluation.attacks.cw_l2 has values, but is no attack of this evaluation"):
        attacks("shared_info_mnist", "evaluation/attacks=[pgd_20]")


# ---------------------------------------------------------------- general protocols
def test_quick_is_what_the_demo_shows() -> None:
    built = attacks("quick")
    assert list(built) == ["fgsm", "pgd_20", "cw_inf", "autoattack"]
    assert {attack.eps for attack in built.values()} == {8 / 255}
    assert (built["pgd_20"].steps, built["pgd_20"].objective) == (20, "cross_entropy")
    assert (built["cw_inf"].steps, built["cw_inf"].objective) == (20, "margin")
    assert built["autoattack"].version == "standard"
    assert built["autoattack"].queries == 5000
    assert resolved("quick")["n_of"] == {"autoattack": 100}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("quick", "digits", "f0460ad06de7"),
        ("none", "digits", "80b9251d61bf"),
        ("head_to_head_short", "cifar10", "73db3b2fab3a"),
        ("mimae", "cifar10", "e34fd9553448"),
        ("mimae_mnist", "digits", "9cd81f6724ac"),
    ],
)
def test_protocols_with_records_are_what_they_were(name: str, data: str, expected: str) -> None:
    """A changed value would part new records from those in results/measured; options that are off do not."""
    assert config_hash({"evaluation": resolved(name, data=data)}) == expected


def test_an_option_that_is_on_is_another_evaluation() -> None:
    def digest(*overrides: str) -> str:
        return config_hash({"evaluation": resolved("quick", *overrides)})

    others = ["evaluation.audit=true", "evaluation.information=[clean]", "evaluation.robust_ncmi=true"]
    assert len({digest(), *(digest(other) for other in others), digest("evaluation.surrogate=a.ckpt")}) == 5
    assert digest("evaluation.audit=false") == digest()


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
    config, built = resolved("head_to_head_short"), attacks("head_to_head_short")
    assert config["n_of"] == dict.fromkeys(["pgd_50x10", "cw_50x10", "square", "autoattack"], 200) | {"adaptive": 1000}
    assert config["audit"]["n"] == 200
    assert all((built[name].steps, built[name].restarts) == (50, 10) for name in ("pgd_50x10", "cw_50x10"))
    assert built["square"].attacks == ("square",)
    assert built["square"].queries == 5000
    net, x = small_conv(), images(3, side=8)
    small = {name: built[name] for name in ("fgsm", "pgd_20", "pgd_50x10")}
    result = evaluate(net, small, loader(x, predicted(net, x)), n_of={"pgd_50x10": 2}, progress=False)
    assert [row.n for row in result.worst_cases()] == [3, 2]
    assert torch.equal(result.index, torch.arange(3))


def test_standard_is_what_the_issue_says() -> None:
    config, built = resolved("standard"), attacks("standard")
    assert list(built) == ["pgd_50x10", "cw_50x10", "autoattack"]
    assert all((built[name].steps, built[name].restarts) == (50, 10) for name in ("pgd_50x10", "cw_50x10"))
    assert (built["pgd_50x10"].objective, built["cw_50x10"].objective) == ("cross_entropy", "margin")
    assert list(built["autoattack"].attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert config["audit"] == {"n": 200, "steps": 50, "restarts": 10, "queries": 1000}
    assert resolved("standard", "evaluation.audit=false")["audit"] is False
    assert (config["n"], config["n_of"]) == (None, {})
    assert resolved("standard", "evaluation.n_of.autoattack=50")["n_of"] == {"autoattack": 50}


def test_a_curve_is_one_attack_at_many_values() -> None:
    built = attacks("curve")
    by_eps = [attack for name, attack in built.items() if name.startswith("pgd_40_eps_")]
    assert [round(attack.eps * 255) for attack in by_eps] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert {(attack.steps, round(attack.step_size / attack.eps, 6)) for attack in by_eps} == {(40, 0.25)}
    by_steps = {name: attack for name, attack in built.items() if name.startswith("pgd_steps_")}
    assert [attack.steps for attack in by_steps.values()] == [1, 2, 5, 10, 20, 50, 100]
    assert {attack.eps for attack in by_steps.values()} == {8 / 255}
    assert list(by_steps)[-1] == "pgd_steps_100"
    fewer = attacks("curve", "evaluation.times=[0.5,1]", "evaluation.curves.pgd_steps.steps=[3]")
    assert list(fewer) == ["pgd_40_eps_0.01569", "pgd_40_eps_0.03137", "pgd_steps_3"]
    with pytest.raises(ValueError, match=r"evaluation.curves.pgd_40_eps: expected lists of one length, got .*'eps': 1"):
        attacks("curve", "evaluation.curves.pgd_40_eps.eps=[0.1]")
    with pytest.raises(ValueError, match=r"evaluation.curves.pgd_steps has 3 twice"):
        attacks("curve", "evaluation.curves.pgd_steps.steps=[3,3]")


# ---------------------------------------------------------------- papers (METHODS A9)
TRANSFER_CW = {"c": 1.0, "kappa": 0.0, "steps": 20, "lr": 0.01}
SETTINGS = {
    ("shared_info_black_box", "transfer_pgd_10"): {"eps": 0.031, "step_size": 0.003, "steps": 10, "kind": "pgd"},
    ("shared_info_black_box", "transfer_pgd_20"): {"eps": 0.031, "step_size": 0.003, "steps": 20},
    ("shared_info_black_box", "transfer_pgd_40"): {"eps": 0.031, "step_size": 0.003, "steps": 40},
    ("shared_info_black_box", "transfer_cw_l2"): {**TRANSFER_CW, "within": None},
    ("shared_info_black_box", "square"): {"eps": 0.031, "queries": 5000, "attacks": ["square"]},
    ("mimae_black_box", "transfer_fgsm"): {"eps": 0.031, "kind": "fgsm"},
    ("mimae_black_box", "transfer_pgd_20"): {"eps": 0.031, "step_size": 0.003, "steps": 20},
    ("mimae_black_box", "transfer_cw_inf"): {"eps": 0.031, "steps": 20, "objective": "margin", "kappa": 50.0},
    ("namid_black_box", "transfer_pgd_40"): {"eps": 8 / 255, "step_size": 2 / 255, "steps": 40},
    ("namid_black_box", "transfer_autoattack"): {"eps": 8 / 255, "version": "standard"},
    ("namid_black_box", "transfer_fwa"): {"budget": 8 / 255, "steps": 40, "kernel": 4, "overflow": "clip"},
    ("namid_black_box", "transfer_ti_dim"): {"step_size": 0.007, "steps": 40, "decay": 0.1, "prob": 0.5},
    ("namid_l2_black_box", "transfer_pgd_40"): {"eps": 0.5, "step_size": 0.125, "steps": 40, "norm": "l2"},
    ("namid_l2_black_box", "transfer_cw_l2"): {**TRANSFER_CW, "within": 0.5},
    ("namid_l2_black_box", "transfer_ddn"): {"steps": 20, "within": 0.5},
    ("shared_info_representation", "representation_10_steps_5_255"): {"eps": 5 / 255, "steps": 10, "tap": "features"},
    ("shared_info_representation", "representation_10_steps_10_255"): {"eps": 10 / 255, "steps": 10},
    ("shared_info_representation", "representation_10_steps_15_255"): {"eps": 15 / 255, "steps": 10},
    ("shared_info_representation", "representation_20_steps_5_255"): {"eps": 5 / 255, "steps": 20},
    ("shared_info_representation", "representation_20_steps_10_255"): {"eps": 10 / 255, "steps": 20},
    ("shared_info_representation", "representation_20_steps_15_255"): {"eps": 15 / 255, "steps": 20},
    ("shared_info", "pgd_20"): {"eps": 0.031, "step_size": 0.003, "steps": 20, "init": "uniform", "norm": "linf"},
    ("shared_info", "pgd_40"): {"eps": 0.031, "step_size": 0.003, "steps": 40, "init": "uniform"},
    ("shared_info", "cw_l2"): {"c": 1.0, "kappa": 0.0, "steps": 20, "lr": 0.01, "within": None},
    ("shared_info", "autoattack"): {"eps": 0.031, "version": "standard", "queries": 5000},
    ("shared_info_mnist", "pgd_20"): {"eps": 0.3, "step_size": 0.01, "steps": 20, "init": "uniform"},
    ("shared_info_mnist", "pgd_40"): {"eps": 0.3, "step_size": 0.01, "steps": 40},
    ("shared_info_mnist", "cw_l2"): {"c": 1.0, "kappa": 0.0, "steps": 20, "lr": 0.003},
    ("shared_info_mnist", "autoattack"): {"eps": 0.3, "version": "standard"},
    ("namid", "pgd_40"): {"eps": 8 / 255, "step_size": 2 / 255, "steps": 40, "norm": "linf"},
    ("namid", "autoattack"): {"eps": 8 / 255, "version": "standard"},
    ("namid", "fwa"): {"budget": 8 / 255, "steps": 40, "kernel": 4, "overflow": "clip"},
    ("namid", "ti_dim"): {"eps": 8 / 255, "step_size": 0.007, "steps": 40, "decay": 0.1, "prob": 0.5},
    ("namid_l2", "pgd_40"): {"eps": 0.5, "step_size": 0.125, "steps": 40, "norm": "l2"},
    ("namid_l2", "cw_l2"): {"steps": 20, "lr": 0.01, "within": 0.5},
    ("namid_l2", "ddn"): {"steps": 20, "within": 0.5},
    ("ib_rar", "pgd_10"): {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "init": "uniform"},
    ("ib_rar", "fgsm"): {"eps": 8 / 255},
    ("ib_rar", "fab"): {"steps": 100, "within": 8 / 255, "norm": "linf"},
    ("ib_rar", "ni_fgsm"): {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "decay": 1.0},
    ("ib_rar", "cw_l2_200"): {"c": 0.1, "kappa": 0.0, "steps": 200, "lr": 0.1},
    ("ncmi", "pgd_40"): {"eps": 8 / 255, "step_size": 2 / 255, "steps": 40, "init": "uniform"},
    ("ncmi", "cw_inf_40"): {"eps": 8 / 255, "steps": 40, "objective": "margin", "kappa": 0.0, "step_size": 2 / 255},
    ("ncmi", "autoattack"): {"eps": 8 / 255, "version": "standard"},
    ("ncmi", "square"): {"eps": 8 / 255, "queries": 5000, "attacks": ["square"]},
    ("ncmi_l2", "pgd_20"): {"eps": 128 / 255, "step_size": 15 / 255, "steps": 20, "norm": "l2"},
    ("ncmi_l2", "cw_20"): {"eps": 128 / 255, "step_size": 15 / 255, "steps": 20, "norm": "l2", "objective": "margin"},
    ("mimae", "pgd_20"): {"eps": 0.031, "step_size": 0.003, "steps": 20, "init": "uniform"},
    ("mimae", "pgd_50"): {"eps": 0.031, "step_size": 0.003, "steps": 50},
    ("mimae", "cw_inf"): {"eps": 0.031, "step_size": 0.003, "steps": 20, "objective": "margin", "kappa": 50.0},
    ("mimae", "pgd_l2"): {"eps": 0.5, "step_size": 0.003, "steps": 20, "norm": "l2", "init": "uniform"},
    ("mimae_mnist", "pgd_40"): {"eps": 0.3, "step_size": 0.005, "steps": 40, "init": "zero"},
}


@pytest.mark.parametrize(("name", "attack"), SETTINGS)
def test_a_paper_is_evaluated_as_it_was(name: str, attack: str) -> None:
    description = attacks(name)[attack].describe()
    expected = SETTINGS[name, attack]
    for key, value in expected.items():
        found = description[key]
        assert found == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), (key, found)


@pytest.mark.parametrize("name", sorted({name for name, _ in SETTINGS} - {"mimae", "mimae_mnist"}))
def test_a_paper_has_the_attacks_that_it_has(name: str) -> None:
    config = resolved(name)
    assert set(config["attacks"]) == {attack for paper, attack in SETTINGS if paper == name}
    assert config["n"] is None, "the whole test split"
    assert config["n_of"] == {}


def test_ncmi_measures_its_own_quantities() -> None:
    config = resolved("ncmi")
    assert config["information"] == ["clean", "pgd_40", "autoattack"]
    assert (config["robust_ncmi"]["rounds"], config["robust_ncmi"]["steps"]) == (5, 20)
