"""expand for Hopper: the same product as expand.py, persistent and with TMA.

    C (M, N) = round( P (M, K) · Q (K, N) + keep (M, N)/(1 − p) ⊙ (L (M, R) · F (R, N)) + bias (N) )

    y  (M, N): P = x,  Q = weightᵀ, L = z,  F = lora_Bᵀ, bias       TRANSPOSED: Q and F are stored (N, ·)
    dx (M, K): P = dy, Q = weight,  L = dz, F = lora_A              Q and F are stored (·, N)

About one block per multiprocessor walks the tiles of C. Reads P once per column of tiles and Q once per row
of tiles, L and F once per tile, writes C once. 2·M·N·(K + R) FLOPs. Bound by arithmetic.

The order within a tile is what keeps the tensor cores busy (the compile gate holds on to it): the K loop
first, with one product in flight while the next operands arrive; the rank-R step after it, its operands by
TMA too; loops over tiles and over K are not flattened into one. With dropout keep must not reach the large
product: the rank-R step then has an accumulator of its own, for one part of the tile's columns at a time
(EPILOGUE_SUBTILE), which is masked and added to that part on its way out.

Programmatic dependent launch (WAIT). The kernel before this one writes L and lets this one start early, and
every block here waits (griddepcontrol.wait) until that kernel has ended and its writes are visible. Before
the wait a block reads only P, Q and the seed: their writers had ended when the writer of L started, since the
writer of L is never launched this way. It may be the writer of F, too. After the wait comes the first write
to C: C may lie in memory that the kernel before still reads or writes, such as the partial sums of L, because
the allocator reuses memory as soon as the host has freed it. A block without a tile waits, too, so that this
kernel cannot end before the one it depends on. TRIGGER lets a third kernel start early, that of dB (grad.py).
It reads nothing that the two before it write, and waits for the end of this one, and so of both, before it
writes. If another thread launches a kernel between the two on this stream, the wait is for that kernel, and L
is complete then as well: that kernel started after L was written, or has itself waited for the end of the
kernel that writes L.

In a group (group_tma.py) the kernel of dx is launched in the ordinary way, and behind it comes a kernel of dB
for each member, all but the last of which let the next one start early too, before they have waited
themselves. So several kernels in a row may be under way. Two rules make such a row safe, whatever its length:

1. Every block of a kernel that is launched this way waits, and so that kernel ends after the one before it.
   By induction, where a wait is over all kernels before it on the stream have ended: those of the row, and
   those before the row, since its first kernel is launched in the ordinary way and began behind them.
2. Before its wait a kernel of the row writes nothing, and reads only what was written before the row: dy and
   z. So it does not matter what memory the results get, or which of the kernels before still runs.

The sums of the parts of dB, and whatever the host launches next in the ordinary way, begin when the last
kernel of the row has ended, and by rule 1 all others have then. Hence each sum is launched behind the last
kernel of dB, and not behind its own, where it would end the row. A kernel of another thread within the row
begins a new row if it is launched in the ordinary way, and else keeps both rules as the others do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig, low_rank_block
from .launch import Block, Launch, blocks_of
from .tile import (
    addressable,
    drop,
    emulate_bf16,
    gdc_launch_dependents,
    gdc_wait,
    halves,
    keep_tile,
    low_rank_step,
    product_tma,
    round_as,
    tile_start,
)


@triton.jit(do_not_specialize=["seed_ptr", "threshold"])
def _expand_tma_kernel(
    P_desc,
    Q_desc,
    L,  # a descriptor, or a pointer where TMA cannot address it
    F,
    bias_ptr,
    C_desc,
    seed_ptr,
    threshold,
    scale,
    M,
    N,
    K,
    R,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LOW_RANK_TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = P_desc.dtype
    if TRIGGER:
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILE
    if DROPOUT:
        seed = tl.load(seed_ptr)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=False):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = product_tma(acc, P_desc, Q_desc, start_m, start_n, K, BLOCK_K, TRANSPOSED, EMULATE_BF16)

        if WAIT:
            gdc_wait()
        if not DROPOUT:
            acc = low_rank_step(
                acc,
                L,
                F,
                start_m,
                start_n,
                M,
                N,
                R,
                stride_L_m,
                stride_L_r,
                stride_F_r,
                stride_F_n,
                DTYPE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                TMA=LOW_RANK_TMA,
                TRANSPOSED=TRANSPOSED,
                STAGES=2,
                INPUT_PRECISION="ieee",
                EMULATE_BF16=EMULATE_BF16,
            )

        if HAS_BIAS:
            index_n = start_n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + index_n, mask=index_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        # Parts of the tile leave one after the other through one buffer: less shared memory, which the K loop
        # has a stage for.
        parts = (acc,)
        if EPILOGUE_SUBTILE >= 2:
            parts = halves(acc)
        if EPILOGUE_SUBTILE == 4:
            parts = halves(parts[0]) + halves(parts[1])
        for part in tl.static_range(EPILOGUE_SUBTILE):
            C = parts[part]
            start_c = start_n + part * COLUMNS
            if DROPOUT:
                low_rank = low_rank_step(
                    tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32),
                    L,
                    F,
                    start_m,
                    start_c,
                    M,
                    N,
                    R,
                    stride_L_m,
                    stride_L_r,
                    stride_F_r,
                    stride_F_n,
                    DTYPE,
                    BLOCK_M,
                    COLUMNS,
                    BLOCK_R,
                    TMA=LOW_RANK_TMA,
                    TRANSPOSED=TRANSPOSED,
                    STAGES=2,
                    INPUT_PRECISION="ieee",
                    EMULATE_BF16=EMULATE_BF16,
                )
                index_m = start_m + tl.arange(0, BLOCK_M)
                C += drop(low_rank, keep_tile(seed, threshold, index_m, start_c, N, COLUMNS)) * scale
            C_desc.store([start_m, start_c], round_as(C, DTYPE, EMULATE_BF16).to(DTYPE))
    if WAIT:
        gdc_wait()


def storage_order(P: Tensor, Q: Tensor) -> bool | None:
    """Return TRANSPOSED, whether Q (K, N) is stored (N, K), or None where TMA cannot address the operands."""
    if P.dtype not in (torch.bfloat16, torch.float16) or Q.shape[1] * P.element_size() % 16:
        return None
    if not addressable(P):
        return None
    if addressable(Q.t()):
        return True
    return False if addressable(Q) else None


def expand_tma_launch(
    P: Tensor,
    Q: Tensor,
    L: Tensor,
    F: Tensor,
    bias: Tensor | None,
    C: Tensor,
    keeps_all: bool,
    config: KernelConfig,
    transposed: bool,
    wait: bool,
    trigger: bool,
    num_sms: int,
) -> Launch:
    """Return the launch for operands that are like these, with P, Q and C addressable; transposed: as
    storage_order; keeps_all: there is no dropout.
    """
    (M, K), N, R = P.shape, Q.shape[1], L.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    columns = BLOCK_N // config.EPILOGUE_SUBTILE
    blocks = {
        "P_desc": Block(BLOCK_M, BLOCK_K),
        "Q_desc": Block(BLOCK_N, BLOCK_K, True) if transposed else Block(BLOCK_K, BLOCK_N),
        "C_desc": Block(BLOCK_M, columns),
    }
    low_rank_tma = addressable(L, F.t() if transposed else F)
    BLOCK_R = low_rank_block(config, low_rank_tma)
    if low_rank_tma:
        low_rank_columns = BLOCK_N if keeps_all else columns
        blocks["L"] = Block(BLOCK_M, BLOCK_R)
        of_F = Block(low_rank_columns, BLOCK_R, True) if transposed else Block(BLOCK_R, low_rank_columns)
        blocks["F"] = of_F
    tiles = blocks_of(M, BLOCK_M) * blocks_of(N, BLOCK_N)
    return Launch(
        _expand_tma_kernel,
        (min(tiles, config.ctas_per_sm * num_sms),),
        ("P_desc", "Q_desc", "L", "F", "bias_ptr", "C_desc", "seed_ptr", "threshold", "scale"),
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
            GROUP_M=config.GROUP_M,
            EPILOGUE_SUBTILE=config.EPILOGUE_SUBTILE,
            TRANSPOSED=transposed,
            LOW_RANK_TMA=low_rank_tma,
            HAS_BIAS=bias is not None,
            DROPOUT=not keeps_all,
            WAIT=wait,
            TRIGGER=trigger,
            EMULATE_BF16=emulate_bf16(P),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **({"launch_pdl": True} if wait else {}),
        ),
        blocks,
    )
