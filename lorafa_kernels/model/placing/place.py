"""Go through a model, put fused blocks where it has what they compute, and say what was done and why not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ...base import bnb
from ...nn.quantised import Quantised
from .fused import fuse_module, restore_module
from .guards import ADAPTED, LINEARS, is_quiet, trained_names
from .members import MEMBERS, group_layers, ungroup_layer
from .projections import obstacle_between, shared_inputs
from .quantised import QUANTISED, AdaptedOnQuantised, dtypes_of
from .recognise import MLP, Norm, recognise_mlp, recognise_norm
from .shield import Untraceable


@dataclass(frozen=True)
class Block:
    """A module that could hold a fused block, and what was decided.

    name: of the module. kind: "MLP", "shared input" or "norm". module: name of its class. layers: the
    children that are computed together, empty for a norm or if nothing is. reason: why nothing was fused, or
    None.
    """

    name: str
    kind: str
    module: str
    layers: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def fused(self) -> bool:
        """Whether the block was placed."""
        return self.reason is None

    def __str__(self) -> str:
        if not self.fused:
            return f"{self.module}, {self.kind}: {self.reason}"
        if self.kind == "norm":
            return f"{self.module}, norm: keeps its input, and no fp32 copy of it"
        what = "in one node" if self.kind == "MLP" else "computed together"
        return f"{self.module}, {self.kind}: {', '.join(self.layers)} {what}"


def place_blocks(modules: Mapping[str, nn.Module], *, fuse: bool, norm: bool) -> tuple[Block, ...]:
    """Fuse what can be in `modules`, {name: module} of an adapted model; return what was found, in order.

    fuse: MLPs and layers that share an input. norm: RMS norms. Nothing but classes, and one private attribute
    of what is fused, changes.
    """
    blocks: list[Block] = []
    for name, module in modules.items():
        linears = _linears(module) if fuse else []
        if any(isinstance(module._modules[linear], ADAPTED) for linear in linears):
            blocks += _place_layers(name, module, linears)
        elif len(linears) > 2:
            blocks += _place_mlp(name, module)
        if norm and _may_be_norm(module):
            blocks.append(_place_norm(name, module))
    return tuple(blocks)


def remove_blocks(modules: Iterable[nn.Module]) -> None:
    """Undo place_blocks."""
    for module in modules:
        restore_module(module)
        ungroup_layer(module)


def _place_layers(name: str, module: nn.Module, linears: list[str]) -> list[Block]:
    kind = type(module).__name__
    if len(linears) < 2:
        return [Block(name, "shared input", kind, (), f"it has one linear layer only, {linears[0]}")]
    blocks = _place_mlp(name, module)
    if blocks and blocks[0].fused:
        return blocks
    plain = tuple(name for name in linears if type(module._modules[name]) in (*LINEARS, *QUANTISED))
    for names in shared_inputs(type(module)):
        adapted = [name for name in names if type(module._modules.get(name)) in MEMBERS]
        mixed = _mixed(module, adapted)
        layers = tuple(adapted) if mixed else _groupable(module, names)
        if len(layers) > 1:
            reason = mixed or _obstacle(module, layers) or obstacle_between(type(module), layers, plain)
            if reason is None:
                group_layers([module._modules[layer] for layer in layers], type(module))
            blocks.append(Block(name, "shared input", kind, layers if reason is None else (), reason))
    return blocks or [Block(name, "shared input", kind, (), "none of its adapted layers share an input")]


def _place_mlp(name: str, module: nn.Module) -> list[Block]:
    kind = type(module).__name__
    try:
        roles = recognise_mlp(module)
    except Untraceable as error:
        # An attention has a mask, a cache and so on beside its input, and is no failed MLP.
        if len(inspect.signature(type(module).forward).parameters) > 2:
            return []
        return [Block(name, "MLP", kind, (), f"its forward {error}")]
    layers = (roles.gate, roles.up, roles.down)
    inside = (*layers, *(other for other, _ in roles.others))
    reason = _mixed(module, layers) or _obstacle(module, inside) or _fuse(module, roles)
    return [Block(name, "MLP", kind, () if reason else layers, reason)]


def _place_norm(name: str, module: nn.Module) -> Block:
    kind = type(module).__name__
    try:
        roles = recognise_norm(module)
    except Untraceable as error:
        return Block(name, "norm", kind, (), f"its forward {error}")
    reason = _obstacle(module, ())
    if module._parameters[roles.weight].requires_grad:
        reason = f"its {roles.weight} is trained"
    return Block(name, "norm", kind, (), reason or _fuse(module, roles))


def _fuse(module: nn.Module, roles: MLP | Norm) -> str | None:
    try:
        fuse_module(module, roles)
    except TypeError as error:
        return f"its class cannot be changed ({error})"
    return None


def _obstacle(module: nn.Module, children: Iterable[str]) -> str | None:
    """Why `module` would not compute as a block though its forward is right, or None."""
    if "forward" in vars(module):
        return "its forward was patched on the instance"
    for name in children:
        child = module._modules[name]
        if not is_quiet(child):
            return f"{name} has hooks or a patched forward"
        trained = [
            n for n, p in child.named_parameters() if p.requires_grad and n not in trained_names(child)
        ]
        if trained:
            return f"{name}.{trained[0]} is trained"
    return None


def _mixed(module: nn.Module, names: Iterable[str]) -> str | None:
    """Why layers are not computed together though their forward would be right, or None: they are not all on
    quantised bases, or compute in different dtypes.
    """
    layers = {name: module._modules[name] for name in names}
    bases = [name for name, layer in layers.items() if isinstance(layer, (Quantised, AdaptedOnQuantised))]
    for name, layer in layers.items():
        if bnb.is_linear4bit(layer):
            return f"{name} is bitsandbytes' {type(layer).__name__}, without an adapter"
        if bases and name not in bases:
            return f"{bases[0]} is quantised, and {name} is not"
    kinds: dict[tuple | None, str] = {}
    for name in bases:
        kinds.setdefault(dtypes_of(layers[name], None), name)
    if len(kinds) > 1:
        return f"{' and '.join(list(kinds.values())[:2])} compute in different dtypes"
    return None


def _linears(module: nn.Module) -> list[str]:
    return [n for n, child in module._modules.items() if isinstance(child, (nn.Linear, *ADAPTED))]


def _groupable(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that are adapted layers of one kind and width and belong to no other group."""
    layers = {n: c for n in names if type(c := module._modules.get(n)) in MEMBERS}
    first = next(iter(layers.values()), None)
    kind = type(first), getattr(first, "in_features", None)
    distinct = {id(layer): n for n, layer in layers.items() if (type(layer), layer.in_features) == kind}
    return tuple(distinct.values())


def _may_be_norm(module: nn.Module) -> bool:
    """Whether `module` has nothing but vectors of one size, and at least one."""
    shapes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    return not module._modules and len(shapes) == 1 and len(next(iter(shapes))) == 1
