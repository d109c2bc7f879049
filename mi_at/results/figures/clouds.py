"""Clouds of points: outputs on a simplex, features by t-SNE, the information plane."""

from __future__ import annotations

import math
import random

import numpy as np

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.figures.canvas import Panel, Scale, below, blend, panels, scale_of, text
from mi_at.results.figures.readings import Drawing, arrays, by_row, epochs
from mi_at.results.measured import Filled
from mi_at.results.page_html import SERIES, Html, tag

OUTPUTS, PLANE = "outputs.npz", "information_plane.jsonl"
HEIGHT = 150
SHOWN = 1500  # points of a panel, at most: more say nothing, and t-SNE takes minutes
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])


def three_classes(labels: np.ndarray) -> list[int]:
    """Three of the classes that there are, drawn with seed 0 (robust NCMI, G.1, does not say which).

    Example:
        >>> three_classes(np.array([0, 1, 2, 0]))
        [0, 1, 2]
    """
    known = sorted({int(label) for label in labels})
    return sorted(random.Random(0).sample(known, min(3, len(known))))


def on_simplex(logits: np.ndarray) -> np.ndarray:
    """Where the softmax of three logits lies in the triangle of `CORNERS`.

    Args:
        logits: [n, 3].

    Returns:
        [n, 2].

    Example:
        >>> on_simplex(np.array([[0.0, 0.0, 0.0]])).round(3)
        array([[0.5  , 0.289]])
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    placed: np.ndarray = (shifted / shifted.sum(axis=1, keepdims=True)) @ CORNERS
    return placed


def simplex(filled: Filled) -> Drawing:
    """Outputs of three classes under an attack, a triangle for each cell (robust NCMI, Figures 7 and 8)."""
    found, missing = arrays(filled, OUTPUTS)
    (attack,) = filled.table.more
    shown = [cell for cell in filled.table.cells.values() if cell.name in found]
    if not shown:
        return Drawing([], 0, missing=missing)
    classes = three_classes(found[shown[0].name]["label"])
    frames, parts = panels(len(shown), 0, HEIGHT), list[Html | None]()
    unit = Scale("", 0, 1)
    for cell, (left, top, width, height) in zip(shown, frames, strict=True):
        own = found[cell.name]
        side = min(width + 10, height / CORNERS[2, 1])
        panel = Panel(left - 15, top - 4, side, side, unit, unit)
        logits, label = own[f"{attack}.logits"], own["label"][: len(own[f"{attack}.logits"])]
        parts.append(text(cell.row, left - 15, top - 19, "head"))
        corners = " ".join(f"{panel.x(x)},{panel.y(y)}" for x, y in CORNERS)
        parts.append(tag("polygon", points=corners, class_="edge"))
        for place, kind in enumerate(classes):
            chosen = label == kind
            parts.append(_cloud(panel, on_simplex(logits[chosen][:, classes]), place))
        for (x, y), kind, anchor in zip(CORNERS, classes, ("start", "end", "middle"), strict=False):
            parts.append(text(str(kind), panel.x(x), panel.y(y) + (14 if y == 0 else -4), "tick", anchor))
    drawn = Drawing(parts, below(frames), [f"class {kind}" for kind in classes], missing=missing)
    drawn.notes.append(f"softmax over the three classes' logits under {attack}; the classes were drawn with seed 0")
    return drawn


def tsne(filled: Filled) -> Drawing:
    """Features of clean images in two dimensions, a panel for each cell, a colour for each class (IB-RAR, Figure 3)."""
    from sklearn.manifold import TSNE

    found, missing = arrays(filled, OUTPUTS)
    shown = [cell for cell in filled.table.cells.values() if cell.name in found]
    if not shown:
        return Drawing([], 0, missing=missing)
    classes = sorted({int(label) for own in found.values() for label in own["label"]})
    frames, parts = panels(len(shown), 0, HEIGHT), list[Html | None]()
    for cell, (left, top, width, height) in zip(shown, frames, strict=True):
        own = found[cell.name]
        features = own[f"{CLEAN}.features"][:SHOWN].astype(np.float64)
        label = own["label"][: len(features)]
        perplexity = min(30.0, (len(features) - 1) / 3)
        placed = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
        across, up = (scale_of("", placed[:, axis]) for axis in (0, 1))
        panel = Panel(left - 20, top, width + 20, height + 20, across, up)
        parts.append(text(cell.row, left - 20, top - 8, "head"))
        parts.append(tag("rect", x=left - 20, y=top, width=width + 20, height=height + 20, class_="edge"))
        clouds = [placed[label == kind] for kind in classes]
        parts += [_cloud(panel, cloud, place) for place, cloud in enumerate(clouds)]
        for kind, cloud in zip(classes, clouds, strict=True):
            if len(cloud):
                x, y = np.median(cloud, axis=0)
                parts.append(text(str(kind), panel.x(x), panel.y(y) + 4, "head halo", "middle"))
    drawn = Drawing(parts, below(frames), missing=missing)
    count = min(len(own["label"]) for own in found.values())
    drawn.notes.append(
        f"t-SNE (perplexity 30, seed 0) of the features before the head, {min(count, SHOWN)} clean test images; "
        "a number stands in the middle of its class"
    )
    return drawn


def information_plane(filled: Filled) -> Drawing:
    """HSIC(X, T) across and HSIC(Y, T) up during training, a panel for each cell (IB-RAR, Figure 5)."""
    found, missing = epochs(filled, PLANE)
    shown = [cell for cells in by_row(filled).values() for cell in cells if found.get(cell.name)]
    if not shown:
        return Drawing([], 0, missing=missing)
    every = [line for cell in shown for line in found[cell.name]]
    across, up = (scale_of(name, [line[key] for line in every]) for name, key in (("I(X, T)", "xt"), ("I(Y, T)", "yt")))
    frames, parts = panels(len(shown), 0, HEIGHT), list[Html | None]()
    for cell, frame in zip(shown, frames, strict=True):
        panel = Panel(*frame, across=across, up=up, title=cell.row)
        parts += panel.frame()
        lines = found[cell.name]
        for number, line in enumerate(lines):
            colour = blend(number / max(1, len(lines) - 1))
            parts.append(tag("circle", cx=panel.x(line["xt"]), cy=panel.y(line["yt"]), r=2.2, fill=colour))
    y = below(frames)
    parts.append(text("start", 4, y + 8, "tick"))
    parts += [tag("rect", x=36 + 3 * step, y=y, width=3, height=9, fill=blend(step / 29)) for step in range(30)]
    parts.append(text("end of training", 132, y + 8, "tick"))
    drawn = Drawing(parts, y + 18, missing=missing, of_lines=False)
    drawn.notes.append(
        "normalised HSIC of a batch of training images, in place of mutual information; of the first seed"
    )
    return drawn


def _cloud(panel: Panel, points: np.ndarray, place: int) -> Html:
    kind = "fill" if place < SERIES else "hollow"  # more classes than colours
    dots = [tag("circle", cx=panel.x(x), cy=panel.y(y), r=1.6, class_=kind, opacity=".6") for x, y in points[:SHOWN]]
    return tag("g", *dots, class_=f"s{place % SERIES}")
