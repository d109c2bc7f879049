"""The joint distribution of class assignments and its mutual information (MIMAE-AT eq. 13, 14)."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mi_at.functional.information import joint_distribution, mutual_information
from tests.references import cases as inputs
from tests.references import losses as ref

CASES = inputs.cases()
IDS = [c[0] for c in CASES]
DTYPE = torch.float64


def one_hot(labels: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).to(DTYPE)


@pytest.mark.parametrize(("name", "z", "z_adv", "y"), CASES, ids=IDS)
def test_values_equal_the_transcription(name, z, z_adv, y):
    expected = ref.joint_distribution([ref.softmax(r) for r in ref.rows(z)], [ref.softmax(r) for r in ref.rows(z_adv)])
    joint = joint_distribution(z.softmax(-1), z_adv.softmax(-1))
    torch.testing.assert_close(joint, torch.tensor(expected, dtype=DTYPE), rtol=0, atol=1e-12)
    assert float(mutual_information(joint)) == pytest.approx(ref.mutual_information(expected), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_the_transcription(seed):
    z, z_adv, _ = inputs.draw(4, 3, seed)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    value = mutual_information(joint_distribution(z.softmax(-1), z_adv.softmax(-1)))
    expected = ref.mutual_information(
        ref.joint_distribution(
            [ref.softmax(r) for r in ref.rows(z, grad=True)],
            [ref.softmax(r) for r in ref.rows(z_adv, grad=True)],
        )
    )
    got = torch.autograd.grad(value, (z, z_adv))
    want = torch.autograd.grad(expected, (z, z_adv))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_gradient_through_the_joint_itself():
    """Before normalisation the marginals' own gradients matter: d MI / d P_ab = ln(P_ab / (P_a P_b)) - 1."""
    joint = torch.rand(3, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (got,) = torch.autograd.grad(mutual_information(joint), joint)
    (want,) = torch.autograd.grad(ref.mutual_information([[joint[a, b] for b in range(3)] for a in range(3)]), joint)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    marginals = joint.detach().sum(1, keepdim=True) * joint.detach().sum(0, keepdim=True)
    torch.testing.assert_close(got, (joint.detach() / marginals).log() - 1.0)
    assert gradcheck(mutual_information, (joint,))


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 3), (6, 10)])
def test_gradcheck(batch, classes):
    z, z_adv, _ = inputs.draw(batch, classes, 7)
    z.requires_grad_(True)
    z_adv.requires_grad_(True)
    assert gradcheck(
        lambda a, b: mutual_information(joint_distribution(a.softmax(-1), b.softmax(-1))),
        (z, z_adv),
        atol=1e-7,
    )


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_joint_is_a_symmetric_distribution(classes):
    z, z_adv, _ = inputs.draw(17, classes, 1)
    joint = joint_distribution(z.softmax(-1), z_adv.softmax(-1))
    assert joint.shape == (classes, classes)
    assert (joint >= 0).all()
    assert float(joint.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(joint, joint.T, rtol=0, atol=1e-16)
    marginal = (z.softmax(-1) + z_adv.softmax(-1)).mean(0) / 2  # symmetrised, both marginals are the mean view
    torch.testing.assert_close(joint.sum(0), marginal, rtol=0, atol=1e-12)


def test_the_joint_of_one_pair_by_hand():
    p, q = torch.tensor([[0.25, 0.75]], dtype=DTYPE), torch.tensor([[0.5, 0.5]], dtype=DTYPE)
    expected = torch.tensor([[0.125, 0.25], [0.25, 0.375]], dtype=DTYPE)
    torch.testing.assert_close(joint_distribution(p, q), expected, rtol=0, atol=1e-15)


def test_the_joint_is_renormalised():
    """Rows that miss the simplex by rounding (a bf16 softmax) still give a total of 1."""
    z, z_adv, _ = inputs.draw(8, 10, 1)
    p, q = z.softmax(-1), z_adv.softmax(-1)
    torch.testing.assert_close(joint_distribution(1.01 * p, 0.98 * q), joint_distribution(p, q), rtol=0, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_balanced_and_certain_gives_log_c(classes):
    p = one_hot(list(range(classes)) * 2, classes)
    assert float(mutual_information(joint_distribution(p, p))) == pytest.approx(math.log(classes), abs=1e-9)


def test_a_certain_unbalanced_batch_gives_the_entropy_of_its_classes():
    p = one_hot([0, 0, 0, 1], 3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(mutual_information(joint_distribution(p, p))) == pytest.approx(entropy, abs=1e-10)


def test_identical_one_hots_carry_no_information():
    p = one_hot([4] * 9, 10)
    assert float(mutual_information(joint_distribution(p, p))) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_an_independent_joint_carries_no_information(classes):
    z, _, _ = inputs.draw(1, classes, 6)
    p = z.softmax(-1)
    assert float(mutual_information(joint_distribution(p, p))) == pytest.approx(0.0, abs=1e-10)
    flat = torch.full((5, classes), 1.0 / classes, dtype=DTYPE)
    assert float(mutual_information(joint_distribution(flat, flat))) == pytest.approx(0.0, abs=1e-10)


def test_a_joint_with_different_marginals():
    """Not symmetric, so that rows and columns cannot be confused: independent pairs, an erasure channel."""
    a, b = torch.tensor([0.2, 0.8, 0.0], dtype=DTYPE), torch.tensor([0.5, 0.3, 0.2], dtype=DTYPE)
    assert float(mutual_information(torch.outer(a, b))) == pytest.approx(0.0, abs=1e-12)
    erasure = torch.tensor([[0.35, 0.0, 0.15], [0.0, 0.35, 0.15], [0.0, 0.0, 0.0]], dtype=DTYPE)  # erased: 0.3
    assert float(mutual_information(erasure)) == pytest.approx(0.7 * math.log(2), abs=1e-10)
    assert float(mutual_information(erasure.T)) == pytest.approx(0.7 * math.log(2), abs=1e-10)
    binary = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=DTYPE)  # flipped with probability 0.1
    noise = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert float(mutual_information(binary)) == pytest.approx(math.log(2) - noise, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_bounds_and_symmetry(seed):
    classes = [2, 3, 10, 100][seed % 4]
    z, z_adv, _ = inputs.draw(17, classes, seed, 4.0)
    p, q = z.softmax(-1), z_adv.softmax(-1)
    value = float(mutual_information(joint_distribution(p, q)))
    assert -1e-12 <= value <= math.log(classes) + 1e-12
    assert float(mutual_information(joint_distribution(q, p))) == pytest.approx(value, abs=1e-13)


def test_samples_may_be_reordered_and_classes_renamed():
    z, z_adv, _ = inputs.draw(11, 6, 8)
    p, q = z.softmax(-1), z_adv.softmax(-1)
    value = mutual_information(joint_distribution(p, q))
    g = torch.Generator().manual_seed(0)
    order, classes = torch.randperm(11, generator=g), torch.randperm(6, generator=g)
    torch.testing.assert_close(mutual_information(joint_distribution(p[order], q[order])), value)
    torch.testing.assert_close(mutual_information(joint_distribution(p[:, classes], q[:, classes])), value)
    torch.testing.assert_close(
        joint_distribution(p[:, classes], q[:, classes]), joint_distribution(p, q)[classes][:, classes]
    )


def test_pairs_matter():
    """MI falls when the adversarial rows are shuffled against the clean ones."""
    p = one_hot(list(range(10)) * 3, 10)
    assert float(mutual_information(joint_distribution(p, p.roll(1, 0)))) < 1.7
    assert float(mutual_information(joint_distribution(p, p))) > 2.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_zero_cells_are_finite_in_value_and_gradient(classes, dtype):
    for size in (80.0, 1000.0):
        z, z_adv, _ = inputs.extreme(classes, size, dtype)
        z.requires_grad_(True)
        z_adv.requires_grad_(True)
        value = mutual_information(joint_distribution(z.softmax(-1), z_adv.softmax(-1)))
        assert torch.isfinite(value)
        for gradient in torch.autograd.grad(value, (z, z_adv)):
            assert torch.isfinite(gradient).all()


def test_inputs_are_not_written_to():
    p = one_hot([0, 1, 1], 3)
    joint = joint_distribution(p, p)
    before = joint.clone()
    mutual_information(joint)
    assert torch.equal(joint, before)
    assert torch.equal(p, one_hot([0, 1, 1], 3))


def test_float32_agrees_with_float64():
    z, z_adv, _ = inputs.draw(17, 10, 3, 3.0)
    value = mutual_information(joint_distribution(z.softmax(-1), z_adv.softmax(-1)))
    single = mutual_information(joint_distribution(z.float().softmax(-1), z_adv.float().softmax(-1)))
    assert float(single) == pytest.approx(float(value), abs=1e-5)
