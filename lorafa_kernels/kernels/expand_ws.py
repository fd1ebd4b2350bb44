"""expand for Hopper with a warp for each kind of work, in Gluon: the product of expand.py without dropout.

    C (M, N) = round( P (M, K) · Q (K, N) + L (M, R) · F (R, N) + bias (N) )

    y  (M, N): P = x,  Q = weightᵀ, L = z,  F = lora_Bᵀ, bias       TRANSPOSED: Q and F are stored (N, ·)
    dx (M, K): P = dy, Q = weight,  L = dz, F = lora_A              Q and F are stored (·, N)

One block per multiprocessor walks the tiles of C. Its warps share no work, so that none waits for another
kind:

    producer   1 warp    blocks of P and Q by TMA into a ring of shared memory, num_stages deep; it runs on
                         into the next tile while the consumers write this one
    loader     2 warps   L, F and bias of a tile, by pointers, rounded to the dtype of P, into buffers of
                         their own, while the K loop of that tile runs
    consumers  8 warps   the products, one in flight while the next operands arrive; the rank-R term is one
                         more step of the same accumulator; then bias and the write of C by TMA

R ≤ BLOCK_R: the rank-R term is one step. Reads P once per column of tiles and Q once per row of tiles, L and
F once per tile, writes C once. 2·M·N·(K + R) FLOPs. Bound by arithmetic. L and F come by pointers, so their
strides and an fp32 F make no difference.

The registers of the 384 threads are dealt out anew where the warps part (setmaxnreg): LOADER_REGISTERS for
producer and loader, what is left for the consumers. So nothing is left of a multiprocessor for the kernel
before this one: with programmatic dependent launch (WAIT) the launch is hidden, and that kernel is not.

WAIT, as in expand_tma.py: the loader waits for the kernel that writes L before it reads anything. Every block
has a tile, hence every block waits. C is written by the consumers, after the loader has told them that L is
there, hence after the wait. Before it a block only reads P and Q.

Never run on a GPU yet. Written for Triton 3.6 and 3.7: Gluon is experimental and changes its names.
"""

from __future__ import annotations

import functools

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..plan.config import KernelConfig
from .launch import Block, Launch, Launches, blocks_of
from .tile import gdc_wait, offsets, tile_start

LOADER_WARPS = gl.constexpr(2)
# Registers of a thread of producer and loader: what the loader's loads in flight take (compile gate).
LOADER_REGISTERS = gl.constexpr(104)
# Elements that the loader has in flight: 32 a thread.
LOADED = 2048


@gluon.constexpr_function
def part_shape(shape):
    """(number, rows, columns) of the parts in which a block (rows, columns) of a 16-bit matrix is filled.

    Each lies in one piece: shared memory has the first 64 columns of all rows, then the next 64.
    """
    rows, columns = shape
    part_columns = min(columns, 64)
    part_rows = min(rows, LOADED // part_columns)
    return [rows * columns // (part_rows * part_columns), part_rows, part_columns]


@gluon.jit
def _producer(
    P_desc, Q_desc, P_ring, Q_ring, ready, empty, M, N, K, GROUP_M: gl.constexpr, TRANSPOSED: gl.constexpr
):
    STAGES: gl.constexpr = P_ring.shape[0]
    BLOCK_M: gl.constexpr = P_ring.shape[1]
    BLOCK_K: gl.constexpr = P_ring.shape[2]
    BLOCK_N: gl.constexpr = Q_ring.shape[1] if TRANSPOSED else Q_ring.shape[2]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for start in range(0, K, BLOCK_K):
            slot = step % STAGES
            # The first round finds every slot empty.
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            full = ready.index(slot)
            mbarrier.expect(full, P_desc.block_type.nbytes + Q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(P_desc, [start_m, start], full, P_ring.index(slot))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(Q_desc, [start_n, start], full, Q_ring.index(slot))
            else:
                tma.async_copy_global_to_shared(Q_desc, [start, start_n], full, Q_ring.index(slot))
            step += 1


@gluon.jit
def fill(
    parts,
    pointer,
    first_row,
    first_column,
    rows,
    columns,
    stride_row,
    stride_column,
    BLOCK_ROWS: gl.constexpr,
):
    """Copy a block of a matrix (rows, columns) into shared memory, rounded to its dtype; zero beyond.

    parts: (number, rows, columns) of the block, down its rows, then on to the next columns (part_shape).
    """
    ROWS: gl.constexpr = parts.shape[1]
    COLUMNS: gl.constexpr = parts.shape[2]
    VECTOR: gl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = COLUMNS // VECTOR
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    # Not unrolled: places of all parts would be kept in registers.
    for part in range(parts.shape[0]):
        row = first_row + part % (BLOCK_ROWS // ROWS) * ROWS
        column = first_column + part // (BLOCK_ROWS // ROWS) * COLUMNS
        index_r = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        index_c = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
        inside = (index_r < rows)[:, None] & (index_c < columns)[None, :]
        places = offsets(index_r, stride_row)[:, None] + offsets(index_c, stride_column)[None, :]
        values = gl.load(pointer + places, mask=inside, other=0.0)
        parts.index(part).store(values.to(parts.dtype))


@gluon.jit
def _loader(
    L_ptr,
    F_ptr,
    bias_ptr,
    L_parts,
    F_parts,
    bias_buffer,
    ready,
    empty,
    M,
    N,
    R,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WAIT: gl.constexpr,
):
    if WAIT:
        gdc_wait()
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        mbarrier.wait(empty, phase ^ 1)
        fill(L_parts, L_ptr, start_m, 0, M, R, stride_L_m, stride_L_r, BLOCK_M)
        if TRANSPOSED:
            fill(F_parts, F_ptr, start_n, 0, N, R, stride_F_n, stride_F_r, BLOCK_N)
        else:
            fill(F_parts, F_ptr, 0, start_n, R, N, stride_F_r, stride_F_n, BLOCK_R)
        if HAS_BIAS:
            index_n = start_n + gl.arange(
                0, BLOCK_N, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
            )
            bias_buffer.store(gl.load(bias_ptr + index_n, mask=index_n < N, other=0.0).to(gl.float32))
        # The tensor cores read by another path than these stores went.
        fence_async_shared()
        mbarrier.arrive(ready)
        phase ^= 1


@gluon.jit
def _consumer(
    P_ring,
    Q_ring,
    L_buffer,
    F_buffer,
    bias_buffer,
    C_desc,
    C_buffer,
    ready,
    empty,
    low_rank_ready,
    low_rank_empty,
    M,
    N,
    K,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    STAGES: gl.constexpr = P_ring.shape[0]
    BLOCK_M: gl.constexpr = P_ring.shape[1]
    BLOCK_K: gl.constexpr = P_ring.shape[2]
    BLOCK_N: gl.constexpr = Q_ring.shape[1] if TRANSPOSED else Q_ring.shape[2]
    COLUMNS: gl.constexpr = C_buffer.shape[1]
    tile_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    step = 0
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=gl.float32, layout=tile_layout)
        # The first product of a tile has none before it, whose slot could be given back.
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), step // STAGES & 1)
        Q = Q_ring.index(slot).permute((1, 0)) if TRANSPOSED else Q_ring.index(slot)
        acc = warpgroup_mma(P_ring.index(slot), Q, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        step += 1
        for _ in range(BLOCK_K, K, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), step // STAGES & 1)
            Q = Q_ring.index(slot).permute((1, 0)) if TRANSPOSED else Q_ring.index(slot)
            acc = warpgroup_mma(P_ring.index(slot), Q, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        mbarrier.wait(low_rank_ready, phase)
        F = F_buffer.permute((1, 0)) if TRANSPOSED else F_buffer
        acc = warpgroup_mma(L_buffer, F, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        acc = warpgroup_mma_wait(0, deps=(acc,))

        # Parts of the tile leave one after the other through one buffer.
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
        # bias was read, too.
        mbarrier.arrive(low_rank_empty)
        phase ^= 1
    tma.store_wait(pendings=0)


@gluon.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape((tile.shape[0], 2, tile.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _expand_ws_kernel(
    P_desc,
    Q_desc,
    L_ptr,
    F_ptr,
    bias_ptr,
    C_desc,
    M,
    N,
    K,
    R,
    stride_L_m,
    stride_L_r,
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
    WAIT: gl.constexpr,
):
    DTYPE: gl.constexpr = P_desc.dtype
    L_SHAPE: gl.constexpr = [BLOCK_M, BLOCK_R]
    F_SHAPE: gl.constexpr = [BLOCK_N, BLOCK_R] if TRANSPOSED else [BLOCK_R, BLOCK_N]
    L_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(L_SHAPE, DTYPE)
    F_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(F_SHAPE, DTYPE)
    P_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], P_desc.layout)
    Q_SHAPE: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if TRANSPOSED else [STAGES, BLOCK_K, BLOCK_N]
    Q_ring = gl.allocate_shared_memory(DTYPE, Q_SHAPE, Q_desc.layout)
    L_parts = gl.allocate_shared_memory(DTYPE, part_shape(L_SHAPE), L_LAYOUT)
    F_parts = gl.allocate_shared_memory(DTYPE, part_shape(F_SHAPE), F_LAYOUT)
    C_buffer = gl.allocate_shared_memory(DTYPE, C_desc.block_type.shape, C_desc.layout)
    bias_buffer = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    low_rank_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    low_rank_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
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
                    L_parts._reinterpret(DTYPE, L_SHAPE, L_LAYOUT),
                    F_parts._reinterpret(DTYPE, F_SHAPE, F_LAYOUT),
                    bias_buffer,
                    C_desc,
                    C_buffer,
                    ready,
                    empty,
                    low_rank_ready,
                    low_rank_empty,
                    M,
                    N,
                    K,
                    GROUP_M,
                    TRANSPOSED,
                    HAS_BIAS,
                ),
            ),
            (
                _producer,
                (P_desc, Q_desc, P_ring, Q_ring, ready, empty, M, N, K, GROUP_M, TRANSPOSED),
            ),
            (
                _loader,
                (
                    L_ptr,
                    F_ptr,
                    bias_ptr,
                    L_parts,
                    F_parts,
                    bias_buffer,
                    low_rank_ready,
                    low_rank_empty,
                    M,
                    N,
                    R,
                    stride_L_m,
                    stride_L_r,
                    stride_F_r,
                    stride_F_n,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    GROUP_M,
                    TRANSPOSED,
                    HAS_BIAS,
                    WAIT,
                ),
            ),
        ],
        [1, LOADER_WARPS],
        [LOADER_REGISTERS, LOADER_REGISTERS],
    )


_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON_DTYPES[dtype])


def describe_block(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return what a kernel takes blocks of `rows` × `columns` of an addressable matrix by."""
    block = [rows, columns]
    layout = _layout(rows, columns, tensor.dtype)
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block, layout)


_LAUNCHES = Launches()


def expand_ws(
    P: Tensor,
    Q: Tensor,
    L: Tensor,
    F: Tensor,
    bias: Tensor | None,
    C: Tensor,
    config: KernelConfig,
    transposed: bool,
    wait: bool,
    num_sms: int,
) -> None:
    """Write round(P · Q + L · F + bias) into C. Operands as in expand, with P, Q and C addressable.

    Raises ValueError for R > BLOCK_R.
    """
    strides = P.stride(), Q.stride(), L.stride(), F.stride()
    dtypes = P.dtype, L.dtype, F.dtype, None if bias is None else bias.dtype
    key = P.shape, C.shape, L.shape, strides, dtypes, P.device, config, transposed, wait, num_sms
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launch(P, L, F, bias is not None, C, config, transposed, wait, num_sms)
    )
    launch(P, Q, L, F, bias, C)


def _launch(
    P: Tensor,
    L: Tensor,
    F: Tensor,
    has_bias: bool,
    C: Tensor,
    config: KernelConfig,
    transposed: bool,
    wait: bool,
    num_sms: int,
) -> Launch:
    """Return the launch for operands that are like these."""
    (M, K), N, R = P.shape, C.shape[1], L.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    if R > BLOCK_R:
        raise ValueError(
            f"expand in its variant 'ws' needs R <= BLOCK_R, got R = {R} and BLOCK_R = {BLOCK_R}"
        )
    tiles = blocks_of(M, BLOCK_M) * blocks_of(N, BLOCK_N)
    return Launch(
        _expand_ws_kernel,
        (min(tiles, num_sms),),
        ("P_desc", "Q_desc", "L_ptr", "F_ptr", "bias_ptr", "C_desc"),
        dict(
            M=M,
            N=N,
            K=K,
            R=R,
            stride_L_m=L.stride(0),
            stride_L_r=L.stride(1),
            stride_F_r=F.stride(0),
            stride_F_n=F.stride(1),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_R=BLOCK_R,
            STAGES=config.num_stages,
            GROUP_M=config.GROUP_M,
            TRANSPOSED=transposed,
            HAS_BIAS=has_bias,
            WAIT=wait,
            num_warps=config.num_warps,
            **({"launch_pdl": True} if wait else {}),
        ),
        product_blocks(config, transposed),
        describe_block,
    )


def product_blocks(config: KernelConfig, transposed: bool) -> dict[str, Block]:
    """Return the blocks in which P, Q and C travel, by the names of a kernel's descriptors."""
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    return {
        "P_desc": Block(BLOCK_M, BLOCK_K),
        "Q_desc": Block(BLOCK_N, BLOCK_K, True) if transposed else Block(BLOCK_K, BLOCK_N),
        "C_desc": Block(BLOCK_M, BLOCK_N // config.EPILOGUE_SUBTILE),
    }
