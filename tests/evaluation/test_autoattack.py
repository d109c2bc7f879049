"""AutoAttack through our wrapper: the package's own answer, the caller's state, any number of classes."""

import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.autoattack import AutoAttack
from mi_at.evaluation import evaluate
from tests.evaluation.nets import Halfspace, images, loader, predicted, small_conv

pyautoattack = pytest.importorskip("pyautoattack")

QUERIES = 40  # of Square; its 5,000 would take most of the test's time
N = 12


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor]:
    net, x = small_conv().eval(), images(N, side=8)
    y = predicted(net, x)
    y[::6] = (y[::6] + 1) % 10
    return net, x, y


class Keeping:
    """AutoAttack as it is, keeping what it was given and what it returned."""

    whole_set = True

    def __init__(self, attack: AutoAttack) -> None:
        self.attack, self.describe = attack, attack.describe

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        self.x_adv = self.attack(net, x, y, **options)
        return self.x_adv


@pytest.mark.parametrize(
    ("norm", "eps", "components"),
    [("linf", 0.02, None), ("l2", 0.3, ["apgd-ce", "square"])],  # all of standard once: it takes seconds
)
def test_equals_the_package_run_directly(case, norm: str, eps: float, components: list[str] | None) -> None:
    net, x, y = case
    with torch.random.fork_rng():
        library = pyautoattack.AutoAttack(
            net, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=5, version="standard"
        )
        library.square.n_queries = QUERIES
        library.attacks_to_run = components or library.attacks_to_run
        expected, _ = library.run_standard_evaluation(x.clone(), y.clone(), batch_size=6)
    # Through the evaluator, whose own batches and selection of right samples must not change the answer.
    attack = Keeping(AutoAttack(eps=eps, norm=norm, batch_size=6, queries=QUERIES, attacks=components))
    result = evaluate(net, {"aa": attack}, loader(x, y, 5), seed=5, batch_size=4, progress=False)
    assert 0.0 < result["aa"].accuracy < result.clean.accuracy < 1.0
    right = result.clean.correct
    assert torch.equal(attack.x_adv, expected[right])
    assert torch.equal(result["aa"].prediction[right], predicted(net, expected)[right])
    assert torch.equal(result["aa"].prediction[~right], result.clean.prediction[~right])
    # What no component broke comes back unchanged.
    assert torch.equal(result["aa"].distance == 0, result["aa"].correct | ~right)
    assert result["aa"].flags == ()


def test_own_seed_wins_over_the_evaluations(case) -> None:
    net, x, y = case
    options = {"eps": 0.3, "batch_size": 9, "attacks": ["square"], "queries": 3}
    own = AutoAttack(**options, seed=5)(net, x, y, seed=1)
    assert torch.equal(own, AutoAttack(**options)(net, x, y, seed=5))
    assert not torch.equal(own, AutoAttack(**options)(net, x, y, seed=1))


def test_callers_state_is_untouched(case) -> None:
    net, x, y = case
    net.train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    library = logging.getLogger("auto-attack")
    settings = (library.level, library.propagate, list(library.handlers))

    def trace(frame, event, argument):  # what a debugger or coverage sets
        return None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        with torch.inference_mode():
            AutoAttack(eps=0.02, attacks=["apgd-ce", "fab-t"], batch_size=50)(net, x, y)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(previous)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert (library.level, library.propagate, list(library.handlers)) == settings
    net.eval()
    net[0].weight.grad = None


@pytest.mark.parametrize(
    ("classes", "components", "targets"),
    [
        (2, ["apgd-ce", "fab-t", "square"], 1),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"], 2),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"], 3),
        (11, ["apgd-ce", "apgd-t", "fab-t", "square"], 9),
    ],
)
def test_any_number_of_classes(classes: int, components: list[str], targets: int) -> None:
    net, x = small_conv(classes, side=8), images(12, side=8)
    y = predicted(net, x)
    result = evaluate(net, {"aa": AutoAttack(eps=0.03, queries=QUERIES)}, loader(x, y), progress=False)
    description = result["aa"].description
    assert description["attacks"] == components
    assert description["targets"] == targets
    assert result["aa"].accuracy < 1.0
    assert ("fallback" in result["aa"].flags) == (classes < 4)
    assert (description["fallback"] is None) == (classes >= 4)
    if classes < 4:
        assert result["aa"].messages["fallback"] == (
            f"{classes} classes: {', '.join(components)} instead of apgd-ce, apgd-t, fab-t, square"
        )


def test_fallback_reaches_the_optimum_of_a_linear_network() -> None:
    net, x = Halfspace(), images(60, low=0.2, high=0.8)
    y = predicted(net, x)
    for norm, eps in (("linf", 0.02), ("l2", 0.06)):
        expected = net.falls_within(x, y)[norm] > eps
        attack = AutoAttack(eps=eps, norm=norm, attacks=["apgd-ce", "apgd-t", "fab-t"])
        result = evaluate(net, {"aa": attack}, loader(x, y), progress=False)
        assert torch.equal(result["aa"].correct, expected)


def test_plus_and_rand_with_few_classes() -> None:
    assert AutoAttack(eps=0.1, version="plus").for_classes(3).attacks == (
        "apgd-ce",
        "apgd-dlr",
        "fab",
        "square",
        "fab-t",
    )
    assert AutoAttack(eps=0.1, version="rand").for_classes(2).attacks == ("apgd-ce",)
    alone = AutoAttack(eps=0.1, attacks=["apgd-t"]).for_classes(2)
    assert alone.attacks == ("apgd-ce",)
    assert alone.fallback == "2 classes: apgd-ce instead of apgd-t"
    with pytest.raises(ValueError, match="2 classes or more, got 1"):
        AutoAttack(eps=0.1).for_classes(1)


def test_eps_zero_and_no_samples(case) -> None:
    net, x, y = case
    assert torch.equal(AutoAttack(eps=0)(net, x, y), x)
    assert len(AutoAttack(eps=0.1)(net, x[:0], y[:0])) == 0


def test_half_precision_logits() -> None:
    net, x = Halfspace(torch.bfloat16), images(6)
    attack = AutoAttack(eps=0.05, attacks=["apgd-ce", "square"], queries=QUERIES)
    assert attack(net, x, predicted(net, x)).dtype == torch.float32


def test_warnings_become_flags(caplog: pytest.LogCaptureFixture) -> None:
    net, x = nn.Sequential(small_conv(), nn.Softmax(dim=1)), images(8, side=8)
    y = predicted(net, x)
    attack = AutoAttack(eps=0.02, attacks=["apgd-ce"])
    result = evaluate(net, {"aa": attack}, loader(x, y), progress=False)
    assert result["aa"].flags == ("softmax",)
    assert "probability distribution" in result["aa"].messages["softmax"]
    assert not caplog.records
    attack(net, x, y)  # on its own it logs them
    assert [record.name for record in caplog.records] == ["mi_at.attacks.autoattack"]


def test_progress_counts_batches(case) -> None:
    net, x, y = case
    calls: list[tuple[str, int, int, int]] = []
    attack = AutoAttack(eps=0.001, attacks=["apgd-ce", "square"], queries=2, batch_size=6)
    attack(net, x, y, on_progress=lambda *call: calls.append(call))
    steps = [(0, 0, 0), (1, 2, 0), (2, 2, 0)]
    assert calls == [(part, *step) for part in ("apgd-ce", "square") for step in steps]
    # The counts of what is broken add up to what comes back changed.
    AutoAttack(eps=0.05, attacks=["apgd-ce"])(net, x, y, on_progress=lambda *call: calls.append(call))
    changed = (AutoAttack(eps=0.05, attacks=["apgd-ce"])(net, x, y) != x).flatten(1).any(dim=1)
    assert calls[-1] == ("apgd-ce", 1, 1, int(changed.sum()))
    assert changed.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, r"did you mean 8/255"),
        ({"eps": -0.1}, r"expected a radius of 0 or more"),
        ({"eps": 0.1, "norm": "l1"}, r"norm='l1': expected one of linf, l2"),
        ({"eps": 0.1, "version": "full"}, r"version='full': expected one of standard, plus, rand"),
        ({"eps": 0.1, "attacks": ["apgd"]}, r"attacks=\['apgd'\]: expected one or more of apgd-ce"),
        ({"eps": 0.1, "attacks": []}, r"attacks=\[\]: expected one or more"),
        ({"eps": 0.1, "queries": 0}, r"queries=0: expected 1 or more"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAttack(**options)


def test_description_is_plain_and_complete() -> None:
    description = AutoAttack(eps="8/255", attacks=["square"]).describe()
    assert description["attack"] == "autoattack"
    assert description["eps"] == 8 / 255
    assert description["attacks"] == ["square"]
    assert description["queries"] == 5000
    assert description["library"].startswith("pyautoattack ")
