"""Kernel dependence measures against loops over lists, by what they must be, and on bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mi_at.functional import kernels
from mi_at.functional.kernels import (
    bottleneck,
    channel_dependence,
    gaussian_kernel,
    hsic,
    kernel_matrix,
    knn_width,
    linear_kernel,
    normalized_hsic,
    one_hot,
    scaled_width,
    smoother,
    squared_distances,
)
from tests.references import hsic as ref

NAMES = ("gaussian", "linear")


def draw(m: int, d: int, seed: int, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, m, d, generator=generator, dtype=torch.float64)


def labels(m: int, classes: int) -> Tensor:
    return F.one_hot(torch.arange(m) % classes, classes).double()


# ---------------------------------------------------------------- values
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [2, 5, 9])
def test_hsic_is_that_of_the_equation(m: int, seed: int) -> None:
    x, z = draw(m, 3, seed), draw(m, 4, seed + 10) + 0.5 * draw(m, 1, seed)
    expected = ref.hsic(x.tolist(), z.tolist(), 1.3, 0.7)
    assert hsic(x, z, sigma_x=1.3, sigma_z=0.7).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kernel_x", NAMES)
@pytest.mark.parametrize("kernel_z", NAMES)
@pytest.mark.parametrize(("m", "sigma", "eps"), [(2, 5.0, 1e-5), (7, 5.0, 1e-5), (9, 1.0, 1e-2)])
def test_normalized_hsic_is_that_of_the_equation(
    kernel_x: str, kernel_z: str, m: int, sigma: float, eps: float
) -> None:
    x, z = draw(m, 6, 0), draw(m, 3, 1)
    expected = ref.normalized_hsic(x.tolist(), z.tolist(), sigma, eps, kernel_x, kernel_z)
    value = normalized_hsic(x, z, sigma=sigma, eps=eps, kernel_x=kernel_x, kernel_z=kernel_z)
    assert value.item() == pytest.approx(expected, abs=1e-8)


def test_float32_goes_in_and_float64_comes_out() -> None:
    x, z = draw(20, 6, 0), draw(20, 3, 1)
    value = normalized_hsic(x.float(), z.float())
    assert value.dtype == torch.float64
    expected = normalized_hsic(x.float().double(), z.float().double())
    assert value.item() == expected.item()


def test_leading_dimensions_are_a_batch() -> None:
    x, z = draw(6, 4, 0, 2, 3), draw(6, 2, 1)
    together = normalized_hsic(x, z, kernel_z="linear")
    assert together.shape == (2, 3)
    widths = torch.rand(2, 3, dtype=torch.float64) + 0.5
    plain = hsic(x, z, sigma_x=widths, sigma_z=2.0)
    for i in range(2):
        for j in range(3):
            assert together[i, j].item() == pytest.approx(
                normalized_hsic(x[i, j], z, kernel_z="linear").item(), abs=1e-11
            )
            one = hsic(x[i, j], z, sigma_x=widths[i, j], sigma_z=2.0)
            assert plain[i, j].item() == pytest.approx(one.item(), abs=1e-14)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_width_by_neighbours_is_that_of_the_rule(k: int) -> None:
    x = draw(8, 3, 0, 2)
    width = knn_width(x, k)
    for i in range(2):
        assert width[i].item() == pytest.approx(ref.knn_width(x[i].tolist(), k), abs=1e-12)
    assert not knn_width(x.requires_grad_(), k).requires_grad


def test_the_sample_itself_is_no_neighbour() -> None:
    """Two pairs: the nearest other is 1 away, and a copy of oneself 0."""
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    assert knn_width(x, k=1).item() == 1.0
    assert knn_width(torch.tensor([[0.0], [0.0], [3.0]]), k=1).item() == 1.0


def test_scaled_width_gives_a_variance_of_2_sigma_squared_d() -> None:
    x = draw(4, 7, 0)
    kernel = gaussian_kernel(x, width=scaled_width(x, 3.0))
    assert kernel[0, 1].item() == pytest.approx(math.exp(-float((x[0] - x[1]).square().sum()) / (2 * 9 * 7)), abs=1e-14)


@pytest.mark.parametrize("label_kernel", NAMES)
def test_bottleneck_is_the_sum_over_layers(label_kernel: str) -> None:
    x, y = draw(7, 5, 0), labels(7, 3)
    layers = [draw(7, d, d) for d in (2, 6, 4)]
    of_x, of_y = bottleneck(layers, x, y, kernel_labels=label_kernel)
    expected = ref.ib_rar_terms([layer.tolist() for layer in layers], x.tolist(), y.tolist(), 1.0, 1.0, label_kernel)
    assert (of_x.item(), -of_y.item()) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kernel_z", NAMES)
@pytest.mark.parametrize(("classes", "sigma", "eps"), [(3, 5.0, 1e-5), (10, 1.0, 1e-3)])
def test_dependence_of_channels_is_normalized_hsic_of_each(
    kernel_z: str, classes: int, sigma: float, eps: float
) -> None:
    m, channels = 12, kernels._PART + 3  # two parts
    maps = draw(m, channels * 6, 4).reshape(m, channels, 2, 3)
    maps[:, 1] = 0
    z = labels(m, classes)
    found = channel_dependence(maps, z, sigma=sigma, eps=eps, kernel_z=kernel_z)
    assert found.shape == (channels,)
    for c in (0, 1, channels - 1):
        each = ref.normalized_hsic(maps[:, c].flatten(1).tolist(), z.tolist(), sigma, eps, "gaussian", kernel_z)
        assert found[c].item() == pytest.approx(each, abs=1e-8)
    assert found[1].item() == pytest.approx(0, abs=1e-9)


def test_dependence_on_images_has_full_rank() -> None:
    maps, x = draw(8, 12, 0).reshape(8, 3, 4), draw(8, 20, 1)
    found = channel_dependence(maps, x)
    expected = normalized_hsic(maps.transpose(0, 1), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("measure", [
    lambda x, z: hsic(x, z, sigma_x=1.0, sigma_z=2.0),
    lambda x, z: hsic(x, z, sigma_x=knn_width(draw(5, 3, 0), 2), sigma_z=2.0),  # the width is a setting
    lambda x, z: normalized_hsic(x, z, sigma=1.0, eps=1e-2),
    lambda x, z: normalized_hsic(x, z, kernel_z="linear"),
    lambda x, z: torch.stack(bottleneck([x, x[:, :2]], z, labels(5, 2), sigma=1.0, eps=1e-2)),
], ids=["hsic", "hsic, knn width", "normalised", "normalised, linear", "bottleneck"])  # fmt: skip
def test_gradients_by_finite_differences(measure) -> None:  # type: ignore[no-untyped-def]
    x, z = draw(5, 3, 0), draw(5, 2, 1)
    assert torch.autograd.gradcheck(measure, (x.requires_grad_(), z.requires_grad_()))


def test_gradients_of_the_smoother_in_any_direction() -> None:
    """Not only in those of another smoother, which sum to 0."""
    root = draw(5, 5, 0)
    kernel = root @ root.mT

    def symmetric(k: Tensor) -> Tensor:
        return smoother((k + k.mT) / 2, eps=1e-2)

    assert torch.autograd.gradcheck(symmetric, kernel.requires_grad_())


def test_wide_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(5, 7, 0, 2).requires_grad_(), draw(5, 5, 1)
    monkeypatch.setattr(kernels, "_COLUMNS", 3)
    distances = squared_distances(x)
    expected = (x[..., :, None, :] - x[..., None, :, :]).square().sum(dim=-1)
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((weight * distances).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad((weight * expected).sum(), x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_float32_layers_lose_no_more_than_its_rounding(dtype: torch.dtype) -> None:
    x, y = draw(60, 30, 0).relu().to(dtype), labels(60, 10)
    gradients = []
    for layer in (x.requires_grad_(), x.detach().double().requires_grad_()):
        value = normalized_hsic(layer, y, kernel_z="linear")
        gradients.append(torch.autograd.grad(value, layer)[0])
        assert value.dtype == torch.float64
    assert gradients[0].dtype == dtype
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


# ---------------------------------------------------------------- what must hold
@pytest.mark.parametrize("normalised", [True, False])
def test_symmetric_invariant_to_order_translation_and_rotation(normalised: bool) -> None:
    def measure(a: Tensor, b: Tensor) -> float:
        return (normalized_hsic(a, b) if normalised else hsic(a, b, sigma_x=1.5, sigma_z=1.5)).item()

    x, z = draw(9, 4, 0), draw(9, 4, 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(draw(4, 4, 2)).Q
    value = measure(x, z)
    for other in (measure(z, x), measure(x[order], z[order]), measure(x @ rotation + 100, z - 7)):
        assert other == pytest.approx(value, abs=1e-8)
    assert measure(x, z[order]) != pytest.approx(value, abs=1e-3)


def test_a_scale_common_to_samples_and_width_cancels() -> None:
    x, z = draw(9, 4, 0), draw(9, 4, 1)
    one = hsic(x, z, sigma_x=knn_width(x, 3), sigma_z=1.0)
    assert hsic(50 * x, z, sigma_x=knn_width(50 * x, 3), sigma_z=1.0).item() == pytest.approx(one.item(), abs=1e-13)


def test_hsic_of_two_samples_by_hand() -> None:
    """K_c = (1 - k)/2 [[1, -1], [-1, 1]], so tr(K_c L_c) = (1 - k)(1 - l)."""
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    k, other = math.exp(-1 / 2), math.exp(-4 / 2)
    assert hsic(x, z, sigma_x=1.0, sigma_z=1.0).item() == pytest.approx((1 - k) * (1 - other), abs=1e-12)
    mu_x, mu_z = 1 - k, 1 - other
    ridge = 2 * 1e-2
    expected = mu_x / (mu_x + ridge) * mu_z / (mu_z + ridge)
    value = normalized_hsic(x, z, sigma=1.0, eps=1e-2)
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_what_follows_from_the_label_and_what_does_not() -> None:
    y = labels(60, 3)
    noise = draw(60, 3, 0)
    known, unknown = normalized_hsic(10 * y, y, kernel_z="linear"), normalized_hsic(noise, y, kernel_z="linear")
    assert 1.9 < known.item() <= 2.0  # at most K - 1
    assert unknown.item() < 0.5 * known.item()
    assert hsic(noise, y, sigma_x=1.0, sigma_z=1.0).item() < 0.1 * hsic(y, y, sigma_x=1.0, sigma_z=1.0).item()


def test_the_value_is_bounded_by_the_rank_and_grows_with_the_batch() -> None:
    values = [normalized_hsic(draw(m, 20, 0), draw(m, 20, 0)).item() for m in (10, 20, 40)]
    assert values[0] < values[1] < values[2]
    assert all(0 < value < m - 1 for value, m in zip(values, (10, 20, 40), strict=True))


def test_a_constant_layer_knows_nothing_and_is_not_moved() -> None:
    x = torch.full((6, 4), 0.1, dtype=torch.float64, requires_grad=True)
    value = normalized_hsic(x, labels(6, 2), kernel_z="linear")
    assert value.item() == 0
    assert torch.autograd.grad(value, x)[0].abs().max().item() < 1e-14


def test_smoother_is_symmetric_with_eigenvalues_in_0_1() -> None:
    r = smoother(gaussian_kernel(draw(15, 3, 0), width=1.0))
    torch.testing.assert_close(r, r.mT, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(r)
    assert values.min() > -1e-10
    assert values.max() < 1
    assert r.sum(dim=0).abs().max() < 1e-10


def test_samples_far_from_zero_keep_their_digits() -> None:
    """Activations with a large common offset."""
    x = draw(10, 50, 0)
    moved = normalized_hsic(x + 1e6, labels(10, 2), kernel_z="linear")
    assert moved.item() == pytest.approx(normalized_hsic(x, labels(10, 2), kernel_z="linear").item(), abs=1e-6)


def test_nothing_is_written_to() -> None:
    x, z = draw(6, 4, 0), draw(6, 2, 1)
    maps = draw(6, 8, 2).reshape(6, 2, 4)
    copies = [tensor.clone() for tensor in (x, z, maps)]
    normalized_hsic(x, z)
    hsic(x, z, sigma_x=1.0, sigma_z=1.0)
    knn_width(x, 2)
    channel_dependence(maps, z)
    assert all(torch.equal(a, b) for a, b in zip((x, z, maps), copies, strict=True))


def test_no_reading_from_the_device() -> None:
    """On the meta device any value that Python looks at raises."""
    x = torch.empty(6, 4, device="meta", requires_grad=True)
    z = torch.empty(6, 3, device="meta")
    normalized_hsic(x, z).backward()
    hsic(x, z, sigma_x=knn_width(x, 2), sigma_z=1.0).backward()
    assert channel_dependence(torch.empty(6, 5, 2, 2, device="meta"), z).shape == (5,)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("measure", [
    lambda x: hsic(x, x, sigma_x=1.0, sigma_z=1.0), lambda x: normalized_hsic(x, x), lambda x: knn_width(x, 1),
    lambda x: bottleneck([x], x, x), linear_kernel, lambda x: channel_dependence(x[:, None], x),
])  # fmt: skip
def test_one_sample(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"at least 2 samples, got 1: choose another batch size"):
        measure(torch.zeros(1, 3))


@pytest.mark.parametrize("measure", [
    lambda x, z: hsic(x, z, sigma_x=1.0, sigma_z=1.0), normalized_hsic,
    lambda x, z: bottleneck([x], z, z), lambda x, z: bottleneck([z], z, x),
    lambda x, z: channel_dependence(x[:, None], z),
])  # fmt: skip
def test_different_numbers_of_samples(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"as many samples in both, got \d and \d"):
        measure(torch.zeros(3, 3), torch.zeros(4, 3))


def test_maps_are_not_rows() -> None:
    maps, labels = torch.zeros(8, 3, 4, 4), torch.eye(8)
    with pytest.raises(ValueError, match=r"got 4 and 8 in \(8, 3, 4, 4\) and \(8, 8\).*flatten\(1\) images or maps"):
        normalized_hsic(maps, labels)
    with pytest.raises(ValueError, match=r"the maps of a convolution, \[m, C, \.\.\.\], got \(8, 3\)"):
        channel_dependence(maps[..., 0, 0], labels)


@pytest.mark.parametrize("k", [0, 4, 10])
def test_neighbours_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} nearest neighbours: expected 1 <= k < 4.*larger batch"):
        knn_width(draw(4, 2, 0), k)


@pytest.mark.parametrize("measure", [
    lambda x: hsic(x, x, sigma_x=1.0, sigma_z=1.0), normalized_hsic, lambda x: knn_width(x, 1), linear_kernel,
    lambda x: channel_dependence(x[:, None], torch.eye(4)),
])  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number(measure, bad: float) -> None:  # type: ignore[no-untyped-def]
    x = draw(4, 2, 0)
    x[1, 1] = bad
    arguments = (x, x) if measure is normalized_hsic else (x,)
    with pytest.raises(
        ValueError, match=r"a kernel matrix is not finite: the samples hold NaN or infinity.*lower optim.lr"
    ):
        measure(*arguments)


@pytest.mark.parametrize(("width", "found"), [
    (0.0, "0: all samples are equal"), (torch.zeros(()), "0: all samples are equal"),
    (-1.0, r"-1\.0$"), (torch.tensor(-1.0), "a negative one or NaN$"),
    (math.nan, "nan$"), (torch.tensor(math.nan), "a negative one or NaN"),
])  # fmt: skip
def test_a_width_that_is_not_positive(width: float | Tensor, found: str) -> None:
    x = draw(4, 2, 0)
    with pytest.raises(ValueError, match=rf"expected a kernel width > 0, got {found}"):
        hsic(x, x, sigma_x=width, sigma_z=1.0)


def test_equal_samples_have_no_width() -> None:
    with pytest.raises(ValueError, match=r"expected a kernel width > 0, got 0: all samples are equal \(a dead layer"):
        knn_width(torch.ones(5, 3), k=2)


@pytest.mark.parametrize(("options", "message"), [
    ({"sigma": 0.0}, r"sigma=0.0 in 3 dimensions: expected a width > 0"),
    ({"eps": 0.0}, r"eps=0.0: expected a ridge > 0"),
    ({"kernel_z": "cosine"}, r"kernel='cosine': expected one of gaussian, linear"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    x = draw(4, 3, 0)
    for measure in (normalized_hsic, lambda a, b, **o: channel_dependence(a[:, None], b, **o)):
        with pytest.raises(ValueError, match=message):
            measure(x, x, **options)


def test_images_must_be_flattened_and_layers_given() -> None:
    with pytest.raises(ValueError, match=r"expected samples as rows, \[..., m, d\], got \(4,\): flatten"):
        kernel_matrix(torch.zeros(4), kernel="linear", sigma=1.0)
    with pytest.raises(ValueError, match="at least one layer"):
        bottleneck([], draw(4, 2, 0), labels(4, 2))


def test_labels_that_say_nothing() -> None:
    with pytest.raises(ValueError, match=r"a batch of one sample.*choose a dataset.batch_size that does not leave"):
        one_hot(torch.tensor([2]), 3)
    with pytest.raises(ValueError, match=r"all 4 samples of a batch are of one class.*expected two classes"):
        one_hot(torch.full((4,), 2), 3)
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_matrix_that_is_no_kernel_gives_nan_and_not_a_number_that_looks_right() -> None:
    assert smoother(torch.tensor([[0.0, 5.0], [5.0, 0.0]])).isnan().all()
