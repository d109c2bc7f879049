"""What an evaluation gives: per attack and per sample, and the worst case over attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mi_at.evaluation.intervals import wilson
from mi_at.functional.geometry import parse_eps

CLEAN = "clean"
# One program on other hardware (TF32) differs in the third digit at most; a rounded input may by less than 1 %.
LOGITS_DIFFER, SLOPES_DIFFER = 0.004, 0.05


class EvalAttack(Protocol):
    """An attack as the evaluator calls it: settings inside, noise drawn by (seed, id).

    It may say more of itself by true class attributes (or fields), all of them false where they are missing:

    - `refills`: it batches samples itself and refills its batch: it gets many at once, and `packing=`
      (`mi_at.attacks.packing.Packing`).
    - `whole_set`: its result depends on how samples are batched, so it batches them itself: it gets all in one
      call, and `on_progress` and `on_flag` as `mi_at.attacks.autoattack.AutoAttack` takes them. With `shares`
      too it gets `steps=` (`mi_at.attacks.packing.Steps`), through which its batches are kept and shared.
    - `batch_coupled`: its objective couples the batch: fixed blocks of its own `batch_size` (or the
      evaluation's), in the order of the split, samples that are wrong when clean among them.
    - `raw`: it is shown every sample, and its row has `raw_accuracy` too: that on the attacked images, without the
      condition that a sample was right when clean (published black-box numbers are such).
    - `minimum_norm`: it returns the nearest adversarial image it found, however far, and the clean one where it
      found none. It gives a second row, "<name> within", where its `within` is set.

    One with a method `for_classes(num_classes)` is replaced by what that returns.
    """

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """[B, C, H, W] images in [0, 1], labels [B] and places in the split [B] -> adversarial images."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Plain values; `norm` and `eps` are checked on what the attack returned.

        Without an eps, or with a norm other than linf and l2, only the range is.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Broken samples, those with the highest confidence in the wrong class first.

    Attributes:
        index: [k] int64, places in the split.
        label: [k] int64.
        clean_prediction: [k] int64, equal to the label: only what was right when clean can be broken.
        prediction: [k] int64, under the attack.
        confidence: [k] float32, the softmax probability of `prediction`.
        x: [k, C, H, W] float32 in [0, 1], the clean images.
        x_adv: [k, C, H, W] float32 in [0, 1].
    """

    index: Tensor
    label: Tensor
    clean_prediction: Tensor
    prediction: Tensor
    confidence: Tensor
    x: Tensor
    x_adv: Tensor


class EvaluationError(ValueError):
    """A network, an attack or a request that no number may be made of."""


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on the first n samples.

    Attributes:
        name: its name in the evaluation's config.
        description: what `describe()` said.
        label: [n] int64.
        prediction: [n] int64 on the attacked image; the clean one where that was wrong already.
        distance: [n] float32, how far the image moved in the attack's norm (l_inf where it has none or another).
        raw_prediction: [n] int64 on the attacked image of every sample, where the attack asks for it (`raw`).
        flags: names of what is doubtful about the number, e.g. "reach".
        messages: a sentence per flag, where there is one.
        seconds: of computing, over all processes and sittings.
    """

    name: str
    description: Mapping[str, Any]
    label: Tensor
    prediction: Tensor
    distance: Tensor
    flags: tuple[str, ...] = ()
    messages: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    raw_prediction: Tensor | None = None

    @property
    def n(self) -> int:
        """How many samples."""
        return len(self.label)

    @property
    def correct(self) -> Tensor:
        """[n] bool: right when clean and under the attack."""
        return self.prediction == self.label

    @property
    def accuracy(self) -> float:
        """Share of samples that stay right, in [0, 1]."""
        return int(self.correct.sum()) / self.n

    @property
    def raw_accuracy(self) -> float | None:
        """Share of attacked images that are classified right, those of samples that were wrong when clean included."""
        return None if self.raw_prediction is None else int((self.raw_prediction == self.label).sum()) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(int(self.correct.sum()), self.n)

    @property
    def max_distance(self) -> float:
        """The largest distance, to hold against eps."""
        return float(self.distance.max())

    @property
    def unmoved(self) -> int:
        """Samples that stay right and came back as they were.

        From PGD, which returns its last iterate, many hint at vanishing gradients; from AutoAttack they are
        what it could not break.
        """
        return int((self.correct & (self.distance == 0)).sum())


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A network and the samples it is evaluated on.

    Attributes:
        weights: fingerprint of its modules, parameters and buffers.
        data: fingerprint of the images, labels and places.
        logits: its largest and its median logit on each of the first few images, clean and perturbed: they tell its
            code, rounding of its input included; a class masked by a large constant does not drown the others.
        slopes: the l2 norm of the cross-entropy's gradient at each of them, and its product with a fixed random image:
            an edit may hide or turn the gradient alone.

    Example:
        >>> one = Identity(weights="a", data="b", logits=(1.0, 0.5), slopes=(2.0,))
        >>> one.is_that_of(Identity.of_plain(one.plain())), one.is_that_of(None)
        (True, False)
    """

    weights: str
    data: str
    logits: tuple[float, ...]
    slopes: tuple[float, ...]

    def is_that_of(self, other: Identity | None) -> bool:
        """Whether both are of one network and the same samples, whatever computed them."""
        if other is None or (self.weights, self.data) != (other.weights, other.data):
            return False
        return self.answers_like(other)

    def answers_like(self, other: Identity) -> bool:
        """Whether both answer alike on the first few images, whatever their weights are called."""
        logits, slopes = (self.logits, other.logits, LOGITS_DIFFER), (self.slopes, other.slopes, SLOPES_DIFFER)
        return _near(*logits) and _near(*slopes)

    def plain(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Identity | None:
        """The identity of a record; None where it has none, or one of another form."""
        try:
            logits, slopes = (tuple(float(value) for value in values[name]) for name in ("logits", "slopes"))
            return cls(weights=str(values["weights"]), data=str(values["data"]), logits=logits, slopes=slopes)
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All attacks on one network and one split.

    Attributes:
        index: [N] int64, the samples' places in the split, in the order they were evaluated.
        label: [N] int64.
        clean: the result without an attack, on all N.
        attacks: by name, in the order they ran, each on the first n of the N; a minimum-norm attack that has a
            `within` is followed by its second row, "<name> within".
        num_classes: of the network.
        seed: of the attacks' noise.
        batch_size: images attacked at once, in the end.
        examples: by name, as `attacks`: the strongest few of what the attack itself broke.
        images: by name, [n, C, H, W] float32, where they were asked for: the attacked image of every sample.
        identity: of the network and the samples.
    """

    index: Tensor
    label: Tensor
    clean: AttackResult
    attacks: Mapping[str, AttackResult]
    num_classes: int
    seed: int
    batch_size: int
    examples: Mapping[str, Examples] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    identity: Identity | None = None

    def __getitem__(self, name: str) -> AttackResult:
        """The result of one attack, or of "clean".

        Raises:
            KeyError: no such attack; the message lists the names.
        """
        if name == CLEAN:
            return self.clean
        if name not in self.attacks:
            raise KeyError(f"{name!r}: expected one of {', '.join([CLEAN, *self.attacks])}")
        return self.attacks[name]

    @property
    def seconds(self) -> float:
        """Of computing everything, over all processes and sittings."""
        return self.clean.seconds + sum(result.seconds for result in self.attacks.values())

    def rows(self) -> list[AttackResult]:
        """Clean, every attack, then the worst cases: what a table shows and a record keeps."""
        return [self.clean, *self.attacks.values(), *self.worst_cases()]

    def worst_cases(self) -> list[AttackResult]:
        """The worst case per sample over attacks of one threat model, for every n with two or more.

        An attack that ran on more samples takes part with its first n.
        """
        groups: dict[tuple[str, float], list[AttackResult]] = {}
        for result in self.attacks.values():
            if (eps := radius(result.description)) is not None:
                groups.setdefault((str(result.description["norm"]), eps), []).append(result)
        unions = []
        for group in groups.values():
            for n in sorted({result.n for result in group}, reverse=True):
                members = [result for result in group if result.n >= n]
                if len(members) > 1:
                    unions.append(self._worst_case(members, n))
        return unions

    def _worst_case(self, members: list[AttackResult], n: int) -> AttackResult:
        label = self.label[:n]
        prediction, distance = self.clean.prediction[:n].clone(), torch.zeros(n)
        # Backwards, so that the first attack that breaks a sample has the last word on it.
        for member in reversed(members):
            broken = (member.prediction[:n] != label) & (self.clean.prediction[:n] == label)
            prediction = torch.where(broken, member.prediction[:n], prediction)
            distance = torch.where(broken, member.distance[:n], distance)
        # One attack that can cross the ball is enough; any other doubt about one is a doubt about the union.
        flags = {flag for member in members for flag in member.flags}
        if not all("reach" in member.flags for member in members):
            flags.discard("reach")
        messages = {flag: text for member in reversed(members) for flag, text in member.messages.items()}
        return AttackResult(
            name="worst of " + ", ".join(member.name for member in members),
            description={
                "attack": "worst_of",
                "members": [member.name for member in members],
                "norm": members[0].description["norm"],
                "eps": members[0].description["eps"],
            },
            label=label,
            prediction=prediction,
            distance=distance,
            flags=tuple(sorted(flags)),
            messages={flag: messages[flag] for flag in sorted(flags) if flag in messages},
            seconds=sum(member.seconds for member in members),
        )


def radius(description: Mapping[str, Any]) -> float | None:
    """The eps of a description as a number; None where the attack has no budget.

    Example:
        >>> radius({"eps": "8/255"}) == 8 / 255
        True
    """
    eps = description.get("eps")
    return None if eps is None else parse_eps(eps)


def out_of_reach(description: Mapping[str, Any]) -> bool:
    """Whether an attack's steps add up to less than its eps, too short to cross the ball it claims to search.

    A random start does not count towards the reach: it points anywhere.

    Example:
        >>> out_of_reach({"eps": 0.3, "steps": 20, "step_size": 0.005})
        True
    """
    eps, steps, step_size = radius(description), description.get("steps"), description.get("step_size")
    if eps is None or steps is None or step_size is None:
        return False
    # Sums such as 10 x 0.03 fall short of 0.3 by rounding alone.
    return int(steps) * parse_eps(step_size) < eps * (1 - 1e-6)


def _near(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether two vectors differ by less than a share of the longer one."""
    if len(one) != len(other):
        return False
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return bool((a - b).norm() <= tolerance * max(a.norm(), b.norm()))
