"""What a network makes of single images, in a file beside a record: for figures that show points or pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.evaluation.outcomes import CLEAN, EvaluationResult
from mi_at.results.records import RecordError, write_atomically

OUTPUTS = "outputs.npz"


def write_outputs(
    path: str | Path,
    net: nn.Module,
    x: Tensor,
    result: EvaluationResult,
    *,
    attacks: Mapping[str, Any],
    of: Sequence[str],
    n: int | None = None,
    features: bool = False,
    images: int = 0,
) -> Path:
    """Write logits of clean and attacked images, whole or not at all.

    The file holds "label" [n] and "index" [n], and for each name `<name>.logits` [n, K] float32; where they are wanted
    `<name>.features` [n, D] float16, which the head reads, and `<name>.x` [images, C, H, W] float32; of the
    representation attack then also `<name>.guide`. An attack that ran on fewer images has fewer rows.

    Args:
        path: of the file; `OUTPUTS` beside the record by custom.
        net: logits out; in eval mode on its device.
        x: [N, C, H, W] float in [0, 1], the clean images of the evaluation.
        result: with the images of the attacks.
        attacks: by name, as they ran.
        of: "clean", and names of attacks.
        n: images, from the first on; None: all.
        features: keep them; the network has a tap "features".
        images: keep as many.

    Returns:
        The path.

    Raises:
        RecordError: features of a network without taps, or a folder that cannot be written.
    """
    if features and "features" not in getattr(net, "tap_names", ()):
        raise RecordError(
            f"evaluation.outputs.features=true: {type(net).__name__} has no tap features: use a network of mi_at.models"
        )
    arrays: dict[str, np.ndarray] = {"label": result.label[:n].numpy(), "index": result.index[:n].numpy()}
    for name in of:
        shown = (x if name == CLEAN else result.images[name])[:n]
        arrays |= {f"{name}.{part}": values for part, values in _of(net, shown, features, result.batch_size).items()}
        if images:
            arrays[f"{name}.x"] = shown[:images].float().numpy()
            attack: Any = attacks.get(name)
            if getattr(attack, "guides", None) is not None:
                first = slice(0, len(arrays[f"{name}.x"]))
                chosen = attack.choose(result.label[first], ids=result.index[first], seed=result.seed)
                arrays[f"{name}.guide"] = attack.guides[chosen].float().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def _of(net: Any, x: Tensor, features: bool, batch_size: int) -> dict[str, np.ndarray]:
    device = next((parameter.device for parameter in net.parameters()), x.device)
    logits, below = [], []
    with attacking(net), torch.no_grad():
        for batch in x.split(batch_size):
            if features:
                out, taps = net.forward_taps(batch.to(device), ("features",))
                below.append(taps["features"].flatten(1).half().cpu())
            else:
                out = net(batch.to(device))
            logits.append(out.float().cpu())
    found = {"logits": torch.cat(logits).numpy()}
    return found | ({"features": torch.cat(below).numpy()} if features else {})
