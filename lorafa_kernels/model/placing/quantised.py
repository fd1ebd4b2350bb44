"""Layers on quantised bases in the blocks of a model: as groups, and in gated MLPs.

They compute together where dense layers would (members.py, fused.py), from their bases in the place of the
weights. A layer computes by itself where it would in a dense model, and where it is merged, also into codes;
an MLP gives way where its layers compute in another dtype than x has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...base.frozen import QuantisedBase
from ...engines import is_plain_parameter
from ...group.operands import LinearOperands
from ...group.quantised import quantised_linear_group
from ...mlp.quantised import quantised_gated_mlp
from ...nn.mlp import computes_in
from ...nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear, base_operands, common_compute_dtype
from ...operands import autocast_enabled
from .guards import SPLIT_MLPS, AdaptedLinear, drops, is_quiet
from .members import Group, Member, Output, register_member, versions_of


class AdaptedOnQuantised(AdaptedLinear):
    """What a layer of another library on a quantised base inherits from so that blocks take it: what its
    block_operands returns has that base in the place of the weight. Its class is to be registered by
    register_quantised.
    """

    def block_dtypes(self, x: Tensor | None) -> tuple[torch.dtype, torch.dtype | None] | None:
        """The dtype of the weight that the base stands for, and what x is cast to, None for x as it is. None
        without such a base. x is None while blocks are placed.
        """
        raise NotImplementedError


def dtypes_of(layer: nn.Module, x: Tensor | None) -> tuple[torch.dtype, torch.dtype | None] | None:
    """As AdaptedOnQuantised.block_dtypes, for any layer."""
    if isinstance(layer, AdaptedOnQuantised):
        return layer.block_dtypes(x)
    common = common_compute_dtype((layer,))
    return None if common is None else (layer.dense_dtype, *common)


def _common_dtype(layers: Iterable[nn.Module], x: Tensor) -> tuple[torch.dtype | None] | None:
    """As common_compute_dtype, of layers of other libraries too."""
    found = {dtypes_of(layer, x) for layer in layers}
    common = found.pop()
    return None if found or common is None else (common[1],)


class _Remembered(Output):
    """Of a base, which is made for each call, its tensors are compared."""

    def is_of(self, operands: LinearOperands) -> bool:
        flat = _flat(operands)
        if len(flat) != len(self.operands) or self.versions != _versions(flat):
            return False
        return all(
            then is now if isinstance(then, Tensor) or isinstance(now, Tensor) else then == now
            for then, now in zip(self.operands, flat, strict=True)
        )


def _flat(operands: LinearOperands) -> tuple:
    base: QuantisedBase = operands.weight
    return (base.kind.name, base.shape, base.dtype, *base.tensors, *operands[1:])


def _versions(flat: tuple) -> tuple[int, ...]:
    return versions_of(part for part in flat if isinstance(part, Tensor))


class QuantisedGroup(Group):
    """A Group of layers on quantised bases."""

    def compute(self, member: Member, x: Tensor) -> Tensor | None:
        """As Group.compute; None too where the members have different compute_dtypes."""
        return None if self._compute_dtype(x) is None else super().compute(member, x)

    def linears(self, x: Tensor, operands: list[LinearOperands], *, impl: str) -> tuple[Tensor, ...]:
        """As Group.linears."""
        (compute_dtype,) = self._compute_dtype(x)
        return quantised_linear_group(x, operands, impl=impl, compute_dtype=compute_dtype)

    @staticmethod
    def remembered(y: Tensor, operands: LinearOperands) -> Output:
        """As Group.remembered."""
        flat = _flat(operands)
        return _Remembered(y, flat, _versions(flat))

    def _compute_dtype(self, x: Tensor) -> tuple[torch.dtype | None] | None:
        return _common_dtype((layer for ref in self.members if ref and (layer := ref()) is not None), x)


class QuantisedMember(Member, AdaptedLinear, LoRAFAQuantisedLinear):
    """A LoRAFAQuantisedLinear that belongs to a QuantisedGroup."""

    def forward(self, input: Tensor) -> Tensor:
        """As LoRAFAQuantisedLinear."""
        # By name: whoever kept this method may call it after the layer has left its group.
        y = Member.output_of_group(self, input)
        return LoRAFAQuantisedLinear.forward(self, input) if y is None else y

    def block_operands(self, x: Tensor) -> LinearOperands | None:
        """As AdaptedLinear.block_operands."""
        return _operands_for(self, x)

    def trained_names(self) -> frozenset[str]:
        """As AdaptedLinear.trained_names."""
        return frozenset({"lora_B"})


register_member(LoRAFAQuantisedLinear, QuantisedMember, QuantisedGroup)
# Classes of layers on quantised bases outside of groups, and the forward that a block computes.
QUANTISED = {kind: kind.forward for kind in (QuantisedLinear, LoRAFAQuantisedLinear)}


def _operands_for(layer: nn.Module, x: Tensor) -> LinearOperands | None:
    """As guards.operands_for, whose checks of the class and of hooks are done, for a layer on a quantised
    base.
    """
    if isinstance(layer, AdaptedOnQuantised):
        return layer.block_operands(x)
    adapted = isinstance(layer, LoRAFAQuantisedLinear)
    if adapted and (layer.merged or not layer.adapter_enabled):
        return None
    if layer.compute_dtype is None and layer.dense_dtype != x.dtype and not autocast_enabled(x.device.type):
        return None
    for name, parameter in layer._parameters.items():
        if parameter is not None and (
            not is_plain_parameter(parameter)
            or parameter.device != x.device
            or (parameter.requires_grad and name != "lora_B")
        ):
            return None
    base = layer.base()
    # An engine has freed what it will gather again.
    if any(tensor.shape != size for tensor, (_, size) in zip(base.tensors, _spec(base), strict=True)):
        return None
    return layer.adapter_operands(layer) if adapted else base_operands(layer)


def _spec(base: QuantisedBase) -> Any:
    return base.kind.spec(*base.shape).values()


def _gated_mlp(
    x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, activation: str, impl: str
) -> Tensor | None:
    """y of a gated MLP on quantised bases; None where each layer must compute by itself."""
    layers = gate, up, down
    common = _common_dtype(layers, x)
    if common is None or not computes_in(common[0], x):
        return None
    for layer in layers:
        if type(layer).forward is not QUANTISED[type(layer)] or not is_quiet(layer):
            return None
    operands = [_operands_for(layer, x) for layer in layers]
    if None in operands:
        return None
    # As of a dense MLP.
    if not torch.is_grad_enabled() and not any(map(drops, operands)):
        return None
    return quantised_gated_mlp(x, *operands, activation=activation, impl=impl, compute_dtype=common[0])


def register_quantised(kind: type) -> None:
    """Let layers of the class `kind`, on quantised bases, be the layers of gated MLPs."""
    QUANTISED[kind] = kind.forward
    for kinds in itertools.product(QUANTISED, repeat=3):
        SPLIT_MLPS[kinds] = _gated_mlp


for known in tuple(QUANTISED):
    register_quantised(known)
