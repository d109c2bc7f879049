"""C&W l2, DDN, NI-FGSM and TI-DIM against slow transcriptions of their equations, iterate by iterate."""

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.cw_l2 import cw_l2
from mi_at.attacks.ddn import ddn
from mi_at.attacks.ni_fgsm import ni_fgsm
from mi_at.attacks.ti_dim import diverse, gaussian_kernel, smooth, ti_dim
from mi_at.functional import random
from tests.references import norm_and_transfer as ref

DTYPE = torch.float64
SHAPE = (2, 5, 4)


class Recorder(nn.Module):
    """A smooth network that keeps every batch it was shown."""

    def __init__(self, seed: int = 0, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(60, 16),
                nn.Tanh(),
                nn.Linear(16, classes),
            ).to(DTYPE)
        self.net[-1].weight.data.mul_(2.0)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x.detach().clone())
        return self.net(x)


def data(net: Recorder, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images that are right when clean, one of them black and white, and the last one wrong."""
    x = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    x[0] = x[0].round()
    y = net.net(x).argmax(1)
    y[-1] = (y[-1] + 1) % 4
    return x, y


def assert_shown(shown: list[Tensor], want: list[list[Tensor]], atol: float = 1e-9) -> None:
    """`shown` [iterates][B, ...] beside `want` [B][iterates][1, ...]."""
    assert len(shown) == len(want[0])
    for t, batch in enumerate(shown):
        expected = torch.cat([images[t] for images in want])
        torch.testing.assert_close(batch, expected, rtol=0, atol=atol, msg=lambda text, t=t: f"step {t}: {text}")


@pytest.mark.parametrize("kappa", [0.0, 2.0])
@pytest.mark.parametrize("shrink", [1e-6, 0.1])
def test_cw_l2_equals_the_literal_loop(kappa, shrink):
    net = Recorder()
    x, y = data(net)
    settings = {"kappa": kappa, "steps": 12, "lr": 0.1, "shrink": shrink}
    net.shown.clear()
    got = cw_l2(net, x, y, c=0.7, **settings)
    shown = list(net.shown)
    want = [ref.cw_l2(net.net, x[i : i + 1], int(y[i]), c=0.7, **settings) for i in range(len(x))]
    assert_shown(shown[1:], want)  # the clean images come first
    assert torch.equal(shown[0], x)
    expected = [ref.nearest(net.net, x[i : i + 1], int(y[i]), want[i]) for i in range(len(x))]
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-9)
    assert torch.equal(got[-1], x[-1]), "wrong when clean"
    assert not torch.equal(got[1], x[1]), "something was found"


def test_the_search_over_c_equals_the_literal_loop():
    """From far too small a c, and from far too large a one: both branches of the search are taken."""
    net = Recorder(seed=1)
    x, y = data(net, seed=1)
    settings = {"kappa": 0.0, "steps": 8, "lr": 0.1, "shrink": 0.01}
    for c in (1e-2, 100.0):
        net.shown.clear()
        got = cw_l2(net, x, y, c=c, binary_search=6, **settings)
        shown = list(net.shown)
        want = [ref.cw_l2_search(net.net, x[i : i + 1], int(y[i]), c=c, binary_search=6, **settings) for i in range(4)]
        assert_shown(shown[1:], want)
        expected = [ref.nearest(net.net, x[i : i + 1], int(y[i]), want[i]) for i in range(4)]
        torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("levels", [None, 256, 16])
def test_ddn_equals_the_literal_loop(levels):
    net = Recorder()
    x, y = data(net)
    if levels:
        x = (x * 255).round() / 255
    settings = {"steps": 15, "gamma": 0.08, "init_norm": 0.7, "levels": levels}
    net.shown.clear()
    got = ddn(net, x, y, **settings)
    shown = list(net.shown)
    want = [ref.ddn(net.net, x[i : i + 1], int(y[i]), **settings) for i in range(len(x))]
    assert_shown(shown, want)
    expected = [ref.nearest(net.net, x[i : i + 1], int(y[i]), want[i]) for i in range(len(x))]
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-9)
    assert torch.equal(got[-1], x[-1]), "wrong when clean"
    assert not torch.equal(got[1], x[1]), "something was found"


def test_ddn_does_not_outgrow_the_box():
    """A class that nothing reaches: the length grows up to the farthest corner, and no further."""
    net = Recorder()
    x, _ = data(net)
    y = torch.zeros(4, dtype=torch.int64)
    settings = {"steps": 12, "gamma": 0.5, "init_norm": 1.0, "levels": None}
    net.net[-1].bias.data[0] = 6.0
    net.shown.clear()
    assert torch.equal(ddn(net, x, y, **settings), x)
    # the gradient of a saturated softmax has fewer digits
    assert_shown(list(net.shown), [ref.ddn(net.net, x[i : i + 1], 0, **settings) for i in range(4)], atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_ni_fgsm_equals_the_literal_loop(decay):
    net = Recorder()
    x, y = data(net)
    settings = {"eps": 0.2, "step_size": 0.05, "steps": 7, "decay": decay}
    net.shown.clear()
    got = ni_fgsm(objectives.cross_entropy(net, y), x, **settings)
    shown = list(net.shown)
    want = [ref.ni_fgsm(net.net, x[i : i + 1], int(y[i]), **settings) for i in range(len(x))]
    assert_shown(shown, [images for images, _ in want])
    torch.testing.assert_close(got, torch.cat([last for _, last in want]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
@pytest.mark.parametrize(("prob", "kernel_size"), [(0.0, 5), (0.6, 1), (1.0, 3)])
def test_ti_dim_equals_the_literal_loop(prob, kernel_size, resize):
    net = Recorder()
    x, y = data(net)
    ids = torch.tensor([7, 3, 11, 4])
    settings = {"eps": 0.2, "step_size": 0.05, "steps": 5, "decay": 0.4}
    settings |= {"prob": prob, "low": 0.4, "high": 1.0, "resize": resize}
    net.shown.clear()
    got = ti_dim(objectives.cross_entropy(net, y), x, ids=ids, seed=3, kernel_size=kernel_size, nsig=2.0, **settings)
    shown = list(net.shown)
    draws = [random.uniform(ids, (4,), random.key(3, "ti_dim", t)).tolist() for t in range(5)]
    weights = ref.kernel(kernel_size, 2.0)
    want = [
        ref.ti_dim(net.net, x[i : i + 1], int(y[i]), draws=[d[i] for d in draws], weights=weights, **settings)
        for i in range(4)
    ]
    assert_shown(shown, [images for images, _ in want], atol=1e-12)
    torch.testing.assert_close(got, torch.cat([last for _, last in want]), rtol=0, atol=1e-9)
    if prob == 1.0:
        assert all((batch[i] == 0).any() for batch in shown[:1] for i in range(1, 4))


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_the_batched_resize_is_torchs_at_every_size_and_place(resize):
    images = torch.rand(1, 2, 9, 6, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    grid = [(u + 0.5) / 6 for u in range(6)]
    draws = torch.tensor([[0.0, a, b, c] for a in grid for b in grid for c in grid])
    many = images.expand(len(draws), -1, -1, -1).clone().requires_grad_(True)
    options = {"prob": 0.5, "low": 0.3, "high": 1.0, "resize": resize}
    got = diverse(many, draws, **options)
    leaf = images.clone().requires_grad_(True)
    want = torch.cat([ref.diverse(leaf, draw, **options) for draw in draws.tolist()])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.rand(want.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), many)[0].sum(0, keepdim=True),
        torch.autograd.grad((want * weights).sum(), leaf)[0],
        rtol=0,
        atol=1e-12,
    )
    assert len({tuple(image.flatten().tolist()) for image in got.detach()}) > 100, "sizes and places differ"
    draws[:, 0] = 0.5
    assert torch.equal(diverse(many, draws, **options), many), "at prob .5 a draw of .5 leaves the image"


def test_low_and_high_of_one_leave_the_image():
    """NAMID's code draws its sizes so: the transform is the identity."""
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(diverse(images, draws, prob=1.0, low=1.0, high=1.0), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "nsig"), [(1, 3.0), (3, 3.0), (15, 3.0), (5, 1.0)])
def test_the_kernel_and_the_smoothing(size, nsig):
    one, both = gaussian_kernel(size, nsig), torch.tensor(ref.kernel(size, nsig), dtype=DTYPE)
    torch.testing.assert_close(one[:, None] * one, both, rtol=0, atol=1e-14)
    image = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    torch.testing.assert_close(smooth(image, one), ref.smooth(image, both.tolist()), rtol=0, atol=1e-12)
