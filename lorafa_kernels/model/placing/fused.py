"""MLPs and norms of a model that compute as one autograd node each.

A fused module keeps its identity, its attributes, its children and its hooks. Its class becomes a subclass of
its own class, of the same name, whose forward computes the block at once where it may, and is the original
forward everywhere else: without gradients (so generate() gives the same bits), with hooks on the children,
with patched, merged, disabled, offloaded or sharded layers. Pickles name the original class, so that they
need nothing that only this process has.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...engines import is_plain_parameter
from ...mlp.api import lorafa_gated_mlp
from ...nn.linear import is_exported
from ...norm import rms_norm
from ...operands import FLOAT_DTYPES
from .guards import SPLIT_MLPS, common_impl, drops, is_plain, is_quiet, no_global_hooks, operands_for
from .recognise import MLP, Norm, recognise_mlp, recognise_norm
from .shield import Guards, Untraceable

_BLOCK = "_lorafa_block"
# Children that return their input, and the forward that does so.
_IDENTITIES = {nn.Identity: nn.Identity.forward, nn.Dropout: nn.Dropout.forward}


class FusedBlock:
    """What the class of a fused module inherits from besides the module's own."""

    def lorafa_compute(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the block's output, or None where the original forward must compute it."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int):
        reduced = super().__reduce_ex__(max(2, protocol))
        if reduced[0] is not copyreg.__newobj__:
            return reduced
        kind = type(self)
        return (_new, (kind.lorafa_original, kind.lorafa_kind), *reduced[2:])


class FusedMLP(FusedBlock):
    def lorafa_compute(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        roles: MLP | None = _roles(self, recognise_mlp)
        x = None if roles is None else _input(args, kwargs, roles.input)
        if x is None:
            return None
        children = self._modules
        linears = (children.get(roles.gate), children.get(roles.up), children.get(roles.down))
        if None in linears:
            return None
        for name, kind in roles.others:
            child = children.get(name)
            if type(child) is not kind or not is_quiet(child) or (kind is nn.Dropout and child.p != 0):
                return None
            if _IDENTITIES.get(kind, kind.forward) is not kind.forward:
                return None
        if roles.activation_guards is not None:
            name, guards = roles.activation_guards
            if not _hold(guards, children[name]):
                return None
        impl = common_impl(linears)
        if impl is None or not no_global_hooks():
            return None
        if split := SPLIT_MLPS.get(tuple(map(type, linears))):
            return split(x, *linears, roles.activation, impl)
        operands = tuple(operands_for(linear, x) for linear in linears)
        if None in operands or len({operand.weight.dtype for operand in operands}) > 1:
            return None
        # With dropout the masks must be drawn alike with and without gradients: checkpointing runs forward
        # without them first.
        if not torch.is_grad_enabled() and not any(map(drops, operands)):
            return None
        return lorafa_gated_mlp(x, *operands, activation=roles.activation, impl=impl)


class FusedNorm(FusedBlock):
    def lorafa_compute(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        # Without a gradient nothing is kept anyway, and a compiler fuses the original better.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        roles: Norm | None = _roles(self, recognise_norm)
        x = None if roles is None else _input(args, kwargs, roles.input)
        if x is None or not x.requires_grad:
            return None
        if is_exported():
            return None
        weight = self._parameters.get(roles.weight)
        if not is_plain_parameter(weight) or weight.requires_grad or weight.device != x.device:
            return None
        if weight.shape != x.shape[-1:] or weight.dtype not in FLOAT_DTYPES:
            return None
        return rms_norm(x, weight, getattr(self, roles.eps), roles.form)


def _roles(module: nn.Module, recognise: Callable) -> MLP | Norm | None:
    """The roles of `module`, None where something that its forward reads is not what it was when it was
    recognised, and where it is not fused.
    """
    roles = module.__dict__.get(_BLOCK)
    if roles is None:
        return None
    if roles.guards.stale and not torch.compiler.is_compiling():
        # Out of a pickle, so that its globals may be others.
        try:
            roles = recognise(module)
        except Untraceable:
            roles = None
        module.__dict__[_BLOCK] = roles
    return roles if roles is not None and _hold(roles.guards, module) else None


def _hold(guards: Guards, module: nn.Module) -> bool:
    if torch.compiler.is_compiling():
        return guards.hold_compiled(module)
    return guards.hold(module)


def _input(args: tuple, kwargs: dict[str, Any], name: str) -> Tensor | None:
    """The one plain tensor that was given, or None."""
    if len(args) == 1 and not kwargs:
        x = args[0]
    elif not args and len(kwargs) == 1:
        x = kwargs.get(name)
    else:
        return None
    return x if is_plain(x) else None


def fuse_module(module: nn.Module, roles: MLP | Norm) -> None:
    """Make `module` compute as the block that `roles` describes. Raises TypeError if its class forbids it."""
    kind = FusedMLP if isinstance(roles, MLP) else FusedNorm
    module.__class__ = _subclass(type(module), kind)
    module.__dict__[_BLOCK] = roles


def restore_module(module: nn.Module) -> None:
    """Undo fuse_module; does nothing to other modules."""
    module.__dict__.pop(_BLOCK, None)
    # A class that was derived from the fused one since, as fully_shard does, stays; it computes as before.
    if "lorafa_original" in vars(type(module)):
        module.__class__ = type(module).lorafa_original


def _new(original: type, kind: type) -> nn.Module:
    """An empty module of the fused class, for pickle and deepcopy to fill."""
    fused = _subclass(original, kind)
    return fused.__new__(fused)


@functools.lru_cache(maxsize=512)
def _subclass(original: type, kind: type) -> type:
    known = original.forward

    @functools.wraps(known)
    def forward(self, *args, **kwargs):
        # Kernel libraries put another forward into the class.
        # Whoever kept this method may call it after the block was taken out, when `self` is none any more.
        y = kind.lorafa_compute(self, args, kwargs) if original.forward is known else None
        return original.forward(self, *args, **kwargs) if y is None else y

    names = {
        "forward": forward,
        "lorafa_original": original,
        "lorafa_kind": kind,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original)(original.__name__, (kind, original), names)
