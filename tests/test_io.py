"""Between configurations and objects: what is built, what a checkpoint gives back, and what mistakes are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import mi_at
from mi_at import io
from mi_at.data.digits import Digits
from mi_at.models.cnn import CNNTiny

MODEL = {
    "_target_": "mi_at.models.cnn.CNNTiny",
    "num_classes": 10,
    "in_channels": 1,
    "image_size": 8,
    "width": 0.2,
    "batch_norm": True,
}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "dataset": {"_target_": "mi_at.data.digits.Digits"},
    "defense": {"_target_": "mi_at.defenses.ce.CE"},
    "regularizer": {},
}


def checkpoint(path: Path, **changes: Any) -> Path:
    """A file as a run writes it, as far as `io` reads it."""
    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.2, batch_norm=True)
    state = {f"net.{name}": value for name, value in net.state_dict().items()} | {"regularizers.a.b": torch.ones(1)}
    content = {"state_dict": state, "mi_at": {"config": CONFIG}, "epoch": 4, "global_step": 100}
    torch.save({**content, **changes}, path)
    return path


# ---------------------------------------------------------------- checkpoints
def test_load_gives_the_network_back(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "best.ckpt")
    for found in (mi_at.load(path), mi_at.load(str(path)), io.load(path, torch.device("cpu"))):
        assert isinstance(found, CNNTiny)
        assert not any(module.training for module in found.modules())
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(value, state[f"net.{name}"]) for name, value in found.state_dict().items())


def test_load_does_not_disturb_the_random_state_of_the_weights(tmp_path: Path) -> None:
    """Twice the same network, whatever was drawn in between."""
    path = checkpoint(tmp_path / "best.ckpt")
    x = torch.rand(2, 1, 8, 8)
    torch.manual_seed(1)
    first = mi_at.load(path)(x)
    torch.manual_seed(2)
    assert torch.equal(mi_at.load(path)(x), first)


def test_read_checkpoint(tmp_path: Path) -> None:
    found = io.read_checkpoint(checkpoint(tmp_path / "epoch_005.ckpt"))
    assert (found.epoch, found.step, found.path.stem) == (5, 100, "epoch_005")
    assert found.config["model"] == MODEL
    assert "regularizers.a.b" not in found.net_state, "the network's alone"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**MODEL, "batch_norm": False}, r"does not fit the network CNNTiny: missing: .*; unexpected: .*running_mean"),
        ({**MODEL, "width": 0.4}, r"of another shape: .* \(.*\) instead of \(.*\) \.\.\."),
        (
            {**MODEL, "num_classes": 5},
            r"of another shape: head.weight \(10, 26\) instead of \(5, 26\), head.bias \(10,\)",
        ),
    ],
)
def test_weights_of_another_network(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    found = io.read_checkpoint(checkpoint(tmp_path / "best.ckpt"))
    net = io.build_net(model)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(io.CheckpointError, match=message):
        io.load_weights(net, found)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "nothing was loaded"


HOSTILE = {"_target_": "subprocess.Popen", "args": ["touch", "executed"]}


@pytest.mark.parametrize(
    "model", [HOSTILE, {**MODEL, "mean": HOSTILE}, {**HOSTILE, "_target_": "os.system"}, {"_target_": "builtins.eval"}]
)
def test_a_configuration_cannot_run_what_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    """A checkpoint may come from anywhere, and its configuration with it."""
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "best.ckpt", mi_at={"config": {**CONFIG, "model": model}})
    with pytest.raises(ValueError, match=r"model\.(_target_|mean)"):
        mi_at.load(path)
    with pytest.raises(ValueError, match=r"dataset\.(_target_|mean)"):
        io.build_data(model if "mean" not in model else {"_target_": "mi_at.data.digits.Digits", "mean": HOSTILE})
    assert not (tmp_path / "executed").exists()


TRADES = {"_target_": "mi_at.defenses.trades.Trades"}


@pytest.mark.parametrize(
    "changes",
    [
        {"defense": HOSTILE},
        {"defense": {**TRADES, "beta": HOSTILE}},
        {"defense": {**TRADES, "unknown": {"deep": [HOSTILE]}}},
        {"regularizer": {"mi": HOSTILE}},
        {"regularizer": {"mi": {"_target_": "mi_at.regularizers.mi.MutualInformation", "lambda_mi": [HOSTILE]}}},
    ],
)
def test_a_configuration_cannot_run_what_is_no_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Nothing that a method's node holds is made into an object, however deep."""
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "best.ckpt", mi_at={"config": {**CONFIG, **changes}})
    (where,) = changes
    with pytest.raises(ValueError, match=rf"{where}.*_target_"):
        mi_at.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("config", [{}, {"model": MODEL}, {**CONFIG, "regularizer": ["mi"]}, None, "digits"])
def test_a_configuration_that_is_none(tmp_path: Path, config: Any) -> None:
    with pytest.raises(io.CheckpointError, match="no whole configuration: expected model, dataset"):
        mi_at.load(checkpoint(tmp_path / "best.ckpt", mi_at={"config": config}))


@pytest.mark.parametrize("content", [b"", b"hello world", b"version https://example.org/spec/v1\noid sha256:0\n"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.ckpt"
    path.write_bytes(content)
    with pytest.raises(io.CheckpointError, match=r"best\.ckpt"):
        mi_at.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "text"])
def test_weights_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    path = checkpoint(tmp_path / "best.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.head.bias"] = value if isinstance(value, str) else torch.full((10,), value)
    torch.save(content, path)
    with pytest.raises(io.CheckpointError, match=r"net\.head\.bias|head\.bias"):
        mi_at.load(path)


def test_weights_that_are_missing_altogether(tmp_path: Path) -> None:
    with pytest.raises(io.CheckpointError, match="was not written by mi_at"):
        mi_at.load(checkpoint(tmp_path / "best.ckpt", state_dict=None))


# ---------------------------------------------------------------- building
def test_build_net_is_seeded_by_the_global_state() -> None:
    torch.manual_seed(0)
    one = io.build_net(MODEL)
    torch.manual_seed(0)
    other = io.build_net(MODEL)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Lazy(nn.Sequential):
    """Its size depends on the images."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Dropout(0.5))
        self[3].eval()


def test_lazy_layers_get_their_sizes() -> None:
    node = {"_target_": f"{__name__}.Lazy", "in_channels": 3, "image_size": 5}
    built = []
    for _ in range(2):
        torch.manual_seed(0)
        built.append(io.build_net(node))
    shapes = {name: tuple(value.shape) for name, value in built[0].state_dict().items() if name.endswith("weight")}
    assert shapes == {"1.weight": (4, 75), "2.weight": (4,)}
    assert type(built[0][1]) is nn.Linear  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(built[0].parameters(), built[1].parameters(), strict=True))
    assert [module.training for module in built[0]] == [True, True, True, False]  # type: ignore[union-attr]
    assert all(parameter.requires_grad for parameter in built[0].parameters())
    assert int(built[0].state_dict()["2.num_batches_tracked"]) == 0
    with pytest.raises(
        ValueError, match=r"size of layer 1 \(LazyLinear\) .*: set model.in_channels and model.image_size"
    ):
        io.build_net({"_target_": f"{__name__}.Lazy"})


def test_a_network_of_mi_at_takes_exactly_its_options() -> None:
    with pytest.raises(ValueError, match=r"model: .*unexpected keyword argument 'depth'"):
        io.build_net({**MODEL, "depth": 3})


def test_another_network_takes_the_options_it_names() -> None:
    node = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2, "image_size": 8}
    net = io.build_net(node)
    assert isinstance(net, nn.Linear)
    assert (net.in_features, net.out_features) == (3, 2)


def test_build_data_leaves_the_customary_values_out() -> None:
    data = io.build_data(
        {
            "_target_": "mi_at.data.digits.Digits",
            "eps": 0.1,
            "norm": "linf",
            "epochs": 3,
            "lr": 0.1,
            "steps": 10,
            "step_size": 0.1,
            "batch_size": 5,
        }
    )
    assert isinstance(data, Digits)
    assert data.batch_size == 5


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "mi_at.defenses.trades.Trades", "beta": "six"}, r"defense.beta='six': expected a number$"),
        ({"_target_": "mi_at.defenses.trades.Trades", "beta": True}, r"defense.beta=True: expected a number$"),
        ({"_target_": "mi_at.defenses.trades.Trades", "beta": None}, r"defense.beta=None: expected a number$"),
        ({"_target_": "mi_at.defenses.trades.Trades", "beta": [6.0]}, r"defense.beta=\[6.0\]: expected a number$"),
        (
            {"_target_": "mi_at.defenses.mma.MMA", "bisection_steps": 2.5},
            "bisection_steps=2.5: expected a whole number",
        ),
        ({"_target_": "mi_at.defenses.mma.MMA", "variant": 1}, "defense.variant=1: expected a word"),
        ({"_target_": "mi_at.defenses.mma.MMA", "max_margin": False}, "max_margin=False: expected a number or a word"),
        ({"_target_": "mi_at.optim.SGD", "lr": 0.1, "epochs": 1, "nesterov": 1}, "nesterov=1: expected true or false"),
        ({"_target_": "mi_at.optim.SGD", "lr": 0.1, "epochs": 1, "paper_epochs": "x"}, "a whole number or null"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        io.build("defense", node)


def test_fractions_become_numbers() -> None:
    assert io.build("defense", {"_target_": "mi_at.defenses.trades.Trades", "beta": "1/2"}).beta == 0.5
    assert io.build("defense", {"_target_": "mi_at.defenses.trades.Trades", "beta": 3}).beta == 3
    attack = {"_target_": "mi_at.attacks.inner.InnerMaximisation", "norm": "linf", "steps": 3}
    assert io.build("attack", {**attack, "eps": "8/255", "step_size": "2 / 255"}).eps == 8 / 255


def test_what_is_not_annotated_plainly_is_left_alone() -> None:
    made = io.build("optim", {"_target_": "mi_at.optim.SGD", "lr": 0.1, "epochs": 4, "milestones": [1, 2]})
    assert list(made.milestones) == [1, 2]
    assert io.build("own", {"_target_": "collections.OrderedDict", "a": "b"}) == {"a": "b"}


def test_attacks_are_built_by_name() -> None:
    node = {"_target_": "mi_at.attacks.fgsm.FGSM", "eps": "8/255", "norm": "linf"}
    attacks = io.build_attacks({"attacks": {"weak": node}})
    assert attacks["weak"].describe()["eps"] == 8 / 255


# ---------------------------------------------------------------- evaluations
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit": "yes"}, "evaluation.audit='yes': expected true, false, or options: n, steps"),
        ({"audit": {"step": 3}}, r"unknown key evaluation.audit.step: expected one of n, steps.*did you mean steps\?"),
        ({"robust_ncmi": {"round": 3}}, r"unknown key evaluation.robust_ncmi.round.*did you mean rounds\?"),
        (
            {"audit": True, "eps": "0/255"},
            "evaluation.eps=0/255: at 0 there is nothing to audit; evaluation.audit=false",
        ),
        ({"information": ["clean", "pgd_4"]}, r"evaluation.information=pgd_4: .* clean, pgd_40; did you mean pgd_40\?"),
        ({"robust_ncmi": True, "eps": None}, "evaluation.robust_ncmi needs a ball, and this protocol has no eps"),
    ],
)
def test_what_an_evaluation_adds_is_checked_before_it_begins(changes: dict[str, Any], message: str) -> None:
    evaluation = {"attacks": {"pgd_40": {}}, "n_of": {}, "eps": 0.1, **changes}
    if evaluation["eps"] is None:
        del evaluation["eps"]
    with pytest.raises(ValueError, match=message):
        io.resolve_evaluation(evaluation)


def test_an_evaluation_without_extras_is_left_as_it_is() -> None:
    evaluation = {"attacks": {"a": {"eps": 1}}, "n_of": {"a": 3, "b": None}, "n": None, "audit": False}
    assert io.resolve_evaluation(evaluation) == {**evaluation, "n_of": {"a": 3}}


# ---------------------------------------------------------------- configurations
def test_a_protocol_is_composed_within_another_application(compose: Any) -> None:
    """What Hydra has going on stays as it was."""
    before = compose(["seed=3"])
    assert list(io.compose("quick").evaluation.attacks) == ["fgsm", "pgd_20", "cw_inf", "autoattack"]
    assert compose(["seed=3"]) == before


def test_the_configuration_folder_is_found_from_anywhere(run_folder: Path) -> None:
    assert (Path(io.conf_dir()) / "train.yaml").is_file()
    assert Path(io.conf_dir()).is_absolute()


def test_keys_of_a_recipe_are_those_of_all_it_includes() -> None:
    keys = io.recipe_keys("mimae_cifar100_wrn34_10")
    assert {"defense.lambda_mi", "optim.weight_decay", "attack.eps", "dataset.batch_size"} <= set(keys)
    assert "select" not in keys


def test_plain_resolves() -> None:
    io.register_resolvers()
    cfg = OmegaConf.create({"a": {"eps": "8/255"}, "b": "${a.eps}", "c": "${mul:1.25,${a.eps}}", "d": [1, "${b}"]})
    assert io.plain(cfg) == {"a": {"eps": "8/255"}, "b": "8/255", "c": 10 / 255, "d": [1, "8/255"]}
    with pytest.raises(ValueError, match="expected a configuration with keys, got a list"):
        io.plain(OmegaConf.create([1]))


def test_explain_names_the_keys_there_are() -> None:
    cfg = OmegaConf.create({"defense": {"beta": 1.0, "lambda_mi": 0.4}})
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(AttributeError) as caught:
        cfg.defense.lamda_mi = 1
    assert io.explain(caught.value) == (
        "unknown key defense.lamda_mi: defense has beta, lambda_mi; did you mean lambda_mi?"
    )
    assert io.explain(ValueError("plain")) == "plain"


# ---------------------------------------------------------------- memory
FAULTS = """
import resource, torch
from mi_at import io
io.reuse_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.rand(1 << 22)
before = faults()
for _ in range(8):
    torch.rand(1 << 22)  # 16 MiB each
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_freed_memory_is_used_again_unless_the_user_says_otherwise() -> None:
    def run(**environment: str) -> int:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run([sys.executable, "-c", FAULTS], env=kept | environment, capture_output=True, check=True)
        return int(done.stdout)

    assert 4 * run() < run(MALLOC_MMAP_THRESHOLD_="65536")
