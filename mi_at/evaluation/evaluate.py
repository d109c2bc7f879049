"""The evaluator: one wrapper around every attack, so that a number means the same whoever wrote the attack.

What it guarantees (shared by all attacks): eval mode, gradients on, inference mode off, parameters frozen,
their `.grad`, the modes and the global random state as before; logits in float32; only samples that are right
when clean are attacked, and the others count as wrong; what comes back is checked for shape, NaN, range and
budget.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.autoattack import forked_rng
from mi_at.attacks.contexts import attacking
from mi_at.data.batch import Batch
from mi_at.evaluation.outcomes import (
    CLEAN,
    AttackResult,
    EvalAttack,
    EvaluationError,
    EvaluationResult,
    out_of_reach,
    radius,
)
from mi_at.evaluation.progress import Progress
from mi_at.functional.geometry import norm

TOLERANCE = 1e-5  # what rounding may add to a budget or to the range [0, 1]


@dataclass(frozen=True)
class _Samples:
    """The evaluated part of a split: x [N, C, H, W], and y, index and the clean prediction [N]."""

    x: Tensor
    y: Tensor
    index: Tensor
    prediction: Tensor


def evaluate(
    net: nn.Module,
    attacks: Mapping[str, EvalAttack],
    batches: Iterable[Batch] | Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    n: int | None = None,
    n_of: Mapping[str, int] | None = None,
    batch_size: int = 500,
    progress: bool = True,
) -> EvaluationResult:
    """Accuracy of a network without and under attacks, per sample.

    The samples that are right when clean are packed into batches of `batch_size` over the whole set, so
    results of attacks that draw their noise by (seed, id) depend neither on the loader's batches nor on
    `batch_size`.

    Args:
        net: images [B, C, H, W] in [0, 1] -> logits [B, K]; moved to `device`.
        attacks: by name; "clean" is always there and must not be among them.
        batches: Batch or (x, y, index), x float in [0, 1], index the samples' places in the split; in the
            fixed order of the split.
        device: where to run; None: where the network is.
        seed: of the attacks' noise.
        n: evaluate the first n samples; None: all.
        n_of: fewer for some attacks, by name: the first so many.
        batch_size: samples attacked at once.
        progress: show it (on standard error).

    Returns:
        The outcomes, on the CPU.

    Raises:
        EvaluationError: images outside [0, 1], logits that are not finite or of the wrong shape, labels the
            network has no class for, more samples asked than exist, or an attack that broke its contract
            (named).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> batch = Batch(x=torch.rand(3, 1, 2, 2), y=torch.zeros(3, dtype=torch.long), index=torch.arange(3))
        >>> evaluate(net, {}, [batch], progress=False).clean.n
        3
    """
    if CLEAN in attacks:
        raise EvaluationError(f"an attack is named {CLEAN!r}, which always is the accuracy without one: rename it")
    if batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: expected 1 or more")
    if device is None:
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    device = torch.device(device)
    net.to(device)
    with attacking(net), _isolated(seed), net.register_forward_hook(_float32):
        started = time.perf_counter()
        samples, num_classes = _clean(net, batches, device, n)
        counts = sizes(attacks, len(samples.y), n=None, n_of=_at_most(n_of, n))
        clean = AttackResult(
            name=CLEAN,
            description={"attack": CLEAN, "eps": 0.0},
            label=samples.y,
            prediction=samples.prediction,
            distance=torch.zeros(len(samples.y)),
            seconds=time.perf_counter() - started,
        )
        results = {}
        with Progress(sum(counts.values()), enabled=progress) as bar:
            for name, attack in attacks.items():
                runs: Any = attack
                if hasattr(attack, "for_classes"):
                    runs = attack.for_classes(num_classes)
                with _isolated(seed):
                    results[name] = _attack(net, name, runs, samples, counts[name], device, seed, batch_size, bar)
    return EvaluationResult(
        index=samples.index,
        label=samples.y,
        clean=clean,
        attacks=results,
        num_classes=num_classes,
        seed=seed,
        batch_size=batch_size,
    )


def sizes(
    attacks: Iterable[str], available: int, *, n: int | None = None, n_of: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many samples each attack runs on; call it before training to refuse what cannot be done.

    Args:
        attacks: names.
        available: samples in the split.
        n: asked of all; None: all that exist. Where it is below an attack's own number, it wins.
        n_of: asked of some attacks.

    Returns:
        Attack name -> number of samples.

    Raises:
        EvaluationError: more samples than exist, fewer than 1, or a name in `n_of` that no attack has.

    Example:
        >>> sizes(["pgd", "autoattack"], 360, n_of={"autoattack": 100})
        {'pgd': 360, 'autoattack': 100}
    """
    names, n_of = list(attacks), dict(n_of or {})
    if unknown := [name for name in n_of if name not in names]:
        raise EvaluationError(f"n_of names {', '.join(unknown)}: expected one of {', '.join(names) or '(no attacks)'}")
    everything = available if n is None else n
    counts = {
        name: min(n_of[name], n) if n is not None and name in n_of else n_of.get(name, everything) for name in names
    }
    for what, count in {"n": everything, **{f"n_of.{name}": counts[name] for name in n_of}}.items():
        if count < 1:
            raise EvaluationError(f"{what}={count}: expected 1 or more")
        if count > available:
            raise EvaluationError(
                f"{what}={count}, but the split has {available} samples: ask for {available} or fewer"
            )
    return counts


def _at_most(n_of: Mapping[str, int] | None, n: int | None) -> dict[str, int]:
    return {name: count if n is None else min(count, n) for name, count in (n_of or {}).items()}


def _clean(net: nn.Module, batches: Iterable[Any], device: torch.device, n: int | None) -> tuple[_Samples, int]:
    """Read the first n samples and predict them; the images stay where the loader left them."""
    if n is not None and n < 1:
        raise EvaluationError(f"n={n}: expected 1 or more")
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    found, num_classes = 0, 0
    for batch in batches:
        x, y, index = (batch.x, batch.y, batch.index) if isinstance(batch, Batch) else batch
        keep = len(y) if n is None else min(len(y), n - found)
        x, y, index = x[:keep], y[:keep].cpu(), index[:keep].cpu()
        _check_images(x)
        logits = _logits(net, x.to(device), "of clean images")
        num_classes = logits.shape[1]
        if int(y.min()) < 0 or int(y.max()) >= num_classes:
            raise EvaluationError(
                f"labels lie in [{int(y.min())}, {int(y.max())}], but the network has {num_classes} classes:"
                " is it a network for another data set?"
            )
        parts.append((x, y, index, logits.argmax(dim=1).cpu()))
        found += keep
        if found == n:
            break
    if n is not None and found < n:
        raise EvaluationError(f"n={n}, but the split has {found} samples: ask for {found} or fewer")
    if not parts:
        raise EvaluationError("there are no samples to evaluate: the loader is empty")
    # `cat` copies: tensors a loader made in inference mode could not enter a graph.
    samples = _Samples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    if len(samples.index.unique()) != found:
        raise EvaluationError("the loader gave some samples more than once: evaluate without padding or repetition")
    return samples, num_classes


def _attack(
    net: nn.Module,
    name: str,
    attack: EvalAttack,
    samples: _Samples,
    n: int,
    device: torch.device,
    seed: int,
    batch_size: int,
    bar: Progress,
) -> AttackResult:
    """Run one attack on those of the first n samples that are right when clean."""
    started = time.perf_counter()
    bar.begin(name)
    description = {**attack.describe(), "name": name}
    label = samples.y[:n]
    prediction, distance = samples.prediction[:n].clone(), torch.zeros(n)
    right = (prediction == label).nonzero().squeeze(1)
    robust, seen = 0, n - len(right)
    bar.advance(seen, robust, seen)
    flags: dict[str, str] = {}
    options: dict[str, Any] = {}
    places_at_once = batch_size
    if whole_set := bool(getattr(attack, "whole_set", False)):
        places_at_once = max(1, len(right))
        options = {
            "on_progress": lambda part, done, total, broken: bar.note(
                f"{part} {done}/{total}, {100 * (len(right) - broken) / n:.1f} % right of {n}"
            ),
            "on_flag": flags.setdefault,
        }
    for places in right.split(places_at_once):
        if not len(places):  # nothing is right when clean
            break
        x, y, ids = (t[places.to(t.device)] for t in (samples.x, samples.y, samples.index))
        # A whole set may not fit on the device: the attack moves its own batches there.
        at = x.device if whole_set else device
        x, y, ids = x.to(at), y.to(at), ids.to(at)
        with attacking(net):  # again: an attack may leave another mode behind
            x_adv = attack(net, x, y, ids=ids, seed=seed, **options)
        distance[places] = _check_attacked(x_adv, x, name, description)
        prediction[places] = _predict(net, x_adv, device, batch_size, name)
        robust, seen = robust + int((prediction[places] == label[places]).sum()), seen + len(places)
        bar.advance(len(places), robust, seen)
    if description.get("fallback"):
        flags["fallback"] = str(description["fallback"])
    if out_of_reach(description):
        flags["reach"] = (
            f"{description['steps']} steps of {description['step_size']} cannot cross a ball"
            f" of eps {description['eps']}"
        )
    result = AttackResult(
        name=name,
        description=description,
        label=label,
        prediction=prediction,
        distance=distance,
        flags=tuple(sorted(flags)),
        messages=flags,
        seconds=time.perf_counter() - started,
    )
    bar.end(result.accuracy, n, result.seconds)
    return result


def _check_attacked(x_adv: Tensor, x: Tensor, name: str, description: Mapping[str, Any]) -> Tensor:
    """The distances [B] on the CPU; raises where the attack broke its contract."""
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or not x_adv.is_floating_point():
        what = f"{x_adv.dtype} {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
        raise EvaluationError(f"attack {name} returned {what}: expected float images {tuple(x.shape)}")
    delta = x_adv.detach().float() - x.float()
    if not bool(delta.isfinite().all()):
        bad = int((~delta.isfinite()).flatten(1).any(dim=1).sum())
        raise EvaluationError(f"attack {name} returned NaN or infinite pixels in {bad} of {len(x)} images")
    low, high = (float(value) for value in x_adv.detach().aminmax())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise EvaluationError(f"attack {name} left the pixel range: found [{low:.6g}, {high:.6g}], allowed [0, 1]")
    eps = radius(description)
    kind = str(description.get("norm") or "linf")
    moved = norm(delta, kind).cpu()
    if eps is not None and float(moved.max()) > eps + TOLERANCE:
        raise EvaluationError(
            f"attack {name} broke its budget: found {kind} {float(moved.max()):.6g}, allowed {eps:.6g}"
        )
    return moved


def _predict(net: nn.Module, x: Tensor, device: torch.device, batch_size: int, name: str) -> Tensor:
    parts = x.detach().split(batch_size)
    return torch.cat([_logits(net, part.to(device), f"under attack {name}").argmax(dim=1).cpu() for part in parts])


def _float32(module: nn.Module, args: Any, logits: Any) -> Any:
    """A forward hook: half-precision logits are too coarse for a loss, and some attacks fail on them."""
    return logits.float() if isinstance(logits, Tensor) and logits.dtype.itemsize < 4 else logits


def _logits(net: nn.Module, x: Tensor, where: str) -> Tensor:
    with torch.no_grad():
        logits = net(x).float()
    if logits.ndim != 2 or len(logits) != len(x):
        raise EvaluationError(f"the network gave {tuple(logits.shape)} for {len(x)} images: expected [B, classes]")
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(dim=1).sum())
        raise EvaluationError(f"the network's logits {where} are NaN or infinite for {bad} of {len(x)} samples")
    return logits


def _check_images(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim != 4:
        raise EvaluationError(f"images are {x.dtype} {tuple(x.shape)}: expected float [B, C, H, W] in [0, 1]")
    low, high = (float(value) for value in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise EvaluationError(
            f"images lie in [{low:.4g}, {high:.4g}]: expected [0, 1]; put normalisation into the network"
        )


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Global random states, torch's and Python's, seeded in the block and as before after it."""
    state = random.getstate()
    try:
        with forked_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)
