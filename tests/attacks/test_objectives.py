"""The closures an attack maximises: per sample, of the right sign, holding their targets fixed."""

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.pgd import pgd


class Tapped(nn.Module):
    """The interface of a classifier with one tap."""

    tap_names = ("hidden",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward_taps(self, x: Tensor, names: tuple[str, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.first(x.flatten(1)).tanh()
        return self.last(hidden), {"hidden": hidden}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]


NET = Tapped()
G = torch.Generator().manual_seed(1)
X = torch.rand(4, 1, 2, 3, generator=G, dtype=torch.float64)
OTHER = torch.rand(4, 1, 2, 3, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0])


def test_each_gives_one_value_per_sample_of_its_own_image():
    closures = [
        objectives.cross_entropy(NET, Y),
        objectives.kl_to(NET, NET(OTHER)),
        objectives.margin(NET, Y, 50.0),
        objectives.dlr(NET, Y),
        objectives.representation_distance(NET, "hidden", NET.forward_taps(OTHER)[1]["hidden"].detach()),
    ]
    for closure in closures:
        x = X.clone().requires_grad_(True)
        values = closure(x)
        assert values.shape == (4,)
        (gradient,) = torch.autograd.grad(values[1], x)
        assert float(gradient[1].abs().max()) > 0
        assert float(gradient[[0, 2, 3]].abs().max()) == 0.0


def test_kl_holds_the_given_logits_fixed():
    logits = NET(OTHER)
    assert logits.requires_grad
    objectives.kl_to(NET, logits)(X.clone().requires_grad_(True)).sum().backward(inputs=list(NET.parameters()))
    fixed = [p.grad.clone() for p in NET.parameters()]
    for p in NET.parameters():
        p.grad = None
    objectives.kl_to(NET, logits.detach())(X).sum().backward(inputs=list(NET.parameters()))
    for p, g in zip(NET.parameters(), fixed, strict=True):
        torch.testing.assert_close(p.grad, g)
        p.grad = None


def test_kl_is_zero_at_its_own_logits_and_positive_elsewhere():
    objective = objectives.kl_to(NET, NET(X).detach())
    assert float(objective(X).detach().abs().max()) < 1e-14
    assert (objective(OTHER) > 0).all()


def test_the_margin_defaults_to_kappa_zero():
    values = objectives.margin(NET, Y)(X)
    assert float(values.detach().max()) <= 0.0
    torch.testing.assert_close(values, objectives.margin(NET, Y, 50.0)(X).clamp(max=0.0))


def test_the_distance_of_representations_is_the_sum_of_squares():
    here, there = (NET.forward_taps(x)[1]["hidden"].detach() for x in (X, OTHER))
    objective = objectives.representation_distance(NET, "hidden", there)
    expected = [sum((float(a) - float(b)) ** 2 for a, b in zip(here[i], there[i], strict=True)) for i in range(4)]
    torch.testing.assert_close(objective(X).detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert float(objective(OTHER).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_distance_of_representations_is_in_float32_or_better(dtype):
    class Coarse(Tapped):
        def forward_taps(self, x, names=None):
            logits, taps = super().forward_taps(x, names)
            return logits, {name: tap.to(dtype) for name, tap in taps.items()}

    values = objectives.representation_distance(Coarse(), "hidden", torch.zeros(4, 5, dtype=dtype))(X)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = NET.forward_taps(X)[1]["hidden"].to(dtype).double().square().sum(dim=1)
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)


def test_maximising_the_negated_distance_approaches_the_target():
    there = NET.forward_taps(OTHER)[1]["hidden"].detach()
    objective = objectives.representation_distance(NET, "hidden", there)
    x_adv = pgd(lambda x: -objective(x), X, eps=1.0, step_size=0.05, steps=60, init="zero", norm="l2")
    assert (objective(x_adv) < 0.2 * objective(X)).all()


def test_an_unknown_tap_is_named():
    with pytest.raises(ValueError, match="pooled"):
        objectives.representation_distance(NET, "pooled", torch.zeros(4, 5))
    with pytest.raises(ValueError, match="pooled"):
        objectives.representation_distance(nn.Linear(1, 1), "pooled", torch.zeros(4, 5))
