"""A small evaluation that a test starts as a process of its own, and kills: python -m ... <state> <processes>."""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationResult, evaluate
from tests.evaluation.nets import images, loader, predicted, small_conv

ATTACKS = {
    "worst": PGD(eps=0.02, step_size=0.005, steps=4, iterate="worst"),
    "starts": PGD(eps=0.02, step_size=0.005, steps=3, restarts=3),
    "fgsm": FGSM(eps=0.02),
    "aa": AutoAttack(eps=0.02, attacks=["apgd-ce", "square"], batch_size=16, queries=20),
}


class Slow(nn.Module):
    """A network that takes a while, so that a kill meets it at work."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.net = small_conv()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.net(x)


def samples() -> tuple[nn.Module, Tensor, Tensor]:
    net, x = Slow(), images(96, side=8)
    y = predicted(net, x)
    y[::7] = (y[::7] + 1) % 10
    return net, x, y


def run(state: Path | None, *, net: nn.Module | None = None, processes: int = 1, **options: object) -> EvaluationResult:
    made, x, y = samples()
    settings: dict = {"progress": False, "batch_size": 6, "survivors": True, **options}
    return evaluate(net or made, ATTACKS, loader(x, y), state=state, processes=processes, **settings)


def same(one: EvaluationResult, other: EvaluationResult) -> None:
    assert list(one.attacks) == list(other.attacks)
    for row, again in zip(one.rows(), other.rows(), strict=True):
        assert torch.equal(row.prediction, again.prediction), row.name
        assert torch.allclose(row.distance, again.distance, atol=2e-6), row.name
        assert row.description == again.description
        assert row.flags == again.flags
    for name, examples in one.examples.items():
        assert torch.equal(examples.index, other.examples[name].index), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), net=Slow(0.02), processes=int(sys.argv[2]))
