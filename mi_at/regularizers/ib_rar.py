"""ib_rar: an information bottleneck over chosen layers, and a mask of the channels that know least of the label.

Paper: IB-RAR: Information bottleneck as regularizer for adversarial robustness, eq. 1-3, Algorithm 1.
Terms: + alpha sum_l HSIC(X, T_l) - beta sum_l HSIC(Y, T_l), normalised HSIC, added to any defense's loss; and
T_last <- T_last * mask, where the mask zeroes the 5 % of the last convolution's channels with the lowest HSIC(f_c, Y).

Differences from the paper:
- alpha = 0.1 beta, as its rule says; the pairs printed in A.3.1 are the other way round, and hopeless so.
- the X term grows with the batch and its weight belongs to batch 100: alpha x 100 / m (`batch_scale`).
- 5 % of few channels is rounded down, to at least 1; ties go to the lower index: the paper does not say.
- the mask is refreshed every 10 batches from the batch at hand, and stored with the network: the paper does not say.
- weights of its Tables 3 and 4 are not stated: the defaults here are those of the authors' code.
Differences from the authors' code:
- there the mask lives for one training forward in 10 and never at test (`mask.applied=refresh`; here always).
- there it drops the 10 channels with the lowest HSIC(Y, f) and the 10 with the highest HSIC(X, f), Gaussian kernels,
  the last channel never looked at (`mask.rule=label_and_input mask.label_kernel=gaussian mask.fraction=0.02`, 0.04 on
  ResNet-18, without that quirk), on ResNet-18 after pooling, on WRN after its second stage; here the last convolution.
- there the label kernel is linear in some scripts and Gaussian in others (`label_kernel`), the matrices are inverted in
  float32 on the CPU (here float64: its noise is of the order of the scores' differences), and batch norm sees the
  adversarial images once more after each step (left out: it changes the network, not the term).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.functional.distributed import gather
from mi_at.functional.kernels import KERNELS, bottleneck, channel_dependence, one_hot
from mi_at.regularizers.base import Context, Regularizer, Views

BATCH = 100
"""The batch size that the paper's weights belong to (section 3)."""
RULES = ("label", "label_and_input")
APPLIED = ("always", "refresh")


@dataclass(frozen=True)
class MaskOptions:
    """How channels are chosen and masked.

    Attributes:
        fraction: of the channels, rounded down, at least 1; 0: no mask.
        every: training batches between two choices.
        rule: "label": lowest HSIC(f_c, Y); "label_and_input": as many again of highest HSIC(f_c, X).
        label_kernel: "linear" or "gaussian".
        applied: "always", or "refresh": only in the training forwards that choose.
        at_test: whether the network is masked when it is evaluated; with "refresh" it never is.

    Raises:
        ValueError: an option of the wrong kind or out of range.
    """

    fraction: float = 0.05
    every: int = 10
    rule: str = "label"
    label_kernel: str = "linear"
    applied: str = "always"
    at_test: bool = True

    def __post_init__(self) -> None:
        if type(self.fraction) not in (int, float) or not 0 <= self.fraction < 1:
            raise _wrong("mask.fraction", self.fraction, "a part of the channels in [0, 1), 0 for no mask")
        if type(self.every) is not int or self.every < 1:
            raise _wrong("mask.every", self.every, "a number of batches, 1 or more")
        _require_one_of("mask.rule", self.rule, RULES)
        _require_one_of("mask.label_kernel", self.label_kernel, KERNELS)
        _require_one_of("mask.applied", self.applied, APPLIED)
        if type(self.at_test) is not bool:
            raise _wrong("mask.at_test", self.at_test, "true or false")

    def count(self, channels: int) -> int:
        """Channels that one side of the rule masks."""
        return max(1, math.floor(self.fraction * channels)) if self.fraction else 0


def channel_mask(scores: Tensor, drop: int) -> Tensor:
    """Which channels stay (eq. 3): all but those with the lowest scores.

    Args:
        scores: [C]; differences below 1e-8 are rounding and count as ties.
        drop: how many are masked.

    Returns:
        [C] bool, False for the `drop` lowest, of equal ones those with the lower index.

    Example:
        >>> channel_mask(torch.tensor([2.0, 1.0, 3.0, 1.0 + 1e-12]), drop=1).tolist()
        [True, False, True, True]
    """
    order = scores.double().round(decimals=8).argsort(stable=True)
    return torch.ones_like(scores, dtype=torch.bool).index_fill(0, order[:drop], False)


class ChannelGate(nn.Module):
    """Zeroes the masked channels of [B, C, H, W].

    Args:
        channels: C.
        on: whether it masks; training switches it as the options say.

    Attributes:
        keep: [C] bool, False where masked; it travels with the network's weights.
        choose: set for the training forwards that choose the mask from their own maps.
    """

    keep: Tensor

    def __init__(self, channels: int, *, on: bool = True) -> None:
        super().__init__()
        self.on = on
        self.choose: Callable[[Tensor], Tensor] | None = None
        # A whole-number type: weight averaging copies it, where it would average floats.
        self.register_buffer("keep", torch.ones(channels, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape; x itself is left as it is."""
        if self.choose is not None and self.training:
            self.keep.copy_(self.choose(x.detach()))
        elif not self.on:
            return x
        return x * self.keep.to(x.dtype)[:, None, None]

    def extra_repr(self) -> str:
        """What `print(net)` says of this layer."""
        return f"channels={len(self.keep)}, on={self.on}"


class InformationBottleneck(Regularizer):
    """+ alpha sum_l HSIC(X, T_l) - beta sum_l HSIC(Y, T_l), and the channel mask.

    T_l are taken of each of the clean and the adversarial view that the loss before this term forwards: adversarial in
    standard_at, clean in ce, both in trades and mart. The mask is chosen by the adversarial view, in ce by the clean.

    Args:
        alpha: weight of the X term, >= 0: 0.1 beta (A.3.1: 0.1 on VGG16, 5e-5 on ResNet-18).
        beta: weight of the Y term, >= 0 (A.3.1: 1 on VGG16, 5e-4 on ResNet-18).
        layers: names of taps, null for every hidden layer, or "robust": the last convolution and the layers after it
            (VGG16: block5, fc1, fc2, section 3.2.1).
        mi_input: "clean" | "adversarial": the images X.
        label_kernel: "linear" | "gaussian".
        sigma: kernel width per square root of a dimension.
        eps: ridge of the normalised HSIC.
        batch_scale: alpha x 100 / m for m images in the global batch; False warns off batch 100.
        active_epochs: epochs of the paper, from 0, in which the two terms count; null: all ([0] in A.3).
        mask: options of `MaskOptions` by name.

    Raises:
        ValueError: an option of the wrong kind or out of range.
    """

    active: Tensor | None

    def __init__(
        self,
        *,
        alpha: float = 0.008,
        beta: float = 0.08,
        layers: Sequence[str] | str | None = None,
        mi_input: str = "clean",
        label_kernel: str = "linear",
        sigma: float = 5.0,
        eps: float = 1e-5,
        batch_scale: bool = True,
        active_epochs: Sequence[int] | None = None,
        mask: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value < math.inf:
                raise _wrong(name, value, "0 or more")
        for name, value in (("sigma", sigma), ("eps", eps)):
            if not 0 < value < math.inf:
                raise _wrong(name, value, "more than 0")
        _require_one_of("mi_input", mi_input, ("clean", "adversarial"))
        _require_one_of("label_kernel", label_kernel, KERNELS)
        if isinstance(layers, str) and layers != "robust":
            raise _wrong("layers", layers, "a list of taps such as [fc1,fc2], null for all hidden layers, or robust")
        if layers is not None and not layers:
            raise _wrong("layers", list(layers), "at least one tap; alpha=0 beta=0 leaves the terms out")
        if layers is not None and len(set(layers)) < len(layers) and not isinstance(layers, str):
            raise _wrong("layers", list(layers), "each tap once")
        epochs = None if active_epochs is None else list(active_epochs)
        if epochs is not None and (not epochs or any(type(epoch) is not int or epoch < 0 for epoch in epochs)):
            raise _wrong("active_epochs", epochs, "a list of epochs from 0, or null for all; alpha=0 beta=0 for none")
        self.weights = {"hsic_x": alpha, "hsic_y": beta}
        self.layers = layers if layers is None or isinstance(layers, str) else tuple(layers)
        self.chosen: tuple[str, ...] = ()
        self.mi_input, self.label_kernel, self.sigma, self.eps = mi_input, label_kernel, sigma, eps
        self.batch_scale, self.mask = batch_scale, mask_options(mask or {})
        self.register_buffer("active", None if epochs is None else torch.tensor(epochs, dtype=torch.int64))
        self._active: frozenset[int] | None = None
        self._keep: Tensor | None = None
        self._batch_size = 0
        parts = [*(["terms"] if alpha or beta else []), *(["mask"] if self.mask.fraction else [])]
        self.coupled = f"the {' and '.join(parts)} of regularizer.ib_rar" if parts else ""

    def adapt(self, net: nn.Module) -> None:
        """Choose the layers, and put the mask behind the last convolution.

        Raises:
            ValueError: a network without named layers, or with another module where the mask belongs.
        """
        classifier: Any = net
        hidden = getattr(net, "hidden_names", ())
        if not hidden:
            raise ValueError(
                f"regularizer.ib_rar needs a network with named hidden layers (hidden_names); {type(net).__name__} has "
                "none: derive it from mi_at.models.base.Classifier"
            )
        if self.layers == "robust":
            last = classifier.tap_names.index("last_conv")
            self.chosen = tuple(name for name in classifier.tap_names[last:] if name in hidden)
        else:
            self.chosen = tuple(hidden if self.layers is None else self.layers)
        if unknown := [name for name in self.chosen if name not in classifier.tap_names]:
            taps = f"taps of {type(net).__name__}, which has no {unknown[0]}: {', '.join(classifier.tap_names)}"
            raise _wrong("layers", list(self.chosen), taps)
        self.taps = self.chosen if any(self.weights.values()) else ()
        if self.mask.fraction:
            self.taps = (*self.taps, "last_conv")
            self._put_gate(classifier)

    def _put_gate(self, net: Any) -> None:
        channels, there = net.last_conv_channels, net.last_conv_gate
        if isinstance(there, ChannelGate) and len(there.keep) == channels:
            return
        if not isinstance(there, nn.Identity):
            raise ValueError(
                f"regularizer.ib_rar.mask.fraction={self.mask.fraction}: {type(net).__name__} already has a "
                f"{type(there).__name__} behind its last convolution; use mask.fraction=0, or a network without it"
            )
        if 2 * self.mask.count(channels) > channels:
            raise _wrong("mask.fraction", self.mask.fraction, f"at most half of the {channels} channels")
        net.last_conv_gate = ChannelGate(channels, on=self._on_at_test).to(next(net.parameters()).device)

    def on_fit_start(self, ctx: Context) -> None:
        """Epochs of the paper become epochs of this run."""
        if self.active is not None:
            scaled = [ctx.scaled(epoch) for epoch in self.active.tolist()]
            self.active.copy_(torch.tensor(scaled))
            self._active = frozenset(scaled)

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        """None of its own; a training batch begins, and the mask with it."""
        if self.mask.fraction:
            gate: Any = net.last_conv_gate
            if self.mask.applied == "always":
                gate.on = True
            elif self._due(batch):
                gate.choose = lambda maps: self._choose(gather(maps.float(), batch.global_size), net, batch)
        return {}

    def terms(self, views: Views) -> dict[str, Tensor]:
        """hsic_x in [0, alpha (m - 1)] per layer and view, hsic_y in [-beta (K - 1), 0]; both 0 in an epoch without."""
        batch = views.batch
        forwarded = [view for view in ("clean", "adversarial") if view in views.computed()]
        if not forwarded:
            raise ValueError("regularizer.ib_rar: the defense forwards neither the clean nor the adversarial images")
        if self.mi_input == "adversarial" and "adversarial" not in batch.views:
            raise _wrong("mi_input", "adversarial", "clean: the defense makes no adversarial images")
        if self.mask.fraction and self.mask.applied == "always" and self._due(batch):
            self._keep = self._choose(views.tap(forwarded[-1], "last_conv").detach(), views.net, batch)
        logits = views.logits(forwarded[0])
        if not any(self.weights.values()) or not self._is_active(batch.epoch):
            return {name: logits.new_zeros(()) for name, weight in self.weights.items() if weight}
        of_x, of_y = bottleneck(
            [views.tap(view, name).flatten(1) for view in forwarded for name in self.chosen],
            gather(views.images(self.mi_input), batch.global_size).flatten(1),
            one_hot(views.y, logits.shape[1]),
            sigma=self.sigma,
            eps=self.eps,
            kernel_labels=self.label_kernel,
        )
        m = len(views.y)
        self._meet(m)
        terms = {"hsic_x": self._alpha(m) * of_x, "hsic_y": -self.weights["hsic_y"] * of_y}
        return {name: term.to(logits.dtype) for name, term in terms.items() if self.weights[name]}

    def after_step(self, ctx: Context, batch: Batch) -> None:
        """Put the new mask in, on every process the same."""
        if not self.mask.fraction:
            return
        gate: Any = ctx.net.last_conv_gate
        if self._keep is not None:
            gate.keep.copy_(self._keep)
            self._keep = None
        gate.choose, gate.on = None, self._on_at_test

    def settings(self) -> dict[str, Any]:
        """Layers, and the weight of the X term at the first batch's size."""
        used = {"alpha_used": self._alpha(self._batch_size), "batch": self._batch_size} if self._batch_size else {}
        return {"layers": list(self.chosen), "batch_scale": self.batch_scale, **used}

    def alternatives(self) -> dict[str, dict[str, Any]]:
        """The network without its mask, or with it where it is tested without."""
        if not self.mask.fraction or self.mask.applied == "refresh":
            return {}
        label = "without the mask" if self.mask.at_test else "with the mask"
        return {label: {"mask": {"at_test": not self.mask.at_test}}}

    @property
    def _on_at_test(self) -> bool:
        return self.mask.applied == "always" and self.mask.at_test

    def _due(self, batch: Batch) -> bool:
        return batch.batch_idx % self.mask.every == 0

    def _is_active(self, epoch: int) -> bool:
        if self.active is None:
            return True
        if self._active is None:  # once, also after a resume: reading waits for the device
            self._active = frozenset(self.active.tolist())
        return epoch in self._active

    def _alpha(self, m: int) -> float:
        return self.weights["hsic_x"] * (BATCH / m if self.batch_scale else 1)

    def _meet(self, m: int) -> None:
        """Note the size of the first batch, the full one, and say what it does to alpha."""
        if self._batch_size:
            return
        self._batch_size = m
        if m != BATCH and self.weights["hsic_x"] and not self.batch_scale:
            warnings.warn(
                f"regularizer.ib_rar.batch_scale=false: alpha={self.weights['hsic_x']} belongs to batch {BATCH}, and "
                f"the term grows with the batch, which is {m}; use dataset.batch_size={BATCH} or batch_scale=true",
                stacklevel=2,
            )

    def _choose(self, maps: Tensor, net: nn.Module, batch: Batch) -> Tensor:
        """[C] bool: which channels stay, by the maps [B, C, H, W] of the global batch."""
        classifier: Any = net
        options, drop = self.mask, self.mask.count(maps.shape[1])
        labels = one_hot(gather(batch.y, batch.global_size), classifier.num_classes)
        of_labels = channel_dependence(maps, labels, sigma=self.sigma, eps=self.eps, kernel_z=options.label_kernel)
        keep = channel_mask(of_labels, drop)
        if options.rule == "label_and_input":
            images = gather(batch.x, batch.global_size).flatten(1)
            keep &= channel_mask(-channel_dependence(maps, images, sigma=self.sigma, eps=self.eps), drop)
        return keep


def mask_options(values: Mapping[str, Any]) -> MaskOptions:
    """Options of the mask by name.

    Raises:
        ValueError: an unknown name, or as `MaskOptions`.

    Example:
        >>> mask_options({"every": 5}).every
        5
    """
    known = [field.name for field in dataclasses.fields(MaskOptions)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"regularizer.ib_rar.mask.{unknown[0]}: expected one of {', '.join(known)}")
    return MaskOptions(**values)


def _wrong(option: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"regularizer.ib_rar.{option}={value}: expected {expected}")


def _require_one_of(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise _wrong(option, value, f"one of {', '.join(choices)}")
