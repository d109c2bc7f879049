"""The floors below the training code stand on torch alone."""

import subprocess
import sys

TRAINING = ["hydra", "omegaconf", "pytorch_lightning", "lightning", "torchmetrics"]
HEAVY = [*TRAINING, "torchvision", "wandb", "sklearn", "autoattack", "pyautoattack"]


def test_importing_functions_and_attacks_pulls_in_nothing_but_torch():
    """In one process, after each step: the package, its floors, every module of the two floors."""
    code = f"""
import importlib, pkgutil, sys

def heavy(after):
    found = [name for name in {HEAVY!r} if name in sys.modules]
    assert not found, f"import {{after}} pulled in {{found}}"

for name in ("mi_at", "mi_at.functional", "mi_at.attacks"):
    package = importlib.import_module(name)
    heavy(name)
    for module in pkgutil.iter_modules(package.__path__, name + ".") if name != "mi_at" else ():
        importlib.import_module(module.name)
        heavy(module.name)
print("light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "light"
