"""A trained network, and its evaluation's attacks with what they need beside it: surrogate, training loss, guides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi_at.attacks.adaptive import Adaptive, FeatureShift
from mi_at.data.base import ImageDataModule
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.defenses.mi_estimators import MIEstimators
from mi_at.evaluation.mutual_information import CRITICS
from mi_at.evaluation.outcomes import EvalAttack
from mi_at.io.checkpoints import Checkpoint, Weights, load, load_defense, load_own, load_raw, read_checkpoint

AUTO_TAP, FEATURES = "auto", "features"
AT_HAND = "given"
"""Name of a data set that is no data set: images that a caller has."""
GUIDES = 1000
"""Images that guides are drawn from."""


@dataclass(frozen=True)
class Surrogate:
    """The network that transfer attacks are made on.

    Attributes:
        net: in eval mode.
        name: of its run, for the record.
        accuracy: its own clean accuracy in [0, 1], where known.
    """

    net: nn.Module
    name: str
    accuracy: float | None = None


def bind(
    attacks: Mapping[str, EvalAttack],
    *,
    surrogate: Surrogate | None = None,
    defense: Defense | None = None,
    guides: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, EvalAttack]:
    """The attacks with what they need beside the network they attack.

    Args:
        attacks: by name.
        surrogate: that transfer attacks are made on.
        defense: whose training loss adaptive attacks maximise, and whose regularised layer they look at.
        guides: gives images and labels that the representation attack draws its guides from.

    Returns:
        By name; those that need nothing are as they were.

    Raises:
        ValueError: one of them is needed and not there; the message names the attack and the option.
    """
    bound: dict[str, EvalAttack] = {}
    for name, attack in attacks.items():
        needs: Any = attack
        if hasattr(attack, "with_surrogate"):
            if surrogate is None:
                raise ValueError(
                    f"evaluation.attacks.{name} is made on another network: give its checkpoint, evaluation.surrogate="
                )
            needs = needs.with_surrogate(surrogate.net, name=surrogate.name, accuracy=surrogate.accuracy)
        if hasattr(attack, "with_training_loss"):
            if defense is None:
                raise ValueError(
                    f"evaluation.attacks.{name} maximises the loss of the training, which only a checkpoint of mi_at "
                    "carries: leave it out, evaluation/attacks=[...]"
                )
            needs = needs.with_training_loss(defense.training_objective)
        if hasattr(attack, "with_guides") and guides is not None:
            needs = needs.with_guides(*guides())
        if getattr(attack, "tap", None) == AUTO_TAP:
            needs = replace(needs, tap=regularised_tap(defense))
        bound[name] = needs
    return bound


@dataclass(frozen=True)
class Served:
    """A network and what its evaluation needs beside it.

    Attributes:
        net: in eval mode.
        attacks: by name, bound.
        adaptive: attacks made for its defense, for the audit; None: none are known.
        variants: other versions of the network, for the audit; {}: there are none; None: not known.
        critics: estimators of mutual information, where the evaluation wants it.
    """

    net: nn.Module
    attacks: dict[str, EvalAttack]
    adaptive: dict[str, EvalAttack] | None = None
    variants: dict[str, nn.Module] | None = None
    critics: dict[str, nn.Module] | None = None


def serve(
    trained: Checkpoint | Weights,
    attacks: Mapping[str, EvalAttack],
    config: Mapping[str, Any],
    data: ImageDataModule,
    *,
    device: str | torch.device = "cpu",
    surrogate: Surrogate | None = None,
) -> Served:
    """A trained network and its evaluation's attacks, ready for `mi_at.results.measure.measure`.

    Args:
        trained: a checkpoint of mi_at, or weights that were trained elsewhere.
        attacks: as `build_attacks` gives them.
        config: resolved; its `evaluation` and `dataset`, and `model` for weights.
        data: set up for "test"; guides of the representation attack are drawn from its first images.
        device: where to put the network.
        surrogate: that transfer attacks are made on.

    Raises:
        CheckpointError: as `load` and `load_own`.
        ValueError: as `bind`, and where mutual information is to be estimated without trained estimators.
    """
    evaluation, defense = config["evaluation"], None
    adaptive: dict[str, EvalAttack] | None = None
    variants: dict[str, nn.Module] | None = None
    if isinstance(trained, Weights):
        net, variants = load_own(trained, config["model"], device), {}
    elif any(evaluation.get(name) for name in ("audit", "mutual_information")) or any(
        _needs_defense(attack) for attack in attacks.values()
    ):
        defense = load_defense(trained, device)
        net = defense.net
        if evaluation.get("audit"):
            raw = load_raw(trained, device)
            variants = {} if raw is None else {"the raw weights": raw}
            adaptive = adaptive_attacks(defense, evaluation)
    else:
        net = load(trained, device)
    bound = bind(attacks, surrogate=surrogate, defense=defense, guides=lambda: guides_of(data.test_dataloader()))
    wanted = list(evaluation.get("mutual_information") or ())
    if wanted and not isinstance(defense, MIEstimators):
        found = "a network trained elsewhere" if defense is None else type(defense).__name__
        raise ValueError(
            f"evaluation.mutual_information={wanted}: {found} has no trained estimators; evaluate a run of "
            "defense=mi_estimators, which trains them on a network and carries both"
        )
    critics = {name: getattr(defense, name) for name in CRITICS} if wanted else None
    return Served(net, bound, adaptive, variants, critics)


def guides_of(batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images and labels of a split, `GUIDES` at most, on the CPU."""
    x, y, found = [], [], 0
    for batch in batches:
        x.append(batch.x.cpu())
        y.append(batch.y.cpu())
        found += len(batch)
        if found >= GUIDES:
            break
    return torch.cat(x)[:GUIDES], torch.cat(y)[:GUIDES]


def _needs_defense(attack: EvalAttack) -> bool:
    return hasattr(attack, "with_training_loss") or getattr(attack, "tap", None) == AUTO_TAP


def regularised_tap(defense: Defense | None) -> str:
    """The last layer that a defense and its terms look at; where none is known, the features before the head."""
    return defense.needed_taps[-1] if defense is not None and defense.needed_taps else FEATURES


def adaptive_attacks(defense: Defense, evaluation: Mapping[str, Any]) -> dict[str, EvalAttack]:
    """The attacks made for a defense that its audit asks for, in the ball of an evaluation.

    Args:
        defense: with its network.
        evaluation: resolved; its `eps`, `norm` and `step_size`.

    Returns:
        By name: on its training loss and, where the network has taps, on the layer that it regularises.
    """
    ball = {key: evaluation[key] for key in ("eps", "norm", "step_size")}
    wanted: dict[str, EvalAttack] = {"adaptive": Adaptive(**ball, steps=50)}
    if hasattr(defense.net, "forward_taps"):
        wanted["feature_shift"] = FeatureShift(**ball, steps=50, tap=AUTO_TAP)
    return bind(wanted, defense=defense)


def load_surrogate(path: str | Path, dataset: Mapping[str, Any], device: str | torch.device = "cpu") -> Surrogate:
    """The network of another run, to make transfer attacks on.

    Args:
        path: its checkpoint.
        dataset: the resolved `dataset` node of the network under attack; of `AT_HAND` nothing is compared.
        device: where to put it.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
        ValueError: it was trained on another data set.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.config
    theirs = config["dataset"]
    for key in ("name", "num_classes", "channels", "image_size"):
        if dataset.get("name") != AT_HAND and theirs.get(key) != dataset.get(key):
            raise ValueError(
                f"evaluation.surrogate={path} was trained on {theirs.get('name')} ({key} {theirs.get(key)}), but the "
                f"network under attack on {dataset.get('name')} ({key} {dataset.get(key)}): choose one of the same data"
            )
    chosen = config.get("choices") or {}
    name = "-".join(str(chosen.get(group, group)) for group in ("defense", "dataset", "model"))
    return Surrogate(load(checkpoint, device), name)
