"""Pictures: images of an evaluation in rows and columns."""

from __future__ import annotations

import numpy as np
import torch

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.figures.canvas import LINE, WIDTH, text
from mi_at.results.figures.readings import Drawing, arrays
from mi_at.results.measured import Filled
from mi_at.results.page_html import Html, tag
from mi_at.results.page_pictures import data_uri, picture

OUTPUTS = "outputs.npz"
SHOWN, GAP = 4, 6  # images, and units between them


def manipulations(filled: Filled) -> Drawing:
    """Guide, source, and what each representation attack makes of the source (shared_info, Figure 4).

    Under a picture stands the class that the network takes it for; the source's is below the source.
    """
    found, missing = arrays(filled, OUTPUTS)
    parts: list[Html | None] = []
    y = 0.0
    attacks = list(filled.table.more)
    side = (WIDTH - GAP * (len(attacks) + 1)) / (len(attacks) + 2)
    for cell in filled.table.cells.values():
        own = found.get(cell.name)
        if own is None:
            continue
        said = _said(filled, cell.name)
        heads = [("guide", ""), ("source", ""), *(said[attack] for attack in attacks)]
        for place, (first, second) in enumerate(heads):
            parts.append(text(first, place * (side + GAP), y + 10))
            parts.append(text(second, place * (side + GAP), y + 10 + LINE, "tick"))
        y += 2 * LINE + 6
        for row in range(min(SHOWN, len(own[f"{CLEAN}.x"]))):
            images = [own[f"{attacks[0]}.guide"][row], own[f"{CLEAN}.x"][row]]
            images += [own[f"{attack}.x"][row] for attack in attacks]
            words = ["", _class(own, CLEAN, row), *(_class(own, attack, row) for attack in attacks)]
            for place, (image, word) in enumerate(zip(images, words, strict=True)):
                x = round(place * (side + GAP), 1)
                parts.append(_image(image, x, y, side))
                parts.append(text(word, x, y + side + 12, "head" if place > 1 and word != words[1] else "tick"))
            y += side + LINE + 6
    drawn = Drawing(parts, y, missing=missing)
    drawn.notes.append("below each: the class it is taken for, bold where that is not the source's")
    return drawn


def _said(filled: Filled, cell: str) -> dict[str, tuple[str, str]]:
    """What each attack was: its layer and its radius in 255ths."""
    rows = filled.records[cell][0].record.attacks
    return {row.name: (str(row.description.get("tap", row.name)), f"σ {255 * float(row.eps or 0):.3g}") for row in rows}


def _class(own: dict[str, np.ndarray], name: str, row: int) -> str:
    return f"class {int(own[f'{name}.logits'][row].argmax())}"


def _image(image: np.ndarray, x: float, y: float, side: float) -> Html:
    made = picture(torch.from_numpy(image.astype(np.float32)))
    size = round(side, 1)
    return tag("image", href=data_uri(made), x=x, y=round(y, 1), width=size, height=size, class_="pixels")
