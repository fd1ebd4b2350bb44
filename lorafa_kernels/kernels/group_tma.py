"""expand_total for Hopper: the sum of several products in one accumulator, persistent and with TMA.

    C (M, N) = round( Σ_i P_i (M, K_i) · Q_i (K_i, N) + Σ_j keep_j/(1 − p_j) ⊙ (L_j (M, R_j) · F_j (R_j, N)) )

    dx: P_i = dy_i, Q_i = weight_i, L_j = dz_j, F_j = lora_A_j, of the members i, and those with an adapter j

About one block per multiprocessor walks the tiles of C. Within a tile the K loops of all members come one
after the other, each with one product in flight while the next operands arrive, then the rank-R steps: the
order that expand_tma.py explains, and that the compile gate holds on to; also what it does with dropout.
Reads and FLOPs as in group.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig
from .tile import (
    addressable,
    describe,
    drop,
    emulate_bf16,
    halves,
    keep_tile,
    low_rank_step,
    round_as,
    tile_start,
)

# Triton 3.6.0 and 3.7.1 cannot launch a kernel that takes a tuple of descriptors: those of each member are
# arguments of their own, None beyond the last member.
MOST_MEMBERS = 4


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
    EMULATE_BF16: tl.constexpr,
):
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
            for start in range(0, widths[i], BLOCK_K):
                P = P_descs[i].load([start_m, start])
                Q = Q_descs[i].load([start, start_n])
                if EMULATE_BF16:
                    P = P.to(tl.float32)
                    Q = Q.to(tl.float32)
                acc = tl.dot(P, Q, acc)

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
    if len(Ps) > MOST_MEMBERS:
        return False
    if Ps[0].dtype not in (torch.bfloat16, torch.float16) or N * Ps[0].element_size() % 16:
        return False
    return addressable(*Ps, *Qs)


def _flat(name: str, operands: Iterable) -> dict:
    """Return the arguments name_0, name_1, … of the kernel, None beyond the last operand."""
    operands = list(operands)
    operands += [None] * (MOST_MEMBERS - len(operands))
    return {f"{name}_{i}": operand for i, operand in enumerate(operands)}


def expand_total_tma(
    Ps: Sequence[Tensor],
    Qs: Sequence[Tensor],
    Ls: Sequence[Tensor],
    Fs: Sequence[Tensor],
    C: Tensor,
    config: KernelConfig,
    num_sms: int,
    dropout: dict[str, Any],
) -> None:
    """Write round(Σ P_i · Q_i + Σ keep_j/(1 − p_j) ⊙ (L_j · F_j)) into C. Operands as in expand_total, with
    P_i and Q_i addressable; dropout: the kernel's arguments seeds_ptr (None without dropout), seed_offsets,
    thresholds and scales.
    """
    M, N = C.shape
    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    low_rank_tma = addressable(*Ls, *Fs)
    columns = BLOCK_N // config.EPILOGUE_SUBTILE
    drops = dropout["seeds_ptr"] is not None
    low_rank_columns = columns if drops else BLOCK_N
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    _total_tma_kernel[(min(tiles, config.ctas_per_sm * num_sms),)](
        **_flat("P", (describe(P, BLOCK_M, BLOCK_K) for P in Ps)),
        **_flat("Q", (describe(Q, BLOCK_K, BLOCK_N) for Q in Qs)),
        **_flat("L", (describe(L, BLOCK_M, BLOCK_R) if low_rank_tma else L for L in Ls)),
        **_flat("F", (describe(F, BLOCK_R, low_rank_columns) if low_rank_tma else F for F in Fs)),
        C_desc=describe(C, BLOCK_M, columns),
        **dropout,
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
        EMULATE_BF16=emulate_bf16(C, *Fs),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
