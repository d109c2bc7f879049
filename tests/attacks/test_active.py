"""PGD that stops at the first success: its definition, the batch that is refilled, memory that runs out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.active import ascend_until_broken
from mi_at.attacks.packing import BatchSize, Packing, out_of_memory
from mi_at.attacks.pgd import PGD
from mi_at.functional.margins import logit_margin
from mi_at.functional.random import normal_like
from tests.evaluation.nets import images, predicted, small_conv
from tests.references.worst_iterate import first_broken_or_highest

N = 40
SETTINGS = {"linf": {"eps": 0.04, "step_size": 0.01, "steps": 8}, "l2": {"eps": 0.2, "step_size": 0.05, "steps": 8}}


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    net, x = small_conv().requires_grad_(False), images(N, side=8)
    return net, x, predicted(net, x), torch.arange(100, 100 + N)


def packing(size: int, **options: Any) -> Packing:
    return Packing(batch=BatchSize(size), **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_equals_its_definition(case, norm: str, objective: str) -> None:
    net, x, y, ids = case
    attack = PGD(**SETTINGS[norm], norm=norm, iterate="worst", objective=objective, kappa=50.0)
    start = attack._start(x, ids, 3 * 1009)
    loss = (lambda z, y: F.cross_entropy(z, y, reduction="none")) if objective == "cross_entropy" else logit_margin
    x_adv = attack(net, x, y, ids=ids, seed=3, packing=packing(7))
    numbers = []
    for i in range(N):
        options = {"eps": attack.eps, "step": attack.step_size, "steps": attack.steps, "norm": norm}
        expected, number = first_broken_or_highest(net, loss, x[i], int(y[i]), start[i], **options)
        numbers.append(number)
        assert torch.allclose(x_adv[i], expected, atol=2e-6), (i, number)
    # At once, on the way, and never: all three occur, so that the test can fail.
    assert len({number for number in numbers if number}) > 2
    assert None in numbers


def test_start_and_last_iterate_count(case) -> None:
    net, x, y, ids = case
    far = PGD(eps=1.0, step_size=0.01, steps=3, iterate="worst")
    start = (x + far._start(x, ids, 0)).clamp(0, 1)
    at_once = predicted(net, start) != y
    assert at_once.any()
    x_adv = far(net, x, y, ids=ids, seed=0)
    assert torch.equal(x_adv[at_once], start[at_once])
    # One step from the image breaks some: with steps=1 only the last iterate can.
    one = PGD(eps=0.05, step_size=0.05, steps=1, init="zero", iterate="worst")(net, x, y, ids=ids, seed=0)
    assert (predicted(net, one) != y).any()
    assert torch.equal(
        PGD(eps=0.05, step_size=0.05, steps=0, iterate="worst", init="zero")(net, x, y, ids=ids, seed=0), x
    )


def test_a_broken_iterate_counts_although_its_objective_is_lower() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
    net[1].bias.copy_(torch.tensor([0.6, -0.6]))  # class 1 above 0.6

    def near_the_middle(network: Any, y: Tensor) -> Any:
        return lambda x: 0 * network(x)[:, 0] - (x.flatten(1)[:, 0] - 0.5) ** 2

    x = torch.full((1, 1, 1, 1), 0.4)
    settings = {"eps": 0.5, "step_size": 0.3, "steps": 1, "norm": "linf", "packing": packing(1)}
    zero = torch.zeros(1, dtype=torch.int64)
    found = ascend_until_broken(net, near_the_middle, x, zero, zero, start=lambda x, ids: 0 * x, **settings)
    assert found.broken.tolist() == [True]
    assert found.x_adv.item() == pytest.approx(0.7)
    assert found.margin.item() == pytest.approx(0.2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "options",
    [
        {"iterate": "worst"},
        {"iterate": "worst", "restarts": 3, "objective": "margin"},
        {"iterate": "last", "restarts": 3},
        {"iterate": "last"},
    ],
)
def test_same_result_however_it_is_batched(case, norm: str, options: dict[str, Any]) -> None:
    net, x, y, ids = case
    attack = PGD(**{**SETTINGS[norm], "steps": 4}, norm=norm, **options)
    expected = attack(net, x, y, ids=ids, seed=1, packing=packing(N, active=False))
    assert 0.1 < (predicted(net, expected) == y).float().mean() < 0.9
    for size, active in ((1, True), (16, True), (500, True), (7, False)):
        x_adv = attack(net, x, y, ids=ids, seed=1, packing=packing(size, active=active))
        assert torch.equal(predicted(net, x_adv), predicted(net, expected)), (size, active)
        assert torch.allclose(x_adv, expected, atol=2e-6), (size, active)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = attack(net, x[order], y[order], ids=ids[order], seed=1, packing=packing(13))
    assert torch.allclose(shuffled, expected[order], atol=2e-6)


def test_first_restart_that_breaks_a_sample_is_its_result(case) -> None:
    net, x, y, ids = case
    settings = {**SETTINGS["linf"], "steps": 2}
    whole = PGD(**settings, restarts=3)(net, x, y, ids=ids, seed=5)
    # Restart r of seed s is the single start of the noise s * 1009 + r.
    runs = []
    for restart in range(3):
        single = PGD(**settings)
        runs.append(single._run(net, x, y, ids, 5, restart, packing(N)).x_adv)
    margins = torch.stack([logit_margin(net(run), y) for run in runs])
    broken = torch.stack([predicted(net, run) != y for run in runs])
    differ = 0
    for i in range(N):
        which = int(broken[:, i].float().argmax()) if broken[:, i].any() else int(margins[:, i].argmax())
        assert torch.allclose(whole[i], runs[which][i], atol=2e-6), i
        differ += which != int(margins[:, i].argmax())
    assert differ  # the first that breaks is not always the one with the largest margin


class Watching(nn.Module):
    """Keeps the batch sizes it was called with, apart for forwards with and without a gradient."""

    def __init__(self, net: nn.Module, fits: int = 10**9, grows: bool = False) -> None:
        super().__init__()
        self.net, self.fits = net, fits
        self.with_gradient: list[int] = []
        self.without: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        (self.with_gradient if x.requires_grad else self.without).append(len(x))
        return self.net(x)


def test_batch_is_full_until_the_samples_run_out(case) -> None:
    net, x, y, ids = case
    watching = Watching(net)
    attack = PGD(**SETTINGS["linf"], iterate="worst")
    attack(watching, x, y, ids=ids, seed=1, packing=packing(10))
    sizes = watching.with_gradient
    full = sizes.index(next(size for size in sizes if size < 10)) if min(sizes) < 10 else len(sizes)
    assert full > attack.steps  # refilled: the first ten alone would have ended by then
    assert sizes[full:] == sorted(sizes[full:], reverse=True)
    assert set(sizes[:full]) == {10}
    assert all(size <= 10 for size in watching.without)


def test_cost_is_one_forward_and_backward_a_step(case) -> None:
    net, x, y, ids = case
    attack = PGD(**SETTINGS["linf"], iterate="worst")
    whole, active = Watching(net), Watching(net)
    attack(whole, x, y, ids=ids, seed=1, packing=packing(16, active=False))
    assert (sum(whole.with_gradient), sum(whole.without)) == (N * attack.steps, N)
    attack(active, x, y, ids=ids, seed=1, packing=packing(16))
    start = attack._start(x, ids, 1009)
    spent = ended = 0
    for i in range(N):
        options = {"eps": attack.eps, "step": attack.step_size, "steps": attack.steps, "norm": "linf"}
        _, number = first_broken_or_highest(net, F.cross_entropy, x[i], int(y[i]), start[i], **options)
        looked = attack.steps if number is None else min(number + 1, attack.steps)
        spent, ended = spent + looked, ended + (number is None or number == attack.steps)
    assert (sum(active.with_gradient), sum(active.without)) == (spent, ended)
    assert spent < 0.9 * N * attack.steps


def test_restarts_run_on_survivors_alone(case) -> None:
    net, x, y, ids = case
    watching = Watching(net)
    attack = PGD(eps=0.03, step_size=0.01, steps=3, restarts=2)
    attack(watching, x, y, ids=ids, seed=1, packing=packing(100))
    broken = int((predicted(net, attack._run(net, x, y, ids, 1, 0, packing(N)).x_adv) != y).sum())
    assert 0 < broken < N
    assert watching.with_gradient == [N] * 3 + [N - broken] * 3


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("options", [{"iterate": "worst"}, {"iterate": "last", "restarts": 2}])
def test_memory_that_runs_out_costs_nothing_but_time(case, options: dict[str, Any]) -> None:
    net, x, y, ids = case
    attack = PGD(**{**SETTINGS["linf"], "steps": 4}, **options)
    expected = attack(net, x, y, ids=ids, seed=1)
    said: list[int] = []
    batch = BatchSize(50, on_halving=said.append)
    small = Watching(net, fits=7)
    x_adv = attack(small, x, y, ids=ids, seed=1, packing=Packing(batch=batch))
    assert said == [20, 10, 5]
    assert batch.size == 5
    assert torch.allclose(x_adv, expected, atol=2e-6)
    assert torch.equal(predicted(net, x_adv), predicted(net, expected))


def test_memory_that_runs_out_on_one_sample_is_an_error(case) -> None:
    net, x, y, ids = case
    with pytest.raises(torch.OutOfMemoryError):
        PGD(**SETTINGS["linf"], iterate="worst")(Watching(net, fits=0), x, y, ids=ids, seed=0)


def test_other_errors_are_not_taken_for_it() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        BatchSize(4).map(fails, torch.zeros(4))
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(ValueError("out of memory"))
    with pytest.raises(ValueError, match="batch_size=0"):
        BatchSize(0)


# ---------------------------------------------------------------- odd networks
def test_not_a_number_is_handed_back() -> None:
    """The evaluator then names it; kept silent, the sample would count as robust."""

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            brightness = x.flatten(1).mean(dim=1)
            z = torch.stack([torch.ones_like(brightness), 0.1 * brightness], dim=1)
            return torch.where(brightness[:, None] > 0.9, torch.nan, z)  # whose argmax is 0, the label

    x, zero = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    for options in ({"iterate": "worst"}, {"iterate": "worst", "restarts": 2}, {"iterate": "last", "restarts": 2}):
        attack = PGD(eps=0.5, step_size=0.3, steps=4, init="zero", **options)
        assert Breaks()(attack(Breaks(), x, zero, ids=zero, seed=0)).isnan().all(), options


class Noisy(nn.Module):
    """Keeps the noise it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_conv()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        self.drawn.append(normal_like(z))
        return z + 0.05 * self.drawn[-1]


def test_stochastic_networks_draw_by_sample_and_step(case) -> None:
    _, x, y, ids = case
    net = Noisy().requires_grad_(False)
    for options in ({"iterate": "worst"}, {"iterate": "last", "restarts": 2}):
        attack = PGD(**SETTINGS["linf"], **options)
        one = attack(net, x, y, ids=ids, seed=2, packing=packing(9))
        torch.manual_seed(7)
        other = attack(net, x, y, ids=ids, seed=2, packing=packing(31))
        assert torch.allclose(one, other, atol=2e-6)
        net.drawn.clear()
        attack(net, x[:1], y[:1], ids=ids[:1], seed=2, packing=packing(9, active=False))
        assert len({float(noise[0, 0]) for noise in net.drawn}) == len(net.drawn) > 8


def test_nothing_to_attack(case) -> None:
    net, x, y, ids = case
    for iterate in ("last", "worst"):
        assert len(PGD(eps=0.1, step_size=0.1, steps=2, iterate=iterate)(net, x[:0], y[:0], ids=ids[:0], seed=0)) == 0
