"""Every training loss against its transcription, and the properties its equation promises."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mi_at.defenses.alp import alp_loss
from mi_at.defenses.ce import ce_loss
from mi_at.defenses.mart import mart_loss
from mi_at.defenses.mimae import mimae_loss
from mi_at.defenses.mma import mma_full_loss, mma_simplified_loss
from mi_at.defenses.standard_at import standard_at_loss
from mi_at.defenses.trades import trades_loss
from tests.references import cases as inputs
from tests.references import losses as ref

DTYPE = torch.float64
Loss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
Literal = Callable[[ref.Rows, ref.Rows, list[int]], dict[str, Any]]


def pair(ours: Callable[..., Any], literal: Callable[..., Any], **options: Any) -> tuple[Loss, Literal]:
    """Both with the same options, as functions of (clean, adversarial, labels)."""
    return (
        lambda z, z_adv, y: ours(z, z_adv, y, **options),
        lambda z, z_adv, y: literal(z, z_adv, y, **options),
    )


LOSSES: dict[str, tuple[Loss, Literal]] = {
    "ce": (lambda z, z_adv, y: ce_loss(z, y), lambda z, z_adv, y: ref.ce_loss(z, y)),
    "standard_at": (
        lambda z, z_adv, y: standard_at_loss(z_adv, y),
        lambda z, z_adv, y: ref.standard_at_loss(z_adv, y),
    ),
    "trades-1": pair(trades_loss, ref.trades_loss, beta=1.0),
    "trades-6": pair(trades_loss, ref.trades_loss, beta=6.0),
    "trades of ib_rar's code": (
        lambda z, z_adv, y: trades_loss(z, z_adv, y, beta=0.5, ce_view="adversarial"),
        ref.ib_rar_trades_loss,
    ),
    "mart of ib_rar's code": pair(mart_loss, ref.mart_loss, beta=0.5),
    "mart-5": pair(mart_loss, ref.mart_loss, beta=5.0),
    "mart-6": pair(mart_loss, ref.mart_loss, beta=6.0),
    "alp-0.5": pair(alp_loss, ref.alp_loss, alpha=0.5),
    "mma": pair(mma_simplified_loss, ref.mma_simplified_loss),
    "mimae": pair(mimae_loss, ref.mimae_loss, lambda_mi=0.4, beta=1.0),
    "mimae-2-0.3": pair(mimae_loss, ref.mimae_loss, lambda_mi=2.0, beta=0.3),
}
SWITCHES = [(a, b, c) for a in ("bce", "ce") for b in ("mae", "mse", "none") for c in ("mean", "sum")]
for _adversarial, _logit, _reduction in SWITCHES:
    LOSSES[f"mimae-{_adversarial}-{_logit}-{_reduction}"] = pair(
        mimae_loss,
        ref.mimae_loss,
        lambda_mi=0.6,
        beta=0.7,
        adversarial_term=_adversarial,
        logit_term=_logit,
        mae_reduction=_reduction,
    )
NAMES = list(LOSSES)
CASES = inputs.cases()
IDS = [c[0] for c in CASES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "z", "z_adv", "y"), CASES, ids=IDS)
def test_the_loss_equals_the_transcription(name, case, z, z_adv, y):
    """To 1e-10, in the sum and in every term: the values agree, in order of size, whatever the names."""
    ours, literal = LOSSES[name]
    expected = literal(ref.rows(z), ref.rows(z_adv), y.tolist())
    terms = ours(z, z_adv, y)
    assert float(terms["loss"]) == pytest.approx(ref.total(expected), abs=1e-10)
    got = sorted(float(v) for k, v in terms.items() if k != "loss")
    want = sorted(float(v) for v in expected.values())
    while len(want) > len(got):  # a term that is switched off may be left out
        assert 0.0 in want
        want.remove(0.0)
    assert got == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_the_loss_equals_the_transcription_for_many_seeds(name, seed):
    ours, literal = LOSSES[name]
    g = torch.Generator().manual_seed(seed)
    batch, classes = int(torch.randint(1, 18, (), generator=g)), [2, 3, 10][seed % 3]
    z, z_adv, y = inputs.draw(batch, classes, 100 + seed, 10.0 ** float(torch.rand((), generator=g) - 0.5))
    expected = ref.total(literal(ref.rows(z), ref.rows(z_adv), y.tolist()))
    assert float(ours(z, z_adv, y)["loss"]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_equals_that_of_the_transcription(name, seed):
    ours, literal = LOSSES[name]
    z, z_adv, y = inputs.draw(3, 4, seed)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    value = ref.total(literal(ref.rows(z, grad=True), ref.rows(z_adv, grad=True), y.tolist()))
    want = torch.autograd.grad(value, (z, z_adv), allow_unused=True)
    got = torch.autograd.grad(ours(z, z_adv, y)["loss"], (z, z_adv), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros_like(z)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 3)])
def test_gradcheck(name, batch, classes):
    z, z_adv, y = inputs.draw(batch, classes, 11)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        # gradcheck wants both inputs in the graph
        return LOSSES[name][0](a, b, y)["loss"] + 0.0 * (a.sum() + b.sum())

    assert gradcheck(loss, (z, z_adv))


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_sum_of_its_terms(name):
    z, z_adv, y = inputs.draw(8, 5, 3)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    terms = LOSSES[name][0](z, z_adv, y)
    others = [v for k, v in terms.items() if k != "loss"]
    assert others
    assert all(isinstance(k, str) and v.ndim == 0 and v.requires_grad for k, v in terms.items())
    assert all(v.dtype == DTYPE for v in terms.values())
    assert float(terms["loss"].detach()) == pytest.approx(math.fsum(float(v.detach()) for v in others), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [80.0, 1000.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_finite_in_float32_on_saturated_logits(name, size, classes):
    z, z_adv, y = inputs.extreme(classes, size, torch.float32)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    terms = LOSSES[name][0](z, z_adv, y)
    for value in terms.values():
        assert torch.isfinite(value)
        assert value.dtype == torch.float32
    for gradient in torch.autograd.grad(terms["loss"], (z, z_adv), allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name):
    z, z_adv, y = inputs.draw(17, 10, 4, 3.0)
    single = LOSSES[name][0](z.float(), z_adv.float(), y)["loss"]
    assert float(single) == pytest.approx(float(LOSSES[name][0](z, z_adv, y)["loss"]), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_samples_may_be_reordered_and_classes_renamed(name):
    z, z_adv, y = inputs.draw(9, 6, 5)
    g = torch.Generator().manual_seed(0)
    order, classes = torch.randperm(9, generator=g), torch.randperm(6, generator=g)
    terms = LOSSES[name][0](z, z_adv, y)
    reordered = LOSSES[name][0](z[order], z_adv[order], y[order])
    renamed = LOSSES[name][0](z[:, classes], z_adv[:, classes], torch.argsort(classes)[y])
    assert list(terms) == list(reordered) == list(renamed)
    for key, value in terms.items():
        torch.testing.assert_close(reordered[key], value)
        torch.testing.assert_close(renamed[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_to(name):
    z, z_adv, y = inputs.draw(5, 4, 6)
    copies = z.clone(), z_adv.clone(), y.clone()
    LOSSES[name][0](z, z_adv, y)
    assert all(torch.equal(a, b) for a, b in zip((z, z_adv, y), copies, strict=True))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ce", "standard_at", "mma")])
def test_both_views_receive_gradients(name):
    """No term holds one of its sides fixed (the public codes of TRADES and MART detach nothing)."""
    z, z_adv, y = inputs.draw(6, 5, 7)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    for gradient in torch.autograd.grad(LOSSES[name][0](z, z_adv, y)["loss"], (z, z_adv)):
        assert float(gradient.abs().sum(1).min()) > 0.0


# ---------------------------------------------------------------- what each equation promises


def test_trades_regulariser_is_zero_at_equal_logits_and_minimal_there():
    z, z_adv, y = inputs.draw(8, 5, 0)
    z_adv = z.clone().requires_grad_(True)
    gap = trades_loss(z, z_adv, y, beta=6.0)["loss"] - ce_loss(z, y)["loss"]
    assert abs(float(gap.detach())) < 1e-14
    assert float(torch.autograd.grad(gap, z_adv)[0].abs().max()) < 1e-14


def test_trades_divergence_goes_from_the_clean_to_the_adversarial_output():
    """KL(p(x) || p(x')): a certain clean and a flat adversarial output give log C, not more."""
    certain, flat, y = (
        torch.tensor([[30.0, 0.0, 0.0]], dtype=DTYPE),
        torch.zeros(1, 3, dtype=DTYPE),
        torch.tensor([0]),
    )
    gap = trades_loss(certain, flat, y, beta=2.0)["loss"] - ce_loss(certain, y)["loss"]
    assert float(gap) == pytest.approx(2 * math.log(3), abs=1e-10)


def test_trades_of_an_unknown_view():
    z, z_adv, y = inputs.draw(2, 3, 0)
    with pytest.raises(ValueError, match="ce_view='both': expected one of clean, adversarial"):
        trades_loss(z, z_adv, y, beta=1.0, ce_view="both")


def test_mart_regulariser_is_nearly_zero_at_equal_logits():
    z, _, y = inputs.draw(8, 10, 0)
    alone = mart_loss(z, z, y, beta=0.0)["loss"]
    assert abs(float(mart_loss(z, z, y, beta=6.0)["loss"] - alone)) < 1e-10


def test_mart_weight_is_the_clean_error():
    """Certain and right when clean: the divergence is not felt. Certain and wrong: all of it."""
    z = torch.tensor([[40.0, 0.0, 0.0]], dtype=DTYPE)
    z_adv = torch.tensor([[0.0, 1.0, 0.0]], dtype=DTYPE)
    kl = ref.kl(ref.rows(z)[0], ref.rows(z_adv)[0])
    for label, weight in ((0, 1e-7), (1, 1.0000001)):
        y = torch.tensor([label])
        gap = mart_loss(z, z_adv, y, beta=3.0)["loss"] - mart_loss(z, z_adv, y, beta=0.0)["loss"]
        assert float(gap) == pytest.approx(3.0 * kl * weight, rel=1e-6)


def test_mart_log_of_a_vanished_probability_is_that_of_its_constant():
    """p' = 0 gives log 1e-12, not -160."""
    z, z_adv = torch.tensor([[0.0, 80.0]], dtype=DTYPE), torch.tensor([[80.0, -80.0]], dtype=DTYPE)
    gap = (
        mart_loss(z, z_adv, torch.tensor([0]), beta=1.0)["loss"]
        - mart_loss(z, z_adv, torch.tensor([0]), beta=0.0)["loss"]
    )
    assert float(gap) == pytest.approx(-math.log(1e-12) * 1.0000001, rel=1e-9)


def test_alp_pairing_is_a_mean_over_batch_and_classes():
    z = torch.zeros(2, 4, dtype=DTYPE)
    z_adv = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=DTYPE)
    y = torch.tensor([0, 1])
    gap = alp_loss(z, z_adv, y, alpha=0.5)["loss"] - standard_at_loss(z_adv, y)["loss"]
    assert float(gap) == pytest.approx(0.5 * 4.0 / 8, abs=1e-14)


def test_mma_takes_each_sample_from_the_view_its_clean_prediction_decides():
    z = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=DTYPE, requires_grad=True)
    z_adv = torch.tensor([[-1.0, 0.5], [4.0, -4.0]], dtype=DTYPE, requires_grad=True)
    y = torch.tensor([0, 0])  # the first is right when clean, the second wrong
    value = mma_simplified_loss(z, z_adv, y)["loss"]
    expected = (ce_loss(z_adv[:1], y[:1])["loss"] + ce_loss(z[1:], y[1:])["loss"]) / 2
    torch.testing.assert_close(value, expected)
    clean, adversarial = torch.autograd.grad(value, (z, z_adv))
    assert clean[0].tolist() == [0.0, 0.0]
    assert adversarial[1].tolist() == [0.0, 0.0]
    assert float(clean[1].abs().min()) > 0
    assert float(adversarial[0].abs().min()) > 0


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_full_mma_equals_the_transcription(weight, seed):
    z, boundary, y = inputs.draw(9, 3, seed, 1.0)
    within = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = ref.mma_full_loss(ref.rows(z), ref.rows(boundary), y.tolist(), within.tolist(), clean_weight=weight)
    terms = mma_full_loss(z, boundary, y, within, clean_weight=weight)
    assert float(terms["loss"]) == pytest.approx(ref.total(expected), abs=1e-10)
    assert float(terms["loss"]) == pytest.approx(sum(float(v) for k, v in terms.items() if k != "loss"), abs=1e-12)


def test_mimae_information_lowers_the_loss_by_its_value():
    """Ten balanced certain pairs carry ln 10 nats: lambda of them are subtracted."""
    z = 60.0 * torch.eye(10, dtype=DTYPE)
    y = torch.arange(10)
    without = mimae_loss(z, z, y, lambda_mi=0.0, beta=1.0)["loss"]
    gap = mimae_loss(z, z, y, lambda_mi=0.4, beta=1.0)["loss"] - without
    assert float(gap) == pytest.approx(-0.4 * math.log(10), abs=1e-9)


def test_mimae_collapsed_outputs_earn_nothing():
    z = torch.tensor([[60.0, 0.0, 0.0]] * 6, dtype=DTYPE)
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    gap = mimae_loss(z, z, y, lambda_mi=5.0, beta=1.0)["loss"] - mimae_loss(z, z, y, lambda_mi=0.0, beta=1.0)["loss"]
    assert abs(float(gap)) < 1e-10


def test_mimae_information_is_over_the_batch_not_over_the_sample():
    """Eq. 13: the information of a batch is not the mean of its parts'."""
    z = 20.0 * torch.eye(2, dtype=DTYPE).repeat_interleave(4, 0)
    z_adv, y = z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def information(s: slice) -> float:
        with_it = mimae_loss(z[s], z_adv[s], y[s], lambda_mi=1.0, beta=0.0)["loss"]
        return float(mimae_loss(z[s], z_adv[s], y[s], lambda_mi=0.0, beta=0.0)["loss"] - with_it)

    assert information(slice(0, 4)) == pytest.approx(0.0, abs=1e-6)
    assert information(slice(4, 8)) == pytest.approx(0.0, abs=1e-6)
    assert information(slice(0, 8)) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("term", "reduction", "expected"), [
    ("mae", "mean", 0.5 * 6 / 8), ("mae", "sum", 0.5 * 6 / 2),
    ("mse", "mean", 0.5 * 14 / 8), ("mse", "sum", 0.5 * 14 / 2), ("none", "mean", 0.0),
])  # fmt: skip
def test_mimae_logit_term_by_hand(term, reduction, expected):
    z = torch.zeros(2, 4, dtype=DTYPE)
    z_adv = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]], dtype=DTYPE)
    y = torch.tensor([0, 1])
    options = {"lambda_mi": 0.0, "logit_term": term, "mae_reduction": reduction}
    gap = mimae_loss(z, z_adv, y, beta=0.5, **options)["loss"] - mimae_loss(z, z_adv, y, beta=0.0, **options)["loss"]
    assert float(gap) == pytest.approx(expected, abs=1e-12)


def test_mimae_adversarial_term_looks_at_the_adversarial_view():
    z, z_adv, y = inputs.draw(6, 5, 1)
    options = {"lambda_mi": 0.0, "beta": 0.0}
    boosted = ref.mean([ref.boosted_cross_entropy(r, k) for r, k in zip(ref.rows(z_adv), y.tolist(), strict=True)])
    plain = ref.mean([ref.cross_entropy(r, k) for r, k in zip(ref.rows(z_adv), y.tolist(), strict=True)])
    assert float(mimae_loss(z, z_adv, y, **options)["loss"]) == pytest.approx(boosted, abs=1e-12)
    assert float(mimae_loss(z, z_adv, y, adversarial_term="ce", **options)["loss"]) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("change", [
    {"adversarial_term": "hinge"}, {"logit_term": "huber"}, {"mae_reduction": "median"},
])  # fmt: skip
def test_mimae_refuses_an_unknown_switch(change):
    """Called as a function too: a typo must not drop a term in silence."""
    z, z_adv, y = inputs.draw(2, 3, 0)
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        mimae_loss(z, z_adv, y, lambda_mi=0.4, beta=1.0, **change)


def test_weights_are_keyword_only():
    z, z_adv, y = inputs.draw(2, 3, 0)
    for loss, n in ((trades_loss, 1), (mart_loss, 1), (alp_loss, 1), (mimae_loss, 2)):
        with pytest.raises(TypeError, match="positional"):
            loss(z, z_adv, y, *([1.0] * n))  # type: ignore[call-arg]
