"""attacking(net): the state of the network during an attack, and the same state as before afterwards."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.contexts import attacking
from mi_at.attacks.pgd import pgd


def network() -> nn.Sequential:
    """Mixed on purpose: frozen parameters, an eval batch norm in a train network, one without statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.BatchNorm2d(4, momentum=None),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
    net.train()
    net[1].eval()
    net[6].eval()
    net[3].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = None if i % 2 else torch.full_like(parameter, 3.0)
    return net


def snapshot(net: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in net.modules()],
        "requires": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "tracks": [getattr(m, "track_running_stats", None) for m in net.modules()],
        "ids": [id(p) for p in net.parameters()],
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def attack(net: nn.Module, x: Tensor = X) -> Tensor:
    return pgd(objectives.cross_entropy(net, Y), x, eps=0.1, step_size=0.05, steps=3, init="zero")


@pytest.mark.parametrize("mode", ["eval", "train_no_track"])
class TestRestores:
    def test_everything(self, mode):
        net = network()
        before = snapshot(net)
        with attacking(net, mode):
            x_adv = attack(net)
        assert same(snapshot(net), before)
        assert float((x_adv - X).abs().max()) > 0.05

    def test_after_an_exception(self, mode):
        net = network()
        before = snapshot(net)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def fail(x: Tensor) -> Tensor:
            raise RuntimeError("on the way")

        with pytest.raises(RuntimeError, match="on the way"), attacking(net, mode):
            pgd(fail, X, eps=0.1, step_size=0.05, steps=3)
        assert same(snapshot(net), before)
        assert torch.is_grad_enabled() == grad
        assert torch.is_inference_mode_enabled() == inference

    def test_nested(self, mode):
        net = network()
        before = snapshot(net)
        with attacking(net, mode):
            middle = snapshot(net)
            with attacking(net, "eval" if mode == "train_no_track" else "train_no_track"):
                attack(net)
            assert same(snapshot(net), middle)
        assert same(snapshot(net), before)

    def test_parameters_are_frozen_inside(self, mode):
        net = network()
        with attacking(net, mode):
            assert not any(p.requires_grad for p in net.parameters())
            x = X.clone().requires_grad_(True)
            net(x).sum().backward()
        assert [p.grad is None for p in net.parameters()] == [i % 2 == 1 for i in range(len(list(net.parameters())))]

    def test_under_no_grad_and_inference_mode(self, mode):
        net = network()
        net[6].p = 0.0
        with attacking(net, mode):
            expected = attack(net)
        before = snapshot(net)
        for outside in (torch.no_grad, torch.inference_mode):
            with outside():
                with attacking(net, mode):
                    assert torch.is_grad_enabled()
                    assert not torch.is_inference_mode_enabled()
                    x = X.clone().requires_grad_(True)
                    assert net(x).requires_grad
                    got = attack(net)
                assert not torch.is_grad_enabled()
                assert torch.is_inference_mode_enabled() == (outside is torch.inference_mode)
            assert torch.equal(got, expected)
        assert same(snapshot(net), before)

    def test_autocast_is_off(self, mode):
        net = network()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with attacking(net, mode):
                assert not torch.is_autocast_enabled("cpu")
                assert net(X).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")


def test_the_default_is_eval():
    net = network()
    with attacking(net):
        assert not any(m.training for m in net.modules())


def test_eval_uses_the_running_statistics():
    net = network()
    net[1].running_mean.fill_(0.3)
    with attacking(net, "eval"), torch.no_grad():
        inside = net(X)
    assert torch.equal(net.eval()(X), inside)


def test_train_no_track_uses_the_batch_and_leaves_the_running_statistics():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    net.eval()
    with attacking(net, "train_no_track"), torch.no_grad():
        out = net(X)
    expected = (X - X.mean()) / torch.sqrt(X.var(unbiased=False) + 1e-5)
    torch.testing.assert_close(out, expected.flatten(1))
    assert not net.training
    assert net[0].running_mean.tolist() == [0.0]
    assert net[0].running_var.tolist() == [1.0]
    assert int(net[0].num_batches_tracked) == 0
    assert net[0].track_running_stats


def test_train_no_track_sees_the_batch_in_each_norm():
    """1d, 2d and 3d batch norms, and one with momentum None (a cumulative average)."""
    net = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.BatchNorm1d(2, momentum=None)])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with attacking(net, "train_no_track"), torch.no_grad():
        for i, shape in enumerate([(8, 2), (8, 2, 3, 3), (8, 2, 2, 2, 2), (8, 2)]):
            out = net[i](5.0 + torch.rand(shape, generator=torch.Generator().manual_seed(i)))
            assert abs(float(out.mean())) < 1e-4
    assert same(dict(net.state_dict()), before)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="sleep"), attacking(network(), "sleep"):
        pass


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr", "kl_to"])
def test_images_and_targets_may_come_out_of_an_inference_loop(name):
    """A loader iterated under inference_mode collates inference tensors, which autograd refuses to save."""
    net = network()
    with torch.no_grad():
        logits = net.eval()(X + 0.05)

    def objective(target: Tensor) -> Callable[[Tensor], Tensor]:
        return getattr(objectives, name)(net, target, **({"kappa": 50.0} if name == "margin" else {}))

    target = logits if name == "kl_to" else Y
    with attacking(net):
        expected = pgd(objective(target), X, eps=0.1, step_size=0.05, steps=3, init="zero")
    with torch.inference_mode():
        x, target = X.clone(), target.clone()
        assert x.is_inference()
        assert target.is_inference()
        made_before = objective(target)
        with attacking(net):
            for made in (objective(target), made_before):
                got = pgd(made, x, eps=0.1, step_size=0.05, steps=3, init="zero")
                assert torch.equal(got, expected)


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_train_no_track_leaves_tracking_instance_norms_too(norm):
    """They update what they hold even with track_running_stats switched off."""
    net = norm(2, affine=True, track_running_stats=True)
    shape = (3, 2, *(2,) * {"1": 1, "2": 2, "3": 3}[norm.__name__[-2]])
    x = 5.0 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net(x)  # statistics of their own, other than at the start
    before, in_eval = {k: v.clone() for k, v in net.state_dict().items()}, net.eval()(x).detach()
    with attacking(net, "train_no_track"), torch.no_grad():
        for _ in range(3):
            out = net(x)
        assert abs(float(out.mean())) < 1e-4, "the batch's own statistics"
        with attacking(net, "eval"), torch.no_grad():
            assert torch.equal(net(x), in_eval), "the running ones, also inside"
        with pytest.raises(ValueError, match="expected"):
            net(torch.zeros(()))
    assert same(dict(net.state_dict()), before)
    assert net.track_running_stats
    net.train()(x)
    assert not torch.equal(net.running_mean, before["running_mean"]), "afterwards they are tracked again"
