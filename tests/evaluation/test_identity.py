"""Which network and which images a number is of: what was found of others is never taken for theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.attacks.transfer import Transfer
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.evaluation.evaluate import identity_of
from mi_at.evaluation.outcomes import EvaluationError, Identity
from mi_at.functional import random
from tests.evaluation.nets import images, loader, predicted, small_conv

EPS = 0.1


class Edited(nn.Module):
    """A network whose code is edited between two evaluations: its weights and its words stay the same."""

    def __init__(self, edit: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.net, self.edit = small_conv(), edit

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.edit(x))


X = images(48, side=8)
Y = predicted(small_conv(), X)
ATTACKS = {"fgsm": FGSM(eps=EPS), "pgd": PGD(eps=EPS, step_size=EPS / 4, steps=8)}
X16 = (images(48, side=8) * 16).round() / 16
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "another normalisation": lambda x: (x - 0.3) / 0.4,
    "a detached input": lambda x: x.detach(),
    "a quantiser": lambda x: (x * 255).round() / 255,
}


def run(net: nn.Module, state: Path | None = None, x: Tensor = X, y: Tensor = Y) -> EvaluationResult:
    return evaluate(net, ATTACKS, loader(x, y), state=state, progress=False, num_classes=10)


def of(net: nn.Module, x: Tensor = X, y: Tensor = Y) -> Identity:
    return identity_of(net, loader(x, y))


def assert_same(one: EvaluationResult, other: EvaluationResult) -> None:
    for row, expected in zip(one.rows(), other.rows(), strict=True):
        assert torch.equal(row.prediction, expected.prediction), row.name
        assert row.flags == expected.flags


@pytest.mark.parametrize("edit", EDITS)
def test_pieces_of_a_network_whose_code_was_edited_are_not_taken_up(tmp_path: Path, edit: str) -> None:
    before = run(Edited(), tmp_path)
    edited = run(Edited(EDITS[edit]), tmp_path)
    assert_same(edited, run(Edited(EDITS[edit])))
    assert not all(torch.equal(a.prediction, b.prediction) for a, b in zip(edited.rows(), before.rows(), strict=True))
    assert_same(run(Edited(), tmp_path), before)  # and the edit is taken back


def test_pieces_of_the_same_network_are_taken_up(tmp_path: Path) -> None:
    """It answers as before but for rounding: what another machine computes."""
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * (1 + 1e-6)

    before = run(Edited(), tmp_path)
    assert_same(run(Edited(counted), tmp_path), before)
    assert len(calls) <= 4, "three forwards and one gradient of the first images"


def test_what_tells_two_evaluations_apart() -> None:
    mine = of(Edited())
    assert mine.is_that_of(of(Edited()))
    assert mine.is_that_of(Identity.of_plain(mine.plain()))
    assert not mine.is_that_of(of(small_conv(seed=1)))
    swapped = torch.cat([Y[:-1], (Y[-1:] + 1) % 10])
    assert not mine.is_that_of(of(Edited(), y=swapped))
    assert not mine.is_that_of(of(Edited(), x=torch.cat([X[:-1], 1 - X[-1:]])))
    for edit in EDITS.values():
        assert not mine.is_that_of(of(Edited(edit)))
    assert not mine.is_that_of(None)


def test_what_shows_on_perturbed_images_or_in_the_gradients_direction_alone() -> None:
    """A straight-through rounding of images that are round already; a layer that turns the gradient."""
    straight = Edited(lambda x: x + ((x * 16).round() / 16 - x).detach())
    assert torch.equal(straight(X16), Edited()(X16))
    assert not of(Edited(), x=X16).is_that_of(of(straight, x=X16))
    turned = Edited(lambda x: (2 * x).detach() - x)
    assert torch.allclose(turned(X), Edited()(X), atol=1e-5)
    assert not of(Edited()).is_that_of(of(turned))


def test_a_masked_class_drowns_nothing() -> None:
    mask = Answer(lambda logits: torch.cat([logits, torch.full((len(logits), 1), -1e6)], 1))
    edited = Answer(lambda logits: torch.cat([1.05 * logits, torch.full((len(logits), 1), -1e6)], 1))
    assert not of(mask).is_that_of(of(edited))
    noisy = Answer(lambda z: torch.cat([z + 0.01 * torch.randn_like(z), torch.full((len(z), 1), -1e6)], 1))
    assert all("stochastic" in row.flags for row in run_of_any(noisy).rows())
    assert not any("stochastic" in row.flags for row in run_of_any(mask).rows())


def run_of_any(net: nn.Module) -> EvaluationResult:
    return evaluate(net, ATTACKS, loader(X, Y), progress=False)


def test_what_rounding_moves_is_the_same() -> None:
    mine = of(Edited())
    moved = replace(mine, logits=tuple(1.001 * v for v in mine.logits), slopes=tuple(1.004 * v for v in mine.slopes))
    assert mine.is_that_of(moved)
    assert not mine.is_that_of(replace(mine, logits=tuple(1.02 * v for v in mine.logits)))
    assert not mine.is_that_of(replace(mine, slopes=mine.slopes[1:]))


@pytest.mark.parametrize("values", [{}, {"weights": "a"}, {"weights": "a", "data": "b", "logits": "c", "slopes": []}])
def test_a_record_without_an_identity_is_nobodys(values: dict[str, object]) -> None:
    assert Identity.of_plain(values) is None


# ---------------------------------------------------------------- what is seen on the way
def test_noise_at_test_is_flagged_in_every_row() -> None:
    rows = run(Edited(lambda x: x + 0.05 * torch.randn_like(x))).rows()
    assert all("stochastic" in row.flags for row in rows)
    assert not any("stochastic" in row.flags for row in run(Edited()).rows())
    # Noise of mi_at's own layers is drawn by sample: an attack and its judge see the same.
    keyed = run(Edited(lambda x: x + 0.05 * random.normal_like(x)))
    assert not any("stochastic" in row.flags for row in keyed.rows())


class Answer(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.answer = small_conv(), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.net(x))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Answer(lambda logits: (3 * logits).round().long()), "the network gave int64 for its logits: expected float"),
        (Answer(lambda logits: logits[:, :1]), "the network gave one logit an image: expected one for each class"),
        (Answer(lambda logits: logits / 0), "NaN or infinite for 20 of 20 samples: every logit must be finite"),
        (Edited(lambda x: x.mul_(0.5)), r"the network changes its images in place: .* x = x.clone\(\)"),
        (Edited(lambda x: x.data.mul_(0.5)), r"the network changes its images in place: .* x = x.clone\(\)"),
    ],
    ids=["whole numbers", "one class", "infinite", "in place", "in place, unseen by autograd"],
)
def test_what_a_network_must_give(net: nn.Module, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(net)


def test_a_network_that_is_its_own_surrogate_is_no_black_box() -> None:
    attack = Transfer(kind="fgsm", options={"eps": EPS}).with_surrogate(small_conv(), name="itself")
    other = attack.with_surrogate(small_conv(seed=1), name="other")
    wrapped = attack.with_surrogate(Edited(), name="under another name")
    attacks = {"own": attack, "other": other, "wrapped": wrapped}
    found = evaluate(small_conv(), attacks, loader(X, Y), progress=False)
    assert found["own"].flags == found["wrapped"].flags == ("own_surrogate",)
    assert found["other"].flags == ()
