"""shared_info: its terms against their transcriptions, what the equations promise, its schedule, switches and costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

import mi_at
from mi_at import io
from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import craft
from mi_at.data.batch import Batch
from mi_at.data.digits import Digits
from mi_at.defenses.base import ADVERSARIAL, Defense
from mi_at.defenses.shared_info import SCALES, SharedInfo, beta_at, shared_hsic, shared_info_loss
from mi_at.defenses.vib import Vib
from mi_at.functional.distributed import world_size
from mi_at.functional.divergences import symmetrised_kl, symmetrised_kl_categorical
from mi_at.models.cnn import CNN4, CNNTiny
from mi_at.models.latent import StochasticLatent
from mi_at.models.resnet import ResNet18
from mi_at.optim import SGD
from mi_at.regularizers.base import Views
from tests import test_ddp as ddp
from tests import test_flop as flop
from tests import test_resume as resume
from tests.callbacks import fits
from tests.commands import command, tiny
from tests.references import cases as inputs
from tests.references import losses as ref
from tests.references import shared_info as literal

DTYPE = torch.float64
CASES = inputs.cases()
IDS = [case[0] for case in CASES]
BUDGET = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=3)


def gaussians(batch: int, dim: int, seed: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
    """(mu, sigma, mu2, sigma2)."""
    g = torch.Generator().manual_seed(seed)
    mu, mu2 = (torch.randn(batch, dim, generator=g, dtype=dtype) for _ in range(2))
    sigma, sigma2 = (0.05 + 2 * torch.rand(batch, dim, generator=g, dtype=dtype) for _ in range(2))
    return mu, sigma, mu2, sigma2


def pair(batch: int, dim: int, seed: int, noise: float = 0.5, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """Latents of two views that share something."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, dim, generator=g, dtype=dtype)
    return z, z + noise * torch.randn(batch, dim, generator=g, dtype=dtype)


# ---------------------------------------------------------------- D_SKL
@pytest.mark.parametrize(("batch", "dim"), [(1, 1), (3, 4), (17, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_the_divergence_equals_the_transcription(batch: int, dim: int, seed: int) -> None:
    given = gaussians(batch, dim, seed)
    expected = literal.symmetrised_kl(*(ref.rows(values) for values in given))
    found = symmetrised_kl(*given, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DTYPE), rtol=1e-10, atol=1e-10)
    assert symmetrised_kl(*given).item() == pytest.approx(ref.mean(expected), rel=1e-10)


@pytest.mark.parametrize(("case", "z", "z_adv", "y"), CASES, ids=IDS)
def test_the_divergence_of_outputs_equals_the_transcription(case: str, z: Tensor, z_adv: Tensor, y: Tensor) -> None:
    expected = literal.symmetrised_kl_categorical(ref.rows(z), ref.rows(z_adv))
    found = symmetrised_kl_categorical(z, z_adv, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DTYPE), rtol=1e-10, atol=1e-10)
    assert symmetrised_kl_categorical(z, z_adv).item() == pytest.approx(ref.mean(expected), rel=1e-10, abs=1e-10)


def test_gradients_of_both_divergences_by_finite_differences() -> None:
    given = tuple(values.requires_grad_() for values in gaussians(3, 2, 0))
    assert gradcheck(symmetrised_kl, given)
    z, z_adv, _ = inputs.draw(3, 4, 0)
    assert gradcheck(symmetrised_kl_categorical, (z.requires_grad_(), z_adv.requires_grad_()))


def test_the_divergence_is_symmetric_zero_on_the_diagonal_and_positive_off_it() -> None:
    mu, sigma, mu2, sigma2 = gaussians(6, 5, 1)
    found = symmetrised_kl(mu, sigma, mu2, sigma2, reduction="none")
    torch.testing.assert_close(found, symmetrised_kl(mu2, sigma2, mu, sigma, reduction="none"))
    assert found.min() > 0
    assert symmetrised_kl(mu, sigma, mu, sigma).item() == 0.0


def test_the_divergence_does_not_see_the_scale_of_the_latent() -> None:
    given = gaussians(6, 5, 2)
    scaled = symmetrised_kl(*(7.0 * values for values in given))
    assert scaled.item() == pytest.approx(symmetrised_kl(*given).item(), rel=1e-12)


def test_the_divergence_is_a_sum_over_dimensions_and_a_mean_over_the_batch() -> None:
    mu, sigma, mu2, sigma2 = gaussians(6, 5, 3)
    by_dimension = [symmetrised_kl(mu[:, [i]], sigma[:, [i]], mu2[:, [i]], sigma2[:, [i]]).item() for i in range(5)]
    assert symmetrised_kl(mu, sigma, mu2, sigma2).item() == pytest.approx(sum(by_dimension))
    twice = symmetrised_kl(*(values.repeat(2, 1) for values in (mu, sigma, mu2, sigma2)))
    assert twice.item() == pytest.approx(symmetrised_kl(mu, sigma, mu2, sigma2).item())


@pytest.mark.parametrize("gap", [1e-6, 1e-3])
def test_small_divergences_keep_their_digits_in_float32(gap: float) -> None:
    """Near each other: half the sum of (dm^2 + 2 ds^2) / s^2."""
    one = torch.full((2, 4), 0.5)
    near = symmetrised_kl(one, one, one + gap, one)
    shift = (one + gap - one)[0, 0].item()
    assert near.item() == pytest.approx(4 * shift**2 / (2 * 0.25), rel=1e-5)


# ---------------------------------------------------------------- I(z; z')
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("batch", "dim", "k"), [(3, 2, 1), (5, 2, 4), (8, 3, 4), (14, 5, 10)])
def test_hsic_equals_the_transcription(scale: str, batch: int, dim: int, k: int) -> None:
    z, z_adv = pair(batch, dim, batch)
    expected = float(literal.hsic(ref.rows(z), ref.rows(z_adv), k, scale))
    assert shared_hsic(z, z_adv, k=k, scale=scale).item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_of_hsic_is_that_at_a_fixed_width(scale: str) -> None:
    z, z_adv = (values.requires_grad_() for values in pair(5, 2, 1))
    value = literal.hsic(ref.rows(z, grad=True), ref.rows(z_adv, grad=True), 2, scale)
    want = torch.autograd.grad(torch.as_tensor(value), (z, z_adv))
    got = torch.autograd.grad(shared_hsic(z, z_adv, k=2, scale=scale), (z, z_adv))
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_hsic_is_symmetric_and_keeps_its_value_under_order_rotation_and_scale(scale: str) -> None:
    z, z_adv = pair(14, 4, 3)
    value = shared_hsic(z, z_adv, scale=scale).item()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE)).Q
    others = [
        shared_hsic(z_adv, z, scale=scale),
        shared_hsic(z[order], z_adv[order], scale=scale),
        shared_hsic(z @ rotation + 3, z_adv, scale=scale),
        shared_hsic(100 * z, 0.01 * z_adv, scale=scale),  # the width follows each view
    ]
    assert [other.item() for other in others] == pytest.approx([value] * 4, rel=1e-9)
    assert value > 0


def test_the_scales_of_hsic() -> None:
    z, z_adv = pair(14, 4, 4)
    trace, biased = (shared_hsic(z, z_adv, scale=scale).item() for scale in ("trace", "biased"))
    assert trace == pytest.approx(13**2 * biased)


@pytest.mark.parametrize("scale", SCALES)
def test_views_that_share_more_have_a_larger_hsic(scale: str) -> None:
    values = [shared_hsic(*pair(60, 3, 5, noise), scale=scale).item() for noise in (0.0, 0.3, 1.0, 30.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > (1.05 if scale == "normalized" else 2) * values[-1]  # the normalised one counts faint ones fully


def test_neighbours_are_no_more_than_there_are() -> None:
    z, z_adv = pair(5, 3, 6)
    assert torch.equal(shared_hsic(z, z_adv, k=10), shared_hsic(z, z_adv, k=4))
    assert not torch.equal(shared_hsic(z, z_adv, k=10), shared_hsic(z, z_adv, k=2))


def test_hsic_has_the_type_of_what_it_is_given() -> None:
    z, z_adv = pair(6, 3, 6)
    assert shared_hsic(z, z_adv).dtype == DTYPE
    single = shared_hsic(z.float(), z_adv.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(shared_hsic(z, z_adv).item(), rel=1e-5)


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match=r"hsic_scale='none': expected one of trace, biased, normalized"):
        shared_hsic(*pair(5, 2, 0), scale="none")


# ---------------------------------------------------------------- the loss
@pytest.mark.parametrize(("case", "z", "z_adv", "y"), CASES[::3], ids=IDS[::3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7, 1.0])
def test_the_loss_equals_the_transcription(case: str, z: Tensor, z_adv: Tensor, y: Tensor, alpha: float) -> None:
    skl, mi = 1.7, 0.9
    expected = literal.loss(ref.rows(z), ref.rows(z_adv), y.tolist(), alpha=alpha, beta=4.0, lam=0.3, skl=skl, mi=mi)
    terms = shared_info_loss(
        z,
        z_adv,
        y,
        alpha=alpha,
        divergence=torch.tensor(skl, dtype=DTYPE),
        beta=4.0,
        information=torch.tensor(mi, dtype=DTYPE),
        lambda_mi=0.3,
    )
    assert terms["loss"].item() == pytest.approx(float(expected), abs=1e-10)
    assert terms["dskl"].item() == pytest.approx(4 * skl)
    assert terms["shared_mi"].item() == pytest.approx(-0.3 * mi)
    parts = [value.item() for name, value in terms.items() if name != "loss"]
    assert terms["loss"].item() == pytest.approx(math.fsum(parts), abs=1e-12)


def test_the_gradient_of_the_loss_by_finite_differences() -> None:
    z, z_adv, y = inputs.draw(4, 3, 0)

    def loss(a: Tensor, b: Tensor, skl: Tensor, mi: Tensor) -> Tensor:
        return shared_info_loss(
            a, b, y, alpha=0.3, divergence=skl, beta=4.0, information=mi, lambda_mi=0.2
        )["loss"]  # fmt: skip

    scalars = (torch.tensor(v, dtype=DTYPE, requires_grad=True) for v in (1.0, 2.0))
    assert gradcheck(loss, (z.requires_grad_(), z_adv.requires_grad_(), *scalars))


def test_a_term_that_is_left_out_leaves_the_others_as_they_are() -> None:
    """Table 10."""
    z, z_adv, y = inputs.draw(6, 4, 2)
    options: dict[str, Any] = {"alpha": 0.4, "beta": 4.0, "lambda_mi": 0.3}
    skl, mi = torch.tensor(1.7, dtype=DTYPE), torch.tensor(0.9, dtype=DTYPE)
    whole = shared_info_loss(z, z_adv, y, divergence=skl, information=mi, **options)
    without = {
        "ce_clean": shared_info_loss(None, z_adv, y, divergence=skl, information=mi, **options),
        "ce_adv": shared_info_loss(z, None, y, divergence=skl, information=mi, **options),
        "dskl": shared_info_loss(z, z_adv, y, information=mi, **options),
        "shared_mi": shared_info_loss(z, z_adv, y, divergence=skl, **options),
    }
    for name, terms in without.items():
        assert set(terms) == set(whole) - {name}
        assert all(torch.equal(terms[key], whole[key]) for key in terms if key != "loss")
    with pytest.raises(ValueError, match="shared_info_loss without any term"):
        shared_info_loss(None, None, y, alpha=0.5)


# ---------------------------------------------------------------- the schedule
@pytest.mark.parametrize("beta", [0.1, 4.0, 6.0, 30.0])
def test_beta_equals_the_transcription(beta: float) -> None:
    for epoch in range(1, 121):
        found = beta_at(epoch, beta=beta, start=1e-3, hold=10, rise=90)
        assert found == pytest.approx(literal.beta_of(epoch, beta), rel=1e-12), epoch


def at_epoch(defense: SharedInfo, epoch: int, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(SharedInfo, "current_epoch", epoch)
    return defense.beta_now()


@pytest.mark.parametrize(("epochs", "of"), [(100, 100), (120, 120), (12, 100), (50, 100), (3, 100), (24, 120)])
def test_a_short_run_is_the_long_one_in_small(epochs: int, of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    defense = SharedInfo(beta_epochs=of)
    defense.optimisation = SGD(lr=0.1, epochs=epochs, paper_epochs=epochs)  # the recipe's own epochs do not matter
    found = [at_epoch(defense, epoch, monkeypatch) for epoch in range(epochs)]
    hold = max(1, round(10 * epochs / of))
    rise = round(100 * epochs / of) - hold
    assert found[:hold] == [1e-3] * hold
    assert found[hold - 1 :] == sorted(found[hold - 1 :])
    steps = [b / a for a, b in zip(found[hold - 1 : hold + rise - 1], found[hold : hold + rise], strict=True)]
    assert steps == pytest.approx([4000 ** (1 / rise)] * rise)
    assert found[hold + rise - 1 :] == [4.0] * (epochs - hold - rise + 1)
    assert found[-1] == 4.0


def test_without_a_schedule_beta_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = SharedInfo(beta=2.0, beta_hold_epochs=0, beta_rise_epochs=0)
    assert [at_epoch(defense, epoch, monkeypatch) for epoch in (0, 1, 50)] == [2.0] * 3


# ---------------------------------------------------------------- the method in a step
def attached(net: nn.Module | None = None, **options: Any) -> SharedInfo:
    torch.manual_seed(0)
    net = net or CNNTiny(num_classes=fits.CLASSES, in_channels=1, image_size=8, width=0.25)
    defense = SharedInfo(**options)
    defense.attach(net, optimisation=SGD(lr=0.1, epochs=100))
    return defense


def prepared(defense: Defense, size: int = 14, mode: str | None = None) -> Batch:
    batch = fits.batches(1, size)[0]
    budget = InnerMaximisation(norm="linf", eps=0.1, step_size=0.03, steps=3, mode=mode)
    for view, inner in defense.all_adversaries(batch).items():
        batch.views[view] = craft(defense, batch.x, inner, budget, ids=batch.index, seed=0)
    return batch


def terms_of(defense: Defense, batch: Batch) -> dict[str, float]:
    views = Views(defense.net, batch, defense.needed_taps)
    return {name: value.item() for name, value in defense.all_terms(views).items()}


def test_the_terms_of_a_step_are_those_of_the_taps() -> None:
    defense = attached(lambda_mi=0.01, alpha=0.3)
    batch = prepared(defense)
    views = Views(defense.net, batch, defense.needed_taps)
    taps = {
        view: [views.tap(view, f"latent{part}").detach() for part in ("_mean", "_std", "")]
        for view in ("clean", ADVERSARIAL)
    }
    clean, adversarial = (ref.rows(views.logits(view).detach()) for view in ("clean", ADVERSARIAL))
    labels = batch.y.tolist()
    rows = {view: [ref.rows(values) for values in parts] for view, parts in taps.items()}
    divergence = ref.mean(literal.symmetrised_kl(*rows["clean"][:2], *rows[ADVERSARIAL][:2]))
    information = literal.hsic(rows["clean"][2], rows[ADVERSARIAL][2], 10, "trace")
    expected = {
        "ce_adv": 0.3 * ref.mean([ref.cross_entropy(z, y) for z, y in zip(adversarial, labels, strict=True)]),
        "ce_clean": 0.7 * ref.mean([ref.cross_entropy(z, y) for z, y in zip(clean, labels, strict=True)]),
        "dskl": 1e-3 * divergence,
        "shared_mi": -0.01 * information,
    }
    found = terms_of(defense, batch)
    assert {name: value for name, value in found.items() if name != "loss"} == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(taps["clean"][2], taps["clean"][0]), "z is drawn"
    noise = [(z - mu) / sigma for mu, sigma, z in taps.values()]
    assert not torch.allclose(noise[0], noise[1]), "each view has its own draw"


def test_on_the_output_nothing_is_drawn_and_both_terms_read_probabilities() -> None:
    defense = attached(location="softmax", lambda_mi=0.1, beta_hold_epochs=0, beta_rise_epochs=0)
    assert isinstance(defense.net.latent, nn.Identity)
    batch = prepared(defense)
    views = Views(defense.net, batch, defense.needed_taps)
    logits = [views.logits(view).detach() for view in ("clean", ADVERSARIAL)]
    found = terms_of(defense, batch)
    divergence = ref.mean(literal.symmetrised_kl_categorical(*(ref.rows(z) for z in logits)))
    information = literal.hsic(*(ref.rows(z.softmax(dim=1)) for z in logits), 10, "trace")
    assert found["dskl"] == pytest.approx(4 * divergence, rel=1e-4)
    assert found["shared_mi"] == pytest.approx(-0.1 * float(information), rel=1e-4)
    assert terms_of(defense, batch) == found


def test_on_the_output_a_head_of_zeros_starts_elsewhere() -> None:
    """Equal outputs have no kernel width; the plain method keeps its start."""
    for options, zero in (({}, False), ({"use_mi": False}, True)):
        net = CNN4(num_classes=fits.CLASSES, in_channels=1, image_size=16, width=0.1)
        defense = SharedInfo(location="softmax", **options).attach(net)
        assert net.head.weight.any() != zero
        x = torch.rand(14, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = Batch(x=x, y=torch.arange(14) % 3, index=torch.arange(14), views={ADVERSARIAL: 0.9 * x})
        assert all(math.isfinite(value) for value in terms_of(defense, batch).values())


@pytest.mark.parametrize(
    ("options", "views", "terms"),
    [
        ({"alpha": 0.0, "use_dskl": False, "use_mi": False}, ["clean"], {"ce_clean"}),
        ({"alpha": 1.0, "beta": 0.0, "lambda_mi": 0.0}, [ADVERSARIAL], {"ce_adv"}),
        ({"use_ce_clean": False}, ["clean", ADVERSARIAL], {"ce_adv", "dskl", "shared_mi"}),
        ({"use_ce_adv": False}, ["clean", ADVERSARIAL], {"ce_clean", "dskl", "shared_mi"}),
        ({"use_dskl": False, "use_mi": False}, ["clean", ADVERSARIAL], {"ce_adv", "ce_clean"}),
        ({"lambda_mi": 0.0}, ["clean", ADVERSARIAL], {"ce_adv", "ce_clean", "dskl"}),
        ({"alpha": 1.0}, ["clean", ADVERSARIAL], {"ce_adv", "dskl", "shared_mi"}),
    ],
)
def test_switches_leave_out_terms_and_what_they_alone_need(
    options: dict[str, Any], views: list[str], terms: set[str]
) -> None:
    defense = attached(**options)
    batch = prepared(defense)
    assert set(batch.views) == set(views) - {"clean"}
    read = Views(defense.net, batch, defense.needed_taps)
    assert set(defense.all_terms(read)) == terms | {"loss"}
    assert list(read.computed()) == views, "clean first"


def test_a_term_that_is_off_is_not_coupled() -> None:
    assert attached().coupled == "the hsic of defense=shared_info"
    assert attached(use_mi=False).coupled == attached(lambda_mi=0.0).coupled == ""


@pytest.mark.parametrize("mode", ["eval", "train_no_track"])
@pytest.mark.parametrize("test_latent", ["mean", "sample"])
@pytest.mark.parametrize("attack_latent", ["mean", "sample"])
def test_what_the_attack_sees_is_its_own_choice(mode: str, test_latent: str, attack_latent: str) -> None:
    defense = attached(attack_latent=attack_latent, test_latent=test_latent)
    seen = []
    latent = defense.net.latent
    assert isinstance(latent, StochasticLatent)
    latent.register_forward_hook(lambda layer, *_: seen.append(layer.samples))
    prepared(defense, mode=mode)
    assert seen == [attack_latent == "sample"] * 3
    defense.net.eval()
    assert latent.samples == (test_latent == "sample")


@pytest.mark.parametrize("estimator", ["mine", "mige"])
@pytest.mark.parametrize("location", ["latent", "softmax"])
def test_the_other_estimators(estimator: str, location: str) -> None:
    defense = attached(estimator=estimator, location=location, lambda_mi=1.0)
    batch = prepared(defense)
    views = Views(defense.net, batch, defense.needed_taps)
    term = defense.all_terms(views)["shared_mi"]
    if location == "latent":
        z, z_adv = (views.tap(view, "latent") for view in ("clean", ADVERSARIAL))
    else:
        z, z_adv = (views.logits(view).softmax(dim=1) for view in ("clean", ADVERSARIAL))
    if estimator == "mine":
        assert defense.mine is not None
        assert term.item() == pytest.approx(-defense.mine.estimate(z, z_adv).item())
        assert not any(p.requires_grad for p in defense.mine.parameters())
    else:
        assert term.item() == 0.0
    gradients = torch.autograd.grad(term, list(defense.net.latent.parameters()) or [defense.net.head.weight])
    assert max(gradient.abs().max() for gradient in gradients) > 1e-6


def test_mine_is_trained_once_a_step_on_what_the_step_saw() -> None:
    defense = attached(estimator="mine", lambda_mi=0.01)
    mine = defense.mine
    assert mine is not None
    batch = prepared(defense)
    for step in range(1, 4):
        views = Views(defense.net, batch, defense.needed_taps)
        defense.all_terms(views)
        z, z_adv = (views.tap(view, "latent").detach() for view in ("clean", ADVERSARIAL))
        with torch.no_grad():
            before = mine.estimate(z, z_adv)
            defense.after_step(batch)
            assert mine.estimate(z, z_adv) != before
        assert mine.adam.steps == step
        defense.after_step(batch)
        assert mine.adam.steps == step, "nothing new was seen"
    assert {id(p) for p in defense.trained_parameters()} == {id(p) for p in defense.net.parameters()}
    kept = defense.mine
    defense.attach(defense.net)
    assert defense.mine is kept


def test_a_last_batch_of_one_sample_has_no_information() -> None:
    for estimator in ("hsic", "mine", "mige"):
        defense = attached(estimator=estimator)
        batch = prepared(defense, size=1)
        assert terms_of(defense, batch)["shared_mi"] == 0.0
        defense.after_step(batch)


@pytest.mark.parametrize("options", [{}, {"estimator": "mine"}, {"estimator": "mige"}, {"hsic_scale": "normalized"}])
def test_finite_in_bfloat16(options: dict[str, Any]) -> None:
    defense = attached(beta_hold_epochs=0, beta_rise_epochs=0, **options)
    optimizer = torch.optim.SGD(defense.net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        batch = prepared(defense)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = defense.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in defense.net.parameters())
        optimizer.step()
        defense.after_step(batch)


def test_at_the_papers_weight_hsic_is_not_inert_and_its_estimate_of_the_mean_is() -> None:
    data = Digits(batch_size=128, train_size=600, val_size=40, seed=0)
    data.setup("fit")
    shares: dict[str, list[float]] = {"trace": [], "biased": []}
    for scale, found in shares.items():
        defense = attached(CNNTiny(num_classes=10, in_channels=1, image_size=8), hsic_scale=scale)
        optimizer = torch.optim.SGD(defense.net.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(3):
            for number, batch in enumerate(data.train_dataloader()):
                batch.epoch, batch.batch_idx = epoch, number
                for view, inner in defense.all_adversaries(batch).items():
                    batch.views[view] = craft(defense, batch.x, inner, BUDGET, ids=batch.index, seed=0)
                terms = defense.all_terms(Views(defense.net, batch, defense.needed_taps))
                found.append(defense.term_shares(terms)["share/shared_mi"].item())
                optimizer.zero_grad()
                terms["loss"].backward()
                optimizer.step()
    assert all(0.003 < share < 0.95 for share in shares["trace"])
    assert all(share < 1e-4 for share in shares["biased"])


@pytest.mark.parametrize(("batch", "shrinks"), [(128, True), (64, False)])
def test_what_the_head_of_the_file_says_of_the_scale(batch: int, shrinks: bool) -> None:
    """The value does not depend on the scale of z; its gradient does, for the width is a setting."""
    torch.manual_seed(0)
    centres = torch.randn(10, 32, dtype=torch.float64)[torch.arange(batch) % 10]
    z, z_adv = (centres + 0.1 * torch.randn(batch, 32, dtype=torch.float64) for _ in range(2))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = shared_hsic(z * scale, z_adv * scale)
    (slope,) = torch.autograd.grad(value, scale)
    assert (slope.item() < -0.5 * value.item()) == shrinks
    assert (slope.item() > 0.5 * value.item()) != shrinks
    assert shared_hsic(7 * z, 7 * z_adv).item() == pytest.approx(value.item(), rel=1e-9)


def test_the_size_of_z_is_recorded() -> None:
    assert attached(latent_dim=12).settings() == {"shared_info": {"latent_dim": 12}}
    assert attached(location="softmax").settings() == {}


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"defense.alpha=1.5: expected a share in \[0, 1\]"),
        ({"beta": -1.0}, r"defense.beta=-1.0: expected 0 or more"),
        ({"lambda_mi": -1.0}, r"defense.lambda_mi=-1.0: expected 0 or more"),
        ({"beta_start": 0.0}, r"defense.beta_start=0.0: expected a number above 0"),
        ({"beta_hold_epochs": -1}, r"defense.beta_hold_epochs=-1: expected 0 or more"),
        ({"beta_epochs": 0}, r"defense.beta_epochs=0: expected 1 or more"),
        ({"k": 0}, r"defense.k=0: expected 1 or more"),
        ({"latent_dim": 0}, r"defense.latent_dim=0: expected 1 or more"),
        ({"estimator": "club"}, r"defense.estimator='club': expected one of hsic, mine, mige"),
        ({"hsic_scale": "mean"}, r"defense.hsic_scale='mean': expected one of trace, biased, normalized"),
        ({"location": "logits"}, r"defense.location='logits': expected one of latent, softmax"),
        ({"location": "softmax", "std_offset": 5.0}, r"softmax with std_offset=5.0, .*: it has no stochastic layer"),
        ({"location": "softmax", "test_latent": "sample"}, r"test_latent=sample: it has no stochastic layer; leave"),
        ({"location": "softmax", "attack_latent": "sample"}, r"attack_latent=sample, test_latent=mean: it has no st"),
        ({"attack_latent": "both"}, r"defense.attack_latent='both': expected one of mean, sample"),
        ({"test_latent": "both"}, r"defense.test_latent='both': expected one of mean, sample"),
        ({"use_ce_adv": False, "use_ce_clean": False}, "nothing is learnt from labels"),
        ({"use_ce_adv": False, "alpha": 1.0}, "nothing is learnt from labels"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedInfo(**options)


def test_a_network_without_a_place_for_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which Linear has not: derive the network .* defense.location=softmax"):
        SharedInfo().attach(nn.Linear(2, 2))
    SharedInfo(location="softmax").attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give it an attribute num_classes"):
        SharedInfo(location="softmax", estimator="mine").attach(nn.Linear(2, 2))


def test_a_batch_that_has_too_few_neighbours_is_refused() -> None:
    config = {"dataset": {"batch_size": 10, "num_classes": 2}}
    net = CNNTiny(num_classes=2, in_channels=1, image_size=8, width=0.25)
    with pytest.raises(ValueError, match=r"defense.k=10: expected fewer neighbours than dataset.batch_size=10; use"):
        SharedInfo().attach(net, config=config)
    SharedInfo(k=9).attach(net, config=config)
    SharedInfo(use_mi=False).attach(net, config=config)
    SharedInfo(location="softmax", estimator="mine").attach(nn.Linear(2, 2), config=config)


# ---------------------------------------------------------------- what it costs
COSTS: dict[str, tuple[Callable[[], Defense], int]] = {
    "shared_info": (SharedInfo, 26),
    "adversarial cross-entropy alone": (lambda: SharedInfo(alpha=1.0, beta=0.0, lambda_mi=0.0), 23),
    "vib": (Vib, 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_its_floor(name: str) -> None:
    make, floor = COSTS[name]
    run = flop.step_of(make(), ResNet18(num_classes=10, in_channels=3, image_size=32))
    with flop.FlopCount() as count:
        run(flop.batch())
    assert count.flop / flop.IMAGES / flop.FORWARD == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize("name", ["shared_info", "vib"])
def test_a_step_reads_nothing_back(name: str) -> None:
    run = flop.step_of(COSTS[name][0](), ResNet18(num_classes=10, in_channels=3, image_size=32, width=0.1))
    run(flop.batch(4))
    with flop.Reads() as reads:
        run(flop.batch(4))
    assert reads.places <= flop.CPU_ONLY | {"say_where_known"}


# ---------------------------------------------------------------- as a command
@pytest.mark.parametrize("overrides", [(), ("defense.estimator=mine",), ("defense.location=softmax",)])
def test_trained_by_the_command_and_loaded(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    done = command(tmp_path, *tiny("defense=shared_info", "run_dir=run", *overrides))
    assert done.code == 0, done.err
    net = mi_at.load(tmp_path / "run/last.ckpt")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(net(x), net(x)), "the mean"
    assert isinstance(net.latent, StochasticLatent) == ("defense.location=softmax" not in overrides)
    state = io.read_checkpoint(tmp_path / "run/last.ckpt").net_state
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("overrides", [("defense.k=4",), ("defense.estimator=mine", "defense.test_latent=sample")])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    arguments = ("defense=shared_info", *overrides)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = resume.run(whole, *arguments)
    assert done.code == 0, done.err
    assert resume.run(killed, *arguments, interrupt="KILL:train_batch_end:11").code == 137
    resumed = resume.run(killed, *arguments, "resume=true")
    assert resumed.code == 0, resumed.err
    resume.assert_same_run(killed, whole)


# ---------------------------------------------------------------- on several processes
PARALLEL: dict[str, Callable[[], Defense]] = {
    "shared_info": lambda: SharedInfo(lambda_mi=0.01, beta_hold_epochs=0, beta_rise_epochs=0, beta=0.1),
    "normalized": lambda: SharedInfo(lambda_mi=0.1, hsic_scale="normalized"),
    "softmax": lambda: SharedInfo(lambda_mi=0.1, location="softmax", beta_hold_epochs=0, beta_rise_epochs=0),
    "mine": lambda: SharedInfo(lambda_mi=0.1, estimator="mine"),
    "mige": lambda: SharedInfo(lambda_mi=0.1, estimator="mige"),
    "sampled attack": lambda: SharedInfo(lambda_mi=0.01, attack_latent="sample"),
    "vib": lambda: Vib(beta=0.01, view="adversarial"),
}


def train(name: str) -> list[dict[str, Any]]:
    """Three steps at fixed weights: the loss, its gradients, and MINE's critic after each."""
    torch.manual_seed(0)
    defense = PARALLEL[name]()
    defense.inspect_every = 0
    # Outputs of a fresh network are all alike, so that the kernel's width is small and magnifies float32's rounding.
    defense.attach(ddp.network().double() if name == "softmax" else ddp.network())
    step, callback, steps = ddp.wrap(defense), ddp.examples(), []
    for number, batch in ddp.batches(defense.net, ddp.digits().train_dataloader()):
        callback.on_train_batch_start(ddp.trainer_at(0), defense, batch, number)
        loss = ddp.backward(step, batch)
        defense.after_step(batch)
        mine = getattr(defense, "mine", None)
        critic = {key: p.detach().clone() for key, p in mine.critic.named_parameters()} if mine else {}
        steps.append({"loss": loss, "gradients": ddp.gradients(defense), "critic": critic, "views": dict(batch.views)})
    return steps


def everything(rank: int, processes: int) -> dict[str, Any]:
    assert world_size() == processes
    return {name: train(name) for name in PARALLEL}


@pytest.mark.ddp
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_train_as_one(processes: int, spawn: Callable[..., Any]) -> None:
    alone = everything(0, 1)
    for name, expected in alone.items():
        assert max(float(g.abs().max()) for g in expected[0]["gradients"].values()) > 1e-3, name
    group = spawn(everything, processes)
    for name, expected_steps in alone.items():
        for number, expected in enumerate(expected_steps):
            views = {
                view: torch.cat([result[name][number]["views"][view] for result in group]) for view in [ADVERSARIAL]
            }
            assert torch.equal(views[ADVERSARIAL], expected["views"][ADVERSARIAL]), name
            for result in group:
                found = result[name][number]
                largest = max(float(g.abs().max()) for g in expected["gradients"].values())
                ddp.assert_same({name: found["loss"]}, {name: expected["loss"]}, 1e-6)
                # Taps are float32, of which a gradient of several units keeps no more.
                gradients, wanted = (
                    {f"{name} {key}": value for key, value in which["gradients"].items()} for which in (found, expected)
                )
                ddp.assert_same(gradients, wanted, 1e-6 * max(1.0, largest))
                ddp.assert_same(found["critic"], expected["critic"], 1e-5)
