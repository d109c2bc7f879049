"""AutoAttack (Croce and Hein 2020): its authors' components, batch by batch, with the caller's state left as it was.

The result is that of the package's own `run_standard_evaluation` with the same seed and batch size. What this file
adds to `pyautoattack`: the global random state is forked (the package reseeds it), logits are float32 (Square fails on
bfloat16), Python's trace function survives, networks with fewer than 10 classes work, the package's warnings arrive as
named flags, and every batch of every component is a step that is kept, resumed and shared between processes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed_version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.attacks.inner import check_eps
from mi_at.attacks.packing import BatchSize, Kept, Steps, every_step, tensor
from mi_at.functional.geometry import check_norm

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
COMPONENTS = VERSIONS["plus"]

# Words in the package's warnings, and the flag each becomes.
_FLAGS = {
    "randomized defense": "stochastic",
    "probability distribution": "softmax",
    "zero gradient": "zero_grad",
    "dynamic defense": "gradients_in_forward",
    "Square Attack has decreased": "square_beats_gradients",
}
_MEMORY = "a batch of {} did not fit into memory and was attacked in parts of {}, on which the result depends"

OnProgress = Callable[[str, int, int, int], None]
"""Told (component, batches done, batches, samples broken so far); 0, 0 batches when a component begins."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack as an evaluation attack; its result depends on the batch size, which is therefore recorded.

    Attributes:
        eps: radius in pixels of [0, 1], a number or a fraction ("8/255").
        norm: "linf" or "l2".
        version: "standard", "plus" or "rand" (stochastic networks).
        attacks: only these components, with that version's settings; None: all of the version's.
        seed: of every component; None: the evaluation's.
        batch_size: images attacked at once.
        queries: of Square.
        targets: most target classes of APGD-T and FAB-T.
        fallback: set by `for_classes`: what was left out for want of classes, and why.
        name: what tables print.

    Raises:
        ValueError: a value out of range or an unknown name; the message lists the choices.

    Example:
        >>> AutoAttack(eps="8/255").for_classes(3).attacks
        ('apgd-ce', 'apgd-dlr', 'fab-t', 'square')
    """

    # Survivors are re-packed over all samples between components: the evaluator hands them over in one call.
    whole_set: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    eps: float
    norm: str = "linf"
    version: str = "standard"
    attacks: Sequence[str] | None = None
    seed: int | None = None
    batch_size: int = 500
    queries: int = 5000
    targets: int = 9
    fallback: str | None = None
    name: str = "autoattack"

    def __post_init__(self) -> None:
        """Parse fractions and check ranges."""
        object.__setattr__(self, "eps", check_eps(self.eps, check_norm(self.norm)))
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version!r}: expected one of {', '.join(VERSIONS)}")
        names = tuple(VERSIONS[self.version] if self.attacks is None else self.attacks)
        unknown = [name for name in names if name not in COMPONENTS]
        if unknown or not names:
            raise ValueError(f"attacks={list(names)}: expected one or more of {', '.join(COMPONENTS)}")
        object.__setattr__(self, "attacks", names)
        for option in ("batch_size", "queries", "targets"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}: expected 1 or more")

    def for_classes(self, num_classes: int) -> AutoAttack:
        """The attack as it can run on a network of so many classes.

        The targeted DLR loss needs 4 classes (with 3, APGD on the plain DLR stands in) and the plain one 3; where no
        component is left, APGD on the cross-entropy stands in. There are at most num_classes - 1 target classes. With
        10 classes or more nothing changes.

        Raises:
            ValueError: fewer than 2 classes.
        """
        if num_classes < 2:
            raise ValueError(f"{self.name} needs a network with 2 classes or more, got {num_classes}")
        names = list(self.attacks or ())
        if num_classes < 4 and "apgd-t" in names:
            stand_in = ["apgd-dlr"] if num_classes == 3 and "apgd-dlr" not in names else []
            names[names.index("apgd-t") : names.index("apgd-t") + 1] = stand_in
        if num_classes < 3:
            names = [name for name in names if name != "apgd-dlr"] or ["apgd-ce"]
        fallback = self.fallback
        if names != list(self.attacks or ()):
            fallback = f"{num_classes} classes: {', '.join(names)} instead of {', '.join(self.attacks or ())}"
        return replace(self, attacks=names, targets=min(self.targets, num_classes - 1), fallback=fallback)

    def __call__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        ids: Tensor | None = None,
        seed: int = 0,
        on_progress: OnProgress | None = None,
        on_flag: Callable[[str, str], Any] | None = None,
        steps: Steps | None = None,
    ) -> Tensor:
        """Attack images; a sample that no component breaks comes back unchanged.

        Args:
            net: logits [B, C].
            x: [N, C, H, W] float in [0, 1], on any device.
            y: [N] int64.
            ids: not used: the package's noise depends on the batch.
            seed: used where the field `seed` is None.
            on_progress: told when a component begins, and after each of its batches.
            on_flag: told (flag, message) of every kind of warning once; None: they are logged.
            steps: runs the batches of a component, or finds them done; None: all are computed here.

        Returns:
            [N, C, H, W] on the device of x.

        Raises:
            ImportError: pyautoattack is not installed.
        """
        if self.eps == 0 or len(x) == 0:
            return x.detach().clone()
        device = next((tensor.device for tensor in net.parameters()), x.device)
        report = _once(on_flag)
        progress = on_progress or (lambda component, done, batches, broken: None)
        # An inference tensor cannot enter a graph; its copy made here can.
        with attacking(net), forked_rng(), torch.no_grad(), _listening(report):
            images, labels = x.detach().float().clone(), y.detach().clone().to(x.device)
            x_adv = images.clone()

            def logits(images: Tensor) -> Tensor:
                return net(images).float()

            attack = self.for_classes(logits(images[:1].to(device)).shape[1])
            library = attack._build(logits, device, seed if self.seed is None else self.seed)
            batch = BatchSize(self.batch_size)
            robust = batch.map(
                lambda part, label: logits(part.to(device)).argmax(dim=1).to(x.device) == label, images, labels
            )
            attack._check(logits, images[: batch.size].to(device), labels[: batch.size].to(device))
            right = int(robust.sum())
            accuracy = {"clean": right / len(x)}
            for component in attack.attacks or ():
                if not bool(robust.any()):
                    break
                batches = robust.nonzero().squeeze(1).split(self.batch_size)
                progress(component, 0, 0, right - int(robust.sum()))

                def compute(number: int, component: str = component, batches: Sequence[Tensor] = batches) -> Kept:
                    rows = batches[number]
                    return attack._step(library, component, images[rows].to(device), labels[rows].to(device))

                names = [f"{component}-{number:04d}" for number in range(len(batches))]
                for done, (number, kept) in enumerate((steps or every_step)(names, compute), 1):
                    rows = batches[number][tensor(kept, "broken").to(x.device)]
                    x_adv[rows] = tensor(kept, "x_adv").to(x_adv)
                    robust[rows] = False
                    for flag, warning in json.loads(str(kept["flags"])).items():
                        report(flag, warning)
                    progress(component, done, len(batches), right - int(robust.sum()))
                accuracy[component] = int(robust.sum()) / len(x)
            _compare_square(accuracy)
        return x_adv.to(x)

    def _build(self, logits: Callable[[Tensor], Tensor], device: torch.device, seed: int) -> Any:
        """The package's object, whose components are called one by one."""
        try:
            from pyautoattack import AutoAttack as Library
        except ImportError as error:
            raise ImportError("AutoAttack needs its authors' package: pip install pyautoattack") from error
        library = Library(
            logits,
            device=device,
            eps=self.eps,
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            seed=seed,
            version=self.version,
        )
        library.square.n_queries = self.queries
        library.apgd_targeted.n_target_classes = self.targets
        library.fab.n_target_classes = self.targets
        return library

    def _check(self, logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """The package's checks of the network; what they find is logged as a warning."""
        from pyautoattack import checks

        if self.version != "rand":
            checks.check_randomized(logits, x, y, bs=len(x), logger=_library_logger())
        checks.check_range_output(logits, x, logger=_library_logger())
        checks.check_dynamic(logits, x, False, logger=_library_logger())

    def _step(self, library: Any, component: str, x: Tensor, y: Tensor) -> Kept:
        """One component on one batch: which rows it broke, and how."""
        warned: dict[str, str] = {}
        batch = BatchSize(len(x), on_halving=lambda size: warned.update(memory=_MEMORY.format(len(x), size)))
        with _listening(warned.setdefault):
            x_adv = batch.map(lambda x, y: _perturb(library, component, x, y), x, y)
            broken = torch.cat([library.model(part).argmax(dim=1) for part in x_adv.split(batch.size)]) != y
        rows = broken.nonzero().squeeze(1)
        return {"broken": rows.cpu(), "x_adv": x_adv[rows].detach().cpu(), "flags": json.dumps(warned)}

    def describe(self) -> dict[str, Any]:
        """Plain values for a record."""
        values = asdict(self)
        values["attacks"] = list(self.attacks or ())
        return {"attack": "autoattack", **values, "library": f"pyautoattack {_library_version()}"}


@contextmanager
def forked_rng() -> Iterator[None]:
    """Restore torch's global random states, of the CPU and of all CUDA devices, when the block ends.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with forked_rng():
        ...     _ = torch.manual_seed(1)
        >>> torch.initial_seed()
        0
    """
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if in_use else []):
        yield


def _perturb(library: Any, component: str, x: Tensor, y: Tensor) -> Tensor:
    """One component of the package with the settings of its version, seeded anew as the package does per batch."""
    if component in ("apgd-ce", "apgd-dlr"):
        attack, library.apgd.loss = library.apgd, component.removeprefix("apgd-")
    elif component == "apgd-t":
        attack = library.apgd_targeted
    elif component == "square":
        attack = library.square
    else:
        attack = library.fab
        attack.targeted = component == "fab-t"
        attack.n_restarts = 1 if attack.targeted or library.version == "standard" else 5
    attack.seed = library.get_seed()
    return attack.perturb(x.clone(), y.clone())


def _compare_square(accuracy: dict[str, float]) -> None:
    """The package's own check: the black-box component should not beat the gradients."""
    from pyautoattack import checks

    checks.check_square_sr(accuracy, logger=_library_logger())


def _library_logger() -> logging.Logger:
    return logging.getLogger("auto-attack")


def _once(on_flag: Callable[[str, str], Any] | None) -> Callable[[str, str], None]:
    """Hands on each kind of warning once; logs it where nobody listens."""
    seen: set[str] = set()

    def report(flag: str, message: str) -> None:
        if flag in seen:
            return
        seen.add(flag)
        if on_flag is not None:
            on_flag(flag, message)
        else:
            logger.warning("%s: %s", flag, message)

    return report


@contextmanager
def _listening(report: Callable[[str, str], Any]) -> Iterator[None]:
    """Turn what the package warns of into calls of `report`; keep its log and its trace function to itself."""
    library = _library_logger()
    handler = _Listener(report)
    level, propagate, trace, others = library.level, library.propagate, sys.gettrace(), list(library.handlers)
    library.setLevel(logging.WARNING)
    library.propagate = False
    library.handlers = [handler]  # within a step, the step alone listens
    try:
        yield
    finally:
        library.handlers = others
        library.setLevel(level)
        library.propagate = propagate
        sys.settrace(trace)  # the package's check for dynamic defenses ends with settrace(None)


class _Listener(logging.Handler):
    """Names the package's warnings."""

    def __init__(self, report: Callable[[str, str], Any]) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report a warning by the name of its kind."""
        message = record.getMessage().removesuffix(" See flags_doc.md for details.")  # a file of the package's source
        self.report(next((flag for words, flag in _FLAGS.items() if words in message), "autoattack_warning"), message)


def _library_version() -> str:
    try:
        return installed_version("pyautoattack")
    except ImportError:  # PackageNotFoundError
        return "(not installed)"
