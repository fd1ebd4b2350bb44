"""PEFT's LoRA layers on quantised bases, on these kernels: what they have in common, and those on what
quantize_base makes. Imports peft, as peft_layers.py.

Codes and scales are used where they are, by reference: for backward a layer keeps them and z (M × r), and the
dense weight is made for one product and freed after it. compute_dtype: what x is cast to, as bitsandbytes
does; y has the dtype of x.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..base.frozen import QuantisedBase, quantised
from ..base.kinds import kind_of
from ..group.operands import LinearOperands
from ..linear.quantised import quantised_linear
from ..model.placing.guards import is_plain, no_global_hooks
from ..model.placing.members import Member, register_member
from ..model.placing.quantised import AdaptedOnQuantised, QuantisedGroup, register_quantised
from ..nn.quantised import QuantisedLinear
from ..operands import autocast_enabled
from .peft_adapter import ServedAdapter


class ServedOnQuantised(ServedAdapter, AdaptedOnQuantised):
    """Beside a class of PEFT's LoRA layers: forward on a quantised base."""

    def quantised_base(self, linear: nn.Module) -> QuantisedBase | None:
        """The base of the layer that PEFT wraps, None if it cannot be used as it is now."""
        raise NotImplementedError

    def compute_dtype_for(self, linear: nn.Module, x: Tensor | None) -> torch.dtype | None:
        """What x is cast to; None: it must have the dtype of the base."""
        return linear.compute_dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's. Raises ValueError, as lorafa_linear, for a frozen parameter that was thawed by hand."""
        y = None if args or kwargs or not is_plain(x) or not no_global_hooks() else self.computed(x)
        return super().forward(x, *args, **kwargs) if y is None else y

    def computed(self, x: Tensor) -> Tensor | None:
        """y, None where PEFT's own forward must compute it."""
        found = self._operands(x)
        if found is None:
            return None
        base, bias, lora_A, lora_B, scaling, dropout_p, _ = found
        compute_dtype = self.compute_dtype_for(self._modules["base_layer"], x)
        # TRL casts what is trained to bf16, whatever is computed in.
        factors = [
            factor if self._combines(factor, compute_dtype, x) else factor.to(compute_dtype or x.dtype)
            for factor in (lora_A, lora_B)
        ]
        how = {"scaling": scaling, "dropout_p": dropout_p, "compute_dtype": compute_dtype}
        return quantised_linear(x, base, *factors, bias, **how)

    def block_operands(self, x: Tensor) -> LinearOperands | None:
        found = self._operands(x)
        if found is None:
            return None
        linear = self._modules["base_layer"]
        compute_dtype = self.compute_dtype_for(linear, x)
        # A block gives no gradient to what is meant to be frozen, forward by itself refuses; and it keeps no
        # copies of factors.
        if found.lora_A.requires_grad or any(
            p.requires_grad for p in linear._parameters.values() if p is not None
        ):
            return None
        if not all(self._combines(factor, compute_dtype, x) for factor in (found.lora_A, found.lora_B)):
            return None
        return found

    def block_dtypes(self, x: Tensor | None) -> tuple[torch.dtype, torch.dtype | None] | None:
        linear = self._modules["base_layer"]
        base = self.quantised_base(linear)
        return None if base is None else (base.dtype, self.compute_dtype_for(linear, x))

    def _operands(self, x: Tensor) -> LinearOperands | None:
        """What these kernels compute for x, the base in the place of the weight; None where PEFT must."""
        found = self.acting()
        base = None if found is None else self.quantised_base(found.base)
        if base is None or base.shape != (self.out_features, self.in_features) or base.device != x.device:
            return None
        bias = found.base._parameters.get("bias")
        for tensor in (found.lora_A, found.lora_B, bias):
            if tensor is not None and (type(tensor) is not nn.Parameter or tensor.device != x.device):
                return None
        cast = autocast_enabled(x.device.type) or self.compute_dtype_for(found.base, x) is not None
        if not cast and x.dtype != base.dtype:
            return None
        return LinearOperands(base, bias, found.lora_A, found.lora_B, found.scaling, found.dropout_p)

    @staticmethod
    def _combines(factor: Tensor, compute_dtype: torch.dtype | None, x: Tensor) -> bool:
        """Whether a factor is computed with as it is."""
        return autocast_enabled(x.device.type) or factor.dtype in (compute_dtype or x.dtype, torch.float32)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As PEFT's, (N, K), also where lora_B was cast without the frozen lora_A."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if A.dtype == B.dtype:
            return super().get_delta_weight(adapter)
        wide = torch.promote_types(A.dtype, B.dtype)
        return (B.to(wide) @ A.to(wide)) * self.scaling[adapter]


class ServedQuantisedLinear(ServedOnQuantised, lora.Linear):
    """A `lora.Linear` over a QuantisedLinear. Merging quantises the merged weight anew, as PEFT does with
    Linear4bit; unmerging puts the old codes and scales back, bit for bit.
    """

    def quantised_base(self, linear: nn.Module) -> QuantisedBase | None:
        if type(linear) is not QuantisedLinear:
            return None
        for name in kind_of(linear.quantised_kind).names:
            if type(linear._parameters[name]) is not nn.Parameter:
                return None
        return linear.base()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As lora.Linear. Raises ValueError, and leaves the layer as it is, for an adapter that is no plain
        LoRA and for a merged weight that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if wrong := [name for name in names if not self.is_plain_lora(name)]:
            raise ValueError(f"the adapter {wrong[0]} is no plain LoRA: it cannot be merged into codes")
        if not names:
            return
        linear = self.get_base_layer()
        base = linear.base()
        wide = torch.promote_types(base.dtype, torch.float32)
        with torch.no_grad():
            weight = base.dense(wide)
            for name in names:
                weight += self.get_delta_weight(name).to(wide)
            weight = weight.to(base.dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight merged with {', '.join(names)} is not finite")
        warnings.warn(
            "merging into a quantised layer quantises the merged weight anew, with the error of that",
            stacklevel=2,
        )
        self.__dict__.setdefault("_lorafa_codes", [linear._parameters[name] for name in base.kind.names])
        self._install(linear, base.kind.names, quantised(weight, base.kind.name).tensors)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """As lora.Linear."""
        if not self.merged:
            super().unmerge()
            return
        linear = self.get_base_layer()
        self._install(linear, kind_of(linear.quantised_kind).names, self.__dict__.pop("_lorafa_codes"))
        self.merged_adapters.clear()

    @staticmethod
    def _install(linear: nn.Module, names: tuple[str, ...], tensors: list[Tensor]) -> None:
        device = linear.weight.device
        for name, tensor in zip(names, tensors, strict=True):
            linear._parameters[name] = nn.Parameter(tensor.detach().to(device), requires_grad=False)


class ServedMemberQuantisedLinear(Member, ServedQuantisedLinear):
    """A ServedQuantisedLinear that is computed together with others that are fed the same tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ServedQuantisedLinear."""
        y = None if args or kwargs else Member.output_of_group(self, x)
        return ServedQuantisedLinear.forward(self, x, *args, **kwargs) if y is None else y


register_quantised(ServedQuantisedLinear)
register_member(ServedQuantisedLinear, ServedMemberQuantisedLinear, QuantisedGroup)
