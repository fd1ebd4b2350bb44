"""Kernels of a mixed batch, of which each row takes one of several adapters, or none.

    mixed_shrink  z  (M, R)    = round( s_i/(1 − p_i) · ((x ⊙ keep)_m · A_iᵀ) ), i the adapter of row m
                  dz (M, R)    = round( s_i · (dy_m · B_i) )
    mixed_expand  y  (M, N)    = round( x · weightᵀ + z_m · B_iᵀ + bias )
                  dx (M, K)    = round( dy · weight + keep/(1 − p_i) ⊙ (dz_m · A_i) )
    mixed_grad    dB (n, N, R) = Σ dy_mᵀ z_m over the rows m of one adapter, in fp32

Rows are read sorted by adapter, wherever they lie. `order` (B,) int32 has the samples in that order, sample b
being rows b·size to (b + 1)·size; `tiles` (T, 4) int32 has the tiles of rows, each of one adapter or of none:
the adapter, the first of its places in the order, how many, and the adapter's rank, 0 for none. So no factor
of one adapter meets a row of another, and what is not finite in it stays there. The factors are stacked,
(E, ., R) with R the largest rank; what lies beyond a smaller rank is not read, and results are zero there.

mixed_shrink and mixed_expand read and write what shrink.py and expand.py do, and compute as much; a tile that
an adapter does not fill costs as much as a full one. In mixed_grad a block owns BLOCK_N columns of an
adapter's dB and walks its rows in order: sums have one order, and no partial sums are written. It reads dy
once: 2·M·N·R FLOPs, bound by memory.

Never timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig
from .launch import Launch, Launches, blocks_of
from .tile import drop, emulate_bf16, input_precision, keep_tile, load, offsets, product, store, tile_start

# Fields of a tile.
FIELDS = 4


@triton.jit
def _rows_at(order_ptr, first, count, size, M, BLOCK: tl.constexpr):
    """The rows at the places first to first + BLOCK of the order; M, which no row is, from `count` on."""
    index = tl.arange(0, BLOCK)
    inside = index < count
    place = first + index
    sample = tl.load(order_ptr + place // size, mask=inside, other=0)
    return tl.where(inside, sample * size + place % size, M)


@triton.jit
def _low_rank_of(
    acc,
    L_ptr,
    F_ptr,
    rows,
    index_n,
    M,
    N,
    rank,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """acc + L · F for a tile of one adapter, F (rank, N) being its own."""
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        index_r = start + tl.arange(0, BLOCK_R)
        in_r = index_r < rank
        L_ptrs = L_ptr + offsets(rows, stride_L_m)[:, None] + offsets(index_r, stride_L_r)[None, :]
        F_ptrs = F_ptr + offsets(index_r, stride_F_r)[:, None] + offsets(index_n, stride_F_n)[None, :]
        L = load(L_ptrs, (rows < M)[:, None] & in_r[None, :], EMULATE_BF16)
        F = load(F_ptrs, in_r[:, None] & (index_n < N)[None, :], EMULATE_BF16)
        acc = tl.dot(L, F, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["seed_ptr"])
def _mixed_shrink_kernel(
    rows_ptr,
    factors_ptr,
    out_ptr,
    order_ptr,
    tiles_ptr,
    scalings_ptr,
    seed_ptr,
    thresholds_ptr,
    size,
    M,
    K,
    R,
    stride_rows_m,
    stride_rows_k,
    stride_factors_e,
    stride_factors_k,
    stride_factors_r,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    r_blocks = tl.cdiv(R, BLOCK_R)
    tile_ptr = tiles_ptr + (tl.program_id(0) // r_blocks) * FIELDS
    adapter = tl.maximum(tl.load(tile_ptr), 0)
    index_m = _rows_at(order_ptr, tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), size, M, BLOCK_M)
    rank = tl.load(tile_ptr + 3)
    index_r = (tl.program_id(0) % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tl.arange(0, BLOCK_K)
    in_m = (index_m < M)[:, None]
    in_rank = (index_r < rank)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.load(thresholds_ptr + adapter)

    rows_ptrs = rows_ptr + offsets(index_m, stride_rows_m)[:, None] + offsets(index_k, stride_rows_k)[None, :]
    factor_ptr = factors_ptr + offsets(adapter, stride_factors_e)
    factor_ptrs = (
        factor_ptr + offsets(index_k, stride_factors_k)[:, None] + offsets(index_r, stride_factors_r)[None, :]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # Rows without an adapter are not read.
    last = tl.where(rank > 0, K, 0)
    for start in range(0, last, BLOCK_K):
        if EVEN_K:
            rows = load(rows_ptrs, in_m, EMULATE_BF16)
            factor = load(factor_ptrs, in_rank, EMULATE_BF16)
        else:
            in_k = start + tl.arange(0, BLOCK_K) < K
            rows = load(rows_ptrs, in_m & in_k[None, :], EMULATE_BF16)
            factor = load(factor_ptrs, in_k[:, None] & in_rank, EMULATE_BF16)
        if DROPOUT:
            rows = drop(rows, keep_tile(seed, threshold, index_m, start, K, BLOCK_K))
        acc = tl.dot(rows, factor, acc, input_precision=INPUT_PRECISION)
        rows_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_rows_k)
        factor_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_factors_k)

    # Zero beyond the rank whatever the rows are, which may not be finite.
    acc = tl.where(in_rank, acc * tl.load(scalings_ptr + adapter), 0.0)
    out_ptrs = out_ptr + offsets(index_m, R)[:, None] + index_r[None, :]
    store(out_ptrs, acc, in_m & (index_r < R)[None, :], EMULATE_BF16)


@triton.jit(do_not_specialize=["seed_ptr"])
def _mixed_expand_kernel(
    P_ptr,
    Q_ptr,
    L_ptr,
    F_ptr,
    bias_ptr,
    C_ptr,
    order_ptr,
    tiles_ptr,
    seed_ptr,
    thresholds_ptr,
    scales_ptr,
    size,
    tiles,
    M,
    N,
    K,
    stride_P_m,
    stride_P_k,
    stride_Q_k,
    stride_Q_n,
    stride_L_m,
    stride_L_r,
    stride_F_e,
    stride_F_r,
    stride_F_n,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    start_m, start_n = tile_start(tl.program_id(0), tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    tile_ptr = tiles_ptr + (start_m // BLOCK_M) * FIELDS
    adapter = tl.maximum(tl.load(tile_ptr), 0)
    index_m = _rows_at(order_ptr, tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), size, M, BLOCK_M)
    rank = tl.load(tile_ptr + 3)
    index_n = start_n + tl.arange(0, BLOCK_N)
    F_ptr += offsets(adapter, stride_F_e)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROPOUT:
        acc = _low_rank_of(
            acc,
            L_ptr,
            F_ptr,
            index_m,
            index_n,
            M,
            N,
            rank,
            stride_L_m,
            stride_L_r,
            stride_F_r,
            stride_F_n,
            BLOCK_R,
            INPUT_PRECISION,
            EMULATE_BF16,
        )
        keep = keep_tile(tl.load(seed_ptr), tl.load(thresholds_ptr + adapter), index_m, start_n, N, BLOCK_N)
        acc = drop(acc, keep) * tl.load(scales_ptr + adapter)
    acc = product(
        acc,
        P_ptr,
        Q_ptr,
        index_m,
        index_n,
        M,
        N,
        K,
        stride_P_m,
        stride_P_k,
        stride_Q_k,
        stride_Q_n,
        BLOCK_K,
        EVEN_K,
        INPUT_PRECISION,
        EMULATE_BF16,
    )
    # As in expand.py: after the main loop where that is possible.
    if not DROPOUT:
        acc = _low_rank_of(
            acc,
            L_ptr,
            F_ptr,
            index_m,
            index_n,
            M,
            N,
            rank,
            stride_L_m,
            stride_L_r,
            stride_F_r,
            stride_F_n,
            BLOCK_R,
            INPUT_PRECISION,
            EMULATE_BF16,
        )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + index_n, mask=index_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    C_ptrs = C_ptr + offsets(index_m, N)[:, None] + index_n[None, :]
    store(C_ptrs, acc, (index_m < M)[:, None] & (index_n < N)[None, :], EMULATE_BF16)


@triton.jit
def _mixed_grad_kernel(
    dy_ptr,
    z_ptr,
    dB_ptr,
    order_ptr,
    tiles_ptr,
    size,
    M,
    N,
    R,
    stride_dy_m,
    stride_dy_n,
    stride_z_m,
    stride_z_r,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    strips = tl.cdiv(N, BLOCK_N)
    r_blocks = tl.cdiv(R, BLOCK_R)
    pid = tl.program_id(0)
    index_n = (pid % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    index_r = (pid // strips % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = pid // (strips * r_blocks)
    tile_ptr = tiles_ptr + place * FIELDS
    first = tl.load(tile_ptr + 1)
    count = tl.load(tile_ptr + 2)
    rank = tl.load(tile_ptr + 3)
    in_n = index_n < N
    dB = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(0, count, BLOCK_M):
        index_m = _rows_at(order_ptr, first + start, count - start, size, M, BLOCK_M)
        in_m = (index_m < M)[:, None]
        dy_ptrs = dy_ptr + offsets(index_m, stride_dy_m)[:, None] + offsets(index_n, stride_dy_n)[None, :]
        z_ptrs = z_ptr + offsets(index_m, stride_z_m)[:, None] + offsets(index_r, stride_z_r)[None, :]
        dy = load(dy_ptrs, in_m & in_n[None, :], EMULATE_BF16)
        z = load(z_ptrs, in_m & (index_r < rank)[None, :], EMULATE_BF16)
        dB = tl.dot(tl.trans(dy), z, dB, input_precision=INPUT_PRECISION)
    dB_rows = offsets(place, N) + index_n
    dB_ptrs = dB_ptr + offsets(dB_rows, R)[:, None] + index_r[None, :]
    tl.store(dB_ptrs, dB, mask=in_n[:, None] & (index_r < R)[None, :])


_SHRINKS = Launches()
_EXPANDS = Launches()
_GRADS = Launches()


def mixed_shrink(
    rows: Tensor,
    factors: Tensor,
    scalings: Tensor,
    order: Tensor,
    tiles: Tensor,
    *,
    thresholds: Tensor | None = None,
    seed: Tensor | None = None,
    config: KernelConfig,
) -> Tensor:
    """Return the round(scalings_i · ((rows_m ⊙ keep_m) · factors_i)) as a contiguous (M, R) tensor in the
    dtype of rows, zero for rows without an adapter and beyond an adapter's rank.

    rows (M, K) and factors (E, K, R) of one dtype, fp32, bf16 or fp16, any strides; scalings (E,) fp32; order
    (B,) and tiles (T, 4) as above, of config.BLOCK_M rows at most. With dropout: the `seed`, int64 (1,), and
    thresholds (E,) int32, which tile.dropout_arguments gives, 0 to keep all; 1/(1 − p_i) is for the caller to
    have in scalings.
    """
    M, K = rows.shape
    R = factors.shape[2]
    out = torch.empty((M, R), dtype=rows.dtype, device=rows.device)
    if M == 0 or K == 0:
        return out.zero_()
    precision = input_precision(rows.dtype)
    counts = order.shape[0], tiles.shape[0]
    strides = rows.stride(), factors.stride()
    key = M, K, R, counts, strides, rows.dtype, rows.device, seed is None, precision, config
    launch = _SHRINKS.get(key)
    if launch is None:
        launch = Launch(
            _mixed_shrink_kernel,
            (tiles.shape[0] * blocks_of(R, config.BLOCK_R),),
            (
                "rows_ptr",
                "factors_ptr",
                "out_ptr",
                "order_ptr",
                "tiles_ptr",
                "scalings_ptr",
                "seed_ptr",
                "thresholds_ptr",
            ),
            dict(
                size=M // order.shape[0],
                M=M,
                K=K,
                R=R,
                stride_rows_m=rows.stride(0),
                stride_rows_k=rows.stride(1),
                stride_factors_e=factors.stride(0),
                stride_factors_k=factors.stride(1),
                stride_factors_r=factors.stride(2),
                FIELDS=FIELDS,
                BLOCK_M=config.BLOCK_M,
                BLOCK_K=config.BLOCK_K,
                BLOCK_R=config.BLOCK_R,
                EVEN_K=K % config.BLOCK_K == 0,
                DROPOUT=seed is not None,
                INPUT_PRECISION=precision,
                EMULATE_BF16=emulate_bf16(rows),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            ),
        )
        _SHRINKS.keep(key, launch)
    launch(rows, factors, out, order, tiles, scalings, seed, thresholds)
    return out


def mixed_expand(
    P: Tensor,
    Q: Tensor,
    L: Tensor,
    F: Tensor,
    bias: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    *,
    thresholds: Tensor | None = None,
    scales: Tensor | None = None,
    seed: Tensor | None = None,
    config: KernelConfig,
) -> Tensor:
    """Return round(P_m · Q + scales_i · keep_m ⊙ (L_m · F_i) + bias) as a contiguous (M, N) tensor in the
    dtype of P, without the second term for rows without an adapter.

    P (M, K), Q (K, N), L (M, R) and F (E, R, N) of one dtype, fp32, bf16 or fp16; any strides; bias (N,) or
    None. order, tiles, thresholds and seed as in mixed_shrink, keep being (M, N); scales (E,) fp32, which
    dropout needs and nothing else reads.
    """
    (M, K), N = P.shape, Q.shape[1]
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    if M == 0 or N == 0:
        return C
    if bias is not None:
        bias = bias.contiguous()
    precision = input_precision(P.dtype)
    counts = order.shape[0], tiles.shape[0]
    strides = P.stride(), Q.stride(), L.stride(), F.stride()
    of_bias = None if bias is None else bias.dtype
    key = M, N, K, counts, strides, P.dtype, of_bias, P.device, seed is None, precision, config
    launch = _EXPANDS.get(key)
    if launch is None:
        launch = Launch(
            _mixed_expand_kernel,
            (tiles.shape[0] * blocks_of(N, config.BLOCK_N),),
            (
                "P_ptr",
                "Q_ptr",
                "L_ptr",
                "F_ptr",
                "bias_ptr",
                "C_ptr",
                "order_ptr",
                "tiles_ptr",
                "seed_ptr",
                "thresholds_ptr",
                "scales_ptr",
            ),
            dict(
                size=M // order.shape[0],
                tiles=tiles.shape[0],
                M=M,
                N=N,
                K=K,
                stride_P_m=P.stride(0),
                stride_P_k=P.stride(1),
                stride_Q_k=Q.stride(0),
                stride_Q_n=Q.stride(1),
                stride_L_m=L.stride(0),
                stride_L_r=L.stride(1),
                stride_F_e=F.stride(0),
                stride_F_r=F.stride(1),
                stride_F_n=F.stride(2),
                FIELDS=FIELDS,
                BLOCK_M=config.BLOCK_M,
                BLOCK_N=config.BLOCK_N,
                BLOCK_K=config.BLOCK_K,
                BLOCK_R=config.BLOCK_R,
                GROUP_M=config.GROUP_M,
                EVEN_K=K % config.BLOCK_K == 0,
                HAS_BIAS=bias is not None,
                DROPOUT=seed is not None,
                INPUT_PRECISION=precision,
                EMULATE_BF16=emulate_bf16(P),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            ),
        )
        _EXPANDS.keep(key, launch)
    launch(P, Q, L, F, bias, C, order, tiles, seed, thresholds, scales)
    return C


def mixed_grad(dy: Tensor, z: Tensor, order: Tensor, runs: Tensor, *, config: KernelConfig) -> Tensor:
    """Return dB of n adapters as a contiguous (n, N, R) tensor in fp32, which has zeros beyond an adapter's
    rank if dy is finite.

    dy (M, N) and z (M, R) of one dtype, fp32, bf16 or fp16, any strides; order (B,) as above, runs (n, 4) as
    tiles, each with all rows of one adapter.
    """
    (M, N), R = dy.shape, z.shape[1]
    dB = torch.empty((runs.shape[0], N, R), dtype=torch.float32, device=dy.device)
    if dB.numel() == 0:
        return dB
    precision = input_precision(dy.dtype)
    counts = order.shape[0], runs.shape[0]
    key = M, N, R, counts, dy.stride(), z.stride(), dy.dtype, dy.device, precision, config
    launch = _GRADS.get(key)
    if launch is None:
        launch = Launch(
            _mixed_grad_kernel,
            (runs.shape[0] * blocks_of(N, config.BLOCK_N) * blocks_of(R, config.BLOCK_R),),
            ("dy_ptr", "z_ptr", "dB_ptr", "order_ptr", "tiles_ptr"),
            dict(
                size=M // order.shape[0],
                M=M,
                N=N,
                R=R,
                stride_dy_m=dy.stride(0),
                stride_dy_n=dy.stride(1),
                stride_z_m=z.stride(0),
                stride_z_r=z.stride(1),
                FIELDS=FIELDS,
                BLOCK_M=config.BLOCK_M,
                BLOCK_N=config.BLOCK_N,
                BLOCK_R=config.BLOCK_R,
                INPUT_PRECISION=precision,
                EMULATE_BF16=emulate_bf16(dy),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            ),
        )
        _GRADS.keep(key, launch)
    launch(dy, z, dB, order, runs)
    return dB
