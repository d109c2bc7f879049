"""500 steps of every method in bfloat16 on real MNIST: every term, gradient and weight stays finite.

The real command, network and attack small: a term that is not finite at any step ends the run with its name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mi_at import io
from mi_at.results.records import read_record
from tests.commands import Command
from tests.test_train import DEFENSES, REGULARIZERS

STEPS = 500
SMALL = (
    "dataset=mnist",
    "model=cnn_tiny",
    "model.width=0.25",
    "recipe=none",
    "budget=smoke",
    "dataset.batch_size=16",
    f"dataset.train_size={STEPS * 16 // 2}",
    "dataset.val_size=0",
    "trainer.precision=bf16-mixed",
    "attack.precision=bf16",
    "attack.eps=0.1",
    "attack.steps=1",
    "attack.step_size=0.1",
    "optim.lr=0.02",
    "optim.epochs=2",
    "evaluation=none",
    "evaluation.n=1000",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
FEW = ("regularizer.clean_ncmi.samples_per_class=4",)
METHODS = {
    **{name: (f"defense={name}",) for name in DEFENSES},
    "trades_awp": ("defense=trades_awp", "callback.awp.warmup_epochs=0"),
    "mma, full": ("defense=mma", "defense.variant=full", "defense.max_margin=0.15"),
    "mimae, squared": ("defense=mimae", "defense.adversarial_term=ce", "defense.logit_term=mse"),
    "shared_info, mine": ("defense=shared_info", "defense.estimator=mine", "defense.lambda_mi=0.01"),
    "shared_info, mige": ("defense=shared_info", "defense.estimator=mige", "defense.lambda_mi=0.01"),
    "shared_info, softmax": ("defense=shared_info", "defense.location=softmax"),
    "vib, adversarial": ("defense=vib", "defense.view=adversarial"),
    "standard_at+mi": ("defense=standard_at", "regularizer=mi"),
    **{
        f"trades+{name}": ("defense=trades", f"regularizer={name}", *(FEW if name == "clean_ncmi" else ()))
        for name in REGULARIZERS
    },
}


@pytest.mark.slow
@pytest.mark.realdata("mnist")
@pytest.mark.parametrize("method", METHODS)
def test_500_steps_in_bfloat16_are_finite(method: str, tmp_path: Path, data_root: Path) -> None:
    done = Command(tmp_path, *SMALL, f"dataset.root={data_root}", *METHODS[method], "run_dir=run").wait(timeout=3600)
    assert done.code == 0, done.err
    state = io.read_checkpoint(tmp_path / "run" / "last.ckpt").net_state
    assert all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, torch.Tensor))
    record = read_record(tmp_path / "run" / "record.json")
    assert record.training["steps"] == STEPS
    assert record.training["precision"] == "bf16-mixed"
    print(f"\n{method}: clean {100 * record['clean'].accuracy:.1f} %")
