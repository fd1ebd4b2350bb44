"""gated: the activation product of a gated MLP, and its gradients, in one launch each.

    h  (M, I) = round( act(g) · u )
    dg (M, I) = round( dh · u · act'(g) )        over dh
    du (M, I) = round( dh · act(g) )

act: "silu", "gelu" (by erf) or "gelu_tanh", formulas in mlp/activation.py. Computed in fp32, rounded once.
Reads g and u and writes h: 3·M·I elements; reads dh, g and u and writes dg and du: 5·M·I. Bound by memory.

Contiguous operands are one long row; else a row of the matrices is a row here. Every element is read before
it is written, by the thread that writes it, so dg may take dh's place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Launches, blocks_of
from .tile import emulate_bf16, load, offsets, store

# Eight elements a thread: of a 16-bit dtype the 16 bytes that one load can move.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _value_and_slope(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g) in fp32. An exponential that overflows makes its quotient 0: no |g| is too large for
    act(g).
    """
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-g))
        slope = share * (1.0 + g * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = share + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    else:
        # (1 + tanh(t)) / 2 = 1 / (1 + exp(−2t)), with 2t = √(8/π) (g + 0.044715 g³).
        square = g * g
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * g * (1.0 + 0.044715 * square)))
        slope = share + g * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return g * share, slope


@triton.jit
def _gated_kernel(
    g_ptr,
    u_ptr,
    h_ptr,
    columns,
    stride_g,
    stride_u,
    stride_h,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0)
    row = pid // blocks
    index = offsets(pid % blocks, BLOCK) + tl.arange(0, BLOCK)
    mask = index < columns
    g = load(g_ptr + offsets(row, stride_g) + index, mask, EMULATE_BF16).to(tl.float32)
    u = load(u_ptr + offsets(row, stride_u) + index, mask, EMULATE_BF16).to(tl.float32)
    value, _ = _value_and_slope(g, ACTIVATION)
    store(h_ptr + offsets(row, stride_h) + index, value * u, mask, EMULATE_BF16)


@triton.jit
def _gated_backward_kernel(
    dh_ptr,  # dg is written over it, or du if that alone is wanted
    g_ptr,
    u_ptr,
    du_ptr,
    columns,
    stride_dh,
    stride_g,
    stride_u,
    stride_du,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    NEED_DG: tl.constexpr,
    NEED_DU: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0)
    row = pid // blocks
    index = offsets(pid % blocks, BLOCK) + tl.arange(0, BLOCK)
    mask = index < columns
    dh_ptrs = dh_ptr + offsets(row, stride_dh) + index
    dh = load(dh_ptrs, mask, EMULATE_BF16).to(tl.float32)
    g = load(g_ptr + offsets(row, stride_g) + index, mask, EMULATE_BF16).to(tl.float32)
    value, slope = _value_and_slope(g, ACTIVATION)
    if NEED_DG:
        u = load(u_ptr + offsets(row, stride_u) + index, mask, EMULATE_BF16).to(tl.float32)
        store(dh_ptrs, dh * u * slope, mask, EMULATE_BF16)
    if NEED_DU:
        store(du_ptr + offsets(row, stride_du) + index, dh * value, mask, EMULATE_BF16)


_LAUNCHES = Launches()


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return h (M, I) contiguous, in the dtype of g. g, u (M, I) fp32, bf16 or fp16, of any strides."""
    M, columns = g.shape
    g, u = _with_rows(g), _with_rows(u)
    h = torch.empty((M, columns), dtype=g.dtype, device=g.device)
    if h.numel() == 0:
        return h
    strides = g.stride(), u.stride()
    key = M, columns, strides, g.dtype, g.device, activation
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(key, _launch(_gated_kernel, (g, u, h), activation))
    launch(g, u, h)
    return h


def gated_backward(dh: Tensor, g: Tensor, u: Tensor | None, activation: str, need_du: bool) -> Tensor | None:
    """Write dg over dh (M, I) and return du contiguous, or None if it is not wanted. u=None: dg is not
    wanted, and du is written over dh.

    g, u (M, I) in the dtype of dh, fp32, bf16 or fp16; any strides.
    """
    if dh.stride(1) != 1 and not dh.is_contiguous():
        work = dh.contiguous()
        du = gated_backward(work, g, u, activation, need_du)
        dh.copy_(work)
        return du
    need_dg = u is not None
    du = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device) if need_dg and need_du else None
    if dh.numel() == 0:
        return du
    g = _with_rows(g)
    u = _with_rows(u) if need_dg else g
    out = du if du is not None else dh
    strides = dh.stride(), g.stride(), u.stride()
    needs = need_dg, need_du or not need_dg
    key = dh.shape, strides, dh.dtype, dh.device, activation, needs
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launch(_gated_backward_kernel, (dh, g, u, out), activation, NEED_DG=needs[0], NEED_DU=needs[1])
    )
    launch(dh, g, u, out)
    return du


def _with_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy of it if its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _as_rows(*matrices: Tensor) -> tuple[int, int, list[int]]:
    """Return how many rows the kernel sees in matrices of one shape, their length, and the row strides."""
    rows, columns = matrices[0].shape
    if all(matrix.is_contiguous() for matrix in matrices):
        return 1, rows * columns, [0] * len(matrices)
    return rows, columns, [matrix.stride(0) for matrix in matrices]


def _launch(kernel, matrices: tuple[Tensor, ...], activation: str, **needs: bool) -> Launch:
    """Return the launch for matrices like these, in the order of the kernel's arguments."""
    names = ("dh", "g", "u", "du") if needs else ("g", "u", "h")
    rows, columns, strides = _as_rows(*matrices)
    return Launch(
        kernel,
        (rows * blocks_of(columns, BLOCK),),
        tuple(f"{name}_ptr" for name in names),
        dict(
            columns=columns,
            **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
            ACTIVATION=activation,
            BLOCK=BLOCK,
            EMULATE_BF16=emulate_bf16(matrices[0]),
            num_warps=NUM_WARPS,
            **needs,
        ),
    )
