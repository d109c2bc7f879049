"""hbar: the HSIC bottleneck of all hidden layers, on clean images, added to any defense.

Paper: Wang et al., Revisiting Hilbert-Schmidt information bottleneck for adversarial robustness, NeurIPS 2021; a
baseline of IB-RAR. Term: + lambda_x sum_l HSIC(X, T_l) - lambda_y sum_l HSIC(Y, T_l), normalised HSIC.

Differences from the paper: none known.
Differences from the authors' code: the cross-entropy has weight 1 there too, as an option (left out); an option that
lets the weights decay over layers is off there and left out; its VGG16 leaves the last block out (`layers`). With
adversarial training the layers and images are those of the clean forward, which follows the adversarial one, as here;
in its MART framework either (`view`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mi_at.functional.distributed import gather
from mi_at.functional.kernels import KERNELS, bottleneck, one_hot
from mi_at.regularizers.base import Regularizer, Views

VIEWS = ("clean", "adversarial")


class HsicBottleneck(Regularizer):
    """+ lambda_x sum_l HSIC(X, T_l) - lambda_y sum_l HSIC(Y, T_l).

    Args:
        lambda_x: weight of the X term, >= 0 (CIFAR-10, ResNet-18: 5e-4 with adversarial training, .006 without).
        lambda_y: weight of the Y term, >= 0 (the same: 5e-3, .05).
        layers: names of taps; null for every hidden layer.
        view: "clean" | "adversarial": which forward and which images.
        label_kernel: "linear" | "gaussian".
        sigma: kernel width per square root of a dimension.
        eps: ridge of the normalised HSIC.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        *,
        lambda_x: float = 5e-4,
        lambda_y: float = 5e-3,
        layers: Sequence[str] | None = None,
        view: str = "clean",
        label_kernel: str = "linear",
        sigma: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("lambda_x", lambda_x), ("lambda_y", lambda_y)):
            if not 0 <= value < math.inf:
                raise _wrong(name, value, "0 or more")
        for name, value in (("sigma", sigma), ("eps", eps)):
            if not 0 < value < math.inf:
                raise _wrong(name, value, "more than 0")
        for name, word, choices in (("view", view, VIEWS), ("label_kernel", label_kernel, KERNELS)):
            if word not in choices:
                raise _wrong(name, word, f"one of {', '.join(choices)}")
        if isinstance(layers, str) or (layers is not None and not layers):
            raise _wrong("layers", layers, "a list of taps such as [fc1,fc2], or null for all hidden layers")
        if layers is not None and len(set(layers)) < len(layers):
            raise _wrong("layers", list(layers), "each tap once")
        self.weights = {"hsic_x": lambda_x, "hsic_y": lambda_y}
        self.layers = None if layers is None else tuple(layers)
        self.view, self.label_kernel, self.sigma, self.eps = view, label_kernel, sigma, eps
        weighted = lambda_x > 0 or lambda_y > 0
        self.coupled = "the terms of regularizer.hbar" if weighted else ""
        self.needs_adversarial = weighted and view == "adversarial"

    def adapt(self, net: nn.Module) -> None:
        """Choose the layers.

        Raises:
            ValueError: a network without named layers, or without one of those asked for.
        """
        known, hidden = getattr(net, "tap_names", ()), getattr(net, "hidden_names", ())
        if not hidden:
            raise ValueError(
                f"regularizer.hbar needs a network with named hidden layers (hidden_names); {type(net).__name__} has "
                "none: derive it from mi_at.models.base.Classifier"
            )
        chosen = tuple(hidden) if self.layers is None else self.layers
        if unknown := [name for name in chosen if name not in known]:
            taps = f"taps of {type(net).__name__}, which has no {unknown[0]}: {', '.join(known)}"
            raise _wrong("layers", list(chosen), taps)
        self.taps = chosen if any(self.weights.values()) else ()

    def terms(self, views: Views) -> dict[str, Tensor]:
        """hsic_x in [0, lambda_x (m - 1)] per layer, hsic_y in [-lambda_y (K - 1), 0]; none at weights of 0."""
        if not any(self.weights.values()):
            return {}
        logits = views.logits(self.view)
        of_x, of_y = bottleneck(
            [views.tap(self.view, name).flatten(1) for name in self.taps],
            gather(views.images(self.view), views.batch.global_size).flatten(1),
            one_hot(views.y, logits.shape[1]),
            sigma=self.sigma,
            eps=self.eps,
            kernel_labels=self.label_kernel,
        )
        terms = {"hsic_x": self.weights["hsic_x"] * of_x, "hsic_y": -self.weights["hsic_y"] * of_y}
        return {name: term.to(logits.dtype) for name, term in terms.items() if self.weights[name]}

    def settings(self) -> dict[str, Any]:
        """The layers."""
        return {"layers": list(self.taps)}


def _wrong(option: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"regularizer.hbar.{option}={value}: expected {expected}")
