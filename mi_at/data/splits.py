"""Stratified subsets by one seeded order of the training set, whose every prefix is stratified.

The validation split is a prefix of that order and the training images are what follows it, cut to the asked
size. So sizes are exact, the validation split does not depend on the training fraction, and a smaller subset
lies in a larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mi_at.data.seeding import keyed_generator


def stratified_order(labels: Tensor, *, seed: int) -> Tensor:
    """An order of all images in which every class is spread evenly.

    The j-th of the n_c images of class c (in seeded random order) stands at (j + 1/2) / n_c of the way, so a
    prefix holds every class within about one image of its share; classes that tie are ordered at random.

    Args:
        labels: [N] int64 >= 0.
        seed: the split's own seed, not the training seed.

    Returns:
        [N] int64, a permutation of 0..N-1.

    Example:
        >>> labels = torch.tensor([0] * 6 + [1] * 3)
        >>> labels[stratified_order(labels, seed=0)[:3]].bincount().tolist()
        [2, 1]
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator(seed, "split"))
    classes = labels[shuffled]
    counts = classes.bincount()
    by_class = classes.argsort(stable=True)
    place = torch.empty_like(shuffled)
    place[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[classes[by_class]]
    way = (place.double() + 0.5) / counts[classes]
    return shuffled[way.argsort(stable=True)]


def split(
    labels: Tensor, *, val_size: int = 0, fraction: float = 1.0, train_size: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Training and validation images out of the official training set.

    Args:
        labels: [N] int64, labels of the official training set.
        val_size: images held out for validation, >= 0.
        fraction: share of the remaining N - val_size images to train on, in (0, 1]; rounded to whole images.
        train_size: a number of images to train on instead of a fraction.
        seed: the split's own seed.

    Returns:
        (train, val): disjoint index tensors, int64, ascending.

    Raises:
        ValueError: a size that the set does not have, or both `fraction` and `train_size`.

    Example:
        >>> train, val = split(torch.arange(10) % 2, val_size=4, fraction=0.5, seed=0)
        >>> len(train), len(val), len(set(train.tolist()) & set(val.tolist()))
        (3, 4, 0)
    """
    count = len(labels)
    if not 0 < fraction <= 1:
        raise ValueError(f"dataset.fraction={fraction}: expected a share in (0, 1], such as 0.4")
    if not 0 <= val_size < count:
        raise ValueError(f"dataset.val_size={val_size}: expected 0 to {count - 1}, the training set has {count} images")
    rest = count - val_size
    if train_size is not None:
        if fraction != 1:
            raise ValueError(f"dataset.train_size={train_size} with dataset.fraction={fraction}: give one of the two")
        if not 1 <= train_size <= rest:
            raise ValueError(
                f"dataset.train_size={train_size}: expected 1 to {rest}, "
                f"what {val_size} images for validation leave of {count}"
            )
        size = train_size
    else:
        size = max(1, round(fraction * rest))
    order = stratified_order(labels, seed=seed)
    return order[val_size : val_size + size].sort().values, order[:val_size].sort().values
