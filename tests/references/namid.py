"""Literal transcriptions for the information estimators and the losses of namid and wmim, in float64.

Written from the printed equations, not from ``mi_at``: loops over samples, locations and classes, numbers as nested
lists. Sources:

* Donsker-Varadhan: NAMID (Zhou et al., ICML 2022) eq. 11; per sample and location as in its public code, over all pairs
  as in that of WMIM (Zhu et al., ICML 2020). InfoNCE: van den Oord et al. 2018, eq. 4-5.
* NAMID eq. 4-9. The objective of its public code for the estimators.
* The critic: two convolutions 4x4 of stride 2, then embeddings of width h with a shortcut (Zhu et al., appendix).
* Spectral Stein gradient estimator: Shi et al., ICML 2018, eq. 11-14.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

Number = Any  # float or 0-dimensional float64 tensor
Vector = Sequence[Number]


def numbers(values: torch.Tensor) -> Any:
    """A tensor as nested lists of floats."""
    return values.double().tolist()


def exponential_sum(values: Vector) -> Number:
    return sum(math.exp(v) if not isinstance(v, torch.Tensor) else v.exp() for v in values)


def logarithm(value: Number) -> Number:
    return value.log() if isinstance(value, torch.Tensor) else math.log(value)


def mean(values: Vector) -> Number:
    return sum(values) / len(values)


# ---------------------------------------------------------------- bounds
def donsker_varadhan(joint: Vector, marginal: Vector) -> Number:
    return mean(joint) - logarithm(exponential_sum(marginal) / len(marginal))


def local_donsker_varadhan(u: Sequence[Sequence[Vector]]) -> list[Number]:
    """u[i][j][k]: output of image i, patch k of image j."""
    count, found = len(u), []
    for i in range(count):
        per_location = []
        for k in range(len(u[i][i])):
            others = [u[i][j][k] for j in range(count) if j != i]
            per_location.append(u[i][i][k] - logarithm(exponential_sum(others) / (count - 1)))
        found.append(mean(per_location))
    return found


def pooled_donsker_varadhan(u: Sequence[Sequence[Vector]]) -> Number:
    count, per_location = len(u), []
    for k in range(len(u[0][0])):
        own = [u[i][i][k] for i in range(count)]
        others = [u[i][j][k] for i in range(count) for j in range(count) if i != j]
        per_location.append(donsker_varadhan(own, others))
    return mean(per_location)


def info_nce(u: Sequence[Vector]) -> Number:
    count = len(u)
    return mean([u[i][i] - logarithm(exponential_sum(u[i]) / count) for i in range(count)])


# ---------------------------------------------------------------- the critic, in eval mode
def _norm(x: Vector, name: str, p: dict[str, Any]) -> list[float]:
    """Batch norm over channels by the running statistics."""
    return [
        (v - m) / math.sqrt(s + 1e-5) * w + b
        for v, m, s, w, b in zip(
            x, p[f"{name}.mean"], p[f"{name}.variance"], p[f"{name}.weight"], p[f"{name}.bias"], strict=True
        )
    ]


def _convolve(image: Any, weight: Any) -> Any:
    """4x4, stride 2, one pixel of zeros around, no bias: image[c][y][x] -> [d][y // 2][x // 2]."""
    height, width = len(image[0]), len(image[0][0])

    def pixel(c: int, y: int, x: int) -> float:
        return image[c][y][x] if 0 <= y < height and 0 <= x < width else 0.0

    return [
        [
            [
                sum(
                    kernel[c][a][b] * pixel(c, 2 * y + a - 1, 2 * x + b - 1)
                    for c in range(len(image))
                    for a in range(4)
                    for b in range(4)
                )
                for x in range(width // 2)
            ]
            for y in range(height // 2)
        ]
        for kernel in weight
    ]


def _rectified(image: Any, name: str, p: dict[str, Any]) -> Any:
    """Batch norm, then the positive part, at every pixel."""
    out = [[[0.0] * len(row) for row in plane] for plane in image]
    for y in range(len(image[0])):
        for x in range(len(image[0][0])):
            for c, v in enumerate(_norm([plane[y][x] for plane in image], name, p)):
                out[c][y][x] = max(v, 0.0)
    return out


def _linear(weight: Any, x: Vector) -> list[float]:
    return [sum(w[0] * v for w, v in zip(row, x, strict=True)) for row in weight]


def _embed(x: Vector, name: str, p: dict[str, Any]) -> list[float]:
    hidden = [max(v, 0.0) for v in _norm(_linear(p[f"{name}.deep.0.weight"], x), f"{name}.deep.1", p)]
    deep = [v + b for v, b in zip(_linear(p[f"{name}.deep.3.weight"], hidden), p[f"{name}.deep.3.bias"], strict=True)]
    total = [a + b for a, b in zip(deep, _linear(p[f"{name}.shortcut.weight"], x), strict=True)]
    centre = mean(total)
    spread = math.sqrt(mean([(v - centre) ** 2 for v in total]) + 1e-5)
    return [
        (v - centre) / spread * w + b
        for v, w, b in zip(total, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"], strict=True)
    ]


def critic_scores(parameters: dict[str, Any], images: Any, outputs: Any) -> Any:
    """u[i][j][k] of a critic whose state dict is given as nested lists."""
    patches = []
    for image in images:
        first = _rectified(_convolve(image, parameters["patches.0.weight"]), "patches.1", parameters)
        second = _rectified(_convolve(first, parameters["patches.3.weight"]), "patches.4", parameters)
        places = [(y, x) for y in range(len(second[0])) for x in range(len(second[0][0]))]
        patches.append([_embed([plane[y][x] for plane in second], "local", parameters) for y, x in places])
    whole = [_embed(z, "whole", parameters) for z in outputs]
    return [[[sum(a * b for a, b in zip(g, patch, strict=True)) for patch in own] for own in patches] for g in whole]


# ---------------------------------------------------------------- losses
def selection(logits: Any, logits_adv: Any, y: Sequence[int]) -> list[bool]:
    """Eq. 6."""
    return [
        clean.index(max(clean)) == label and adv.index(max(adv)) != label
        for clean, adv, label in zip(logits, logits_adv, y, strict=True)
    ]


def _chosen(values: Vector, selected: Sequence[bool]) -> list[Number]:
    return [v for v, s in zip(values, selected, strict=True) if s]


def _cosine(a: Vector, b: Vector) -> Number:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)


def _positive(value: Number) -> Number:
    return value if float(value) > 0 else 0.0 * value


def namid_terms(
    natural: tuple[Vector, Vector],
    adversarial: tuple[Vector, Vector],
    selected: Sequence[bool],
    *,
    alpha: float,
    lambda_mi: float,
    lambda_term: str = "clipped",
) -> dict[str, Number]:
    """Eq. 8-9; each pair is (of the clean outputs, of the adversarial outputs)."""
    n, n_adv = (_chosen(values, selected) for values in natural)
    a, a_adv = (_chosen(values, selected) for values in adversarial)
    terms: dict[str, Number] = {"cosine_natural": 0.0, "cosine_adversarial": 0.0}
    if sum(selected) >= 2:
        terms["cosine_natural"] = alpha * (1 - _cosine(n, n_adv))
        terms["cosine_adversarial"] = alpha * (1 - _cosine(a, a_adv))
    if lambda_term != "off":
        lowered, raised = (mean(a_adv), mean(n_adv)) if any(selected) else (0.0, 0.0)
        lowered = _positive(lowered) if lambda_term == "clipped" else lowered
        terms["information"] = alpha * lambda_mi * (lowered - raised)
    return terms


def estimators_terms(
    natural: tuple[Vector, Vector],
    adversarial: tuple[Vector, Vector],
    right: Sequence[bool],
    broken: Sequence[bool],
    *,
    objective: str,
) -> dict[str, Number]:
    """Eq. 4 and 5 negated, eq. 5 with its hinge; or what the public code minimises."""
    if objective == "eq4":
        return {"natural": -mean(natural[0]), "adversarial": -mean(adversarial[1])}
    n, n_adv = (_chosen(values, broken) for values in natural)
    a, a_adv = (_chosen(values, broken) for values in adversarial)
    if objective == "eq4_selected":
        return (
            {"natural": -mean(n), "adversarial": -mean(a_adv)} if any(broken) else {"natural": 0.0, "adversarial": 0.0}
        )
    if objective == "eq5":
        if not any(broken):
            return {"natural": 0.0, "adversarial": 0.0}
        return {"natural": _positive(mean(n_adv)) - mean(n), "adversarial": _positive(mean(a)) - mean(a_adv)}
    resisted = [r and not b for r, b in zip(right, broken, strict=True)]
    count = max(sum(right), 1)
    kept = [[_chosen(values, resisted) for values in pair] for pair in (natural, adversarial)]

    def angle(pair: list[list[Number]]) -> Number | None:
        return _cosine(pair[0], pair[1]) if len(pair[0]) >= 2 else None

    apart, together = angle([n, n_adv]), angle(kept[0])
    of_natural = (5 * abs(apart) if apart is not None else 0.0) - sum(n) / count
    of_natural += 0.5 * ((5 * (1 - together) if together is not None else 0.0) - sum(kept[0][0]) / count)
    apart, together = angle([a, a_adv]), angle(kept[1])
    of_adversarial = (5 * abs(apart) if apart is not None else 0.0) - sum(a_adv) / count
    of_adversarial += 0.5 * ((8 * (1 - together) if together is not None else 0.0) + 0.1 * sum(kept[1][1]) / count)
    return {"natural": of_natural, "adversarial": of_adversarial}


# ---------------------------------------------------------------- scores without a critic
def spectral_stein_score(x: torch.Tensor, share: float) -> torch.Tensor:
    """Eq. 11-14 with loops over eigenfunctions and samples; the eigenvalues are those of K, not K / M."""
    x = x.double()
    count, dim = x.shape
    distances = sorted(float((x[i] - x[j]).norm()) for i in range(count) for j in range(i))
    width = distances[(len(distances) - 1) // 2]  # the lower median

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-(a - b).square().sum() / (2 * width**2)).exp()

    gram = torch.stack([torch.stack([kernel(a, b) for b in x]) for a in x])
    values, vectors = torch.linalg.eigh(gram)
    score = torch.zeros(count, dim, dtype=torch.float64)
    taken = 0.0
    for j in reversed(range(count)):
        if taken >= share * float(values.clamp_min(0).sum()):
            break
        taken += float(values[j])
        beta = torch.zeros(dim, dtype=torch.float64)
        for m in range(count):  # beta_j = - 1/M sum_m grad psi_j(x_m)
            gradient = torch.zeros(dim, dtype=torch.float64)
            for n in range(count):  # psi_j(x) = sqrt(M) / lambda_j sum_n u_jn k(x, x_n)
                gradient += vectors[n, j] * gram[m, n] * (x[n] - x[m]) / width**2
            beta -= math.sqrt(count) / values[j] * gradient / count
        for m in range(count):
            score[m] += beta * math.sqrt(count) * vectors[m, j]
    return score
