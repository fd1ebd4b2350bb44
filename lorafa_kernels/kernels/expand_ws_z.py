"""expand_ws.py with L made inside: shrink and expand in one launch, for many rows.

    L (M, R) = round( scaling · P (M, K) · D (K, R) )
    C (M, N) = round( P · Q (K, N) + L · F (R, N) + bias (N) )

    z, y   (M, N): P = x,  D = lora_Aᵀ, Q = weightᵀ, F = lora_Bᵀ, bias       TRANSPOSED, as in expand_ws.py
    dz, dx (M, K): P = dy, D = lora_B,  Q = weight,  F = lora_A

The tiles in the first column of tiles multiply their blocks of P with D, too, write their rows of L, and
raise the flag of these rows; the loader of any tile waits for its flag before it reads L, while the K loop of
that tile runs. So no pass over P is made for L. Reads P once per column of tiles, Q and D once per row of
tiles, L and F once per tile; writes C and L once. 2·M·N·(K + R) + 2·M·K·R FLOPs. Bound by arithmetic.

Why no block waits for ever: tiles are handed out by a counter, in an order in which a row of tiles begins
with its first column. A flag is that of a tile which was handed out earlier, to a block that runs, and which
waits for no flag before it raises its own; of the tiles before it in its block, the flags are of still
earlier tiles. How many blocks run at once makes no difference, nor what else runs.

Why it is seen whole: the threads that write rows of L meet at a barrier before one of them raises the flag
(release); one thread reads the flag (acquire), and the others load L behind a barrier with it.

Deterministic: counter and flags order the work, and no sum depends on who does it when. They are zeroed for
each call, in memory of the call.

Never run on a GPU yet. Written for Triton 3.6 and 3.7.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..plan.config import KernelConfig
from .expand_ws import (
    LOADER_REGISTERS,
    LOADER_WARPS,
    describe_block,
    fill,
    halves,
    part_shape,
    product_blocks,
)
from .launch import Block, Launch, Launches, blocks_of
from .tile import addressable, offsets, tile_start

# gl.thread_barrier of Triton 3.6 is gl.barrier of 3.7.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# Tiles that are handed out and not taken yet.
AHEAD = gl.constexpr(2)


@gluon.jit
def _hand_out(tile, count, tiles, ready, empty):
    slot = count % AHEAD
    mbarrier.wait(empty.index(slot), (count // AHEAD & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tiles.index(slot).store(gl.full([1], tile, gl.int32, layout))
    mbarrier.arrive(ready.index(slot))


@gluon.jit
def _take(count, tiles, ready, empty):
    slot = count % AHEAD
    mbarrier.wait(ready.index(slot), count // AHEAD & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tile = gl.max(tiles.index(slot).load(layout), axis=0)
    mbarrier.arrive(empty.index(slot))
    return tile


@gluon.jit
def _producer(
    P_desc,
    Q_desc,
    D_desc,
    P_ring,
    Q_ring,
    D_ring,
    ready,
    empty,
    next_ptr,
    tiles,
    tile_ready,
    tile_empty,
    M,
    N,
    K,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    STAGES: gl.constexpr = P_ring.shape[0]
    BLOCK_M: gl.constexpr = P_ring.shape[1]
    BLOCK_K: gl.constexpr = P_ring.shape[2]
    BLOCK_N: gl.constexpr = Q_ring.shape[1] if TRANSPOSED else Q_ring.shape[2]
    BYTES: gl.constexpr = P_desc.block_type.nbytes + Q_desc.block_type.nbytes
    blocks = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    count = 0
    tile = gl.atomic_add(next_ptr, 1, sem="relaxed")
    while tile < blocks:
        _hand_out(tile, count, tiles, tile_ready, tile_empty)
        count += 1
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for start in range(0, K, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            full = ready.index(slot)
            if start_n == 0:
                mbarrier.expect(full, BYTES + D_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(D_desc, [0, start], full, D_ring.index(slot))
            else:
                mbarrier.expect(full, BYTES)
            tma.async_copy_global_to_shared(P_desc, [start_m, start], full, P_ring.index(slot))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(Q_desc, [start_n, start], full, Q_ring.index(slot))
            else:
                tma.async_copy_global_to_shared(Q_desc, [start, start_n], full, Q_ring.index(slot))
            step += 1
        tile = gl.atomic_add(next_ptr, 1, sem="relaxed")
    _hand_out(tile, count, tiles, tile_ready, tile_empty)


@gluon.jit
def _loader(
    L_ptr,
    F_ptr,
    bias_ptr,
    flags_ptr,
    L_parts,
    F_parts,
    bias_buffer,
    ready,
    empty,
    tiles,
    tile_ready,
    tile_empty,
    M,
    N,
    R,
    stride_F_r,
    stride_F_n,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    blocks = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    count = 0
    tile = _take(count, tiles, tile_ready, tile_empty)
    while tile < blocks:
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        mbarrier.wait(empty, (count & 1) ^ 1)
        if TRANSPOSED:
            fill(F_parts, F_ptr, start_n, 0, N, R, stride_F_n, stride_F_r, BLOCK_N)
        else:
            fill(F_parts, F_ptr, 0, start_n, R, N, stride_F_r, stride_F_n, BLOCK_R)
        if HAS_BIAS:
            flat: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
            index_n = start_n + gl.arange(0, BLOCK_N, layout=flat)
            bias_buffer.store(gl.load(bias_ptr + index_n, mask=index_n < N, other=0.0).to(gl.float32))
        flag = flags_ptr + start_m // BLOCK_M
        while gl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
        fill(L_parts, L_ptr, start_m, 0, M, R, R, 1, BLOCK_M)
        fence_async_shared()
        mbarrier.arrive(ready)
        count += 1
        tile = _take(count, tiles, tile_ready, tile_empty)


@gluon.jit
def _consumer(
    P_ring,
    Q_ring,
    D_ring,
    L_buffer,
    F_buffer,
    bias_buffer,
    C_desc,
    C_buffer,
    ready,
    empty,
    low_rank_ready,
    low_rank_empty,
    tiles,
    tile_ready,
    tile_empty,
    L_ptr,
    flags_ptr,
    scaling,
    M,
    N,
    K,
    R,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    STAGES: gl.constexpr = P_ring.shape[0]
    BLOCK_M: gl.constexpr = P_ring.shape[1]
    BLOCK_K: gl.constexpr = P_ring.shape[2]
    BLOCK_N: gl.constexpr = Q_ring.shape[1] if TRANSPOSED else Q_ring.shape[2]
    BLOCK_R: gl.constexpr = D_ring.shape[1]
    COLUMNS: gl.constexpr = C_buffer.shape[1]
    tile_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    rank_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_R, 16])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    blocks = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    count = 0
    tile = _take(count, tiles, tile_ready, tile_empty)
    while tile < blocks:
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=gl.float32, layout=tile_layout)
        if start_n == 0:
            low_rank = gl.zeros((BLOCK_M, BLOCK_R), dtype=gl.float32, layout=rank_layout)
            for start in range(0, K, BLOCK_K):
                slot = step % STAGES
                mbarrier.wait(ready.index(slot), step // STAGES & 1)
                P = P_ring.index(slot)
                Q = Q_ring.index(slot).permute((1, 0)) if TRANSPOSED else Q_ring.index(slot)
                acc = warpgroup_mma(P, Q, acc, is_async=True)
                low_rank = warpgroup_mma(P, D_ring.index(slot).permute((1, 0)), low_rank, is_async=True)
                acc, low_rank = warpgroup_mma_wait(2, deps=(acc, low_rank))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=start > 0)
                step += 1
            acc, low_rank = warpgroup_mma_wait(0, deps=(acc, low_rank))
            index_m = start_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rank_layout))
            index_r = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, rank_layout))
            places = offsets(index_m, R)[:, None] + index_r[None, :]
            inside = (index_m < M)[:, None] & (index_r < R)[None, :]
            gl.store(L_ptr + places, (low_rank * scaling).to(C_desc.dtype), mask=inside)
            thread_barrier()
            gl.atomic_xchg(flags_ptr + start_m // BLOCK_M, 1, sem="release")
        else:
            for start in range(0, K, BLOCK_K):
                slot = step % STAGES
                mbarrier.wait(ready.index(slot), step // STAGES & 1)
                Q = Q_ring.index(slot).permute((1, 0)) if TRANSPOSED else Q_ring.index(slot)
                acc = warpgroup_mma(P_ring.index(slot), Q, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=start > 0)
                step += 1
        mbarrier.wait(low_rank_ready, count & 1)
        F = F_buffer.permute((1, 0)) if TRANSPOSED else F_buffer
        acc = warpgroup_mma(L_buffer, F, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        parts = (acc,)
        if BLOCK_N >= 2 * COLUMNS:
            parts = halves(acc)
        if BLOCK_N == 4 * COLUMNS:
            parts = halves(parts[0]) + halves(parts[1])
        for part in gl.static_range(BLOCK_N // COLUMNS):
            C = gl.convert_layout(parts[part], part_layout, assert_trivial=True)
            if HAS_BIAS:
                bias = bias_buffer.slice(part * COLUMNS, COLUMNS)
                C += bias.load(gl.SliceLayout(0, part_layout))[None, :]
            tma.store_wait(pendings=0)
            C_buffer.store(C.to(C_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(C_desc, [start_m, start_n + part * COLUMNS], C_buffer)
        mbarrier.arrive(low_rank_empty)
        count += 1
        tile = _take(count, tiles, tile_ready, tile_empty)
    tma.store_wait(pendings=0)


@gluon.jit
def _expand_ws_z_kernel(
    P_desc,
    Q_desc,
    D_desc,
    F_ptr,
    bias_ptr,
    L_ptr,
    C_desc,
    flags_ptr,
    scaling,
    M,
    N,
    K,
    R,
    stride_F_r,
    stride_F_n,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    DTYPE: gl.constexpr = P_desc.dtype
    L_SHAPE: gl.constexpr = [BLOCK_M, BLOCK_R]
    F_SHAPE: gl.constexpr = [BLOCK_N, BLOCK_R] if TRANSPOSED else [BLOCK_R, BLOCK_N]
    Q_SHAPE: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if TRANSPOSED else [STAGES, BLOCK_K, BLOCK_N]
    L_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(L_SHAPE, DTYPE)
    F_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(F_SHAPE, DTYPE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    P_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], P_desc.layout)
    Q_ring = gl.allocate_shared_memory(DTYPE, Q_SHAPE, Q_desc.layout)
    D_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_R, BLOCK_K], D_desc.layout)
    L_parts = gl.allocate_shared_memory(DTYPE, part_shape(L_SHAPE), L_LAYOUT)
    F_parts = gl.allocate_shared_memory(DTYPE, part_shape(F_SHAPE), F_LAYOUT)
    C_buffer = gl.allocate_shared_memory(DTYPE, C_desc.block_type.shape, C_desc.layout)
    bias_buffer = gl.allocate_shared_memory(gl.float32, [BLOCK_N], flat)
    tiles = gl.allocate_shared_memory(gl.int32, [AHEAD, 1], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tile_ready = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    low_rank_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    low_rank_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for slot in gl.static_range(AHEAD):
        mbarrier.init(tile_ready.index(slot), count=1)
        mbarrier.init(tile_empty.index(slot), count=2)
    mbarrier.init(low_rank_ready, count=1)
    mbarrier.init(low_rank_empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    P_ring,
                    Q_ring,
                    D_ring,
                    L_parts._reinterpret(DTYPE, L_SHAPE, L_LAYOUT),
                    F_parts._reinterpret(DTYPE, F_SHAPE, F_LAYOUT),
                    bias_buffer,
                    C_desc,
                    C_buffer,
                    ready,
                    empty,
                    low_rank_ready,
                    low_rank_empty,
                    tiles,
                    tile_ready,
                    tile_empty,
                    L_ptr,
                    flags_ptr + 1,
                    scaling,
                    M,
                    N,
                    K,
                    R,
                    GROUP_M,
                    TRANSPOSED,
                    HAS_BIAS,
                ),
            ),
            (
                _producer,
                (
                    P_desc,
                    Q_desc,
                    D_desc,
                    P_ring,
                    Q_ring,
                    D_ring,
                    ready,
                    empty,
                    flags_ptr,
                    tiles,
                    tile_ready,
                    tile_empty,
                    M,
                    N,
                    K,
                    GROUP_M,
                    TRANSPOSED,
                ),
            ),
            (
                _loader,
                (
                    L_ptr,
                    F_ptr,
                    bias_ptr,
                    flags_ptr + 1,
                    L_parts,
                    F_parts,
                    bias_buffer,
                    low_rank_ready,
                    low_rank_empty,
                    tiles,
                    tile_ready,
                    tile_empty,
                    M,
                    N,
                    R,
                    stride_F_r,
                    stride_F_n,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    GROUP_M,
                    TRANSPOSED,
                    HAS_BIAS,
                ),
            ),
        ],
        [1, LOADER_WARPS],
        [LOADER_REGISTERS, LOADER_REGISTERS],
    )


_LAUNCHES = Launches()


def expand_ws_z(
    P: Tensor,
    Q: Tensor,
    D: Tensor,
    F: Tensor,
    bias: Tensor | None,
    scaling: float,
    config: KernelConfig,
    transposed: bool,
    num_sms: int,
) -> tuple[Tensor, Tensor]:
    """Return C (M, N) and L (M, R), contiguous in the dtype of P. Operands as in recompute, P and Q
    addressable, M and N at least 1, R ≤ BLOCK_R.
    """
    M, N, R = P.shape[0], Q.shape[1], D.shape[1]
    rows = rows_for_tma(D, P.dtype)
    strides = P.stride(), Q.stride(), rows.stride(), F.stride()
    dtypes = P.dtype, F.dtype, None if bias is None else bias.dtype
    key = P.shape, N, R, strides, dtypes, P.device, config, transposed, num_sms
    number_of_flags, launch = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launch(P, N, R, F, bias is not None, config, transposed, num_sms)
    )
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    L = torch.empty((M, R), dtype=P.dtype, device=P.device)
    # New ones for each call: two streams, or a graph that is replayed beside other calls, share none.
    flags = torch.zeros(number_of_flags, dtype=torch.int32, device=P.device)
    launch(P, Q, rows, F, bias, L, C, flags, scaling)
    return C, L


def _launch(
    P: Tensor,
    N: int,
    R: int,
    F: Tensor,
    has_bias: bool,
    config: KernelConfig,
    transposed: bool,
    num_sms: int,
) -> tuple[int, Launch]:
    """Return how many flags there are, and the launch for operands that are like these."""
    M, K = P.shape
    blocks_m = blocks_of(M, config.BLOCK_M)
    launch = Launch(
        _expand_ws_z_kernel,
        (min(blocks_m * blocks_of(N, config.BLOCK_N), num_sms),),
        ("P_desc", "Q_desc", "D_desc", "F_ptr", "bias_ptr", "L_ptr", "C_desc", "flags_ptr", "scaling"),
        dict(
            M=M,
            N=N,
            K=K,
            R=R,
            stride_F_r=F.stride(0),
            stride_F_n=F.stride(1),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            STAGES=config.num_stages,
            GROUP_M=config.GROUP_M,
            TRANSPOSED=transposed,
            HAS_BIAS=has_bias,
            num_warps=config.num_warps,
        ),
        product_blocks(config, transposed) | {"D_desc": Block(config.BLOCK_R, config.BLOCK_K)},
        describe_block,
    )
    # The counter of tiles, and a flag for each row of tiles.
    return 1 + blocks_m, launch


def rows_for_tma(D: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Dᵀ (R, K) in `dtype` with rows that TMA can address: D itself, or else a copy of it."""
    rows = D.t()
    if rows.dtype == dtype and addressable(rows):
        return rows
    R, K = rows.shape
    room = torch.empty((R, blocks_of(K, 8) * 8), dtype=dtype, device=D.device)
    return room[:, :K].copy_(rows)
