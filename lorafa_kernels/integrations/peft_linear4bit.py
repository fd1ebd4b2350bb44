"""PEFT's LoRA layers on bitsandbytes' Linear4bit, on these kernels. Imports peft with bitsandbytes, so it is
imported where PEFT has made such a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn

from ..base import bnb
from ..base.frozen import QuantisedBase
from ..linear.quantised import frozen_linear
from ..model.placing.guards import is_quiet
from ..model.placing.members import Member, register_member
from ..model.placing.quantised import QuantisedGroup, register_quantised
from .peft_quantised import ServedOnQuantised

_BASE = "_lorafa_base"


class _Known(NamedTuple):
    """A base that was taken over, and what it was taken from."""

    of: tuple[object, ...]
    pointer: int
    base: QuantisedBase

    def is_of(self, of: tuple[object, ...], pointer: int) -> bool:
        # The compiler watches the objects, and cannot compare pointers.
        here = torch.compiler.is_compiling() or pointer == self.pointer
        return here and all(a is b for a, b in zip(of, self.of, strict=True))


class ServedLinear4bit(ServedOnQuantised, Linear4bit):
    """A `lora.bnb.Linear4bit` over a Linear4bit of NF4. Merging and unmerging are PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's. Raises RuntimeError where x needs a gradient and bitsandbytes has packed the base for
        CPU inference: its product gives none then, without a word.
        """
        if torch.is_grad_enabled() and x.requires_grad and bnb.is_packed(self.get_base_layer()):
            raise RuntimeError(
                "bitsandbytes has packed this Linear4bit for CPU inference (a forward in eval mode that PEFT "
                "computes does), and gives no gradient to its input then: load the model again to train it"
            )
        return super().forward(x, *args, **kwargs)

    def computed(self, x: Tensor) -> Tensor | None:
        linear = self._modules["base_layer"]
        if not self._disable_adapters or self.merged_adapters or not is_quiet(linear):
            return super().computed(x)
        # bitsandbytes would pack its codes here, in eval mode on a CPU.
        base, bias = self.quantised_base(linear), linear._parameters.get("bias")
        if base is None or base.device != x.device or (bias is not None and bias.requires_grad):
            return None
        return frozen_linear(x, base, bias, compute_dtype=self.compute_dtype_for(linear, x))

    def quantised_base(self, linear: nn.Module) -> QuantisedBase | None:
        weight = linear._parameters["weight"]
        # A plain Parameter after unpickling.
        plain = type(weight) is nn.Parameter or type(weight).__name__ == "Params4bit"
        if not (plain and bnb.is_linear4bit(linear)):
            return None
        state = bnb.state_of(linear)
        of = weight, state, getattr(state, "absmax", None)
        known = self.__dict__.get(_BASE)
        if known is not None and known.is_of(of, weight.data_ptr()):
            return known.base
        try:
            base = bnb.from_linear4bit(linear, known=known is not None and known.of[1] is state)
        except ValueError:
            return None
        self.__dict__[_BASE] = _Known(of, weight.data_ptr(), base)
        return base

    def compute_dtype_for(self, linear: nn.Module, x: Tensor | None) -> torch.dtype | None:
        if x is None:
            return linear.compute_dtype
        if not linear.compute_type_is_set:
            linear.set_compute_type(x)
            linear.compute_type_is_set = True
        return linear.compute_dtype or x.dtype

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _BASE}


class ServedMemberLinear4bit(Member, ServedLinear4bit):
    """A ServedLinear4bit that is computed together with others that are fed the same tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ServedLinear4bit."""
        y = None if args or kwargs else Member.output_of_group(self, x)
        return ServedLinear4bit.forward(self, x, *args, **kwargs) if y is None else y


register_quantised(ServedLinear4bit)
register_member(ServedLinear4bit, ServedMemberLinear4bit, QuantisedGroup)
