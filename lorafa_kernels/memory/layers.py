"""Repeated layers of a model: which there are, the model with fewer of them, and what the whole model takes.

A stack is an nn.ModuleList with several layers of one kind: of the same classes, parameters and settings. A
step's bytes are a sum over the layers, so that two steps that differ by one layer of a kind give what each
further one adds. The first layer of a stack can keep less than the others (its input may need no gradient),
and is followed by one more of its kind in the smallest model.
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
    """Layers of one kind in a stack: their indices, in order, and how many of them the smallest model has."""

    stack: str
    indices: tuple[int, ...]
    least: int

    @property
    def more(self) -> int:
        """How many the whole model has beyond the smallest one."""
        return len(self.indices) - self.least

    @property
    def added(self) -> Layer:
        """The layer that the second step has and the first has not."""
        return self.stack, self.indices[self.least]

    @property
    def before(self) -> Layer:
        """The last layer of this kind in the smallest model."""
        return self.stack, self.indices[self.least - 1]


@dataclass(frozen=True)
class Stacks:
    """A model's stacks: {path: number of layers} and their kinds."""

    sizes: Mapping[str, int]
    kinds: tuple[Kind, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Stacks:
        """Find the outermost stacks of `model`."""
        sizes: dict[str, int] = {}
        kinds: list[Kind] = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{s}.") for s in sizes):
                continue
            signatures = [_signature(layer) for layer in module]
            if not signatures or Counter(signatures).most_common(1)[0][1] < LEAST_REPEATED:
                continue
            sizes[name] = len(module)
            for signature in dict.fromkeys(signatures):
                indices = tuple(i for i, other in enumerate(signatures) if other == signature)
                least = 2 if indices[0] == 0 else 1
                kinds.append(Kind(name, indices, min(least, len(indices))))
        return cls(sizes, tuple(kinds))

    def smallest(self) -> frozenset[Layer]:
        """The layers of the smallest model."""
        return frozenset((kind.stack, i) for kind in self.kinds for i in kind.indices[: kind.least])

    def repeated(self) -> tuple[Kind, ...]:
        """The kinds of which the whole model has more."""
        return tuple(kind for kind in self.kinds if kind.more)


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


def extrapolate(
    smallest: Mapping[Hashable, Segment], further: Mapping[Kind, Mapping[Hashable, Segment]]
) -> dict[Hashable, Segment]:
    """Return the segments of the whole model's step.

    smallest: of the smallest model; further: of that with one more layer of a kind. Segments have the same
    names in both, but for those of the added layer. Raises ValueError if they have not.
    """
    found = {name: segment for name, segment in smallest.items()}
    for kind, segments in further.items():
        extra = {name for name in segments if _layer_of(name) == kind.added}
        if set(segments) - extra != set(smallest):
            raise ValueError("the steps of two numbers of layers differ in more than the layer")
    for name, segment in smallest.items():
        found[name] = _sum(
            segment, [(kind.more, segments[name], segment) for kind, segments in further.items()]
        )
    for kind, segments in further.items():
        for name in segments:
            if _layer_of(name) != kind.added:
                continue
            # It stands where the last one of its kind stands in the smallest model, and after that.
            before = (name[0], kind.before)
            steps = [(kind.more - 1, segments[name], smallest[before])]
            steps += [
                (other.more, further[other][before], smallest[before]) for other in further if other != kind
            ]
            found[name] = _sum(segments[name], steps)
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
