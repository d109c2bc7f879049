"""CMI, separation and NCMI of all outputs: against a literal transcription, clean, attacked and in the worst case."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationError, evaluate
from mi_at.evaluation.information import full_set_information, information
from mi_at.evaluation.robust_ncmi import robust_ncmi
from tests.evaluation.nets import images, loader, predicted, small_conv
from tests.references import ncmi as reference

BALL: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "norm": "linf"}


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that is wrong on some of 12 images."""
    net, x = small_conv(classes=3), images(12, side=8)
    y = predicted(net, x)
    y[::4] = (y[::4] + 1) % 3
    return net, x, y


def transcribed(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        rows = net(x).double().softmax(1).tolist()
    labels = y.tolist()
    return float(reference.cmi(rows, labels)), float(reference.separation(rows, labels))


def test_is_the_papers(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    net, x = net.double(), x.double()  # in float32 an output depends on the size of its batch, by rounding
    found = information(net, x, y, batch_size=5)
    cmi, separation = transcribed(net, x, y)
    assert found.n == 12
    assert found.cmi == pytest.approx(cmi, rel=1e-9)
    assert found.separation == pytest.approx(separation, rel=1e-9)
    assert found.ncmi == pytest.approx(cmi / separation, rel=1e-9)
    assert found.ncmi == pytest.approx(information(net, x, y).ncmi, rel=1e-9)


def test_runs_in_eval_mode_and_leaves_the_network_alone(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    noisy = nn.Sequential(nn.Dropout(0.5), net).train()
    assert information(noisy, x, y) == information(net, x, y)
    assert noisy.training
    assert all(parameter.requires_grad for parameter in noisy.parameters())


def test_under_an_attack_every_image_counts(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Those that are wrong when clean are attacked too, and an attack that runs on fewer says on how many."""
    net, x, y = case
    attacks = {"pgd": PGD(**BALL, steps=3), "few": PGD(**BALL, steps=1)}
    result = evaluate(net, attacks, loader(x, y), n_of={"few": 9}, keep_images=["pgd", "few"], progress=False)
    found = full_set_information(net, x, y, of=["clean", "pgd", "few"], images=result.images)
    assert list(found) == ["clean", "pgd", "few"]
    cmi, separation = transcribed(net, result.images["pgd"], y)
    assert found["pgd"] == {
        "n": 12,
        "cmi": pytest.approx(cmi, rel=1e-6),
        "separation": pytest.approx(separation, rel=1e-6),
        "ncmi": pytest.approx(cmi / separation, rel=1e-6),
    }
    assert [found[name]["n"] for name in found] == [12, 12, 9]
    assert found["few"]["cmi"] == pytest.approx(transcribed(net, result.images["few"], y[:9])[0], rel=1e-6)
    moved = (result.images["pgd"] - x).flatten(1).abs().amax(1)
    assert bool((moved > 0).all()), "the wrong ones too"
    assert found["pgd"]["ncmi"] != found["clean"]["ncmi"]


def test_the_worst_case_is_beside_them(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    options = {**BALL, "rounds": 2, "steps": 2, "seed": 0}
    found = full_set_information(net, x, y, of=[], images={}, robust={**options, "n": 8})
    best = robust_ncmi(net, x[:8], y[:8], **options)
    row = found["robust_ncmi"]
    assert (row["n"], row["ncmi"], row["history"], row["rounds"]) == (8, best.value, list(best.history), 2)
    assert row["ncmi"] >= row["clean"] == pytest.approx(float(information(net, x[:8], y[:8]).ncmi or 0), rel=1e-6)
    assert json.loads(json.dumps(found)) == found, "plain values"
    every = full_set_information(net, x, y, of=["clean"], images={}, robust={**options, "n": None})
    assert every["robust_ncmi"]["n"] == 12


def test_nothing_separates_where_all_is_certain_of_one_class() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1000.0, -1000.0]]).expand(len(x), -1)

    found = information(Certain(), torch.rand(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]))
    assert (found.cmi, found.separation, found.ncmi) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("y", "of", "message"),
    [
        (torch.zeros(12, dtype=torch.long), ["clean"], "2 classes or more, got 12 images and 12 labels of 1 classes"),
        (torch.arange(12) % 3, ["pgd_40"], r"information of 'pgd_40': expected clean or an attack of the evaluation"),
        (torch.arange(5) % 3, ["clean"], "got 12 images and 5 labels"),
    ],
)
def test_what_is_wrong_is_named(y: Tensor, of: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        full_set_information(small_conv(classes=3), images(12, side=8)[: max(len(y), 12)], y, of=of, images={})


def test_logits_that_are_none_are_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), torch.nan)

    with pytest.raises(EvaluationError, match="expected finite logits"):
        information(Broken(), images(4), torch.arange(4) % 3)
