"""outputs.npz: logits, features, images and guides are those of the evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.representation import Representation
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.models.cnn import CNNTiny
from mi_at.results.outputs import write_outputs
from mi_at.results.records import RecordError, read_outcomes
from tests.evaluation.nets import images, loader, small_conv


def evaluated() -> tuple[CNNTiny, torch.Tensor, dict[str, object], EvaluationResult]:
    torch.manual_seed(0)
    net = CNNTiny(num_classes=3, in_channels=1, image_size=8).eval()
    x = torch.rand(12, 1, 8, 8)
    y = torch.arange(12) % 3
    attacks = {
        "fgsm": FGSM(eps=0.1),
        "ara": Representation(eps=0.1, steps=2).with_guides(torch.rand(6, 1, 8, 8), torch.arange(6) % 3),
    }
    result = evaluate(net, attacks, loader(x, y), progress=False, keep_images=list(attacks), n_of={"ara": 5}, seed=3)
    return net, x, dict(attacks), result


def test_the_file_holds_what_the_network_makes_of_the_images(tmp_path: Path) -> None:
    net, x, attacks, result = evaluated()
    names = ["clean", "fgsm", "ara"]
    path = write_outputs(tmp_path / "o.npz", net, x, result, attacks=attacks, of=names, n=8, features=True, images=2)
    found = read_outcomes(path)
    assert found["label"].tolist() == result.label[:8].tolist()
    shown = {"clean": x[:8], "fgsm": result.images["fgsm"][:8], "ara": result.images["ara"]}
    for name, batch in shown.items():
        with torch.no_grad():
            logits, taps = net.forward_taps(batch, ["features"])
        np.testing.assert_allclose(found[f"{name}.logits"], logits.numpy(), atol=1e-5)
        np.testing.assert_allclose(found[f"{name}.features"], taps["features"].numpy(), atol=1e-2)
        np.testing.assert_array_equal(found[f"{name}.x"], batch[:2].numpy())
    assert not np.array_equal(found["fgsm.x"], found["clean.x"])
    attack: Representation = attacks["ara"]  # type: ignore[assignment]
    assert attack.guides is not None
    chosen = attack.choose(result.label[:2], ids=result.index[:2], seed=3)
    np.testing.assert_array_equal(found["ara.guide"], attack.guides[chosen].numpy())
    assert "fgsm.guide" not in found


def test_only_what_is_wanted_is_kept(tmp_path: Path) -> None:
    net, x, attacks, result = evaluated()
    found = read_outcomes(write_outputs(tmp_path / "o.npz", net, x, result, attacks=attacks, of=["fgsm"]))
    assert set(found) == {"label", "index", "fgsm.logits"}
    assert len(found["fgsm.logits"]) == 12


def test_features_of_a_network_without_taps_are_refused(tmp_path: Path) -> None:
    net, x = small_conv(), images(4)
    result = evaluated()[-1]
    with pytest.raises(RecordError, match="has no tap features"):
        write_outputs(tmp_path / "o.npz", net, x, result, attacks={}, of=["clean"], features=True)
