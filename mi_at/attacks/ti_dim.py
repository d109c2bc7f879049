"""TI-DIM: translation-invariant gradients, diverse inputs and momentum, made for transfer between networks.

g_{t+1} = mu g_t + G_t / mean|G_t|,  G_t = W * grad J(T(x_t));  x_{t+1} = clip(x_t + alpha sign(g_{t+1})),  x_0 = x,
W a Gaussian kernel (Dong et al. 2019, eq. 8-11), T with probability p a random resize and zero padding (Xie et al.
2019, section 3.2).

Differences from the authors' code: T keeps the size of the image, so that any network can take it (the resized side
is a share of the image's, as in Torchattacks; Xie et al. go from 299 to up to 330 px); every place of the resized
image within the padding is equally likely, the last row included; T is drawn per sample by (seed, id) and iteration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks import objectives
from mi_at.attacks.inner import Objective, check_eps, check_step
from mi_at.attacks.ni_fgsm import check_decay, mean_normalised
from mi_at.attacks.pgd import check_images
from mi_at.functional import random
from mi_at.functional.geometry import project

RESIZES = ("bilinear", "nearest")


def ti_dim(
    objective: Objective,
    x: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    decay: float = 0.1,
    prob: float = 0.5,
    low: float = 0.9,
    high: float = 1.0,
    resize: str = "bilinear",
    kernel_size: int = 15,
    nsig: float = 3.0,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Maximise an objective in the l_inf ball of radius eps around x, within [0, 1], from x itself.

    Args:
        objective: images -> one value per sample [B].
        x: [B, C, H, W] float in [0, 1].
        eps: radius >= 0, a number or a fraction.
        step_size: in (0, 1], likewise.
        steps: >= 0.
        decay: mu >= 0, of the momentum; 0.1 is NAMID's, 1 Dong et al.'s.
        prob: in [0, 1], of T in a step; 0 switches it off.
        low: the resized height is drawn from the integers in [low H, high H), the width with it; 0 < low <= high <= 1.
        high: low = high gives that one size; 1 the image itself (NAMID's code).
        resize: "bilinear", or "nearest" (Xie et al.).
        kernel_size: odd, in pixels; 1 leaves the gradient as it is.
        nsig: > 0, standard deviations from the kernel's centre to its edge (not pixels: 15 and 3 are 2.33 px).
        ids: [B] int64, which samples these are; None: 0 .. B - 1.
        seed: of T, with ids.

    Returns:
        [B, C, H, W] in [0, 1], at most eps from x, detached: the last iterate.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].

    Example:
        >>> x = torch.full((1, 1, 4, 4), 0.5)
        >>> x_adv = ti_dim(lambda x: x.flatten(1).sum(1), x, eps=0.25, step_size=0.125, steps=2)
        >>> float(x_adv.min())
        0.75
    """
    eps = check_eps(eps, "linf")
    step_size = check_step(step_size, steps, "linf", eps=eps)
    check_decay(decay)
    _check(prob=prob, low=low, high=high, resize=resize, kernel_size=kernel_size, nsig=nsig)
    check_images(x)
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}: expected images [B, C, H, W]")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()
        ids = torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device)
        kernel = gaussian_kernel(kernel_size, nsig).to(x)
        x_adv, momentum = x, torch.zeros_like(x)
        for step in range(steps):
            x_adv = x_adv.detach().requires_grad_(True)
            seen = x_adv
            if prob > 0:
                draws = random.uniform(ids, (4,), random.key(seed, "ti_dim", step))
                seen = diverse(x_adv, draws, prob=prob, low=low, high=high, resize=resize)
            (gradient,) = torch.autograd.grad(objective(seen).sum(), x_adv)
            momentum = decay * momentum + mean_normalised(smooth(gradient, kernel))
            x_adv = project(x_adv.detach() + step_size * momentum.sign(), x, eps, "linf")
        return x_adv


def gaussian_kernel(size: int, nsig: float) -> Tensor:
    """One axis of the kernel: a Gaussian density at `size` places from -nsig to nsig, of sum 1.

    Args:
        size: odd.
        nsig: > 0.

    Returns:
        [size] float64.

    Example:
        >>> gaussian_kernel(3, 3.0)
        tensor([0.0109, 0.9783, 0.0109], dtype=torch.float64)
    """
    places = torch.linspace(-nsig, nsig, size, dtype=torch.float64) if size > 1 else torch.zeros(1, dtype=torch.float64)
    density = (-places.square() / 2).exp()
    return density / density.sum()


def smooth(images: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel with the outer product of a kernel [k] with itself, zeros around: [B, C, H, W]."""
    channels, half = images.shape[1], len(kernel) // 2
    if not half:
        return images
    one_axis = kernel.expand(channels, 1, 1, -1)
    rows = F.conv2d(images, one_axis, padding=(0, half), groups=channels)
    return F.conv2d(rows, one_axis.transpose(2, 3), padding=(half, 0), groups=channels)


def diverse(images: Tensor, draws: Tensor, *, prob: float, low: float, high: float, resize: str = "bilinear") -> Tensor:
    """Per sample, with probability prob: shrink the image and put it somewhere into zeros of its old size.

    Args:
        images: [B, C, H, W].
        draws: [B, 4] uniform in [0, 1): whether, which size, which row, which column.
        prob: as `ti_dim` takes it.
        low: likewise.
        high: likewise.
        resize: likewise.

    Returns:
        [B, C, H, W], differentiable with respect to the images.

    Example:
        >>> draws = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> diverse(torch.ones(1, 1, 2, 2), draws, prob=1.0, low=0.5, high=0.5)
        tensor([[[[1., 0.],
                  [0., 0.]]]])
    """
    # A resize is linear and separable: one matrix per sample and axis does a batch of sizes and places at once.
    rows, columns = (
        _axis_matrix(side, draws[:, 1], place, low=low, high=high, resize=resize, dtype=images.dtype)
        for side, place in ((images.shape[2], draws[:, 2]), (images.shape[3], draws[:, 3]))
    )
    moved = rows[:, None] @ images @ columns[:, None].transpose(2, 3)
    return torch.where((draws[:, 0] < prob).view(-1, 1, 1, 1), moved, images)


def _axis_matrix(
    side: int, which: Tensor, place: Tensor, *, low: float, high: float, resize: str, dtype: torch.dtype
) -> Tensor:
    """[B, side, side]: pixels of one axis -> pixels of the resized axis within zeros."""
    # A product such as 0.9 * 10 may fall short of a whole number by rounding alone.
    least, most = max(1, int(low * side + 1e-6)), max(1, int(high * side + 1e-6))
    size = least + (which * (most - least)).floor()
    before = (place * (side - size + 1)).floor()
    precise = torch.promote_types(dtype, torch.float32)
    size, before = size.to(precise), before.to(precise)
    pixels = torch.arange(side, dtype=precise, device=size.device)
    target = pixels[None, :] - before[:, None]
    scale = (side / size)[:, None]
    if resize == "bilinear":
        source = ((target + 0.5) * scale - 0.5).clamp(0, side - 1)
        weight = (1 - (source[:, :, None] - pixels).abs()).clamp_min(0)
    else:
        source = (target * scale + 1e-4).floor()
        weight = (source[:, :, None] == pixels).to(precise)
    inside = (target >= 0) & (target < size[:, None])
    return (weight * inside[:, :, None]).to(dtype)


def _check(*, prob: float, low: float, high: float, resize: str, kernel_size: int, nsig: float) -> None:
    if not 0 <= prob <= 1:
        raise ValueError(f"attack.prob={prob}: expected a probability in [0, 1]")
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"attack.low={low}, attack.high={high}: expected 0 < low <= high <= 1, shares of the image's side"
        )
    if resize not in RESIZES:
        raise ValueError(f"attack.resize={resize!r}: expected one of {', '.join(RESIZES)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"attack.kernel_size={kernel_size}: expected an odd number, 1 for no smoothing")
    if not 0 < nsig < float("inf"):
        raise ValueError(f"attack.nsig={nsig}: expected a positive number of standard deviations, such as 3")


@dataclass(frozen=True, kw_only=True)
class TIDIM:
    """TI-DIM on the cross-entropy as an evaluation attack; NAMID's has 40 steps of 0.007, decay 0.1, prob 0.5.

    Attributes:
        eps, step_size, steps, decay, prob, low, high, resize, kernel_size, nsig: as `ti_dim` takes them.
        name: what tables print.
    """

    norm: ClassVar[str] = "linf"

    eps: float
    step_size: float
    steps: int
    decay: float = 0.1
    prob: float = 0.5
    low: float = 0.9
    high: float = 1.0
    resize: str = "bilinear"
    kernel_size: int = 15
    nsig: float = 3.0
    name: str = "ti_dim"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        object.__setattr__(self, "step_size", check_step(self.step_size, self.steps, self.norm, eps=self.eps))
        check_decay(self.decay)
        _check(
            prob=self.prob,
            low=self.low,
            high=self.high,
            resize=self.resize,
            kernel_size=self.kernel_size,
            nsig=self.nsig,
        )

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack [B, C, H, W] images in [0, 1]; (seed, id) decide every sample's resizes."""
        settings = {key: value for key, value in asdict(self).items() if key != "name"}
        return ti_dim(objectives.cross_entropy(net, y), x, **settings, ids=ids, seed=seed)

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"attack": "ti_dim", "norm": self.norm, **asdict(self), "init": "zero", "objective": "cross_entropy"}
