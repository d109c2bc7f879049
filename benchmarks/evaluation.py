"""Time of an evaluation: active set against whole batches, AutoAttack against its authors' package.

Ours attacks only what is still right and refills the batch; the peer runs whole batches to the end. AutoAttack through
the evaluator is held against the package called directly. The network is trained here, adversarially and briefly, on
real MNIST (or scikit-learn's 8x8 digits: --data digits, where calls cost more than samples); eps is chosen so that
about 30 % of the images stay right, with steps of eps / 4 as usual on CIFAR (2/255 of 8/255). Outcomes are compared per
sample in every round, and the images that need a gradient are counted. Rounds alternate, so that a slow moment of the
machine hits all, and so does who comes first, which costs some percent: their number is even. CPU time of this process,
one thread.

    python benchmarks/evaluation.py [--data mnist] [--rounds 6] [--n 400] [--autoattack-n 24] [--json FILE]

Exit code 1 if an outcome differs, or PGD-20 and PGD-100 are not 1.5 and 2.2 times as fast, or AutoAttack is slower.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks import objectives
from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.contexts import attacking
from mi_at.attacks.pgd import PGD, pgd
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.models.cnn import CNNTiny

GOALS = {"PGD-20": 1.5, "PGD-100": 2.2, "AutoAttack standard": 1.0}
ROBUST = (0.25, 0.35)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import MNIST

    root = os.environ.get("MI_AT_DATA", "data")
    parts = [MNIST(root, train=train) for train in (True, False)]
    x, y, x_test, y_test = (t for part in parts for t in (part.data[:, None].float() / 255, part.targets))
    return x[:3000], y[:3000], x_test, y_test


def train(net: nn.Module, x: Tensor, y: Tensor, *, eps: float, epochs: int) -> None:
    """Adversarial training with PGD-5, briefly."""
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for places in torch.randperm(len(x)).split(64):
            with attacking(net):
                objective = objectives.cross_entropy(net, y[places])
                x_adv = pgd(objective, x[places], eps=eps, step_size=eps / 3, steps=5)
            net.train()
            optimiser.zero_grad()
            F.cross_entropy(net(x_adv), y[places]).backward()
            optimiser.step()
    net.eval()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def gradients(net: nn.Module, function: Callable[[], Any]) -> int:
    """How many images a gradient was asked of."""
    count = 0

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += len(inputs[0]) if inputs[0].requires_grad else 0

    with net.register_forward_pre_hook(look):
        function()
    return count


def run(net: nn.Module, attack: Any, x: Tensor, y: Tensor, **options: Any) -> EvaluationResult:
    index = torch.arange(len(y))
    batches = [(x[part], y[part], index[part]) for part in index.split(500)]
    return evaluate(net, {"attack": attack}, batches, progress=False, **options)


def package(net: nn.Module, x: Tensor, y: Tensor, *, eps: float, batch_size: int) -> Tensor:
    """The package as its authors' page calls it: the network in eval mode, nothing else; [N] bool, robust."""
    from pyautoattack import AutoAttack as Library

    library = Library(net, eps=eps, norm="Linf", seed=0, version="standard")
    x_adv, _ = library.run_standard_evaluation(x, y, batch_size=batch_size)
    with torch.no_grad():
        return net(x_adv).argmax(dim=1) == y


def choose_eps(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """An eps at which PGD-20 leaves about 30 %, by bisection, and what it leaves."""
    low, high = 0.0, 0.6
    for _ in range(12):
        eps = (low + high) / 2
        accuracy = run(net, PGD(eps=eps, step_size=eps / 4, steps=20, iterate="worst"), x, y)["attack"].accuracy
        if ROBUST[0] + 0.03 < accuracy < ROBUST[1] - 0.03:
            break
        low, high = (eps, high) if accuracy > sum(ROBUST) / 2 else (low, eps)
    return round(eps, 4), accuracy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--autoattack-n", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    x, y, x_test, y_test = digits() if options.data == "digits" else mnist()
    net = CNNTiny(num_classes=10, in_channels=1, image_size=x.shape[-1])
    train(net, x, y, eps=0.15, epochs=8 if options.data == "digits" else 2)
    x, y = x_test[: options.n], y_test[: options.n]
    eps, accuracy = choose_eps(net, x, y)
    size = options.batch_size
    few = slice(0, options.autoattack_n)
    print(f"{options.data}: eps {eps}, {100 * accuracy:.1f} % of {len(y)} images right under PGD-20, batches of {size}")

    peers: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], Tensor]]] = {}
    for steps in (20, 100):
        attack = PGD(eps=eps, step_size=eps / 4, steps=steps, iterate="worst")
        peers[f"PGD-{steps}"] = (
            lambda attack=attack: run(net, attack, x, y, batch_size=size),
            lambda attack=attack: run(net, attack, x, y, batch_size=size, active=False),
            lambda result: result["attack"].prediction,
        )
    peers["AutoAttack standard"] = (
        lambda: run(net, AutoAttack(eps=eps, batch_size=size), x[few], y[few])["attack"].correct,
        lambda: package(net, x[few], y[few], eps=eps, batch_size=size),
        lambda correct: correct,
    )
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    equal = True
    counted = {
        name: round(gradients(net, peers[name][1]) / gradients(net, peers[name][0]), 2)
        for name in ("PGD-20", "PGD-100")
    }
    print("images with a gradient, whole batches / active set:", counted)
    for number in range(options.rounds):
        for name, (ours, theirs, outcome) in peers.items():
            first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            one, other = timed(first), timed(second)
            (mine, found), (peer, expected) = (one, other) if number % 2 == 0 else (other, one)
            ratios[name].append(peer / mine)
            spent[name].append((mine, peer))
            print(f"round {number + 1}, {name}: {mine:.2f} s, peer {peer:.2f} s", flush=True)
            if not torch.equal(outcome(found), outcome(expected)):
                equal = False
                print(f"{name}: {int((outcome(found) != outcome(expected)).sum())} samples differ")
    report = {
        name: {
            "ratio": round(median(ratios[name]), 3),
            "must": GOALS[name],
            "seconds": round(median(mine for mine, _ in spent[name]), 2),
            "peer_seconds": round(median(peer for _, peer in spent[name]), 2),
            "range": [round(min(ratios[name]), 3), round(max(ratios[name]), 3)],
        }
        for name in peers
    }
    for name, row in report.items():
        print(
            f"{name:20}  {row['ratio']:.2f} times as fast ({row['seconds']} s, peer {row['peer_seconds']} s; "
            f"rounds {row['range'][0]} to {row['range'][1]}); must {row['must']}"
        )
    print("outcomes per sample:", "equal in every round" if equal else "DIFFERENT")
    if options.json is not None:
        options.json.write_text(
            json.dumps(
                {"data": options.data, "eps": eps, "accuracy": accuracy, "gradients": counted, **report}, indent=2
            )
        )
    return 0 if equal and all(median(ratios[name]) >= goal for name, goal in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
