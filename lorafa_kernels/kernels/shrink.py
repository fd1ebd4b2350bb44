"""shrink: the product with the low-rank factor's wide side.

    z  (M, R) = round( s/(1 − p) · ((x (M, K) ⊙ keep (M, K)) · lora_Aᵀ (K, R)) )
    dz (M, R) = round( s · (dy (M, N) · lora_B (N, R)) )

One kernel for both: out = round(scaling · (rows · factor)), with the contraction named K. With dropout
(philox.py) the tiles of `rows` are multiplied with keep, which is made in registers. Reads rows and factor
once per block of rows, writes out: (M·K + ⌈M/BLOCK_M⌉·K·R + M·R) elements, 2·M·K·R FLOPs. Bound by reading
`rows`.

Where rows make fewer blocks than draw the memory's bandwidth, the contraction is cut into `splits` parts:
fp32 partial sums, M·R a part, are written, and a second kernel adds them in a fixed order.

The kernel also rounds the other low-rank factor to the dtype of `rows` for the kernel that comes next (COPY):
that one reads it once per block of its result, and takes it as it is. This is left to programs of their own,
the last ones, so that those with a product keep their registers; reads and writes it once.

Programmatic dependent launch (TRIGGER): the last of these kernels lets the next one on its stream start
early, if that is launched so; expand_tma.py says what that one must wait for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig, split_size
from .launch import Launch, Launches, blocks_of
from .tile import (
    ROUND_BLOCK,
    SUM_BLOCK,
    dependent_launch,
    device_limits,
    drop,
    dropout_arguments,
    emulate_bf16,
    gdc_launch_dependents,
    input_precision,
    keep_tile,
    load,
    offsets,
    round_rows,
    rounded,
    store,
    sum_parts,
)


@triton.jit(do_not_specialize=["seed_ptr", "threshold"])
def _shrink_kernel(
    rows_ptr,
    factor_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    scaling,
    source_ptr,
    copy_ptr,
    M,
    K,
    R,
    copy_rows,
    copy_columns,
    split_k,
    stride_rows_m,
    stride_rows_k,
    stride_factor_k,
    stride_factor_r,
    stride_source_row,
    stride_source_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    COPY: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    COPY_COLUMNS: tl.constexpr,
    TRIGGER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    if TRIGGER:
        gdc_launch_dependents()
    r_blocks = tl.cdiv(R, BLOCK_R)
    pid = tl.program_id(0)
    if COPY:
        blocks = tl.cdiv(M, BLOCK_M) * r_blocks
        if pid >= blocks:
            round_rows(
                source_ptr,
                copy_ptr,
                (pid - blocks) * tl.num_programs(1) + tl.program_id(1),
                copy_rows,
                copy_columns,
                stride_source_row,
                stride_source_column,
                COPY_ROWS,
                COPY_COLUMNS,
                EMULATE_BF16,
            )
            return
    index_m = (pid // r_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    index_r = (pid % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tl.arange(0, BLOCK_K)
    if SPLIT:
        split = tl.program_id(1)
        first = split * split_k
        index_k += first
        last = min(first + split_k, K)
    else:
        first = 0
        last = K
    in_m = (index_m < M)[:, None]
    in_r = (index_r < R)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows_ptrs = rows_ptr + offsets(index_m, stride_rows_m)[:, None] + offsets(index_k, stride_rows_k)[None, :]
    factor_ptrs = (
        factor_ptr + offsets(index_k, stride_factor_k)[:, None] + offsets(index_r, stride_factor_r)[None, :]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            rows = load(rows_ptrs, in_m, EMULATE_BF16)
            factor = load(factor_ptrs, in_r, EMULATE_BF16)
        else:
            in_k = start + tl.arange(0, BLOCK_K) < last
            rows = load(rows_ptrs, in_m & in_k[None, :], EMULATE_BF16)
            factor = load(factor_ptrs, in_k[:, None] & in_r, EMULATE_BF16)
        if DROPOUT:
            rows = drop(rows, keep_tile(seed, threshold, index_m, start, K, BLOCK_K))
        acc = tl.dot(rows, factor, acc, input_precision=INPUT_PRECISION)
        rows_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_rows_k)
        factor_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_factor_k)

    if SPLIT:
        parts_rows = offsets(split, M) + index_m
        parts_ptrs = out_ptr + offsets(parts_rows, R)[:, None] + index_r[None, :]
        tl.store(parts_ptrs, acc, mask=in_m & in_r)
    else:
        out_ptrs = out_ptr + offsets(index_m, R)[:, None] + index_r[None, :]
        store(out_ptrs, acc * scaling, in_m & in_r, EMULATE_BF16)


@triton.jit
def _shrink_sum_kernel(
    parts_ptr,
    out_ptr,
    scaling,
    splits,
    count,
    BLOCK: tl.constexpr,
    TRIGGER: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    if TRIGGER:
        gdc_launch_dependents()
    sum_parts(parts_ptr, out_ptr, tl.program_id(0), splits, count, scaling, BLOCK, EMULATE_BF16)


_LAUNCHES = Launches()


def shrink(
    rows: Tensor,
    factor: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: KernelConfig,
    pdl: bool = False,
    copy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return round(scaling · ((rows ⊙ keep) · factor)) as a contiguous (M, R) tensor in the dtype of rows.

    rows (M, K) fp32, bf16 or fp16; factor (K, R) of that dtype, or fp32, which takes a launch more; both of
    any strides. keep (M, K) is the mask of `seed`, and all true where dropout_p is 0; 1/(1 − dropout_p) is
    for the caller to have in `scaling`. `pdl`: let the next kernel start early, where the device can. `copy`:
    a matrix of any strides, and a contiguous one that its rounded values are written to.
    """
    M, K = rows.shape
    R = factor.shape[1]
    out = torch.empty((M, R), dtype=rows.dtype, device=rows.device)
    if M == 0 or K == 0:
        if copy is not None:
            copy[1].copy_(copy[0])
        return out.zero_()
    factor = rounded(factor, rows.dtype)
    source, target = (None, None) if copy is None else copy
    seed, threshold = dropout_arguments(dropout_p, seed)
    precision = input_precision(rows.dtype)
    strides = rows.stride(), factor.stride()
    of_copy = None if source is None else (source.shape, source.stride(), source.dtype, target.dtype)
    key = M, K, R, strides, rows.dtype, of_copy, rows.device, seed is None, config, pdl, precision
    splits, launch, add = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launches(rows, factor, source, seed is None, config, pdl, precision)
    )
    if add is None:
        launch(rows, factor, out, seed, threshold, scaling, source, target)
        return out
    parts = torch.empty((splits, M, R), dtype=torch.float32, device=rows.device)
    launch(rows, factor, parts, seed, threshold, scaling, source, target)
    add(parts, out, scaling)
    return out


def _launches(
    rows: Tensor,
    factor: Tensor,
    source: Tensor | None,
    keeps_all: bool,
    config: KernelConfig,
    pdl: bool,
    precision: str,
) -> tuple[int, Launch, Launch | None]:
    """Return into how many parts the contraction is cut, and the launches that make and add them; source:
    what is copied; keeps_all: there is no dropout.
    """
    (M, K), R = rows.shape, factor.shape[1]
    trigger = pdl and dependent_launch(device_limits(rows.device))
    split_k = split_size(config, K)
    splits = blocks_of(K, split_k)
    emulate = emulate_bf16(rows, factor)
    blocks = blocks_of(M, config.BLOCK_M) * blocks_of(R, config.BLOCK_R)
    copy_rows, copy_columns = (0, 0) if source is None else source.shape
    stride_source = (0, 0) if source is None else source.stride()
    copy_block = ROUND_BLOCK // config.BLOCK_R
    launch = Launch(
        _shrink_kernel,
        (blocks + blocks_of(blocks_of(copy_rows, copy_block), splits), splits),
        ("rows_ptr", "factor_ptr", "out_ptr", "seed_ptr", "threshold", "scaling", "source_ptr", "copy_ptr"),
        dict(
            M=M,
            K=K,
            R=R,
            copy_rows=copy_rows,
            copy_columns=copy_columns,
            split_k=split_k,
            stride_rows_m=rows.stride(0),
            stride_rows_k=rows.stride(1),
            stride_factor_k=factor.stride(0),
            stride_factor_r=factor.stride(1),
            stride_source_row=stride_source[0],
            stride_source_column=stride_source[1],
            BLOCK_M=config.BLOCK_M,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            EVEN_K=K % config.BLOCK_K == 0,
            SPLIT=splits > 1,
            DROPOUT=not keeps_all,
            COPY=source is not None,
            COPY_ROWS=copy_block,
            COPY_COLUMNS=config.BLOCK_R,
            TRIGGER=trigger and splits == 1,
            INPUT_PRECISION=precision,
            EMULATE_BF16=emulate,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )
    if splits == 1:
        return splits, launch, None
    add = Launch(
        _shrink_sum_kernel,
        (blocks_of(M * R, SUM_BLOCK),),
        ("parts_ptr", "out_ptr", "scaling"),
        dict(
            splits=splits,
            count=M * R,
            BLOCK=SUM_BLOCK,
            TRIGGER=trigger,
            EMULATE_BF16=emulate,
            num_warps=4,
        ),
    )
    return splits, launch, add
