"""What every network offers: checks, normalisation first, named taps, `features()` and a linear head.

A forward pass is `check -> normalize -> body -> latent -> head`. A network writes `body` and nothing else:

    class TwoLayers(Classifier):
        def __init__(self, *, num_classes, in_channels, image_size, mean=None, std=None):
            super().__init__(num_classes=num_classes, in_channels=in_channels, image_size=image_size,
                             mean=mean, std=std)
            ...  # layers, then
            self.finish(taps=("conv1", "last_conv", "features"), feature_dim=32, last_conv_channels=16)

        def body(self, x, taps=None): ...

Conventions that regularizers rely on:

* A *tap* is a named layer output; `tap_names` lists them from input to output.
* `last_conv` is the last convolution's output after its activation, [B, C, H, W], *before* the gate.
* `last_conv_gate` is `nn.Identity()` in every network. The body sends the activation of the last convolution
  through it, so a channel mask is `net.last_conv_gate = mask`, any module [B, C, H, W] -> the same shape,
  with C = `last_conv_channels`, that leaves its input unchanged. Every later tap (`block5`, `conv4`,
  `features`, ...) sees the gated tensor, as IB-RAR's T_5 does; `last_conv` itself stays ungated, so that a
  masked channel can be scored and come back.
* `features` is the penultimate layer, [B, D], D = `feature_dim`; the head is one `nn.Linear`.
* `latent` is `nn.Identity()` in every network. `insert_latent` puts a stochastic layer there, adds its taps
  (`latent_mean`, `latent_std`, `latent`) and replaces the head by one that reads z.
* Some taps are one tensor under two names (VGG16's `fc2` is its `features`): `hidden_names` lists every
  hidden layer once, as IB-RAR and HBaR count them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mi_at.models import latent as latents

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "swish": nn.SiLU,
}
INITS = ("kaiming", "pytorch")


def scale_width(channels: int, width: float) -> int:
    """Number of channels of a layer in a network of the given `width`: rounded, at least 4.

    Args:
        channels: channels of the full-size network.
        width: multiplier, 1.0 is the full-size network.

    Raises:
        ValueError: `width` is not positive.

    >>> scale_width(64, 1.0), scale_width(64, 0.25), scale_width(16, 0.1)
    (64, 16, 4)
    """
    if not width > 0:
        raise ValueError(
            f"width is {width}, expected a multiplier > 0: 1.0 is the full-size network, 0.25 a quarter of it"
        )
    return max(4, round(channels * width))


def make_activation(name: str) -> nn.Module:
    """An activation module by name: `relu`, or `swish` = x * sigmoid(x) (SiLU).

    Raises:
        ValueError: unknown name.

    >>> make_activation("swish")
    SiLU()
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def init_weights(module: nn.Module, init: str) -> None:
    """Initialise convolutions, batch norms and linear layers in place.

    `kaiming`: convolutions He-normal with fan_out (variance 2 / (k k C_out)), batch norm 1 / 0, every bias 0;
    linear weights keep PyTorch's default. `pytorch`: PyTorch's defaults, as many released scripts run.

    Raises:
        ValueError: unknown `init`.

    Source: He et al. 2015, https://arxiv.org/abs/1502.01852; fan_out as in Zagoruyko and Komodakis 2016.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {list(INITS)}")
    if init == "pytorch":
        return
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.ones_(layer.weight)
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_dropout(dropout: float) -> float:
    """Return `dropout` if it is a probability in [0, 1), else raise ValueError."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1): 0 switches it off")
    return float(dropout)


class Normalize(nn.Module):
    """(x - mean) / std per channel; mean and std are buffers, never trained.

    Args:
        mean: one value per channel, or one for all, in the units of the input ([0, 1]).
        std: the same, > 0.
        channels: number of channels of the input.

    Raises:
        ValueError: wrong number of values, or a std that is not positive.

    >>> layer = Normalize(mean=[0.5], std=[0.25], channels=1)
    >>> layer(torch.ones(2, 1, 4, 4)).unique()
    tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: Sequence[float] | float, std: Sequence[float] | float, channels: int) -> None:
        super().__init__()
        values = {"mean": self._per_channel(mean, channels), "std": self._per_channel(std, channels)}
        for name, value in values.items():
            if len(value) != channels:
                raise ValueError(f"{name} has {len(value)} values, expected {channels}: one per channel, or one number")
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1))
        if min(values["std"]) <= 0:
            raise ValueError(
                f"std is {values['std']}, expected every value > 0; std=null and mean=null normalise nothing"
            )

    @staticmethod
    def _per_channel(value: Sequence[float] | float, channels: int) -> list[float]:
        if isinstance(value, Sequence):
            return [float(v) for v in value]
        return [float(value)] * channels

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """What `print(net)` says of this layer."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class _Wanted(dict[str, Tensor]):
    """A dict that forgets what was not asked for, so that unused activations are freed during the forward."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name in self.names:
            super().__setitem__(name, value)


class Classifier(nn.Module, abc.ABC):
    """An image classifier: [B, C, H, W] in [0, 1] -> logits [B, K].

    Args:
        num_classes: K, at least 2.
        in_channels: C.
        image_size: height and width in pixels; one number for square images.
        mean: normalisation of the input, per channel; None (with `std=None`) leaves the input as it is.
        std: see `mean`.

    Attributes:
        normalize: first layer, `Normalize` or `nn.Identity`.
        last_conv_gate: `nn.Identity`, to be replaced by a channel mask (see the module's docstring).
        latent: `nn.Identity`, or a stochastic layer between features and head (`insert_latent`).
        head: `nn.Linear(feature_dim, num_classes)`, or of the latent's size.
        tap_names: names of all taps, input to output.
        hidden_names: the taps that are hidden layers, each layer once.
        feature_dim: D, size of the penultimate layer.
        last_conv_channels: channels of the tap `last_conv`.

    Raises:
        ValueError: an option out of range; at call time an input of another shape or type than was declared.
    """

    min_size: int = 1
    """Smallest height or width that the network can take."""

    tap_names: tuple[str, ...]
    hidden_names: tuple[str, ...]
    feature_dim: int
    last_conv_channels: int
    head: nn.Linear

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int | Sequence[int],
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(size) != 2:
            raise ValueError(f"image_size is {list(size)}, expected one number or (height, width)")
        if min(size) < self.min_size:
            raise ValueError(
                f"image_size is {size[0]}x{size[1]}, but {type(self).__name__} needs at least "
                f"{self.min_size}x{self.min_size} pixels: resize the images, or choose another model, "
                "such as cnn_tiny"
            )
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2")
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}, expected at least 1")
        if (mean is None) != (std is None):
            raise ValueError(f"mean is {mean} and std is {std}: give both, or neither for no normalisation")
        self.num_classes = int(num_classes)
        self.in_channels = int(in_channels)
        self.image_size: tuple[int, int] = (int(size[0]), int(size[1]))
        self.normalize: nn.Module = nn.Identity()
        if mean is not None and std is not None:
            self.normalize = Normalize(mean=mean, std=std, channels=self.in_channels)
        self.last_conv_gate: nn.Module = nn.Identity()
        self.latent: nn.Module = nn.Identity()

    def finish(
        self,
        *,
        taps: Sequence[str],
        feature_dim: int,
        last_conv_channels: int,
        aliases: Sequence[str] = ("last_conv",),
    ) -> None:
        """Declare the taps and build the head; in a network's `__init__` after the layers.

        Args:
            taps: names of all taps, input to output; must hold `last_conv` and `features`.
            feature_dim: D.
            last_conv_channels: channels of `last_conv`.
            aliases: taps that show a layer which another tap shows too, left out of `hidden_names`.
        """
        self.tap_names = tuple(taps)
        self.hidden_names = tuple(name for name in taps if name not in aliases)
        self.feature_dim = feature_dim
        self.last_conv_channels = last_conv_channels
        self.head = nn.Linear(feature_dim, self.num_classes)

    def insert_latent(
        self, *, dim: int | None = None, std_offset: float = 0.0, test: str = "mean"
    ) -> latents.StochasticLatent:
        """Put a stochastic layer between features and head; a network that has the same one keeps it.

        The new head is initialised as PyTorch does, also where the network's own starts at zero.

        Args:
            dim: size of z; None: `latent_size(feature_dim)`.
            std_offset: see `StochasticLatent`.
            test: "mean" or "sample" in eval mode.

        Returns:
            The layer, now `latent`.

        Raises:
            ValueError: an option out of range, or another stochastic layer is there already.
        """
        size = latents.latent_size(self.feature_dim) if dim is None else dim
        layer = latents.StochasticLatent(self.feature_dim, size, std_offset=std_offset, test=test)
        if isinstance(self.latent, latents.StochasticLatent):
            if self.latent.extra_repr() != layer.extra_repr():
                raise ValueError(
                    f"{type(self).__name__} already has a stochastic latent ({self.latent.extra_repr()}), wanted "
                    f"({layer.extra_repr()}): build the network anew"
                )
            return self.latent
        self.latent = layer.to(self.head.weight)
        self.head = nn.Linear(size, self.num_classes).to(self.head.weight)
        self.tap_names = (*self.tap_names, *latents.TAPS)
        self.hidden_names = (*self.hidden_names, "latent")
        return layer

    @abc.abstractmethod
    def body(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """Everything between normalisation and head.

        Args:
            x: [B, C, H, W], already normalised.
            taps: None, or a dict that the network fills as `taps[name] = tensor`, in the order of
                `tap_names`.

        Returns:
            features [B, D].
        """

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features: x [B, C, H, W] in [0, 1] -> [B, D]."""
        self.check_input(x)
        return self.body(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits: x [B, C, H, W] in [0, 1] -> [B, K]."""
        logits: Tensor = self.head(self.latent(self.features(x)))
        return logits

    def forward_taps(self, x: Tensor, names: Iterable[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and named layer outputs of one forward, with their graph.

        Args:
            x: [B, C, H, W] in [0, 1].
            names: taps to keep, any subset of `tap_names` in any order; None keeps all.

        Returns:
            logits [B, K], and a dict tap name -> tensor in the order of `tap_names`.

        Raises:
            ValueError: an unknown tap.
        """
        if isinstance(names, str):
            raise ValueError(f"names is the text {names!r}, expected a list of taps: [{names!r}]")
        wanted = self.tap_names if names is None else tuple(names)
        unknown = [name for name in wanted if name not in self.tap_names]
        if unknown:
            raise ValueError(f"{type(self).__name__} has no tap {unknown}; its taps are {list(self.tap_names)}")
        self.check_input(x)
        taps = _Wanted(wanted)
        features = self.body(self.normalize(x), taps)
        stochastic = isinstance(self.latent, latents.StochasticLatent)
        z = self.latent(features, taps) if stochastic else self.latent(features)
        return self.head(z), {name: taps[name] for name in self.tap_names if name in taps}

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is a float tensor [B, in_channels, *image_size]; reads no values."""
        name, (height, width) = type(self).__name__, self.image_size
        if x.ndim != 4:
            raise ValueError(
                f"{name} found an input of shape {list(x.shape)}, expected 4 dimensions "
                f"[batch, {self.in_channels}, {height}, {width}]: a single image needs x[None]"
            )
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"{name} found images with channels={x.shape[1]} (shape {list(x.shape)}), expected "
                f"channels={self.in_channels}: build it with in_channels={x.shape[1]} (dataset.channels), "
                f"or choose a data set with channels={self.in_channels}"
            )
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"{name} found images of {x.shape[2]}x{x.shape[3]} pixels, expected {height}x{width}: "
                f"build it with image_size=[{x.shape[2]},{x.shape[3]}] (dataset.image_size), "
                "or resize the images"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} found an input of {x.dtype}, expected floats in [0, 1]: use x.float() / 255")

    def extra_repr(self) -> str:
        """What `print(net)` says besides the layers."""
        height, width = self.image_size
        return f"num_classes={self.num_classes}, in_channels={self.in_channels}, image_size={height}x{width}"
