"""The MIMAE information term on its own, on any defense."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mi_at.data.batch import Batch
from mi_at.defenses.ce import CE
from mi_at.defenses.mimae import Mimae
from mi_at.defenses.standard_at import StandardAT
from mi_at.regularizers.base import Views
from mi_at.regularizers.mi import MutualInformation
from tests.callbacks import fits


def views(seed: int = 0) -> Views:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, fits.CLASSES)).double()
    batch = fits.batches(1, 8, seed=seed)[0]
    batch.x = batch.x.double()
    batch.views["adversarial"] = (batch.x + 0.1 * torch.randn_like(batch.x)).clamp(0, 1)
    return Views(net, batch)


def by_hand(logits: Tensor, logits_adv: Tensor) -> float:
    """Eq. 13-14: I of the joint P = (sum of p p'^T, symmetrised) / n."""
    p, q = logits.softmax(dim=1), logits_adv.softmax(dim=1)
    joint = sum(torch.outer(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    joint = (joint + joint.T) / 2
    rows, columns = joint.sum(dim=1), joint.sum(dim=0)
    classes = range(len(joint))
    return sum(
        float(joint[i, j]) * math.log(float(joint[i, j]) / float(rows[i] * columns[j]))
        for i in classes
        for j in classes
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_term_is_that_of_the_equation(seed: int) -> None:
    seen = views(seed)
    (value,) = MutualInformation(lambda_mi=0.7).terms(seen).values()
    expected = -0.7 * by_hand(seen.logits("clean").detach(), seen.logits("adversarial").detach())
    assert value.item() == pytest.approx(expected, abs=1e-10)
    assert -0.7 * math.log(fits.CLASSES) <= value.item() <= 0


@pytest.mark.parametrize("defense", [StandardAT, CE])
def test_it_adds_to_the_loss_of_any_defense(defense: type) -> None:
    made, seen = defense(), views()
    made.attach(seen.net, regularizers={"mi": MutualInformation(lambda_mi=0.4)})
    terms = made.all_terms(seen)
    alone = defense().attach(seen.net).all_terms(seen)
    assert terms["loss"].item() == pytest.approx(alone["loss"].item() + terms["mi"].item(), abs=1e-12)
    assert set(terms) == {*alone, "mi"}


def test_it_is_the_term_of_mimae() -> None:
    seen = views()
    own = Mimae(lambda_mi=0.4).attach(seen.net).all_terms(seen)["mi"]
    added = MutualInformation(lambda_mi=0.4).terms(seen)["mi"]
    assert own.item() == added.item()


def test_at_zero_it_needs_no_batch() -> None:
    assert MutualInformation(lambda_mi=0.1).coupled == "the mutual information of regularizer.mi"
    assert MutualInformation(lambda_mi=0.0).coupled == ""


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"regularizer.mi.lambda_mi=.*: expected 0 or more"):
        MutualInformation(lambda_mi=value)


def test_it_does_not_touch_what_it_is_given() -> None:
    seen = views()
    batch: Batch = seen.batch
    before = {name: view.clone() for name, view in batch.views.items()}
    MutualInformation().terms(seen)
    assert all(torch.equal(view, before[name]) for name, view in batch.views.items())
