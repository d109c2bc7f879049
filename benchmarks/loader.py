"""Images per second per core: our loader against torchvision's transforms in a DataLoader.

Both give shuffled batches of CIFAR-10, randomly cropped (padding 4) and flipped, as float32 in [0, 1], on
one CPU thread and without worker processes. Rounds alternate, so that a slow moment of the machine hits both.
Uses the real images under MI_AT_DATA (or --root), random ones of the same shape without them.

    python benchmarks/loader.py [--rounds 5] [--batch-size 128] [--root data]

Exit code 1 if the ratio of the medians is below 8.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

GOAL = 8.0


def read_images(root: Path) -> tuple[Tensor, Tensor, str]:
    """CIFAR-10's training set, or random numbers in its place."""
    from mi_at.data.cifar import CIFAR10

    try:
        images = CIFAR10(root=root).read("train")
    except FileNotFoundError:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (50_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return x, torch.arange(50_000) % 10, "random images of CIFAR-10's shape"
    return images.x, images.y, "CIFAR-10"


def ours(x: Tensor, y: Tensor, batch_size: int) -> Callable[[int], int]:
    from mi_at.data.loader import Augmentation, DeviceLoader, ImageStore

    loader = DeviceLoader(
        ImageStore([(x, y)]), torch.arange(len(y)), batch_size=batch_size, seed=0, augmentation=Augmentation()
    )

    def run(batches: int) -> int:
        iter(loader)
        return sum(len(next(loader)) for _ in range(batches))

    return run


def torchvisions(x: Tensor, y: Tensor, batch_size: int) -> Callable[[int], int]:
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Images(Dataset[tuple[Tensor, int]]):
        """What torchvision.datasets.CIFAR10 does per image."""

        def __init__(self) -> None:
            self.data, self.targets = x.permute(0, 2, 3, 1).contiguous().numpy(), y.tolist()
            self.transform = transforms.Compose(
                [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
            )

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(Image.fromarray(self.data[index])), self.targets[index]

    loader = DataLoader(Images(), batch_size=batch_size, shuffle=True, num_workers=0)

    def run(batches: int) -> int:
        source = iter(loader)
        return sum(len(next(source)[0]) for _ in range(batches))

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("MI_AT_DATA", "data")))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y, what = read_images(options.root)
    whole = len(y) // options.batch_size
    runs = {
        "torchvision": (torchvisions(x, y, options.batch_size), min(whole, 40)),
        "mi_at": (ours(x, y, options.batch_size), whole),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, (run, batches) in runs.items():
            start = time.perf_counter()
            count = run(batches)
            if turn:  # the first round warms up
                rates[name].append(count / (time.perf_counter() - start))
    print(f"{what}, batch {options.batch_size}, one thread, torch {torch.__version__}, {options.rounds} rounds")
    for name, values in rates.items():
        print(f"  {name:<12} {median(values):>9,.0f} images/s   ({min(values):,.0f} to {max(values):,.0f})")
    ratio = median(rates["mi_at"]) / median(rates["torchvision"])
    print(f"  ratio        {ratio:>9.1f}            (goal {GOAL:.0f})")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
