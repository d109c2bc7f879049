"""Margins and the difference-of-logits ratio."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mi_at.functional.margins import cw_margin, dlr, logit_margin, soft_logit_margin
from tests.references import attacks as ref
from tests.references import cases as inputs
from tests.references.losses import rows

CASES = inputs.cases()
IDS = [c[0] for c in CASES]
DTYPE = torch.float64


@pytest.mark.parametrize(("name", "z", "z_adv", "y"), CASES, ids=IDS)
def test_values_equal_the_transcription(name, z, z_adv, y):
    labels, nested = y.tolist(), rows(z)
    samples = range(len(labels))

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([float(v) for v in values], dtype=DTYPE)

    expected = column([ref.logit_margin(nested[i], labels[i]) for i in samples])
    torch.testing.assert_close(logit_margin(z, y), expected, rtol=0, atol=1e-12)
    expected = column([ref.soft_logit_margin(nested[i], labels[i]) for i in samples])
    torch.testing.assert_close(soft_logit_margin(z, y), expected, rtol=0, atol=1e-12)
    for kappa in (0.0, 0.7, 50.0):
        expected = column([ref.cw_margin(nested[i], labels[i], kappa) for i in samples])
        torch.testing.assert_close(cw_margin(z, y, kappa), expected, rtol=0, atol=1e-12)
    expected = column([ref.cw_margin(nested[i], labels[i], 0.0) for i in samples])
    torch.testing.assert_close(cw_margin(z, y), expected, rtol=0, atol=1e-12)
    if z.shape[1] > 2 and not name.startswith("extreme"):
        expected = column([ref.dlr(nested[i], labels[i]) for i in samples])
        torch.testing.assert_close(dlr(z, y), expected, rtol=1e-10, atol=1e-10)


def test_the_sign_is_the_attackers():
    """Negative while right, positive once wrong; all three agree with the prediction."""
    z, _, y = inputs.draw(17, 10, 2)
    wrong = z.argmax(1) != y
    for values in (logit_margin(z, y), cw_margin(z, y, 50.0), dlr(z, y)):
        assert values.shape == y.shape
        assert torch.equal(values > 0, wrong)
    assert (cw_margin(z, y) <= 0).all()


def test_by_hand():
    z = torch.tensor([[1.0, 4.0, 3.0], [1.0, 4.0, 3.0], [-5.0, -4.0, -9.0]], dtype=DTYPE)
    y = torch.tensor([1, 0, 0])
    assert logit_margin(z, y).tolist() == [-1.0, 3.0, 1.0]
    assert cw_margin(z, y).tolist() == [-1.0, 0.0, 0.0]
    assert cw_margin(z, y, 2.0).tolist() == [-1.0, 2.0, 1.0]
    torch.testing.assert_close(dlr(z, y), torch.tensor([-1 / 3, 1.0, 0.2], dtype=DTYPE))


def test_very_negative_logits_do_not_meet_the_mask():
    """A mask of -1e4 or -1e9 on the true class must not win over the real classes."""
    z = torch.tensor([[-3e4, -2e4, -4e4]], dtype=DTYPE)
    assert float(logit_margin(z, torch.tensor([1]))) == pytest.approx(-1e4)
    assert float(logit_margin(z, torch.tensor([0]))) == pytest.approx(1e4)


def test_dlr_sees_neither_shift_nor_scale():
    z, _, y = inputs.draw(40, 5, 1)
    torch.testing.assert_close(dlr(100.0 * z + 3.0, y), dlr(z, y))
    right = z.argmax(1) == y
    assert right.any()
    assert (dlr(z, y)[right] >= -1.0).all()


def test_dlr_of_equal_logits_is_finite():
    z = torch.zeros(2, 4, dtype=torch.float32, requires_grad=True)
    value = dlr(z, torch.tensor([0, 3]))
    assert value.detach().tolist() == [0.0, 0.0]
    assert torch.isfinite(torch.autograd.grad(value.sum(), z)[0]).all()


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match="2"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


def test_gradcheck():
    z, _, y = inputs.draw(4, 5, 3)
    z.requires_grad_(True)
    assert gradcheck(lambda a: logit_margin(a, y), (z,))
    assert gradcheck(lambda a: cw_margin(a, y, 50.0), (z,))
    assert gradcheck(lambda a: dlr(a, y), (z,))
    assert gradcheck(lambda a: soft_logit_margin(a, y), (z,))


def test_the_soft_margin_bounds_the_margin_and_decides_the_cross_entropy():
    z, _, y = inputs.draw(17, 10, 2)
    soft, hard = soft_logit_margin(z, y), logit_margin(z, y)
    assert (soft >= hard).all()
    assert (soft <= hard + math.log(9)).all()
    expected = torch.nn.functional.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(torch.nn.functional.softplus(soft), expected)


def test_the_gradient_vanishes_beyond_kappa():
    z = torch.tensor([[1.0, 4.0, 3.0], [4.0, 1.0, 3.0]], dtype=DTYPE, requires_grad=True)
    (gradient,) = torch.autograd.grad(cw_margin(z, torch.tensor([0, 0])).sum(), z)
    assert gradient.tolist() == [[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]
    (gradient,) = torch.autograd.grad(cw_margin(z, torch.tensor([0, 0]), 50.0).sum(), z)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]


def test_classes_may_be_renamed():
    z, _, y = inputs.draw(9, 7, 4)
    classes = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    renamed = torch.argsort(classes)[y]
    for function in (logit_margin, cw_margin, dlr):
        torch.testing.assert_close(function(z[:, classes], renamed), function(z, y))


def test_a_tie_is_not_yet_a_success():
    """The first of equal logits wins: an attacker with kappa 0 must still see where to go, and stop only beyond."""
    z = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cw_margin(z, torch.zeros(3, dtype=torch.int64), 0.0).sum(), z)
    assert gradient.tolist() == [[-1.0, 1.0], [0.0, 0.0], [-1.0, 1.0]]
