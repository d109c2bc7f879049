"""Width and distance of the clusters of outputs over a whole set: clean, under an attack, and in the worst case.

What is measured is Yang et al.'s geometry under attack (robust NCMI, section 3.3, eq. 15-18): CMI, separation and their
ratio, of the outputs of **every** sample, those that are wrong when clean among them. An attack's images are its last
iterates, without early stopping; where it gave up they are the clean ones (AutoAttack).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.evaluation.outcomes import CLEAN, EvaluationError
from mi_at.evaluation.robust_ncmi import robust_ncmi
from mi_at.metrics.clusters import ConditionalMutualInformation, NormalizedCMI, Separation

ROBUST = "robust_ncmi"
"""The name of the worst case beside those of the attacks."""


@dataclass(frozen=True, kw_only=True)
class Information:
    """Of one set of outputs.

    Attributes:
        n: samples.
        cmi: I(X; Y^ | Y) in [0, ln K] nats, the width of the clusters; low is robust.
        separation: Gamma >= 0 in nats, the distance between clusters; high is robust.
        ncmi: cmi / separation; low is robust. None where nothing separates (a separation of 0).
    """

    n: int
    cmi: float
    separation: float
    ncmi: float | None


def information(net: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 500) -> Information:
    """CMI, separation and NCMI of a network's outputs on images.

    Args:
        net: a classifier, logits out; evaluated in eval mode on its device, left as it was.
        x: [n, C, H, W] float in [0, 1], clean or attacked.
        y: [n] int64.
        batch_size: samples of a forward.

    Returns:
        Values in float64.

    Raises:
        EvaluationError: fewer than two classes, labels of another length, or outputs that are no finite [n, K] logits.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = nn.init.constant_(net[1].weight, 0.0)
        >>> found = information(net, torch.rand(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]))
        >>> found.cmi, round(found.separation, 4)  # equal outputs: no width, and half of the pairs ln 2 apart
        (0.0, 0.3466)
    """
    if len(x) != len(y) or not len(y) or not bool((y != y[0]).any()):
        raise EvaluationError(
            f"NCMI compares classes: expected samples of 2 classes or more, got {len(x)} images and {len(y)} "
            f"labels of {len(y.unique())} classes"
        )
    device = next((parameter.device for parameter in net.parameters()), x.device)
    metrics: list[Any] = []
    with attacking(net), torch.no_grad():
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = net(images.to(device)).double().cpu()
            if logits.ndim != 2 or len(logits) != len(images) or not bool(logits.isfinite().all()):
                raise EvaluationError(
                    f"the network gave {tuple(logits.shape)} for {len(images)} images, or values that are not finite: "
                    "expected finite logits [n, classes]"
                )
            if not metrics:
                kinds = (ConditionalMutualInformation, Separation, NormalizedCMI)
                metrics = [kind(num_classes=logits.shape[1]) for kind in kinds]
            for metric in metrics:
                metric.update(logits.softmax(dim=1), labels.cpu())
    cmi, separation, ncmi = (float(metric.compute()) for metric in metrics)
    return Information(n=len(y), cmi=cmi, separation=separation, ncmi=ncmi if separation > 0 else None)


def full_set_information(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    of: Iterable[str],
    images: Mapping[str, Tensor],
    robust: Mapping[str, Any] | None = None,
    batch_size: int = 500,
) -> dict[str, dict[str, Any]]:
    """The information of the clean outputs and of those under attacks, as a record keeps it.

    Args:
        net: as `information`.
        x: [N, C, H, W] float in [0, 1], the clean images.
        y: [N] int64.
        of: "clean", and names of attacks.
        images: attack -> [n, C, H, W], the attacked images of the first n samples, every one of them.
        robust: options of `mi_at.evaluation.robust_ncmi.robust_ncmi`, which then runs too; `n` among them: on the first
            n samples. None: it does not.
        batch_size: samples of a forward.

    Returns:
        Name -> {"n", "cmi", "separation", "ncmi"} in nats; and under "robust_ncmi" what the maximisation found.

    Raises:
        EvaluationError: a name without images, or as `information` and `robust_ncmi`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in of:
        if name != CLEAN and name not in images:
            known = ", ".join([CLEAN, *images])
            raise EvaluationError(f"information of {name!r}: expected {CLEAN} or an attack of the evaluation ({known})")
        attacked = x if name == CLEAN else images[name]
        found[name] = asdict(information(net, attacked, y[: len(attacked)], batch_size=batch_size))
    if robust is not None:
        options = dict(robust)
        n = options.pop("n", None) or len(y)
        best = robust_ncmi(net, x[:n], y[:n], batch_size=batch_size, **options)
        found[ROBUST] = {
            "n": min(n, len(y)),
            "ncmi": best.value,
            "cmi": best.cmi,
            "separation": best.separation,
            "clean": best.clean,
            "history": list(best.history),
            **options,
        }
    return found
