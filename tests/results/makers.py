"""An evaluation, a configuration and a record to try things on."""

from dataclasses import replace
from typing import Any

import torch

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.results.records import Record, make_record
from tests.evaluation.nets import Halfspace, images, loader, predicted

NAMES = {"defense": "mimae", "dataset": "digits", "model": "cnn_tiny", "evaluation": "quick"}


def config(**changes: Any) -> dict[str, Any]:
    """A resolved configuration as training sees it; changes by dotted key with __ for the dot."""
    made: dict[str, Any] = {
        "seed": 0,
        "budget": "short",
        "runs": "runs",
        "run_dir": None,
        "resume": False,
        "save_every_n_steps": 200,
        "keep_epochs": [],
        "tags": [],
        "group": None,
        "dataset": {
            "_target_": "mi_at.data.digits.Digits",
            "name": "digits",
            "root": "data",
            "eps": 0.15,
            "download": False,
            "placement": "auto",
            "batch_size": 64,
            "extra": None,
        },
        "model": {"_target_": "mi_at.models.cnn.CNNTiny", "width": 1.0},
        "defense": {"_target_": "mi_at.defenses.mimae.Mimae", "lambda_mi": 0.4, "beta": 1.0},
        "regularizer": {},
        "optim": {"lr": 0.1, "epochs": 12},
        "trainer": {"accelerator": "auto", "devices": 1, "precision": "32-true", "enable_progress_bar": True},
        "logger": {"csv": {"_target_": "mi_at.results.loggers.csv"}},
        "evaluation": {"eps": 0.15, "n": None, "seed": 0},
    }
    for key, value in changes.items():
        section, parts = made, key.split("__")
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        section[parts[-1]] = value
    return made


def evaluation(n: int = 40, eps: float = 0.02) -> EvaluationResult:
    net, x = Halfspace(), images(n, low=0.2, high=0.8)
    y = predicted(net, x)
    y[::5] = 1 - y[::5]
    attacks = {"fgsm": FGSM(eps=eps), "pgd_20": PGD(eps=eps, step_size=eps / 80, steps=20)}
    return evaluate(net, attacks, loader(x, y), n_of={"pgd_20": n // 2}, progress=False)


def leaving(result: EvaluationResult, name: str, right: int) -> EvaluationResult:
    """The same with an attack that leaves so many images right, the first of those that are right when clean."""
    row = result[name]
    kept = result.clean.correct[: row.n].nonzero().flatten()[:right]
    assert len(kept) == right
    prediction = 1 - row.label
    prediction[kept] = row.label[kept]
    return replace(result, attacks={**result.attacks, name: replace(row, prediction=prediction)})


def record(result: EvaluationResult | None = None, *, seed: int = 0, **options: Any) -> Record:
    options = {"names": NAMES, "checkpoint": {"rule": "best", "epoch": 12}, **options}
    return make_record(result or evaluation(), config=options.pop("config", config(seed=seed)), **options)


def notes() -> dict[str, Any]:
    """What training leaves behind, in types that JSON does not know."""
    return {"shares": {"bce": torch.tensor(0.75), "mi": float("nan")}, "epochs": (1, 2), "precision": "fp32"}
