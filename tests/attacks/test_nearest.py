"""What `targets` and `line_search` add to minimum-norm attacks: the nearest boundary where slopes differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_at.attacks.cw_l2 import CWL2, cw_l2
from mi_at.attacks.ddn import DDN, ddn
from mi_at.attacks.fab import fab
from mi_at.attacks.nearest import Nearest, lead, likely
from tests.attacks.test_norm_and_transfer_known import DIM, DTYPE, images, linear, true_distance

Net = Callable[[Tensor], Tensor]
CLASSES = 4
CW = {"c": 1.0, "steps": 100, "lr": 0.03, "binary_search": 5}
L2: dict[str, Callable[..., Tensor]] = {
    "cw_l2": lambda net, x, y, **extra: cw_l2(net, x, y, **CW, **extra),
    "ddn": lambda net, x, y, **extra: ddn(net, x, y, steps=100, **extra),
}
EXTRAS = {"targets": 9, "line_search": 10}


def unequal_slopes() -> tuple[Tensor, Tensor]:
    """Weights of lengths 1 to 6: the class of the largest logit need not be that of the nearest boundary."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=g, dtype=DTYPE), dim=1)
    weight = rows * torch.tensor([1.0, 2.0, 4.0, 6.0], dtype=DTYPE)[:, None]
    return weight, -weight.sum(1) / 2


def samples(box: bool) -> tuple[Net, Tensor, Tensor, dict[str, Tensor]]:
    weight, bias = unequal_slopes()
    x = images(0.3, 0.7, batch=60)
    if box:
        x[:, :, :2] = 0.05 + 0.9 * x[:, :, :2].round()  # at 0 and 1 themselves C&W needs many more steps
    net = linear(weight, bias)
    y = net(x).argmax(1)
    distance = {norm: true_distance(weight, bias, x, y, norm) for norm in ("l2", "linf")}
    keep = ((distance["l2"] > 0.03) & distance["l2"].isfinite()).nonzero().squeeze(1)[:14]
    assert len(keep) >= 10
    return net, x[keep], y[keep], {norm: values[keep] for norm, values in distance.items()}


def ratio(net: Net, x_adv: Tensor, x: Tensor, y: Tensor, distance: Tensor, norm: str = "l2") -> Tensor:
    assert (net(x_adv).argmax(1) != y).all()
    delta = (x_adv - x).flatten(1)
    found = (delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)) / distance
    assert float(found.min()) >= 1 - 1e-5, "nearer than the truth: the truth is wrong"
    return found


@pytest.mark.parametrize("name", L2)
def test_within_5_percent_where_slopes_differ_and_not_as_published(name):
    inside, corner = samples(box=False), samples(box=True)
    x, y = torch.cat([inside[1], corner[1]]), torch.cat([inside[2], corner[2]])
    net, distance = inside[0], torch.cat([inside[3]["l2"], corner[3]["l2"]])
    published = ratio(net, L2[name](net, x, y), x, y, distance)
    reached = ratio(net, L2[name](net, x, y, **EXTRAS), x, y, distance)
    print(f"{name}: {float(published.max()):.3f} as published, {float(reached.max()):.3f} with targets")
    assert float(reached.max()) <= 1.05
    assert float(published.max()) > 1.4


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fab_t_within_5_percent_where_slopes_differ(norm):
    for box in (False, True):
        net, x, y, distance = samples(box)
        reached = ratio(net, fab(net, x, y, norm=norm, steps=50, targets=9), x, y, distance[norm], norm)
        assert float(reached.max()) <= 1.05


@pytest.mark.parametrize("name", L2)
def test_within_5_percent_on_a_piecewise_linear_model_of_three_classes(name):
    """A fold 5 (|a u| - r) and a corner min(b u - s, c u - t) / 2, a, b, c orthogonal: the steep one wins as logit."""
    g = torch.Generator().manual_seed(3)
    a, b, c = torch.linalg.qr(torch.randn(DIM, 3, generator=g, dtype=DTYPE))[0].T
    x = images(0.4, 0.6, batch=12, seed=2)
    y = torch.zeros(12, dtype=torch.int64)

    def net(z: Tensor) -> Tensor:
        u = z.flatten(1) - 0.5
        first, second = u @ b - 0.28, u @ c - 0.2
        fold = (u @ a).relu() + (-(u @ a)).relu() - 0.4
        corner = first - (first - second).relu()
        return torch.stack([torch.zeros_like(fold), 5 * fold + 1.5, corner / 2], 1)

    u = x.flatten(1) - 0.5
    to_fold = 0.1 - (u @ a).abs()
    sides = [(0.28 - u @ b).clamp_min(0), (0.2 - u @ c).clamp_min(0)]
    to_corner = (sides[0].square() + sides[1].square()).sqrt()
    keep = (to_fold > 0.02) & (net(x).argmax(1) == 0)
    assert int(keep.sum()) >= 5
    reached = ratio(net, L2[name](net, x[keep], y[keep], **EXTRAS), x[keep], y[keep], to_fold.minimum(to_corner)[keep])
    assert float(reached.max()) <= 1.05


@pytest.mark.parametrize("name", L2)
def test_the_extras_only_add(name):
    """Without them the published algorithm; with them never farther, and for each class one run."""
    net, x, y, _ = samples(box=False)
    x, y = x[:4], y[:4]
    short = {"cw_l2": {"c": 10.0, "steps": 30, "lr": 0.1}, "ddn": {"steps": 30}}[name]
    attack = {"cw_l2": cw_l2, "ddn": ddn}[name]
    calls: list[int] = []

    def watched(z: Tensor) -> Tensor:
        calls.append(len(z))
        return net(z)

    def run(**extra: int) -> tuple[Tensor, int]:
        calls.clear()
        return (attack(watched, x, y, **short, **extra) - x).flatten(1).norm(dim=1), len(calls)

    published, once = run()
    one_target, twice = run(targets=1)
    searched, more = run(line_search=7)
    assert (one_target <= published).all()
    assert (searched <= published).all()
    assert (searched < published).any()
    first = int(name == "cw_l2")  # the logits of x
    assert twice - first == 2 * (once - first)
    assert more == once + 7
    assert run(targets=99)[1] - first == CLASSES * (once - first)


def test_the_line_search_finds_the_boundary_of_the_segment_or_nothing():
    x, y = torch.zeros(2, 2, dtype=DTYPE), torch.zeros(2, dtype=torch.int64)
    cut = torch.tensor([0.3, 9.0], dtype=DTYPE)

    def net(z: Tensor) -> Tensor:
        return torch.stack([cut - z[:, 0], torch.zeros(2, dtype=DTYPE)], 1)

    nearest = Nearest(x, y, "l2")
    far = torch.tensor([[0.8, 0.6], [0.8, 0.6]], dtype=DTYPE)
    nearest.show(far, net(far))
    nearest.search(net, 20)
    torch.testing.assert_close(nearest.image, torch.tensor([[0.3, 0.225], [0.0, 0.0]], dtype=DTYPE), rtol=0, atol=1e-5)
    assert nearest.distance.tolist() == [pytest.approx(0.375, abs=1e-5), float("inf")]


def test_likely_classes_and_their_lead():
    logits = torch.tensor([[-3.0, -9.0, -5.0], [1.0, 7.0, 2.0]])
    y = torch.tensor([0, 1])
    assert [classes.tolist() for classes in likely(logits, y, 1)] == [[2, 2]]
    assert [classes.tolist() for classes in likely(logits, y, 5)] == [[2, 2], [1, 0]]
    assert likely(logits, y, 0) == []
    assert lead(logits, y, None).tolist() == [-2.0, -5.0]
    assert lead(logits, y, torch.tensor([1, 0])).tolist() == [-6.0, -6.0]


@pytest.mark.parametrize(
    "make", [lambda **extra: CWL2(c=1.0, steps=1, lr=0.1, **extra), lambda **extra: DDN(steps=1, **extra)]
)
def test_bad_extras_are_named_and_good_ones_passed_on(make: Any):
    for key in ("targets", "line_search"):
        with pytest.raises(ValueError, match=f"{key}=-1"):
            make(**{key: -1})
    assert make(targets=3, line_search=4).describe()["targets"] == 3
    assert make(targets=3, line_search=4).describe()["line_search"] == 4


def test_the_classes_pass_the_extras_on():
    net, x, y, _ = samples(box=False)
    x, y, ids = x[:3], y[:3], torch.arange(3)
    cw, steps = {"c": 1.0, "steps": 20, "lr": 0.1}, 20
    for extra in ({"targets": 2}, {"line_search": 3}):
        assert torch.equal(CWL2(**cw, **extra)(net, x, y, ids=ids, seed=0), cw_l2(net, x, y, **cw, **extra))
        assert torch.equal(DDN(steps=steps, **extra)(net, x, y, ids=ids, seed=0), ddn(net, x, y, steps=steps, **extra))


def test_cw_l2_leaves_a_tie_of_logits():
    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=DTYPE), torch.tensor([0])

    def net(z: Tensor) -> Tensor:
        return torch.stack([1 - z.flatten(1)[:, 0], z.flatten(1)[:, 0]], 1)  # equal at the image itself

    assert int(net(x).argmax(1)) == 0
    assert float(cw_l2(net, x, y, c=1.0, steps=1, lr=0.1, shrink=0.0)) > 0.5
