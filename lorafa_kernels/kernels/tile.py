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
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import philox
from ..plan.config import INTERPRETER, DeviceLimits, KernelConfig

# Programmatic dependent launch. Kernels name the two instructions only behind a constexpr flag.
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton built for AMD alone
    gdc_launch_dependents = gdc_wait = None

# Elements that one program of a second stage adds up.
SUM_BLOCK = 1024
# Elements that one program rounds: 16 a thread of four warps, fewer registers than shrink's products take
# (measured: compile-gate.json).
ROUND_BLOCK = 2048

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
    """Round to DTYPE, to nearest even. With EMULATE_BF16 the result stays in an fp32 container."""
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # A NaN could carry into the sign or be truncated to infinity.
        return tl.where(value == value, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
    elif EMULATE_BF16:
        # An fp16 operand beside a bf16 factor: the product takes two of one dtype, and load has widened.
        return value.to(DTYPE).to(tl.float32)
    else:
        return value.to(DTYPE)


@triton.jit
def store(pointers, value, mask, EMULATE_BF16: tl.constexpr):
    """Round to the pointer's dtype and store."""
    DTYPE: tl.constexpr = pointers.dtype.scalar.element_ty
    tl.store(pointers, round_as(value, DTYPE, EMULATE_BF16).to(DTYPE), mask=mask)


@triton.jit
def sum_parts(
    parts_ptr, out_ptr, block, parts, count, scaling, BLOCK: tl.constexpr, EMULATE_BF16: tl.constexpr
):
    """out[i] = round(scaling · Σ_p parts[p, i]) for one block of i, adding in the order of p."""
    index = offsets(block, BLOCK) + tl.arange(0, BLOCK)
    mask = index < count
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(0, parts):
        acc += tl.load(
            parts_ptr + offsets(tl.full((), 1, tl.int64) * part, count) + index, mask=mask, other=0.0
        )
    store(out_ptr + index, acc * scaling, mask, EMULATE_BF16)


@triton.jit
def round_rows(
    source_ptr,
    target_ptr,
    block,
    rows,
    columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """target = round(source) for one block of ROWS rows. source (rows, columns) of any strides, target
    contiguous.
    """
    index_row = block * ROWS + tl.arange(0, ROWS)
    in_row = (index_row < rows)[:, None]
    for start in range(0, columns, COLUMNS):
        index_column = start + tl.arange(0, COLUMNS)
        mask = in_row & (index_column < columns)[None, :]
        of_source = offsets(index_row, stride_row)[:, None] + offsets(index_column, stride_column)[None, :]
        of_target = offsets(index_row, columns)[:, None] + index_column[None, :]
        value = load(source_ptr + of_source, mask, EMULATE_BF16)
        store(target_ptr + of_target, value, mask, EMULATE_BF16)


@triton.jit
def keep_tile(seed, threshold, rows, first, columns, BLOCK: tl.constexpr):
    """keep of philox.py for some rows and the columns first to first + BLOCK of a matrix with `columns` of
    them: int1 (rows, BLOCK). seed and threshold: as dropout_arguments gives them, the seed loaded; `first` is
    a multiple of 4, and what lies beyond the matrix means nothing.
    """
    ROWS: tl.constexpr = rows.shape[0]
    # In 64 bits: a counter may pass 2³² where no row does.
    counter = offsets(rows, tl.cdiv(columns, 4))[:, None] + (first // 4 + tl.arange(0, BLOCK // 4))[None, :]
    word_0, word_1, word_2, word_3 = tl.randint4x(seed, counter)
    least = tl.cast(threshold, tl.uint32, bitcast=True)
    # Booleans change their layout here, not words.
    even = tl.join(word_0 >= least, word_2 >= least)
    odd = tl.join(word_1 >= least, word_3 >= least)
    return tl.join(even, odd).reshape(ROWS, BLOCK)


@triton.jit
def drop(tile, keep):
    """tile ⊙ keep. Where keep is false still a product, through which what is not finite propagates."""
    return tl.where(keep, tile, tile * 0)


@triton.jit
def tile_start(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and first column of a tile of C (M, N). Tiles are walked down GROUP_M rows of tiles, then on
    to the next column: so many rows and columns of the operands stay in L2.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * blocks_n)
    rows_in_group = min(blocks_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * blocks_n)
    start_m = (group * GROUP_M + in_group % rows_in_group) * BLOCK_M
    return start_m, (in_group // rows_in_group) * BLOCK_N


@triton.jit
def product(
    acc,
    P_ptr,
    Q_ptr,
    index_m,
    index_n,
    M,
    N,
    K,
    stride_P_m,
    stride_P_k,
    stride_Q_k,
    stride_Q_n,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """acc + P · Q for one tile, P (M, K) and Q (K, N) by pointers. EVEN_K: K is whole blocks."""
    index_k = tl.arange(0, BLOCK_K)
    in_m = (index_m < M)[:, None]
    in_n = (index_n < N)[None, :]
    P_ptrs = P_ptr + offsets(index_m, stride_P_m)[:, None] + offsets(index_k, stride_P_k)[None, :]
    Q_ptrs = Q_ptr + offsets(index_k, stride_Q_k)[:, None] + offsets(index_n, stride_Q_n)[None, :]
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            P = load(P_ptrs, in_m, EMULATE_BF16)
            Q = load(Q_ptrs, in_n, EMULATE_BF16)
        else:
            in_k = index_k < K - start
            P = load(P_ptrs, in_m & in_k[None, :], EMULATE_BF16)
            Q = load(Q_ptrs, in_k[:, None] & in_n, EMULATE_BF16)
        acc = tl.dot(P, Q, acc, input_precision=INPUT_PRECISION)
        P_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_P_k)
        Q_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_Q_k)
    return acc


@triton.jit
def product_tma(
    acc,
    P_desc,
    Q_desc,
    start_m,
    start_n,
    K,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """acc + P · Q for one tile, P (M, K) and Q (K, N) by descriptors. TRANSPOSED: Q is stored (N, K)."""
    for start in range(0, K, BLOCK_K):
        P = P_desc.load([start_m, start])
        Q = Q_desc.load([start_n, start]).T if TRANSPOSED else Q_desc.load([start, start_n])
        if EMULATE_BF16:
            P = P.to(tl.float32)
            Q = Q.to(tl.float32)
        acc = tl.dot(P, Q, acc)
    return acc


@triton.jit
def low_rank_step(
    acc,
    L,  # (M, R) and F (R, N): descriptors with TMA, else pointers
    F,
    start_m,
    start_n,
    M,
    N,
    R,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """acc + L · F for one tile. TRANSPOSED: F is stored (N, R). STAGES: 1 where the main loop's shared memory
    is not free yet; 2 lets both operands travel at once.
    """
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        if TMA:
            L_tile = L.load([start_m, start])
            F_tile = F.load([start_n, start]).T if TRANSPOSED else F.load([start, start_n])
            if EMULATE_BF16:
                L_tile = L_tile.to(tl.float32)
        else:
            index_m = start_m + tl.arange(0, BLOCK_M)
            index_n = start_n + tl.arange(0, BLOCK_N)
            index_r = start + tl.arange(0, BLOCK_R)
            in_r = index_r < R
            L_ptrs = L + offsets(index_m, stride_L_m)[:, None] + offsets(index_r, stride_L_r)[None, :]
            F_ptrs = F + offsets(index_r, stride_F_r)[:, None] + offsets(index_n, stride_F_n)[None, :]
            L_tile = load(L_ptrs, (index_m < M)[:, None] & in_r[None, :], EMULATE_BF16)
            F_tile = load(F_ptrs, in_r[:, None] & (index_n < N)[None, :], EMULATE_BF16)
        F_tile = round_as(F_tile, DTYPE, EMULATE_BF16)
        acc = tl.dot(L_tile, F_tile, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Return the seed and the threshold (philox.py) as kernels take them: None for p = 0, which leaves no
    trace in the compiled code; else the int64 tensor of shape (1,), to be loaded, and the word as a signed
    number of 32 bits.

    Kernels do not specialise on the two: p and where the seed lies change no code.
    """
    if not dropout_p:
        return None, None
    if seed is None:
        raise ValueError(f"dropout of {dropout_p} needs a seed, an int64 tensor of shape (1,)")
    word = philox.threshold(dropout_p)
    return seed, word - (1 << 32) if word >= 1 << 31 else word


def keep_scale(dropout_p: float) -> float | None:
    """Return 1/(1 − p), which a kept element of a rank-R term is multiplied with in fp32; None for p = 0."""
    return 1 / (1 - dropout_p) if dropout_p else None


def rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor in the dtype of the rows that it is multiplied with, to nearest even: once, before a
    kernel that would convert each block of it again in each of its programs.
    """
    return factor if factor.dtype == dtype else factor.to(dtype)


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


def dependent_launch(limits: DeviceLimits) -> bool:
    """Whether a kernel can be launched while the one before it runs: on NVIDIA GPUs from sm_90 on."""
    return limits.dependent_launch and gdc_wait is not None and not INTERPRETED


def addressable(*tensors: Tensor) -> bool:
    """Whether TMA can address these matrices: rows contiguous and at multiples of 16 bytes, none of them
    overlapping, sizes within 32 bits.
    """
    for t in tensors:
        rows, columns = t.shape
        stride, step = t.stride()
        bytes_apart = stride * t.element_size()
        if step != 1 or stride < columns or bytes_apart % 16 or bytes_apart >= 1 << 40:
            return False
        if t.data_ptr() % 16 or not 0 < rows < 1 << 31 or not 0 < columns < 1 << 31:
            return False
    return True


def by_pointers(config: KernelConfig | None) -> KernelConfig:
    """Return the configuration for operands that TMA cannot address. Raises ValueError for None."""
    if config is None:
        raise ValueError("TMA cannot address these operands, and no configuration is given for such")
    return config


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return what a kernel takes blocks of `rows` × `columns` of an addressable matrix by. Made by the host
    for one launch, it needs no memory on the device, so streams and threads have nothing to share.
    """
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, columns])
