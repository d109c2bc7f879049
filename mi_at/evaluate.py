"""python -m mi_at.evaluate checkpoint=...: attack a trained classifier on its data set's test split.

A checkpoint of mi_at says which network and which data it was made with; for weights that were trained elsewhere the
command says it (model=, dataset=). From Python, `robustness` does the same with a network at hand.
"""

from __future__ import annotations

import functools
import io as streams
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from mi_at import checks, io, stages
from mi_at.cells import typed_words
from mi_at.data.base import ImageDataModule
from mi_at.data.batch import Batch
from mi_at.evaluation.evaluate import identity_of, sizes
from mi_at.evaluation.outcomes import EvaluationResult, Identity
from mi_at.functional.geometry import parse_eps
from mi_at.results import loggers
from mi_at.results.measure import assess, measure
from mi_at.results.page import PAGE, write_page
from mi_at.results.records import (
    AttackRecord,
    Record,
    RecordError,
    config_hash,
    read_outcomes,
    read_record,
    run_key,
)
from mi_at.results.runs import EVALUATIONS, RECORD, TRAINED
from mi_at.results.terminal import print_header, print_table

OF_THE_MACHINE = ("root", "placement", "download")
"""Options of a data set that say where it lies, not what it is."""
DATA_ROOT = "MI_AT_DATA"
"""The environment variable that says where this machine keeps data sets (conf/dataset/)."""
FILE = "file"
"""The checkpoint rule of weights that were trained elsewhere."""
NOT_TOLD = ("processes", "trainer", "again")
"""Options of the command that do not change a number."""
BATCH = 250


def evaluate(cfg: DictConfig) -> None:
    """Evaluate one checkpoint; its record goes to <output>/<checkpoint>-<evaluation>-<hash>/.

    Args:
        cfg: conf/evaluate.yaml, composed; its evaluation reads the data set of the checkpoint.
    """
    found = io.read_weights(cfg.checkpoint)
    device, processes = device_of(cfg.device), processes_of(cfg)
    choices = HydraConfig.get().runtime.choices
    if isinstance(found, io.Checkpoint):
        config = _config_of_run(cfg, found)
        stands_for: dict[str, Any] = {"rule": found.path.stem, "epoch": found.epoch, "step": found.step}
        origin = f"{found.path} (epoch {found.epoch}, step {found.step})"
    else:
        config = _config_of_weights(cfg, found)
        stands_for = {"rule": FILE, "name": found.path.name, "weights": config["weights"]}
        origin = f"{found.path} (trained elsewhere)"
    config["choices"]["evaluation"] = name = str(choices["evaluation"])
    config["choices"]["typed"] = typed_words(without=NOT_TOLD)
    config, files = stages.identify_surrogate(config)

    settings = config["evaluation"]
    attacks = io.build_attacks(settings)
    parent = Path(cfg.output) if cfg.output else found.path.parent / EVALUATIONS
    path = parent / f"{found.path.stem}-{name}-{config_hash(config)}" / RECORD
    key = run_key(config, config["choices"])
    facts = {
        "checkpoint": origin,
        "data": f"{config['choices']['dataset']}, test split",
        "evaluation": f"{name}: {', '.join(attacks) or 'clean accuracy only'}",
        "record": str(path),
    }
    data = io.build_data(config["dataset"])
    data.prepare_data()
    data.setup("test")
    sizes(attacks, data.test_dataloader().num_images, n=settings["n"], n_of=settings["n_of"])
    surrogate = stages.load_surrogate(stages.surrogate_file(config, files, train=None), config, device)
    served = io.serve(found, attacks, config, data, device=device, surrogate=surrogate)
    if isinstance(found, io.Weights):
        checks.check_net(served.net, data)
    if not cfg.again and (record := _finished(path, stands_for, served.net, data, settings, device)):
        print_header(key, facts)
        print_table(record)
        if not path.with_name(PAGE).is_file():
            write_page(path.with_name(PAGE), [path])
        print(f"evaluated on {record.date[:10]}; again=true attacks anew")
        return
    notes = found.path.parent / TRAINED
    training = json.loads(notes.read_text()) if isinstance(found, io.Checkpoint) and notes.is_file() else None

    print_header(key, facts)
    recorders = loggers.build(
        {logger: instantiate(node, _partial_=True) for logger, node in (cfg.logger or {}).items()},
        folder=path.parent,
        key=f"{key}-{name}",
        config_hash=config_hash(config),
        tags=config.get("tags") or (),
        config=config,
    )
    with loggers.ended_on_failure(recorders):
        record = measure(
            served.net,
            served.attacks,
            data,
            config=config,
            checkpoint=stands_for,
            path=path,
            device=device,
            sharing=processes,
            training=training,
            adaptive=served.adaptive,
            variants=served.variants,
            critics=served.critics,
        )
        loggers.log_evaluation(recorders, record, path=path)


def _finished(
    path: Path,
    checkpoint: Mapping[str, Any],
    net: nn.Module,
    data: ImageDataModule,
    settings: Mapping[str, Any],
    device: str,
) -> Record | None:
    """The record of the same evaluation of the same network and images, if it and its outcomes are there and whole."""
    try:
        record = read_record(path)
        read_outcomes(path.with_suffix(".npz"))
    except RecordError:
        return None
    if {key: record.checkpoint.get(key) for key in checkpoint} != dict(checkpoint):
        return None
    now = identity_of(net, data.test_dataloader(), device=device, seed=settings["seed"], n=settings["n"])
    return record if now.is_that_of(Identity.of_plain(record.identity)) else None


def _config_of_run(cfg: DictConfig, served: io.Checkpoint) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint, with this evaluation, and the data where they lie here.

    Raises:
        ValueError: the command names another network or data set.
    """
    trained, given = served.config, _given()
    made = f"checkpoint={served.path} is a run of mi_at"
    if "dataset" in given and cfg.dataset.name != trained["dataset"].get("name"):
        raise ValueError(
            f"dataset={cfg.dataset.name}: {made} on {trained['dataset'].get('name')}, which it is evaluated on; leave "
            "out dataset="
        )
    if other := [key for key in given if key.startswith("dataset.") and key[8:] not in OF_THE_MACHINE]:
        raise ValueError(
            f"{other[0]}: {made}, which says what its data are; only {', '.join(OF_THE_MACHINE)} can change"
        )
    if any(key.split(".")[0] == "model" for key in given):
        said = io.plain(OmegaConf.create({"dataset": trained["dataset"], "model": cfg.model}))["model"]
        apart = {key: value for key, value in said.items() if value not in (None, trained["model"].get(key))}
        for key, value in apart.items():
            raise ValueError(
                f"model.{key}={value}: {made} with {trained['model'].get(key)}, which is what its weights are for; "
                "leave out model="
            )
    # The evaluation's values may refer to the data set (eps: ${dataset.eps}); the checkpoint says which it was.
    here = {key: cfg.dataset[key] for key in OF_THE_MACHINE if cfg.dataset[key] is not None}
    if "root" not in here and DATA_ROOT in os.environ and _lies_elsewhere(trained["dataset"]):
        here["root"] = os.environ[DATA_ROOT]
    whole = OmegaConf.merge(trained, {"evaluation": None, "dataset": here})
    whole.evaluation = cfg.evaluation
    config = io.plain(whole)
    config["evaluation"] = io.resolve_evaluation(config["evaluation"])
    config["choices"] = dict(trained["choices"])
    return config


def _lies_elsewhere(dataset: Mapping[str, Any]) -> bool:
    """Whether the data root of a training is not on this machine; pictures of one's own lie in no data root."""
    return dataset["name"] != "folder" and not Path(dataset["root"]).expanduser().is_dir()


def _config_of_weights(cfg: DictConfig, served: io.Weights) -> dict[str, Any]:
    """The configuration of an evaluation of weights that mi_at has not trained.

    Raises:
        ValueError: the command does not say which network, or which data.
    """
    choices = HydraConfig.get().runtime.choices
    made = f"checkpoint={served.path} holds weights that mi_at has not trained"
    for group, value in (("model", cfg.model._target_), ("dataset", choices["dataset"])):
        if value is None:
            known = ", ".join(io.names_in(group))
            own = ", or model._target_=my_package.Net" if group == "model" else ""
            raise ValueError(f"{made}: say which {group} they are for, {group}= one of {known}{own}")
    io.fill_classes(cfg.dataset)
    parts = {"seed": 0, "dataset": cfg.dataset, "model": cfg.model, "evaluation": cfg.evaluation}
    config = io.plain(OmegaConf.create(parts))
    del config["seed"]  # of a training that is not known
    config["budget"] = "none"
    config["weights"] = stages.digest(served.tensors, ("",))
    config["evaluation"] = io.resolve_evaluation(config["evaluation"])
    model = choices["model"] or _snake(config["model"]["_target_"])
    config["choices"] = {
        "weights": served.path.stem,
        "defense": "own",
        "regularizer": "none",
        "dataset": choices["dataset"],
        "model": model,
    }
    return config


def _given() -> list[str]:
    """Keys that the command line sets."""
    return [override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task]


def _snake(target: str) -> str:
    """The class of a target, as files are called.

    Example:
        >>> _snake("my_package.WideNet")
        'wide_net'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", target.rpartition(".")[2]).lower()


# ---------------------------------------------------------------- from Python
@dataclass(frozen=True)
class Robustness:
    """What `robustness` found; printed, it is the table.

    Attributes:
        record: the numbers, and how they came about.
        outcomes: per attack and per sample.
    """

    record: Record
    outcomes: EvaluationResult

    def __getitem__(self, name: str) -> AttackRecord:
        """The row of an attack, or of "clean".

        Raises:
            KeyError: no such row; the message lists the names.
        """
        return self.record[name]

    def __str__(self) -> str:
        text = streams.StringIO()
        print_table(self.record, stream=text)
        return text.getvalue().rstrip()


@dataclass(frozen=True)
class _AtHand:
    """Images that the caller has, as `measure` reads them."""

    x: Tensor
    y: Tensor

    def setup(self, stage: str) -> None:
        """Nothing is to be read."""

    def test_dataloader(self) -> list[Batch]:
        """In the order they were given."""
        parts = (self.x.split(BATCH), self.y.split(BATCH), torch.arange(len(self.y)).split(BATCH))
        return [Batch(x=x, y=y, index=index) for x, y, index in zip(*parts, strict=True)]


def robustness(
    net: nn.Module,
    data: str | tuple[Tensor, Tensor],
    *,
    evaluation: str = "standard",
    eps: float | str | None = None,
    norm: str | None = None,
    step_size: float | str | None = None,
    n: int | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> Robustness:
    """Attack a network of any origin with one of mi_at's protocols.

    Args:
        net: images [B, C, H, W] in [0, 1] -> logits [B, K], normalisation inside; it comes back in its own mode.
        data: name of a data set, whose test split is used; or images float [N, C, H, W] in [0, 1] and labels int64 [N].
        evaluation: name of a protocol (conf/evaluation/).
        eps: radius, a number or a fraction ("8/255"); None: the protocol's.
        norm: "linf" or "l2"; None: the protocol's, "linf" for images at hand.
        step_size: None: the protocol's, eps / 4 for images at hand.
        n: the first n samples; None: the protocol's number.
        overrides: further values of the evaluation, as on the command line: "evaluation.n_of.autoattack=100",
            "evaluation.surrogate=run/best.ckpt".
        device: "auto", "cpu" or "cuda".
        progress: show it, on standard error.

    Returns:
        Rows by name; printed, the table.

    Raises:
        ValueError: a value that cannot be used, or a protocol that there is not; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.randint(3, (8,))
        >>> result = robustness(net, (images, labels), evaluation="none", progress=False)
        >>> result["clean"].n
        8
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"net of type {type(net).__name__}: expected a torch.nn.Module; wrap a function in one")
    for key, value in {"eps": eps, "step_size": step_size}.items():
        try:
            parse_eps(0 if value is None else value)
        except ValueError as error:
            raise ValueError(f"{key}={error}") from error
    asked = {"eps": eps, "norm": norm, "step_size": step_size, "n": n}
    if evaluation == "none" and (ball := [key for key in ("eps", "norm", "step_size") if asked[key] is not None]):
        raise ValueError(
            f"{ball[0]}={asked[ball[0]]}: evaluation=none attacks nothing; leave it out, or name a protocol"
        )
    given = [f"evaluation.{key}={value}" for key, value in asked.items() if value is not None]
    chosen = [f"dataset={data}"] if isinstance(data, str) else []
    if isinstance(overrides, str):
        raise ValueError(f"overrides={overrides!r}: expected a list of them, [{overrides!r}]")
    allowed = ("evaluation.", "evaluation/", *(["dataset."] if isinstance(data, str) else []))
    if useless := [override for override in overrides if not override.lstrip("+~").startswith(allowed)]:
        raise ValueError(
            f"overrides={useless}: mi_at.robustness has no use for it; expected what begins with "
            f"{' or '.join(allowed)}, and the rest as its arguments"
        )
    cfg = io.compose(evaluation, [*chosen, *given, *overrides])
    OmegaConf.set_struct(cfg, False)
    source: Any
    if isinstance(data, str):
        io.fill_classes(cfg.dataset)
    else:
        source = _AtHand(*_checked(data))
        if eps is None and _is_customary(cfg):
            raise ValueError("eps=None: images at hand have no customary radius; give one, such as eps='8/255'")
        quarter = "${mul:0.25,${evaluation.eps}}" if "eps" in cfg.evaluation else None
        cfg.dataset = {"name": io.AT_HAND, "eps": eps, "norm": "linf", "step_size": quarter}
    config = io.plain(OmegaConf.create({"seed": 0, "dataset": cfg.dataset, "evaluation": cfg.evaluation}))
    config |= {
        "evaluation": io.resolve_evaluation(config["evaluation"]),
        "budget": "none",
        "weights": stages.digest(net.state_dict(), ("",)),
        "choices": {
            "weights": "own",
            "defense": "own",
            "regularizer": "none",
            "dataset": config["dataset"]["name"],
            "model": _snake(type(net).__name__),
            "evaluation": evaluation,
        },
    }
    if isinstance(data, str):
        source = io.build_data(config["dataset"])
        source.prepare_data()
        source.setup("test")
        checks.check_net(net, source)
    else:  # a protocol's own numbers are those of a whole test split
        named = {override.lstrip("+").partition("=")[0] for override in overrides}
        for name, count in config["evaluation"]["n_of"].items():
            if f"evaluation.n_of.{name}" not in named:
                config["evaluation"]["n_of"][name] = min(count, len(source.y))
    config, files = stages.identify_surrogate(config)
    surrogate = stages.load_surrogate(stages.surrogate_file(config, files, train=None), config, device_of(device))
    guides = functools.partial(io.guides_of, source.test_dataloader())
    record, outcomes = assess(
        net,
        io.bind(io.build_attacks(config["evaluation"]), surrogate=surrogate, guides=guides),
        source,
        config=config,
        checkpoint={"rule": "at hand", "weights": config["weights"]},
        device=device_of(device),
        progress=progress,
    )
    return Robustness(record, outcomes)


def _is_customary(cfg: DictConfig) -> bool:
    """Whether a protocol takes its radius from the data set."""
    written: Any = OmegaConf.to_container(cfg.evaluation, resolve=False)
    return bool(written.get("eps") == "${dataset.eps}")


def _checked(data: Any) -> tuple[Tensor, Tensor]:
    """Images and labels that belong together; what they hold is looked at by the evaluator.

    Raises:
        ValueError: naming what was given.
    """
    expected = "expected images float [N, C, H, W] in [0, 1] and labels int64 [N]"
    if not isinstance(data, tuple | list) or len(data) != 2:
        found = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else type(data).__name__
        raise ValueError(f"data={found}: expected the name of a data set, or two tensors, {expected[9:]}")
    x, y = data
    whole = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
    if not isinstance(x, Tensor) or not whole or len(x) != len(y):
        found = " and ".join(f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else f"{type(v)}" for v in (x, y))
        raise ValueError(f"data=({found}): {expected}")
    return x.float(), y.long()


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


def processes_of(cfg: DictConfig) -> int:
    """How many share the evaluation: `processes`, which trainer=ddp trainer.devices=k sets too.

    Raises:
        ValueError: not a number of processes of this machine.
    """
    if cfg.trainer.get("num_nodes", 1) != 1:
        raise ValueError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: an evaluation is shared by processes of one machine; start "
            "the same command on the others with the same output=, and they share its pieces"
        )
    processes = cfg.processes
    if processes == "auto":
        return max(1, torch.cuda.device_count())
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes={processes}: expected a whole number >= 1, or auto: one for each GPU")
    return processes


def main() -> None:
    """The command line."""
    io.run_command(evaluate, "evaluate")


if __name__ == "__main__":
    main()
