"""A critic's own optimiser, whose state travels with the critic's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OwnAdam(nn.Module):
    """Adam over the parameters of a critic; a module without parameters, so that its state is in the state dict.

    Args:
        critic: what is trained.
        lr: learning rate, > 0.

    Raises:
        ValueError: a rate that is not positive.

    Example:
        >>> critic = nn.Linear(1, 1)
        >>> adam = OwnAdam(critic, lr=0.1)
        >>> critic(torch.ones(1, 1)).sum().backward()
        >>> adam.step()
        >>> adam.steps, adam.state_dict()["_extra_state"]["steps"]
        (1, 1)
    """

    def __init__(self, critic: nn.Module, *, lr: float) -> None:
        super().__init__()
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr={lr}: expected a positive number")
        self.optimizer = torch.optim.Adam(list(critic.parameters()), lr)
        self.steps = 0
        self._restored: dict[str, Any] | None = None

    def step(self) -> None:
        """One step along the gradients, which are then cleared."""
        if self._restored is not None:  # only now do the parameters lie where they are trained
            self.optimizer.load_state_dict(self._restored)
            self._restored = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"steps": self.steps, "adam": self._restored or self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the state back."""
        self.steps, self._restored = state["steps"], state["adam"]
