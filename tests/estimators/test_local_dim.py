"""The local DIM critic: its transcription, known information, bounds, sizes, and whose weights it takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mi_at.estimators.local_dim import (
    BatchNorm,
    Embedding,
    LocalDIM,
    count_gradients_once,
    critic_of,
    pair_scores,
)
from mi_at.functional.variational import pooled_donsker_varadhan
from tests.references import namid as ref


def critic(**options: object) -> LocalDIM:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "channels": 1, "image_size": (8, 8), "hsize": 4, **options}
    made = LocalDIM(**settings)  # type: ignore[arg-type]
    for name, tensor in made.state_dict().items():  # nothing at a value that hides a mistake
        if isinstance(tensor, Tensor):
            tensor.add_(0.3 * torch.rand_like(tensor))
            if name.endswith("bias"):
                tensor.sub_(0.2)
    return made.eval()


def test_scores_equal_the_transcription() -> None:
    made = critic().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    state = {name: value.tolist() for name, value in made.state_dict().items() if isinstance(value, Tensor)}
    expected = torch.tensor(ref.critic_scores(state, x.tolist(), z.tolist()), dtype=torch.float64)
    found = pair_scores(made.embed_outputs(z), made.embed_images(x))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    estimates = ref.local_donsker_varadhan(expected.tolist())
    assert made(x, z).tolist() == pytest.approx(estimates, abs=1e-8)


@pytest.mark.parametrize(("size", "locations"), [((8, 8), 4), ((28, 28), 49), ((32, 32), 64), ((9, 13), 6)])
def test_any_size_from_8_pixels(size: tuple[int, int], locations: int) -> None:
    made = critic(image_size=size, channels=3)
    assert made.embed_images(torch.rand(2, 3, *size)).shape == (2, 4, locations)
    assert made(torch.rand(2, 3, *size), torch.rand(2, 3)).shape == (2,)


def test_scores_are_bounded_by_the_width() -> None:
    """Layer norm gives every vector the length sqrt(h): a fresh critic cannot say more than h."""
    torch.manual_seed(0)
    made = LocalDIM(num_classes=10, channels=1, image_size=(8, 8), hsize=64).eval()
    scores = pair_scores(made.embed_outputs(1e4 * torch.randn(16, 10)), made.embed_images(torch.rand(16, 1, 8, 8)))
    assert scores.abs().max() <= 64 * 1.001
    assert made(torch.rand(16, 1, 8, 8), 1e4 * torch.randn(16, 10)).abs().max() <= 2 * 64 * 1.001


def test_the_shortcut_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    weight = Embedding(6, 4).shortcut.weight[:, :, 0]
    assert torch.equal(weight.diagonal(), torch.ones(4))
    others = weight[~torch.eye(4, 6, dtype=torch.bool)]
    assert 0 < others.abs().max() <= 0.01


def test_batch_norm_is_torchs_own() -> None:
    torch.manual_seed(0)
    own, torchs = BatchNorm(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = 1 + torch.randn(4, 5, 3, 3)
        torch.testing.assert_close(own(x), torchs(x))
    torch.testing.assert_close(own.mean, torchs.running_mean)
    torch.testing.assert_close(own.variance, torchs.running_var)
    own.eval(), torchs.eval()
    torch.testing.assert_close(own(x), torchs(x))
    assert not isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(own))[0], nn.SyncBatchNorm)


def train(relation: float, *, steps: int = 120) -> tuple[LocalDIM, Tensor, Tensor]:
    """A critic trained on outputs that name which of two pictures was shown with noise, or do not."""
    torch.manual_seed(0)
    made = LocalDIM(num_classes=2, channels=1, image_size=(8, 8), hsize=16)
    adam = torch.optim.Adam(made.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        shown = torch.randint(2, (count,), generator=generator)
        said = torch.where(torch.rand(count, generator=generator) < relation, shown, 1 - shown)
        noise = 0.2 * torch.randn(count, 1, 8, 8, generator=generator)
        return shown.float()[:, None, None, None] + noise, nn.functional.one_hot(said, 2).float()

    for _ in range(steps):
        x, z = draw(64)
        adam.zero_grad()
        bound = pooled_donsker_varadhan(pair_scores(made.embed_outputs(z), made.embed_images(x)))
        (-bound).backward()
        adam.step()
    return made.eval(), *draw(600)


def test_outputs_that_name_the_picture_carry_one_bit() -> None:
    made, x, z = train(1.0)
    scores = pair_scores(made.embed_outputs(z), made.embed_images(x))
    assert pooled_donsker_varadhan(scores).item() == pytest.approx(math.log(2), abs=0.1)
    assert made(x, z).mean().item() == pytest.approx(math.log(2), abs=0.1)


def test_outputs_that_guess_carry_nothing() -> None:
    made, x, z = train(0.5)
    assert pooled_donsker_varadhan(pair_scores(made.embed_outputs(z), made.embed_images(x))).item() < 0.05


def test_weights_of_another_critic_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trained for num_classes=5 instead of 3, image_size=\[8, 12\] instead of"):
        critic().load_state_dict(critic(num_classes=5, image_size=(8, 12)).state_dict())
    with pytest.raises(ValueError, match=r"trained for hsize=8 instead of 4"):
        critic().load_state_dict(critic(hsize=8).state_dict())
    critic().load_state_dict(critic().state_dict())


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="images of at least 8x8 pixels, found 7x9: resize them"):
        critic(image_size=(7, 9))
    with pytest.raises(ValueError, match="hsize=0: expected a width of 1 or more"):
        critic(hsize=0)
    with pytest.raises(ValueError, match=r"here: Linear does not say its num_classes, in_channels, image_size"):
        critic_of(nn.Linear(2, 2), hsize=4, owner="here")


@pytest.mark.parametrize("processes", [1, 3])
def test_gradients_of_the_whole_batch_count_once(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, z = critic(), torch.rand(3, 1, 8, 8), torch.rand(3, 3)
    plain = torch.autograd.grad(made(x, z).sum(), list(made.parameters()))
    count_gradients_once(made)
    monkeypatch.setattr("mi_at.estimators.local_dim.world_size", lambda: processes)
    (made(x, z).sum() * processes).backward()
    for parameter, expected in zip(made.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
