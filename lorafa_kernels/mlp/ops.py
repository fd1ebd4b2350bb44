"""Operators of the gated activation: schemas, shape functions, and the call of one implementation.

gated(g, u, activation, impl) -> h
gated_backward_(dh, g, u, activation, need_du, impl) -> du, with dg written over dh

Shapes, dtypes and activations as in activation.py. The functions of this module call the operators
torch.ops.lorafa_kernels.* for the Triton kernels and under a compiler, and what is made of PyTorch's own
operators directly otherwise, as linear/ops.py does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..linear.ops import autocast_enabled, define, open_to_direct_calls
from ..plan.choice import choose
from . import activation as plain

# Made of PyTorch's own operators, and therefore open to a direct call.
_DIRECT = {
    "torch": (plain.library_gated, plain.library_gated_backward),
    "reference": (plain.reference_gated, plain.reference_gated_backward),
}


def gated(g: Tensor, u: Tensor, activation: str, impl: str) -> Tensor:
    """Compute h (M, I), new and contiguous, in the dtype of g."""
    if open_to_direct_calls(g.device.type) and (functions := _DIRECT.get(_choose(g, impl))):
        return functions[0](g, u, activation)
    return _gated_op(g, u, activation, impl)


def gated_backward(
    dh: Tensor, g: Tensor, u: Tensor | None, activation: str, impl: str, need_du: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dg and du (M, I) in the dtype of dh, whose memory one of them takes: dh is used up.

    u=None: dg is not wanted, and dg is None. need_du=False: du is None. One of the two must be wanted.
    """
    if open_to_direct_calls(dh.device.type) and (functions := _DIRECT.get(_choose(dh, impl))):
        du = functions[1](dh, g, u, activation, need_du)
    else:
        du = _gated_backward_op(dh, g, u, activation, need_du, impl)
    if u is None:
        return None, dh
    return dh, du if need_du else None


def _choose(tensor: Tensor, impl: str) -> str:
    return choose(impl, tensor.device, tensor.dtype).impl


def _functions(tensor: Tensor, impl: str) -> tuple[Callable, Callable]:
    name = _choose(tensor, impl)
    if name in _DIRECT:
        return _DIRECT[name]
    kernels = importlib.import_module("..kernels.gated", __package__)
    return kernels.gated, kernels.gated_backward


def _run(which: int, impl: str, tensor: Tensor, *rest):
    """Call the forward (0) or backward (1) of an implementation, with autocast off and the tensor's device
    current.
    """
    device = tensor.device
    if autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _run(which, impl, tensor, *rest)
    # Triton launches on the current device, wherever its arguments lie.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(which, impl, tensor, *rest)
    return _functions(tensor, impl)[which](tensor, *rest)


def _gated(g, u, activation, impl):
    return _run(0, impl, g, u, activation)


def _gated_backward(dh, g, u, activation, need_du, impl):
    du = _run(1, impl, dh, g, u, activation, need_du)
    # An operator must return a tensor.
    return dh.new_empty((0,)) if du is None else du


def _gated_fake(g, u, activation, impl):
    return g.new_empty(g.shape)


def _gated_backward_fake(dh, g, u, activation, need_du, impl):
    return dh.new_empty(dh.shape if u is not None and need_du else (0,))


_gated_op = define("gated", "(Tensor g, Tensor u, str activation, str impl) -> Tensor", _gated, _gated_fake)
_gated_backward_op = define(
    "gated_backward_",
    "(Tensor(a!) dh, Tensor g, Tensor? u, str activation, bool need_du, str impl) -> Tensor",
    _gated_backward,
    _gated_backward_fake,
)
