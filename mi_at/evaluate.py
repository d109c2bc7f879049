"""python -m mi_at.evaluate checkpoint=...: attack a trained classifier on its data set's test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mi_at import io
from mi_at.evaluation.evaluate import sizes
from mi_at.results.measure import measure
from mi_at.results.records import config_hash, run_key
from mi_at.results.runs import EVALUATIONS, RECORD
from mi_at.results.terminal import print_header


def evaluate(cfg: DictConfig) -> None:
    """Evaluate one checkpoint; its record goes to <output>/<checkpoint>-<evaluation>-<hash>/.

    Args:
        cfg: conf/evaluate.yaml, composed; its evaluation reads the data set of the checkpoint.
    """
    served = io.read_checkpoint(cfg.checkpoint)
    trained = served.config
    # The evaluation's values may refer to the data set (eps: ${dataset.eps}); the checkpoint says which it was.
    here = {key: value for key, value in cfg.dataset.items() if value is not None}
    whole = OmegaConf.merge(trained, {"evaluation": None, "dataset": here})
    whole.evaluation = cfg.evaluation
    config: dict[str, Any] = io.plain(whole)
    name = str(HydraConfig.get().runtime.choices["evaluation"])
    config["choices"] = {**trained["choices"], "evaluation": name}
    attacks = io.build_attacks(config["evaluation"])
    data = io.build_data(config["dataset"])
    data.prepare_data()
    data.setup("test")
    sizes(attacks, data.test_dataloader().num_images, n=config["evaluation"]["n"], n_of=config["evaluation"]["n_of"])
    device = device_of(cfg.device)

    rule = served.path.stem
    parent = Path(cfg.output) if cfg.output else served.path.parent / EVALUATIONS
    path = parent / f"{rule}-{name}-{config_hash(config)}" / RECORD
    facts = {
        "checkpoint": f"{served.path} (epoch {served.epoch}, step {served.step})",
        "data": f"{config['choices']['dataset']}, test split",
        "evaluation": f"{name}: {', '.join(attacks) or 'clean accuracy only'}",
        "record": str(path),
    }
    print_header(run_key(config, config["choices"]), facts)
    measure(
        io.load(served.path, device),
        attacks,
        data,
        config=config,
        checkpoint={"rule": rule, "epoch": served.epoch, "step": served.step},
        path=path,
        device=device,
    )


def device_of(name: str) -> str:
    """The device a name stands for.

    Raises:
        ValueError: it is not there.
    """
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name != "auto" and name not in there:
        raise ValueError(f"device={name}: this machine has {', '.join(there)}; device=auto takes what is there")
    return name if name != "auto" else "cuda" if "cuda" in there else "cpu"


def main() -> None:
    """The command line."""
    io.run_command(evaluate, "evaluate")


if __name__ == "__main__":
    main()
