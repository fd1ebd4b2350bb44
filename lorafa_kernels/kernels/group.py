"""Kernels of linear layers that share an input: one pass over x for all z, one launch for the whole of dx.

    shrink_group  z_i (M, R_i) = round( s_i/(1 − p_i) · ((x ⊙ keep_i) lora_A_iᵀ) ), side by side in z (M, ΣR)
    expand_total  C (M, N) = round( Σ_i P_i (M, K_i) · Q_i (K_i, N) + Σ_j keep_j/(1 − p_j) ⊙ (L_j · F_j) )
                  dx: P_i = dy_i, Q_i = weight_i, L_j (M, R_j) = dz_j, F_j = lora_A_j
    shrink_total  dz (M, R) = round( s · Σ_i dy_i lora_B_i ), of members that share lora_A

A member is one of the linear layers. Its operands come in tuples, over which the kernels' loops are unrolled:
one compiled kernel for each number of members.

shrink_group reads x once and each lora_A once per block of rows: (M·K + ⌈M/BLOCK_M⌉·K·ΣR + M·ΣR) elements.
Bound by reading x. Members whose ranks together exceed the columns of one block are taken in several passes.
Few rows are handled as in shrink.py: the contraction is cut, and partial sums are added in a fixed order. As
there, programs of their own round the other factors for the kernels that come next (COPIES).
With dropout the tile of x is multiplied with each member's own mask, made in registers (philox.py).

expand_total keeps the sum over the members in one accumulator, where as many products would read and write C
once each: it reads P_i and Q_i as so many products do, writes C once, and rounds once.
2·M·N·Σ(K_i + R_i) FLOPs. Bound by arithmetic. With dropout the rank-R terms come first, each multiplied with
its mask and 1/(1 − p_j) before it is added. The launcher takes the kernel of group_tma.py where the
configuration asks for it and TMA can address the operands. With TRIGGER the kernels of dB may start early
(grad.py). shrink_total is the same kernel with the width of a rank, bound by reading the dy_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig, split_size
from .group_tma import total_addressable, total_tma_launch
from .launch import Launch, Launches, aligned, blocks_of
from .tile import (
    ROUND_BLOCK,
    SUM_BLOCK,
    addressable,
    by_pointers,
    dependent_launch,
    device_limits,
    drop,
    dropout_arguments,
    emulate_bf16,
    gdc_launch_dependents,
    input_precision,
    keep_scale,
    keep_tile,
    load,
    low_rank_step,
    offsets,
    product,
    round_rows,
    rounded,
    store,
    sum_parts,
    tile_start,
)


@triton.jit(do_not_specialize=["seeds_ptr", "thresholds"])
def _shrink_group_kernel(
    x_ptr,
    factor_ptrs,
    out_ptr,
    seeds_ptr,
    seed_offsets,
    thresholds,
    scalings,
    source_ptrs,
    copy_ptrs,
    firsts,
    ranks,
    M,
    K,
    columns,
    copy_rows,
    copy_columns,
    split_k,
    stride_x_m,
    stride_x_k,
    strides_factor_k,
    strides_factor_r,
    strides_source_row,
    strides_source_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of one member
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    members: tl.constexpr = len(factor_ptrs)
    COPIES: tl.constexpr = len(copy_ptrs)
    pid = tl.program_id(0)
    if COPIES:
        blocks = tl.cdiv(M, BLOCK_M)
        if pid >= blocks:
            part = (pid - blocks) * tl.num_programs(1) + tl.program_id(1)
            part = part * tl.num_programs(2) + tl.program_id(2)
            for i in tl.static_range(COPIES):
                round_rows(
                    source_ptrs[i],
                    copy_ptrs[i],
                    part,
                    copy_rows[i],
                    copy_columns[i],
                    strides_source_row[i],
                    strides_source_column[i],
                    COPY_ROWS,
                    BLOCK_R,
                    EMULATE_BF16,
                )
            return
    index_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    # A rank above BLOCK_R is tiled; its member is then the only one of the pass.
    index_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first_k = split * split_k
    last_k = min(first_k + split_k, K)
    in_m = (index_m < M)[:, None]

    index_k = first_k + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offsets(index_m, stride_x_m)[:, None] + offsets(index_k, stride_x_k)[None, :]
    accs = ()
    ptrs = ()
    for i in tl.static_range(members):
        accs += (tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32),)
        ptrs += (
            factor_ptrs[i]
            + offsets(index_k, strides_factor_k[i])[:, None]
            + offsets(index_r, strides_factor_r[i])[None, :],
        )
    for start in range(first_k, last_k, BLOCK_K):
        in_k = start + tl.arange(0, BLOCK_K) < last_k
        x = load(x_ptrs, in_m if EVEN_K else in_m & in_k[None, :], EMULATE_BF16)
        sums = ()
        next_ptrs = ()
        for i in tl.static_range(members):
            in_r = (index_r < ranks[i])[None, :]
            factor = load(ptrs[i], in_r if EVEN_K else in_k[:, None] & in_r, EMULATE_BF16)
            kept = x
            if DROPOUT:
                seed = tl.load(seeds_ptr + seed_offsets[i])
                kept = drop(x, keep_tile(seed, thresholds[i], index_m, start, K, BLOCK_K))
            sums += (tl.dot(kept, factor, accs[i], input_precision=INPUT_PRECISION),)
            next_ptrs += (ptrs[i] + offsets(tl.full((), BLOCK_K, tl.int64), strides_factor_k[i]),)
        x_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_x_k)
        accs = sums
        ptrs = next_ptrs

    for i in tl.static_range(members):
        rows = index_m
        if SPLIT:
            rows = offsets(split, M) + index_m
        out_ptrs = out_ptr + offsets(rows, columns)[:, None] + (firsts[i] + index_r)[None, :]
        # Partial sums are scaled in fp32, before they are added.
        store(out_ptrs, accs[i] * scalings[i], in_m & (index_r < ranks[i])[None, :], EMULATE_BF16)


@triton.jit
def _shrink_group_sum_kernel(
    parts_ptr, out_ptr, splits, count, BLOCK: tl.constexpr, EMULATE_BF16: tl.constexpr
):
    sum_parts(parts_ptr, out_ptr, tl.program_id(0), splits, count, 1.0, BLOCK, EMULATE_BF16)


@triton.jit(do_not_specialize=["seeds_ptr", "thresholds"])
def _total_kernel(
    P_ptrs,
    Q_ptrs,
    L_ptrs,
    F_ptrs,
    C_ptr,
    seeds_ptr,
    seed_offsets,
    thresholds,
    scales,
    scaling,
    M,
    N,
    widths,
    ranks,
    strides_P_m,
    strides_P_k,
    strides_Q_k,
    strides_Q_n,
    strides_L_m,
    strides_L_r,
    strides_F_r,
    strides_F_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    TRIGGER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = C_ptr.dtype.element_ty
    if TRIGGER:
        gdc_launch_dependents()
    start_m, start_n = tile_start(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    index_m = start_m + tl.arange(0, BLOCK_M)
    index_n = start_n + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROPOUT:
        for j in tl.static_range(len(L_ptrs)):
            term = low_rank_step(
                tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
                L_ptrs[j],
                F_ptrs[j],
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
                TMA=False,
                TRANSPOSED=False,
                STAGES=1,
                INPUT_PRECISION=INPUT_PRECISION,
                EMULATE_BF16=EMULATE_BF16,
            )
            seed = tl.load(seeds_ptr + seed_offsets[j])
            acc += drop(term, keep_tile(seed, thresholds[j], index_m, start_n, N, BLOCK_N)) * scales[j]
    for i in tl.static_range(len(P_ptrs)):
        acc = product(
            acc,
            P_ptrs[i],
            Q_ptrs[i],
            index_m,
            index_n,
            M,
            N,
            widths[i],
            strides_P_m[i],
            strides_P_k[i],
            strides_Q_k[i],
            strides_Q_n[i],
            BLOCK_K,
            EVEN_K,
            INPUT_PRECISION,
            EMULATE_BF16,
        )
    # As in expand.py: after the main loops where that is possible.
    if not DROPOUT:
        for j in tl.static_range(len(L_ptrs)):
            acc = low_rank_step(
                acc,
                L_ptrs[j],
                F_ptrs[j],
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
                TMA=False,
                TRANSPOSED=False,
                STAGES=1,
                INPUT_PRECISION=INPUT_PRECISION,
                EMULATE_BF16=EMULATE_BF16,
            )

    C_tile = C_ptr + offsets(index_m, N)[:, None] + index_n[None, :]
    store(C_tile, acc * scaling, (index_m < M)[:, None] & (index_n < N)[None, :], EMULATE_BF16)


@dataclass(frozen=True)
class Dropout:
    """The dropout of some members: the seeds of their group, int64 (n,), and for each of them which of the
    seeds is its own and the probability p, 0 for none.
    """

    seeds: Tensor
    offsets: Sequence[int]
    ps: Sequence[float]

    def arguments(self, members: slice) -> tuple[Tensor, tuple[int, ...]]:
        """Return the seeds, and the thresholds of some of the members."""
        # From 0 on every element is kept.
        return self.seeds, tuple([dropout_arguments(p, self.seeds)[1] or 0 for p in self.ps[members]])

    def scales(self) -> tuple[float, ...]:
        """Return what the rank-R terms are multiplied with beside their masks."""
        return tuple(keep_scale(p) or 1.0 for p in self.ps)


_SHRINKS = Launches()
_TOTALS = Launches()


def shrink_group(
    x: Tensor,
    factors: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    config: KernelConfig,
    members: int,
    dropout: Dropout | None = None,
    copies: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Return the round(scaling_i · ((x ⊙ keep_i) · factor_i)) side by side: a contiguous (M, ΣR) tensor in
    the dtype of x.

    x (M, K) fp32, bf16 or fp16; factors (K, R_i) of that dtype or fp32; any strides. keep_i (M, K) is all
    true without dropout; 1/(1 − p_i) is for the caller to have in scaling_i. config: its BLOCK_R is the
    columns of one member; members: how many of them one pass over x takes, one where a rank is above BLOCK_R.
    copies: as in shrink, any number.
    """
    M, K = x.shape
    ranks = [factor.shape[1] for factor in factors]
    out = torch.empty((M, sum(ranks)), dtype=x.dtype, device=x.device)
    if M == 0 or K == 0 or not ranks:
        for source, target in copies:
            target.copy_(source)
        return out.zero_()
    factors = [rounded(factor, x.dtype) for factor in factors]
    precision = input_precision(x.dtype)
    of_members = tuple([(factor.shape[1], factor.stride()) for factor in factors])
    of_copies = tuple([(one.shape, one.stride(), one.dtype, target.dtype) for one, target in copies])
    sources, targets = (tuple([copy[end] for copy in copies]) for end in (0, 1))
    drops = None if dropout is None else tuple(dropout.offsets)
    key = M, K, x.stride(), x.dtype, x.device, of_members, of_copies, drops, precision, config, members
    splits, passes, add = _SHRINKS.get(key) or _SHRINKS.keep(
        key, _shrinks(x, factors, out, sources, dropout, precision, config, members)
    )
    made = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device) if add else out
    for of_pass, launch in passes:
        seeds, thresholds = (None, ()) if dropout is None else dropout.arguments(of_pass)
        launch(
            x, tuple(factors[of_pass]), made, seeds, thresholds, tuple(scalings[of_pass]), sources, targets
        )
        sources = targets = ()
    if add:
        add(made, out)
    return out


def _shrinks(
    x: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    sources: Sequence[Tensor],
    dropout: Dropout | None,
    precision: str,
    config: KernelConfig,
    members: int,
) -> tuple[int, list[tuple[slice, Launch]], Launch | None]:
    """Return into how many parts the contraction is cut, the launch of each pass over x with the members that
    it takes, and the one that adds the parts. sources: what the first pass copies.
    """
    M, K = x.shape
    ranks = [factor.shape[1] for factor in factors]
    split_k = split_size(config, K)
    splits = blocks_of(K, split_k)
    emulate = emulate_bf16(x, *factors)
    copy_block = ROUND_BLOCK // config.BLOCK_R
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    passes = []
    for begin in range(0, len(ranks), members):
        of_pass = slice(begin, begin + members)
        r_blocks = blocks_of(max(ranks[of_pass]), config.BLOCK_R)
        copying = max((blocks_of(source.shape[0], copy_block) for source in sources), default=0)
        launch = Launch(
            _shrink_group_kernel,
            (blocks_of(M, config.BLOCK_M) + blocks_of(copying, splits * r_blocks), splits, r_blocks),
            (
                "x_ptr",
                "factor_ptrs",
                "out_ptr",
                "seeds_ptr",
                "thresholds",
                "scalings",
                "source_ptrs",
                "copy_ptrs",
            ),
            dict(
                seed_offsets=() if dropout is None else tuple(dropout.offsets[of_pass]),
                firsts=tuple(firsts[of_pass]),
                ranks=tuple(ranks[of_pass]),
                M=M,
                K=K,
                columns=out.shape[1],
                copy_rows=tuple(source.shape[0] for source in sources),
                copy_columns=tuple(source.shape[1] for source in sources),
                split_k=split_k,
                stride_x_m=x.stride(0),
                stride_x_k=x.stride(1),
                strides_factor_k=tuple(factor.stride(0) for factor in factors[of_pass]),
                strides_factor_r=tuple(factor.stride(1) for factor in factors[of_pass]),
                strides_source_row=tuple(source.stride(0) for source in sources),
                strides_source_column=tuple(source.stride(1) for source in sources),
                BLOCK_M=config.BLOCK_M,
                BLOCK_K=config.BLOCK_K,
                BLOCK_R=config.BLOCK_R,
                EVEN_K=K % config.BLOCK_K == 0,
                SPLIT=splits > 1,
                DROPOUT=dropout is not None,
                COPY_ROWS=copy_block,
                INPUT_PRECISION=precision,
                EMULATE_BF16=emulate,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            ),
        )
        passes.append((of_pass, launch))
        sources = ()
    if splits == 1:
        return splits, passes, None
    count = out.numel()
    add = Launch(
        _shrink_group_sum_kernel,
        (blocks_of(count, SUM_BLOCK),),
        ("parts_ptr", "out_ptr"),
        dict(splits=splits, count=count, BLOCK=SUM_BLOCK, EMULATE_BF16=emulate, num_warps=4),
    )
    return splits, passes, add


def expand_total(
    Ps: Sequence[Tensor],
    Qs: Sequence[Tensor],
    Ls: Sequence[Tensor],
    Fs: Sequence[Tensor],
    *,
    config: KernelConfig,
    unaligned: KernelConfig | None = None,
    dropout: Dropout | None = None,
    trigger: bool = False,
) -> Tensor:
    """Return round(Σ P_i · Q_i + Σ keep_j/(1 − p_j) ⊙ (L_j · F_j)) as a contiguous (M, N) tensor in the dtype
    of the P_i.

    At least one P_i (M, K_i), with Q_i (K_i, N); any number of L_j (M, R_j), with F_j (R_j, N). One dtype,
    fp32, bf16 or fp16, but F_j may be fp32; any strides. keep_j (M, N) is all true without dropout, which has
    one entry for each L_j. unaligned, trigger: as in expand.
    """
    M, N = Ps[0].shape[0], Qs[0].shape[1]
    C = torch.empty((M, N), dtype=Ps[0].dtype, device=Ps[0].device)
    if M == 0 or N == 0:
        return C
    _total(Ps, Qs, Ls, Fs, C, 1.0, dropout, config, unaligned, trigger)
    return C


def shrink_total(
    rows: Sequence[Tensor],
    factors: Sequence[Tensor],
    scaling: float,
    *,
    config: KernelConfig,
) -> Tensor:
    """Return round(scaling · Σ rows_i · factor_i) as a contiguous (M, R) tensor in the dtype of the rows_i.

    rows_i (M, K_i), at least one, of one dtype, fp32, bf16 or fp16; factors (K_i, R) of that dtype or fp32;
    any strides.
    """
    M, R = rows[0].shape[0], factors[0].shape[1]
    out = torch.empty((M, R), dtype=rows[0].dtype, device=rows[0].device)
    if M == 0:
        return out
    _total(rows, factors, (), (), out, scaling, None, config, None, False)
    return out


def _total(
    Ps: Sequence[Tensor],
    Qs: Sequence[Tensor],
    Ls: Sequence[Tensor],
    Fs: Sequence[Tensor],
    C: Tensor,
    scaling: float,
    dropout: Dropout | None,
    config: KernelConfig,
    unaligned: KernelConfig | None,
    trigger: bool,
) -> None:
    Qs, Fs = ([rounded(factor, C.dtype) for factor in factors] for factors in (Qs, Fs))
    precision = input_precision(C.dtype)
    tensors = (*Ps, *Qs, *Ls, *Fs)
    of_tensors = tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
    drops = None if dropout is None else tuple(dropout.offsets)
    # As in expand: two questions.
    by_tma = aligned(*Ps, *Qs), aligned(*Ls, *Fs)
    key = len(Ps), of_tensors, C.dtype, C.device, by_tma, drops, precision, config, unaligned, trigger
    launch, flat = _TOTALS.get(key) or _TOTALS.keep(
        key, _total_launch(Ps, Qs, Ls, Fs, C, dropout, precision, config, unaligned, trigger)
    )
    seeds, thresholds = (None, ()) if dropout is None else dropout.arguments(slice(None))
    scales = () if dropout is None else dropout.scales()
    if flat:
        launch(*tensors, C, seeds, thresholds, scales)
    else:
        launch(tuple(Ps), tuple(Qs), tuple(Ls), tuple(Fs), C, seeds, thresholds, scales, scaling)


def _total_launch(
    Ps: Sequence[Tensor],
    Qs: Sequence[Tensor],
    Ls: Sequence[Tensor],
    Fs: Sequence[Tensor],
    C: Tensor,
    dropout: Dropout | None,
    precision: str,
    config: KernelConfig,
    unaligned: KernelConfig | None,
    trigger: bool,
) -> tuple[Launch, bool]:
    """Return the launch for operands that are like these, and whether it takes them one by one."""
    M, N = C.shape
    limits = device_limits(C.device)
    trigger = trigger and dependent_launch(limits)
    seed_offsets = () if dropout is None else tuple(dropout.offsets)
    if config.variant == "tma":
        # Masks leave no registers for a rank-R step by pointers.
        if total_addressable(Ps, Qs, N) and (dropout is None or addressable(*Ls, *Fs)):
            how = config, limits.num_sms, dropout is not None, seed_offsets, trigger
            return total_tma_launch(Ps, Qs, Ls, Fs, C, *how), True
        config = by_pointers(unaligned)
    widths = tuple(P.shape[1] for P in Ps)
    launch = Launch(
        _total_kernel,
        (blocks_of(M, config.BLOCK_M) * blocks_of(N, config.BLOCK_N),),
        ("P_ptrs", "Q_ptrs", "L_ptrs", "F_ptrs", "C_ptr", "seeds_ptr", "thresholds", "scales", "scaling"),
        dict(
            seed_offsets=seed_offsets,
            M=M,
            N=N,
            widths=widths,
            ranks=tuple(L.shape[1] for L in Ls),
            strides_P_m=tuple(P.stride(0) for P in Ps),
            strides_P_k=tuple(P.stride(1) for P in Ps),
            strides_Q_k=tuple(Q.stride(0) for Q in Qs),
            strides_Q_n=tuple(Q.stride(1) for Q in Qs),
            strides_L_m=tuple(L.stride(0) for L in Ls),
            strides_L_r=tuple(L.stride(1) for L in Ls),
            strides_F_r=tuple(F.stride(0) for F in Fs),
            strides_F_n=tuple(F.stride(1) for F in Fs),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            GROUP_M=config.GROUP_M,
            EVEN_K=all(width % config.BLOCK_K == 0 for width in widths),
            DROPOUT=dropout is not None,
            TRIGGER=trigger,
            INPUT_PRECISION=precision,
            EMULATE_BF16=emulate_bf16(C),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )
    return launch, False
