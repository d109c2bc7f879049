"""Every defense with every regularizer on k processes is that on one: losses, gradients, centroids, masks, estimators.

Found in conf/, so that a new method takes part. Four real steps over an epoch's end, in float64 on a network without
batch norm, batches that divide by neither 2 nor 3; one gloo group per k runs all pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.data.batch import Batch
from mi_at.data.digits import Digits
from mi_at.data.seeding import keyed_generator
from mi_at.functional.distributed import world_size
from mi_at.models.cnn import CNNTiny
from mi_at.regularizers.base import Context
from mi_at.regularizers.namid import Namid
from tests.test_ddp import Step, backward, gradients, trainer_at

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

CONF = Path(__file__).resolve().parents[1] / "conf"
DEFENSES = sorted(path.stem for path in (CONF / "defense").glob("*.yaml") if path.stem != "mi_estimators")
REGULARIZERS = sorted(path.stem for path in (CONF / "regularizer").glob("*.yaml"))
OWN = {"ib_rar", "namid", "ncmi", "ncmi_relaxed"}  # standard_at with one term of their own
CLUSTER = {"ncmi", "ncmi_relaxed"}  # both search the view "cluster"
PAIRS = [
    (defense, term)
    for defense in DEFENSES
    for term in REGULARIZERS
    if not (defense in OWN and defense == term) and not {defense, term} <= CLUSTER
]
# The papers' weights, with few samples and small estimators, and terms that show themselves in four steps.
OPTIONS = {
    "clean_ncmi": {"samples_per_class": 2, "tau_q": 0.9},
    "ib_rar": {"mask": {"every": 2, "fraction": 0.2}},
    "namid": {"hsize": 16},
    "ncmi": {"tau_q": 0.9},
    "ncmi_relaxed": {"batch_factor": 1},
    "wmim": {"hsize": 16},
}
SIZES = [53, 53, 43]
STEPS_OF_EPOCH = (3, 1)


def double(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, x=batch.x.double())


def configurations(compose: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Of every pair, as the command composes its parts."""
    from mi_at import io

    wholes = {name: io.plain(compose([f"defense={name}", "recipe=none"])) for name in DEFENSES}
    terms = {name: io.plain(compose([f"regularizer={name}"]))["regularizer"] for name in REGULARIZERS}
    found = {}
    for defense, term in PAIRS:
        kept = {key: wholes[defense][key] for key in ("defense", "dataset", "seed")}
        config: dict[str, Any] = copy.deepcopy({**kept, "regularizer": terms[term]})
        for name, node in ((defense, config["defense"]), *config["regularizer"].items()):
            for key, value in OPTIONS.get(name, {}).items():
                node[key] = {**node[key], **value} if isinstance(value, dict) else value
        config["dataset"]["batch_size"] = SIZES[0]
        found[f"{defense}+{term}"] = config
    return found


def train(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients and views of every step, and all that is left afterwards."""
    from mi_at import io

    torch.manual_seed(0)
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.3)
    defense = io.build_defense(config, net).double().train()
    defense.inspect_every = 0
    data = Digits(batch_size=SIZES[0], train_size=sum(SIZES), val_size=60, seed=3)
    data.setup("fit")
    callback = AdversarialExamples(InnerMaximisation(norm="linf", eps=0.15, step_size=0.08, steps=2), seed=1)
    awp = AdversarialWeightPerturbation(gamma=0.005, warmup_epochs=0) if name.startswith("trades_awp") else None
    optimizer = torch.optim.SGD(defense.trained_parameters(), lr=0.02, momentum=0.9)
    step: Any = Step(defense)
    if world_size() > 1:  # a critic that stands in the loss gets its gradient by itself
        step = torch.nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    terms = defense.added_terms().values()
    for term in terms:
        if isinstance(term, Namid):
            term.trained.fill_(True)  # estimators as they are made: the same on every process

    seen: list[dict[str, Any]] = []

    def context(epoch: int) -> Context:
        return Context(
            net=net,
            epoch=epoch,
            scaled=round,
            train_batches=lambda size, augment: double(
                data.train_batches(batch_size=size, augment=augment, epoch=epoch)
            ),
            draw_per_class=lambda n: next(
                double([data.draw_per_class(n, generator=keyed_generator(0, "draw", len(seen)))])
            ),
            attack=callback.attack_of(defense, epoch),
        )

    for term in terms:
        term.on_fit_start(context(0))
    for epoch, steps in enumerate(STEPS_OF_EPOCH):
        for number, batch in zip(range(steps), double(data.train_dataloader()), strict=False):
            assert batch.global_size == SIZES[number]
            callback.on_train_batch_start(trainer_at(epoch), defense, batch, number)
            if awp is not None:
                awp.on_train_batch_start(trainer_at(epoch), defense, batch, number)
            loss = backward(step, batch)
            found = gradients(defense)
            optimizer.step()
            while defense.undo_before_hooks:
                defense.undo_before_hooks.pop()()
            with torch.no_grad():
                defense.after_step(batch)
                for term in terms:
                    term.after_step(context(epoch), batch)
            seen.append({"loss": loss, "gradients": found, "views": dict(batch.views)})
        for term in terms:
            term.on_epoch_end(context(epoch + 1))
    state = {key: value.clone() for key, value in defense.state_dict().items() if isinstance(value, Tensor)}
    return {"steps": seen, "state": state}


def everything(rank: int, processes: int, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All pairs on this process."""
    assert world_size() == processes
    return {name: train(name, config) for name, config in configs.items()}


@pytest.fixture
def configs(compose: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return configurations(compose)


_alone = SimpleNamespace(found=None)


@pytest.mark.parametrize("k", [2, 3])
def test_every_pair_trains_as_on_one_process(
    k: int, configs: dict[str, dict[str, Any]], spawn: Callable[..., Any]
) -> None:
    _alone.found = alone = _alone.found or everything(0, 1, configs)
    group, wrong = spawn(everything, k, configs, timeout=7200.0), []
    for name, expected in alone.items():
        for rank, result in enumerate(group):
            try:
                compare(result[name], expected)
            except AssertionError as error:
                wrong.append(f"{name}, rank {rank}: {error}")
        for number, step in enumerate(expected["steps"]):
            for view, images in step["views"].items():
                whole = torch.cat([result[name]["steps"][number]["views"][view] for result in group])
                if not torch.allclose(whole, images, rtol=0, atol=1e-6):
                    wrong.append(f"{name}: view {view} of step {number}")
    assert not wrong, "\n".join(wrong)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for number, (here, step) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        torch.testing.assert_close(here["loss"], step["loss"], rtol=1e-6, atol=1e-6, msg=f"loss of step {number}")
        assert here["gradients"].keys() == step["gradients"].keys()
        # Taps are float32, of which a gradient of several units keeps no more.
        largest = max(1.0, *(float(g.abs().max()) for g in step["gradients"].values()))
        for key, gradient in step["gradients"].items():
            difference = float((here["gradients"][key] - gradient).abs().max())
            assert difference <= 1e-6 * largest, f"gradient of {key} in step {number}: {difference:.1e}"
    assert found["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        if value.is_floating_point():
            difference = float((found["state"][key] - value).abs().max()) if value.numel() else 0.0
            assert difference <= 1e-6, f"{key}: {difference:.1e}"
        else:
            assert torch.equal(found["state"][key], value), key


def test_the_pairs_are_not_trivial(configs: dict[str, dict[str, Any]]) -> None:
    """In what is compared every term moves the network, and what a term keeps has changed."""
    _alone.found = alone = _alone.found or everything(0, 1, configs)
    assert len(alone) == len(PAIRS) >= 14 * 9 - 6
    for name, found in alone.items():
        defense, _, term = name.partition("+")
        for step in found["steps"]:
            assert max(float(g.abs().max()) for g in step["gradients"].values()) > 1e-4, name
        plain = alone.get(f"{defense}+none")
        if term != "none" and plain is not None:
            last, without = (of["steps"][-1]["gradients"] for of in (found, plain))
            assert any(not torch.equal(last[key], value) for key, value in without.items()), name
        if term == "ib_rar":
            assert not found["state"]["net.last_conv_gate.keep"].all(), name
        if term in (*CLUSTER, "clean_ncmi"):
            centroids = found["state"][f"regularizers.{term}.centroids"]
            torch.testing.assert_close(centroids.sum(dim=1), torch.ones(10, dtype=torch.float64))
