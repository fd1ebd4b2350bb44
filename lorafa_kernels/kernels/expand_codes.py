"""expand_codes: the product with a quantised weight, whose K loop reads the codes, and the rank-R term.

    C (M, N) = round( P (M, K) · W (N, K)ᵀ + L (M, R) · F (R, N) + bias (N) )

    y (M, N): P = x, L = z, F = lora_Bᵀ, bias; of a frozen layer without L and F

W is never in memory. Each element of a block is made in registers as base.dense() makes it, with the same
bits: round(round(value · scale)) to the dtype of the weight, then to that of P. Values and scales:

    nf4          CODE[4 bits], two in a byte; fp32 absmax for each 64 elements
    nf4-nested   the same, absmax = map[code8] · absmax2 + offset, rounded one by one
    int8, fp8    the code, fp32 scale for each row of W; e4m3 by its bits, which every GPU has

Reads codes and scales once per row of blocks, P once per column of blocks (from L2, but for the first).
2·M·N·(K + R) FLOPs. For few rows: a block makes its part of W anew for each block of rows. Bound by memory,
or by the instructions for an element: eleven of NF4 where 16 rows are multiplied (counted: code for sm_90).
CODE lies in shared memory, where 16 neighbouring words have no conflicts of banks; choosing it by selections,
as dequantise.py does, takes half as many instructions again.

The tile is computed as Cᵀ = W · Pᵀ: the tensor cores of Hopper take 64 or more rows of the first operand, of
which W has enough, and take it from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig
from .dequantise import value_of
from .launch import Launch, Launches, aligned, blocks_of
from .tile import (
    INTERPRETED,
    dependent_launch,
    device_limits,
    gdc_wait,
    load,
    low_rank_step,
    offsets,
    round_as,
    rounded,
    store,
)

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _looked_up(table, code):
    """table[code], in the shape of code."""
    return tl.gather(table, code.reshape(code.numel), 0).reshape(code.shape)


@triton.jit
def _e4m3(bits):
    """The fp32 values of the bits of e4m3: as fp16, which has 4 bits of exponent more, they are 2⁸ times
    smaller, denormal ones too.
    """
    bits = bits.to(tl.int32)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _weight(value, scale, VIA: tl.constexpr, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """round(round(value · scale)) to VIA, then to DTYPE."""
    of_weight = round_as(value * scale, VIA, EMULATE_BF16)
    if VIA == DTYPE:
        return of_weight
    return round_as(of_weight.to(tl.float32), DTYPE, EMULATE_BF16)


@triton.jit
def _expand_codes_kernel(
    P_ptr,
    codes_ptr,
    scale_ptr,
    scale2_ptr,  # of nf4-nested alone, as the next two
    map_ptr,
    offset_ptr,
    L_ptr,
    F_ptr,
    bias_ptr,
    C_ptr,
    M,
    N,
    K,
    R,
    stride_P_m,
    stride_P_k,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KIND: tl.constexpr,
    VIA: tl.constexpr,
    EVEN_K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAIT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = P_ptr.dtype.element_ty
    NF4: tl.constexpr = KIND == "nf4" or KIND == "nf4-nested"
    # Blocks of 64 elements, and bytes of one.
    PARTS: tl.constexpr = BLOCK_K // 64
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (pid % blocks_m) * BLOCK_M
    start_n = (pid // blocks_m) * BLOCK_N
    index_m = start_m + tl.arange(0, BLOCK_M)
    index_n = start_n + tl.arange(0, BLOCK_N)
    index_k = tl.arange(0, BLOCK_K)
    in_m = (index_m < M)[:, None]
    in_n = index_n < N
    P_ptrs = P_ptr + offsets(index_m, stride_P_m)[:, None] + offsets(index_k, stride_P_k)[None, :]
    if NF4:
        table = value_of(tl.arange(0, 16))
        part = tl.arange(0, PARTS)
        first = offsets(index_n, K // 64)
        of_block = tl.arange(0, 32)[None, None, :]
        codes_ptrs = (
            codes_ptr + offsets(index_n, K // 2)[:, None, None] + (part * 32)[None, :, None] + of_block
        )
    else:
        codes_ptrs = codes_ptr + offsets(index_n, K)[:, None] + index_k[None, :]
        scale = tl.load(scale_ptr + index_n, mask=in_n, other=0.0)[:, None]
    if KIND == "nf4-nested":
        offset = tl.load(offset_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            P = load(P_ptrs, in_m, EMULATE_BF16)
        else:
            P = load(P_ptrs, in_m & (index_k < K - start)[None, :], EMULATE_BF16)
        if NF4:
            block = start // 64 + part
            inside = in_n[:, None]
            if not EVEN_K:
                inside = inside & (block < K // 64)[None, :]
            which = first[:, None] + block[None, :]
            pair = tl.load(codes_ptrs, mask=inside[:, :, None], other=0).to(tl.int32)
            if KIND == "nf4-nested":
                code = tl.load(scale_ptr + which, mask=inside, other=0).to(tl.int32)
                scale = tl.load(map_ptr + code) * tl.load(scale2_ptr + which // 256, mask=inside, other=0.0)
                scale = scale + offset
            else:
                scale = tl.load(scale_ptr + which, mask=inside, other=0.0)
            scale = scale[:, :, None]
            high = _weight(_looked_up(table, pair >> 4), scale, VIA, DTYPE, EMULATE_BF16)
            low = _weight(_looked_up(table, pair & 15), scale, VIA, DTYPE, EMULATE_BF16)
            W = tl.join(high, low).reshape(BLOCK_N, BLOCK_K)
            codes_ptrs += BLOCK_K // 2
        else:
            inside = in_n[:, None]
            if not EVEN_K:
                inside = inside & (index_k < K - start)[None, :]
            code = tl.load(codes_ptrs, mask=inside, other=0)
            value = _e4m3(code) if KIND == "fp8" else code.to(tl.float32)
            W = _weight(value, scale, VIA, DTYPE, EMULATE_BF16)
            codes_ptrs += BLOCK_K
        acc = tl.dot(W, P.trans(), acc)
        P_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_P_k)

    if LOW_RANK:
        if WAIT:
            gdc_wait()
        # (L · F)ᵀ = Fᵀ · Lᵀ
        acc = low_rank_step(
            acc,
            F_ptr,
            L_ptr,
            start_n,
            start_m,
            N,
            M,
            R,
            stride_F_n,
            stride_F_r,
            stride_L_r,
            stride_L_m,
            DTYPE,
            BLOCK_N,
            BLOCK_M,
            BLOCK_R,
            TMA=False,
            TRANSPOSED=False,
            STAGES=1,
            INPUT_PRECISION="ieee",
            EMULATE_BF16=EMULATE_BF16,
        )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + index_n, mask=in_n, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    C_ptrs = C_ptr + offsets(index_m, N)[:, None] + index_n[None, :]
    store(C_ptrs, acc.trans(), in_m & in_n[None, :], EMULATE_BF16)


_LAUNCHES = Launches()


def expand_codes(
    P: Tensor,
    kind: str,
    codes: Tensor,
    scale: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    via: torch.dtype,
    L: Tensor | None = None,
    F: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    config: KernelConfig,
    pdl: bool = False,
) -> Tensor:
    """Return round(P · Wᵀ + L · F + bias) as a contiguous (M, N) tensor in the dtype of P.

    P (M, K) bf16 or fp16, L (M, R) of its dtype, F (R, N) of that dtype, or fp32, which takes a launch more;
    any strides; L and F both None for no such term. bias (N,), or None. W (N, K) as `kind` has it, rounded to
    `via` first: codes contiguous, (N, K/2) uint8 of NF4 with K a multiple of 64, (N, K) int8 or uint8 of the
    others; scale (N, K/64) fp32, of nested ones uint8 with nested = (absmax2, map, offset) in fp32, of int8
    and fp8 (N,) fp32. `pdl` as of expand.
    """
    (M, K), N = P.shape, codes.shape[0]
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    if M == 0 or N == 0:
        return C
    if bias is not None:
        bias = bias.contiguous()
    strides = (P.stride(),)
    if L is not None:
        F = rounded(F, P.dtype)
        strides += L.stride(), F.stride()
    there = [t for t in (P, codes, scale, L, F) if t is not None]
    key = M, N, K, strides, P.dtype, via, None if bias is None else bias.dtype, P.device, aligned(*there)
    key += kind, None if L is None else L.shape[1], pdl, config
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(key, _launch(P, kind, N, via, L, F, bias, pdl, config))
    launch(P, codes, scale, *(nested or (None, None, None)), L, F, bias, C)
    return C


def _launch(
    P: Tensor,
    kind: str,
    N: int,
    via: torch.dtype,
    L: Tensor | None,
    F: Tensor | None,
    bias: Tensor | None,
    pdl: bool,
    config: KernelConfig,
) -> Launch:
    """Return the launch for operands that are like these."""
    M, K = P.shape
    wait = L is not None and pdl and dependent_launch(device_limits(P.device))
    of_L, of_F = (L.stride(), F.stride()) if L is not None else ((0, 0), (0, 0))
    return Launch(
        _expand_codes_kernel,
        (blocks_of(M, config.BLOCK_M) * blocks_of(N, config.BLOCK_N),),
        (
            "P_ptr",
            "codes_ptr",
            "scale_ptr",
            "scale2_ptr",
            "map_ptr",
            "offset_ptr",
            "L_ptr",
            "F_ptr",
            "bias_ptr",
            "C_ptr",
        ),
        dict(
            M=M,
            N=N,
            K=K,
            R=0 if L is None else L.shape[1],
            stride_P_m=P.stride(0),
            stride_P_k=P.stride(1),
            stride_L_m=of_L[0],
            stride_L_r=of_L[1],
            stride_F_r=of_F[0],
            stride_F_n=of_F[1],
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            KIND=kind,
            VIA=_DTYPES[via],
            EVEN_K=K % config.BLOCK_K == 0,
            LOW_RANK=L is not None,
            HAS_BIAS=bias is not None,
            WAIT=wait,
            EMULATE_BF16=INTERPRETED and torch.bfloat16 in (P.dtype, via),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # absmax of nested scales is rounded after the product, too.
            enable_fp_fusion=False,
            **({"launch_pdl": True} if wait else {}),
        ),
    )
