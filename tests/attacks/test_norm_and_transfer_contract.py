"""What every call of C&W l2, DDN, FAB, NI-FGSM and TI-DIM guarantees, as evaluation attacks and as functions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.cw_l2 import CWL2, cw_l2
from mi_at.attacks.ddn import DDN, ddn
from mi_at.attacks.fab import FAB, fab
from mi_at.attacks.ni_fgsm import NIFGSM, ni_fgsm
from mi_at.attacks.ti_dim import TIDIM, ti_dim
from mi_at.evaluation.outcomes import out_of_reach, radius

NEAREST: dict[str, Any] = {
    "cw_l2": CWL2(c=5.0, steps=20, lr=0.05, binary_search=3),
    "ddn": DDN(steps=25),
    "ddn_16": DDN(steps=25, levels=16),
    "fab": FAB(norm="linf", steps=8),
    "fab_l2": FAB(norm="l2", steps=8),
    "fab_t": FAB(norm="linf", steps=8, targets=9),
}
BOUNDED: dict[str, Any] = {
    "ni_fgsm": NIFGSM(eps="8/255", step_size="2/255", steps=6),
    "ti_dim": TIDIM(eps=0.1, step_size=0.03, steps=6, prob=0.7, low=0.5, kernel_size=3),
}
ALL = NEAREST | BOUNDED
IDS = torch.tensor([5, 90, 3, 17, 41, 2, 8, 64])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Smooth, with a batch norm, and confident enough to have something to attack."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(144, 16),
            nn.Tanh(),
            nn.Linear(16, 5),
        )
    net[-1].weight.data.mul_(4.0)
    return net.to(dtype).eval()


def data(net: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Right when clean, but for the last; the first is black and white."""
    x = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] = x[0].round()
    with torch.no_grad():
        y = net(x).argmax(1)
    y[-1] = (y[-1] + 1) % 5
    return x, y


def size(delta: Tensor, norm: str) -> Tensor:
    flat = delta.flatten(1).double()
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


@pytest.mark.parametrize("name", ALL)
class TestEveryAttack:
    def test_range_type_and_what_is_left_alone(self, name):
        net = network().train()
        parameters = list(net.parameters())
        for i, parameter in enumerate(parameters):
            parameter.grad = None if i % 2 else torch.full_like(parameter, 7.0)
        parameters[0].requires_grad_(False)
        state = {key: value.clone() for key, value in net.state_dict().items()}
        x, y = data(network())
        x_before, y_before, rng = x.clone(), y.clone(), torch.get_rng_state()
        with attacking(net):
            x_adv = ALL[name](net, x, y, ids=IDS, seed=0)
        assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)
        assert torch.equal(torch.get_rng_state(), rng), "the global generator is not used"
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert not x_adv.requires_grad
        assert x_adv.grad_fn is None
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1
        assert not torch.equal(x_adv, x)
        assert net.training
        assert [p.requires_grad for p in parameters] == [i > 0 for i in range(len(parameters))]
        for i, parameter in enumerate(parameters):
            assert (parameter.grad is None) if i % 2 else torch.equal(parameter.grad, torch.full_like(parameter, 7.0))
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())

    def test_without_the_context_no_gradient_reaches_a_parameter(self, name):
        net = network()
        x, y = data(net)
        ALL[name](net, x, y, ids=IDS, seed=0)
        assert all(p.grad is None and p.requires_grad for p in net.parameters())

    def test_samples_do_not_see_each_other(self, name):
        """Whole, one by one, in another order, or only some of them."""
        net = network(torch.float64)
        x, y = data(net, torch.float64)
        # FAB computes in float32, the rest in the network's precision
        tolerance = {"rtol": 0, "atol": 1e-4 if name.startswith("fab") else 1e-9}

        def attack(places: Tensor) -> Tensor:
            return ALL[name](net, x[places], y[places], ids=IDS[places], seed=4)

        whole = attack(torch.arange(8))
        alone = torch.cat([attack(torch.tensor([i])) for i in range(8)])
        torch.testing.assert_close(alone, whole, **tolerance)
        order = torch.tensor([6, 2, 7, 0, 5, 1, 4, 3])
        torch.testing.assert_close(attack(order), whole[order], **tolerance)
        torch.testing.assert_close(attack(torch.tensor([4, 1])), whole[[4, 1]], **tolerance)

    def test_where_the_caller_has_no_gradients(self, name):
        net = network()
        x, y = data(net)
        expected = ALL[name](net, x, y, ids=IDS, seed=0)
        for outside in (torch.no_grad, torch.inference_mode):
            with outside():
                inner_x, inner_y, inner_ids = x + 0.0, y + 0, IDS + 0
                with attacking(net):
                    x_adv = ALL[name](net, inner_x, inner_y, ids=inner_ids, seed=0)
            assert torch.equal(x_adv, expected)
            assert not x_adv.is_inference()

    def test_nothing_to_find(self, name):
        """Logits that do not depend on the image: the image comes back as it was, without NaN."""

        def net(z: Tensor) -> Tensor:
            return torch.zeros(len(z), 5, dtype=z.dtype) + torch.tensor([1.0, 0, 0, 0, 0]) + 0 * z.flatten(1)[:, :1]

        x = data(network())[0]
        assert torch.equal(ALL[name](net, x, torch.zeros(8, dtype=torch.int64), ids=IDS, seed=0), x)

    def test_an_empty_batch(self, name):
        net = network()
        x, y = data(net)
        assert ALL[name](net, x[:0], y[:0], ids=IDS[:0], seed=0).shape == (0, 1, 6, 6)

    def test_the_description_is_plain_and_complete(self, name):
        description = ALL[name].describe()
        assert all(value is None or isinstance(value, str | int | float) for value in description.values())
        assert {"attack", "name", "norm", "eps", "steps"} <= set(description)
        assert description["norm"] == ("l2" if name in ("cw_l2", "ddn", "ddn_16", "fab_l2") else "linf")
        assert (radius(description) is None) == (name in NEAREST)
        assert not out_of_reach(description)
        assert getattr(ALL[name], "minimum_norm", False) == (name in NEAREST)


@pytest.mark.parametrize("name", NEAREST)
class TestNearest:
    def test_adversarial_or_clean(self, name):
        net = network()
        x, y = data(net)
        x_adv = NEAREST[name](net, x, y, ids=IDS, seed=0)
        wrong = net(x_adv).argmax(1) != y
        moved = size(x_adv - x, "linf") > 0
        assert torch.equal(x_adv[-1], x[-1]), "wrong when clean: distance 0"
        assert torch.equal(moved[:-1], wrong[:-1])
        assert int(wrong.sum()) > 4

    def test_no_steps_find_nothing(self, name):
        net = network()
        x, y = data(net)
        x_adv = replace(NEAREST[name], steps=0)(net, x, y, ids=IDS, seed=0)
        # C&W's start is the image only up to its shrink
        assert float((x_adv - x).abs().max()) <= (1e-6 if name == "cw_l2" else 0.0)

    def test_within_is_a_radius(self, name):
        attack = NEAREST[name]
        assert replace(attack, within="128/255").describe()["within"] == 128 / 255
        assert attack.describe()["within"] is None
        with pytest.raises(ValueError, match=r"attack\.within=-0\.5"):
            replace(attack, within=-0.5)


@pytest.mark.parametrize("name", ["fab", "fab_l2", "fab_t"])
def test_more_steps_of_fab_are_never_farther(name):
    """Every iterate is looked at, so that the nearest of a longer path with the same beginning is as near."""
    net = network()
    x, y = data(net)
    attack = NEAREST[name]
    far, near = (size(replace(attack, steps=steps)(net, x, y, ids=IDS, seed=0) - x, attack.norm) for steps in (3, 12))
    found = far > 0
    assert (near[found] <= far[found] + 1e-6).all()
    assert (near[found] < far[found] - 1e-4).any()
    assert (near > 0)[found].all()


@pytest.mark.parametrize("name", BOUNDED)
class TestBounded:
    @pytest.mark.parametrize("eps", [0.0, "8/255", 0.5])
    def test_budget(self, name, eps):
        net = network()
        x, y = data(net)
        attack = replace(BOUNDED[name], eps=eps, step_size=0.2)
        x_adv = attack(net, x, y, ids=IDS, seed=0)
        assert float((x_adv - x).abs().max()) <= radius({"eps": eps}) + 1e-6
        if eps == 0.0:
            assert torch.equal(x_adv, x)
        assert torch.equal(replace(attack, steps=0)(net, x, y, ids=IDS, seed=0), x)

    def test_it_climbs(self, name):
        net = network(torch.float64)
        x, y = data(net, torch.float64)
        objective = objectives.cross_entropy(net, y)
        x_adv = BOUNDED[name](net, x, y, ids=IDS, seed=0)
        assert (objective(x_adv) > objective(x)).all()

    def test_the_size_of_the_gradient_does_not_matter(self, name):
        x = torch.full((2, 1, 4, 4), 0.5)
        make = ni_fgsm if name == "ni_fgsm" else ti_dim
        for scale in (1e-30, 1.0, 1e30):
            x_adv = make(lambda z, scale=scale: scale * z.flatten(1).sum(1), x, eps=0.2, step_size=0.05, steps=3)
            torch.testing.assert_close(x_adv, torch.full_like(x, 0.65), rtol=0, atol=1e-6)


def test_ti_dim_draws_by_seed_id_and_step():
    net = network(torch.float64)
    x, y = data(net, torch.float64)
    shown: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        shown.append(z.detach())
        return net(z)

    def images(seed: int, ids: Tensor) -> list[Tensor]:
        shown.clear()
        settings = {"eps": 1e-6, "step_size": 1e-7, "steps": 4, "prob": 1.0, "low": 0.4, "kernel_size": 1}
        TIDIM(**settings)(watched, x[:1].expand(8, -1, -1, -1), y[:1].expand(8), ids=ids, seed=seed)
        return list(shown)

    one = images(0, IDS)
    empty = [[bool((image == 0).sum() > 12) for image in batch] for batch in one]
    assert sum(map(sum, empty)) > 16, "most are shrunk"
    places = {tuple((image != 0).flatten().tolist()) for batch in one for image in batch}
    assert len(places) > 10, "per sample and per step"
    assert all(torch.equal(a, b) for a, b in zip(images(0, IDS), one, strict=True))
    assert not torch.equal(images(1, IDS)[0], one[0])
    assert not torch.equal(images(0, IDS + 1)[0], one[0])


def test_prob_is_the_share_that_is_transformed():
    x = torch.full((400, 1, 10, 10), 0.5)
    seen: list[Tensor] = []

    def objective(z: Tensor) -> Tensor:
        seen.append((z.detach() == 0).flatten(1).any(1))
        return z.flatten(1).sum(1)

    ti_dim(objective, x, eps=0.1, step_size=0.01, steps=5, prob=0.3, low=0.5, high=0.9)
    assert float(torch.stack(seen).float().mean()) == pytest.approx(0.3, abs=0.04)


def test_ddn_moves_where_there_is_no_gradient():
    """A step function: only the noise of (seed, id) finds the other side; without noise nothing moves."""

    def net(z: Tensor) -> Tensor:
        score = (z.flatten(1).mean(1) > 0.56).to(z.dtype) * 2 - 1 + 0 * z.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)

    x, y = torch.full((64, 1, 4, 4), 0.5), torch.zeros(64, dtype=torch.int64)
    attack, ids = DDN(steps=20, init_norm=1.5), torch.arange(64)
    x_adv = attack(net, x, y, ids=ids, seed=0)
    found = net(x_adv).argmax(1) == 1
    assert 5 < int(found.sum()) < 60
    assert torch.equal(attack(net, x, y, ids=ids, seed=0), x_adv)
    assert not torch.equal(attack(net, x, y, ids=ids, seed=1), x_adv)
    assert torch.equal(ddn(net, x, y, steps=20, init_norm=1.5), x)


def test_levels_are_those_of_8_bit_images():
    net = network()
    x, y = data(net)
    x = (x * 255).round() / 255
    y = net(x).argmax(1)
    for levels in (256, 16):
        x_adv = DDN(steps=25, levels=levels)(net, x, y, ids=IDS, seed=0)
        steps = x_adv * (levels - 1)
        on_grid = (steps - steps.round()).abs().flatten(1).amax(1) < 1e-3
        assert bool((on_grid | (net(x_adv).argmax(1) == y)).all())
        assert int(on_grid.sum()) > 4
    unrounded = DDN(steps=25)(net, x, y, ids=IDS, seed=0) * 255
    assert float((unrounded - unrounded.round()).abs().max()) > 0.01


def test_the_class_passes_on_every_setting():
    net = network(torch.float64)
    x, y = data(net, torch.float64)
    pairs: list[tuple[Any, Callable[..., Tensor], dict[str, Any]]] = [
        (CWL2, cw_l2, {"c": 3.0, "kappa": 1.0, "steps": 12, "lr": 0.05, "binary_search": 2, "shrink": 0.05}),
        (FAB, fab, {"norm": "l2", "steps": 4, "targets": 2, "alpha_max": 0.3, "eta": 1.2, "beta": 0.6}),
        (DDN, ddn, {"steps": 9, "gamma": 0.2, "init_norm": 0.4, "levels": 64}),
    ]
    for make, function, settings in pairs:
        got = make(**settings)(net, x, y, ids=IDS, seed=0)
        assert torch.equal(got, function(net, x, y, **settings))
        for key in settings:  # each of them matters
            default = {"c": 0.5, "steps": 1, "lr": 0.01, "norm": "linf"}.get(
                key, make.__dataclass_fields__[key].default
            )
            other = function(net, x, y, **(settings | {key: default}))
            assert not torch.equal(other, got), key
    objective = objectives.cross_entropy(net, y)
    settings = {"eps": 0.1, "step_size": 0.02, "steps": 4, "decay": 0.7}
    assert torch.equal(NIFGSM(**settings)(net, x, y, ids=IDS, seed=0), ni_fgsm(objective, x, **settings))
    settings |= {"prob": 0.8, "low": 0.4, "high": 0.9, "resize": "nearest", "kernel_size": 5, "nsig": 2.0}
    got = TIDIM(**settings)(net, x, y, ids=IDS, seed=6)
    assert torch.equal(got, ti_dim(objective, x, **settings, ids=IDS, seed=6))


GOOD: dict[Any, dict[str, Any]] = {
    CWL2: {"c": 1.0, "steps": 2, "lr": 0.01},
    DDN: {"steps": 2},
    FAB: {"steps": 2},
    NIFGSM: {"eps": 0.1, "step_size": 0.05, "steps": 2},
    TIDIM: {"eps": 0.1, "step_size": 0.05, "steps": 2},
}
BAD = [
    (CWL2, {"c": 0.0}, "c=0.0"),
    (CWL2, {"c": float("inf")}, "c=inf"),
    (CWL2, {"lr": -0.5}, "lr=-0.5"),
    (CWL2, {"kappa": -1.0}, "kappa=-1.0"),
    (CWL2, {"kappa": float("nan")}, "kappa=nan"),
    (CWL2, {"steps": -1}, "steps=-1"),
    (CWL2, {"binary_search": 0}, "binary_search=0"),
    (CWL2, {"shrink": 1.0}, "shrink=1.0"),
    (DDN, {"steps": -2}, "steps=-2"),
    (DDN, {"gamma": 0.0}, "gamma=0.0"),
    (DDN, {"gamma": 1.0}, "gamma=1.0"),
    (DDN, {"init_norm": 0.0}, "init_norm=0.0"),
    (DDN, {"levels": 1}, "levels=1"),
    (FAB, {"norm": "l1"}, "l1"),
    (FAB, {"steps": -1}, "steps=-1"),
    (FAB, {"targets": -1}, "targets=-1"),
    (FAB, {"alpha_max": 1.5}, "alpha_max=1.5"),
    (FAB, {"eta": 0.9}, "eta=0.9"),
    (FAB, {"beta": 1.0}, "beta=1.0"),
    (NIFGSM, {"eps": 8}, r"did you mean 8/255\?"),
    (NIFGSM, {"step_size": 0.0}, "step_size=0.0"),
    (NIFGSM, {"steps": -1}, "steps=-1"),
    (NIFGSM, {"decay": -0.1}, "decay=-0.1"),
    (TIDIM, {"eps": -0.1}, "eps=-0.1"),
    (TIDIM, {"decay": float("nan")}, "decay=nan"),
    (TIDIM, {"prob": 1.5}, "prob=1.5"),
    (TIDIM, {"low": 0.0}, "low=0.0"),
    (TIDIM, {"low": 0.9, "high": 0.8}, "high=0.8"),
    (TIDIM, {"high": 1.1}, "high=1.1"),
    (TIDIM, {"resize": "cubic"}, "cubic"),
    (TIDIM, {"kernel_size": 4}, "kernel_size=4"),
    (TIDIM, {"nsig": 0.0}, "nsig=0.0"),
]


@pytest.mark.parametrize(("make", "change", "named"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_options_are_named(make, change, named):
    with pytest.raises(ValueError, match=named):
        make(**(GOOD[make] | change))
    x, y = torch.full((1, 1, 3, 3), 0.5), torch.tensor([0])
    functions = {CWL2: cw_l2, DDN: ddn, FAB: fab}
    if make in functions:
        with pytest.raises(ValueError, match=named):
            functions[make](lambda z: z.flatten(1), x, y, **(GOOD[make] | change))
    else:
        function = ni_fgsm if make is NIFGSM else ti_dim
        with pytest.raises(ValueError, match=named):
            function(lambda z: z.flatten(1).sum(1), x, **(GOOD[make] | change))


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_images_out_of_range_are_named(make):
    for x, named in ((torch.full((1, 1, 3, 3), 1.5), "1.5"), (torch.zeros(1, 1, 3, 3, dtype=torch.uint8), "uint8")):
        with pytest.raises(ValueError, match=named):
            make(**GOOD[make])(lambda z: z.flatten(1), x, torch.tensor([0]), ids=torch.tensor([0]), seed=0)


def test_ti_dim_wants_images():
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        ti_dim(lambda z: z.sum(1), torch.full((1, 4), 0.5), eps=0.1, step_size=0.1, steps=1)
