"""Adapted layers of a model that are fed the same tensor and are computed together: q/k/v, gate/up.

Each stays a layer of its own, called by its own name. The first one called with some x computes the
outputs of all; the others, called with the same x, find theirs waiting. The outputs wait per thread, until
they are taken, until x is gone, or until the next call with another x. A layer takes an output only if
nothing has changed since it was computed: x is the same object at the same version, the layer's parameters
are, and so are autocast, the CUDA stream and whether gradients are enabled. What is written through `.data`
changes no version: outputs wait only between calls that the forward makes whose source was read for that
(projections.py), and whoever else calls a layer has it computed by itself.

The layers are computed each by itself if one of them has hooks, is patched, merged, disabled, offloaded or
sharded, while torch.compile traces, and without gradients. Whether they are does not depend on what is
waiting: a checkpoint that runs forward again must meet the same nodes.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...group.api import lorafa_linear_group
from ...group.operands import LinearOperands
from ...nn.linear import LoRAFALinear
from ...operands import autocast_enabled
from .guards import LINEARS, common_impl, drops, is_plain, no_global_hooks, operands_for

_GROUP, _PLACE = "_lorafa_group", "_lorafa_place"
# What runs between a forward and that of a child which it calls.
_CALLS = frozenset({nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__})


def is_called_by(code: types.CodeType) -> bool:
    """Whether the module whose forward called what asks was called by a function of this code."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_code in _CALLS:
        frame = frame.f_back
    return frame is not None and frame.f_code is code


class Output(NamedTuple):
    """y and what it was computed from: the layer's operands, and the versions of their tensors then."""

    y: Tensor
    operands: LinearOperands
    versions: tuple[int, ...]

    def is_of(self, operands: LinearOperands) -> bool:
        for then, now in zip(self.operands, operands, strict=True):
            if then is not now and not (type(then) is type(now) is float and then == now):
                return False
        return self.versions == versions_of(operands[:4])


class _Outputs(dict[int, Output]):
    """Outputs by place in the group. A class of its own, so that it can be referred to weakly."""


class _Waiting(NamedTuple):
    """Outputs for x, and the state of torch that they were computed in."""

    x: weakref.ref
    version: int
    state: tuple
    outputs: _Outputs

    def are_for(self, x: Tensor, state: tuple) -> bool:
        return self.x() is x and self.version == x._version and self.state == state


class Group:
    """The layers that are computed together, by weak reference, and what waits for them in each thread.

    kind: the class whose forward calls them.

    A copy of it, by pickle or deepcopy, starts empty: the copies of the layers enter it themselves, so that a
    copied model has groups of its own and a layer that is copied alone takes no other with it.
    """

    def __init__(self, size: int, kind: type) -> None:
        self.kind = kind
        self.code = inspect.unwrap(kind.forward).__code__
        self.members: list[weakref.ref | None] = [None] * size
        self._local = threading.local()

    def __reduce__(self):
        return type(self), (len(self.members), self.kind)

    def enter(self, member: Member) -> None:
        """Take `member` in at its place, if nobody is there."""
        place = member.__dict__[_PLACE]
        if self.members[place] is None or self.members[place]() is None:
            self.members[place] = weakref.ref(member)

    def compute(self, member: Member, x: Tensor) -> Tensor | None:
        """Return the output of `member` for x, or None where it must compute by itself."""
        place, state = member.__dict__[_PLACE], _state(x)
        if not no_global_hooks():
            return None
        waiting: _Waiting | None = getattr(self._local, "waiting", None)
        if waiting is not None and waiting.are_for(x, state):
            output = waiting.outputs.pop(place, None)
            if not waiting.outputs:
                self._local.waiting = None
            if output is not None:
                operands = operands_for(member, x)
                if operands is None or output.is_of(operands):
                    return output.y if operands else None
        members = tuple(ref and ref() for ref in self.members)
        if members[place] is not member or None in members:
            return None
        operands = [operands_for(other, x) for other in members]
        impl = common_impl(members)
        if impl is None or None in operands:
            return None
        # With dropout the masks must be drawn alike with and without gradients: checkpointing runs forward
        # without them first.
        if not torch.is_grad_enabled() and not any(map(drops, operands)):
            return None
        dtype = operands[0].weight.dtype
        if any(other.weight.dtype != dtype for other in operands):
            return None
        return self._compute_all(x, operands, place, state, impl)

    def linears(self, x: Tensor, operands: list[LinearOperands], *, impl: str) -> tuple[Tensor, ...]:
        """The outputs of all."""
        return lorafa_linear_group(x, operands, impl=impl)

    @staticmethod
    def remembered(y: Tensor, operands: LinearOperands) -> Output:
        """What waits for the layer of these operands."""
        return Output(y, operands, versions_of(operands[:4]))

    def _compute_all(
        self, x: Tensor, operands: list[LinearOperands], place: int, state: tuple, impl: str
    ) -> Tensor:
        self._local.waiting = None
        ys = self.linears(x, operands, impl=impl)
        outputs = _Outputs(
            (other, self.remembered(y, operands[other])) for other, y in enumerate(ys) if other != place
        )
        # These are called from whichever thread lets go of x, or runs backward, so they clear what waits and
        # not a thread's slot. What waits must not be held by x or by the graph that it belongs to.
        clear = functools.partial(_clear, weakref.ref(outputs))
        if ys[place].grad_fn is not None:
            # Backward through one output frees what the others need for theirs.
            ys[place].grad_fn.register_prehook(clear)
        self._local.waiting = _Waiting(weakref.ref(x, clear), x._version, state, outputs)
        return ys[place]


def _clear(outputs: weakref.ref, _: Any) -> None:
    waiting = outputs()
    if waiting is not None:
        waiting.clear()


def _state(x: Tensor) -> tuple:
    device = x.device.type
    autocast = autocast_enabled(device) and torch.get_autocast_dtype(device)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return torch.is_grad_enabled(), autocast, stream


def versions_of(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """The versions of tensors; those made in inference mode have none."""
    return tuple(0 if t is None or t.is_inference() else t._version for t in tensors)


class Member:
    """What the class of a layer that belongs to a Group inherits from besides its own."""

    def output_of_group(self, input: Tensor) -> Tensor | None:
        """y for the input of forward, which calls this itself; None where it must compute by itself."""
        if torch.compiler.is_compiling() or not is_plain(input) or input.is_inference():
            return None
        group: Group | None = self.__dict__.get(_GROUP)
        return group.compute(self, input) if group is not None and is_called_by(group.code) else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__[_GROUP].enter(self)


class GroupMember(Member, LoRAFALinear):
    """A LoRAFALinear that belongs to a Group."""

    def forward(self, input: Tensor) -> Tensor:
        """As LoRAFALinear."""
        # By name: whoever kept this method may call it after the layer has left its group.
        y = Member.output_of_group(self, input)
        return LoRAFALinear.forward(self, input) if y is None else y


# The class of a layer in a group by its class outside of one, and the class of its group.
MEMBERS: dict[type, type] = {}
_GROUPS: dict[type, type[Group]] = {}


def register_member(alone: type, member: type, group: type[Group] = Group) -> None:
    """Let layers of the class `alone` form groups, in which they are of the class `member`, a Member."""
    MEMBERS[alone] = member
    _GROUPS[alone] = group
    LINEARS[member] = member.forward


register_member(LoRAFALinear, GroupMember)


def group_layers(layers: list[nn.Module], kind: type) -> None:
    """Compute the layers, all of one class in MEMBERS, together when forward of the class `kind` calls
    them.
    """
    group = _GROUPS[type(layers[0])](len(layers), kind)
    for place, layer in enumerate(layers):
        layer.__class__ = MEMBERS[type(layer)]
        layer.__dict__.update({_GROUP: group, _PLACE: place})
        group.enter(layer)


def ungroup_layer(layer: nn.Module) -> None:
    """Undo group_layers for one layer; the others of its group compute by themselves then."""
    layer.__dict__.pop(_GROUP, None)
    layer.__dict__.pop(_PLACE, None)
    # A class that was derived from it since, as fully_shard does, stays; it computes by itself now.
    for alone, member in MEMBERS.items():
        if type(layer) is member:
            layer.__class__ = alone
            return
