"""WMIM's term: transcription, both sides of the joint training, cost, and the state of the estimator's optimiser."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.estimators.local_dim import pair_scores
from mi_at.models.resnet import ResNet18
from mi_at.regularizers.base import Context, Views
from mi_at.regularizers.wmim import Wmim
from tests.references import namid as ref
from tests.regularizers.test_namid import digits, network
from tests.test_flop import FlopCount, Reads, batch, step_of

CTX: Any = Context


def attached(**options: Any) -> tuple[StandardAT, Wmim]:
    torch.manual_seed(1)
    term = Wmim(**{"hsize": 8, "lambda_mi": 0.5, **options})
    defense = StandardAT()
    defense.attach(network(), regularizers={"wmim": term})
    defense.inspect_every = 0
    torch.manual_seed(2)
    term.adapt(defense.net)
    return defense, term


def test_the_term_equals_the_transcription() -> None:
    defense, term = attached()
    defense.double().eval()
    data = digits(7)
    data.views["adversarial"] = data.views["adversarial"].double()
    found = term.terms(Views(defense.net, data))
    critic: Any = term.critic
    images = data.views["adversarial"]
    u = pair_scores(critic.embed_outputs(defense.net(images)), critic.embed_images(images))
    expected = ref.pooled_donsker_varadhan(u.tolist())
    assert set(found) == {"wmim"}
    assert found["wmim"].item() == pytest.approx(-0.5 * expected, abs=1e-10)
    assert term.readings()["information"].item() == pytest.approx(expected, abs=1e-10)


def test_one_backward_moves_network_and_estimator_the_same_way() -> None:
    """Both lower the loss, so both raise the information."""
    defense, term = attached(lr=1e-3)
    data = digits(16)

    def information() -> float:
        return -term.terms(Views(defense.net, data))["wmim"].item() / 0.5

    before = information()
    for _ in range(5):
        defense.all_terms(Views(defense.net, data))["wmim"].backward()
        defense.net.zero_grad()
        term.after_step(CTX, data)
    by_estimator = information()
    assert by_estimator > before
    sgd = torch.optim.SGD(defense.trained_parameters(), 1e-3)
    for _ in range(5):
        defense.all_terms(Views(defense.net, data))["wmim"].backward()
        sgd.step()
        defense.zero_grad()
    assert information() > by_estimator


def test_the_estimator_makes_its_own_step_of_adam() -> None:
    defense, term = attached(lr=1e-2)
    assert not set(defense.trained_parameters()) & set(term.parameters())
    data = digits(8)
    defense.training_step(data, 0).backward()
    copies = [p.detach().clone().requires_grad_() for p in term.critic.parameters()]
    for copy, parameter in zip(copies, term.critic.parameters(), strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    torch.optim.Adam(copies, 1e-2).step()
    with torch.no_grad():  # as the hook is called
        term.after_step(CTX, data)
    for copy, parameter in zip(copies, term.critic.parameters(), strict=True):
        assert torch.equal(copy, parameter)
        assert parameter.grad is None


def test_the_statistics_of_its_batch_norm_follow_the_batches() -> None:
    defense, term = attached()
    defense.train()
    before = {name: v.clone() for name, v in term.named_buffers()}
    term.terms(Views(defense.net, digits()))
    assert before
    assert all(not torch.equal(v, before[name]) for name, v in term.named_buffers())


def test_a_restored_estimator_goes_on_as_the_first() -> None:
    first_defense, first = attached(lr=1e-2)

    def step(defense: StandardAT, term: Wmim, number: int) -> Tensor:
        defense.net.zero_grad()
        loss = defense.training_step(digits(8, seed=number), 0)
        loss.backward()
        term.after_step(CTX, digits(8))
        return loss.detach()

    for number in range(3):
        step(first_defense, first, number)
    saved = io.BytesIO()
    torch.save(first_defense.state_dict(), saved)
    saved.seek(0)
    second_defense, second = attached(lr=1e-2)
    second_defense.load_state_dict(torch.load(saved, weights_only=True))
    for number in range(3, 6):
        assert torch.equal(step(first_defense, first, number), step(second_defense, second, number))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_adds_to_the_loss_of_another_defense() -> None:
    defense = Trades()
    term = Wmim(hsize=8)
    net = network()
    defense.attach(net, regularizers={"wmim": term})
    terms = defense.all_terms(Views(net, digits()))
    others = sum(value for name, value in terms.items() if name not in ("loss", "wmim"))
    assert terms["loss"].item() == pytest.approx((others + terms["wmim"]).item(), rel=1e-5)
    assert set(defense.readings()) == {"wmim/information"}


def test_at_zero_it_is_the_base_loss() -> None:
    term = Wmim(lambda_mi=0.0)
    made = StandardAT().attach(network(), regularizers={"wmim": term})
    assert set(made.all_terms(Views(made.net, digits()))) == {"ce", "loss"}
    assert term.coupled == ""
    assert list(term.parameters()) == []
    term.after_step(CTX, digits())


def test_a_batch_of_one_gives_zero_and_reaches_every_parameter() -> None:
    """Several processes wait for the gradient of each."""
    defense, term = attached()
    defense.train()
    value = term.terms(Views(defense.net, digits(1)))["wmim"]
    assert value.item() == 0.0
    value.backward()
    for parameter in (*term.parameters(), *defense.trained_parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_mi": -0.1}, r"regularizer\.wmim\.lambda_mi=-0.1: expected 0 or more"),
        ({"lr": 0.0}, r"regularizer\.wmim\.lr=0.0: expected a positive number"),
        ({"hsize": 0}, r"regularizer\.wmim\.hsize=0: expected 1 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wmim(**options)


def test_a_step_costs_23_forwards_and_three_estimates() -> None:
    """An estimate: patches, outputs and scores of a batch, forward; its backward costs two more."""
    torch.manual_seed(0)
    net = ResNet18(num_classes=10, in_channels=3, image_size=32)
    term = Wmim(hsize=256)
    run, data = step_of(StandardAT(), net, wmim=term), batch()
    critic: Any = term.critic
    with FlopCount() as forward, torch.no_grad():
        net(data.x)
    with FlopCount() as estimate, torch.no_grad():
        critic(data.x, torch.randn(len(data), 10))
    with FlopCount() as count:
        run(data)
    assert count.flop == pytest.approx(23 * forward.flop + 3 * estimate.flop, rel=0.01)
    assert count.flop - 23 * forward.flop == pytest.approx(3 * estimate.flop, rel=0.1)


def test_a_step_reads_nothing_back() -> None:
    torch.manual_seed(0)
    net = ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.1)
    run = step_of(StandardAT(), net, wmim=Wmim(hsize=8))
    run(batch(4))
    with Reads() as reads:
        run(batch(4))
    assert reads.places <= {"_mix_int", "check_images"}
