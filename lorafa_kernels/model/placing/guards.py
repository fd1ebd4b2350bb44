"""What must hold for a layer to be computed as part of a block instead of by its own call.

Asked before each call, since hooks, offloading and the user may change a module at any time. What does not
hold is not an error: the layer then runs by itself, as it would without the block.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...engines import is_plain_parameter, is_plain_tensor
from ...group.operands import LinearOperands
from ...nn.hooked import is_patched
from ...nn.linear import LoRAFALinear, is_exported
from ...operands import FLOAT_DTYPES, autocast_enabled

# Classes whose forward is what operands_for describes, and that forward: kernel libraries put another into
# the class. members.py adds its own, and integrations/ theirs.
LINEARS: dict[type, Callable] = {kind: kind.forward for kind in (nn.Linear, LoRAFALinear)}


# What computes a gated MLP of which this process has a part, by the classes of its gate, up and down:
# (x, gate, up, down, activation, impl) -> y, or None where each layer must compute by itself.
SPLIT_MLPS: dict[tuple[type, type, type], Callable[..., Tensor | None]] = {}


class AdaptedLinear:
    """What a layer of another library inherits from so that blocks take it for an adapted linear layer. Its
    class is to be registered in LINEARS, and has in_features and out_features.
    """

    impl = "auto"

    def block_operands(self, x: Tensor) -> LinearOperands | None:
        """As operands_for, whose checks of the class and of hooks on the layer itself are done."""
        raise NotImplementedError

    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that are meant to be trained."""
        raise NotImplementedError


ADAPTED = (LoRAFALinear, AdaptedLinear)


def trained_names(linear: nn.Module) -> frozenset[str]:
    """Names of the parameters of a linear layer that a block gives gradients to."""
    if isinstance(linear, AdaptedLinear):
        return linear.trained_names()
    return frozenset({"lora_B"}) if isinstance(linear, LoRAFALinear) else frozenset()


def is_quiet(module: nn.Module) -> bool:
    """Whether a call of `module` runs its class's forward and nothing else: no hook, no patched forward."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or ("forward" in module.__dict__ and is_patched(module))
    )


def no_global_hooks() -> bool:
    """Whether no hook of all modules is registered, and nobody reads off the operations of forward."""
    return not torch_module._has_any_global_hook() and not is_exported()


def is_plain(x: object) -> bool:
    """Whether x is a tensor of torch itself (or the fake of one), no DTensor or other subclass, of a dtype
    that blocks take.
    """
    return is_plain_tensor(x) and x.dtype in FLOAT_DTYPES


def operands_for(linear: nn.Module, x: Tensor) -> LinearOperands | None:
    """Return what a block needs of `linear`, of a class in LINEARS, to compute it from x; None where its own
    forward must.

    Which is so if it has hooks or is patched, merged or disabled; if the rows of a batch have several
    adapters; if a parameter is elsewhere than x (offloaded ones are on meta), sharded, empty or of a
    subclass; if a frozen one was thawed, which that forward trains or refuses; if its dtype is not that of
    x, outside of autocast.
    """
    kind = type(linear)
    if kind not in LINEARS or kind.forward is not LINEARS[kind] or not is_quiet(linear):
        return None
    if isinstance(linear, AdaptedLinear):
        return linear.block_operands(x)
    # Read past nn.Module's __getattr__, which takes longer than all the rest.
    attributes, parameters = linear.__dict__, linear._parameters
    adapted = kind is not nn.Linear
    if adapted and (attributes["merged"] or not attributes["adapter_enabled"]):
        return None
    # Looked up in the class where the layer never had another adapter than its own.
    several = adapted and linear._acting is not None
    if several and linear.mixes():
        return None
    adapter = linear.adapter() if several else linear
    weight = parameters.get("weight")
    if weight is None or weight.shape != (attributes["out_features"], attributes["in_features"]):
        return None
    if weight.dtype != x.dtype and not autocast_enabled(x.device.type):
        return None
    device = x.device
    owned = parameters.items()
    if adapter is not linear and adapter is not None:
        owned = (*owned, *adapter._parameters.items())
    for name, parameter in owned:
        if parameter is not None and (
            not is_plain_parameter(parameter)
            or parameter.device != device
            or (parameter.requires_grad and name != "lora_B")
        ):
            return None
    if not adapted:
        return LinearOperands(weight, parameters.get("bias"))
    if several:
        return linear.adapter_operands(adapter)
    dropout_p = attributes["lora_dropout"] if attributes["training"] else 0.0
    return LinearOperands(
        weight,
        parameters.get("bias"),
        parameters["lora_A"],
        parameters["lora_B"],
        attributes["scaling"],
        dropout_p,
        attributes.get("gradient_correction", False),
    )


def drops(operands: LinearOperands) -> bool:
    """Whether a dropout mask is drawn for the layer."""
    return operands.dropout_p > 0


def common_impl(linears: tuple[nn.Module, ...]) -> str | None:
    """The `impl` that all adapted ones have, "auto" if none is adapted, None if they differ."""
    impls = {linear.impl for linear in linears if isinstance(linear, ADAPTED)}
    return None if len(impls) > 1 else next(iter(impls), "auto")
