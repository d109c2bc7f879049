"""A literal transcription of FWA, one image and one entry of the plan at a time, over Python floats.

Source: Wu, Wang, Yu, ICML 2020, as the equations of the project's notes give it: rows of the plan sum to the image,
cost at most eps times the mass, Pi* = x softmax((g - lambda C) / gamma), step 2 / (t + 2).
"""

import math
from collections.abc import Callable

Image = list[list[list[float]]]  # channel, row, column
Pixel = tuple[int, int, int]
Plan = dict[tuple[Pixel, Pixel], float]


def reachable(pixel: Pixel, height: int, width: int, kernel: int) -> list[Pixel]:
    """Pixels of the same channel in the window: from -floor(k / 2) to k - 1 - floor(k / 2) away, inside the image."""
    channel, row, column = pixel
    offsets = range(-(kernel // 2), kernel - kernel // 2)
    return [
        (channel, row + down, column + right)
        for down in offsets
        for right in offsets
        if 0 <= row + down < height and 0 <= column + right < width
    ]


def distance(a: Pixel, b: Pixel) -> float:
    return math.sqrt((a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2)


def cost(plan: Plan) -> float:
    return sum(mass * distance(a, b) for (a, b), mass in plan.items())


def arrived(plan: Plan, like: Image) -> Image:
    image = [[[0.0 for _ in row] for row in channel] for channel in like]
    for (_, target), mass in plan.items():
        image[target[0]][target[1]][target[2]] += mass
    return image


def best_plan(x: Image, g: Image, *, eps: float, kernel: int, gamma: float, bisection: int) -> Plan:
    """Pi*: the dearest lambda-interval end that keeps the budget."""
    height, width = len(x[0]), len(x[0][0])
    pixels = [(c, i, j) for c in range(len(x)) for i in range(height) for j in range(width)]
    mass = sum(x[c][i][j] for c, i, j in pixels)
    largest = max(abs(g[c][i][j]) for c, i, j in pixels)

    def plan(price: float) -> Plan:
        out: Plan = {}
        for a in pixels:
            targets = reachable(a, height, width, kernel)
            exponents = [(g[t[0]][t[1]][t[2]] / largest - price * distance(a, t)) / gamma for t in targets]
            top = max(exponents)
            weights = [math.exp(e - top) for e in exponents]
            for target, weight in zip(targets, weights, strict=True):
                out[a, target] = x[a[0]][a[1]][a[2]] * weight / sum(weights)
        return out

    if cost(plan(0.0)) <= eps * mass:
        return plan(0.0)
    low, high = 0.0, 50.0
    for _ in range(bisection):
        middle = (low + high) / 2
        if cost(plan(middle)) <= eps * mass:
            high = middle
        else:
            low = middle
    return plan(high)


def frank_wolfe(
    gradient: Callable[[Image], Image], x: Image, *, eps: float, kernel: int, gamma: float, steps: int, bisection: int
) -> Image:
    """The image after `steps` steps; `gradient` is that at the clamped image, 0 where the image exceeds 1."""
    height, width = len(x[0]), len(x[0][0])
    plan: Plan = {}
    for c in range(len(x)):
        for i in range(height):
            for j in range(width):
                for target in reachable((c, i, j), height, width, kernel):
                    plan[(c, i, j), target] = x[c][i][j] if target == (c, i, j) else 0.0
    for t in range(steps):
        image = arrived(plan, x)
        clamped = [[[min(max(v, 0.0), 1.0) for v in row] for row in channel] for channel in image]
        g = gradient(clamped)
        for c in range(len(x)):
            for i in range(height):
                for j in range(width):
                    if image[c][i][j] > 1.0 + 1e-6:
                        g[c][i][j] = 0.0
        star = best_plan(x, g, eps=eps, kernel=kernel, gamma=gamma, bisection=bisection)
        plan = {key: mass + 2.0 / (t + 2.0) * (star[key] - mass) for key, mass in plan.items()}
    return arrived(plan, x)
