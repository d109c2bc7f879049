"""The README's example: a loss and an attack in a bare PyTorch loop, without the framework."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.pgd import pgd
from mi_at.defenses.trades import trades_loss


def robust_accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with attacking(net):
        x_adv = pgd(objectives.cross_entropy(net, y), x, eps=0.15, step_size=0.03, steps=10, init="zero")
    return float((net(x_adv).argmax(1) == y).double().mean())


def test_ten_lines_of_trades_train_a_robust_network_on_digits():
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:640] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target[:640])
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    before = robust_accuracy(net, images, labels)
    history = []

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(6):
        for x, y in zip(images.split(64), labels.split(64), strict=True):
            with attacking(net):
                objective = objectives.kl_to(net, net(x).detach())
                x_adv = pgd(objective, x, eps=0.15, step_size=0.05, steps=4, init="gaussian")
            terms = trades_loss(net(x), net(x_adv), y, beta=3.0)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            history.append(float(terms["loss"].detach()))

    assert sum(history[-10:]) / 10 < 0.6 * sum(history[:10]) / 10
    assert before < 0.3
    assert robust_accuracy(net, images, labels) > 0.5


def test_the_readme_runs_as_printed():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    blocks = [part.split("```", 1)[0] for part in text.split("```python\n")[1:]]
    (example,) = [block for block in blocks if "trades_loss(" in block and "pgd(" in block]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    terms = names["terms"]
    assert float((terms["ce"] + terms["kl"]).detach()) == pytest.approx(float(terms["loss"].detach()))


def test_the_functions_of_the_readme_run_as_printed():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (example,) = [part.split("```", 1)[0] for part in text.split("```python\n")[1:] if "normalized_cmi(" in part]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert 0 < float(names["ncmi"]) < 10
    assert 0 < float(names["known"]) < 9
