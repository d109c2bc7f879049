"""CMI, separation and NCMI accumulated batch by batch are those of all outputs at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mi_at.functional import information
from mi_at.functional.distributed import own_shard
from mi_at.metrics import ConditionalMutualInformation, NormalizedCMI, Separation
from tests.references import ncmi as ref
from tests.references.losses import rows

METRICS: dict[type, Callable[[Tensor, Tensor, int], Tensor]] = {
    ConditionalMutualInformation: information.conditional_mutual_information,
    Separation: information.separation,
    NormalizedCMI: information.normalized_cmi,
}
N, K = 37, 5


def outputs(scale: float = 3.0, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (scale * torch.randn(n, K, generator=g, dtype=torch.float64)).softmax(1), torch.arange(n) ** 2 % K


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("scale", [0.5, 3.0, 60.0])
def test_batch_by_batch_is_all_at_once(kind: type, scale: float) -> None:
    p, y = outputs(scale)
    metric = kind(num_classes=K)
    for part, labels in zip(p.split(8), y.split(8), strict=True):
        metric.update(part, labels)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(METRICS[kind](p, y, K).item(), abs=1e-12)
    metric.reset()
    metric.update(p[:9], y[:9])
    assert metric.compute().item() == pytest.approx(METRICS[kind](p[:9], y[:9], K).item(), abs=1e-12)


def test_values_equal_the_transcription() -> None:
    p, y = outputs()
    table, labels = rows(p), y.tolist()
    expected = {ConditionalMutualInformation: ref.cmi(table, labels), Separation: ref.separation(table, labels)}
    expected[NormalizedCMI] = expected[ConditionalMutualInformation] / expected[Separation]
    for kind, value in expected.items():
        metric = kind(num_classes=K)
        metric.update(p.float(), y)
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


def test_certain_outputs_have_no_width() -> None:
    y = torch.tensor([0, 1, 1])
    metric = ConditionalMutualInformation(num_classes=2)
    metric.update(torch.full((3, 2), 0.5), y)
    assert metric.compute().item() == 0
    metric.update(torch.eye(2)[y], y)
    assert metric.compute().item() > 0


@pytest.mark.parametrize("kind", METRICS)
def test_it_is_only_compared_where_there_is_something(kind: type) -> None:
    p, y = outputs()
    metric = kind(num_classes=K)
    with pytest.raises(ValueError, match=r"no samples: call update"), pytest.warns(UserWarning, match="before"):
        metric.compute()
    metric.reset()
    metric.update(p, torch.zeros_like(y))
    if kind is ConditionalMutualInformation:
        assert metric.compute() > 0
    else:
        with pytest.raises(ValueError, match=r"all samples are of one class"):
            metric.compute()


def test_logits_and_wrong_shapes_are_refused() -> None:
    p, y = outputs()
    metric = NormalizedCMI(num_classes=K)
    for wrong in (p.log(), 2 * p, -p):
        with pytest.raises(ValueError, match=r"pass softmax\(logits\), once"):
            metric.update(wrong, y)
    with pytest.raises(ValueError, match=r"expected \[B, 5\] probabilities, got \(37, 4\)"):
        metric.update(p[:, :4], y)
    with pytest.raises(ValueError, match="one label per row"):
        metric.update(p, y[:5])
    with pytest.raises(ValueError, match="num_classes=1: expected 2 or more"):
        NormalizedCMI(num_classes=1)
    metric.update(p.half(), y)  # a row sums to 1 as half precision can
    metric.update(torch.full((2, K), float("nan")).nan_to_num(1 / K), y[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    p, y = outputs()
    p[3, 1] = bad
    with pytest.raises(ValueError, match="expected probabilities"):
        NormalizedCMI(num_classes=K).update(p, y)


def accumulate(rank: int, processes: int) -> dict[str, float]:
    """Each process its shard; then the whole of another set, to see that syncing does not leak into it."""
    p, y = outputs()
    found = {}
    for kind in METRICS:
        metric = kind(num_classes=K)
        metric.update(own_shard(p), own_shard(y))
        found[kind.__name__] = metric.compute().item()
        metric.update(own_shard(p), own_shard(y))
        found[f"{kind.__name__} twice"] = metric.compute().item()
    return found


@pytest.mark.ddp
def test_processes_add_up(spawn: Callable[..., list[dict[str, float]]]) -> None:
    expected = accumulate(0, 1)
    for result in spawn(accumulate, 3):
        assert result == pytest.approx(expected, abs=1e-12)
    assert expected["NormalizedCMI"] == pytest.approx(expected["NormalizedCMI twice"], abs=1e-12)
