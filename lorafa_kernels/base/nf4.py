"""NF4: 4 bits for each element of W (N, K) and one scale for each 64 of them (QLoRA, arXiv 2305.14314).

The elements are taken in row-major order, in blocks of 64; the last block may be shorter.

    absmax = the largest |w| of a block, fp32            code = the index of the nearest CODE to w / absmax
    w ≈ round(CODE[code] · absmax)                        fp32 product, rounded to the dtype of the weight

Two codes make a byte, the first one in its high half; an odd number of elements ends with a half that is not
used. Nested, absmax itself takes 8 bits: absmax ≈ map[code8] · absmax2 + offset, with one absmax2 for each
256 blocks and the mean of all absmax as offset; map is the 8-bit dynamic type of arXiv 2110.02861.

Both are as bitsandbytes stores and computes them, bit for bit. What is computed here is made of PyTorch's own
operators, some blocks at a time, so that temporaries stay small beside the result.
"""

from __future__ import annotations

import functools
import itertools
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
# Source: arXiv 2305.14314, appendix E: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0.
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Blocks that are computed at a time: about 6 MiB of temporaries, on a GPU 100, where a launch costs more.
_CHUNK, _CHUNK_ON_GPU = 2**14, 2**18
# An absmax below it divides as this one does: such a block is zero, or nearly.
_LEAST = 1e-38


def blocks_of(count: int, block: int = BLOCK) -> int:
    """How many blocks hold `count` elements."""
    return -(-count // block)


def _blocks_at_a_time(on_cpu: bool) -> int:
    return _CHUNK if on_cpu else _CHUNK_ON_GPU


def chunk_of(N: int, K: int, on_cpu: bool) -> int:
    """How many elements of a weight (N, K) are computed at a time."""
    return min(N * K, BLOCK * _blocks_at_a_time(on_cpu))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (⌈N·K/2⌉,) uint8 and absmax (⌈N·K/64⌉,) fp32 of a weight of any shape."""
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = flat.new_empty(blocks_of(count, 2), dtype=torch.uint8)
    absmax = flat.new_empty(blocks_of(count), dtype=torch.float32)
    table = torch.tensor(CODE, dtype=torch.float32, device=flat.device)
    bounds = (table[:-1] + table[1:]) / 2
    chunk = _blocks_at_a_time(flat.is_cpu)
    for first in range(0, len(absmax), chunk):
        part = flat[first * BLOCK : (first + chunk) * BLOCK].float()
        missing = -len(part) % BLOCK
        blocks = F.pad(part, (0, missing)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        absmax[first : first + chunk] = largest
        # The reciprocal first: where a quotient lies between two codes it decides.
        scaled = blocks * (1.0 / largest.clamp(min=_LEAST)).unsqueeze(1)
        index = torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8).view(-1)
        pairs = index[: len(part) + len(part) % 2]
        codes[first * BLOCK // 2 : (first + chunk) * BLOCK // 2] = (pairs[::2] << 4) | pairs[1::2]
    return codes, absmax


def dequantise(
    codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype, via: torch.dtype
) -> Tensor:
    """Return the weight (N, K) in `dtype`, of codes (⌈N·K/2⌉,) and absmax (⌈N·K/64⌉,) in any shape; each
    element is rounded to `via` first.
    """
    codes, absmax = codes.reshape(-1), absmax.reshape(-1)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    flat = out.view(-1)
    count = flat.numel()
    # Both halves of a byte by one look-up.
    table = torch.tensor(CODE, dtype=torch.float32, device=codes.device)
    pairs = torch.cartesian_prod(table, table)
    chunk = _blocks_at_a_time(codes.is_cpu)
    for first in range(0, len(absmax), chunk):
        scales = absmax[first : first + chunk]
        part = codes[first * BLOCK // 2 : (first + chunk) * BLOCK // 2]
        target = flat[first * BLOCK : (first + chunk) * BLOCK]
        values = F.embedding(part.int(), pairs).view(-1)
        whole = min(chunk, count // BLOCK - first)
        values[: whole * BLOCK].view(whole, BLOCK).mul_(scales[:whole].unsqueeze(1))
        if whole < len(scales):
            values[whole * BLOCK :] *= scales[whole]
        target.copy_(values[: len(target)].to(via))
    return out


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what stands for absmax (n,): codes (n,) uint8, absmax2 (⌈n/256⌉,) fp32, the map (256,) fp32 and
    the offset (1,) fp32.
    """
    code = dynamic_map().to(absmax.device)
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    rest = absmax - offset
    blocks = F.pad(rest, (0, -len(rest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(1) if len(rest) else rest
    bounds = (code[:-1] + code[1:]) / 2
    scaled = blocks * (1.0 / largest.clamp(min=_LEAST)).unsqueeze(1)
    codes = torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(absmax)].contiguous(), largest, code, offset.view(1)


def unnest(codes: Tensor, absmax2: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """Return absmax (n,) fp32 of what nest returned, codes in any shape."""
    codes = codes.reshape(-1)
    absmax = F.embedding(codes.int(), code.unsqueeze(1)).view(-1)
    # Product and sum are rounded one by one.
    absmax *= absmax2.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return absmax.add_(offset)


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, fp32 in rising order: ±10^(i−6) times the middles of
    2^i equal parts of [0.1, 1] for i = 0 … 6, and 0 and 1.

    Each step is rounded to fp32 as torch.linspace does with fused multiply-adds, whatever this CPU has.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32)


@functools.cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    first, last = _fp32(0.1), 1.0
    for exponent in range(7):
        parts = 2**exponent
        step = _fp32((last - first) / parts)
        # From the nearer end.
        edges = [
            _fp32(first + step * i if i < (parts + 1) // 2 else last - step * (parts - i))
            for i in range(parts + 1)
        ]
        for low, high in itertools.pairwise(edges):
            middle = _fp32(_fp32(10.0 ** (exponent - 6)) * _fp32((low + high) / 2))
            values += [middle, -middle]
    return tuple(sorted(values))


def _fp32(value: float) -> float:
    """The nearest fp32 number."""
    return struct.unpack("f", struct.pack("f", value))[0]
