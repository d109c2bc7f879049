"""Transfer: crafted on the surrogate, every kind, what the record says, surrogates of another data set."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mi_at import io
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.attacks.transfer import KINDS, Transfer
from mi_at.evaluation.evaluate import evaluate
from mi_at.evaluation.outcomes import EvaluationError, radius
from tests.attacks.test_linear_model import Y, images, linear, normal
from tests.evaluation.nets import small_conv

IDS = torch.tensor([11, 3, 8, 40, 5])
OPTIONS = {
    "pgd": {"eps": "8/255", "step_size": "2/255", "steps": 3},
    "fgsm": {"eps": "8/255"},
    "ni_fgsm": {"eps": "8/255", "step_size": "2/255", "steps": 3},
    "ti_dim": {"eps": "8/255", "step_size": "2/255", "steps": 3},
    "cw_l2": {"c": 1.0, "lr": 0.01, "steps": 5, "within": 0.5},
    "ddn": {"steps": 5, "within": 0.5},
    "fwa": {"eps": 0.01, "steps": 3},
    "eot": {"eps": "8/255", "step_size": "2/255", "steps": 2, "samples": 2},
    "autoattack": {"eps": "8/255", "attacks": ["square"], "queries": 10},
}


def pictures(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 4, torch.arange(n)


def test_every_kind_has_a_case() -> None:
    assert OPTIONS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_images_are_those_of_the_surrogate(kind: str) -> None:
    """As the attack itself makes them there, and not those of the evaluated network; built from one yaml node."""
    surrogate, net = small_conv(classes=4, seed=1), small_conv(classes=4, seed=2)
    x, y, ids = pictures()
    attack = io.build("a", {"_target_": "mi_at.attacks.transfer.Transfer", "kind": kind, "options": OPTIONS[kind]})
    bound = attack.with_surrogate(surrogate)
    assert attack.surrogate is None
    x_adv = bound(net, x, y, ids=ids, seed=3)
    torch.testing.assert_close(x_adv, attack.attack(surrogate, x, y, ids=ids, seed=3), rtol=0, atol=1e-6)
    if kind != "autoattack":
        assert not torch.equal(x_adv, attack.attack(net, x, y, ids=ids, seed=3))


def test_the_optimum_of_the_surrogate_exactly() -> None:
    surrogate, net, x = linear(2, seed=3), linear(2, seed=4), images()
    attack = Transfer(kind="pgd", options={"eps": 0.2, "step_size": 0.05, "steps": 12}).with_surrogate(surrogate)
    expected = (x + 0.2 * normal(surrogate, Y).sign()).clamp(0, 1)
    torch.testing.assert_close(attack(net, x, Y, ids=IDS, seed=0), expected, rtol=0, atol=1e-15)


def test_the_surrogate_is_left_alone() -> None:
    """Batch statistics, modes, gradients: it is attacked in eval mode, frozen, and given back."""
    surrogate = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)).train()
    before = copy.deepcopy(surrogate.state_dict())
    x, y, ids = pictures()
    attack = Transfer(kind="pgd", options=OPTIONS["pgd"]).with_surrogate(surrogate)
    with torch.inference_mode():  # whatever the caller is in
        x_adv = attack(small_conv(classes=4), x.clone(), y, ids=ids, seed=0)
    assert not torch.equal(x_adv, x)
    assert surrogate.training
    assert all(p.requires_grad and p.grad is None for p in surrogate.parameters())
    assert all(torch.equal(v, before[k]) for k, v in surrogate.state_dict().items())
    surrogate.eval()
    torch.testing.assert_close(PGD(**OPTIONS["pgd"])(surrogate, x, y, ids=ids, seed=0), x_adv)


@pytest.mark.parametrize("kind", ["pgd", "ddn", "autoattack"])
def test_a_half_precision_surrogate(kind: str) -> None:
    """Every attack takes its logits in float32 itself (Square fails on coarser ones)."""
    surrogate = small_conv(classes=4, seed=1)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = surrogate
            self.types: set[torch.dtype] = set()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).to(torch.bfloat16)

    x, y, ids = pictures()
    attack = Transfer(kind=kind, options=OPTIONS[kind])
    assert attack.with_surrogate(Half())(small_conv(classes=4), x, y, ids=ids, seed=0).dtype == torch.float32


@pytest.mark.parametrize("kind", ["pgd", "ddn", "fwa"])
def test_through_the_evaluator(kind: str) -> None:
    net = small_conv(classes=4, seed=2)
    x, _, ids = pictures()
    y = net(x).argmax(1)
    attack = Transfer(kind=kind, options=OPTIONS[kind], name="t").with_surrogate(small_conv(classes=4, seed=1))
    result = evaluate(net, {"t": attack}, [(x, y, ids)], progress=False, batch_size=3)
    said = result["t"].description
    assert said["attack"] == "transfer"
    assert said["kind"] == kind
    assert result["t"].raw_accuracy is not None
    if kind == "ddn":  # the raw accuracy is that at any distance
        assert result["t within"].raw_accuracy is None
        assert "raw_accuracy" not in result["t within"].description
    again = evaluate(net, {"t": attack}, [(x, y, ids)], progress=False, batch_size=8)
    assert torch.equal(result["t"].prediction, again["t"].prediction)


def test_what_the_record_says() -> None:
    attack = Transfer(kind="fgsm", options={"eps": "8/255"}, name="black_box", surrogate_accuracy=0.9)
    assert attack.describe()["surrogate"] == {"name": None, "clean_accuracy": 0.9}
    bound = attack.with_surrogate(small_conv(classes=4), name="resnet50")
    said = bound.describe()
    assert said["surrogate"] == {"name": "resnet50", "clean_accuracy": 0.9}
    assert said["name"] == "black_box"
    assert said["norm"] == "linf"
    assert radius(said) == 8 / 255
    assert attack.with_surrogate(small_conv(), accuracy=0.5).describe()["surrogate"] == {
        "name": "Sequential",
        "clean_accuracy": 0.5,
    }
    nearest = Transfer(kind="ddn", options={"steps": 2, "within": "1/2"})
    assert (nearest.minimum_norm, nearest.within) == (True, 0.5)
    assert (bound.minimum_norm, bound.within) == (False, None)
    assert isinstance(bound.attack, FGSM)


def test_refusals() -> None:
    x, y, ids = pictures()
    net = small_conv(classes=4)
    with pytest.raises(ValueError, match="attack t has no surrogate: bind one"):
        Transfer(kind="fgsm", options={"eps": 0.1}, name="t")(net, x, y, ids=ids, seed=0)
    with pytest.raises(ValueError, match=r"attack\.kind='pdg': expected one of pgd, fgsm"):
        Transfer(kind="pdg")
    with pytest.raises(ValueError, match=r"attack\.options\.step: pgd takes eps, step_size"):
        Transfer(kind="pgd", options={"eps": 0.1, "step": 3})
    with pytest.raises(ValueError, match=r"attack\.eps=-1"):
        Transfer(kind="fgsm", options={"eps": -1})
    with pytest.raises(ValueError, match=r"attack\.options: .*missing"):
        Transfer(kind="pgd", options={"eps": 0.1})
    with pytest.raises(ValueError, match=r"surrogate_accuracy=93: expected a share"):
        Transfer(kind="fgsm", options={"eps": 0.1}, surrogate_accuracy=93)
    attack = Transfer(kind="fgsm", options={"eps": 0.1})
    with pytest.raises(ValueError, match="Sequential has 10 classes, the network 4: is it one of another data set"):
        attack.with_surrogate(small_conv(classes=10))(net, x, y, ids=ids, seed=0)
    with pytest.raises(ValueError, match=r"does not take images \[1, 8, 8\] .* another data set"):
        attack.with_surrogate(small_conv(classes=4, channels=3))(net, x, y, ids=ids, seed=0)
    assert torch.equal(attack.with_surrogate(net)(net, x[:0], y[:0], ids=ids[:0], seed=0), x[:0])


@pytest.mark.parametrize("survivors", [False, True])
def test_the_accuracy_of_the_surrogate_and_the_raw_one_are_recorded(survivors: bool, tmp_path: Path) -> None:
    """By hand; the raw accuracy counts a sample that was wrong when clean and is right on its attacked image."""
    net, surrogate = small_conv(classes=4, seed=1), small_conv(classes=4, seed=2)
    x, _, ids = pictures(40)
    y = net(x).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    options = {"eps": 0.3, "step_size": 0.1, "steps": 4}
    attack = Transfer(kind="pgd", options=options).with_surrogate(surrogate, name="vgg19")
    x_adv = attack(net, x, y, ids=ids, seed=5)
    right, raw = net(x).argmax(1) == y, net(x_adv).argmax(1) == y
    assert int((raw & ~right).sum()) > 0
    assert 0 < int((raw & right).sum()) < int(right.sum())
    attacks = {"direct": PGD(**options), "t": attack}
    settings = {"progress": False, "seed": 5, "batch_size": 16, "survivors": survivors, "state": tmp_path}
    for result in (evaluate(net, attacks, [(x, y, ids)], **settings) for _ in range(2)):  # the second reads the state
        said = result["t"].description
        assert said["raw_accuracy"] == pytest.approx(float(raw.float().mean()))
        assert result["t"].accuracy == pytest.approx(float((raw & right).float().mean()))
        assert said["surrogate"]["name"] == "vgg19"
        assert said["surrogate"]["clean_accuracy"] == pytest.approx(float((surrogate(x).argmax(1) == y).float().mean()))
        assert result["direct"].raw_accuracy is None
        assert "raw_accuracy" not in result["direct"].description
    known = attack.with_surrogate(surrogate, accuracy=0.25)
    result = evaluate(net, {"t": known}, [(x, y, ids)], progress=False, n=4)
    assert result["t"].description["surrogate"]["clean_accuracy"] == 0.25
    foreign = attack.with_surrogate(small_conv(classes=4, channels=3), name="other")
    with pytest.raises(EvaluationError, match=r"attack t: its surrogate other: .* another data set"):
        evaluate(net, {"t": foreign}, [(x, y, ids)], progress=False)
