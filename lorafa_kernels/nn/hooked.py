"""Linear layers that accelerate moves: a hook on each brings its weights to where it computes, and back.

A layer that stands in for one has the hook too, for the base weight and bias; lora_A and lora_B stay where
the layer computes, so that lora_B can be trained. Nothing of accelerate is imported: a hook means that it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_ATTRIBUTES = ("_hf_hook", "_old_forward", "forward")


def hook_of(linear: nn.Module) -> Any | None:
    """accelerate's AlignDevicesHook on `linear`, if that is what has patched its forward, or None."""
    own = vars(linear)
    hook = own.get("_hf_hook")
    known = type(hook).__name__ == "AlignDevicesHook" and type(hook).__module__ == "accelerate.hooks"
    return hook if known and all(name in own for name in _ATTRIBUTES) else None


def is_patched(module: nn.Module) -> bool:
    """Whether a call of `module` runs another forward than its class's. accelerate leaves that one on the
    instance when its hook is removed.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    own = getattr(forward, "__self__", None) is module
    return not (own and any(vars(kind).get("forward") is function for kind in type(module).__mro__))


def take_hook(linear: nn.Module) -> Any | None:
    """Take the hook off without moving a weight, and return it; None if there is none."""
    hook = hook_of(linear)
    if hook is not None:
        for name in _ATTRIBUTES:
            del linear.__dict__[name]
    return hook


def computing_device(hook: Any | None, weight: torch.Tensor) -> torch.device:
    """Where a layer computes whose weight may be offloaded."""
    return torch.device(hook.execution_device) if hook is not None and weight.is_meta else weight.device


def give_hook(layer: nn.Module, hook: Any | None, linear: nn.Module) -> None:
    """Let `hook`, taken off `linear`, act on `layer`, which stands in for it."""
    if hook is not None:
        sys.modules["accelerate.hooks"].add_hook_to_module(layer, _BaseHook(hook, linear))


class _BaseHook:
    """A hook of accelerate that moves the parameters of `linear` and shows them in the layer."""

    def __init__(self, hook: Any, linear: nn.Module) -> None:
        self.hook, self.linear, self.no_grad = hook, linear, hook.no_grad

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        moved = self.hook.pre_forward(self.linear, *args, **kwargs)
        self._show(module)
        return moved

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = self.hook.post_forward(self.linear, output)
        self._show(module)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.hook.detach_hook(self.linear)
        self._show(module)
        return module

    def _show(self, module: nn.Module) -> None:
        # Without offloading the parameters stay the objects that they are, unless one is merged.
        if self.hook.offload:
            for name in ("weight", "bias"):
                module._parameters[name] = self.linear._parameters[name]
