"""A stochastic layer between features and head: z ~ N(mu(x), diag sigma(x)^2), one linear layer of 2d outputs.

Source: shared_info (Yu et al. 2022) section 4.1, and the variational bottleneck (Alemi et al. 2017) before it.
Neither paper says how sigma comes from the layer's output; softplus keeps it positive and grows linearly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.functional.random import normal_like

CHOICES = ("mean", "sample")
SIGMA_FLOOR = 1e-3
TAPS = ("latent_mean", "latent_std", "latent")


def latent_size(feature_dim: int) -> int:
    """Half the size of the features, rounded up to a multiple of 64.

    It gives what shared_info states (section 4.1): 128 on cnn4, 256 on ResNet-18, 320 on WRN-34-10.

    Args:
        feature_dim: size of the penultimate layer, >= 1.

    >>> latent_size(200), latent_size(512), latent_size(640)
    (128, 256, 320)
    """
    return 64 * math.ceil(feature_dim / 128)


class StochasticLatent(nn.Module):
    """z = mu + sigma * noise with sigma = softplus(raw - std_offset) + 0.001, (mu, raw) = one linear layer.

    In train mode z is a sample (keyed by sample in a `functional.random.keyed` block, as training forwards are), in
    eval mode the mean, unless `test` says "sample"; `using` decides for a block. Computed in float32 or better.

    Args:
        feature_dim: size of the input.
        dim: d, size of z.
        std_offset: shifts sigma at the start of training: softplus(0) = 0.69, softplus(-5) = 0.0067.
        test: "mean" or "sample" in eval mode.

    Raises:
        ValueError: a size below 1, an offset that is not finite, or an unknown choice.

    >>> latent = StochasticLatent(6, 4).eval()
    >>> h = torch.ones(3, 6)
    >>> torch.equal(latent(h), latent.distribution(h)[0]), latent.train()(h).shape
    (True, torch.Size([3, 4]))
    """

    def __init__(self, feature_dim: int, dim: int, *, std_offset: float = 0.0, test: str = "mean") -> None:
        super().__init__()
        if min(feature_dim, dim) < 1:
            raise ValueError(f"latent of size {dim} on features of size {feature_dim}: expected 1 or more")
        if not math.isfinite(std_offset):
            raise ValueError(f"std_offset={std_offset}: expected a finite number")
        _check_choice(test)
        self.linear = nn.Linear(feature_dim, 2 * dim)
        self.dim, self.std_offset, self.test = dim, std_offset, test
        self._forced: str | None = None

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, D] -> mu and sigma, both [B, d], sigma > 0.001."""
        # bfloat16 would leave two or three digits of mu - mu', which is then divided by a small sigma
        with torch.autocast(features.device.type, enabled=False):
            wide = features.float() if features.dtype.itemsize < 4 else features
            mu, raw = self.linear(wide).chunk(2, dim=1)
            return mu, F.softplus(raw - self.std_offset) + SIGMA_FLOOR

    def forward(self, features: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """features [B, D] -> z [B, d]; fills `taps` with latent_mean, latent_std and latent."""
        mu, sigma = self.distribution(features)
        z = mu + sigma * normal_like(mu) if self.samples else mu
        if taps is not None:
            for name, value in zip(TAPS, (mu, sigma, z), strict=True):
                taps[name] = value
        return z

    @property
    def samples(self) -> bool:
        """Whether a forward draws z now."""
        if self._forced is not None:
            return self._forced == "sample"
        return self.training or self.test == "sample"

    @contextmanager
    def using(self, choice: str) -> Iterator[None]:
        """Forwards in this block take the "mean" or a "sample", whatever the mode.

        Raises:
            ValueError: an unknown choice.

        >>> latent = StochasticLatent(6, 4).train()
        >>> with latent.using("mean"):
        ...     latent.samples
        False
        >>> latent.samples
        True
        """
        _check_choice(choice)
        before, self._forced = self._forced, choice
        try:
            yield
        finally:
            self._forced = before

    def extra_repr(self) -> str:
        """What `print(net)` says of this layer."""
        return f"dim={self.dim}, std_offset={self.std_offset}, test={self.test}"


@contextmanager
def latent_takes(net: nn.Module, choice: str) -> Iterator[None]:
    """`StochasticLatent.using` for a network's `latent`; a network without one is left alone.

    >>> with latent_takes(nn.Linear(1, 1), "mean"):
    ...     pass
    """
    layer = getattr(net, "latent", None)
    with layer.using(choice) if isinstance(layer, StochasticLatent) else nullcontext():
        yield


def _check_choice(choice: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"latent {choice!r}: expected one of {', '.join(CHOICES)}")
