"""AutoAttack (Croce and Hein 2020), run by its authors' package, with the caller's state left as it was.

What this file adds to `pyautoattack`: the global random state is forked (the package reseeds it), logits are
    float32
(Square fails on bfloat16), Python's trace function survives, networks with fewer than 10 classes work, and
the package's warnings arrive as named flags.
"""

from __future__ import annotations

import logging
import re
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
_BEGINS = re.compile(r"^running (\S+)$")
_BATCH = re.compile(r"^(\S+) - (\d+)/(\d+) - (\d+) out of \d+ successfully")

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

        The targeted DLR loss needs 4 classes (with 3, APGD on the plain DLR stands in) and the plain one 3;
        there are at most num_classes - 1 target classes. With 10 classes or more nothing changes.

        Raises:
            ValueError: fewer than 2 classes, or no component is left.
        """
        if num_classes < 2:
            raise ValueError(f"{self.name} needs a network with 2 classes or more, got {num_classes}")
        names = list(self.attacks or ())
        if num_classes < 4 and "apgd-t" in names:
            stand_in = ["apgd-dlr"] if num_classes == 3 and "apgd-dlr" not in names else []
            names[names.index("apgd-t") : names.index("apgd-t") + 1] = stand_in
        if num_classes < 3:
            names = [name for name in names if name != "apgd-dlr"]
        if not names:
            raise ValueError(f"attacks={list(self.attacks or ())}: none works with {num_classes} classes; add apgd-ce")
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
        on_flag: Callable[[str, str], None] | None = None,
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

        Returns:
            [N, C, H, W] on the device of x.

        Raises:
            ImportError: pyautoattack is not installed.
        """
        if self.eps == 0 or len(x) == 0:
            return x.detach().clone()
        device = next((tensor.device for tensor in net.parameters()), x.device)
        images = x.detach().float()
        with attacking(net), forked_rng(), _listening(on_progress, on_flag):
            with torch.no_grad():
                num_classes = net(images[:1].to(device)).shape[1]
            attack = self.for_classes(num_classes)
            library = attack._build(net, device, seed if self.seed is None else self.seed)
            # An inference tensor cannot enter a graph; its copy made here can.
            x_adv, _ = library.run_standard_evaluation(images.clone(), y.clone(), batch_size=self.batch_size)
        return x_adv.detach().to(x)

    def _build(self, net: nn.Module, device: torch.device, seed: int) -> Any:
        try:
            from pyautoattack import AutoAttack as Library
        except ImportError as error:
            raise ImportError("AutoAttack needs its authors' package: pip install pyautoattack") from error
        library = Library(
            lambda images: net(images).float(),
            device=device,
            eps=self.eps,
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            seed=seed,
            version=self.version,
        )
        library.attacks_to_run = list(self.attacks or ())
        library.square.n_queries = self.queries
        library.apgd_targeted.n_target_classes = self.targets
        library.fab.n_target_classes = self.targets
        return library

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


@contextmanager
def _listening(on_progress: OnProgress | None, on_flag: Callable[[str, str], None] | None) -> Iterator[None]:
    """Turn what the package logs into calls; keep its log and its trace function to itself."""
    library = logging.getLogger("auto-attack")
    handler = _Listener(on_progress, on_flag)
    level, propagate, trace = library.level, library.propagate, sys.gettrace()
    library.setLevel(logging.DEBUG)  # progress is logged at DEBUG
    library.propagate = False
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
        library.propagate = propagate
        sys.settrace(trace)  # the package's check for dynamic defenses ends with settrace(None)


class _Listener(logging.Handler):
    """Parses the package's log records."""

    def __init__(self, on_progress: OnProgress | None, on_flag: Callable[[str, str], None] | None) -> None:
        super().__init__(logging.DEBUG)
        self.on_progress = on_progress
        self.on_flag = on_flag
        self.seen: set[str] = set()
        self.broken = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Report a batch done, or a warning of a kind not seen before."""
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            flag = next((flag for words, flag in _FLAGS.items() if words in message), "autoattack_warning")
            if flag not in self.seen:
                self.seen.add(flag)
                if self.on_flag is not None:
                    self.on_flag(flag, message)
                else:
                    logger.warning("%s: %s", flag, message)
        elif self.on_progress is not None:
            if match := _BEGINS.match(message):
                self.on_progress(match[1], 0, 0, self.broken)
            elif match := _BATCH.match(message):
                self.broken += int(match[4])
                self.on_progress(match[1], int(match[2]), int(match[3]), self.broken)


def _library_version() -> str:
    try:
        return installed_version("pyautoattack")
    except ImportError:  # PackageNotFoundError
        return "(not installed)"
