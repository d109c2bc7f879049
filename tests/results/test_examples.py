"""Adversarial examples beside a record, and as pictures in a page."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mi_at.results import page_pictures
from mi_at.results.examples import FIELDS, read_examples, write_examples
from mi_at.results.records import RecordError
from tests.results import pages


def test_examples_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    result = pages.evaluation()
    known = pages.examples(result, channels=3)
    path = write_examples(tmp_path / "run" / "examples.npz", replace(result, examples=known))
    found = read_examples(path)
    assert list(found) == list(known)
    for name, examples in known.items():
        for part in FIELDS:
            a, b = getattr(examples, part), getattr(found[name], part)
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    assert read_examples(write_examples(tmp_path / "none.npz", {})) == {}
    assert [item.name for item in tmp_path.iterdir()] == ["run", "none.npz"] or len(list(tmp_path.iterdir())) == 2


def test_names_with_points(tmp_path: Path) -> None:
    known = pages.examples(pages.evaluation())["fgsm"]
    assert list(read_examples(write_examples(tmp_path / "e.npz", {"pgd 0.3, ce": known}))) == ["pgd 0.3, ce"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    known = pages.examples(pages.evaluation())
    path = write_examples(tmp_path / "examples.npz", known)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RecordError, match=r"examples\.npz"):
        read_examples(path)
    np.savez(path, **{"fgsm.index": np.zeros(2)})
    with pytest.raises(RecordError, match=r"fgsm has index, expected index, label"):
        read_examples(path)
    wrong = replace(known["fgsm"], label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(RecordError, match=r"examples of fgsm: expected k labels"):
        write_examples(path, {"fgsm": wrong})


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="could not write"):
        write_examples(tmp_path / "file" / "examples.npz", {})


# ---------------------------------------------------------------- pictures


def pixels(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True))))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_the_image(channels: int) -> None:
    image = torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pixels(page_pictures.data_uri(page_pictures.picture(image)))
    factor = found.shape[0] // 8
    wanted = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    assert (found[::factor, ::factor] == wanted).all()
    assert (found[factor - 1 :: factor, factor - 1 :: factor] == wanted).all(), "each of its pixels is a square"


def test_a_large_picture_is_not_enlarged() -> None:
    assert page_pictures.picture(torch.zeros(3, 60, 80)).size == (80, 60)


def test_differences_are_amplified_around_grey() -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 8 / 255
    x_adv[1, 0, 1, 1] -= 8 / 255
    factor = page_pictures.amplification(x, x_adv)
    assert factor == 15
    first, second = (np.asarray(page_pictures.difference(a, b, factor)) for a, b in zip(x, x_adv, strict=True))
    assert first[0, 0] >= 245
    assert second[-1, -1] <= 10
    assert first[-1, -1] == second[0, 0] == 128
    assert page_pictures.amplification(x, x) == 1
    assert 0.5 >= page_pictures.amplification(x, x + 0.3) * 0.3 > 0.45
    assert page_pictures.amplification(x, x + 0.003) == 160


def test_triples_show_labels_and_pictures() -> None:
    known = pages.examples(pages.evaluation(), channels=3)["fgsm"]
    text = page_pictures.triples("fgsm", known)
    uris = re.findall(r'src="([^"]+)"', text)
    assert len(uris) == 9
    for place in range(3):
        clean, attacked, change = (pixels(uri)[::7, ::7] for uri in uris[3 * place : 3 * place + 3])
        for image, wanted in ((clean, known.x[place]), (attacked, known.x_adv[place])):
            assert (image == (wanted * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).all()
        assert (
            np.sign(change.astype(int) - 128) == np.sign((known.x_adv - known.x)[place].permute(1, 2, 0).numpy())
        ).all()
    assert "#5: class 1, taken for 1" in text
    assert "taken for 2, 75 % sure" in text
    assert "difference × 10" in text
    assert 'alt="image 5 after fgsm, taken for class 2"' in text
