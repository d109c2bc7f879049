"""Extra time of a training step of every method over standard_at, beside what its paper says.

The real defense, attack and hooks in a bare loop with PGD-10, one thread. Every round runs every method once, and the
method it is compared with right before and right after it; a ratio is the median over rounds, in CPU time: a busy
machine disturbs both alike. What a method does once an epoch (ncmi_relaxed's pass over the training set) is added per
batch.

    python benchmarks/methods.py [--rounds 5] [--batch-size 32] [--width 0.5] [--json FILE]

It measures and judges nothing: the papers' times are those of other machines and other code.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from step import cpu_info, examples, optimizer_of, random_batch  # the file beside this one

from mi_at.callbacks.adversarial_weight_perturbation import AdversarialWeightPerturbation
from mi_at.data.batch import Batch
from mi_at.defenses.alp import Alp
from mi_at.defenses.base import Defense
from mi_at.defenses.mart import Mart
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.shared_info import SharedInfo
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.defenses.vib import Vib
from mi_at.models.resnet import ResNet18
from mi_at.regularizers.base import Context, Regularizer
from mi_at.regularizers.clean_ncmi import CleanNCMI
from mi_at.regularizers.hbar import HsicBottleneck
from mi_at.regularizers.ib_rar import InformationBottleneck
from mi_at.regularizers.namid import Namid
from mi_at.regularizers.ncmi import NCMI
from mi_at.regularizers.ncmi_relaxed import NCMIRelaxed
from mi_at.regularizers.wmim import Wmim

BASE = "standard_at"
CLASSES, SIDE = 10, 32


@dataclass(frozen=True)
class Method:
    """What is timed.

    Attributes:
        defense: makes it.
        term: makes the added regularizer.
        over: the method whose time the paper compares with.
        paper: its extra time there, in percent; None where it gives none.
        where: in the paper.
        awp: with adversarial weight perturbation.
    """

    defense: Callable[[], Defense]
    term: Callable[[], Regularizer] | None = None
    over: str = BASE
    paper: float | None = None
    where: str = ""
    awp: bool = False


NCMI_APP = "robust NCMI, App. E"
TABLE_8 = "shared_info, Table 8"
METHODS: dict[str, Method] = {
    BASE: Method(StandardAT),
    "trades": Method(Trades, paper=32, where=TABLE_8),
    "mart": Method(Mart, paper=4, where=TABLE_8),
    "alp": Method(Alp),
    "mimae": Method(Mimae),
    "trades_awp": Method(Trades, awp=True, over="trades", paper=30, where=NCMI_APP),
    "ncmi": Method(StandardAT, NCMI, paper=60, where=NCMI_APP),
    "ncmi, centroids of the loss": Method(StandardAT, lambda: NCMI(centroid_forward="loss"), paper=60, where=NCMI_APP),
    "ncmi_relaxed": Method(StandardAT, NCMIRelaxed, paper=120, where=NCMI_APP),
    "ncmi on trades": Method(Trades, NCMI, over="trades", paper=60, where=NCMI_APP),
    "clean_ncmi on trades": Method(Trades, lambda: CleanNCMI(samples_per_class=8), over="trades"),
    "shared_info": Method(SharedInfo, paper=54, where=TABLE_8),
    "shared_info, mine": Method(lambda: SharedInfo(estimator="mine")),
    "shared_info, mige": Method(lambda: SharedInfo(estimator="mige")),
    "vib on adversarial images": Method(lambda: Vib(view="adversarial")),
    "ib_rar": Method(StandardAT, InformationBottleneck),
    "ib_rar, no mask": Method(StandardAT, lambda: InformationBottleneck(mask={"fraction": 0})),
    "hbar": Method(StandardAT, HsicBottleneck),
    "namid, hsize 256": Method(StandardAT, lambda: Namid(hsize=256)),
    "wmim, hsize 256": Method(StandardAT, lambda: Wmim(hsize=256)),
}


class Timed:
    """A method's step, and what it does once an epoch; both in CPU seconds a batch."""

    def __init__(self, method: Method, data: Batch, width: float) -> None:
        torch.manual_seed(0)
        self.net = ResNet18(num_classes=CLASSES, in_channels=3, image_size=SIDE, width=width).train()
        self.defense, self.data = method.defense(), data
        term = None if method.term is None else method.term()
        self.defense.attach(self.net, regularizers={} if term is None else {"term": term})
        self.defense.inspect_every = 0
        self.defense.train()
        self.terms = [] if term is None else [term]
        self.examples, self.optimizer = examples(), optimizer_of(self.net)
        self.awp = AdversarialWeightPerturbation(gamma=0.005, warmup_epochs=0) if method.awp else None
        self.trainer: Any = SimpleNamespace(current_epoch=0, num_training_batches=1000)
        self.trainer.precision_plugin = SimpleNamespace(forward_context=nullcontext)
        self.number = 0
        for each in self.terms:
            if isinstance(each, Namid):
                each.trained.fill_(True)
            each.on_fit_start(self.context(0))
        if isinstance(term, NCMIRelaxed):  # past the first epoch
            term.batch_size = len(data)
            term.on_epoch_end(self.context(1))

    def context(self, epoch: int) -> Context:
        def passes(batch_size: int, augment: bool) -> Iterator[Batch]:
            yield random_batch(batch_size, 3, SIDE)

        return Context(
            net=self.net,
            epoch=epoch,
            scaled=round,
            train_batches=passes,
            draw_per_class=lambda n: random_batch(CLASSES * n, 3, SIDE),
            attack=self.examples.attack_of(self.defense, epoch),
        )

    def step(self) -> float:
        """One step with its hooks; batches are numbered, for what happens in one of several."""
        self.data.batch_idx, self.number = self.number, self.number + 1
        self.data.views.clear()
        start = time.process_time()
        self.examples.on_train_batch_start(self.trainer, self.defense, self.data, self.data.batch_idx)
        if self.awp is not None:
            self.awp.on_train_batch_start(self.trainer, self.defense, self.data, self.data.batch_idx)
        loss = self.defense.training_step(self.data, self.data.batch_idx)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        while self.defense.undo_before_hooks:
            self.defense.undo_before_hooks.pop()()
        with torch.no_grad():
            self.defense.after_step(self.data)
            for term in self.terms:
                term.after_step(self.context(1), self.data)
        return time.process_time() - start

    def pass_over_a_batch(self) -> float:
        """What the end of an epoch costs for every batch of it."""
        (relaxed,) = [term for term in self.terms if isinstance(term, NCMIRelaxed)] or (None,)
        if relaxed is None:
            return 0.0
        start = time.process_time()
        relaxed.on_epoch_end(self.context(2))
        return (time.process_time() - start) / relaxed.batch_factor


def measure(rounds: int, batch_size: int, width: float) -> dict[str, list[tuple[float, float]]]:
    """CPU seconds of each method and of what it is compared with, by round, after one that warms up."""
    data = random_batch(batch_size, 3, SIDE)
    timed = {name: Timed(method, data, width) for name, method in METHODS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for number in range(rounds + 1):
        for name, run in timed.items():
            over = timed[METHODS[name].over]
            before, own, after = over.step(), run.step() + run.pass_over_a_batch(), over.step()
            if number:
                seconds[name].append((own, (before + after) / 2))
        print(f"round {number} of {rounds}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=float, default=0.5, help="of the ResNet-18's channels")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.rounds, options.batch_size, options.width)
    where = f"{cpu_info('model name')}, torch {torch.__version__}, one thread"
    print(f"ResNet-18 of width {options.width}, PGD-10, batch {options.batch_size}, {options.rounds} rounds, {where}")
    print(f"  {'method':<30} {'seconds':>8} {'over':<12} {'extra %':>8} {'range':>16} {'paper %':>8}  where")
    ratios = {}
    for name, method in METHODS.items():
        extra = sorted(100 * (own / over - 1) for own, over in seconds[name])
        ratios[name] = median(extra)
        span, paper = f"{extra[0]:.0f} to {extra[-1]:.0f}", "-" if method.paper is None else f"{method.paper:.0f}"
        line = f"  {name:<30} {median(own for own, _ in seconds[name]):>8.2f} {method.over:<12} {ratios[name]:>8.0f}"
        print(f"{line} {span:>16} {paper:>8}  {method.where}")
    if options.json is not None:
        result = {"where": where, **vars(options), "json": str(options.json), "seconds": seconds, "extra": ratios}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
