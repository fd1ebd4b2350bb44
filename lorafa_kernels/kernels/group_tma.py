"""expand_total for Hopper: the sum of several products in one accumulator, persistent and with TMA.

    C (M, N) = round( Σ_i P_i (M, K_i) · Q_i (K_i, N) + Σ_j keep_j/(1 − p_j) ⊙ (L_j (M, R_j) · F_j (R_j, N)) )

    dx: P_i = dy_i, Q_i = weight_i, L_j = dz_j, F_j = lora_A_j, of the members i, and those with an adapter j

About one block per multiprocessor walks the tiles of C. Within a tile the K loops of all members come one
after the other, each with one product in flight while the next operands arrive, then the rank-R steps: the
order that expand_tma.py explains, and that the compile gate holds on to; also what it does with dropout.
TRIGGER: the kernels of dB may start early (grad.py). Reads and FLOPs as in group.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import TMA_MEMBERS, KernelConfig, low_rank_block
from .launch import Block, Launch, blocks_of
from .tile import (
    addressable,
    drop,
    emulate_bf16,
    gdc_launch_dependents,
    halves,
    keep_tile,
    low_rank_step,
    product_tma,
    round_as,
    tile_start,
)


@triton.jit(do_not_specialize=["seeds_ptr", "thresholds"])
def _total_tma_kernel(
    P_0,
    P_1,
    P_2,
    P_3,
    Q_0,
    Q_1,
    Q_2,
    Q_3,
    L_0,  # descriptors, or pointers where TMA cannot address one of them
    L_1,
    L_2,
    L_3,
    F_0,
    F_1,
    F_2,
    F_3,
    C_desc,
    seeds_ptr,
    seed_offsets,
    thresholds,
    scales,
    M,
    N,
    widths,
    ranks,
    strides_L_m,
    strides_L_r,
    strides_F_r,
    strides_F_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr,
    LOW_RANK_TMA: tl.constexpr,
    DROPOUT: tl.constexpr,
    TRIGGER: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    if TRIGGER:
        gdc_launch_dependents()
    P_descs = (P_0, P_1, P_2, P_3)
    Q_descs = (Q_0, Q_1, Q_2, Q_3)
    Ls = (L_0, L_1, L_2, L_3)
    Fs = (F_0, F_1, F_2, F_3)
    MEMBERS: tl.constexpr = len(widths)
    ADAPTERS: tl.constexpr = len(ranks)
    DTYPE: tl.constexpr = C_desc.dtype
    COLUMNS: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILE
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=False):
        start_m, start_n = tile_start(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(MEMBERS):
            acc = product_tma(
                acc, P_descs[i], Q_descs[i], start_m, start_n, widths[i], BLOCK_K, False, EMULATE_BF16
            )

        if not DROPOUT:
            for j in tl.static_range(ADAPTERS):
                acc = low_rank_step(
                    acc,
                    Ls[j],
                    Fs[j],
                    start_m,
                    start_n,
                    M,
                    N,
                    ranks[j],
                    strides_L_m[j],
                    strides_L_r[j],
                    strides_F_r[j],
                    strides_F_n[j],
                    DTYPE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    TMA=LOW_RANK_TMA,
                    TRANSPOSED=False,
                    STAGES=2,
                    INPUT_PRECISION="ieee",
                    EMULATE_BF16=EMULATE_BF16,
                )

        # As in expand_tma.py: parts of the tile leave one after the other through one buffer.
        parts = (acc,)
        if EPILOGUE_SUBTILE >= 2:
            parts = halves(acc)
        if EPILOGUE_SUBTILE == 4:
            parts = halves(parts[0]) + halves(parts[1])
        for part in tl.static_range(EPILOGUE_SUBTILE):
            C = parts[part]
            start_c = start_n + part * COLUMNS
            if DROPOUT:
                for j in tl.static_range(ADAPTERS):
                    term = low_rank_step(
                        tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32),
                        Ls[j],
                        Fs[j],
                        start_m,
                        start_c,
                        M,
                        N,
                        ranks[j],
                        strides_L_m[j],
                        strides_L_r[j],
                        strides_F_r[j],
                        strides_F_n[j],
                        DTYPE,
                        BLOCK_M,
                        COLUMNS,
                        BLOCK_R,
                        TMA=LOW_RANK_TMA,
                        TRANSPOSED=False,
                        STAGES=2,
                        INPUT_PRECISION="ieee",
                        EMULATE_BF16=EMULATE_BF16,
                    )
                    seed = tl.load(seeds_ptr + seed_offsets[j])
                    index_m = start_m + tl.arange(0, BLOCK_M)
                    keep = keep_tile(seed, thresholds[j], index_m, start_c, N, COLUMNS)
                    C += drop(term, keep) * scales[j]
            C_desc.store([start_m, start_c], round_as(C, DTYPE, EMULATE_BF16).to(DTYPE))


def total_addressable(Ps: Sequence[Tensor], Qs: Sequence[Tensor], N: int) -> bool:
    """Whether the kernel takes so many members, and TMA can address these operands and a contiguous C (M, N)
    of their dtype.
    """
    if len(Ps) > TMA_MEMBERS:
        return False
    if Ps[0].dtype not in (torch.bfloat16, torch.float16) or N * Ps[0].element_size() % 16:
        return False
    return addressable(*Ps, *Qs)


def total_tma_launch(
    Ps: Sequence[Tensor],
    Qs: Sequence[Tensor],
    Ls: Sequence[Tensor],
    Fs: Sequence[Tensor],
    C: Tensor,
    config: KernelConfig,
    num_sms: int,
    drops: bool,
    seed_offsets: tuple[int, ...],
    trigger: bool,
) -> Launch:
    """Return the launch for operands that are like these, with P_i and Q_i addressable. It takes the P_i, the
    Q_i, the L_j and the F_j, C, the seeds, the thresholds and the scales of the dropout.
    """
    M, N = C.shape
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    low_rank_tma = addressable(*Ls, *Fs)
    BLOCK_R = low_rank_block(config, low_rank_tma)
    columns = BLOCK_N // config.EPILOGUE_SUBTILE
    low_rank_columns = columns if drops else BLOCK_N
    blocks = {"P": Block(BLOCK_M, BLOCK_K), "Q": Block(BLOCK_K, BLOCK_N)}
    if low_rank_tma:
        blocks |= {"L": Block(BLOCK_M, BLOCK_R), "F": Block(BLOCK_R, low_rank_columns)}
    operands = {"P": Ps, "Q": Qs, "L": Ls, "F": Fs}
    names = {name: [f"{name}_{i}" for i in range(len(tensors))] for name, tensors in operands.items()}
    # Beyond the last member.
    absent = {
        f"{name}_{i}": None for name, tensors in operands.items() for i in range(len(tensors), TMA_MEMBERS)
    }
    tiles = blocks_of(M, BLOCK_M) * blocks_of(N, BLOCK_N)
    return Launch(
        _total_tma_kernel,
        (min(tiles, config.ctas_per_sm * num_sms),),
        (*(one for of in names.values() for one in of), "C_desc", "seeds_ptr", "thresholds", "scales"),
        dict(
            **absent,
            seed_offsets=seed_offsets,
            M=M,
            N=N,
            widths=tuple(P.shape[1] for P in Ps),
            ranks=tuple(L.shape[1] for L in Ls),
            strides_L_m=tuple(L.stride(0) for L in Ls),
            strides_L_r=tuple(L.stride(1) for L in Ls),
            strides_F_r=tuple(F.stride(0) for F in Fs),
            strides_F_n=tuple(F.stride(1) for F in Fs),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_R=BLOCK_R,
            GROUP_M=config.GROUP_M,
            EPILOGUE_SUBTILE=config.EPILOGUE_SUBTILE,
            LOW_RANK_TMA=low_rank_tma,
            DROPOUT=drops,
            TRIGGER=trigger,
            EMULATE_BF16=emulate_bf16(C),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
        {one: block for name, block in blocks.items() for one in names[name]}
        | {"C_desc": Block(BLOCK_M, columns)},
    )
