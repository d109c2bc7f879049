"""Loaders of whole uint8 data sets: no worker processes, no Python per image, no synchronisation per step.

A *global* batch is what one optimiser step sees, over all processes. Each is cut by `torch.tensor_split`:
every process gets as many batches, without padding, and the shares put together are the global batch. The cut
into global batches does not depend on the number of processes:

- batches of `batch_size`, then what remains as a last, smaller batch;
- a remainder of fewer than `MIN_LAST` images joins the batch before it (never a batch too small to share
  among up to `MIN_LAST` processes, for batch norm, or for a term coupled over the batch); `drop_last` leaves
  it out instead;
- where a global batch still has fewer images than there are processes, the loader refuses to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mi_at.data.augment import crop_flip, draw_for_batch
from mi_at.data.batch import Batch
from mi_at.data.seeding import keyed_generator
from mi_at.functional.distributed import shard_sizes

# Fewer images than this are no batch of their own; eight is what one machine usually has in GPUs.
MIN_LAST = 8
# Images go to the training device if they take at most this share of its free memory.
DEVICE_SHARE = 0.25
PLACEMENTS = ("auto", "device", "memory", "mmap")


@dataclass(frozen=True)
class Augmentation:
    """Random crop with `pad` >= 0 pixels of zero padding, and horizontal flip.

    Raises:
        ValueError: a negative padding.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"dataset.pad={self.pad}: expected pixels of padding, >= 0")


def batch_sizes(count: int, batch_size: int, *, drop_last: bool = False) -> list[int]:
    """Sizes of the global batches of one pass over `count` images, by the rule at the top of this file.

    Args:
        count: images, >= 0.
        batch_size: of a global batch, >= 1.
        drop_last: leave a remainder out.

    Returns:
        The sizes; one batch of `count` if that is less than `batch_size` (none with `drop_last`).

    Raises:
        ValueError: batch_size < 1.

    Example:
        >>> batch_sizes(300, 128), batch_sizes(260, 128), batch_sizes(260, 128, drop_last=True)
        ([128, 128, 44], [128, 132], [128, 128])
    """
    if batch_size < 1:
        raise ValueError(f"dataset.batch_size={batch_size}: expected at least 1")
    sizes, rest = [batch_size] * (count // batch_size), count % batch_size
    if rest and not drop_last:
        if sizes and rest < MIN_LAST:
            sizes[-1] += rest
        else:
            sizes.append(rest)
    return sizes


def batches_with_extra(count: int, batch_size: int) -> int:
    """Batches of an epoch with extra images, whose share of a batch is fixed: as many as one pass without them has.

    Args:
        count: training and validation images, so that an epoch is as long whatever is held out.
        batch_size: of a global batch, >= 1.

    Example:
        >>> batches_with_extra(50_000, 128)
        391
    """
    return -(-count // batch_size)


class ImageStore:
    """Images and labels where training finds them fastest; index in, tensors on the training device out.

    Args:
        parts: (images uint8 [N, C, H, W], labels int64 [N]) in memory or memory-mapped; indices run through
            the parts in order.
        device: the training device.
        placement: "device" (images on the training device), "memory" or "mmap" (left in host memory or on
            disk as they come; a batch is gathered there, pinned and copied without waiting), or "auto": on
            the device if they take at most `DEVICE_SHARE` of its free memory, else as they come.

    Raises:
        ValueError: an unknown placement.

    Example:
        >>> pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
        >>> store = ImageStore([(pixels, torch.tensor([5, 6, 7]))])
        >>> images, labels, index = store.take(torch.tensor([2, 0]))
        >>> images.flatten().tolist(), labels.tolist()
        ([2, 0], [7, 5])
    """

    def __init__(
        self,
        parts: Sequence[tuple[Tensor, Tensor]],
        *,
        device: torch.device | str = "cpu",
        placement: str = "auto",
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"dataset.placement={placement!r}: expected one of {', '.join(PLACEMENTS)}")
        self.device = torch.device(device)
        images = [part for part, _ in parts]
        labels = torch.cat([part for _, part in parts])
        self.resident = self.device.type == "cpu" or placement == "device"
        if placement == "auto" and not self.resident:
            self.resident = _fits(sum(part.nbytes for part in images), self.device)
        if self.resident and self.device.type != "cpu":
            whole = torch.empty((len(labels), *images[0].shape[1:]), dtype=torch.uint8, device=self.device)
            start = 0
            for part in images:  # part by part: the host never holds a second copy
                whole[start : start + len(part)].copy_(part)
                start += len(part)
            images = [whole]
        self._images = images
        self._labels = labels.to(self.device) if self.resident else labels
        self._divisor = torch.tensor(255.0, device=self.device)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def index_device(self) -> torch.device:
        """Where `take` wants its indices."""
        return self.device if self.resident else torch.device("cpu")

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather images and labels.

        Args:
            index: [b] int64 on `index_device`.

        Returns:
            (images [b, C, H, W] uint8, labels [b] int64, the index) on the training device.
        """
        labels = self._labels.index_select(0, index)
        if self.resident:
            return self._rows(index), labels, index
        return self.send(self._rows(index)), self.send(labels), self.send(index)

    def send(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the training device, without waiting for the copy."""
        if self.device.type == "cpu":
            return tensor
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def to_float(self, images: Tensor) -> Tensor:
        """Uint8 images as float32 in [0, 1], the bits of torchvision's ToTensor on every device."""
        # A divisor that is a tensor on the device: CUDA multiplies by the reciprocal of a Python number.
        return images.to(torch.float32).div_(self._divisor)

    def _rows(self, index: Tensor) -> Tensor:
        if len(self._images) == 1:
            return self._images[0].index_select(0, index)
        rows = torch.empty((len(index), *self._images[0].shape[1:]), dtype=torch.uint8)
        start = 0
        for part in self._images:
            here = ((index >= start) & (index < start + len(part))).nonzero().squeeze(1)
            rows[here] = part.index_select(0, index[here] - start)
            start += len(part)
        return rows


class _Loader:
    """What both loaders share: cutting a global batch and making a `Batch` of the own share."""

    def __init__(
        self,
        store: ImageStore,
        sizes: list[int],
        *,
        seed: int,
        purpose: str,
        augmentation: Augmentation | None,
        rank: int,
        world_size: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size")
        if sizes and min(sizes) < world_size:
            raise ValueError(
                f"a global batch of {min(sizes)} images cannot be shared among {world_size} processes: "
                "use another dataset.batch_size, dataset.drop_last=true or fewer processes"
            )
        self.store = store
        self.sizes = sizes
        self.seed = seed
        self.augmentation = augmentation
        self.rank = rank
        self.world_size = world_size
        self._purpose = purpose
        self._bounds = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return len(self.sizes)

    def _batch(self, order: Tensor, epoch: int, batch_idx: int, rank: int, world_size: int) -> Batch:
        """The share of process `rank` of `world_size`; `order` lies on the store's index device."""
        size = self.sizes[batch_idx]
        shares = shard_sizes(size, world_size)
        offset, count = sum(shares[:rank]), shares[rank]
        start = self._bounds[batch_idx] + offset
        images, labels, index = self.store.take(order[start : start + count])
        if self.augmentation is not None:
            # Drawn for the global batch on every process, then cut.
            pad, flip = self.augmentation.pad, self.augmentation.flip
            drawn = draw_for_batch(
                size, pad=pad, flip=flip, seed=self.seed, epoch=epoch, batch=batch_idx, purpose=self._purpose
            )
            parameters = self.store.send(drawn[:, offset : offset + count].contiguous())
            images = crop_flip(images, parameters, pad=pad)
        return Batch(
            x=self.store.to_float(images),
            y=labels,
            index=index,
            global_size=size,
            offset=offset,
            epoch=epoch,
            batch_idx=batch_idx,
        )


class DeviceLoader(_Loader):
    """The training loader: shuffled epochs of global batches, resumable in the middle of one.

    The order is a pure function of (seed, epoch), the augmentation of (seed, epoch, batch). Iterating goes on
    from (`epoch`, `position`):

    - `set_epoch(e)` starts epoch e at its first batch; for the epoch it is already in, it changes nothing.
      Lightning calls it before every epoch (it finds the loader as its own `sampler`).
    - `load_state_dict` goes to the saved place; `iter()` keeps that place.
    - Otherwise `iter()` after batches were taken begins the next epoch, even if the last one was left early,
      and `iter()` before any batch was taken changes nothing (Lightning calls it twice at the start).

    There is one place for all iterators of a loader: two of them at a time share it.

    Args:
        store: images and labels.
        index: [n] int64, the images to train on.
        batch_size: images of a global batch, over all processes.
        seed: of order and augmentation.
        extra_index: images of an extra set to mix in, of which every batch holds round(extra_fraction x
            batch_size).
        extra_fraction: share of extra images, in (0, 1).
        batches_per_epoch: length of an epoch. All batches are then of `batch_size`, and as many permutations
            of the images as needed follow each other. Required with `extra_index`.
        augmentation: crop and flip, or None.
        drop_last: leave out a last batch smaller than `batch_size`.
        rank: this process.
        world_size: number of processes.

    Attributes:
        epoch: the current epoch, from 0.
        position: batches of it already taken.
        sizes: the sizes of an epoch's global batches.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> store = ImageStore([(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2)])
        >>> loader = DeviceLoader(store, torch.arange(20), batch_size=10, seed=0)
        >>> [len(batch) for batch in loader], loader.state_dict()["position"]
        ([10, 10], 2)
    """

    def __init__(
        self,
        store: ImageStore,
        index: Tensor,
        *,
        batch_size: int,
        seed: int,
        extra_index: Tensor | None = None,
        extra_fraction: float = 0.7,
        batches_per_epoch: int | None = None,
        augmentation: Augmentation | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size > len(index) and extra_index is None:
            raise ValueError(f"dataset.batch_size={batch_size}: expected at most {len(index)}, the images to train on")
        if batches_per_epoch is not None and batches_per_epoch < 1:
            raise ValueError(f"dataset.batches_per_epoch={batches_per_epoch}: expected at least 1")
        if extra_index is not None and batches_per_epoch is None:
            raise ValueError("batches_per_epoch=None: an epoch with extra images needs its number of batches")
        if batches_per_epoch is None:
            sizes = batch_sizes(len(index), batch_size, drop_last=drop_last)
        else:
            batch_sizes(0, batch_size)  # checks the size
            sizes = [batch_size] * batches_per_epoch
        super().__init__(
            store,
            sizes,
            seed=seed,
            purpose="augment",
            augmentation=augmentation,
            rank=rank,
            world_size=world_size,
        )
        self.batch_size = batch_size
        self.extra_per_batch = 0
        if extra_index is not None:
            self.extra_per_batch = extra_count(batch_size, extra_fraction)
            if not len(extra_index):
                raise ValueError("dataset.extra: the extra set holds no image")
        self._index = index
        self._extra_index = extra_index
        self.epoch = 0
        self.position = 0
        self._resumed = False
        self._ordered: tuple[int, Tensor] | None = None

    @property
    def sampler(self) -> DeviceLoader:
        """The loader itself: Lightning calls `sampler.set_epoch` before every epoch."""
        return self

    @property
    def num_images(self) -> int:
        """Images to train on, extra ones included."""
        return len(self._index) + (len(self._extra_index) if self._extra_index is not None else 0)

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch, batch after batch.

        Args:
            epoch: from 0.

        Returns:
            [sum of `sizes`] int64 on the CPU, a pure function of (seed, epoch).
        """
        count = self._bounds[-1]
        if self._extra_index is None:
            return self._permuted(self._index, count, epoch, "order")
        extra = len(self) * self.extra_per_batch
        original = self._permuted(self._index, count - extra, epoch, "order").view(len(self), -1)
        mixed = torch.cat(
            (original, self._permuted(self._extra_index, extra, epoch, "order_extra").view(len(self), -1)),
            dim=1,
        )
        # Shuffled within each batch, so that every process's share is mixed.
        shuffle = torch.rand(mixed.shape, generator=keyed_generator(self.seed, "order_mixed", epoch)).argsort(1)
        return mixed.gather(1, shuffle).flatten()

    def global_batch(self, epoch: int, batch_idx: int) -> Batch:
        """A whole global batch, uncut; the loader's place is left as it is.

        Args:
            epoch: from 0.
            batch_idx: in [0, len(self)).

        Returns:
            The batch whose shares the processes get.
        """
        return self._batch(self.order(epoch).to(self.store.index_device), epoch, batch_idx, 0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing changes if the loader is in that epoch already.

        Args:
            epoch: from 0.
        """
        if epoch != self.epoch:
            self.epoch, self.position, self._resumed = epoch, 0, False

    def __iter__(self) -> Iterator[Batch]:
        if self.position and not self._resumed:
            self.set_epoch(self.epoch + 1)
        return self

    def __next__(self) -> Batch:
        self._resumed = False
        if self.position >= len(self):
            raise StopIteration
        if self._ordered is None or self._ordered[0] != self.epoch:
            order = self.order(self.epoch)
            self._ordered = (self.epoch, self.store.send(order) if self.store.resident else order)
        batch = self._batch(self._ordered[1], self.epoch, self.position, self.rank, self.world_size)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """The place {epoch, position} and what it is a place in: integers, the same on every process."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the next `iter()` goes on there.

        Args:
            state: what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another order: other images, batch size, epoch length or seed.
        """
        for key, own in self._identity().items():
            if state.get(key, own) != own:
                raise ValueError(
                    f"the saved place has {key}={state[key]}, this loader {key}={own}: "
                    "resume with the data and batch options of the run that was saved"
                )
        self.epoch, self.position, self._resumed = int(state["epoch"]), int(state["position"]), True

    def _identity(self) -> dict[str, int]:
        return {
            "images": self.num_images,
            "batch_size": self.batch_size,
            "batches": len(self),
            "seed": int(self.seed),
        }

    def _permuted(self, pool: Tensor, count: int, epoch: int, purpose: str) -> Tensor:
        """`count` images of a pool: permutation after permutation, each image once before any comes again."""
        generator = keyed_generator(self.seed, purpose, epoch)
        passes = -(-count // len(pool))
        places = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(passes)])
        return pool[places[:count]]


class SequentialLoader(_Loader):
    """One plain pass in the order of the index: validation, test, and passes over the training set.

    It keeps no place: every `iter()` is a whole pass of its own.

    Args:
        store: images and labels.
        index: [n] int64, the images in order.
        batch_size: images of a global batch; may exceed n, then there is one batch.
        augmentation: crop and flip, or None.
        seed: of the augmentation.
        epoch: part of the augmentation's key, and `Batch.epoch`.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> store = ImageStore([(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20))])
        >>> [batch.y.tolist() for batch in SequentialLoader(store, torch.arange(3), batch_size=2)]
        [[0, 1, 2]]
    """

    def __init__(
        self,
        store: ImageStore,
        index: Tensor,
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            store,
            batch_sizes(len(index), batch_size),
            seed=seed,
            purpose="augment_pass",
            augmentation=augmentation,
            rank=rank,
            world_size=world_size,
        )
        self.batch_size = batch_size
        self.epoch = epoch
        self._index = index
        self._placed: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Images of the pass, over all processes."""
        return len(self._index)

    def __iter__(self) -> Iterator[Batch]:
        if self._placed is None:
            self._placed = self.store.send(self._index) if self.store.resident else self._index
        for batch_idx in range(len(self)):
            yield self._batch(self._placed, self.epoch, batch_idx, self.rank, self.world_size)


def extra_count(batch_size: int, extra_fraction: float) -> int:
    """Extra images in a batch: the rounded share.

    Args:
        batch_size: >= 2.
        extra_fraction: in (0, 1).

    Returns:
        A number in 1..batch_size - 1.

    Raises:
        ValueError: no share in (0, 1), or a batch that would hold only one kind of image.

    Example:
        >>> extra_count(512, 0.7)
        358
    """
    if not 0 < extra_fraction < 1:
        raise ValueError(f"dataset.extra_fraction={extra_fraction}: expected a share in (0, 1), such as 0.7")
    count = round(extra_fraction * batch_size)
    if not 0 < count < batch_size:
        raise ValueError(
            f"dataset.extra_fraction={extra_fraction} gives {count} extra images in a batch of {batch_size}: "
            "use a larger dataset.batch_size"
        )
    return count


def _fits(nbytes: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= DEVICE_SHARE * free
