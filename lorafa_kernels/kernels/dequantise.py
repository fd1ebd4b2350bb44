"""dequantise: a weight of NF4 codes by rows, in one launch.

    W (N, K) = round( round( CODE[code] · absmax ) )      to the dtype of W first, then to that of the result

Two codes are in a byte, the first one in its high half; absmax is fp32, one for each 64 elements. Nested it
is map[code8] · absmax2 + offset, absmax2 for each 256 of them. The products are rounded one by one, without a
fused multiply-add, so that every bit is that of base/nf4.py. K is a multiple of 64.

Reads N·K/2 bytes and N·K/16 of scales (nested: N·K/64), writes N·K elements. Bound by memory. CODE is chosen
by the four bits of a code one after another: 15 selections of constants, and no table in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Launches, blocks_of
from .tile import INTERPRETED, offsets, round_as, store

# Bytes of codes that one program takes: eight elements a thread, 16 bytes of a 16-bit result.
BLOCK = 512
NUM_WARPS = 4
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def value_of(code):
    """CODE[code] in fp32 (base/nf4.py)."""
    first, second, third, fourth = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a = tl.where(first, -0.6961928009986877, -1.0)
    b = tl.where(first, -0.39491748809814453, -0.5250730514526367)
    c = tl.where(first, -0.18477343022823334, -0.28444138169288635)
    d = tl.where(first, 0.0, -0.09105003625154495)
    e = tl.where(first, 0.16093020141124725, 0.07958029955625534)
    f = tl.where(first, 0.33791524171829224, 0.24611230194568634)
    g = tl.where(first, 0.5626170039176941, 0.44070982933044434)
    h = tl.where(first, 1.0, 0.7229568362236023)
    a, c = tl.where(second, b, a), tl.where(second, d, c)
    e, g = tl.where(second, f, e), tl.where(second, h, g)
    return tl.where(fourth, tl.where(third, g, e), tl.where(third, c, a))


@triton.jit
def _dequantise_kernel(
    codes_ptr,  # uint8, two codes each
    absmax_ptr,  # fp32; nested uint8
    absmax2_ptr,  # fp32, nested alone, as the next two
    map_ptr,
    offset_ptr,
    out_ptr,
    count,  # of bytes
    NESTED: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    pid = tl.program_id(0)
    index = offsets(pid, BLOCK) + tl.arange(0, BLOCK)
    mask = index < count
    pair = tl.load(codes_ptr + index, mask=mask, other=0).to(tl.int32)
    # 64 elements are 32 bytes.
    block = index // 32
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(map_ptr + code) * tl.load(absmax2_ptr + block // 256, mask=mask, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    high = round_as(value_of(pair >> 4) * scale, VIA, EMULATE_BF16)
    low = round_as(value_of(pair & 15) * scale, VIA, EMULATE_BF16)
    element = offsets(pid, 2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    both = tl.interleave(high.to(tl.float32), low.to(tl.float32))
    store(out_ptr + element, both, element < 2 * offsets(tl.full((), 1, tl.int64), count), EMULATE_BF16)


_LAUNCHES = Launches()


def dequantise(
    codes: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
    via: torch.dtype,
) -> Tensor:
    """Return W (N, K) in `dtype` (fp32, bf16 or fp16), each element rounded to `via` first.

    codes (N, K/2) uint8, contiguous, K a multiple of 64. absmax (N, K/64) fp32; with nested, which is
    (absmax2, map, offset) in fp32, uint8.
    """
    N, half = codes.shape
    out = torch.empty((N, 2 * half), dtype=dtype, device=codes.device)
    count = codes.numel()
    if count == 0:
        return out
    key = count, dtype, via, nested is None, codes.device
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(key, _launch(count, nested is not None, via))
    launch(codes, absmax, *(nested or (None, None, None)), out)
    return out


def serves(dtype: torch.dtype, via: torch.dtype) -> bool:
    """Whether the kernel writes this dtype, rounded to that one first."""
    return dtype in _DTYPES and via in _DTYPES


def _launch(count: int, nested: bool, via: torch.dtype) -> Launch:
    return Launch(
        _dequantise_kernel,
        (blocks_of(count, BLOCK),),
        ("codes_ptr", "absmax_ptr", "absmax2_ptr", "map_ptr", "offset_ptr", "out_ptr"),
        dict(
            count=count,
            NESTED=nested,
            VIA=_DTYPES[via],
            BLOCK=BLOCK,
            EMULATE_BF16=INTERPRETED,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        ),
    )
