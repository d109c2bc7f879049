"""What an attack needs beside the network: a surrogate, the training loss, the layer that was regularised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at import io
from mi_at.attacks.adaptive import Adaptive, FeatureShift
from mi_at.attacks.fgsm import FGSM
from mi_at.defenses.base import Defense
from mi_at.evaluation.outcomes import EvalAttack
from tests.commands import command, tiny

BALL: dict[str, Any] = {"eps": 0.15, "norm": "linf", "step_size": 0.03}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.ckpt of a run whose defense and regularizer keep states of their own."""
    folder = tmp_path_factory.mktemp("run")
    done = command(folder, *tiny("run_dir=.", "defense=shared_info", "regularizer=[ncmi,ib_rar]"))
    assert done.code == 0, done.err
    return folder / "last.ckpt"


@pytest.fixture
def defense(run: Path) -> Defense:
    return io.load_defense(run)


# ---------------------------------------------------------------- loading
def test_a_defense_comes_back_whole(run: Path, defense: Defense) -> None:
    """The network is the one that `load` gives, and the states of the terms are those of the end of training."""
    net, state = io.load(run), torch.load(run, weights_only=True)["state_dict"]
    found = defense.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    assert any(name.startswith("regularizers.ncmi.") for name in found), "centroids"
    assert {name: tensor.sum() for name, tensor in net.state_dict().items()} == {
        name: tensor.sum() for name, tensor in defense.net.state_dict().items()
    }
    assert not any(module.training for module in defense.modules())
    assert defense.scaled(120) == 2, "its epochs are those of the run"


def test_states_that_do_not_fit_are_named(run: Path, tmp_path: Path) -> None:
    content = torch.load(run, weights_only=True)
    centroids = next(name for name in content["state_dict"] if name.startswith("regularizers.ncmi."))
    del content["state_dict"][centroids]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(io.CheckpointError, match=rf"does not fit its own defense SharedInfo: missing: {centroids}"):
        io.load_defense(tmp_path / "last.ckpt")


def test_raw_weights_beside_their_average_are_a_version_for_the_audit(run: Path, tmp_path: Path) -> None:
    """Training went on with them; what is served is the average."""
    averaged = ("callback=ema", "callback.ema.decay=0.5", "defense=ib_rar", "evaluation=audit")
    done = command(tmp_path, *tiny("run_dir=.", *averaged, "evaluation.audit.queries=20"))
    assert done.code == 0, done.err
    path = tmp_path / "last.ckpt"
    raw, state = io.load_raw(path), torch.load(path, weights_only=True)["current_model_state"]
    assert raw is not None
    assert all(torch.equal(value, state[f"net.{name}"]) for name, value in raw.state_dict().items())
    served = io.load(path).state_dict()
    assert any(not torch.equal(value, served[name]) for name, value in raw.state_dict().items())
    assert not any(module.training for module in raw.modules())
    findings = json.loads((tmp_path / "record.json").read_text())["audit"]["findings"]
    said = next(finding for finding in findings if finding["check"] == "transfer_failure")
    assert "made on the raw weights" in said["measured"]
    assert io.load_raw(run) is None


# ---------------------------------------------------------------- attacks
@dataclass(frozen=True, kw_only=True)
class OnAnother:
    """An attack that is made on another network."""

    surrogate: nn.Module | None = None

    def with_surrogate(self, net: nn.Module, *, name: str | None = None, accuracy: float | None = None) -> OnAnother:
        return OnAnother(surrogate=net)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"attack": "on_another"}


def test_what_needs_nothing_is_left_alone(defense: Defense) -> None:
    attacks: dict[str, EvalAttack] = {"fgsm": FGSM(eps=0.1)}
    assert io.bind(attacks) == io.bind(attacks, surrogate=io.Surrogate(defense.net, ""), defense=defense) == attacks


def test_a_surrogate_is_bound_or_asked_for(defense: Defense) -> None:
    bound: Any = io.bind({"black": OnAnother()}, surrogate=io.Surrogate(defense.net, "it"))
    assert bound["black"].surrogate is defense.net
    with pytest.raises(
        ValueError, match=r"evaluation.attacks.black is made on another network: .*evaluation.surrogate="
    ):
        io.bind({"black": OnAnother()})


def test_the_training_loss_is_bound_or_asked_for(defense: Defense) -> None:
    x, y, ids = torch.rand(6, 1, 8, 8), torch.arange(6), torch.arange(6)
    bound = io.bind({"own": Adaptive(**BALL, steps=2)}, defense=defense)
    x_adv = bound["own"](defense.net, x, y, ids=ids, seed=0)
    loss = defense.training_objective(x, y, ids)
    assert float(loss(x_adv).sum()) > float(loss(x).sum())
    with pytest.raises(ValueError, match=r"evaluation.attacks.own maximises the loss of the training"):
        io.bind({"own": Adaptive(**BALL, steps=2)})


def test_the_layer_is_the_one_that_was_regularised(defense: Defense) -> None:
    shift = FeatureShift(**BALL, steps=2, tap="auto")
    bound: Any = io.bind({"shift": shift, "other": FeatureShift(**BALL, steps=2, tap="stem")}, defense=defense)
    assert bound["shift"].tap == defense.needed_taps[-1] != "features"
    assert bound["other"].tap == "stem"
    alone: Any = io.bind({"shift": shift})
    assert alone["shift"].tap == "features"


def test_the_attacks_of_an_audit_are_in_its_ball(defense: Defense) -> None:
    found = io.adaptive_attacks(defense, {**BALL, "n": None})
    assert set(found) == {"adaptive", "feature_shift"}
    for attack in found.values():
        description = attack.describe()
        assert {key: description[key] for key in BALL} == BALL


# ---------------------------------------------------------------- surrogates
def test_a_surrogate_of_another_data_set_is_refused(run: Path) -> None:
    dataset = io.read_checkpoint(run).config["dataset"]
    found = io.load_surrogate(run, dataset)
    assert found.name == "shared_info-digits-cnn_tiny"
    assert torch.equal(found.net(torch.zeros(1, 1, 8, 8)), io.load(run)(torch.zeros(1, 1, 8, 8)))
    for key, value in {"name": "mnist", "num_classes": 5, "image_size": 28, "channels": 3}.items():
        with pytest.raises(ValueError, match=rf"surrogate=.*was trained on digits \({key} .*{value}.*of the same data"):
            io.load_surrogate(run, {**dataset, key: value})
