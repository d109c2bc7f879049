"""Local DIM: mutual information between an output of a network and the patches of an image.

Papers: Hjelm et al., Learning deep representations by mutual information estimation and maximization, ICLR 2019; in the
form of Zhu et al. (WMIM), ICML 2020, which NAMID (eq. 11-12, appendix A) uses: two convolutions make a map of patches,
patches and output are embedded in one space, and the score of a pair is their scalar product.

Differences from the authors' code: images of any size from 8 pixels and any number of channels instead of 32 x 32 RGB;
the width is an option. Scores are in float32 or better: they reach the width of the embedding and enter an exponential.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.functional.distributed import world_size
from mi_at.functional.variational import local_donsker_varadhan

MIN_SIZE = 8
PATCH_CHANNELS = 128


class BatchNorm(nn.Module):
    """Batch norm over the channels of [B, C, ...].

    Not torch's own class: with several GPUs Lightning would make that average over processes, each of which holds the
    global batch here.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; in train mode by the statistics of the batch, which move the running ones."""
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training)


class Embedding(nn.Module):
    """[B, C, L] -> [B, h, L]: two linear layers beside a linear shortcut at every location, then layer norm.

    Args:
        channels: C.
        width: h.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            nn.Conv1d(channels, width, 1, bias=False), BatchNorm(width), nn.ReLU(), nn.Conv1d(width, width, 1)
        )
        self.shortcut = nn.Conv1d(channels, width, 1, bias=False)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01)
            self.shortcut.weight[:, :, 0].fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> [B, h, L], of norm sqrt(h) before the affine map of the layer norm."""
        embedded: Tensor = self.norm((self.deep(x) + self.shortcut(x)).transpose(1, 2))
        return embedded.transpose(1, 2)


class LocalDIM(nn.Module):
    """The critic of NAMID and WMIM.

    Args:
        num_classes: K, of the outputs.
        channels: C, of the images.
        image_size: (height, width), at least 8 pixels each.
        hsize: h, width of the embeddings; 2048 in the authors' code.

    Attributes:
        facts: the four numbers; they lie beside the weights, so that another critic's are recognised.

    Raises:
        ValueError: images that are too small, or a width below 1; weights of a critic for other images or outputs.

    Example:
        >>> critic = LocalDIM(num_classes=10, channels=1, image_size=(8, 8), hsize=16).eval()
        >>> critic(torch.zeros(3, 1, 8, 8), torch.zeros(3, 10)).shape
        torch.Size([3])
    """

    def __init__(self, *, num_classes: int, channels: int, image_size: tuple[int, int], hsize: int = 2048) -> None:
        super().__init__()
        if min(image_size) < MIN_SIZE:
            raise ValueError(
                f"a local DIM estimator needs images of at least {MIN_SIZE}x{MIN_SIZE} pixels, found "
                f"{image_size[0]}x{image_size[1]}: resize them"
            )
        if hsize < 1:
            raise ValueError(f"hsize={hsize}: expected a width of 1 or more")
        self.facts = {"num_classes": num_classes, "channels": channels, "image_size": list(image_size), "hsize": hsize}
        self.patches = nn.Sequential(
            nn.Conv2d(channels, PATCH_CHANNELS // 2, 4, stride=2, padding=1, bias=False),
            BatchNorm(PATCH_CHANNELS // 2),
            nn.ReLU(),
            nn.Conv2d(PATCH_CHANNELS // 2, PATCH_CHANNELS, 4, stride=2, padding=1, bias=False),
            BatchNorm(PATCH_CHANNELS),
            nn.ReLU(),
        )
        self.local = Embedding(PATCH_CHANNELS, hsize)
        self.whole = Embedding(num_classes, hsize)

    def embed_images(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, h, L], an embedding per patch; L = (H // 4) (W // 4)."""
        embedded: Tensor = self.local(self.patches(x.to(self._dtype())).flatten(2))
        return embedded

    def embed_outputs(self, z: Tensor) -> Tensor:
        """z [B, K] logits -> [B, h]."""
        embedded: Tensor = self.whole(z.to(self._dtype())[:, :, None])
        return embedded.squeeze(2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The natural logarithm of how much better a patch and its output go together, per sample.

        Args:
            x: [B, C, H, W], the images of the global batch (or the noise on them).
            z: [B, K], outputs; row i belongs to image i.

        Returns:
            [B] estimates in nats (`local_donsker_varadhan`).
        """
        return local_donsker_varadhan(pair_scores(self.embed_outputs(z), self.embed_images(x)))

    def get_extra_state(self) -> dict[str, Any]:
        """What the critic is for."""
        return self.facts

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse the weights of a critic for something else."""
        differing = [name for name, own in self.facts.items() if state.get(name) != own]
        if differing:
            found = ", ".join(f"{name}={state.get(name)} instead of {self.facts[name]}" for name in differing)
            raise ValueError(f"these estimators were trained for {found}")

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.local.shortcut.weight.dtype
        return dtype


def pair_scores(outputs: Tensor, patches: Tensor) -> Tensor:
    """Scalar products of all outputs with all patches of all images.

    Args:
        outputs: [B, h].
        patches: [N, h, L].

    Returns:
        [B, N, L], |score| <= norm of the output x norm of the patch.

    Example:
        >>> pair_scores(torch.eye(2), torch.eye(2)[:, :, None]).squeeze(2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    images, width, locations = patches.shape
    columns = patches.transpose(0, 1).reshape(width, images * locations)
    return (outputs @ columns).view(len(outputs), images, locations)


def critic_of(net: nn.Module, *, hsize: int, owner: str) -> LocalDIM:
    """A critic for the images and outputs of a network.

    Args:
        net: with `num_classes`, `in_channels` and `image_size`, as every `mi_at.models.base.Classifier` has.
        hsize: width.
        owner: who wants it, for the message.

    Raises:
        ValueError: a network without them, or images that are too small.
    """
    if missing := [name for name in ("num_classes", "in_channels", "image_size") if not hasattr(net, name)]:
        raise ValueError(
            f"{owner}: {type(net).__name__} does not say its {', '.join(missing)}: make it a "
            "mi_at.models.base.Classifier, or give it these attributes"
        )
    known: Any = net
    try:
        return LocalDIM(
            num_classes=known.num_classes, channels=known.in_channels, image_size=known.image_size, hsize=hsize
        )
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def count_gradients_once(critic: nn.Module) -> None:
    """Make the gradients of a critic that every process applies to the whole global batch count once.

    The loss of a process is multiplied by the number of processes so that gradients of own shards, averaged, sum up
    (`mi_at.functional.distributed`). A gradient of the whole batch on every process would count that often.

    Args:
        critic: in train mode on gathered tensors.
    """
    for parameter in critic.parameters():
        parameter.register_hook(lambda gradient: gradient / world_size())
