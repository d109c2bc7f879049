"""Training on k processes is training on one: views, losses, gradients, readings and metrics, and the real command.

Every process holds the whole loss and its own shard's part of the gradient (`mi_at.functional.distributed`). Batches
divide by neither 2 nor 3. One gloo group per k runs all cases.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mi_at.attacks.inner import Inner, InnerMaximisation, Objective
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.data.batch import Batch
from mi_at.data.digits import Digits
from mi_at.defenses.alp import Alp
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.mart import Mart
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.mma import MMA
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.functional.distributed import gather, world_size
from mi_at.functional.information import joint_distribution, mutual_information
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.base import Regularizer, Views
from mi_at.regularizers.mi import MutualInformation

pytestmark = pytest.mark.ddp

EPS = 0.15
TRAIN = [53, 53, 43]  # sizes of the global batches: uneven over 2 and over 3 processes
VAL = [20, 20, 21]
# Where it is compared, and how closely. Half trained, entries of a gradient reach 8, of which float32 keeps 1e-6 at
# best; float64 shows there that nothing but rounding differs.
CLOSE = {"fresh, float32": 1e-6, "half trained, float64": 1e-12}


State = dict[str, Tensor]


class Joint(Regularizer):
    """A term that reads a tap, and an attack whose objective is joint over the global batch."""

    taps = ("features",)

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        with torch.no_grad():
            clean = gather(net(batch.x).double().softmax(dim=1), batch.global_size)

        def objective(x: Tensor) -> Tensor:
            probabilities = gather(net(x).double().softmax(dim=1), batch.global_size)
            return -mutual_information(joint_distribution(clean, probabilities))

        return {"cluster": Inner(objective, init="uniform")}

    def terms(self, views: Views) -> dict[str, Tensor]:
        clean, cluster = views.tap("clean", "features"), views.tap("cluster", "features")
        correlation = (clean - clean.mean(dim=0)) * (cluster - cluster.mean(dim=0))
        return {"correlation": -0.01 * correlation.mean(dim=0).square().sum().sqrt()}


CASES: dict[str, Callable[[], tuple[Defense, dict[str, Regularizer]]]] = {
    "ce": lambda: (CE(), {}),
    "standard_at": lambda: (StandardAT(), {}),
    "trades": lambda: (Trades(beta=6.0), {}),
    "mart": lambda: (Mart(beta=5.0), {}),
    "alp": lambda: (Alp(alpha=0.5), {}),
    "mma_simplified": lambda: (MMA(), {}),
    "mma_full": lambda: (MMA(variant="full", max_margin=0.3, min_margin=0.05), {}),
    "mimae": lambda: (Mimae(lambda_mi=0.4, beta=1.0), {}),
    "standard_at+mi": lambda: (StandardAT(), {"mi": MutualInformation(lambda_mi=0.4)}),
    "standard_at+joint": lambda: (StandardAT(), {"joint": Joint()}),
}


class Step(nn.Module):
    """What is wrapped for several processes, as Lightning does: its forward is the training step."""

    def __init__(self, defense: Defense) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, batch: Batch) -> Tensor:
        return self.defense.training_step(batch, batch.batch_idx)


def network(state: State | None = None) -> CNNTiny:
    """Of the data type of its weights."""
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8)
    if state is not None:
        net.to(next(iter(state.values())).dtype).load_state_dict(state)
    return net


def digits() -> Digits:
    data = Digits(batch_size=TRAIN[0], train_size=sum(TRAIN), val_size=sum(VAL), eval_batch_size=VAL[0], seed=3)
    data.setup("fit")
    return data


def batches(net: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Numbered, images of the network's data type."""
    for number, batch in enumerate(loader):
        batch.x = batch.x.to(next(net.parameters()).dtype)
        yield number, batch


def examples() -> AdversarialExamples:
    return AdversarialExamples(InnerMaximisation(norm="linf", eps=EPS, step_size=EPS / 2, steps=3), seed=1)


def trainer_at(epoch: int) -> Any:
    """What the callbacks read of a Trainer."""
    return SimpleNamespace(
        current_epoch=epoch,
        num_training_batches=len(TRAIN),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )


def attached(name: str, state: State) -> Defense:
    defense, regularizers = CASES[name]()
    defense.inspect_every = 0
    return defense.attach(network(state), regularizers=regularizers)


def wrap(defense: Defense) -> nn.Module:
    step = Step(defense)
    return DistributedDataParallel(step) if world_size() > 1 else step


def gradients(defense: Defense) -> State:
    return {name: p.grad.clone() for name, p in defense.net.named_parameters() if p.grad is not None}


def backward(step: nn.Module, batch: Batch) -> Tensor:
    """The loss of the global batch; gradients are those of the whole afterwards."""
    step.zero_grad(set_to_none=True)
    loss = step(batch)
    loss.backward()
    return loss.detach() / world_size()


def train(name: str, state: State) -> dict[str, Any]:
    """A pass over the batches at fixed weights; two with the search whose starts the first pass finds."""
    defense = attached(name, state)
    step, callback, loader = wrap(defense), examples(), digits().train_dataloader()
    steps = []
    for epoch in range(2 if name == "mma_full" else 1):
        for number, batch in batches(defense.net, loader):
            assert batch.global_size == TRAIN[number]
            callback.on_train_batch_start(trainer_at(epoch), defense, batch, number)
            loss = backward(step, batch)
            shares = defense.term_shares(defense.all_terms(Views(defense.net, batch, defense.needed_taps)))
            steps.append({"loss": loss, "gradients": gradients(defense), "views": dict(batch.views), "shares": shares})
    accuracy = {key: metric.compute() for key, metric in defense._accuracy.items() if metric.update_count}
    return {"steps": steps, "accuracy": accuracy, "margins": getattr(defense, "margins", torch.empty(0))}


def perturb(state: State) -> dict[str, Any]:
    """A batch under adversarial weight perturbation: where the weights go, the gradient there, and the way back."""
    defense = attached("trades", state)
    step, callback, awp = wrap(defense), examples(), AdversarialWeightPerturbation(gamma=0.01, warmup_epochs=0)
    _, batch = next(batches(defense.net, digits().train_dataloader()))
    callback.on_train_batch_start(trainer_at(0), defense, batch, 0)
    awp.on_train_batch_start(trainer_at(0), defense, batch, 0)
    moved = {name: p.detach().clone() for name, p in defense.net.named_parameters()}
    loss = backward(step, batch)
    while defense.undo_before_hooks:
        defense.undo_before_hooks.pop()()
    restored = {name: p.detach().clone() for name, p in defense.net.named_parameters()}
    return {"weights": moved, "loss": loss, "gradients": gradients(defense), "restored": restored}


def validate(state: State) -> dict[str, Any]:
    """Accuracies of a validation, and its views."""
    defense, callback, views = attached("standard_at", state), examples(), []
    for number, batch in batches(defense.net, digits().val_dataloader()):
        callback.on_validation_batch_start(trainer_at(0), defense, batch, number)
        views.append(dict(batch.views))
        with torch.no_grad():
            defense.validation_step(batch, number)
    return {"views": views, "accuracy": {name: metric.compute() for name, metric in defense._selection.items()}}


def everything(rank: int, processes: int, weights: dict[str, State]) -> dict[str, Any]:
    """All cases on this process."""
    assert world_size() == processes
    return {
        where: {name: train(name, state) for name in CASES} | {"awp": perturb(state), "validation": validate(state)}
        for where, state in weights.items()
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, State]:
    """A fresh network, and one half trained, so that right and wrong samples, and terms far from zero, occur."""
    torch.manual_seed(0)
    net = network()
    fresh = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = digits().train_dataloader()
    for _ in range(12):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.x), batch.y).backward()
            optimizer.step()
    half_trained = {name: value.double() for name, value in net.state_dict().items()}
    return dict(zip(CLOSE, (fresh, half_trained), strict=True))


@pytest.fixture(scope="module")
def alone(weights: dict[str, State]) -> dict[str, Any]:
    return everything(0, 1, weights)


_groups: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=[2, 3], ids=lambda k: f"{k} processes")
def group(request: pytest.FixtureRequest, spawn: Callable[..., Any], weights: dict[str, State]) -> Any:
    """The results of k processes by rank, computed once."""
    k = request.param
    if k not in _groups:
        _groups[k] = spawn(everything, k, weights, timeout=600.0)
    return _groups[k]


@pytest.fixture(params=CLOSE)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_same(value: State, expected: State, tolerance: float) -> None:
    assert value.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(value[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_views(group: list[dict[str, Any]], pick: Callable[[dict[str, Any]], State], expected: State) -> None:
    """Shards put together are the views of one process, bit for bit."""
    for view, images in expected.items():
        found = torch.cat([pick(result)[view] for result in group])
        assert torch.equal(found, images), f"{view}: {(found != images).sum()} pixels differ"


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(name: str, where: str, group: Any, alone: dict[str, Any]) -> None:
    for number, expected in enumerate(alone[where][name]["steps"]):
        assert max(float(g.abs().max()) for g in expected["gradients"].values()) > 1e-3
        for result in group:
            found = result[where][name]["steps"][number]
            tolerance = 1e-6 if name == "standard_at+joint" else CLOSE[where]  # taps are float32
            assert_same({"loss": found["loss"]}, {"loss": expected["loss"]}, tolerance)
            assert_same(found["gradients"], expected["gradients"], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_adversarial_examples_are_those_of_one_process(
    name: str, where: str, group: Any, alone: dict[str, Any]
) -> None:
    for number, expected in enumerate(alone[where][name]["steps"]):
        assert_views(group, lambda result, n=number: result[where][name]["steps"][n]["views"], expected["views"])


@pytest.mark.parametrize("name", CASES)
def test_readings_are_those_of_one_process(name: str, where: str, group: Any, alone: dict[str, Any]) -> None:
    expected = alone[where][name]
    for result in group:
        for found, step in zip(result[where][name]["steps"], expected["steps"], strict=True):
            assert_same(found["shares"], step["shares"], 1e-6)
        assert result[where][name]["accuracy"] == expected["accuracy"]


def test_margins_are_known_to_every_process(group: Any, alone: dict[str, Any]) -> None:
    expected = alone["half trained, float64"]["mma_full"]["margins"]
    assert (expected > 0.05).sum() > 20  # found by the search, not those it starts with
    for result in group:
        assert torch.equal(result["half trained, float64"]["mma_full"]["margins"], expected)


def test_weights_are_perturbed_along_the_gradient_of_the_whole_batch(
    where: str, group: Any, alone: dict[str, Any], weights: dict[str, State]
) -> None:
    expected, before = alone[where]["awp"], weights[where]
    moved = {name for name, weight in expected["weights"].items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in before.items() if weight.ndim > 1}
    for result in group:
        found = result[where]["awp"]
        assert_same(found["weights"], expected["weights"], CLOSE[where])
        assert_same({"loss": found["loss"]}, {"loss": expected["loss"]}, CLOSE[where])
        assert_same(found["gradients"], expected["gradients"], CLOSE[where])
        assert_same(found["restored"], before, CLOSE[where])


def test_validation_is_that_of_one_process(where: str, group: Any, alone: dict[str, Any]) -> None:
    expected = alone[where]["validation"]
    assert expected["accuracy"]["robust"] < expected["accuracy"]["clean"] < 1
    for result in group:
        assert result[where]["validation"]["accuracy"] == expected["accuracy"]
    for number, views in enumerate(expected["views"]):
        assert_views(group, lambda result, n=number: result[where]["validation"]["views"][n], views)


# ---------------------------------------------------------------- the command
KILL = "MI_AT_TEST_KILL_AT"
SETTINGS = (
    "budget=smoke",
    "model.width=0.5",
    "dataset.train_size=149",
    "dataset.batch_size=53",
    "attack.steps=3",
    "evaluation.n=5",
    "save_every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "run_dir=run",
    "+callback.kill._target_=tests.test_ddp.Kill",
)


class Kill(Callback):
    """Kill -9 to all processes of the run, at the step that the environment names."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if str(trainer.global_step) == os.environ.get(KILL) and trainer.global_rank == 0:
            os.killpg(0, signal.SIGKILL)


def on_two_processes(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The user's command; it starts its second process itself."""
    arguments = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *SETTINGS, *overrides]
    variables = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
    return subprocess.run(
        [sys.executable, "-m", "mi_at.train", *arguments],
        cwd=folder,
        env={**variables, **os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        start_new_session=True,
        check=False,
    )


def logged(folder: Path) -> dict[tuple[int, str], float]:
    """The numbers in metrics.csv by (step, name); speeds left out."""
    with (folder / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch") and not name.startswith("speed/")
        }


def test_the_command_on_two_processes_killed_and_resumed_ends_where_one_process_does(tmp_path: Path) -> None:
    # Here and not above: the groups do not need Hydra, and every process imports this file.
    from mi_at import io
    from tests.commands import command

    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    killed = on_two_processes(two, **{KILL: "5"})  # of 6 steps, 3 an epoch; the last checkpoint is of step 4
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert io.read_checkpoint(two / "run" / "last.ckpt").step == 4

    resumed = on_two_processes(two, "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    alone = command(one, *SETTINGS)
    assert alone.code == 0, alone.err

    assert len(list(two.rglob("record.json"))) == 1
    records = [json.loads((folder / "run" / "record.json").read_text()) for folder in (two, one)]
    assert records[0]["config_hash"] == records[1]["config_hash"]
    for checkpoint in ("last.ckpt", "best.ckpt"):
        found, expected = (io.read_checkpoint(folder / "run" / checkpoint) for folder in (two, one))
        assert (found.step, found.epoch) == (expected.step, expected.epoch)
        for name, value in expected.net_state.items():
            torch.testing.assert_close(found.net_state[name], value, rtol=0, atol=1e-5)
    numbers, expected_numbers = logged(two / "run"), logged(one / "run")
    assert numbers.keys() == expected_numbers.keys()
    assert {name for _, name in numbers} >= {"train/loss", "train/mi", "val/clean", "val/robust", "train/robust"}
    for (step, name), value in expected_numbers.items():
        assert numbers[step, name] == pytest.approx(value, abs=1e-4), (step, name)
