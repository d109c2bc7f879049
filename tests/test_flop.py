"""What a training step costs, counted: FLOP in units of one forward (shared floors), and reads that wait for a device.

F is one forward of the network per image. Forward and input gradient cost 2 F, a forward that is trained through 3 F
(without the input gradient of the first layer, which nobody needs: the counts are a little below whole numbers).
Counts are of the real defense and callback on the CPU; they do not depend on the machine.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mi_at
from benchmarks import step
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.data.batch import Batch
from mi_at.defenses.alp import Alp
from mi_at.defenses.base import Defense
from mi_at.defenses.ce import CE
from mi_at.defenses.mart import Mart
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.mma import MMA
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.resnet import ResNet18
from mi_at.regularizers.base import Context, Regularizer
from mi_at.regularizers.clean_ncmi import CleanNCMI
from mi_at.regularizers.hbar import HsicBottleneck
from mi_at.regularizers.ib_rar import InformationBottleneck
from mi_at.regularizers.mi import MutualInformation
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from mi_at.results.flop import FlopCount

IMAGES = 2
FORWARD = 1.1108e9  # ResNet-18 at 32x32, FLOP per image
PACKAGE = Path(mi_at.__file__).parent


class Reads(TorchDispatchMode):
    """Where the package reads a tensor's values into Python, or makes a tensor whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [index for index in args[1] if index is not None] if func is torch.ops.aten.index.Tensor else []
        packet = torch.ops.aten
        reads = (packet._local_scalar_dense, packet.nonzero, packet.masked_select, packet.equal)
        if func._overloadpacket in reads or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
            names = [frame.name for frame in frames if not frame.name.startswith("<")]
            self.places.add(names[-1] if names else str(func))
        return func(*args, **(kwargs or {}))


def batch(images: int = IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, 32, 32, generator=generator)
    return Batch(x=x, y=torch.arange(images) % 10, index=torch.arange(images))


def step_of(defense: Defense, net: nn.Module, **regularizers: Regularizer) -> Callable[[Batch], Tensor]:
    """The real step without an optimiser: callback, training step, backward."""
    defense.attach(net, regularizers=regularizers)
    defense.inspect_every = 0
    callback = AdversarialExamples(InnerMaximisation(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10))
    trainer: Any = SimpleNamespace(current_epoch=0, num_training_batches=1)

    def run(data: Batch) -> Tensor:
        callback.on_train_batch_start(trainer, defense, data, 0)
        loss = defense.training_step(data, 0)
        loss.backward()
        return loss.detach()

    return run


@pytest.fixture(scope="module")
def net() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(num_classes=10, in_channels=3, image_size=32)


@pytest.fixture(scope="module")
def forward(net: ResNet18) -> float:
    """F, counted."""
    with FlopCount() as count, torch.no_grad():
        net(batch().x)
    return count.flop / IMAGES


def test_the_unit_is_that_of_the_floors(forward: float) -> None:
    assert forward == pytest.approx(FORWARD, rel=1e-4)


# (defense, added terms, floor, what was counted: in training the first layer's input gradient is not needed)
FLOORS: dict[str, tuple[Callable[[], Defense], dict[str, Callable[[], Regularizer]], int, float]] = {
    "ce": (CE, {}, 3, 2.997),
    "standard_at": (StandardAT, {}, 23, 22.997),
    "trades": (Trades, {}, 27, 26.994),
    "mart": (Mart, {}, 26, 25.994),
    "alp": (Alp, {}, 26, 25.994),
    "mimae": (Mimae, {}, 26, 25.994),
    "standard_at+mi": (StandardAT, {"mi": MutualInformation}, 26, 25.994),
}


@pytest.mark.parametrize("name", FLOORS)
def test_a_step_costs_its_floor(name: str, net: ResNet18, forward: float) -> None:
    defense, regularizers, floor, counted = FLOORS[name]
    run = step_of(defense(), net, **{key: make() for key, make in regularizers.items()})
    data = batch()
    with FlopCount() as count:
        run(data)
    cost = count.flop / IMAGES / forward
    assert cost == pytest.approx(floor, rel=0.01)
    assert cost == pytest.approx(counted, abs=1e-3)


def relaxed() -> NCMIRelaxed:
    """Past its first epoch."""
    term = NCMIRelaxed()
    term.started = True
    return term


EXTRA = 3  # images per class, of 10 classes
# (defense, term, F); namid and wmim, whose estimators cost besides, are counted where they are tested.
TERMS: dict[str, tuple[Callable[[], Defense], Callable[[], Regularizer], float]] = {
    "ncmi": (StandardAT, NCMI, 47),
    "ncmi, centroids of the loss": (StandardAT, lambda: NCMI(centroid_forward="loss"), 46),
    "ncmi_relaxed": (StandardAT, relaxed, 46),
    "clean_ncmi on trades": (Trades, lambda: CleanNCMI(samples_per_class=EXTRA), 27 + 10 * EXTRA / IMAGES),
    "ib_rar": (StandardAT, InformationBottleneck, 23),
    "hbar": (StandardAT, HsicBottleneck, 26),
    "hbar on trades": (Trades, HsicBottleneck, 27),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_step_with_a_term_costs_its_floor(name: str, forward: float) -> None:
    """Hooks after the step included."""
    make, term_of, floor = TERMS[name]
    net = ResNet18(num_classes=10, in_channels=3, image_size=32)
    defense, term, data = make(), term_of(), batch()
    run = step_of(defense, net, term=term)
    nothing: Any = None
    extra = batch(10 * EXTRA)
    context = Context(
        net=net, epoch=0, scaled=round, train_batches=nothing, draw_per_class=lambda n: extra, attack=nothing
    )
    with FlopCount() as count:
        run(data)
        with torch.no_grad():
            term.after_step(context, data)
    assert count.flop / IMAGES / forward == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize(("name", "cost"), [("backward loop", 35), ("TRADES in the public order", 39)])
def test_the_benchmark_compares_with_what_it_says(name: str, cost: int, net: ResNet18, forward: float) -> None:
    run = {"backward loop": step.backward_loop, "TRADES in the public order": step.trades_public_order}[name](net)
    with FlopCount() as count:
        run(batch())
    assert count.flop / IMAGES / forward == pytest.approx(cost, rel=0.01)


# These do not wait for a GPU: the first reads a tensor that always lies on the CPU, the others check values there only.
CPU_ONLY = {"_mix_int", "_range_of", "check_images", "largest_other", "soft_logit_margin"}


def searching() -> MMA:
    """As in a fit, where the loader says how many samples there are."""
    defense = MMA(variant="full")
    defense.expect(4)
    return defense


DEFENSES: dict[str, Callable[[], Defense]] = {
    **{name: make for name, (make, added, _, _) in FLOORS.items() if not added},
    "mma": MMA,
    "mma_full": searching,
}


@pytest.mark.parametrize("name", DEFENSES)
def test_a_step_reads_nothing_back(name: str) -> None:
    run = step_of(DEFENSES[name](), ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.1))
    run(batch(4))
    with Reads() as reads:
        run(batch(4))
    assert reads.places <= CPU_ONLY
