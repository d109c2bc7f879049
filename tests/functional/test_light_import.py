"""The floors below the training code stand on torch alone."""

import subprocess
import sys

import pytest

HEAVY = [
    "hydra",
    "omegaconf",
    "pytorch_lightning",
    "lightning",
    "torchvision",
    "wandb",
    "torchmetrics",
    "sklearn",
]


@pytest.mark.parametrize("module", ["mi_at", "mi_at.functional", "mi_at.attacks", "mi_at.attacks.pgd"])
def test_import_pulls_in_neither_hydra_nor_lightning_nor_torchvision(module):
    code = (
        f"import sys; import {module}; "
        f"print([m for m in {HEAVY!r} if any(k == m or k.startswith(m + '.') for k in sys.modules)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import {module} pulled in {done.stdout.strip()}"


def test_every_function_module_imports_lightly():
    code = (
        "import sys, pkgutil, importlib, mi_at.functional as f\n"
        "for m in pkgutil.iter_modules(f.__path__): importlib.import_module('mi_at.functional.' + m.name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stdout
