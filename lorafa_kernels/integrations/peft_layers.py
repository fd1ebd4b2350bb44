"""PEFT's `lora.Linear` on these kernels. Imports peft, so peft.py imports this where it is needed.

A served layer stays a `lora.Linear` (isinstance) with PEFT's names, files, merging and several adapters. Its
forward is one call of lorafa_linear while exactly one plain LoRA adapter is active, enabled and not merged,
and PEFT's own forward everywhere else. lora_A of every adapter that can be served is frozen again wherever
PEFT thaws it: PEFT calls `_freeze_non_trainable_peft_weights` after set_adapter, enable_adapters (which is
what leaving disable_adapter does), set_requires_grad and while an adapter is added.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import dispatch_default
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import bnb
from ..engines import not_plain
from ..group.operands import LinearOperands
from ..linear.api import lorafa_linear
from ..model.placing.guards import LINEARS, AdaptedLinear, is_plain, is_quiet, no_global_hooks
from ..model.placing.members import Member, register_member
from ..model.placing.place import remove_blocks
from ..nn.hooked import is_patched
from ..nn.linear import LoRAFALinear
from ..nn.quantised import Quantised, QuantisedLinear
from ..operands import FLOAT_DTYPES, autocast_enabled
from .peft_adapter import ServedAdapter, adapter_obstacle
from .peft_quantised import ServedMemberQuantisedLinear, ServedOnQuantised, ServedQuantisedLinear

# Dense base layers that can be served, and the forward that is computed.
_BASES = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}


class ServedLinear(ServedAdapter, AdaptedLinear, lora.Linear):
    """A `lora.Linear` that runs on these kernels where it can. "Linear" in its name is how PEFT finds it for
    a second adapter on "all-linear".
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As lora.Linear. Raises ValueError, as lorafa_linear, for a frozen parameter that was thawed by
        hand.
        """
        found = None if args or kwargs or not is_plain(x) or not no_global_hooks() else self._operands(x)
        if found is None:
            return super().forward(x, *args, **kwargs)
        return lorafa_linear(
            x,
            found.weight,
            found.lora_A,
            found.lora_B,
            found.bias,
            scaling=found.scaling,
            dropout_p=found.dropout_p,
        )

    def block_operands(self, x: Tensor) -> LinearOperands | None:
        found = self._operands(x)
        # A block gives no gradient to what is meant to be frozen, forward by itself refuses.
        if found is None or type(self._modules["base_layer"]) is not nn.Linear:
            return None
        frozen = (found.weight, found.lora_A, found.bias)
        return None if any(t is not None and t.requires_grad for t in frozen) else found

    def _operands(self, x: Tensor) -> LinearOperands | None:
        """What lorafa_linear computes for x, None where PEFT's own forward must."""
        found = self.acting()
        if found is None:
            return None
        base, lora_A, lora_B, scaling, dropout_p = found
        if type(base).forward is not _BASES.get(type(base)):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if not _computable(x, weight, lora_A, lora_B, bias):
            return None
        if type(base) is Conv1D:
            weight = weight.t()
        if weight.shape != (self.out_features, self.in_features):
            return None
        return LinearOperands(weight, bias, lora_A, lora_B, scaling, dropout_p)


class ServedMemberLinear(Member, ServedLinear):
    """A ServedLinear that is computed together with others that are fed the same tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ServedLinear."""
        y = None if args or kwargs else Member.output_of_group(self, x)
        return ServedLinear.forward(self, x, *args, **kwargs) if y is None else y


_SERVED = (ServedLinear, ServedMemberLinear, ServedQuantisedLinear, ServedMemberQuantisedLinear)
LINEARS[ServedLinear] = ServedLinear.forward
register_member(ServedLinear, ServedMemberLinear)


def _computable(x: Tensor, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> bool:
    """Whether these are Parameters (no shards, no views of a flat parameter) on x's device, in dtypes that
    can be combined.
    """
    device, dtype = x.device, x.dtype
    parameter = nn.Parameter
    # The usual case, in one pass: layers are called often, and small ones cost the host's time alone.
    if (
        type(weight) is parameter
        and type(lora_A) is parameter
        and type(lora_B) is parameter
        and weight.dtype == lora_A.dtype == lora_B.dtype == dtype
        and weight.device == lora_A.device == lora_B.device == device
        and (bias is None or (type(bias) is parameter and bias.dtype == dtype and bias.device == device))
    ):
        return True
    autocast = autocast_enabled(device.type) and dtype != torch.float64
    base = FLOAT_DTYPES if autocast else (dtype,)
    factor = FLOAT_DTYPES if autocast else (dtype, torch.float32)
    if bias is not None and not (type(bias) is nn.Parameter and bias.device == device and bias.dtype in base):
        return False
    return all(
        type(tensor) is nn.Parameter and tensor.device == device and tensor.dtype in allowed
        for tensor, allowed in ((weight, base), (lora_A, factor), (lora_B, factor))
    )


class ServedLoraModel(lora.LoraModel):
    """PEFT's tuner of a model that was accelerated: layers of adapters added later are served as well, and
    unloading gives the base model its own classes back.
    """

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As LoraModel."""
        super().inject_adapter(model, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, lora.LoraLayer) and obstacle(module) is None:
                serve(module)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As LoraModel."""
        remove_blocks(self.model.modules())
        return super().merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """As LoraModel."""
        remove_blocks(self.model.modules())
        return super().unload()


def serve(layer: nn.Module) -> None:
    """Make a LoRA layer without an obstacle a served one, with lora_A frozen; nothing else changes."""
    if type(layer) is lora.Linear:
        on_codes = isinstance(layer.base_layer, Quantised)
        layer.__class__ = ServedQuantisedLinear if on_codes else ServedLinear
    elif _is_on_linear4bit(layer):
        if not isinstance(layer, ServedOnQuantised):
            layer.__class__ = _served_linear4bit()[0]
        layer.quantised_base(layer.base_layer)
    layer._freeze_non_trainable_peft_weights()


def obstacle(layer: lora.LoraLayer, *, injected: bool = True) -> str | None:
    """Why no adapter of a LoRA layer of PEFT can ever run on these kernels, or None. injected: PEFT has
    frozen what it freezes.
    """
    kind, of_bnb = type(layer), _is_on_linear4bit(layer)
    if kind not in (lora.Linear, *_SERVED) and not of_bnb:
        for known, reason in (
            (lora.Embedding, "an embedding"),
            ((lora.Conv2d, lora.layer.Conv1d, lora.layer.Conv3d), "a convolution"),
            (lora.layer.MultiheadAttention, "an nn.MultiheadAttention, which reads weights without a call"),
            (lora.ParamWrapper, "a parameter (target_parameters)"),
        ):
            if isinstance(layer, known):
                return reason
        base = type(layer.get_base_layer()).__name__
        return (
            f"PEFT's {kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__} on a quantised or parallel {base}"
        )
    base = layer.base_layer
    if reason := _base_obstacle(base, of_bnb):
        return reason
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if trained and injected:
        return f"its {trained[0]} is trained"
    names = list(layer.lora_A)
    reasons = {adapter_obstacle(layer, name) for name in names}
    return None if None in reasons or not names else "; ".join(sorted(reasons))


def check_variants(layer: lora.LoraLayer) -> None:
    """Raise ValueError for an adapter, such as DoRA's, that PEFT computes from the weight of its base layer,
    where that holds the codes of quantize_base: PEFT would take them for the weight.
    """
    if isinstance(layer.base_layer, Quantised) and (names := list(layer.lora_variant)):
        raise ValueError(
            f"{adapter_obstacle(layer, names[0])}, and PEFT would compute it from the codes of a quantised "
            "base: take plain LoRA, or a base of bitsandbytes"
        )


def kind_of_base(layer: nn.Module) -> str:
    """ "dense", or the kind of the quantised base of a served layer."""
    base = layer.quantised_base(layer.base_layer) if isinstance(layer, ServedOnQuantised) else None
    return "dense" if base is None else base.kind.name


def _is_on_linear4bit(layer: nn.Module) -> bool:
    """Whether it is of PEFT's class for bitsandbytes' Linear4bit, or of what stands in for that."""
    kind = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    return kind is not None and type(layer) in (kind, *_served_linear4bit())


def _served_linear4bit() -> tuple[type, ...]:
    from .peft_linear4bit import ServedLinear4bit, ServedMemberLinear4bit

    return ServedLinear4bit, ServedMemberLinear4bit


def _base_obstacle(base: nn.Module, of_bnb: bool = False) -> str | None:
    if isinstance(base, lora.LoraLayer):
        return "its base layer is itself a LoRA layer"
    if of_bnb:
        try:
            bnb.from_linear4bit(base)
        except ValueError as error:
            return str(error)
    elif isinstance(base, Quantised):
        if type(base) is not QuantisedLinear:
            return f"its base layer is a {type(base).__name__}"
    elif type(base) is Conv1D:
        for name, tensor in base.named_parameters():
            if reason := not_plain(tensor):
                return f"{name} is {reason}"
    else:
        try:
            LoRAFALinear.check_linear(base)
        except (TypeError, ValueError) as error:
            # A patch may be taken off again, and PEFT computes as long as it is there.
            if not is_patched(base):
                return str(error)
    return None


def present_obstacle(layer: ServedLinear) -> str | None:
    """Why a served layer would be computed by PEFT if it were called now, or None."""
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged:
        return "merged, until it is unmerged"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if len(active) != 1:
        return f"{len(active)} adapters are active" if active else "none of its adapters is active"
    if reason := adapter_obstacle(layer, active[0]):
        return reason
    if not is_quiet(base):
        return "its base layer has hooks or a patched forward (offloading), while these are there"
    return None


def choose(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """What PEFT calls for the class of a layer: a served one, or None, whereupon PEFT chooses. Raises as
    check_variants.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    of_bnb = bnb.is_linear4bit(base)
    if kwargs.get("parameter_name") is not None or config.bias != "none" or _base_obstacle(base, of_bnb):
        return None
    dispatch = (
        importlib.import_module("peft.tuners.lora.bnb").dispatch_bnb_4bit if of_bnb else dispatch_default
    )
    layer = dispatch(target, adapter_name, config=config, **kwargs)
    if layer is not None:
        check_variants(layer)
    if layer is not None and obstacle(layer, injected=False) is None:
        serve(layer)
    return layer
