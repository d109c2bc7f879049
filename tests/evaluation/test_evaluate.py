"""The evaluator: closed-form accuracies, what it guarantees around an attack, and what it refuses."""

import random
import re

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationError, EvaluationResult, evaluate, sizes
from mi_at.evaluation.outcomes import out_of_reach
from tests.evaluation.nets import Halfspace, Planted, images, loader, predicted, small_conv

EPS = {"linf": 0.02, "l2": 0.06}


def run(net: nn.Module, attacks: dict, x: Tensor, y: Tensor, **options) -> EvaluationResult:
    batches = loader(x, y, options.pop("loader_batch", 16))
    return evaluate(net, attacks, batches, **{"progress": False, **options})


@pytest.fixture
def half() -> tuple[Halfspace, Tensor, Tensor]:
    """Images far enough from 0 and 1 that the box never binds; about one label in four is wrong."""
    net, x = Halfspace(), images(101, low=0.2, high=0.8)
    y = predicted(net, x)
    y[::4] = 1 - y[::4]
    return net, x, y


# ---------------------------------------------------------------- closed form
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_linear_network_falls_exactly_where_it_must(half, norm: str, batch_size: int) -> None:
    net, x, y = half
    eps = EPS[norm]
    pgd = {"eps": eps, "step_size": eps / 4, "steps": 20, "norm": norm}
    attacks = {
        "fgsm": FGSM(eps=eps, norm=norm),
        "pgd": PGD(**pgd),
        "pgd_gaussian": PGD(**pgd, init="gaussian", iterate="worst"),
        "cw": PGD(**pgd, objective="margin", kappa=50.0, restarts=2),
    }
    distance = net.falls_within(x, y)[norm]
    expected = distance > eps
    assert 0.2 < expected.float().mean() < 0.65
    assert (distance - eps).abs().min() > 1e-5  # no sample hangs on rounding
    result = run(net, attacks, x, y, batch_size=batch_size)
    assert torch.equal(result.clean.correct, distance > 0)
    assert result.clean.accuracy == int((distance > 0).sum()) / len(x)
    for name in attacks:
        assert torch.equal(result[name].correct, expected), name
        assert result[name].accuracy == int(expected.sum()) / len(x)
        # Each reaches the edge of the ball, and no farther; only what was attacked has moved.
        assert result[name].max_distance == pytest.approx(eps, rel=1e-4)
        assert torch.equal(result[name].distance == 0, distance <= 0)


def test_eps_zero_is_the_clean_accuracy(half) -> None:
    net, x, y = half
    attacks = {"fgsm": FGSM(eps=0), "pgd": PGD(eps=0, step_size=0.1, steps=3)}
    result = run(net, attacks, x, y)
    assert result["fgsm"].accuracy == result["pgd"].accuracy == result.clean.accuracy
    assert result["pgd"].unmoved == int(result.clean.correct.sum())


# ---------------------------------------------------------------- what it guarantees
class Layers(nn.Module):
    """Batch norm in another mode than its parent, a frozen and a trainable part, a gradient already there."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_conv()
        self.norm = nn.BatchNorm1d(10)
        self.drop = nn.Dropout(0.5)
        self.norm.running_mean += 0.3
        self.train()
        self.norm.eval()
        self.net[0].weight.requires_grad_(False)
        self.net[3].weight.grad = torch.full_like(self.net[3].weight, 7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.net(x)))


def hostile(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Does to the caller's state what attack libraries do: reseeds, flips modes, calls backward."""
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    torch.manual_seed(123)
    random.seed(123)
    x = x.clone().requires_grad_()
    net(x)[:, 0].sum().backward()
    net.train()
    return (x.detach() + 0.05 * x.grad.sign()).clamp(0, 1)


def state(net: nn.Module) -> dict:
    return {
        "modes": [module.training for module in net.modules()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "weights": [p.tolist() for p in net.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "hooks": len(net._forward_hooks),
    }


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_state_is_as_before(context) -> None:
    net = Layers()
    x = images(20, side=8)
    attacks = {"pgd": PGD(eps=0.1, step_size=0.05, steps=3), "hostile": Planted(hostile)}
    before = state(net)
    with context():
        grad_before = torch.is_grad_enabled()
        # Tensors made in here are inference tensors, as Lightning's test loop hands them over.
        y = torch.arange(20) % 10
        result = run(net, attacks, x.clone(), y, loader_batch=6)
        assert torch.is_grad_enabled() == grad_before
    assert state(net) == before
    assert result.clean.n == 20


def test_state_is_as_before_after_an_error() -> None:
    net = Layers()
    x = images(20, side=8)
    y = predicted(net.net, x)

    def fails(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hostile(net, x, y)
        raise RuntimeError("a bug in an attack")

    before = state(net)
    with pytest.raises(RuntimeError, match="a bug in an attack"):
        run(net.net, {"fails": Planted(fails)}, x, y)
    assert state(net) == before


def test_running_statistics_survive_an_attack() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    x = images(12)
    before = net[1].running_mean.clone()
    run(net, {"fgsm": FGSM(eps=0.1)}, x, torch.zeros(12, dtype=torch.long))
    assert torch.equal(net[1].running_mean, before)


def test_wrong_stays_wrong_and_is_never_attacked(half) -> None:
    """Some libraries attack wrong samples too and turn them right again."""
    net, x, y = half
    heals = Planted(lambda net, x, y: x + 0.1 * torch.sign(net.weight).view_as(x[:1]) * (2 * y - 1).view(-1, 1, 1, 1))
    result = run(net, {"heals": heals}, x, y, batch_size=9)
    assert torch.equal(result["heals"].correct, result.clean.correct)
    assert torch.equal(torch.cat(heals.ids), result.clean.correct.nonzero().squeeze(1))
    assert torch.equal(torch.cat(heals.labels), y[result.clean.correct])
    wrong = ~result.clean.correct
    assert torch.equal(result["heals"].prediction[wrong], result.clean.prediction[wrong])


def test_attacked_samples_are_packed_over_the_whole_set(half) -> None:
    net, x, y = half
    attack = Planted(lambda net, x, y: x)
    right = int(run(net, {"same": attack}, x, y, batch_size=10, loader_batch=3).clean.correct.sum())
    assert [len(ids) for ids in attack.ids] == [10] * (right // 10) + ([right % 10] if right % 10 else [])


def test_nothing_right_is_nothing_to_attack(half) -> None:
    net, x, _ = half
    result = run(net, {"fgsm": FGSM(eps=0.1)}, x, 1 - predicted(net, x))
    assert result.clean.accuracy == result["fgsm"].accuracy == 0.0
    assert result["fgsm"].interval[0] == 0.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("init", ["uniform", "gaussian"])
def test_outcomes_do_not_depend_on_batches_or_order(norm: str, init: str) -> None:
    net, x = small_conv(), images(90, side=8)
    y = predicted(net, x)
    y[::5] = (y[::5] + 1) % 10
    eps = {"linf": 0.02, "l2": 0.1}[norm]
    attacks = {
        "pgd": PGD(eps=eps, step_size=eps / 3, steps=5, norm=norm, init=init),
        "restarts": PGD(eps=eps, step_size=eps / 3, steps=3, norm=norm, init=init, restarts=3, objective="margin"),
    }
    small = run(net, attacks, x, y, batch_size=7, loader_batch=11)
    large = run(net, attacks, x, y, batch_size=64, loader_batch=90)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    shuffled = evaluate(net, attacks, [(x[order], y[order], order)], batch_size=13, progress=False)
    for name in attacks:
        assert 0.1 < small[name].accuracy < small.clean.accuracy  # the test can fail
        assert torch.equal(small[name].prediction, large[name].prediction)
        assert torch.equal(shuffled[name].prediction, large[name].prediction[order])
        assert torch.allclose(small[name].distance, large[name].distance, atol=1e-6)


def test_same_seed_same_outcome_whatever_the_global_state() -> None:
    net, x = small_conv(), images(40, side=8)
    y = predicted(net, x)
    noisy = {"noisy": Planted(lambda net, x, y: (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1))}
    torch.manual_seed(1)
    first = run(net, noisy, x, y, seed=3)
    torch.manual_seed(2)
    second = run(net, noisy, x, y, seed=3)
    other = run(net, noisy, x, y, seed=4)
    assert torch.equal(first["noisy"].distance, second["noisy"].distance)
    assert not torch.equal(first["noisy"].distance, other["noisy"].distance)


def test_attacks_see_float32_logits_of_a_half_precision_network() -> None:
    net, x = Halfspace(torch.bfloat16), images(8)
    seen = []

    def looks(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(net(x).dtype)
        return x

    run(net, {"looks": Planted(looks)}, x, predicted(net, x))
    assert seen == [torch.float32]
    assert net(x).dtype == torch.bfloat16


# ---------------------------------------------------------------- what it refuses
@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            Planted(lambda net, x, y: x + 0.1002),
            r"attack bad broke its budget: found linf 0\.1002, allowed 0\.1",
        ),
        (Planted(lambda net, x, y: x + 0.1, norm="l2"), r"found l2 0\.4, allowed 0\.1"),
        (Planted(lambda net, x, y: x - 0.7, eps=None), r"attack bad left the pixel range: found \[-0\.[45]"),
        (
            Planted(lambda net, x, y: x + 0.7, eps=1.0),
            r"left the pixel range: found \[0\.\d+, 1\.\d+\], allowed",
        ),
        (
            Planted(lambda net, x, y: torch.full_like(x, torch.nan)),
            r"attack bad returned NaN.* in 7 of 7 images",
        ),
        (Planted(lambda net, x, y: x[:1]), r"attack bad returned torch.float32 \(1, 1, 4, 4\): expected"),
        (
            Planted(lambda net, x, y: None),
            r"attack bad returned NoneType: expected float images \(7, 1, 4, 4\)",
        ),
        (Planted(lambda net, x, y: (x * 255).to(torch.uint8)), r"attack bad returned torch.uint8"),
    ],
)
def test_attack_that_breaks_its_contract_is_named(half, attack: Planted, message: str) -> None:
    net, x, y = half
    with pytest.raises(EvaluationError, match=message):
        run(net, {"bad": attack}, x, y, batch_size=7)


def test_rounding_is_no_violation(half) -> None:
    net, x, y = half
    attack = Planted(lambda net, x, y: x + (0.1 + 5e-6))
    assert run(net, {"ok": attack}, x, y)["ok"].max_distance == pytest.approx(0.1, abs=1e-5)


class Broken(nn.Module):
    """NaN once an image leaves its pixels' range of clean values, or at once."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        m = x.flatten(1).sum(dim=1)
        m = torch.where(m > self.above, torch.nan, m)
        return torch.stack([m, -m], dim=1)


def test_nan_logits_are_an_error() -> None:
    x, y = images(10, high=0.5), torch.zeros(10, dtype=torch.long)
    with pytest.raises(EvaluationError, match=r"logits of clean images are NaN or infinite for 10 of 10"):
        run(Broken(above=-1.0), {}, x, y)
    moves = Planted(lambda net, x, y: x + 0.4, eps=0.4)
    with pytest.raises(EvaluationError, match=r"logits under attack moves are NaN"):
        run(Broken(above=9.0), {"moves": moves}, x, y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(5) + 0.5, r"images lie in \[0\.5\d*, 1\.\d+\]: expected \[0, 1\]"),
        (images(5) * torch.nan, r"images hold NaN: expected numbers in \[0, 1\]"),
        ((images(5) * 255).to(torch.uint8), r"images are torch.uint8"),
        (images(5)[:, 0], r"images are torch.float32 \(5, 4, 4\): expected float \[B, C, H, W\]"),
    ],
)
def test_images_are_checked(x: Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(Halfspace(), {}, x, torch.zeros(5, dtype=torch.long))


def test_labels_logits_and_indices_are_checked() -> None:
    x, y = images(4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(EvaluationError, match=r"labels lie in \[0, 2\], but the network has 2 classes"):
        run(Halfspace(), {}, x, y)
    with pytest.raises(EvaluationError, match=r"the network gave \(4, 1, 4, 4\) for 4 images"):
        run(nn.Identity(), {}, x, y)
    with pytest.raises(EvaluationError, match="more than once"):
        evaluate(Halfspace(), {}, [(x, y % 2, torch.tensor([0, 1, 1, 2]))], progress=False)
    with pytest.raises(EvaluationError, match="loader is empty"):
        evaluate(Halfspace(), {}, [], progress=False)
    with pytest.raises(EvaluationError, match="named 'clean'"):
        run(Halfspace(), {"clean": FGSM(eps=0.1)}, x, y % 2)
    with pytest.raises(EvaluationError, match="batch_size=0"):
        run(Halfspace(), {}, x, y % 2, batch_size=0)


# ---------------------------------------------------------------- how many samples
def test_every_attack_has_its_own_n(half) -> None:
    net, x, y = half
    attacks = {"fgsm": FGSM(eps=0.02), "pgd": PGD(eps=0.02, step_size=0.01, steps=4)}
    result = run(net, attacks, x, y, n=50, n_of={"pgd": 20}, loader_batch=8)
    assert (result.clean.n, result["fgsm"].n, result["pgd"].n) == (50, 50, 20)
    assert torch.equal(result.index, torch.arange(50))
    whole = run(net, attacks, x, y)
    assert torch.equal(whole["pgd"].prediction[:20], result["pgd"].prediction)
    assert torch.equal(whole["fgsm"].prediction[:50], result["fgsm"].prediction)
    # A smaller n for all wins over an attack's own.
    assert run(net, attacks, x, y, n=10, n_of={"pgd": 200})["pgd"].n == 10


def test_more_samples_than_exist(half) -> None:
    net, x, y = half
    attacks = {"fgsm": FGSM(eps=0.02)}
    with pytest.raises(EvaluationError, match=r"n=102, but the split has 101 samples: ask for 101 or fewer"):
        run(net, attacks, x, y, n=102)
    with pytest.raises(EvaluationError, match=r"n_of\.fgsm=102, but the split has 101 samples"):
        run(net, attacks, x, y, n_of={"fgsm": 102})
    with pytest.raises(EvaluationError, match=r"n=0: expected 1 or more"):
        run(net, attacks, x, y, n=0)
    with pytest.raises(EvaluationError, match=r"n_of names pgd: expected one of fgsm"):
        run(net, attacks, x, y, n_of={"pgd": 3})


def test_sizes_before_training() -> None:
    assert sizes(["a", "b"], 360, n_of={"b": 100}) == {"a": 360, "b": 100}
    assert sizes(["a", "b"], 360, n=20, n_of={"b": 100}) == {"a": 20, "b": 20}
    with pytest.raises(EvaluationError, match=r"n_of\.b=100, but the split has 50"):
        sizes(["a", "b"], 50, n_of={"b": 100})
    with pytest.raises(EvaluationError, match=r"n=60, but the split has 50"):
        sizes(["a"], 50, n=60)


# ---------------------------------------------------------------- worst cases, flags
def breaks(places: set[int]) -> Planted:
    """An attack with eps 1 that fools Halfspace on chosen samples."""

    class Chosen(Planted):
        def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
            chosen = torch.tensor([int(i) in places for i in ids]).view(-1, 1, 1, 1)
            away = (net.weight.view_as(x[:1]) > 0).float()
            return torch.where(chosen, torch.where(y.view(-1, 1, 1, 1) == 1, 1 - away, away), x)

    return Chosen(lambda net, x, y: x, eps=1.0)


def test_worst_case_is_per_sample_and_per_threat_model() -> None:
    net, x = Halfspace(), images(10)
    y = predicted(net, x)
    y[9] = 1 - y[9]
    other = PGD(eps=0.0, step_size=1.0, steps=0, norm="l2")
    attacks = {"a": breaks({0, 1}), "b": breaks({1, 2, 7}), "c": breaks({3}), "l2": other}
    result = run(net, attacks, x, y, n_of={"c": 5})
    assert [row.name for row in result.rows()] == [
        "clean",
        "a",
        "b",
        "c",
        "l2",
        "worst of a, b",
        "worst of a, b, c",
    ]
    two, three = result.worst_cases()
    assert (two.n, three.n) == (10, 5)
    assert (~two.correct).nonzero().squeeze(1).tolist() == [0, 1, 2, 7, 9]
    assert (~three.correct).nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
    assert two.description == {"attack": "worst_of", "members": ["a", "b"], "norm": "linf", "eps": 1.0}


def test_reach_is_flagged_and_explained(half) -> None:
    net, x, y = half
    attacks = {
        "short": PGD(eps=0.3, step_size=0.005, steps=40),
        "long": PGD(eps=0.3, step_size=0.01, steps=40),
        "exact": PGD(eps=0.3, step_size=0.03, steps=10, init="zero"),
        "fgsm": FGSM(eps=0.3),
    }
    result = run(net, attacks, x, y, n=5)
    assert {name for name in attacks if "reach" in result[name].flags} == {"short"}
    assert result["short"].messages["reach"] == "40 steps of 0.005 cannot cross a ball of eps 0.3"
    assert "reach" not in result.worst_cases()[0].flags  # others in the union can cross it


def test_reach_does_not_count_a_random_start() -> None:
    assert out_of_reach({"eps": 0.5, "steps": 20, "step_size": "3/1000", "init": "uniform", "norm": "l2"})
    assert not out_of_reach({"eps": "8/255", "steps": 4, "step_size": "2/255"})
    assert not out_of_reach({"eps": 0.3})
    assert not out_of_reach({"steps": 3, "step_size": 0.1})


def test_result_by_name() -> None:
    x = images(4)
    result = run(Halfspace(), {"fgsm": FGSM(eps=0.1)}, x, torch.zeros(4, dtype=torch.long))
    assert result["clean"] is result.clean
    assert result["fgsm"].description["name"] == "fgsm"
    with pytest.raises(KeyError, match=re.escape("'pgd': expected one of clean, fgsm")):
        result["pgd"]
