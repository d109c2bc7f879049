"""standard_at: adversarial training on the worst case within the ball.

Paper: Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018, eq. 2.1.
min CE(p(x'), y),  x' = argmax CE(p(x'), y).

Differences from the authors' code: none in the loss. The attack runs in eval mode by default, as in TRADES and MART;
robust_overfitting's PGD-AT leaves the network in train mode (`attack.mode`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import Defense
from mi_at.functional.divergences import cross_entropy
from mi_at.optim import Optimisation
from mi_at.regularizers.base import Regularizer, Views


def standard_at_loss(logits_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    """CE(p(x'), y).

    Args:
        logits_adv: [B, K] of the adversarial images.
        y: [B] int64.

    Returns:
        {"ce", "loss"}: scalars, nats.

    Example:
        >>> import torch
        >>> round(standard_at_loss(torch.zeros(1, 2), torch.tensor([0]))["loss"].item(), 4)
        0.6931
    """
    term = cross_entropy(logits_adv, y)
    return {"ce": term, "loss": term}


class StandardAT(Defense):
    """Madry et al. 2018."""

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy, from a uniform start."""
        return {"adversarial": Inner(objectives.cross_entropy(self.net, batch.y), init="uniform")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Cross-entropy of the adversarial view."""
        return standard_at_loss(views.logits("adversarial"), views.y)


class StandardATWith(StandardAT):
    """Standard adversarial training with one regularizer of its own: the same training as with that of the group.

    A paper's method under its own name is two lines, and takes the regularizer's options:

        class Ncmi(StandardATWith):
            __init__ = options_of("ncmi", NcmiTerm)

    Args:
        name: of the regularizer, as in the group: its terms and its state are called so.
        term: the regularizer, first of those added.
    """

    def __init__(self, name: str, term: Regularizer) -> None:
        super().__init__()
        self.own_terms = {name: term}

    def attach(
        self,
        net: nn.Module,
        *,
        optimisation: Optimisation | None = None,
        regularizers: Mapping[str, Regularizer] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> StandardAT:
        """As `Defense.attach`, its own regularizer before the others.

        Raises:
            ValueError: also where the same regularizer is added once more.
        """
        (name,) = self.own_terms
        if name in (regularizers or {}):
            raise ValueError(
                f"defense={name} regularizer={name} would add the same term twice: use one of them, "
                f"or defense=standard_at regularizer={name}"
            )
        added = {**self.own_terms, **(regularizers or {})}
        with _named_as_defense(name):
            super().attach(net, optimisation=optimisation, regularizers=added, config=config)
        return self


def options_of(name: str, term: type[Regularizer]) -> Any:
    """An `__init__` for a `StandardATWith` that takes a regularizer's options, their kinds and defaults included.

    Args:
        name: of the regularizer.
        term: its class.

    Returns:
        The method; a wrong value is reported under the key `defense.<option>`.
    """

    @functools.wraps(term.__init__)
    def init(self: StandardATWith, **options: Any) -> None:  # the regularizer refuses what it does not know
        with _named_as_defense(name):
            StandardATWith.__init__(self, name, term(**options))

    return init


@contextlib.contextmanager
def _named_as_defense(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"regularizer.{name}.", "defense.")) from error
