"""Means of per-sample estimates of mutual information."""

from __future__ import annotations

import pytest
import torch

from mi_at.metrics import MutualInformationEstimates


def test_means_over_batches_and_over_the_selected() -> None:
    natural = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    metric = MutualInformationEstimates()
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(natural[part], -natural[part])
    found = metric.compute()
    assert (found["natural"], found["adversarial"], found["samples"]) == (3.0, -3.0, 5.0)
    metric.reset()
    metric.update(natural, natural + 1, torch.tensor([True, False, False, True, False]))
    found = metric.compute()
    assert (found["natural"], found["adversarial"], found["samples"]) == (2.5, 3.5, 2.0)


def test_what_is_not_selected_does_not_count_whatever_it_is() -> None:
    metric = MutualInformationEstimates()
    metric.update(torch.tensor([1.0, float("nan")]), torch.tensor([2.0, float("inf")]), torch.tensor([True, False]))
    found = metric.compute()
    assert (found["natural"], found["adversarial"]) == (1.0, 2.0)


def test_without_samples_there_is_no_mean() -> None:
    metric = MutualInformationEstimates()
    metric.update(torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    found = metric.compute()
    assert found["natural"].isnan()
    assert found["samples"] == 0


def test_bad_input() -> None:
    metric = MutualInformationEstimates()
    with pytest.raises(ValueError, match=r"one value per sample, \[B\] each, got \(2,\), \(3,\)"):
        metric.update(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"one value per sample"):
        metric.update(torch.ones(2, 1), torch.ones(2, 1))
