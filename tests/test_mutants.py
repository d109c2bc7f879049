"""The list of mutants is of this code: each stands in its file, and a planted one is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, REPO, Mutant


def why_not(mutant: Mutant) -> str:
    text = (REPO / "mi_at" / mutant.file).read_text()
    if text.count(mutant.right) != 1:
        return f"{mutant}: stands there {text.count(mutant.right)} times"
    compile(text.replace(mutant.right, mutant.wrong), mutant.file, "exec")
    missing = [name for name in mutant.tests if not (REPO / "tests" / name.partition("::")[0]).is_file()]
    return f"{mutant}: no {', '.join(missing)}" if missing or not mutant.tests else ""


def test_each_can_be_planted() -> None:
    assert len(MUTANTS) > 80
    assert not [reason for mutant in MUTANTS if (reason := why_not(mutant))]


@pytest.mark.slow
def test_a_planted_mutant_is_seen_and_leaves_no_trace() -> None:
    before = Path(REPO, "mi_at/regularizers/mi.py").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "regularizers/mi.py"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 caught" in done.stdout
    assert Path(REPO, "mi_at/regularizers/mi.py").read_bytes() == before
