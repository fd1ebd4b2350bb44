"""Repeated layers of a model: which there are, the model with fewer of them, and what the whole model takes.

A stack is an nn.ModuleList with several layers of one kind: of the same classes, parameters and settings. A
step's bytes are a sum over the layers, so that two steps that differ by one layer of a kind give what each
further one adds. The first layer of a stack can keep less than the others (its input may need no gradient)
and the last one may be followed by more than a layer: both are always there.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .trace import Segment

# (path of the stack, index in it): a layer of the whole model.
Layer = tuple[str, int]
FORWARD, AFTER, BACKWARD = "forward", "after", "backward"
# Fewer layers than this are run as they are.
LEAST_REPEATED = 4
_SETTINGS = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Kind:
    """Layers of one kind in a stack, of which the smallest model has only a part.

    more: how many the whole model has beyond the smallest one. added: one of these, which the second step
    has. before, after: its neighbours in the smallest model.
    """

    more: int
    added: Layer
    before: Layer
    after: Layer


@dataclass(frozen=True)
class Stacks:
    """A model's stacks.

    sizes: {path: number of layers}. smallest: the layers of the smallest model: of each stack the first and
    the last one, and one of each kind. repeated: the kinds of which the whole model has more.
    """

    sizes: Mapping[str, int]
    smallest: frozenset[Layer]
    repeated: tuple[Kind, ...]

    @classmethod
    def none(cls) -> Stacks:
        """Of a model that is run as it is."""
        return cls({}, frozenset(), ())

    @classmethod
    def of(cls, model: nn.Module) -> Stacks:
        """Find the outermost stacks of `model`."""
        sizes: dict[str, int] = {}
        smallest: set[Layer] = set()
        repeated: list[Kind] = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{s}.") for s in sizes):
                continue
            signatures = [_signature(layer) for layer in module]
            if not signatures or max(Counter(signatures).values()) < LEAST_REPEATED:
                continue
            sizes[name] = len(module)
            chosen = {0, len(module) - 1}
            for signature in dict.fromkeys(signatures):
                if not any(signatures[i] == signature for i in chosen):
                    chosen.add(signatures.index(signature))
            smallest |= {(name, i) for i in chosen}
            for signature in dict.fromkeys(signatures):
                left = [i for i, other in enumerate(signatures) if other == signature and i not in chosen]
                if left:
                    before = max(i for i in chosen if i < left[0])
                    after = min(i for i in chosen if i > left[0])
                    repeated.append(Kind(len(left), (name, left[0]), (name, before), (name, after)))
        return cls(sizes, frozenset(smallest), tuple(repeated))


def _signature(module: nn.Module) -> Hashable:
    """What two layers of one kind have in common; the index of a layer is no part of it."""
    settings = tuple(
        sorted(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, _SETTINGS) and not name.startswith("_") and not _is_index(name)
        )
    )
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    )
    children = tuple((name, child and _signature(child)) for name, child in module._modules.items())
    return type(module), str(settings), tensors, children


def _is_index(name: str) -> bool:
    return any(part in name.lower() for part in ("idx", "index", "layer_id", "layer_number"))


class _FakeCopy(TorchFunctionMode):
    """Makes deepcopy leave a fake in the place of each tensor. Parameters go past it, by the memo."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(tensor)
        return memo[id(tensor)]


def _fake(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def fake_copy(model: nn.Module, layers: frozenset[Layer], stacks: Stacks) -> nn.Module:
    """Return a copy of `model` that has of each stack only these layers. Its tensors are fakes on the CPU:
    call it within a FakeTensorMode. Parameters that modules share stay shared.
    """
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, object] = {id(tensor): _fake(tensor) for tensor in tensors}
    for name, size in stacks.sizes.items():
        for i in range(size):
            if (name, i) not in layers:
                memo[id(model.get_submodule(name)[i])] = None
    with _FakeCopy():
        copied = copy.deepcopy(model, memo)
    for name, size in stacks.sizes.items():
        kept = [i for i in range(size) if (name, i) in layers]
        stack = copied.get_submodule(name)
        left = [stack[i] for i in kept]
        stack._modules = {str(i): layer for i, layer in enumerate(left)}
        _shorten(copied, size, kept)
    return copied


def _shorten(model: nn.Module, size: int, kept: list[int]) -> None:
    """Leave, in what a transformers config lists by layer, the layers that were kept."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for name, value in list(getattr(config, "__dict__", {}).items()):
            if isinstance(value, (list, tuple)) and len(value) == size:
                config.__dict__[name] = type(value)(value[i] for i in kept)


def layers_in(model: nn.Module, layers: frozenset[Layer], stacks: Stacks) -> dict[Layer, nn.Module]:
    """Return the layers of a copy made by fake_copy, by their places in the whole model."""
    found = {}
    for name, size in stacks.sizes.items():
        kept = [i for i in range(size) if (name, i) in layers]
        found |= {(name, i): model.get_submodule(name)[place] for place, i in enumerate(kept)}
    return found


class Unlike(ValueError):
    """Steps of which one does not follow from the others."""


def extrapolate(
    smallest: Mapping[Hashable, Segment], further: Mapping[Kind, Mapping[Hashable, Segment]]
) -> dict[Hashable, Segment]:
    """Return the segments of the whole model's step.

    smallest: of the smallest model; further: of that with one more layer of a kind. Segments have the same
    names in both, but for those of the added layer. Raises Unlike if they have not.
    """
    found: dict[Hashable, Segment] = {}
    for kind, segments in further.items():
        extra = {name for name in segments if _layer_of(name) == kind.added}
        if set(segments) - extra != set(smallest):
            raise Unlike("the steps of two numbers of layers differ in more than the layer")
        for name in extra:
            # The further layers of its kind stand between its neighbours: the last one next to the one that
            # comes after, the first one next to the one before. What is between lies between.
            for neighbour in (kind.before, kind.after):
                beside = (name[0], neighbour)
                if beside not in smallest:
                    continue
                steps = [
                    (other.more - (other == kind), taken[beside], smallest[beside])
                    for other, taken in further.items()
                ]
                found[(*name, neighbour)] = _sum(segments[name], steps)
    for name, segment in smallest.items():
        steps = [(kind.more, segments[name], segment) for kind, segments in further.items()]
        found[name] = _sum(segment, steps)
    return found


def _layer_of(name: Hashable) -> Layer | None:
    return name[1] if isinstance(name, tuple) else None


def _sum(start: Segment, steps: list[tuple[int, Segment, Segment]]) -> Segment:
    """start + count · (more − less) for each (count, more, less)."""
    peak = start.peak + sum(count * (more.peak - less.peak) for count, more, less in steps)
    kinds = {
        kind: size + sum(count * (more.kinds[kind] - less.kinds[kind]) for count, more, less in steps)
        for kind, size in start.kinds.items()
    }
    return Segment(peak, kinds)
