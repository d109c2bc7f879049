"""Per-sample noise: a pure function of (seed, id), with the statistics of what it claims to be."""

import math

import pytest
import torch

from mi_at.functional.random import gaussian, uniform

SHAPE = (3, 7, 9)


def ids(n: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + n, dtype=torch.int64)


def ks(sample: torch.Tensor, cdf: torch.Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; ``cdf``: the claim at the sorted sample."""
    n = sample.numel()
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = torch.maximum((grid - cdf).abs().max(), (cdf - (grid - 1 / n)).abs().max())
    return math.sqrt(n) * float(distance)


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))


@pytest.mark.parametrize("noise", [uniform, gaussian])
class TestPurity:
    def test_shape_and_repetition(self, noise):
        a = noise(ids(5), SHAPE, 3)
        assert a.shape == (5, *SHAPE)
        assert a.is_floating_point()
        assert torch.equal(a, noise(ids(5), SHAPE, 3))

    def test_independent_of_batch_composition_and_order(self, noise):
        chosen = torch.tensor([41, 7, 7, 0, 123456, 2**40 + 5], dtype=torch.int64)
        whole = noise(chosen, SHAPE, 11)
        for row, single in enumerate(chosen):
            assert torch.equal(noise(single[None], SHAPE, 11)[0], whole[row])
        order = torch.tensor([5, 2, 0, 4, 1, 3])
        assert torch.equal(noise(chosen[order], SHAPE, 11), whole[order])
        assert torch.equal(whole[1], whole[2])
        assert torch.equal(noise(chosen[:3], SHAPE, 11), whole[:3])

    def test_the_global_generator_is_neither_read_nor_moved(self, noise):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = noise(ids(3), SHAPE, 5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)
        assert torch.equal(noise(ids(3), SHAPE, 5), first)

    def test_ids_and_seeds_all_matter(self, noise):
        """No two of 30 x 30 (seed, id) pairs share their noise: seed + id or seed * id would."""
        seen = torch.cat([noise(ids(30), (6,), seed) for seed in range(30)])
        distance = torch.cdist(seen.double(), seen.double()) + 10 * torch.eye(900, dtype=torch.float64)
        assert float(distance.min()) > 1e-3

    def test_large_ids_and_seeds(self, noise):
        for seed in (0, 1, 2**31 - 1, 2**32, 2**62):
            values = noise(torch.tensor([0, 2**32, 2**33, 2**62], dtype=torch.int64), (50,), seed)
            assert torch.isfinite(values).all()
            distance = torch.cdist(values.double(), values.double()) + 10 * torch.eye(4, dtype=torch.float64)
            assert float(distance.min()) > 0.1

    def test_an_empty_batch(self, noise):
        assert noise(ids(0), SHAPE, 1).shape == (0, *SHAPE)


def centred(noise, seed: int, n: int = 64, shape: tuple[int, ...] = (1, 16, 16)) -> torch.Tensor:
    """[n, pixels] noise with mean 0 and variance 1 as claimed."""
    values = noise(ids(n), shape, seed).double().flatten(1)
    return (values - 0.5) * math.sqrt(12.0) if noise is uniform else values


@pytest.mark.parametrize("noise", [uniform, gaussian])
@pytest.mark.parametrize("seed", [0, 1, 12345])
class TestIndependence:
    """Correlations stay under 5 standard errors (fixed seeds: no test flickers)."""

    def test_between_neighbouring_ids(self, noise, seed):
        v = centred(noise, seed)
        r = (v[1:] * v[:-1]).mean()
        assert abs(float(r)) < 5 / math.sqrt(v[1:].numel())

    def test_between_neighbouring_pixels(self, noise, seed):
        v = centred(noise, seed).view(64, 16, 16)
        for a, b in ((v[:, 1:], v[:, :-1]), (v[:, :, 1:], v[:, :, :-1])):
            assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())

    def test_between_neighbouring_seeds(self, noise, seed):
        v, w = centred(noise, seed), centred(noise, seed + 1)
        assert abs(float((v * w).mean())) < 5 / math.sqrt(v.numel())

    def test_no_row_is_a_shifted_other_row(self, noise, seed):
        """Counters that overlap (id + pixel) show as a cross-correlation of 1 at some lag."""
        v = centred(noise, seed, 24)
        w = torch.cat([v, centred(noise, seed + 1, 24)])
        spectrum = torch.fft.rfft(w, n=512)
        cross = torch.fft.irfft(spectrum[:, None] * spectrum[None].conj(), n=512) / 256
        cross[torch.arange(48), torch.arange(48), 0] = 0.0
        assert float(cross.abs().max()) < 7 / math.sqrt(256)

    def test_squares_too(self, noise, seed):
        """Pairs of a Box-Muller transform share a radius if one is reused: then the squares correlate."""
        v = centred(noise, seed).square()
        v = v - v.mean()
        scale = float(v.square().mean())
        half = v.shape[1] // 2
        for a, b in ((v[:, 1:], v[:, :-1]), (v[1:], v[:-1]), (v[:, :half], v[:, half:])):
            assert abs(float((a * b).mean())) / scale < 5 / math.sqrt(a.numel())

    def test_mean_of_each_pixel_over_ids(self, noise, seed):
        v = centred(noise, seed, 400, (40,))
        assert float(v.mean(0).abs().max()) < 5 / math.sqrt(400)
        assert float(v.mean(1).abs().max()) < 5 / math.sqrt(40)


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7])
@pytest.mark.parametrize("first", [0, 10**9])
def test_uniform_statistics(seed, first):
    v = uniform(ids(100, first), (1000,), seed).double().flatten()
    assert float(v.min()) >= 0.0
    assert float(v.max()) < 1.0
    error = math.sqrt(1 / 12 / v.numel())
    assert float(v.mean()) == pytest.approx(0.5, abs=4 * error)
    assert float(v.var()) == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / v.numel()))
    ordered = v.sort().values
    assert ks(ordered, ordered) < 1.95  # the 0.1 % point of the Kolmogorov distribution
    assert float(ordered[0]) < 1e-3
    assert float(ordered[-1]) > 1 - 1e-3
    assert v.unique().numel() > 0.98 * v.numel()


def test_uniform_never_reaches_one():
    """Rounding of a 32-bit integer to float32 gives 1.0 once in 2^25. Sample 184 of seed 0 is such a draw."""
    for v in (uniform(ids(1000), (1000,), 5), uniform(torch.tensor([184]), (2**16,), 0)):
        assert float(v.max()) < 1.0
        assert float(v.min()) >= 0.0
        grid = v.double() * 2.0**24
        assert torch.equal(grid, grid.round())  # 24 bits, which float32 holds exactly


def test_gaussian_is_finite_where_its_uniform_is_zero():
    """Sample 45 of seed 0 has a pixel whose 24 random bits are all 0: its logarithm must not be taken."""
    v = gaussian(torch.tensor([45]), (2**16,), 0)
    assert torch.isfinite(v).all()
    assert float(v.abs().max()) < 6.0


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7])
@pytest.mark.parametrize("first", [0, 10**9])
def test_gaussian_statistics(seed, first):
    v = gaussian(ids(100, first), (999,), seed).double().flatten()
    n = v.numel()
    assert torch.isfinite(v).all()
    assert float(v.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(n))
    assert float(v.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / n))
    assert float((v**3).mean()) == pytest.approx(0.0, abs=4 * math.sqrt(15 / n))
    assert float((v**4).mean()) == pytest.approx(3.0, abs=4 * math.sqrt(96 / n))
    ordered = v.sort().values
    assert ks(ordered, normal_cdf(ordered)) < 1.95
    tail = float((v.abs() > 3.0).double().mean())
    assert tail == pytest.approx(0.0027, abs=4 * math.sqrt(0.0027 / n))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_noise_on_an_accelerator():
    chosen = torch.tensor([0, 7, 2**40 + 5], dtype=torch.int64)
    assert torch.equal(uniform(chosen.cuda(), SHAPE, 3).cpu(), uniform(chosen, SHAPE, 3))
    torch.testing.assert_close(gaussian(chosen.cuda(), SHAPE, 3).cpu(), gaussian(chosen, SHAPE, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [uniform, gaussian])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (1, 1, 1), (3, 8, 8)])
def test_any_shape(noise, shape):
    v = noise(ids(4), shape, 2)
    assert v.shape == (4, *shape)
    assert torch.isfinite(v).all()
