"""Device helpers that the kernels share, and what launchers need to know about the device.

Every helper takes EMULATE_BF16. It is false in compiled code. Under Triton's interpreter a bf16 product
multiplies raw bit patterns and a cast to bf16 truncates, so there bf16 operands are widened to fp32 right
after the load (exact) and results are rounded to the nearest even bf16 in integers before the cast.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.config import INTERPRETER, DeviceLimits

# Whether a kernel is interpreted is decided when it is decorated: one process does one or the other.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def offsets(index, stride):
    """Element offsets of rows or columns, in 64 bits before the product: a tensor may have more than 2³¹
    elements.
    """
    return index.to(tl.int64) * stride


@triton.jit
def load(pointers, mask, EMULATE_BF16: tl.constexpr):
    """Load a tile, zero where the mask is false."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if EMULATE_BF16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def round_as(value, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Round to DTYPE, to nearest even. Emulated bf16 stays in an fp32 container with the low 16 bits
    cleared.
    """
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # A NaN could carry into the sign or be truncated to infinity.
        return tl.where(value == value, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def store(pointers, value, mask, EMULATE_BF16: tl.constexpr):
    """Round to the pointer's dtype and store."""
    DTYPE: tl.constexpr = pointers.dtype.scalar.element_ty
    tl.store(pointers, round_as(value, DTYPE, EMULATE_BF16).to(DTYPE), mask=mask)


def emulate_bf16(*tensors: Tensor | None) -> bool:
    """Whether EMULATE_BF16 must be set for these operands and results."""
    return INTERPRETED and any(t is not None and t.dtype == torch.bfloat16 for t in tensors)


def input_precision(dtype: torch.dtype) -> str:
    """The precision of fp32 products: IEEE, or TF32 where torch's own matmul setting allows it. 16-bit
    operands ignore it.
    """
    if dtype == torch.float32 and not INTERPRETED and torch.version.hip is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Read what configurations depend on off a device."""
    if INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return DeviceLimits(arch, 64 * 1024, properties.multi_processor_count)
    arch = f"sm_{properties.major}{properties.minor}"
    return DeviceLimits(arch, properties.shared_memory_per_block_optin, properties.multi_processor_count)
