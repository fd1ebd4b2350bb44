"""What must hold for a layer to be computed as part of a block instead of by its own call.

Asked before each call, since hooks, offloading and the user may change a module at any time. What does not
hold is not an error: the layer then runs by itself, as it would without the block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..nn.linear import LoRAFALinear


def is_quiet(module: nn.Module) -> bool:
    """Whether a call of `module` would run its class's forward and nothing else: no hook, no patched forward."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def no_global_hooks() -> bool:
    """Whether no hook of all modules is registered."""
    return not torch_module._has_any_global_hook()


def is_plain(x: object) -> bool:
    """Whether x is a floating-point tensor of torch itself: no DTensor, no other subclass."""
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point()


def fits(linear: nn.Module, x: Tensor) -> bool:
    """Whether `linear`, an nn.Linear or LoRAFALinear, is to be computed from x as its parameters say.

    Not if it has hooks or is patched, merged or disabled, if a parameter is elsewhere than x (offloaded ones
    are on meta), sharded, empty or of a subclass, if a frozen one was thawed (its own forward trains it, or
    says why not), or if its dtype is not that of x outside of autocast.
    """
    if not is_quiet(linear):
        return False
    if isinstance(linear, LoRAFALinear):
        if linear.merged or not linear.adapter_enabled:
            return False
    elif type(linear) is not nn.Linear:
        return False
    parameters = linear._parameters
    weight = parameters.get("weight")
    if weight is None or weight.shape != (linear.out_features, linear.in_features):
        return False
    if weight.dtype != x.dtype and not ops.autocast_enabled(x.device.type):
        return False
    for name, parameter in parameters.items():
        if parameter is not None and (
            type(parameter) is not nn.Parameter
            or parameter.device != x.device
            or (parameter.requires_grad and name != "lora_B")
        ):
            return False
    return True


def draws_dropout(linear: nn.Module) -> bool:
    """Whether a call of `linear` draws a dropout mask."""
    return linear.training and isinstance(linear, LoRAFALinear) and linear.lora_dropout > 0


def common_impl(linears: tuple[nn.Module, ...]) -> str | None:
    """The `impl` that all adapted ones have, "auto" if none is adapted, None if they differ."""
    impls = {linear.impl for linear in linears if isinstance(linear, LoRAFALinear)}
    return None if len(impls) > 1 else next(iter(impls), "auto")
