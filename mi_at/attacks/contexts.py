"""The one place that puts a network into the state in which it is attacked, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

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
    """Forwards in this block leave the running statistics of norms alone; in train mode they use the batch's.

    Example:
        >>> net = nn.BatchNorm1d(1)
        >>> with untracked_statistics(net):
        ...     _ = net(torch.tensor([[1.0], [3.0]]))
        >>> net.running_mean.item()
        0.0
    """
    tracking = [module for module in net.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    norms = [module for module in tracking if not isinstance(module, _InstanceNorm)]
    hooks = [hook for module in tracking if isinstance(module, _InstanceNorm) for hook in _hide_statistics(module)]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
        for hook in hooks:
            hook.remove()


def _hide_statistics(norm: _InstanceNorm) -> tuple[RemovableHandle, RemovableHandle]:
    """Instance norm updates the statistics it holds even where it is told not to track: in train mode it holds none."""
    held: dict[str, Tensor | None] = {}

    def take(module: nn.Module, inputs: object) -> None:
        if module.training:
            held.update(running_mean=norm.running_mean, running_var=norm.running_var)
            norm.running_mean = norm.running_var = None

    def give_back(module: nn.Module, inputs: object, output: object) -> None:
        for name, statistics in held.items():
            setattr(norm, name, statistics)
        held.clear()

    return norm.register_forward_pre_hook(take), norm.register_forward_hook(give_back, always_call=True)
