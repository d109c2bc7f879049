"""The one place that puts a network into the state in which it is attacked, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MODES = ("eval", "train_no_track")


@contextmanager
def attacking(net: nn.Module, mode: str = "eval", precision: str = "fp32") -> Iterator[None]:
    """Attack `net` in this block: gradients on, parameters frozen, modes set, everything restored afterwards.

    Inside, gradients are enabled and inference mode is off, whatever the caller's state (Lightning's validation
    and test loops switch them); parameters do not require gradients, so none reach their `.grad`; autocast is off,
    or bfloat16 with precision="bf16".

    Args:
        net: the network; each module's own training flag is restored.
        mode: "eval", or "train_no_track" (batch statistics, running ones untouched; some papers attack so).
        precision: "fp32" or "bf16" (training only; about 4 % of gradient signs flip).

    Raises:
        ValueError: an unknown mode or precision.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        >>> with attacking(net):
        ...     net.training, net[0].weight.requires_grad
        (False, False)
        >>> net.training, net[0].weight.requires_grad
        (True, True)
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={precision!r}: expected 'fp32' or 'bf16'")
    modules = list(net.modules())
    training = [module.training for module in modules]
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    devices = {parameter.device.type for parameter in net.parameters()} | {"cpu"}
    try:
        net.train(mode == "train_no_track")
        for parameter in parameters:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            if mode == "train_no_track":
                stack.enter_context(untracked_statistics(net))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in sorted(devices):
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"))
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def untracked_statistics(net: nn.Module) -> Iterator[None]:
    """Forwards in this block leave batch norm's running statistics alone; in train mode they use the batch's.

    Example:
        >>> net = nn.BatchNorm1d(1)
        >>> with untracked_statistics(net):
        ...     _ = net(torch.tensor([[1.0], [3.0]]))
        >>> net.running_mean.item()
        0.0
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
