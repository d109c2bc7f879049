"""Black-box attacks by transfer: images crafted on a surrogate network and shown to the evaluated one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking

KINDS = {
    "pgd": "mi_at.attacks.pgd:PGD",
    "fgsm": "mi_at.attacks.fgsm:FGSM",
    "ni_fgsm": "mi_at.attacks.ni_fgsm:NIFGSM",
    "ti_dim": "mi_at.attacks.ti_dim:TIDIM",
    "cw_l2": "mi_at.attacks.cw_l2:CWL2",
    "ddn": "mi_at.attacks.ddn:DDN",
    "fwa": "mi_at.attacks.fwa:FWA",
    "eot": "mi_at.attacks.eot:EOT",
    "autoattack": "mi_at.attacks.autoattack:AutoAttack",
}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """An attack on a surrogate, whose images are returned.

    The surrogate is attacked at every image it is given, also where it is wrong itself. AutoAttack's images depend on
    the batch it gets, as ever.

    As for every attack the evaluator counts samples that are wrong when clean as broken. Published black-box numbers do
    not, and can exceed the clean accuracy: the row's description has that number too, as `raw_accuracy`.

    Attributes:
        kind: which attack, a key of `KINDS`.
        options: its settings, plain values by name.
        surrogate_name: of the surrogate, for the record (an architecture, a checkpoint); None: its class.
        surrogate_accuracy: its own clean accuracy in [0, 1]; None: the evaluator measures it on the same samples.
        surrogate: the network, bound by `with_surrogate`.
        name: what tables print.

    Raises:
        ValueError: an unknown kind or option, or a value out of range.

    Example:
        >>> attack = Transfer(kind="pgd", options={"eps": "8/255", "step_size": "2/255", "steps": 20})
        >>> attack.with_surrogate(nn.Identity(), accuracy=0.95).describe()["surrogate"]
        {'name': 'Identity', 'clean_accuracy': 0.95}
    """

    raw: ClassVar[bool] = True

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    surrogate_name: str | None = None
    surrogate_accuracy: float | None = None
    surrogate: nn.Module | None = field(default=None, repr=False, compare=False)
    name: str = "transfer"

    def __post_init__(self) -> None:
        """Make the attack once, so that a mistake in its options shows here."""
        _ = self.attack
        if self.surrogate_accuracy is not None and not 0 <= self.surrogate_accuracy <= 1:
            raise ValueError(f"surrogate_accuracy={self.surrogate_accuracy}: expected a share in [0, 1]")

    @property
    def attack(self) -> Any:
        """The attack that is made on the surrogate."""
        if self.kind not in KINDS:
            raise ValueError(f"attack.kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        module, _, name = KINDS[self.kind].partition(":")
        made = getattr(importlib.import_module(module), name)
        known = [option for option in inspect.signature(made).parameters if option != "name"]
        if unknown := [option for option in self.options if option not in known]:
            raise ValueError(f"attack.options.{unknown[0]}: {self.kind} takes {', '.join(known)}")
        try:
            return made(**self.options)
        except TypeError as error:
            raise ValueError(f"attack.options: {error}") from error

    @property
    def minimum_norm(self) -> bool:
        """Whether the attack looks for the nearest image rather than within a ball."""
        return bool(getattr(self.attack, "minimum_norm", False))

    @property
    def within(self) -> float | None:
        """The radius of a minimum-norm attack's second number."""
        within: float | None = getattr(self.attack, "within", None)
        return within

    def with_surrogate(self, net: nn.Module, *, name: str | None = None, accuracy: float | None = None) -> Transfer:
        """The same attack with its surrogate.

        Args:
            net: images [B, C, H, W] in [0, 1] -> logits of the same classes; moved to the images' device when called.
            name: of the surrogate, for the record; None: as it was set, else its class.
            accuracy: its own clean accuracy in [0, 1]; None: as it was set.
        """
        return replace(
            self,
            surrogate=net,
            surrogate_name=name or self.surrogate_name or type(net).__name__,
            surrogate_accuracy=self.surrogate_accuracy if accuracy is None else accuracy,
        )

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor, seed: int) -> Tensor:
        """Attack the surrogate at [B, C, H, W] images in [0, 1]; noise is drawn by (seed, id).

        Raises:
            ValueError: no surrogate is bound, or it was made for other images or classes.
        """
        if self.surrogate is None:
            raise ValueError(f"attack {self.name} has no surrogate: bind one, attack.with_surrogate(net)")
        if not len(x):
            return x.detach().clone()
        surrogate = self.surrogate.to(x.device)
        with attacking(surrogate):
            self._check_classes(net, surrogate, x[:1])
            x_adv: Tensor = self.attack(surrogate, x, y, ids=ids, seed=seed)
        return x_adv

    def describe(self) -> dict[str, Any]:
        """Plain values for a record: the attack's own, and the surrogate."""
        return {
            **self.attack.describe(),
            "attack": "transfer",
            "name": self.name,
            "kind": self.kind,
            "surrogate": {"name": self.surrogate_name, "clean_accuracy": self.surrogate_accuracy},
        }

    def _check_classes(self, net: nn.Module, surrogate: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            classes = net(x).shape[1]
            try:
                found = surrogate(x).shape[1]
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"attack {self.name}: the surrogate {self.surrogate_name} does not take images {list(x.shape[1:])} "
                    f"({error}); is it one of another data set?"
                ) from error
        if found != classes:
            raise ValueError(
                f"attack {self.name}: the surrogate {self.surrogate_name} has {found} classes, the network {classes}: "
                "is it one of another data set?"
            )
