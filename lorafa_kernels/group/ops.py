"""Operators of linear layers that share an input: schemas, shape functions, and the call of one
implementation, as linear/ops.py has them for one layer.

group_forward(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl) -> (ys, z)
group_backward(dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs,
               impl) -> (dx, dBs)

Lists have one entry a member; shapes, dtypes and what may be None as in reference.py. weights and biases may
be of another dtype than x (under autocast): they are cast to it here, in temporaries that die with the call.
seeds is None where there is no dropout.

The plan, fused kernels or library products, is the one that a single layer would have whose width is that of
all members together: what decides between the two, the passes over wide rows and the launches for few rows,
grows alike in both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear.ops import announce, autocast_enabled, define, open_to_direct_calls
from ..plan.choice import choose, choose_plan
from ..plan.make import Plan
from ..plan.pin import pinned
from . import library, reference
from .operands import rank_columns

_MODULES = {"torch": library, "reference": reference}


def group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    """Compute the y_i (M, N_i) and z (M, ΣR), with share_A (M, R), in the dtype of x."""
    arguments = (x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A)
    if seeds is None and (run := _direct("forward", impl, x, weights, lora_Bs, biases)):
        return run(*arguments)
    announce()
    *ys, z = _forward_op(*arguments, impl)
    return ys, z


def group_backward(
    dys: Sequence[Tensor | None],
    z: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    impl: str,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K) in the dtype of the dy_i, None unless needed, and the dB_i (N_i, R_i) that are
    needed, in the dtypes of the lora_B_i. At least one dy_i must be there. z may be None where no dB is
    needed; where dx is not, weights and lora_As are not read, and their entries may be None.
    """
    need_dBs = [need and dy is not None for need, dy in zip(need_dBs, dys, strict=True)]
    dy = next(dy for dy in dys if dy is not None)
    op = "backward_lora_B" if not need_dx else "backward" if any(need_dBs) else "backward_input"
    arguments = (dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs)
    if seeds is None and (run := _direct(op, impl, dy, weights, lora_Bs)):
        return run(*arguments)
    announce()
    found = iter(_backward_op(*arguments, impl))
    return next(found) if need_dx else None, [next(found) if need else None for need in need_dBs]


def _direct(
    op: str,
    impl: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] = (),
) -> Callable[..., Any] | None:
    """Return the function to call as it is, where nothing needs a cast and PyTorch's operators are all it
    calls, or None. op: one of plan.recipe.OPERATIONS.
    """
    if not open_to_direct_calls(x.device.type):
        return None
    dtype = x.dtype
    for tensor in (*weights, *biases):
        if tensor is not None and tensor.dtype != dtype:
            return None
    name, plan = _decide(op, impl, x, weights, lora_Bs, biases)
    if plan is None:
        module = _MODULES.get(name)
    else:
        module = library if plan.name == "library" and not _takes_grad_kernel(op, plan) else None
    if module is None:
        return None
    return module.forward if op == "forward" else module.backward


def _decide(
    op: str,
    impl: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] = (),
    dropout: bool = False,
) -> tuple[str, Plan | None]:
    """Return the implementation of an operation, and its plan if that is "triton" and sizes are known.

    Arguments as of _direct; dropout: whether there is one.
    """
    pin = pinned() if impl in ("auto", "triton") else None
    kernels = pin is not None and pin.needs_kernels(op)
    name = choose(impl, x.device, x.dtype, kernels).impl
    M = x.shape[0]
    if name != "triton" or type(M) is not int:
        return name, None
    N = R = 0
    for weight, lora_B in zip(weights, lora_Bs, strict=True):
        if lora_B is not None:
            R = max(R, lora_B.shape[1])
        wide = lora_B if weight is None else weight
        N += wide.shape[0] if wide is not None else 0
    K = 0 if op == "backward_lora_B" else weights[0].shape[1]
    bias = any(bias is not None for bias in biases)
    return name, choose_plan(impl, op, x.device, x.dtype, M, N, K, max(1, R), bias, dropout, pin)


def _takes_grad_kernel(op: str, plan: Plan) -> bool:
    """Whether a plan of the library's products takes dz and dB from the kernel that reads dy once."""
    return op == "backward" and plan.kernels.one_pass


def _forward(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl):
    weights, biases = _cast(weights, x.dtype), _cast(biases, x.dtype)
    decided = _decide("forward", impl, x, weights, lora_Bs, biases, seeds is not None)
    arguments = (x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A)
    ys, z = _run("forward", decided, x.device, arguments)
    return [*ys, z]


def _backward(
    dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
):
    dy = next(dy for dy in dys if dy is not None)
    if need_dx:
        weights = _cast(weights, dy.dtype)
    op = "backward_lora_B" if not need_dx else "backward" if any(need_dBs) else "backward_input"
    decided = _decide(op, impl, dy, weights, lora_Bs, dropout=seeds is not None)
    arguments = (dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs)
    dx, dBs = _run(op, decided, dy.device, arguments)
    return [grad for grad in (dx, *dBs) if grad is not None]


def _cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def _run(op: str, decided: tuple[str, Plan | None], device: torch.device, arguments: tuple):
    """Call an operation as decided, with autocast off and `device` current."""
    if autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _run(op, decided, device, arguments)
    # Triton launches on the current device, wherever its arguments lie.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(op, decided, device, arguments)
    name, plan = decided
    direction = "forward" if op == "forward" else "backward"
    if plan is None:
        return getattr(_MODULES[name], direction)(*arguments)
    if plan.name == "fused":
        kernels = importlib.import_module(".fused", __package__)
        return getattr(kernels, direction)(*arguments, plan=plan.kernels)
    if _takes_grad_kernel(op, plan):
        return _backward_with_one_pass(plan, *arguments)
    return getattr(library, direction)(*arguments)


def _backward_with_one_pass(
    plan, dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs
):
    grad = importlib.import_module("..kernels.grad", __package__).grad
    dBs: list[Tensor | None] = [None] * len(dys)
    parts = []
    columns = rank_columns(lora_Bs, share_A)
    for i, (dy, lora_B) in enumerate(zip(dys, lora_Bs, strict=True)):
        if dy is None or lora_B is None:
            continue
        if need_dBs[i]:
            part = z[:, slice(*columns[i])]
            dz, dBs[i] = grad(dy, part, lora_B, scalings[i], lora_B.dtype, config=plan.kernels.grad)
            parts.append(dz)
        else:
            parts.append(library.low_rank_gradient([dy], [lora_B], [scalings[i]], False))
    # Members that share lora_A have one dz, their sum.
    dz = sum(parts[1:], parts[0]) if share_A else torch.cat(parts, dim=1)
    return library.input_gradient(dys, dz, weights, lora_As, dropout_ps, seeds, share_A), dBs


def _forward_fake(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl):
    M = x.shape[0]
    width = max(last for _, last in rank_columns(lora_Bs, share_A))
    return [*(x.new_empty((M, weight.shape[0])) for weight in weights), x.new_empty((M, width))]


def _backward_fake(
    dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
):
    dy = next(dy for dy in dys if dy is not None)
    dBs = [
        dy.new_empty(lora_B.shape, dtype=lora_B.dtype)
        for lora_B, need in zip(lora_Bs, need_dBs, strict=True)
        if need
    ]
    return [dy.new_empty((dy.shape[0], weights[0].shape[1])), *dBs] if need_dx else dBs


_forward_op = define(
    "group_forward",
    "(Tensor x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] biases, float[] scalings,"
    " float[] dropout_ps, Tensor? seeds, bool share_A, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "group_backward",
    "(Tensor?[] dys, Tensor? z, Tensor?[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, float[] scalings,"
    " float[] dropout_ps, Tensor? seeds, bool share_A, bool need_dx, bool[] need_dBs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
