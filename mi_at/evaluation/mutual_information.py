"""Mutual information of images and outputs as trained estimators see it over a test set (NAMID, Figures 2 and 4).

A natural estimator E_n pairs logits with an image, an adversarial one E_a with the noise x~ - x (`mi_at.estimators`).
Of an attack's images x~ these are estimated, per sample, by Donsker and Varadhan over the other images of a batch:

    natural_clean I(x, h(x))          natural_adversarial I(x, h(x~))          own I(x~, h(x~))
    adversarial_clean E_a(x~ - x, h(x))          adversarial_adversarial E_a(x~ - x, h(x~))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.estimators.local_dim import pair_scores
from mi_at.evaluation.outcomes import EvaluationError
from mi_at.functional.variational import local_donsker_varadhan

CRITICS = ("natural", "adversarial")


def mutual_information(
    net: nn.Module,
    critics: Mapping[str, Any],
    x: Tensor,
    x_adv: Tensor,
    *,
    batch_size: int = 400,
) -> dict[str, float]:
    """The five estimates of an attack, means over the samples, and their smallest single values.

    Args:
        net: the reference network, logits out, in eval mode on its device.
        critics: "natural" and "adversarial" -> a `LocalDIM` that was trained on its outputs.
        x: [n, C, H, W] float in [0, 1].
        x_adv: [n, C, H, W], the same images under attack.
        batch_size: samples among which negatives are found; the estimate depends on it. A last one of one is left out.

    Returns:
        {"n", "batch", the five estimates, "natural_least", "adversarial_least", "least"} in nats: the smallest value
        of a sample over the natural estimates of x, the adversarial ones, and the three of the standard information,
        which the paper's figures put at 0.

    Raises:
        EvaluationError: missing estimators, fewer than two images, or images of another shape.
    """
    if set(critics) != set(CRITICS):
        raise EvaluationError(
            "evaluation.mutual_information needs trained estimators: it evaluates defense=mi_estimators alone"
        )
    if len(x) < 2 or x.shape != x_adv.shape:
        raise EvaluationError(f"images {tuple(x.shape)} and {tuple(x_adv.shape)}: expected two or more, of one shape")
    device = next(net.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    with attacking(net), attacking(critics["natural"]), attacking(critics["adversarial"]), torch.no_grad():
        for clean, attacked in zip(x.split(batch_size), x_adv.split(batch_size), strict=True):
            if len(clean) < 2:
                break
            clean, attacked = clean.float().to(device), attacked.float().to(device)
            outputs = {"clean": net(clean).float(), "adversarial": net(attacked).float()}
            found = {
                **{f"natural_{view}": _estimate(critics["natural"], clean, z) for view, z in outputs.items()},
                "own": _estimate(critics["natural"], attacked, outputs["adversarial"]),
                **{
                    f"adversarial_{view}": _estimate(critics["adversarial"], attacked - clean, z)
                    for view, z in outputs.items()
                },
            }
            for name, values in found.items():
                parts.setdefault(name, []).append(values.double().cpu())
    estimates = {name: torch.cat(values) for name, values in parts.items()}
    least = {name: float(values.min()) for name, values in estimates.items()}
    return {
        "n": len(estimates["own"]),
        "batch": batch_size,
        **{name: float(values.mean()) for name, values in estimates.items()},
        **{f"{kind}_least": min(v for name, v in least.items() if name.startswith(kind)) for kind in CRITICS},
        "least": min(v for name, v in least.items() if not name.startswith("adversarial")),
    }


def _estimate(critic: Any, images: Tensor, outputs: Tensor) -> Tensor:
    return local_donsker_varadhan(pair_scores(critic.embed_outputs(outputs), critic.embed_images(images)))
