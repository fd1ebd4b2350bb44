"""int8 and fp8 (e4m3): 8 bits for each element of W (N, K) and an fp32 scale for each output channel, a row.

    int8   scale = max |w| / 127    code = round(w / scale)                 w ≈ round(code · scale)
    fp8    scale = max |w| / 448    code = w / scale rounded to e4m3        w ≈ round(code · scale)

The product is computed in fp32 and rounded to the dtype of the weight. A row of zeros has the scale 0. The
bits of fp8 are stored as uint8, so that no cast of a module's floating-point parameters reaches them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Elements that are computed at a time; on a GPU more, where a launch costs more.
_CHUNK, _CHUNK_ON_GPU = 2**20, 2**24
_LARGEST_INT8, _LARGEST_FP8 = 127, 448


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (N, K) int8 and scales (N,) fp32 of a weight (N, K)."""
    return _quantise(weight, _LARGEST_INT8, torch.int8, lambda scaled: scaled.round_().to(torch.int8))


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (N, K), the bits of e4m3 as uint8, and scales (N,) fp32 of a weight (N, K)."""
    return _quantise(
        weight,
        _LARGEST_FP8,
        torch.uint8,
        lambda scaled: scaled.to(torch.float8_e4m3fn).view(torch.uint8),
    )


def _quantise(
    weight: Tensor, largest: int, dtype: torch.dtype, encode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = weight.new_empty(len(weight), dtype=torch.float32)
    for rows in _chunks(weight):
        part = weight[rows].float()
        highest = part.abs().amax(1) if part.shape[1] else part.new_zeros(len(part))
        scales[rows] = scale = highest / largest
        # Where a scale is 0, so is its row. A scale that is denormal may round to less than it was.
        scaled = part / torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
        codes[rows] = encode(scaled.clamp_(-largest, largest))
    return codes, scales


def dequantise_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype, via: torch.dtype) -> Tensor:
    """Return the weight (N, K) in `dtype`, each element rounded to `via` first."""
    return _dequantise(codes, scales, dtype, via)


def dequantise_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype, via: torch.dtype) -> Tensor:
    """Return the weight (N, K) in `dtype`, each element rounded to `via` first."""
    return _dequantise(codes.view(torch.float8_e4m3fn), scales, dtype, via)


def _dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype, via: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in _chunks(codes):
        out[rows] = codes[rows].float().mul_(scales[rows].unsqueeze(1)).to(via)
    return out


def chunk_of(N: int, K: int, on_cpu: bool) -> int:
    """How many elements of a weight (N, K) are computed at a time: those of whole rows."""
    return min(N, max(1, (_CHUNK if on_cpu else _CHUNK_ON_GPU) // max(1, K))) * K


def _chunks(matrix: Tensor) -> list[slice]:
    N, K = matrix.shape
    step = max(1, chunk_of(N, K, matrix.is_cpu) // max(1, K))
    return [slice(first, first + step) for first in range(0, N, step)]
