"""Operators of the gated activation, and the autograd node of the MLP: schemas, shape functions, the call of
one implementation, and what is kept for backward.

gated(g, u, activation, impl) -> h
gated_backward_(dh, g, u, activation, need_du, impl) -> du, with dg written over dh

Shapes, dtypes and activations as in activation.py. The functions of this module call the operators
torch.ops.lorafa_kernels.* for the Triton kernels and under a compiler, and what is made of PyTorch's own
operators directly otherwise (dispatch.py).

The node keeps, through save_for_backward only: the outputs g and u of gate and up (M, I), z of the two (M,
ΣR) and z of down (M, R), the weight, lora_A and lora_B objects themselves and the seeds of the dropout masks.
It keeps neither x nor act(g) nor h = act(g) · u: dB of down needs only its z, and the rest follows from g and
u. For a corrected dB it keeps the inverse (R, R) that correction.py has made.
The two nodes, of dense weights and of quantised bases (quantised.py), are made of `keeping_forward` and
`gradients`, with the group that each computes by: what they keep differs in the weights alone.
What no requested gradient needs is not kept. Backward makes dh, writes dg over it and du beside it: its
temporaries are 2·M·I elements.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import call, define, first_order, holds_data, open_to_direct_calls
from ..group.operands import corrected
from ..group.ops import group_backward, group_forward
from ..plan.choice import choose
from . import activation as plain

# Made of PyTorch's own operators, and therefore open to a direct call.
_DIRECT = {
    "torch": (plain.library_gated, plain.library_gated_backward),
    "reference": (plain.reference_gated, plain.reference_gated_backward),
}


def gated(g: Tensor, u: Tensor, activation: str, impl: str) -> Tensor:
    """Compute h (M, I), new and contiguous, in the dtype of g."""
    if run := _direct(0, g, impl):
        return run(g, u, activation)
    return _gated_op(g, u, activation, impl)


def gated_backward(
    dh: Tensor, g: Tensor, u: Tensor | None, activation: str, impl: str, need_du: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dg and du (M, I) in the dtype of dh, whose memory one of them takes: dh is used up.

    u=None: dg is not wanted, and dg is None. need_du=False: du is None. One of the two must be wanted.
    """
    if run := _direct(1, dh, impl):
        du = run(dh, g, u, activation, need_du)
    else:
        du = _gated_backward_op(dh, g, u, activation, need_du, impl)
    if u is None:
        return None, dh
    return dh, du if need_du else None


def _direct(place: int, tensor: Tensor, impl: str) -> Callable[..., Any] | None:
    """Return the function at `place` of _functions, to call directly; None where the operator is needed."""
    if not open_to_direct_calls():
        return None
    name = choose(impl, tensor.device, tensor.dtype).impl
    function = _functions(name)[place]
    if name in _DIRECT:
        return function
    return partial(call, function, tensor.device) if holds_data(tensor) else None


def _functions(name: str) -> tuple[Callable, Callable]:
    """Return forward and backward of the implementation of that name."""
    return _DIRECT[name] if name in _DIRECT else _kernels()


@functools.cache
def _kernels() -> tuple[Callable, Callable]:
    kernels = importlib.import_module("..kernels.gated", __package__)
    return kernels.gated, kernels.gated_backward


def _gated(g, u, activation, impl):
    function, _ = _functions(choose(impl, g.device, g.dtype).impl)
    return call(function, g.device, g, u, activation)


def _gated_backward(dh, g, u, activation, need_du, impl):
    _, function = _functions(choose(impl, dh.device, dh.dtype).impl)
    du = call(function, dh.device, dh, g, u, activation, need_du)
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

# Lists have one entry each for gate, up and down. gate and up read x as one group, down is one by itself.
_INPUTS = slice(0, 2)
_DOWN = slice(2, 3)


class Linears(NamedTuple):
    """How the linear layers are computed: as group/ops.py does, from weights or what stands for them."""

    forward: Callable
    backward: Callable


DENSE = Linears(group_forward, group_backward)


def gated_mlp(
    x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, activation, impl, linears=DENSE
) -> Tensor:
    """Compute y (M, N) and keep nothing for backward. Lists have one entry each for gate, up and down."""
    operands = weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
    (g, u), _ = _part(linears, _INPUTS, x, *operands)
    h = gated(g, u, activation, impl)
    # Freed before the product of down, where most memory is in use.
    del g, u
    (y,), _ = _part(linears, _DOWN, h, *operands)
    return y


class Kept(NamedTuple):
    """What a node keeps, in the order in which save_for_backward takes it; lists have one entry each for
    gate, up and down, None where a gradient does not need it.
    """

    values: tuple[Tensor | None, ...]
    lora_Bs: list[Tensor | None]
    weights: list[Tensor | None]
    lora_As: list[Tensor | None]
    inverses: list[Tensor | None]


def keeping_forward(
    ctx, linears, x, seeds, scalings, dropout_ps, activation, impl, operands
) -> tuple[Tensor, Kept]:
    """Return y and what the node must keep; its other arguments are put into ctx. operands: weights, lora_Bs,
    biases, lora_As and inverses, three of each.
    """
    weights, lora_Bs, biases, lora_As, inverses = operands
    arguments = weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
    (g, u), z = _part(linears, _INPUTS, x, *arguments)
    (y,), z_down = _part(linears, _DOWN, gated(g, u, activation, impl), *arguments)

    need_dx, need_dBs = _needs(ctx)
    need_dg, need_du = need_dx or need_dBs[0], need_dx or need_dBs[1]
    need_dh = need_dg or need_du
    trains_input = need_dBs[0] or need_dBs[1]
    reads_values = need_dx, need_dx, need_dh
    ctx.scalings = scalings
    ctx.dropout_ps = dropout_ps
    ctx.activation = activation
    ctx.impl = impl
    values = (
        g if need_dh else None,
        u if need_dg else None,
        z if trains_input else None,
        z_down if need_dBs[2] else None,
        seeds if need_dh else None,
    )
    return y, Kept(
        values,
        # A lora_B whose values backward does not read gives the dtype of dB and the columns of z.
        _only(lora_Bs, (need_dx or trains_input, need_dx or trains_input, need_dh or need_dBs[2])),
        _only(weights, reads_values),
        _only(lora_As, reads_values),
        _only(inverses, need_dBs),
    )


class LoRAFAGatedMLPFunction(torch.autograd.Function):
    """y (M, N) from x (M, K) and the weights, lora_Bs, biases, lora_As and inverses (A Aᵀ + εI)⁻¹ (for a
    corrected dB) of gate, up and down, three of each in this order, None for what a layer lacks; gradients
    for x and the lora_Bs only.
    """

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_ps, activation, impl, *operands):
        by_role = (operands[i : i + 3] for i in range(0, 15, 3))
        y, kept = keeping_forward(ctx, DENSE, x, seeds, scalings, dropout_ps, activation, impl, by_role)
        values, *lists = kept
        ctx.save_for_backward(*values, *(tensor for tensors in lists for tensor in tensors))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx, *dBs = first_order(_gradients, ctx, dy)
        return dx, *[None] * 8, *dBs, *[None] * 9


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return dx and the dB of gate, up and down."""
    # Read once: a checkpoint refuses a second time.
    saved = ctx.saved_tensors
    return gradients(ctx, DENSE, dy, Kept(saved[:5], *(saved[i : i + 3] for i in range(5, 17, 3))))


def _part(
    linears: Linears, which: slice, x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
) -> tuple[Sequence[Tensor], Tensor]:
    """Return the outputs of gate and up, or of down, and their z."""
    return linears.forward(
        x,
        weights[which],
        lora_As[which],
        lora_Bs[which],
        biases[which],
        scalings[which],
        dropout_ps[which],
        _seeds(which, dropout_ps, seeds),
        False,
        impl,
    )


def _seeds(which: slice, dropout_ps: Sequence[float], seeds: Tensor | None) -> Tensor | None:
    return seeds[which] if any(dropout_ps[which]) else None


def _needs(ctx) -> tuple[bool, Sequence[bool]]:
    """Whether x, and which of the three lora_B, need a gradient."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[9:12]


def _only(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [tensor if want else None for tensor, want in zip(tensors, wanted, strict=True)]


def gradients(ctx, linears: Linears, dy: Tensor, kept: Kept) -> tuple[Tensor | None, ...]:
    """Return dx and the dB of gate, up and down."""
    (g, u, z, z_down, seeds), lora_Bs, weights, lora_As, inverses = kept
    need_dx, need_dBs = _needs(ctx)
    need_dg, need_du = need_dx or need_dBs[0], need_dx or need_dBs[1]

    def backward(which, dys, z, need_dx):
        dx, dBs = linears.backward(
            dys,
            z,
            weights[which],
            lora_As[which],
            lora_Bs[which],
            ctx.scalings[which],
            ctx.dropout_ps[which],
            _seeds(which, ctx.dropout_ps, seeds) if need_dx else None,
            False,
            need_dx,
            need_dBs[which],
            ctx.impl,
        )
        return dx, corrected(dBs, inverses[which], ctx.scalings[which])

    dh, dB_down = backward(_DOWN, [dy], z_down, need_dg or need_du)
    if dh is None:
        return None, None, None, *dB_down
    # dh was made here, so dg (or du, if only that is needed) may be written over it.
    dg, du = gated_backward(dh, g, u, ctx.activation, ctx.impl, need_du)
    dx, dBs = backward(_INPUTS, [dg, du], z, need_dx)
    return dx, *dBs, *dB_down
