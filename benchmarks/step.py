"""One training step side by side: ours, plain loops in the order of public code, torchattacks, and the Trainer.

On a CPU, one thread, every round runs every variant once, and ratios are medians over rounds of the ratio within a
round, in CPU time: a busy machine disturbs all variants alike.

    python benchmarks/step.py [--rounds 5] [--batch-size 16] [--json FILE]

On an NVIDIA GPU: images/s, share of the floor that bf16 matrix products set, and whether a step waits for the device.
Needs torch, pytorch-lightning and torchmetrics alone.

    python benchmarks/step.py --gpu [--minutes 4] [--json FILE]

Exit code 1 if a ratio misses what it must be, or a step on the GPU waits.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.inner import InnerMaximisation
from mi_at.callbacks.adversarial_examples import AdversarialExamples
from mi_at.callbacks.speed import Speed
from mi_at.data.batch import Batch
from mi_at.data.loader import Augmentation, DeviceLoader, ImageStore
from mi_at.defenses.base import Defense
from mi_at.defenses.standard_at import StandardAT
from mi_at.defenses.trades import Trades
from mi_at.models.base import Classifier
from mi_at.models.cnn import CNNTiny
from mi_at.models.resnet import ResNet18
from mi_at.models.wide_resnet import WRN34_10
from mi_at.optim import SGD

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
FLOOR = 790e12  # FLOP/s of a large bf16 matrix product on an H100 or H200
STANDARD_AT = 23  # forwards that a step of standard_at with PGD-10 is worth

Step = Callable[[Batch], Tensor]


# ---------------------------------------------------------------- the steps that are compared
def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def attached(defense: Defense, net: nn.Module) -> Defense:
    return defense.attach(net.train(), optimisation=SGD(lr=0.01, epochs=1, weight_decay=5e-4, schedule="constant"))


def examples(*, bf16: bool = False) -> AdversarialExamples:
    precision = "bf16" if bf16 else "fp32"
    budget = InnerMaximisation(norm="linf", eps=EPS, step_size=STEP_SIZE, steps=STEPS, precision=precision)
    return AdversarialExamples(budget)


class Ours:
    """The defense and the callback as they are, in a bare loop; `bf16` is that of training and attack."""

    def __init__(self, defense: Defense, net: nn.Module, *, bf16: bool = False) -> None:
        if bf16:
            net.to(memory_format=torch.channels_last)
        self.defense, self.bf16 = attached(defense, net), bf16
        defense.inspect_every = 0  # without a Trainer there is no count of steps
        self.examples, self.optimizer = examples(bf16=bf16), optimizer_of(net)
        self.trainer: Any = SimpleNamespace(current_epoch=0, num_training_batches=1)
        self.device = next(net.parameters()).device
        for metric in defense._accuracy.values():  # as when a fit starts
            metric.to(self.device)

    def __call__(self, batch: Batch) -> Tensor:
        self.examples.on_train_batch_start(self.trainer, self.defense, batch, batch.batch_idx)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.defense.training_step(batch, batch.batch_idx)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def backward_loop(net: nn.Module) -> Step:
    """The order of robust_overfitting's code: the attack by backward(), a forward for its loss, one for the log: 35 F.

    Every attack step computes the gradients of the weights too, which are thrown away.
    """
    optimizer = optimizer_of(net)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        delta = ((x + delta).clamp(0, 1) - x).requires_grad_(True)
        for _ in range(STEPS):
            F.cross_entropy(net(x + delta), y).backward()
            with torch.no_grad():
                moved = (delta + STEP_SIZE * delta.grad.sign()).clamp(-EPS, EPS)
                delta.copy_((x + moved).clamp(0, 1) - x)
                delta.grad.zero_()
        reached = F.cross_entropy(net(x + delta), y, reduction="none").detach()
        worst = torch.zeros_like(reached)  # of the restarts, of which there is one
        return torch.where((reached >= worst).view(-1, 1, 1, 1), delta.detach(), torch.zeros_like(x))

    def run(batch: Batch) -> Tensor:
        net.train()
        delta = attack(batch.x, batch.y)
        loss = F.cross_entropy(net((batch.x + delta).clamp(0, 1)), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        F.cross_entropy(net(batch.x), batch.y)  # for the log, graph and all
        return loss.detach()

    return run


def trades_public_order(net: nn.Module, *, beta: float = 6.0) -> Step:
    """The order of the TRADES code: clean logits again in every attack step, and twice in the loss: 39 F."""
    optimizer = optimizer_of(net)

    def divergence(x_adv: Tensor, x: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(net(x_adv), dim=1), F.softmax(net(x), dim=1), reduction="sum")

    def run(batch: Batch) -> Tensor:
        x, y = batch.x, batch.y
        net.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            x_adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(divergence(x_adv, x), [x_adv])
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.clamp(x_adv, x - EPS, x + EPS).clamp(0, 1)
        net.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) + beta * divergence(x_adv, x) / len(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def torchattacks_loop(net: nn.Module) -> Step:
    """torchattacks' PGD in a plain loop: 23 F.

    Raises:
        ImportError: it is not installed.
    """
    import torchattacks

    optimizer = optimizer_of(net)
    attack = torchattacks.PGD(net.train(), eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=True)

    def run(batch: Batch) -> Tensor:
        x_adv = attack(batch.x, batch.y)
        net.train()
        loss = F.cross_entropy(net(x_adv), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def fit(defense: Defense, loader: Iterable[Batch], *, device: torch.device, bf16: bool = False) -> None:
    """The same step in a Trainer as `mi_at.train` makes it, with its callbacks and a logger."""
    callback = examples(bf16=bf16)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            precision="bf16-mixed" if bf16 else "32-true",
            callbacks=[callback, Speed(callback)],
            logger=CSVLogger(folder),
            default_root_dir=folder,
            benchmark=True,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(defense, loader)


# ---------------------------------------------------------------- CPU
class Rounds:
    """The Trainer's loader: it runs the other variants, hands out a batch, and times the Trainer until asked again.

    The bare loop runs right before and right after the Trainer's step. The loader's length is one more than it has, so
    that it is asked after the last step too.

    Attributes:
        seconds: CPU seconds of each variant by round, after one that warms up.
    """

    BARE, AFTER, TRAINER = "standard_at", "standard_at, after the Trainer's", "standard_at in a Trainer"

    def __init__(self, bare: Step, others: Mapping[str, Step], data: Batch, rounds: int) -> None:
        self.bare, self.others, self.data, self.rounds = bare, others, data, rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in (*others, self.BARE, self.TRAINER, self.AFTER)}

    def __len__(self) -> int:
        return self.rounds + 2

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.rounds + 1):
            for name, run in self.others.items():
                self._time(name, run)
            self._time(self.BARE, self.bare)
            start = time.process_time()
            yield self.data
            self.seconds[self.TRAINER].append(time.process_time() - start)
            self._time(self.AFTER, self.bare)
        for seconds in self.seconds.values():
            del seconds[0]

    def _time(self, name: str, run: Step) -> None:
        start = time.process_time()
        run(self.data)
        self.seconds[name].append(time.process_time() - start)

    def ratio(self, slow: str, fast: str = BARE) -> float:
        return median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def trainer_ratio(self) -> float:
        """Of the Trainer's step to the bare ones beside it."""
        names = (self.TRAINER, self.BARE, self.AFTER)
        return median(2 * t / (a + b) for t, a, b in zip(*(self.seconds[name] for name in names), strict=True))


@dataclass(frozen=True)
class Ratio:
    """A measured ratio and what it must be; `counts` is False where the machine lacks what it needs."""

    what: str
    value: float
    must: float
    at_most: bool = False
    counts: bool = True

    @property
    def met(self) -> bool:
        return not self.counts or (self.value <= self.must if self.at_most else self.value >= self.must)

    def line(self) -> str:
        bound = f"{'at most' if self.at_most else 'at least'} {self.must:g}"
        verdict = ("" if self.met else "   MISSED") if self.counts else "   does not count: no AMX here"
        return f"  {self.what:<52} {self.value:>6.3f}   {bound}{verdict}"


def random_batch(images: int, channels: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, channels, size, size, generator=generator)
    return Batch(x=x, y=torch.arange(images) % 10, index=torch.arange(images))


def resnet() -> Classifier:
    torch.manual_seed(0)
    return ResNet18(num_classes=10, in_channels=3, image_size=32)


def tiny() -> Classifier:
    return CNNTiny(num_classes=10, in_channels=1, image_size=8)


def on_cpu(*, rounds: int, batch_size: int) -> tuple[dict[str, Any], bool]:
    """The interleaved run on one thread."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    others: dict[str, Step] = {
        "backward loop": backward_loop(resnet()),
        "trades": Ours(Trades(), resnet()),
        "TRADES in the public order": trades_public_order(resnet()),
        "standard_at, bf16 and channels_last": Ours(StandardAT(), resnet(), bf16=True),
    }
    try:
        others["torchattacks"] = torchattacks_loop(resnet())
    except ImportError as error:
        print(f"torchattacks is left out: {error} (pip install --no-deps torchattacks)")
    run = Rounds(Ours(StandardAT(), resnet()), others, random_batch(batch_size, 3, 32), rounds)
    fit(attached(StandardAT(), resnet()), run, device=device)
    # The Trainer's own time, where a step is short enough to see it.
    small = Rounds(Ours(StandardAT(), tiny()), {}, random_batch(16, 1, 8), rounds=100)
    fit(attached(StandardAT(), tiny()), small, device=device)

    amx = "amx_bf16" in cpu_info("flags").split()
    bf16 = run.ratio(run.BARE, "standard_at, bf16 and channels_last")
    ratios = [
        Ratio("backward loop / standard_at", run.ratio("backward loop"), 1.6),
        Ratio("TRADES in the public order / trades", run.ratio("TRADES in the public order", "trades"), 1.4),
        Ratio("standard_at in fp32 / in bf16 and channels_last", bf16, 2.0, counts=amx),
        Ratio("standard_at in a Trainer / in a bare loop", run.trainer_ratio(), 1.03, at_most=True),
    ]
    if "torchattacks" in others:
        ratios.insert(2, Ratio("torchattacks / standard_at", run.ratio("torchattacks"), 1.0))
    pairs = zip(small.seconds[small.TRAINER], small.seconds[small.BARE], strict=True)
    own, whole = 1000 * median(a - b for a, b in pairs), 1000 * median(run.seconds[run.BARE])

    print(f"{cpu_info('model name')}, torch {torch.__version__}, one thread")
    print(
        f"ResNet-18 at 32x32, PGD-{STEPS}, batch {batch_size}, {rounds} rounds; CPU seconds a step, median and range:"
    )
    for name, seconds in run.seconds.items():
        print(f"  {name:<52} {median(seconds):>6.2f}   {min(seconds):.2f} to {max(seconds):.2f}")
    print("ratios, medians of each round's:")
    for ratio in ratios:
        print(ratio.line())
    print(
        f"the Trainer's own time, on a tiny network: {own:.2f} ms a step, {100 * own / whole:.2f} % of the step above"
    )
    result = {
        "processor": cpu_info("model name"),
        "torch": torch.__version__,
        "batch_size": batch_size,
        "cpu_seconds": run.seconds,
        "ratios": [{**asdict(ratio), "met": ratio.met} for ratio in ratios],
        "trainer_ms": own,
    }
    return result, all(ratio.met for ratio in ratios)


def cpu_info(key: str) -> str:
    """A field of the first processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "unknown")


# ---------------------------------------------------------------- GPU
class Stretch:
    """A loader that times the steps between its batches: warm-up, a few watched for waits, then as many as fit.

    Args:
        loader: without end.
        seconds: for the timed steps.

    Attributes:
        steps, elapsed: timed steps, and seconds from the first to the end of the last.
        waits: the places at which the watched steps waited for the device.
    """

    WARM_UP, WATCHED, FEWEST, MOST = 4, 3, 5, 300

    def __init__(self, loader: DeviceLoader, *, seconds: float) -> None:
        self.loader, self.seconds, self.device = iter(loader), seconds, loader.store.device
        self.steps, self.elapsed = 0, 0.0
        self.waits: list[str] = []

    def __len__(self) -> int:
        return self.WARM_UP + self.WATCHED + 1 + self.MOST + 1

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.WARM_UP):
            yield next(self.loader)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._watch("warn")
            for _ in range(self.WATCHED):
                yield next(self.loader)
            self._watch("default")
        places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)}
        self.waits = sorted(places)
        start = self._now()
        yield next(self.loader)
        wanted = int(self.seconds / (self._now() - start))
        start = self._now()
        for _ in range(min(self.MOST, max(self.FEWEST, wanted))):
            yield next(self.loader)
            self.steps += 1
        self.elapsed = self._now() - start

    def _watch(self, mode: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One configuration on the GPU."""

    model: str
    batch_size: int
    how: str
    images_per_second: float
    tflops: float
    share: float
    gib: float
    waits: tuple[str, ...]

    def line(self) -> str:
        speed = f"{self.images_per_second:>9,.0f} {self.tflops:>9.1f} {100 * self.share:>6.1f} % {self.gib:>7.1f}"
        return f"  {self.model:<10} {self.batch_size:>5}  {self.how:<34} {speed}   {', '.join(self.waits) or 'none'}"


HEAD = f"  {'model':<10} {'batch':>5}  {'how':<34} {'images/s':>9} {'TFLOP/s':>9} {'floor':>8} {'GiB':>7}   waits"
MODELS: dict[str, Callable[[], Classifier]] = {
    "resnet18": resnet,
    "wrn34_10": lambda: WRN34_10(num_classes=10, in_channels=3, image_size=32),
}
# (model, batch, bf16 and channels_last, compiled, in a Trainer), the most telling first
CONFIGURATIONS = (
    ("resnet18", 512, True, False, False),
    ("resnet18", 1024, True, False, False),
    ("wrn34_10", 512, True, False, False),
    ("resnet18", 512, True, False, True),
    ("resnet18", 1024, True, True, False),
    ("wrn34_10", 512, True, True, False),
    ("resnet18", 512, False, False, False),
)


def images_on(device: torch.device, batch_size: int) -> DeviceLoader:
    """Random images of CIFAR-10's shape that lie on the device, cropped and flipped as in training; without end."""
    generator = torch.Generator().manual_seed(0)
    count = max(10_000, batch_size)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    store = ImageStore([(images, torch.arange(count) % 10)], device=device, placement="device")
    return DeviceLoader(
        store,
        torch.arange(count),
        batch_size=batch_size,
        seed=0,
        augmentation=Augmentation(),
        batches_per_epoch=1000,  # more than a stretch takes
    )


def forward_flop(net: nn.Module) -> float:
    """FLOP of one image's forward: convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as count, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32, device=device))
    return float(count.get_total_flops())


def timed(
    model: str, batch_size: int, bf16: bool, compiled: bool, in_trainer: bool, *, device: torch.device, seconds: float
) -> Row:
    """One configuration, its loader included."""
    net = MODELS[model]().to(device).eval()
    flop = STANDARD_AT * forward_flop(net)
    if compiled:
        net.compile()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    stretch = Stretch(images_on(device, batch_size), seconds=seconds)
    ours = Ours(StandardAT(), net, bf16=bf16)
    if in_trainer:
        fit(ours.defense, stretch, device=device, bf16=bf16)
    else:
        for batch in stretch:
            ours(batch)
    parts = ["bf16, channels_last" if bf16 else "fp32", *(["compiled"] * compiled), *(["in a Trainer"] * in_trainer)]
    rate = batch_size * stretch.steps / stretch.elapsed
    return Row(
        model=model,
        batch_size=batch_size,
        how=", ".join(parts),
        images_per_second=rate,
        tflops=flop * rate / 1e12,
        share=flop * rate / FLOOR,
        gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
        waits=tuple(stretch.waits),
    )


def on_gpu(*, minutes: float, save: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], bool]:
    """Every configuration, as many as fit; each is printed and saved as soon as it is known."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    started = time.perf_counter()
    rows: list[Row] = []
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": []}
    print(f"{result['device']}, torch {torch.__version__}; standard_at, PGD-{STEPS}, {STANDARD_AT} F a step;")
    print(f"floor: {FLOOR / 1e12:.0f} TFLOP/s, a bf16 matrix product on an H100 or H200\n{HEAD}", flush=True)
    for configuration in CONFIGURATIONS:
        if time.perf_counter() - started > 60 * minutes:
            print(f"  no time left for {configuration} (--minutes {minutes:g})")
            continue
        rows.append(timed(*configuration, device=device, seconds=5.0))
        print(rows[-1].line(), flush=True)
        result["rows"] = [asdict(row) for row in rows]
        save(result)
    waits = any(row.waits for row in rows)
    print("a step WAITS for the device at the places above" if waits else "no step waits for the device")
    return result, not waits


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gpu", action="store_true", help="measure on the NVIDIA GPU instead")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which no further row is begun (--gpu)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    def save(result: Mapping[str, Any]) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=2) + "\n")

    if options.gpu and not torch.cuda.is_available():
        print("benchmarks/step.py --gpu: no GPU here (torch.cuda.is_available() is False); nothing was measured")
        return 0
    if options.gpu:
        result, met = on_gpu(minutes=options.minutes, save=save)
    else:
        result, met = on_cpu(rounds=options.rounds, batch_size=options.batch_size)
    save(result)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
