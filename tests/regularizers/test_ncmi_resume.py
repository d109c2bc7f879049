"""Centroids and what belongs to them survive kill -9 and resuming bit for bit, and travel in the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mi_at import load
from tests.test_resume import assert_same_run, checkpoint, run

CASES = {
    "ncmi": (("defense=ncmi", "defense.tau_q=0.5", "defense.tau_q_warmup=true"), "train_batch_end:11"),
    "ncmi_relaxed": (("defense=ncmi_relaxed", "callback=ema", "callback.ema.decay=0.5"), "train_batch_end:17"),
    "ncmi_relaxed, before its centroids": (("regularizer=ncmi_relaxed", "defense=trades"), "train_batch_end:5"),
    "clean_ncmi": (
        ("defense=trades", "regularizer=clean_ncmi", "regularizer.clean_ncmi.samples_per_class=2"),
        "train_batch_end:11",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_is_the_run_that_was_not(name: str, tmp_path: Path) -> None:
    overrides, moment = CASES[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, *overrides).code == 0
    assert run(killed, *overrides, interrupt=f"KILL:{moment}").code == 128 + 9
    resumed = run(killed, *overrides, "resume=true")
    assert resumed.code == 0, resumed.err
    assert_same_run(whole, killed)
    saved = checkpoint(whole, "last")
    state = saved.get("current_model_state", saved["state_dict"])  # beside an average of the weights: the raw state
    (centroids,) = (value for key, value in state.items() if key.endswith("centroids"))
    assert centroids.shape == (10, 10)
    assert (centroids.sum(dim=1) - 1).abs().max() < 1e-9
    assert centroids.std() > 0
    load(whole / "run" / "last.ckpt")
