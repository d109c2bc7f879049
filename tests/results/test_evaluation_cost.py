"""The bound of an evaluation, against FLOP counted while attacks run."""

from typing import Any

import pytest
import torch

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.cw_l2 import CWL2
from mi_at.attacks.ddn import DDN
from mi_at.attacks.fab import FAB
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.ni_fgsm import NIFGSM
from mi_at.attacks.pgd import PGD
from mi_at.models.cnn import CNNTiny
from mi_at.results.evaluation_cost import OWN_CALLS, evaluation_calls, evaluation_forwards, passes
from mi_at.results.flop import FlopCount

IMAGES = 4
ATTACKS: dict[str, Any] = {
    "fgsm": FGSM(eps=0.01),
    "pgd": PGD(eps=0.01, step_size=0.003, steps=5, restarts=2),
    "pgd_worst": PGD(eps=0.01, step_size=0.003, steps=5, iterate="worst"),
    "ni_fgsm": NIFGSM(eps=0.01, step_size=0.003, steps=5),
    "cw_l2": CWL2(c=1.0, steps=5, lr=0.01),
    "ddn": DDN(steps=5),
    "fab": FAB(steps=5),
    "fab_t": FAB(steps=5, targets=3),
    "square": AutoAttack(eps=0.01, norm="linf", attacks=("square",), queries=20),
    "apgd": AutoAttack(eps=0.01, norm="linf", attacks=("apgd-ce", "apgd-t"), queries=20, targets=1),
}


@pytest.mark.parametrize(
    "name", [*(name for name in ATTACKS if name != "apgd"), pytest.param("apgd", marks=pytest.mark.slow)]
)
def test_no_attack_costs_more(name: str) -> None:
    torch.manual_seed(0)
    net, x = CNNTiny(num_classes=10, in_channels=1, image_size=8).eval(), torch.rand(IMAGES, 1, 8, 8)
    with torch.no_grad(), FlopCount() as one:
        y = net(x).argmax(dim=1)  # all are right, so that all are attacked
    with FlopCount() as count:
        ATTACKS[name](net, x, y, ids=torch.arange(IMAGES), seed=0)
    gradients, forwards = passes(ATTACKS[name].describe(), 10)
    spent = count.flop / one.flop
    assert spent <= 2 * gradients + forwards
    if name not in ("apgd", "square"):  # a part gets what the part before left over
        assert spent + 1 >= 0.7 * (2 * gradients + forwards)  # the evaluator's own forward comes to it


def test_transfer_costs_what_its_attack_does() -> None:
    pgd = ATTACKS["pgd"].describe()
    assert passes({**pgd, "attack": "transfer", "kind": "pgd"}, 10) == passes(pgd, 10)


def test_every_image_of_every_attack() -> None:
    attacks = {"clean": {"attack": "clean"}, "pgd": {"attack": "pgd", "steps": 20, "restarts": 10}}
    evaluation: dict[str, Any] = {"n": None, "n_of": {}}
    whole = evaluation_forwards(attacks, evaluation, images=1000, num_classes=10)
    assert whole == 1000 * (1 + 2 * 200 + 20)
    assert evaluation_forwards(attacks, {**evaluation, "n": 10}, images=1000, num_classes=10) == whole / 100
    fewer = evaluation_forwards(attacks, {**evaluation, "n_of": {"pgd": 10}}, images=1000, num_classes=10)
    assert fewer == 1000 + 10 * 420
    audited = evaluation_forwards(
        attacks, {**evaluation, "audit": {"n": 200, "steps": 50}}, images=1000, num_classes=10
    )
    assert audited > whole + 200 * 2 * 50 * 15


def test_operations_are_asked_for_batch_by_batch() -> None:
    attacks = {"clean": {"attack": "clean"}, "pgd": {"attack": "pgd", "steps": 20}}
    of_a_batch = (7 + OWN_CALLS) + 20 * (14 + OWN_CALLS) + 2 * (7 + OWN_CALLS)

    def calls(**evaluation: Any) -> float:
        whole = {"n": None, "n_of": {}, "batch_size": 300, **evaluation}
        return evaluation_calls(attacks, whole, images=1000, num_classes=10, forward=7)

    assert calls() == 4 * of_a_batch
    assert calls(batch_size="auto") == of_a_batch
    assert calls(n=301) == 2 * of_a_batch


def test_a_step_asks_for_about_as_much_as_is_planned() -> None:
    """Of the network's operations and its own, counted in PGD on a small network."""
    torch.manual_seed(0)
    net, x = CNNTiny(num_classes=10, in_channels=1, image_size=8).eval(), torch.rand(IMAGES, 1, 8, 8)
    with torch.no_grad(), FlopCount() as one:
        y = net(x).argmax(dim=1)
    counted = []
    for steps in (2, 12):
        with FlopCount() as count:
            PGD(eps=1e-6, step_size=1e-7, steps=steps)(net, x, y, ids=torch.arange(IMAGES), seed=0)
        counted.append(count.calls)
    of_a_step = (counted[1] - counted[0]) / 10
    assert 0.7 < of_a_step / (2 * one.calls + OWN_CALLS) < 1.4
