"""Literal transcriptions of C&W l2, DDN, NI-FGSM and TI-DIM: one sample, pixels in Python loops, float64.

Sources: Carlini and Wagner 2017, section VI.A, and Kingma and Ba 2015, Algorithm 1; Rony et al. 2019, Algorithm 1,
with the projected delta carried on and the cosine of their section 5; Lin et al. 2020, eq. 6-8; Dong et al. 2019,
eq. 8-11, and Xie et al. 2019, section 3.2. Each returns the images that the network is shown, in order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.references.attacks import norm

Net = Callable[[Tensor], Tensor]


def _cross_entropy_gradient(net: Net, image: Tensor, y: int) -> list[float]:
    leaf = image.clone().requires_grad_(True)
    z = net(leaf)[0]
    loss = -z[y] + torch.log(sum(torch.exp(z[k]) for k in range(len(z))))
    return torch.autograd.grad(loss, leaf)[0].reshape(-1).tolist()


def misclassified(net: Net, image: Tensor, y: int) -> bool:
    z = net(image)[0].tolist()
    return max(range(len(z)), key=lambda k: z[k]) != y


def nearest(net: Net, x: Tensor, y: int, images: list[Tensor]) -> Tensor:
    """The misclassified one with the smallest l2 distance, x if there is none."""
    best, best_distance = x, math.inf
    for image in [x, *images]:
        distance = norm(image - x, "l2")
        if misclassified(net, image, y) and distance < best_distance:
            best, best_distance = image, distance
    return best


def cw_l2(net: Net, x: Tensor, y: int, *, c: float, kappa: float, steps: int, lr: float, shrink: float) -> list[Tensor]:
    """min_w |x'(w) - x|^2 + c max(z_y - max_{k != y} z_k, -kappa) by Adam: steps + 1 iterates."""
    origin = x.reshape(-1).tolist()
    w = [math.atanh((2 * v - 1) * (1 - shrink)) for v in origin]
    m, v = [0.0] * len(w), [0.0] * len(w)
    images = []
    for t in range(1, steps + 2):
        image = torch.tensor([0.5 * (math.tanh(a) + 1) for a in w], dtype=x.dtype).reshape(x.shape)
        images.append(image)
        leaf = image.clone().requires_grad_(True)
        z = net(leaf)[0]
        other = max((z[k] for k in range(len(z)) if k != y), key=lambda v: float(v.detach()))
        f = z[y] - other
        # f is cut off below at -kappa, where its gradient is zero
        slope = torch.autograd.grad(f, leaf)[0].reshape(-1).tolist() if float(f.detach()) > -kappa else [0.0] * len(w)
        for i in range(len(w)):
            at = 0.5 * (math.tanh(w[i]) + 1)
            g = (2 * (at - origin[i]) + c * slope[i]) * 0.5 * (1 - math.tanh(w[i]) ** 2)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            w[i] -= lr * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    return images


def cw_l2_search(net: Net, x: Tensor, y: int, *, c: float, binary_search: int, **settings: float) -> list[Tensor]:
    """All iterates of all searched c: times 10 until one succeeds, then halving the interval."""
    images: list[Tensor] = []
    low, high = 0.0, math.inf
    for _ in range(binary_search):
        now = cw_l2(net, x, y, c=c, **settings)
        images += now
        if any(misclassified(net, image, y) for image in now):
            high = c
        else:
            low = c
        c = c * 10 if high == math.inf else (low + high) / 2
    return images


def ddn(net: Net, x: Tensor, y: int, *, steps: int, gamma: float, init_norm: float, levels: int | None) -> list[Tensor]:
    """steps + 1 iterates, the clean image first."""
    origin = x.reshape(-1).tolist()
    corner = math.sqrt(sum(max(v, 1 - v) ** 2 for v in origin))
    delta, eps, image, images = [0.0] * len(origin), init_norm, x, [x]
    for k in range(steps):
        g = _cross_entropy_gradient(net, image, y)
        length = math.sqrt(sum(v * v for v in g))
        alpha = 0.01 + 0.5 * (1 - 0.01) * (1 + math.cos(math.pi * k / steps))
        delta = [d + alpha * v / length for d, v in zip(delta, g, strict=True)]
        eps *= 1 - gamma if misclassified(net, image, y) else 1 + gamma
        eps = min(eps, corner)
        length = math.sqrt(sum(d * d for d in delta))
        pixels = [v + eps * d / length for v, d in zip(origin, delta, strict=True)]
        if levels is not None:
            pixels = [round(p * (levels - 1)) / (levels - 1) for p in pixels]
        pixels = [min(max(p, 0.0), 1.0) for p in pixels]
        delta = [p - v for p, v in zip(pixels, origin, strict=True)]
        image = torch.tensor(pixels, dtype=x.dtype).reshape(x.shape)
        images.append(image)
    return images


def _sign_step(image: list[float], g: list[float], origin: list[float], step_size: float, eps: float) -> list[float]:
    out = []
    for a, v, o in zip(image, g, origin, strict=True):
        moved = a + step_size * ((v > 0) - (v < 0))
        out.append(min(max(min(max(moved, o - eps), o + eps), 0.0), 1.0))
    return out


def ni_fgsm(
    net: Net, x: Tensor, y: int, *, eps: float, step_size: float, steps: int, decay: float
) -> tuple[list[Tensor], Tensor]:
    """The look-ahead images, and the last iterate."""
    origin = x.reshape(-1).tolist()
    image, g, shown = list(origin), [0.0] * len(origin), []
    for _ in range(steps):
        ahead = [a + step_size * decay * v for a, v in zip(image, g, strict=True)]
        shown.append(torch.tensor(ahead, dtype=x.dtype).reshape(x.shape))
        gradient = _cross_entropy_gradient(net, shown[-1], y)
        mean = sum(abs(v) for v in gradient) / len(gradient)
        g = [decay * a + v / mean for a, v in zip(g, gradient, strict=True)]
        image = _sign_step(image, g, origin, step_size, eps)
    return shown, torch.tensor(image, dtype=x.dtype).reshape(x.shape)


def kernel(size: int, nsig: float) -> list[list[float]]:
    """Gaussian density on a size x size grid that reaches nsig standard deviations, divided by its sum."""
    places = [0.0] if size == 1 else [-nsig + 2 * nsig * i / (size - 1) for i in range(size)]
    raw = [[math.exp(-(a * a + b * b) / 2) for b in places] for a in places]
    total = sum(map(sum, raw))
    return [[v / total for v in row] for row in raw]


def smooth(image: Tensor, weights: list[list[float]]) -> Tensor:
    """[1, C, H, W] -> each pixel the weighted sum around it, zeros outside."""
    half, (_, channels, height, width) = len(weights) // 2, image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                for a, row in enumerate(weights):
                    for b, weight in enumerate(row):
                        p, q = i + a - half, j + b - half
                        if 0 <= p < height and 0 <= q < width:
                            out[0, c, i, j] += weight * image[0, c, p, q]
    return out


def diverse(image: Tensor, draw: list[float], *, prob: float, low: float, high: float, resize: str) -> Tensor:
    """[1, C, H, W]: with probability prob resized to a side in [low, high) of its own, then padded with zeros."""
    whether, which, row, column = draw
    if whether >= prob:
        return image
    height, width = image.shape[2:]
    sides = []
    for side in (height, width):
        least, most = max(1, int(low * side + 1e-6)), max(1, int(high * side + 1e-6))
        sides.append(least + math.floor(which * (most - least)))
    mode = {"mode": "bilinear", "align_corners": False} if resize == "bilinear" else {"mode": "nearest"}
    small = F.interpolate(image, size=sides, **mode)
    top = math.floor(row * (height - sides[0] + 1))
    left = math.floor(column * (width - sides[1] + 1))
    return F.pad(small, (left, width - sides[1] - left, top, height - sides[0] - top))


def ti_dim(
    net: Net,
    x: Tensor,
    y: int,
    *,
    eps: float,
    step_size: float,
    steps: int,
    decay: float,
    draws: list[list[float]],
    prob: float,
    low: float,
    high: float,
    resize: str,
    weights: list[list[float]],
) -> tuple[list[Tensor], Tensor]:
    """The transformed images, and the last iterate."""
    origin = x.reshape(-1).tolist()
    image, g, shown = x, [0.0] * len(origin), []
    for t in range(steps):
        leaf = image.clone().requires_grad_(True)
        moved = diverse(leaf, draws[t], prob=prob, low=low, high=high, resize=resize)
        shown.append(moved.detach())
        z = net(moved)[0]
        loss = -z[y] + torch.log(sum(torch.exp(z[k]) for k in range(len(z))))
        gradient = smooth(torch.autograd.grad(loss, leaf)[0], weights).reshape(-1).tolist()
        mean = sum(abs(v) for v in gradient) / len(gradient)
        g = [decay * a + v / mean for a, v in zip(g, gradient, strict=True)]
        moved_pixels = _sign_step(image.reshape(-1).tolist(), g, origin, step_size, eps)
        image = torch.tensor(moved_pixels, dtype=x.dtype).reshape(x.shape)
    return shown, image
