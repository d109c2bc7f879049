"""Information by estimators over a test set: each estimate pairs what its name says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mi_at.estimators.local_dim import critic_of, pair_scores
from mi_at.evaluation.mutual_information import mutual_information
from mi_at.evaluation.outcomes import EvaluationError
from mi_at.functional.variational import local_donsker_varadhan
from mi_at.models.cnn import CNNTiny

PAIRS = ("natural_clean", "natural_adversarial", "own", "adversarial_clean", "adversarial_adversarial")


def parts() -> tuple[nn.Module, dict[str, nn.Module], Tensor, Tensor]:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=3, in_channels=1, image_size=8).eval()
    critics = {name: critic_of(net, hsize=16, owner=name).eval() for name in ("natural", "adversarial")}
    x = torch.rand(10, 1, 8, 8)
    return net, critics, x, (x + 0.3 * torch.randn_like(x)).clamp(0, 1)


@torch.no_grad()
def direct(critic: nn.Module, images: Tensor, outputs: Tensor) -> Tensor:
    made: Tensor = local_donsker_varadhan(pair_scores(critic.embed_outputs(outputs), critic.embed_images(images)))  # type: ignore[operator]
    return made


def test_each_estimate_is_the_estimators_own() -> None:
    net, critics, x, x_adv = parts()
    found = mutual_information(net, critics, x, x_adv)
    with torch.no_grad():
        z, z_adv = net(x), net(x_adv)
    natural, adversarial = critics["natural"], critics["adversarial"]
    expected = dict(
        zip(
            PAIRS,
            [
                direct(natural, x, z),
                direct(natural, x, z_adv),
                direct(natural, x_adv, z_adv),
                direct(adversarial, x_adv - x, z),
                direct(adversarial, x_adv - x, z_adv),
            ],
            strict=True,
        )
    )
    for name, values in expected.items():
        assert found[name] == pytest.approx(values.double().mean().item(), abs=1e-5)
    assert len({round(found[name], 7) for name in PAIRS}) == 5, "no two are the same by chance"
    least = {name: values.min().item() for name, values in expected.items()}
    assert found["natural_least"] == pytest.approx(min(least["natural_clean"], least["natural_adversarial"]), abs=1e-5)
    both = min(least["adversarial_clean"], least["adversarial_adversarial"])
    assert found["adversarial_least"] == pytest.approx(both, abs=1e-5)
    assert found["least"] == pytest.approx(min(least[name] for name in PAIRS[:3]), abs=1e-5)


def test_the_smallest_standard_information_is_not_the_adversarial_one() -> None:
    net, critics, x, x_adv = parts()
    for parameter in critics["adversarial"].parameters():
        parameter.data.mul_(3)
    found = mutual_information(net, critics, x, x_adv)
    assert found["adversarial_least"] < found["natural_least"]
    assert found["least"] > found["adversarial_least"]


def test_batches_hold_their_own_negatives_and_one_alone_is_left_out() -> None:
    net, critics, x, x_adv = parts()
    found = mutual_information(net, critics, x[:9], x_adv[:9], batch_size=4)
    assert (found["n"], found["batch"]) == (8, 4)
    halves = [mutual_information(net, critics, x[i : i + 4], x_adv[i : i + 4])["own"] for i in (0, 4)]
    assert found["own"] == pytest.approx(sum(halves) / 2, abs=1e-6)
    assert math.isfinite(found["least"])


def test_what_cannot_be_estimated_is_refused() -> None:
    net, critics, x, x_adv = parts()
    with pytest.raises(EvaluationError, match="defense=mi_estimators alone"):
        mutual_information(net, {}, x, x_adv)
    with pytest.raises(EvaluationError, match="expected two or more, of one shape"):
        mutual_information(net, critics, x[:1], x_adv[:1])
