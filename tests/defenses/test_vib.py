"""vib: its terms against their transcription, what it learns from, and what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import mi_at
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import craft
from mi_at.defenses.base import ADVERSARIAL
from mi_at.defenses.vib import Vib, vib_loss
from mi_at.functional.divergences import kl_to_standard_normal
from mi_at.models.cnn import CNNTiny
from mi_at.models.latent import StochasticLatent
from mi_at.regularizers.base import Views
from tests import test_resume as resume
from tests.callbacks import fits
from tests.commands import command, tiny
from tests.references import cases as inputs
from tests.references import losses as ref
from tests.references import shared_info as literal

DTYPE = torch.float64


def gaussian(batch: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mu = torch.randn(batch, dim, generator=g, dtype=DTYPE)
    return mu, 0.02 + 2 * torch.rand(batch, dim, generator=g, dtype=DTYPE)


@pytest.mark.parametrize(("batch", "dim"), [(1, 1), (3, 4), (17, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_the_rate_equals_the_transcription(batch: int, dim: int, seed: int) -> None:
    mu, sigma = gaussian(batch, dim, seed)
    expected = literal.rate(ref.rows(mu), ref.rows(sigma))
    found = kl_to_standard_normal(mu, sigma, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DTYPE), rtol=1e-10, atol=1e-10)
    assert kl_to_standard_normal(mu, sigma).item() == pytest.approx(ref.mean(expected), rel=1e-10)


def test_the_rate_is_zero_at_the_prior_alone() -> None:
    zero, one = torch.zeros(2, 3, dtype=DTYPE), torch.ones(2, 3, dtype=DTYPE)
    assert kl_to_standard_normal(zero, one).item() == 0.0
    for mu, sigma in ((zero + 0.1, one), (zero - 0.1, one), (zero, 1.1 * one), (zero, 0.9 * one)):
        assert kl_to_standard_normal(mu, sigma).item() > 0


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_equals_the_transcription(seed: int) -> None:
    z, _, y = inputs.draw(5, 3, seed)
    mu, sigma = gaussian(5, 4, seed)
    expected = ref.mean([ref.cross_entropy(row, label) for row, label in zip(ref.rows(z), y.tolist(), strict=True)])
    expected += 0.3 * ref.mean(literal.rate(ref.rows(mu), ref.rows(sigma)))
    terms = vib_loss(z, mu, sigma, y, beta=0.3)
    assert terms["loss"].item() == pytest.approx(expected, abs=1e-10)
    assert terms["loss"].item() == pytest.approx(terms["ce"].item() + terms["rate"].item(), abs=1e-12)
    assert set(vib_loss(z, mu, sigma, y, beta=0.0)) == {"ce", "loss"}


def test_gradients_by_finite_differences() -> None:
    z, _, y = inputs.draw(3, 3, 0)
    mu, sigma = gaussian(3, 2, 0)
    given = (z.requires_grad_(), mu.requires_grad_(), sigma.requires_grad_())
    assert gradcheck(lambda a, b, c: vib_loss(a, b, c, y, beta=0.3)["loss"], given)


def attached(**options: Any) -> Vib:
    torch.manual_seed(0)
    defense = Vib(**options)
    defense.attach(CNNTiny(num_classes=fits.CLASSES, in_channels=1, image_size=8, width=0.25))
    return defense


@pytest.mark.parametrize("view", ["clean", ADVERSARIAL])
def test_it_looks_at_one_view_alone(view: str) -> None:
    defense = attached(view=view)
    batch = fits.batches(1, 8)[0]
    budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=3)
    for name, inner in defense.all_adversaries(batch).items():
        batch.views[name] = craft(defense, batch.x, inner, budget, ids=batch.index, seed=0)
    assert set(batch.views) == {view} - {"clean"}
    views = Views(defense.net, batch, defense.needed_taps)
    terms = defense.all_terms(views)
    assert list(views.computed()) == [view]
    rate = literal.rate(*(ref.rows(views.tap(view, f"latent_{part}").detach()) for part in ("mean", "std")))
    assert terms["rate"].item() == pytest.approx(1e-3 * ref.mean(rate), rel=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train_no_track"])
@pytest.mark.parametrize("attack_latent", ["mean", "sample"])
def test_what_the_attack_sees_is_its_own_choice(mode: str, attack_latent: str) -> None:
    defense = attached(view=ADVERSARIAL, attack_latent=attack_latent, test_latent="sample")
    latent, seen = defense.net.latent, []
    assert isinstance(latent, StochasticLatent)
    latent.register_forward_hook(lambda layer, *_: seen.append(layer.samples))
    batch = fits.batches(1, 8)[0]
    budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=2, mode=mode)
    craft(defense, batch.x, defense.all_adversaries(batch)[ADVERSARIAL], budget, ids=batch.index, seed=0)
    assert seen == [attack_latent == "sample"] * 2


def test_it_starts_narrow() -> None:
    defense = attached()
    views = Views(defense.net, fits.batches(1, 8)[0], defense.needed_taps)
    assert 0.001 < views.tap("clean", "latent_std").median() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"defense.beta=-1.0: expected 0 or more"),
        ({"view": "cluster"}, r"defense.view='cluster': expected one of clean, adversarial"),
        ({"latent_dim": 0}, r"defense.latent_dim=0: expected 1 or more"),
        ({"attack_latent": "both"}, r"defense.attack_latent='both': expected one of mean, sample"),
        ({"attack_latent": "sample"}, r"attack_latent=sample with view=clean: .* set defense.view=adversarial"),
        ({"test_latent": "both"}, r"defense.test_latent='both': expected one of mean, sample"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vib(**options)


def test_a_network_without_a_place_for_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"defense=vib needs a place .* which Linear has not: derive the network from"):
        Vib().attach(nn.Linear(2, 2))


def test_killed_resumed_and_loaded(tmp_path: Path) -> None:
    whole, killed, options = tmp_path / "whole", tmp_path / "killed", ("defense=vib", "defense.view=adversarial")
    done = resume.run(whole, *options, "trainer.inspect_every=1")  # so that clean images are looked at
    assert done.code == 0, done.err
    killing = resume.run(killed, *options, "trainer.inspect_every=1", interrupt="KILL:train_batch_end:11")
    assert killing.code == 137
    assert resume.run(killed, *options, "trainer.inspect_every=1", "resume=true").code == 0
    resume.assert_same_run(killed, whole)
    net, x = mi_at.load(whole / "run/last.ckpt"), torch.rand(3, 1, 8, 8)
    assert torch.equal(net(x), net(x))


def test_on_clean_images_by_the_command(tmp_path: Path) -> None:
    done = command(tmp_path, *tiny("defense=vib", "run_dir=run"))
    assert done.code == 0, done.err
