"""The evaluator on a GPU: a batch size that fits, memory that really runs out, the same outcomes as on a CPU."""

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import evaluate
from mi_at.evaluation.evaluate import MOST, fitting_batch_size
from tests.evaluation.nets import images, loader, predicted, small_conv

pytestmark = pytest.mark.gpu

ATTACKS = {
    "worst": PGD(eps=0.02, step_size=0.005, steps=4, iterate="worst"),
    "starts": PGD(eps=0.02, step_size=0.005, steps=3, restarts=3),
    "fgsm": FGSM(eps=0.02),
}


class Hungry(nn.Module):
    """Asks for a part of the whole memory per image, so that only a few fit."""

    def __init__(self, images_that_fit: int) -> None:
        super().__init__()
        self.net = small_conv()
        self.bytes = torch.cuda.get_device_properties(0).total_memory // images_that_fit

    def forward(self, x: Tensor) -> Tensor:
        scratch = torch.empty(len(x) * self.bytes, dtype=torch.uint8, device=x.device)
        del scratch
        return self.net(x)


def test_same_outcomes_as_on_a_cpu() -> None:
    net, x = small_conv(), images(200, side=8)
    y = predicted(net, x)
    expected = evaluate(net, ATTACKS, loader(x, y), progress=False)
    for size in (16, "auto"):
        result = evaluate(net, ATTACKS, loader(x, y), device="cuda", batch_size=size, progress=False)
        for name in ATTACKS:
            # Rounding differs between devices: a sample on the edge may fall on either side.
            assert (result[name].prediction != expected[name].prediction).sum() <= 2, name
    net.cpu()


def test_memory_that_runs_out() -> None:
    net, x = Hungry(20), images(100, side=8)
    y = predicted(net.net, x)
    expected = evaluate(net.net, ATTACKS, loader(x, y), device="cuda", batch_size=10, progress=False)
    result = evaluate(net, ATTACKS, loader(x, y), device="cuda", batch_size=100, progress=False)
    assert 1 <= result.batch_size < 20
    for name in ATTACKS:
        assert (result[name].prediction != expected[name].prediction).sum() <= 2, name


def test_batch_size_that_fits() -> None:
    device = torch.device("cuda")
    x = images(20, side=8)
    assert fitting_batch_size(small_conv().to(device), x, device) == MOST
    few = fitting_batch_size(Hungry(200).to(device), x, device)
    assert 8 <= few <= 128
