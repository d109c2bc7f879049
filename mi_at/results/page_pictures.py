"""Adversarial examples as pictures within a page: clean, adversarial, and their difference made visible."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mi_at.evaluation.outcomes import Examples
from mi_at.results.page_html import Html, tag

SMALLEST = 56  # pixels that a picture is enlarged to, at least, each of its own pixels a square


def picture(image: Tensor) -> Image.Image:
    """An image as Pillow knows it; what is neither grey nor RGB is shown as its mean over channels.

    Args:
        image: [C, H, W] float; outside [0, 1] it is cut, NaN is mid-grey.

    Example:
        >>> picture(torch.zeros(3, 8, 8)).size, picture(torch.zeros(5, 8, 8)).mode
        ((56, 56), 'L')
    """
    image = image.detach().float().cpu()
    if image.shape[0] not in (1, 3):
        image = image.mean(dim=0, keepdim=True)
    pixels = (image.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
    factor = max(1, -(-SMALLEST // max(made.size)))
    return made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)


def amplification(x: Tensor, x_adv: Tensor) -> float:
    """By how much differences are multiplied so that the largest is just black or white: two digits, rounded down.

    Example:
        >>> amplification(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 8 / 255))
        15.0
    """
    largest = float((x_adv.float() - x.float()).nan_to_num(0.0).abs().max()) if x.numel() else 0.0
    if not largest:
        return 1.0
    factor = 0.5 / largest * (1 + 1e-6)
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return float(f"{math.floor(factor / unit) * unit:.2g}")


def difference(x: Tensor, x_adv: Tensor, factor: float) -> Image.Image:
    """The difference of two images, multiplied, around mid-grey.

    Args:
        x: [C, H, W] in [0, 1].
        x_adv: the same image under attack.
        factor: what their difference is multiplied by.
    """
    return picture(0.5 + factor * (x_adv.float() - x.float()))


def strip(examples: Examples, place: int, factor: float) -> Image.Image:
    """One example as one picture: clean, adversarial and difference side by side, for a logger."""
    x, x_adv = examples.x[place], examples.x_adv[place]
    parts = [part.convert("RGB") for part in (picture(x), picture(x_adv), difference(x, x_adv, factor))]
    gap = 4
    whole = Image.new("RGB", (sum(part.width for part in parts) + 2 * gap, parts[0].height), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + gap
    return whole


def data_uri(image: Image.Image) -> str:
    """A picture as an address that holds it: PNG, base64.

    Example:
        >>> data_uri(Image.new("L", (1, 1)))[:22]
        'data:image/png;base64,'
    """
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def caption(examples: Examples, place: int) -> str:
    """An example in words.

    The place in the split, the label, and what the network takes it for.
    """
    index, label, prediction = (int(getattr(examples, part)[place]) for part in ("index", "label", "prediction"))
    sure = float(examples.confidence[place])
    said = f", {100 * sure:.1f} % sure" if math.isfinite(sure) else ""
    return f"image {index}: {label}, under attack {prediction}{said}"


def triples(name: str, examples: Examples) -> Html:
    """A list of examples, each three pictures with their labels.

    Args:
        name: of the attack.
        examples: one or more.
    """
    factor = amplification(examples.x, examples.x_adv)
    items = []
    for place in range(len(examples.label)):
        x, x_adv = examples.x[place], examples.x_adv[place]
        index, label, clean, wrong = (
            int(getattr(examples, part)[place]) for part in ("index", "label", "clean_prediction", "prediction")
        )
        sure = float(examples.confidence[place])
        shown = (
            (
                picture(x),
                f"image {index}, clean, of class {label}",
                f"#{index}: class {label}, taken for {clean}",
                None,
            ),
            (
                picture(x_adv),
                f"image {index} after {name}, taken for class {wrong}",
                f"taken for {wrong}" + (f", {100 * sure:.0f} % sure" if math.isfinite(sure) else ""),
                "wrong",
            ),
            (
                difference(x, x_adv, factor),
                f"what {name} changed in image {index}, {factor:g} times enlarged",
                f"difference × {factor:g}",
                None,
            ),
        )
        columns = (
            tag(
                "div",
                tag("img", src=data_uri(image), alt=alt, width=image.width, height=image.height),
                tag("span", words, class_=kind),
            )
            for image, alt, words, kind in shown
        )
        items.append(tag("li", tag("div", *columns, class_="triple")))
    return tag("ul", *items, class_="examples")
