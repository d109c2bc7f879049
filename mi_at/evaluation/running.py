"""Runs the attacks of one evaluation piece by piece, and makes of each what it found per sample."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mi_at.attacks.autoattack import forked_rng
from mi_at.attacks.contexts import attacking
from mi_at.attacks.packing import BatchSize, Kept, Packing, out_of_memory, tensor
from mi_at.evaluation.outcomes import EvalAttack, EvaluationError, Examples, radius
from mi_at.evaluation.pieces import Pieces, fingerprint
from mi_at.evaluation.progress import Progress
from mi_at.functional import random as noise
from mi_at.functional.geometry import NORMS, norm

TOLERANCE = 1e-5  # what rounding may add to a budget or to the range [0, 1]

# docs/AUDIT.md: float32 logits of one network differ by about 1e-6 of their spread from kernel to kernel.
SAME = 1e-4

WITHIN = "within_"  # of examples that count as broken within a radius only


@dataclass(frozen=True)
class Samples:
    """The evaluated part of a split, on the CPU: x [N, C, H, W], and y, index and the clean prediction [N]."""

    x: Tensor
    y: Tensor
    index: Tensor
    prediction: Tensor

    @property
    def right(self) -> Tensor:
        """[N] bool."""
        return self.prediction == self.y


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an evaluation does; with the network it decides every outcome of our own attacks.

    Attributes:
        attacks: by name, as they suit the network's classes.
        counts: on how many samples each runs, the first of the split.
        samples: all of them.
        seed: of the attacks' noise.
        batch_size: samples at once, to begin with.
        block: samples of a piece; None: all.
        key: fingerprint of the network and the samples.
        active, survivors, keep, keep_images: as `evaluate` takes them.
    """

    attacks: Mapping[str, EvalAttack]
    counts: Mapping[str, int]
    samples: Samples
    seed: int
    batch_size: int
    block: int | None
    key: str
    active: bool
    survivors: bool
    keep: int
    keep_images: tuple[str, ...]

    def everything(self, name: str) -> bool:
        """Whether an attack gets every sample, wrong ones too: all images or outputs are wanted, or fixed blocks."""
        attack = self.attacks[name]
        return name in self.keep_images or says(attack, "batch_coupled") or says(attack, "raw")

    def before(self, name: str) -> list[str]:
        """The attacks whose victims an attack is spared: earlier ones of its threat model on as many samples."""
        threat = _threat(self.attacks[name])
        if not self.survivors or threat is None or says(self.attacks[name], "minimum_norm") or self.everything(name):
            return []
        names = list(self.attacks)
        return [
            other
            for other in names[: names.index(name)]
            if _threat(self.attacks[other]) == threat and self.counts[other] == self.counts[name]
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one attack did to its n samples.

    Attributes:
        prediction: [n] int64, the clean one where it was wrong already; of an earlier attack where that broke it.
        distance: [n] float32.
        raw: [n] int64, the prediction on the attacked image also of samples that were wrong already; None where the
            attack does not ask for it.
        seconds: of computing.
        flags: name -> message.
        examples: the strongest; within: those within the radius of a minimum-norm attack.
        images: [n, C, H, W], where they are wanted.
    """

    prediction: Tensor
    distance: Tensor
    raw: Tensor | None
    seconds: float
    flags: Mapping[str, str]
    examples: Examples
    within: Examples
    images: Tensor | None


class Runner:
    """Computes the pieces of a plan with one network on one device.

    Args:
        net: on `device`, within `prepared`.
        plan: what to do.
        device: where.
        pieces: what is done already, and where to keep what is done here.
        bar: shows it.
    """

    def __init__(self, net: nn.Module, plan: Plan, device: torch.device, pieces: Pieces, bar: Progress) -> None:
        self.net, self.plan, self.device, self.pieces, self.bar = net, plan, device, pieces, bar
        self.batch = BatchSize(
            plan.batch_size, on_halving=lambda size: bar.say(f"out of memory: {size} samples at once from here on")
        )
        self._outcomes: dict[str, Outcome] = {}

    def run_free(self) -> None:
        """Compute every piece that nobody else is computing."""
        for name in self.plan.attacks:
            self.outcome(name, wait=False)

    def outcome(self, name: str, *, wait: bool = True) -> Outcome | None:
        """What an attack found; None if some of it is being computed elsewhere and we do not wait."""
        if name in self._outcomes:
            return self._outcomes[name]
        attack, samples, n = self.plan.attacks[name], self.plan.samples, self.plan.counts[name]
        prediction, distance = samples.prediction[:n].clone(), torch.zeros(n)
        enters = samples.right[:n].clone()
        for other in self.plan.before(name):
            earlier = self.finished(other)
            broken = enters & _broken(earlier, self.plan.attacks[other], samples)
            prediction[broken] = earlier.prediction[broken]
            distance[broken] = earlier.distance[broken]
            enters &= ~broken
        if self.plan.everything(name):
            enters = torch.ones(n, dtype=torch.bool)
        places = enters.nonzero().squeeze(1)
        images = samples.x[:n].float().cpu().clone() if name in self.plan.keep_images else None
        raw = prediction.clone() if says(attack, "raw") else None

        def right() -> int:
            return int((prediction == samples.y[:n]).sum())

        parts: list[tuple[Tensor, Kept]] = []
        self.bar.begin(name)
        for part, kept, found in self._parts(name, attack, places, right, wait=wait):
            parts.append((part, kept))
            here, there = tensor(kept, "prediction"), samples.right[part]
            prediction[part[there]] = here[there]
            distance[part[there]] = tensor(kept, "distance")[there]
            if raw is not None:
                raw[part] = here
            if images is not None:
                images[part] = tensor(kept, "images")
            done = sum(len(part) for part, _ in parts)
            self.bar.at(done / len(places), right(), n, found=found)
        if sum(len(part) for part, _ in parts) < len(places):
            return None
        flags: dict[str, str] = {}
        for _, kept in parts:
            flags = {**json.loads(str(kept["flags"])), **flags}
        outcome = Outcome(
            prediction=prediction,
            distance=distance,
            raw=raw,
            seconds=sum(float(tensor(kept, "seconds") + tensor(kept, "inner_seconds")) for _, kept in parts),
            flags=flags,
            examples=self._strongest([kept for _, kept in parts], ""),
            within=self._strongest([kept for _, kept in parts], WITHIN),
            images=images,
        )
        self.bar.end(right() / n, n, outcome.seconds)
        self._outcomes[name] = outcome
        return outcome

    def finished(self, name: str) -> Outcome:
        """What an attack found, however long it takes."""
        outcome = self.outcome(name)
        if outcome is None:
            raise RuntimeError(f"pieces of {name} are missing although they were waited for")
        return outcome

    def _parts(
        self, name: str, attack: EvalAttack, places: Tensor, right: Callable[[], int], *, wait: bool
    ) -> Iterator[tuple[Tensor, Kept, bool]]:
        """(places, outcome, whether it was there already) of every piece of an attack."""
        if not len(places):
            return
        coupled, whole = says(attack, "batch_coupled"), says(attack, "whole_set")
        size = (getattr(attack, "batch_size", None) or self.plan.batch_size) if coupled else self.plan.block
        blocks = [places] if whole or size is None else list(places.split(size))
        if coupled and len(blocks) > 1 and len(blocks[-1]) == 1:  # a coupled loss needs two samples
            blocks[-2:] = [torch.cat(blocks[-2:])]
        mark = fingerprint(
            self.plan.key,
            self.plan.seed,
            attack,
            dict(attack.describe()),
            places,
            size,
            self.plan.keep,
            name in self.plan.keep_images,
        )
        names = [f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{mark}-{number:04d}" for number in range(len(blocks))]
        computed: set[int] = set()

        def compute(number: int) -> Kept:
            computed.add(number)
            done = sum(len(block) for block in blocks[:number])

            def progress(share: float, broken: int, note: str = "") -> None:
                everything = (done + share * len(blocks[number])) / len(places)
                self.bar.at(everything, max(0, right() - broken), self.plan.counts[name], note=note)

            return self._piece(name, attack, blocks[number], number, names[number], progress)

        if whole and says(attack, "shares") and not self.pieces.has(names[0]):
            # Its batches are pieces themselves: every process takes part in them before one of them sums up.
            summed_up = compute(0)
            for _, kept in self.pieces.run(names, lambda number: summed_up):
                yield blocks[0], kept, False
            return
        for number, kept in self.pieces.run(names, compute, wait=wait):
            yield blocks[number], kept, number not in computed

    def _piece(
        self,
        name: str,
        attack: Any,
        places: Tensor,
        number: int,
        file: str,
        progress: Callable[..., None],
    ) -> Kept:
        """Attack some samples, look at what came back, and keep what a table, a page or a metric needs."""
        samples, plan = self.plan.samples, self.plan
        description = attack.describe()
        flags: dict[str, str] = {}
        x, y, ids = (values[places.to(values.device)] for values in (samples.x, samples.y, samples.index))
        inner_seconds = 0.0

        def judge(x_adv: Tensor, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            moved = check_attacked(x_adv, x, name, description)
            logits = logits_of(self.net, x_adv.to(self.device), ids, plan.seed, f"under attack {name}")
            confidence, prediction = logits.softmax(dim=1).max(dim=1)
            return prediction.cpu(), confidence.cpu(), moved.cpu()

        done, broken = 0, 0

        def attack_and_judge(x: Tensor, y: Tensor, ids: Tensor, right: Tensor) -> tuple[Tensor, ...]:
            nonlocal done, broken
            here, labels, names = x.to(self.device), y.to(self.device), ids.to(self.device)
            with attacking(self.net):  # again: an attack may leave another mode behind
                x_adv = attack(self.net, here, labels, ids=names, seed=plan.seed)
            check_shape(x_adv, x, name)
            judged = judge(x_adv, here, names)
            done, broken = done + len(x), broken + int(((judged[0] != y) & right).sum())
            progress(done / len(places), broken)
            return x_adv.detach().to("cpu", torch.float32), *judged

        right = samples.right[places]
        with isolated(plan.seed + number):
            if says(attack, "refills") or says(attack, "whole_set"):
                with attacking(self.net):
                    if says(attack, "refills"):
                        packing = Packing(
                            batch=self.batch, device=self.device, active=plan.active, on_progress=progress
                        )
                        x_adv = attack(self.net, x, y, ids=ids, seed=plan.seed, packing=packing)
                    else:
                        here = x.device  # a whole set may not fit on the device: the attack moves its own batches
                        x_adv, inner_seconds = self._whole_set(
                            attack, x, y.to(here), ids.to(here), file, flags, progress
                        )
                check_shape(x_adv, x, name)
                judged = self.batch.map(judge, x_adv, x, ids)
            elif says(attack, "batch_coupled"):
                batch = BatchSize(len(x), on_halving=lambda size: flags.update(memory=_in_parts(len(x), size)))
                x_adv, *judged = batch.map(attack_and_judge, x, y, ids, right)
            else:
                x_adv, *judged = self.batch.map(attack_and_judge, x, y, ids, right)
        prediction, confidence, moved = judged
        wrong = (prediction != y) & right
        kept: Kept = {"prediction": prediction, "distance": moved, "flags": json.dumps(flags)}
        kept["inner_seconds"] = torch.tensor(inner_seconds, dtype=torch.float64)
        within = getattr(attack, "within", None) if says(attack, "minimum_norm") else None
        for prefix, chosen in (
            ("", wrong),
            (WITHIN, wrong & (moved <= within) if within is not None else wrong & False),
        ):
            rows = chosen.nonzero().squeeze(1)
            rows = rows[confidence[rows].argsort(descending=True, stable=True)[: plan.keep]]
            kept[f"{prefix}examples"] = places[rows]
            kept[f"{prefix}examples_x_adv"] = x_adv[rows].cpu().float()
            kept[f"{prefix}examples_prediction"] = prediction[rows]
            kept[f"{prefix}examples_confidence"] = confidence[rows]
        if name in plan.keep_images:
            kept["images"] = x_adv.cpu().float()
        return kept

    def _whole_set(
        self,
        attack: Any,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        file: str,
        flags: dict[str, str],
        progress: Callable[..., None],
    ) -> tuple[Tensor, float]:
        """An attack that batches by itself; its seconds where its batches are pieces."""
        parts: dict[str, float] = {}
        names = list(getattr(attack, "attacks", None) or ())

        def told(part: str, done: int, total: int, broken: int) -> None:
            parts[part] = done / total if total else 0.0
            progress(sum(parts.values()) / max(len(names), len(parts)), broken, f"{part} {done}/{total}")

        options: dict[str, Any] = {"on_progress": told, "on_flag": flags.setdefault}
        if not says(attack, "shares"):
            return attack(self.net, x, y, ids=ids, seed=self.plan.seed, **options), 0.0
        steps = self.pieces.within(f"{file}-batches")
        return attack(self.net, x, y, ids=ids, seed=self.plan.seed, steps=steps, **options), steps.seconds

    def _strongest(self, parts: list[Kept], prefix: str) -> Examples:
        """The examples of all pieces, the most confident first."""
        samples = self.plan.samples
        names = ("examples", "examples_prediction", "examples_confidence", "examples_x_adv")
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), samples.x[:0])
        places, prediction, confidence, x_adv = (
            torch.cat([tensor(kept, prefix + name) for kept in parts]) if parts else nothing
            for name, nothing in zip(names, empty, strict=True)
        )
        first = confidence.argsort(descending=True, stable=True)[: self.plan.keep]
        places = places[first]
        return Examples(
            index=samples.index[places],
            label=samples.y[places],
            clean_prediction=samples.prediction[places],
            prediction=prediction[first],
            confidence=confidence[first],
            x=samples.x[places].cpu().float(),
            x_adv=x_adv[first].cpu().float(),
        )


@contextmanager
def prepared(net: nn.Module, seed: int) -> Iterator[None]:
    """The network as every attack gets it: frozen, in eval mode, float32 logits with a gradient; restored after it."""
    with attacking(net), isolated(seed), net.register_forward_hook(_attackable):
        yield


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Global random states, torch's and Python's, seeded in the block and as before after it."""
    state = random.getstate()
    try:
        with forked_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def _attackable(module: nn.Module, args: Any, logits: Any) -> Any:
    """A forward hook: float32, for coarser logits fail attacks; and a gradient of zero where there is none at all."""
    if not isinstance(logits, Tensor):
        return logits
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        logits = logits + 0 * x.sum().to(logits)
    return logits


def without_gradient(gradient: Tensor) -> Tensor:
    """[B] bool: a sample's gradient [B, D] is zero, or not a number somewhere."""
    return (gradient == 0).all(dim=1) | ~gradient.isfinite().all(dim=1)


def input_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, D] on the CPU: the gradient of the cross-entropy at the images, zero where there is none at all.

    Args:
        net: the network, prepared.
        x: [B, C, H, W], on its device.
        y: [B] int64.
    """
    x = x.detach().clone().requires_grad_()
    value = F.cross_entropy(net(x).float(), y.to(x.device), reduction="sum")
    gradient: Tensor | None = torch.autograd.grad(value, x, allow_unused=True)[0]
    return (torch.zeros_like(x) if gradient is None else gradient).flatten(1).cpu()


def clean_logits(net: nn.Module, x: Tensor, ids: Tensor, seed: int) -> Tensor:
    """`logits_of` clean images, the first that a network is shown.

    Raises:
        EvaluationError: as `logits_of`; or the network fails.
    """
    try:
        return logits_of(net, x, ids, seed, "of clean images")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, EvaluationError) or out_of_memory(error):
            raise
        raise EvaluationError(f"the network fails on images {tuple(x.shape)}: {error}") from error


def spread(logits: Tensor) -> float:
    """How far a sample's largest logit lies above its median one, in the median over samples: the unit of a difference.

    Not above the smallest: a class masked by a large constant would make every difference a small one.
    """
    above = logits.amax(dim=1) - logits.median(dim=1).values
    return max(float(above.median()), torch.finfo(torch.float32).tiny)


def logits_of(net: nn.Module, x: Tensor, ids: Tensor, seed: int, where: str) -> Tensor:
    """[B, K] float32; noise of stochastic layers is drawn by (seed, id).

    Raises:
        EvaluationError: of another shape or type, NaN or infinite.
    """
    with torch.no_grad(), noise.keyed(ids.to(x.device), noise.key(seed, "logits")):
        logits = net(x.detach())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"the network gave {what} for {len(x)} images: expected [B, classes]")
    if not logits.is_floating_point():
        raise EvaluationError(
            f"the network gave {str(logits.dtype).removeprefix('torch.')} for its logits: expected float; return the "
            "scores themselves, before they are rounded or compared"
        )
    if logits.shape[1] < 2:
        raise EvaluationError("the network gave one logit an image: expected one for each class, of 2 classes or more")
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(dim=1).sum())
        raise EvaluationError(
            f"the network's logits {where} are NaN or infinite for {bad} of {len(x)} samples: every logit must be "
            "finite; look at its weights, at divisions and at logarithms"
        )
    return logits.float()


def check_shape(x_adv: Any, x: Tensor, name: str) -> None:
    """Refuse what is no batch of images like those the attack was given.

    Raises:
        EvaluationError: naming the attack and what it returned.
    """
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or not x_adv.is_floating_point():
        what = f"{x_adv.dtype} {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
        raise EvaluationError(f"attack {name} returned {what}: expected float images {tuple(x.shape)}")


def check_attacked(x_adv: Tensor, x: Tensor, name: str, description: Mapping[str, Any]) -> Tensor:
    """The distances [B].

    Raises:
        EvaluationError: NaN, pixels outside [0, 1], or farther than the attack's eps.
    """
    delta = x_adv.detach().float() - x.float()
    if not bool(delta.isfinite().all()):
        bad = int((~delta.isfinite()).flatten(1).any(dim=1).sum())
        raise EvaluationError(f"attack {name} returned NaN or infinite pixels in {bad} of {len(x)} images")
    low, high = (float(value) for value in x_adv.detach().aminmax())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise EvaluationError(f"attack {name} left the pixel range: found [{low:.6g}, {high:.6g}], allowed [0, 1]")
    kind = str(description.get("norm") or "linf")
    if kind not in NORMS:  # a budget of another kind (moved mass) is the attack's own to keep
        return norm(delta, "linf")
    eps, moved = radius(description), norm(delta, kind)
    if eps is not None and float(moved.max()) > eps + TOLERANCE:
        raise EvaluationError(
            f"attack {name} broke its budget: found {kind} {float(moved.max()):.6g}, allowed {eps:.6g}"
        )
    return moved


def says(attack: Any, what: str) -> bool:
    """Whether an attack claims a property (`EvalAttack`)."""
    return bool(getattr(attack, what, False))


def _threat(attack: EvalAttack) -> tuple[str, float] | None:
    description = attack.describe()
    eps = getattr(attack, "within", None) if says(attack, "minimum_norm") else radius(description)
    return None if eps is None else (str(description.get("norm")), float(eps))


def _broken(outcome: Outcome, attack: EvalAttack, samples: Samples) -> Tensor:
    """[n] bool: right when clean and wrong within the threat model of the attack."""
    n = len(outcome.prediction)
    broken = (outcome.prediction != samples.y[:n]) & samples.right[:n]
    if says(attack, "minimum_norm"):
        broken &= outcome.distance <= float(getattr(attack, "within"))  # noqa: B009
    return broken


def _in_parts(size: int, part: int) -> str:
    return f"a block of {size} did not fit into memory and was attacked in parts of {part}, on which the result depends"
