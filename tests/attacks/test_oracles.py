"""Our attacks beside foolbox, torchattacks, adv-lib and pyautoattack, on networks trained on real MNIST here.

A comparison is skipped where its peer cannot be imported; the others run. 1,000 test images (ORACLE_IMAGES in the
environment for fewer). The table is printed: pytest -m slow -rP tests/attacks/test_oracles.py.

What is compared is what an evaluator counts: misclassified, in [0, 1] and within the radius, by the same network.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks import objectives
from mi_at.attacks.autoattack import AutoAttack, forked_rng
from mi_at.attacks.contexts import attacking
from mi_at.attacks.cw_l2 import CWL2
from mi_at.attacks.ddn import DDN
from mi_at.attacks.fab import FAB
from mi_at.attacks.ni_fgsm import NIFGSM
from mi_at.attacks.pgd import PGD, pgd
from mi_at.attacks.ti_dim import TIDIM
from mi_at.data.mnist import parse_idx

pytestmark = [pytest.mark.slow, pytest.mark.realdata("mnist")]

N = int(os.environ.get("ORACLE_IMAGES", "1000"))


@dataclass
class Victim:
    """A trained network, the images it is attacked on (all right when clean), and the radii."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    clean: float
    eps: float
    l2: float


def read(root: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    raw = root / "MNIST" / "raw"
    images = parse_idx((raw / f"{split}-images-idx3-ubyte").read_bytes(), dimensions=3, what="images")
    labels = parse_idx((raw / f"{split}-labels-idx1-ubyte").read_bytes(), dimensions=1, what="labels")
    return images[:count, None].float() / 255, labels[:count].long()


def train(x: Tensor, y: Tensor, *, eps: float, epochs: int) -> nn.Module:
    """A small ReLU network; adversarially with 5 steps of PGD where eps is positive."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for epoch in range(epochs):
        reach = eps * min(1.0, (epoch + 1) / 3)  # from eps .2 at once the training may not start
        for part in torch.randperm(len(x)).split(100):
            images, labels = x[part], y[part]
            if eps:
                with attacking(net):
                    objective = objectives.cross_entropy(net, labels)
                    images = pgd(objective, images, eps=reach, step_size=reach / 3, steps=5)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module", params=["natural", "robust"])
def victim(request: pytest.FixtureRequest) -> Victim:
    root = request.getfixturevalue("data_root")
    with forked_rng():
        eps, l2, radius, epochs = {"natural": (0.05, 1.0, 0.0, 3), "robust": (0.15, 1.5, 0.2, 6)}[request.param]
        net = train(*read(root, "train", 20_000), eps=radius, epochs=epochs)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x, y = read(root, "t10k", N)
    right = net(x).argmax(1) == y
    clean = float(right.float().mean())
    print(f"\n{request.param}: {int(right.sum())} of {N} right when clean; eps {eps}, l2 {l2}")
    assert clean > 0.9
    return Victim(request.param, net, x[right], y[right], clean, eps, l2)


# ---------------------------------------------------------------- counting
def broken(victim: Victim, x_adv: Tensor, radius: float | None, norm: str) -> Tensor:
    """[draws B] bool: misclassified, within the radius (None: at any distance) and in range."""
    x_adv, draws = x_adv.detach(), len(x_adv) // len(victim.x)
    delta = (x_adv - victim.x.repeat(draws, 1, 1, 1)).flatten(1)
    distance = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    ok = victim.net(x_adv).argmax(1) != victim.y.repeat(draws)
    ok &= (x_adv.flatten(1).amin(1) >= -1e-6) & (x_adv.flatten(1).amax(1) <= 1 + 1e-6)
    ok &= x_adv.flatten(1).abs().amax(1) > 0  # foolbox marks a failure of C&W by a black image
    return ok if radius is None else ok & (distance <= radius + 1e-5)


def median(victim: Victim, x_adv: Tensor, found: Tensor) -> float:
    return float((x_adv - victim.x).flatten(1).norm(dim=1)[found].median())


# ---------------------------------------------------------------- ours and theirs
Attack = Callable[[Victim], Tensor]


def ours(make: Callable[[Victim], Any], *, draws: int = 1) -> Attack:
    def run(v: Victim) -> Tensor:
        with attacking(v.net):
            return torch.cat([make(v)(v.net, v.x, v.y, ids=torch.arange(len(v.x)), seed=i) for i in range(draws)])

    return run


def repeated(attack: Attack, *, draws: int) -> Attack:
    return lambda v: torch.cat([attack(v) for _ in range(draws)])


def pgd_of(iterate: str) -> Attack:
    return ours(lambda v: PGD(eps=v.eps, step_size=v.eps / 8, steps=20, init="zero", iterate=iterate))


def autoattack(part: str, **settings: Any) -> Attack:
    return ours(lambda v: AutoAttack(eps=v.eps, attacks=[part], version="plus", batch_size=500, **settings))


def first(attack: Attack, count: int) -> Attack:
    """On some images only, where all are too many."""

    def run(v: Victim) -> Tensor:
        return torch.cat([attack(replace(v, x=v.x[:count], y=v.y[:count])), v.x[count:]])

    return run


CW = {"c": 1.0, "steps": 100, "lr": 0.05}
OURS: dict[str, Attack] = {
    "pgd_20": pgd_of("last"),
    "pgd_20 worst": pgd_of("worst"),
    "cw_l2": ours(lambda v: CWL2(**CW)),
    "cw_l2 frozen": ours(lambda v: CWL2(**CW, shrink=0.0)),
    "cw_l2 search": ours(lambda v: CWL2(**CW, binary_search=5)),
    "ddn": ours(lambda v: DDN(steps=50)),
    "fab": ours(lambda v: FAB(norm="linf", steps=50)),
    "fab_l2": ours(lambda v: FAB(norm="l2", steps=50)),
    "apgd-ce": autoattack("apgd-ce"),
    "square": autoattack("square", queries=1000),
    "aa standard": first(ours(lambda v: AutoAttack(eps=v.eps, batch_size=40, queries=500)), 60),
    "ni_fgsm": ours(lambda v: NIFGSM(eps=v.eps, step_size=v.eps / 4, steps=10)),
    # It decides per sample whether to resize, the peer once for the whole batch: its single draws scatter by 2 points.
    "ti_dim": ours(lambda v: TIDIM(eps=v.eps, step_size=v.eps / 4, steps=10, decay=0.1, kernel_size=15), draws=6),
    "ti_dim fixed": ours(lambda v: TIDIM(eps=v.eps, step_size=v.eps / 4, steps=10, decay=0.1, prob=0.0)),
}


def foolbox(name: str, epsilon: str | None = None, **settings: Any) -> Attack:
    def run(v: Victim) -> Tensor:
        fb = pytest.importorskip("foolbox")
        radius = None if epsilon is None else getattr(v, epsilon)
        made = {key: value(v) if callable(value) else value for key, value in settings.items()}
        attack = getattr(fb.attacks, name)(**made)
        model = fb.PyTorchModel(v.net, bounds=(0, 1), device="cpu")
        return attack(model, v.x, fb.criteria.Misclassification(v.y), epsilons=radius)[1]

    return run


def torchattacks(name: str, **settings: Any) -> Attack:
    def run(v: Victim) -> Tensor:
        ta = pytest.importorskip("torchattacks")
        made = {key: value(v) if callable(value) else value for key, value in settings.items()}
        return getattr(ta, name)(v.net, **made)(v.x, v.y)

    return run


def torchattacks_tifgsm(**settings: Any) -> Attack:
    """It is made for three channels: three equal ones, of which the network sees the mean, are the same problem."""

    def run(v: Victim) -> Tensor:
        ta = pytest.importorskip("torchattacks")

        class Grey(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = v.net

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x.mean(1, keepdim=True))

        attack = ta.TIFGSM(Grey().eval(), eps=v.eps, alpha=v.eps / 4, steps=10, decay=0.1, **settings)
        return attack(v.x.expand(-1, 3, -1, -1).contiguous(), v.y)[:, :1]

    return run


def adv_lib(name: str, **settings: Any) -> Attack:
    def run(v: Victim) -> Tensor:
        al = pytest.importorskip("adv_lib.attacks")
        made = {key: value(v) if callable(value) else value for key, value in settings.items()}
        return getattr(al, name)(v.net, v.x, v.y, **made)

    return run


def direct(part: str, queries: int = 5000) -> Attack:
    def run(v: Victim) -> Tensor:
        aa = pytest.importorskip("pyautoattack")
        library = aa.AutoAttack(v.net, norm="Linf", eps=v.eps, seed=0, version="plus", device="cpu")
        library.attacks_to_run = [part]
        library.square.n_queries = queries
        return library.run_standard_evaluation(v.x, v.y, batch_size=500)[0]

    return run


def direct_standard(v: Victim) -> Tensor:
    aa = pytest.importorskip("pyautoattack")
    library = aa.AutoAttack(v.net, norm="Linf", eps=v.eps, seed=0, version="standard", device="cpu")
    library.square.n_queries = 500
    return library.run_standard_evaluation(v.x, v.y, batch_size=40)[0]


INF = float("inf")
CASES: list[tuple[str, str, Attack]] = [
    (
        "pgd_20",
        "foolbox",
        foolbox("LinfPGD", "eps", abs_stepsize=lambda v: v.eps / 8, steps=20, random_start=False),
    ),
    (
        "pgd_20",
        "torchattacks",
        torchattacks("PGD", eps=lambda v: v.eps, alpha=lambda v: v.eps / 8, steps=20, random_start=False),
    ),
    # It keeps any misclassified iterate, and does not look at the last: one step more.
    (
        "pgd_20 worst",
        "adv_lib",
        adv_lib("pgd_linf", ε=lambda v: v.eps, steps=21, random_init=False, absolute_step_size=lambda v: v.eps / 8),
    ),
    (
        "cw_l2",
        "adv_lib",
        adv_lib(
            "carlini_wagner_l2",
            initial_const=1.0,
            binary_search_steps=1,
            max_iterations=100,
            learning_rate=0.05,
            abort_early=False,
        ),
    ),
    (
        "cw_l2",
        "foolbox",
        foolbox(
            "L2CarliniWagnerAttack",
            initial_const=1.0,
            binary_search_steps=1,
            steps=100,
            stepsize=0.05,
            abort_early=False,
        ),
    ),
    ("cw_l2 frozen", "torchattacks", torchattacks("CW", c=1, kappa=0, steps=100, lr=0.05)),
    (
        "cw_l2 search",
        "adv_lib",
        adv_lib(
            "carlini_wagner_l2",
            initial_const=1.0,
            binary_search_steps=5,
            max_iterations=100,
            learning_rate=0.05,
            abort_early=False,
        ),
    ),
    (
        "cw_l2 search",
        "foolbox",
        foolbox(
            "L2CarliniWagnerAttack",
            initial_const=1.0,
            binary_search_steps=5,
            steps=100,
            stepsize=0.05,
            abort_early=False,
        ),
    ),
    ("ddn", "adv_lib", adv_lib("ddn", steps=50, levels=None)),
    ("ddn", "foolbox", foolbox("DDNAttack", steps=50)),
    ("fab", "adv_lib", adv_lib("fab", norm=INF, n_iter=50, restarts=1)),
    ("fab", "torchattacks", torchattacks("FAB", norm="Linf", eps=lambda v: v.eps, steps=50, n_restarts=1)),
    ("fab_l2", "adv_lib", adv_lib("fab", norm=2, n_iter=50, restarts=1)),
    ("apgd-ce", "pyautoattack", direct("apgd-ce")),
    (
        "apgd-ce",
        "adv_lib",
        adv_lib("apgd", eps=lambda v: v.eps, norm=INF, n_iter=100, n_restarts=5, loss_function="ce"),
    ),
    ("apgd-ce", "torchattacks", torchattacks("APGD", eps=lambda v: v.eps, steps=100, n_restarts=5, loss="ce")),
    ("square", "pyautoattack", direct("square", queries=1000)),
    ("aa standard", "pyautoattack", first(direct_standard, 60)),
    (
        "square",
        "torchattacks",
        torchattacks("Square", eps=lambda v: v.eps, n_queries=1000, n_restarts=1, resc_schedule=False),
    ),
    (
        "ni_fgsm",
        "torchattacks",
        torchattacks("NIFGSM", eps=lambda v: v.eps, alpha=lambda v: v.eps / 4, steps=10, decay=1.0),
    ),
    ("ti_dim", "torchattacks", repeated(torchattacks_tifgsm(resize_rate=0.9, diversity_prob=0.5), draws=6)),
    ("ti_dim fixed", "torchattacks", torchattacks_tifgsm(diversity_prob=0.0)),
]
# Without a random draw, or with the same one: sample by sample the same answer, up to rounding at a boundary.
SAME = {"pgd_20", "pgd_20 worst", "cw_l2", "ddn", "fab", "fab_l2", "ni_fgsm", "ti_dim fixed"}
L2 = ("cw_l2", "ddn", "fab_l2")

_RESULTS: dict[tuple[str, str], tuple[Tensor, float]] = {}


def our_result(victim: Victim, name: str) -> tuple[Tensor, float]:
    key = (victim.name, name)
    if key not in _RESULTS:
        started = time.perf_counter()
        _RESULTS[key] = OURS[name](victim), time.perf_counter() - started
    return _RESULTS[key]


@pytest.mark.parametrize(("name", "peer", "theirs"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_as_strong_as_the_peer(victim: Victim, name: str, peer: str, theirs: Attack) -> None:
    l2 = name.startswith(L2)
    with forked_rng():
        torch.manual_seed(0)
        started = time.perf_counter()
        x_peer = theirs(victim)  # skips, where the peer is missing, before ours is run
        seconds = time.perf_counter() - started
    x_ours, our_seconds = our_result(victim, name)
    norm, radius = ("l2", victim.l2) if l2 else ("linf", victim.eps)
    for within in (radius, None) if l2 else (radius,):
        mine, other = broken(victim, x_ours, within, norm), broken(victim, x_peer, within, norm)
        accuracy = [victim.clean * float((~found).float().mean()) for found in (mine, other)]
        agreement = float((mine == other).float().mean())
        label = f"{norm} {within}" if within is not None else "any distance"
        line = f"{name:13s} {peer:13s} {label:13s} ours {accuracy[0]:7.2%} ({our_seconds:5.1f} s)"
        line += f"  peer {accuracy[1]:7.2%} ({seconds:5.1f} s)  agree {agreement:7.2%}"
        if l2:
            line += f"  median {median(victim, x_ours, mine):.3f} / {median(victim, x_peer, other):.3f}"
        print(line)
        assert accuracy[0] <= accuracy[1] + 0.01, line
        if peer == "pyautoattack":
            assert torch.equal(x_ours, x_peer)
        elif name in SAME:
            assert accuracy[0] >= accuracy[1] - 0.01, line
            assert agreement >= 0.98, line
