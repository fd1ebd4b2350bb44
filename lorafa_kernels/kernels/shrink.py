"""shrink: the product with the low-rank factor's wide side.

    z  (M, R) = round( s · (x (M, K) · lora_Aᵀ (K, R)) )
    dz (M, R) = round( s · (dy (M, N) · lora_B (N, R)) )

One kernel for both: out = round(s · (rows · factor)), with the contraction named K. Reads rows and factor
once per block of rows, writes out: (M·K + ⌈M/BLOCK_M⌉·K·R + M·R) elements, 2·M·K·R FLOPs. Bound by reading
`rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.config import default_config
from .tile import device_limits, emulate_bf16, input_precision, load, offsets, round_as, store


@triton.jit
def _shrink_kernel(
    rows_ptr,
    factor_ptr,
    out_ptr,
    scaling,
    M,
    K,
    R,
    stride_rows_m,
    stride_rows_k,
    stride_factor_k,
    stride_factor_r,
    stride_out_m,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    r_blocks = tl.cdiv(R, BLOCK_R)
    pid = tl.program_id(0)
    index_m = (pid // r_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    index_r = (pid % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tl.arange(0, BLOCK_K)
    in_m = (index_m < M)[:, None]
    in_r = (index_r < R)[None, :]

    rows_ptrs = rows_ptr + offsets(index_m, stride_rows_m)[:, None] + offsets(index_k, stride_rows_k)[None, :]
    factor_ptrs = (
        factor_ptr + offsets(index_k, stride_factor_k)[:, None] + offsets(index_r, stride_factor_r)[None, :]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            rows = load(rows_ptrs, in_m, EMULATE_BF16)
            factor = load(factor_ptrs, in_r, EMULATE_BF16)
        else:
            in_k = index_k < K - start
            rows = load(rows_ptrs, in_m & in_k[None, :], EMULATE_BF16)
            factor = load(factor_ptrs, in_k[:, None] & in_r, EMULATE_BF16)
        factor = round_as(factor, DTYPE, EMULATE_BF16)
        acc = tl.dot(rows, factor, acc, input_precision=INPUT_PRECISION)
        rows_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_rows_k)
        factor_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_factor_k)

    out_ptrs = out_ptr + offsets(index_m, stride_out_m)[:, None] + index_r[None, :]
    store(out_ptrs, acc * scaling, in_m & in_r, EMULATE_BF16)


def shrink(rows: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """Return round(scaling · (rows · factor)) as a contiguous (M, R) tensor in the dtype of rows.

    rows (M, K) fp32, bf16 or fp16; factor (K, R) of that dtype or fp32; both of any strides.
    """
    M, K = rows.shape
    R = factor.shape[1]
    out = torch.empty((M, R), dtype=rows.dtype, device=rows.device)
    if M == 0:
        return out
    config = default_config("shrink", device_limits(rows.device), rows.element_size(), M, R)
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(R, config.BLOCK_R),)
    _shrink_kernel[grid](
        rows,
        factor,
        out,
        scaling,
        M,
        K,
        R,
        rows.stride(0),
        rows.stride(1),
        factor.stride(0),
        factor.stride(1),
        out.stride(0),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        EVEN_K=K % config.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(rows.dtype),
        EMULATE_BF16=emulate_bf16(rows, factor),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
