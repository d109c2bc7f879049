"""CNNTiny learns 8x8 digits, clean and under attack, within seconds on one core."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mi_at.models import Classifier
from tests.models.helpers import build

datasets = pytest.importorskip("sklearn.datasets")


def pgd(net: Classifier, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Plain PGD, written here so that this floor's tests need no other part."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), [x_adv])
        x_adv = x_adv.detach() + 2.5 * eps / steps * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def test_cnn_tiny_learns_digits_robustly() -> None:
    torch.manual_seed(0)
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1437], order[1437:]
    net = build("cnn_tiny", channels=1, size=8)
    epochs, steps_per_epoch = 8, len(train.split(64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=epochs * steps_per_epoch)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            x_adv = pgd(net, x[batch], y[batch], 0.1 * min(1.0, (epoch + 1) / 3), steps=3)
            loss = F.cross_entropy(net(x_adv), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def accuracy(inputs: Tensor) -> float:
        return (net(inputs).argmax(dim=1) == y[test]).float().mean().item()

    assert accuracy(x[test]) > 0.975  # 0.99 when written
    assert accuracy(pgd(net, x[test], y[test], 0.1, steps=20)) > 0.8  # 0.89 when written
