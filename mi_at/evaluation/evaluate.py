"""The evaluator: one wrapper around every attack, so that a number means the same whoever wrote the attack.

What it guarantees (shared by all attacks): eval mode, gradients on, inference mode off, parameters frozen,
their `.grad`, the modes and the global random state as before; logits in float32; only samples that are right
when clean are attacked, and the others count as wrong; what comes back is checked for shape, NaN, range and
budget.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.attacks.objectives import check_tap
from mi_at.attacks.packing import BatchSize, Kept, tensor
from mi_at.data.batch import Batch
from mi_at.evaluation.identity import LOOKED_AT, identify, key_of
from mi_at.evaluation.outcomes import (
    CLEAN,
    AttackResult,
    EvalAttack,
    EvaluationError,
    EvaluationResult,
    Examples,
    Identity,
    out_of_reach,
)
from mi_at.evaluation.pieces import Pieces, fingerprint
from mi_at.evaluation.progress import Progress, cost
from mi_at.evaluation.running import (
    SAME,
    Outcome,
    Plan,
    Runner,
    Samples,
    clean_logits,
    prepared,
    says,
    without_gradient,
)
from mi_at.evaluation.sharing import helpers

SOFTMAX_TOLERANCE = 1e-4  # of a sum of probabilities from 1
WITHOUT_GRADIENT = 0.1  # of the images looked at; as the audit's zero_grad
NO_GRADIENT = (
    f"of the first {LOOKED_AT} images more than a tenth have an input gradient of zero or none: "
    "what an attack by gradients leaves is no robustness; evaluation=audit says more"
)
STOCHASTIC = (
    "two equal forwards give other logits: the network draws noise at test, which an attack that sees one draw chases "
    "in vain; quote an attack in expectation (eot_pgd, AutoAttack's version rand); evaluation=audit says more"
)
OWN_SURROGATE = "the surrogate is the network itself, whose gradients it gives away: no black box; give another one"
SOFTMAX = (
    "the network returns a probability distribution, not logits: its softmax hides the gradient, "
    "and losses that expect logits are weaker than they claim; return what enters the softmax"
)
ON_CPU = 128  # samples at once, where it is ours to choose
MOST = 4096
BATCHES_OF_A_PIECE = 4  # few enough to lose little when killed, enough to keep the batch full


def evaluate(
    net: nn.Module,
    attacks: Mapping[str, EvalAttack],
    batches: Iterable[Batch] | Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    n: int | None = None,
    n_of: Mapping[str, int | None] | None = None,
    batch_size: int | str = 500,
    progress: bool = True,
    num_classes: int | None = None,
    state: Path | str | None = None,
    processes: int = 1,
    active: bool = True,
    survivors: bool = False,
    keep: int = 8,
    keep_images: Sequence[str] = (),
) -> EvaluationResult:
    """Accuracy of a network without and under attacks, per sample.

    The samples that are right when clean are packed into batches over the whole set, and results of attacks
    that draw their noise by (seed, id) depend neither on the loader's batches, nor on `batch_size`, `active`,
    `processes`, nor on a kill.

    Args:
        net: images [B, C, H, W] in [0, 1] -> logits [B, K]; moved to `device`.
        attacks: by name; "clean" is always there and must not be among them.
        batches: Batch or (x, y, index), x float in [0, 1], index the samples' places in the split; in the
            fixed order of the split.
        device: where to run; None: where the network is.
        seed: of the attacks' noise.
        n: evaluate the first n samples; None: all.
        n_of: fewer for some attacks, by name: the first so many.
        batch_size: samples attacked at once, or "auto": what fits on the device. Where memory runs out, it
            halves and the evaluation goes on.
        progress: show it (on standard error).
        num_classes: what the network must have; None: that is not checked.
        state: a folder for what is finished: an evaluation that was killed goes on from there, and several
            processes that are given the same folder share the work. It may hold other evaluations too. None:
            nothing is kept.
        processes: that share the work, this one among them; each takes one GPU in turn.
        active: attack only what is still right, with the batch refilled; off, whole batches: the same result.
        survivors: an attack gets only what no earlier one of the same norm, eps and n has broken. Its row
            then is the accuracy under all of them so far, and says so (`of: survivors`).
        keep: examples per attack.
        keep_images: attacks whose images of every sample are wanted: they get the wrong ones too, and must
            return the last iterate of a single start.

    Returns:
        The outcomes, on the CPU.

    Raises:
        EvaluationError: images outside [0, 1] or of another shape than the network takes, logits that are not
            finite or of the wrong shape, labels the network has no class for, more samples asked than exist, a
            setting out of range, or an attack that broke its contract (named).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> batch = Batch(x=torch.rand(3, 1, 2, 2), y=torch.zeros(3, dtype=torch.long), index=torch.arange(3))
        >>> evaluate(net, {}, [batch], progress=False).clean.n
        3
    """
    _check_settings(attacks, batch_size, processes, keep, keep_images)
    if device is None:
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    device = torch.device(device)
    net.to(device)
    with ExitStack() as stack:
        stack.enter_context(prepared(net, seed))
        if state is None and processes > 1:
            state = stack.enter_context(tempfile.TemporaryDirectory(prefix="mi_at-evaluation-"))
        pieces = Pieces(None if state is None else Path(state))
        x, y, index = _read(batches, n)
        counts = sizes(attacks, len(y), n_of=_at_most(n_of, n))
        batch = BatchSize(fitting_batch_size(net, x, device) if isinstance(batch_size, str) else batch_size)
        identity, noise, gradient = identify(net, x, y, index, device=device, seed=seed)
        doubts = _doubts(noise, gradient)
        key = "" if pieces.folder is None else key_of(pieces, identity)
        clean = _clean(net, (x, y, index), pieces, f"clean-{key}", device=device, batch=batch, seed=seed)
        classes = int(tensor(clean, "classes"))
        _check_classes(y, classes, num_classes)
        samples = Samples(x, y, index, tensor(clean, "prediction"))
        adapted = {name: _for_classes(attack, classes) for name, attack in attacks.items()}
        check_taps(net, adapted)
        plan = Plan(
            attacks=_with_surrogates(adapted, samples, pieces, key, device=device, batch=batch, seed=seed),
            counts=counts,
            samples=samples,
            seed=seed,
            batch_size=batch.size,
            block=_block(pieces, key, batch.size, len(y), processes),
            key=key,
            active=active,
            survivors=survivors,
            keep=keep,
            keep_images=tuple(keep_images),
        )
        work = {name: counts[name] * cost(attack.describe()) for name, attack in plan.attacks.items()}
        bar = stack.enter_context(Progress(work, enabled=progress))
        runner = Runner(net, plan, device, pieces, bar)
        if processes > 1 and pieces.folder is not None:
            stack.enter_context(helpers(net, plan, device, pieces.folder, processes))
        if pieces.folder is not None:
            runner.run_free()  # what another process is at can wait until all else is done
        outcomes = {name: runner.finished(name) for name in plan.attacks}
        own = _own_surrogates(plan, identity, device)
    if bool(tensor(clean, "softmax")):
        doubts["softmax"] = SOFTMAX
    return _result(plan, outcomes, clean, identity, doubts, own, classes=classes, batch_size=runner.batch.size)


def identity_of(
    net: nn.Module,
    batches: Iterable[Batch] | Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    n: int | None = None,
) -> Identity:
    """Of the evaluation that `evaluate` makes of these arguments, before it is made.

    Raises:
        EvaluationError: as `evaluate`, of images and networks that cannot be.
    """
    device = torch.device(device)
    net.to(device)
    with prepared(net, seed):
        x, y, index = _read(batches, n)
        return identify(net, x, y, index, device=device, seed=seed)[0]


def sizes(
    attacks: Iterable[str], available: int, *, n: int | None = None, n_of: Mapping[str, int | None] | None = None
) -> dict[str, int]:
    """How many samples each attack runs on; call it before training to refuse what cannot be done.

    Args:
        attacks: names.
        available: samples in the split.
        n: asked of all; None: all that exist. Where it is below an attack's own number, it wins.
        n_of: asked of some attacks; None for one: as many as of all.

    Returns:
        Attack name -> number of samples.

    Raises:
        EvaluationError: more samples than exist, fewer than 1, or a name in `n_of` that no attack has.

    Example:
        >>> sizes(["pgd", "autoattack"], 360, n_of={"autoattack": 100})
        {'pgd': 360, 'autoattack': 100}
    """
    names = list(attacks)
    if unknown := [name for name in n_of or {} if name not in names]:
        raise EvaluationError(f"n_of names {', '.join(unknown)}: expected one of {', '.join(names) or '(no attacks)'}")
    own = {name: count for name, count in (n_of or {}).items() if count is not None}
    everything = available if n is None else n
    counts = {name: min(own[name], n) if n is not None and name in own else own.get(name, everything) for name in names}
    for what, count in {"n": everything, **{f"n_of.{name}": counts[name] for name in own}}.items():
        if count < 1:
            raise EvaluationError(f"{what}={count}: expected 1 or more")
        if count > available:
            raise EvaluationError(
                f"{what}={count}, but the split has {available} samples: ask for {available} or fewer"
            )
    return counts


def check_taps(net: nn.Module, attacks: Mapping[str, Any]) -> None:
    """Before hours of other attacks: a layer that one of them looks at must be there.

    Args:
        net: with named taps, or without any.
        attacks: by name.

    Raises:
        EvaluationError: a layer that is not there; the message lists those that are.
    """
    for name, attack in attacks.items():
        if (tap := getattr(attack, "tap", None)) is not None:
            try:
                check_tap(net, tap)
            except ValueError as error:
                raise EvaluationError(f"attack {name}: {error}") from error


def _at_most(n_of: Mapping[str, int | None] | None, n: int | None) -> dict[str, int | None]:
    return {name: count if n is None or count is None else min(count, n) for name, count in (n_of or {}).items()}


def _check_settings(
    attacks: Mapping[str, EvalAttack], batch_size: int | str, processes: int, keep: int, keep_images: Sequence[str]
) -> None:
    if CLEAN in attacks:
        raise EvaluationError(f"an attack is named {CLEAN!r}, which always is the accuracy without one: rename it")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise EvaluationError(f"batch_size={batch_size}: expected 1 or more, or auto")
    if processes < 1:
        raise EvaluationError(f"processes={processes}: expected 1 or more")
    if keep < 0:
        raise EvaluationError(f"keep={keep}: expected 0 or more")
    for name in keep_images:
        if name not in attacks:
            raise EvaluationError(f"keep_images names {name}: expected one of {', '.join(attacks) or '(no attacks)'}")
        if says(attacks[name], "refills"):
            raise EvaluationError(
                f"keep_images names {name}, which stops at the first success: where every image is wanted, an attack "
                "needs iterate=last and restarts=1"
            )
    for name, attack in attacks.items():
        within = _within(name)
        if says(attack, "minimum_norm") and getattr(attack, "within", None) is not None and within in attacks:
            raise EvaluationError(f"an attack is named {within!r}, as the second row of {name!r} is: rename it")


def _read(batches: Iterable[Any], n: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first n samples; the images stay where the loader left them."""
    if n is not None and n < 1:
        raise EvaluationError(f"n={n}: expected 1 or more")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    found = 0
    for batch in batches:
        x, y, index = (batch.x, batch.y, batch.index) if isinstance(batch, Batch) else batch
        _check_images(x, parts[0][0] if parts else None)
        for what, values in (("labels", y), ("indices", index)):
            if values.is_floating_point() or values.ndim != 1 or len(values) != len(x):
                raise EvaluationError(
                    f"{what} are {values.dtype} {tuple(values.shape)} for {len(x)} images: expected integers [B]"
                )
        keep = len(y) if n is None else min(len(y), n - found)
        parts.append((x[:keep], y[:keep].cpu().long(), index[:keep].cpu().long()))
        found += keep
        if found == n:
            break
    if n is not None and found < n:
        raise EvaluationError(f"n={n}, but the split has {found} samples: ask for {found} or fewer")
    if not found:
        raise EvaluationError("there are no samples to evaluate: the loader is empty")
    # `cat` copies: tensors a loader made in inference mode could not enter a graph.
    x, y, index = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(index.unique()) != found:
        raise EvaluationError("the loader gave some samples more than once: evaluate without padding or repetition")
    return x, y, index


def _check_images(x: Tensor, first: Tensor | None) -> None:
    if not x.is_floating_point() or x.ndim != 4:
        raise EvaluationError(f"images are {x.dtype} {tuple(x.shape)}: expected float [B, C, H, W] in [0, 1]")
    if first is not None and x.shape[1:] != first.shape[1:]:
        raise EvaluationError(f"images are {tuple(x.shape[1:])} after {tuple(first.shape[1:])}: expected one shape")
    if not len(x):
        return
    low, high = (float(value) for value in x.aminmax())
    if math.isnan(low):
        raise EvaluationError("images hold NaN: expected numbers in [0, 1]")
    if not (low >= 0 and high <= 1):
        raise EvaluationError(
            f"images lie in [{low:.9g}, {high:.9g}]: expected [0, 1]; put normalisation into the network"
        )


def _clean(
    net: nn.Module,
    samples: tuple[Tensor, Tensor, Tensor],
    pieces: Pieces,
    name: str,
    *,
    device: torch.device,
    batch: BatchSize,
    seed: int,
) -> Kept:
    """Predictions without an attack, how many classes there are, and whether the outputs are probabilities."""
    x, _, index = samples

    def look(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        logits = clean_logits(net, x.to(device), index.to(device), seed)
        sums = logits.double().sum(dim=1)
        probability = (logits >= 0).all(dim=1) & ((sums - 1).abs() < SOFTMAX_TOLERANCE)
        classes = torch.full((len(x),), logits.shape[1])
        return logits.argmax(dim=1).cpu(), probability.cpu(), classes

    def compute(number: int) -> Kept:
        prediction, probability, classes = batch.map(look, x, index)
        return {"prediction": prediction, "softmax": probability.all(), "classes": classes.max()}

    return next(kept for _, kept in pieces.run([name], compute))


def _doubts(noise: float, gradient: Tensor) -> dict[str, str]:
    """Flags of all rows, by the first few images."""
    doubts = {}
    if float(without_gradient(gradient).float().mean()) > WITHOUT_GRADIENT:
        doubts["no_gradient"] = NO_GRADIENT
    if noise > SAME:
        doubts["stochastic"] = STOCHASTIC
    return doubts


def _check_classes(y: Tensor, classes: int, expected: int | None) -> None:
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise EvaluationError(
            f"labels lie in [{int(y.min())}, {int(y.max())}], but the network has {classes} classes:"
            " is it a network for another data set?"
        )
    if expected is not None and classes != expected:
        raise EvaluationError(
            f"the network has {classes} classes, the data set {expected}: is it a network for another data set?"
        )


def _for_classes(attack: Any, classes: int) -> EvalAttack:
    adapted: EvalAttack = attack.for_classes(classes) if hasattr(attack, "for_classes") else attack
    return adapted


def _with_surrogates(
    attacks: Mapping[str, Any],
    samples: Samples,
    pieces: Pieces,
    key: str,
    *,
    device: torch.device,
    batch: BatchSize,
    seed: int,
) -> dict[str, EvalAttack]:
    """Transfer attacks with their surrogate's own accuracy on the clean images, where it is not known."""
    known: dict[int, float] = {}
    completed: dict[str, EvalAttack] = {}
    for name, attack in attacks.items():
        completed[name] = attack
        surrogate = getattr(attack, "surrogate", None)
        if not isinstance(surrogate, nn.Module) or attack.surrogate_accuracy is not None:
            continue
        if id(surrogate) not in known:
            file = f"surrogate-{key and fingerprint(key, surrogate)}"
            clean = (samples.x, samples.y, samples.index)
            try:
                with prepared(surrogate.to(device), seed):
                    kept = _clean(surrogate, clean, pieces, file, device=device, batch=batch, seed=seed)
            except EvaluationError as error:
                raise EvaluationError(
                    f"attack {name}: its surrogate {attack.surrogate_name}: {error}; is it one of another data set?"
                ) from error
            known[id(surrogate)] = int((tensor(kept, "prediction") == samples.y).sum()) / len(samples.y)
        completed[name] = attack.with_surrogate(surrogate, accuracy=known[id(surrogate)])
    return completed


def _own_surrogates(plan: Plan, identity: Identity, device: torch.device) -> set[int]:
    """Those, by `id`, that answer as the network under attack does, in whatever wrapper."""
    surrogates = {id(net): net for attack in plan.attacks.values() if (net := getattr(attack, "surrogate", None))}
    samples, own = plan.samples, set()
    for number, net in surrogates.items():
        with suppress(EvaluationError), prepared(net.to(device), plan.seed):  # one that fails is another network
            theirs = identify(net, samples.x, samples.y, samples.index, device=device, seed=plan.seed)[0]
            if theirs.answers_like(identity):
                own.add(number)
    return own


def _block(pieces: Pieces, key: str, batch_size: int, n: int, processes: int) -> int | None:
    """Samples of a piece: what the first sitting chose, for all later ones."""
    if pieces.folder is None:
        return None
    size = BATCHES_OF_A_PIECE * batch_size
    if processes > 1:
        size = min(size, math.ceil(n / (2 * processes)))
    kept = next(kept for _, kept in pieces.run([f"block-{key}"], lambda number: {"size": torch.tensor(size)}))
    return int(tensor(kept, "size"))


def fitting_batch_size(net: nn.Module, x: Tensor, device: torch.device) -> int:
    """How many samples to attack at once: on a GPU a power of two that fills about half of the free memory.

    Args:
        net: on `device`.
        x: [N, C, H, W], of which a few are tried.
        device: where.

    Returns:
        1 or more. It is a beginning: where it does not fit after all, it halves.
    """
    if device.type != "cuda":
        return ON_CPU
    few = min(len(x), 8)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    images = x[:few].to(device).requires_grad_()
    net(images).sum().backward(inputs=[images])
    one = max(1, (torch.cuda.max_memory_allocated(device) - before) // few)
    del images
    free, _ = torch.cuda.mem_get_info(device)
    fits = max(1, min(MOST, free // (2 * one)))
    return int(2 ** math.floor(math.log2(fits)))


def _result(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    clean: Kept,
    identity: Identity,
    doubts: Mapping[str, str],
    own_surrogates: Collection[int],
    *,
    classes: int,
    batch_size: int,
) -> EvaluationResult:
    samples = plan.samples
    rows: dict[str, AttackResult] = {}
    examples: dict[str, Examples] = {}
    for name, outcome in outcomes.items():
        attack, label = plan.attacks[name], samples.y[: plan.counts[name]]
        description = {**attack.describe(), "name": name}
        if plan.before(name):
            description["of"] = "survivors"
        if says(attack, "batch_coupled"):
            description["batch_size"] = getattr(attack, "batch_size", None) or plan.batch_size
        flags = {**outcome.flags, **doubts}
        if id(getattr(attack, "surrogate", None)) in own_surrogates:
            flags["own_surrogate"] = OWN_SURROGATE
        if description.get("fallback"):
            flags["fallback"] = str(description["fallback"])
        if not says(attack, "minimum_norm") and out_of_reach(description):
            steps = f"{description['steps']} step{'s' * (description['steps'] != 1)}"
            flags["reach"] = f"{steps} of {description['step_size']} cannot cross a ball of eps {description['eps']}"
        row = AttackResult(
            name=name,
            description=description,
            label=label,
            prediction=outcome.prediction,
            distance=outcome.distance,
            flags=tuple(sorted(flags)),
            messages=flags,
            seconds=outcome.seconds,
            raw_prediction=outcome.raw,
        )
        raw = {} if row.raw_accuracy is None else {"raw_accuracy": row.raw_accuracy}
        rows[name] = replace(row, description={**description, **raw})
        examples[name] = outcome.examples
        within = getattr(attack, "within", None) if says(attack, "minimum_norm") else None
        if within is not None:
            reached = outcome.distance <= within
            name = _within(name)
            rows[name] = replace(
                row,
                name=name,
                description={**description, "name": name, "eps": within},
                prediction=torch.where(reached, outcome.prediction, samples.prediction[: len(label)]),
                distance=torch.where(reached, outcome.distance, 0.0),
                seconds=0.0,
                raw_prediction=None,
            )
            examples[name] = outcome.within
    return EvaluationResult(
        index=samples.index,
        label=samples.y,
        clean=AttackResult(
            name=CLEAN,
            description={"attack": CLEAN, "eps": 0.0},
            label=samples.y,
            prediction=samples.prediction,
            distance=torch.zeros(len(samples.y)),
            flags=tuple(sorted(doubts)),
            messages=doubts,
            seconds=float(tensor(clean, "seconds")),
        ),
        attacks=rows,
        num_classes=classes,
        seed=plan.seed,
        batch_size=batch_size,
        examples=examples,
        images={name: outcome.images for name, outcome in outcomes.items() if outcome.images is not None},
        identity=identity,
    )


def _within(name: str) -> str:
    return f"{name} within"
