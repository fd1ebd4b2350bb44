"""Adapters that the first backward passes leave without a gradient, which is told once.

Whatever the reason, a layer that is not called, or whose output goes nowhere, is not trained. Each lora_B has
a hook until its first gradient comes; the first one that gets it counts two more, and then those that are
still without are named. After that no hook is left. Copies of a model are not watched.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping

from torch import Tensor, nn

# Backward passes without a gradient before a layer is named (estimate), and how many are named at most.
_PASSES = 2
_SHOWN = 8


class _Watch:
    """waiting: {id: (name, layer, hook)} of the adapters without a gradient so far."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[str, weakref.ref, object]] = {}
        self.passes = 0
        self.witness: int | None = None
        self.hook: object | None = None

    def __call__(self, parameter: Tensor) -> None:
        if self.witness is None:
            self.witness = id(parameter)
        if self.witness != id(parameter):
            self._end(id(parameter))
            return
        self.passes += 1
        # The last pass is still going on.
        if self.passes > _PASSES:
            self._tell()

    def _end(self, key: int) -> tuple[str, weakref.ref] | None:
        name, layer, hook = self.waiting.pop(key, (None, None, None))
        if hook is not None:
            hook.remove()
        return name, layer

    def _tell(self) -> None:
        self._end(self.witness)
        left = []
        for key in list(self.waiting):
            name, reference = self._end(key)
            layer = reference()
            if (
                layer is not None
                and layer.lora_B.requires_grad
                and layer.adapter_enabled
                and not layer.merged
            ):
                left.append(name)
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            warnings.warn(
                f"the adapters of {', '.join(left[:_SHOWN])}{more} got no gradient in the first "
                f"{_PASSES} backward passes: these layers were not called, or the loss does not "
                "depend on them. An adapter has no effect where the model reads a layer's weight without "
                "calling the layer (leave it out with exclude_modules)",
                stacklevel=2,
            )


def watch_first_steps(layers: Mapping[str, nn.Module]) -> None:
    """Warn once, in the third backward pass, of the LoRAFALinear in `layers` whose lora_B is without a
    gradient until then, if another of them has one.
    """
    watch = _Watch()
    for name, layer in layers.items():
        parameter = layer.lora_B
        hook = parameter.register_post_accumulate_grad_hook(watch)
        watch.waiting[id(parameter)] = name, weakref.ref(layer), hook
