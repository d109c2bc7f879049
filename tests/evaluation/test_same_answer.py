"""The standard protocol gives one answer, however it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mi_at import io
from mi_at.data.digits import Digits
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.evaluation.audit_findings import points
from tests.evaluation.test_audit import EPS, robust_on_digits

pytestmark = pytest.mark.slow

N = 100
WAYS: dict[str, dict[str, Any]] = {
    "batches of 16": {"batch_size": 16},
    "whole batches": {"active": False},
    "two processes": {"processes": 2},
}


def standard(net: torch.nn.Module, *, batch_size: int = 500, **options: Any) -> EvaluationResult:
    cfg = io.compose("standard", ["dataset=digits", f"evaluation.eps={EPS}", f"evaluation.batch_size={batch_size}"])
    parts = {"seed": 0, "dataset": cfg.dataset, "evaluation": cfg.evaluation}
    attacks = io.build_attacks(io.plain(OmegaConf.create(parts))["evaluation"])
    data = Digits(batch_size=64, val_size=0)
    data.setup("test")
    return evaluate(net, attacks, data.test_dataloader(), n=N, batch_size=batch_size, progress=False, **options)


def test_standard_gives_the_same_answer_in_any_batches_and_by_any_processes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ours per sample; AutoAttack, whose noise depends on its batch, to 0.5 points or 2 paired standard errors."""
    net, _, _ = robust_on_digits()
    expected = standard(net)
    assert 0.2 < expected["autoattack"].accuracy < expected["clean"].accuracy
    for way, options in WAYS.items():
        found = standard(net, **options)
        for name in ("clean", "pgd_50x10", "cw_50x10"):
            assert torch.equal(found[name].prediction, expected[name].prediction), (way, name)
        one, other = ~found["autoattack"].correct, ~expected["autoattack"].correct
        assert not points(one, other).above(0.5), way
        assert not points(other, one).above(0.5), way
    assert "a helping process ended" not in capfd.readouterr().err
