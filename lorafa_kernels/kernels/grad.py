"""grad: one pass over dy for both gradients that it feeds.

    dz (M, R) = round( s · (dy (M, N) · lora_B (N, R)) )
    dB (N, R) = dyᵀ (N, M) · z (M, R)

This is one of two plans for backward. The other is shrink for dz and this kernel for dB alone (lora_B=None):
it reads dy twice, and writes no partial sums of dz. With R = 32 and BLOCK_N = 128 those partial sums are as
large as dy.

Stage 1: a block owns a strip of BLOCK_N columns × a chunk of rows. It walks the chunk, reads each tile of
dy once, uses it for both products, keeps dB's sum in registers and writes fp32 partial sums: of dz one per
strip, of dB one per chunk. Stage 2 adds the partial sums in a fixed order, so the result has the same bits
in every run, without atomics. A single chunk writes dB itself, so that for few rows dB alone is one launch.

On Hopper dy and z come by TMA (TMA), which leaves more registers to the accumulators, and so wider strips.

For dB alone, which nothing waits for, it can run beside expand (WAIT): launched behind it, as a dependent of
it, with blocks that fit into what expand leaves of a multiprocessor. It writes when expand has ended. Of the
members of a group one kernel follows another in this way (TRIGGER), with as many blocks together as one layer
has; their parts are added when all of them have ended. expand_tma.py explains why that is safe.

Reads dy once (M·N elements); partial sums of ⌈N/BLOCK_N⌉·M·R and chunks·N·R fp32 numbers are written and
read once. 4·M·N·R FLOPs. Bound by memory. Ranks above BLOCK_R are tiled, and dy is then read once per tile
of R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig, row_chunks
from .launch import Block, Launch, Launches, aligned, blocks_of
from .tile import (
    SUM_BLOCK,
    addressable,
    dependent_launch,
    device_limits,
    emulate_bf16,
    gdc_launch_dependents,
    gdc_wait,
    input_precision,
    load,
    offsets,
    round_as,
    store,
    sum_parts,
)


@triton.jit
def _grad_kernel(
    dy_ptr,  # or a descriptor, and z with it
    z_ptr,
    lora_B_ptr,
    dz_parts_ptr,
    dB_parts_ptr,  # or dB itself, if there is one chunk
    M,
    N,
    R,
    chunk_rows,
    stride_dy_m,
    stride_dy_n,
    stride_z_m,
    stride_z_r,
    stride_lora_B_n,
    stride_lora_B_r,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEED_DZ: tl.constexpr,
    TMA: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    if TRIGGER:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = dy_ptr.dtype if TMA else dy_ptr.dtype.element_ty
    strips = tl.cdiv(N, BLOCK_N)
    r_blocks = tl.cdiv(R, BLOCK_R)
    pid = tl.program_id(0)
    strip = pid % strips
    start_r = (pid // strips % r_blocks) * BLOCK_R
    index_r = start_r + tl.arange(0, BLOCK_R)
    chunk = pid // (strips * r_blocks)
    index_n = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = index_n < N
    in_r = (index_r < R)[None, :]

    if NEED_DZ:
        lora_B_ptrs = (
            lora_B_ptr
            + offsets(index_n, stride_lora_B_n)[:, None]
            + offsets(index_r, stride_lora_B_r)[None, :]
        )
        lora_B = round_as(load(lora_B_ptrs, in_n[:, None] & in_r, EMULATE_BF16), DTYPE, EMULATE_BF16)
    dB = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    first = chunk * chunk_rows
    last = min(first + chunk_rows, M)
    for start in range(first, last, BLOCK_M):
        index_m = start + tl.arange(0, BLOCK_M)
        in_m = (index_m < last)[:, None]
        if TMA:
            # Chunks are whole row blocks, so rows beyond this one's are rows beyond M: TMA fills in zeros.
            dy = dy_ptr.load([start, strip * BLOCK_N])
            z = z_ptr.load([start, start_r])
            if EMULATE_BF16:
                dy = dy.to(tl.float32)
                z = z.to(tl.float32)
        else:
            dy_ptrs = dy_ptr + offsets(index_m, stride_dy_m)[:, None] + offsets(index_n, stride_dy_n)[None, :]
            z_ptrs = z_ptr + offsets(index_m, stride_z_m)[:, None] + offsets(index_r, stride_z_r)[None, :]
            dy = load(dy_ptrs, in_m & in_n[None, :], EMULATE_BF16)
            z = load(z_ptrs, in_m & in_r, EMULATE_BF16)
        # dyᵀ on the left: the wide side of the result is the side that the tensor cores tile by 64.
        dB = tl.dot(tl.trans(dy), z, dB, input_precision=INPUT_PRECISION)
        if NEED_DZ:
            dz = tl.dot(dy, lora_B, input_precision=INPUT_PRECISION)
            dz_rows = offsets(strip, M) + index_m
            dz_ptrs = dz_parts_ptr + offsets(dz_rows, R)[:, None] + index_r[None, :]
            tl.store(dz_ptrs, dz, mask=in_m & in_r)

    if WAIT:
        # dB's memory may be that of a kernel which runs still.
        gdc_wait()
    dB_rows = offsets(chunk, N) + index_n
    dB_ptrs = dB_parts_ptr + offsets(dB_rows, R)[:, None] + index_r[None, :]
    store(dB_ptrs, dB, in_n[:, None] & in_r, EMULATE_BF16)


@triton.jit
def _grad_sum_kernel(
    dz_parts_ptr,
    dB_parts_ptr,
    dz_ptr,
    dB_ptr,
    strips,
    chunks,
    dz_count,
    dB_count,
    scaling,
    BLOCK: tl.constexpr,
    NEED_DZ: tl.constexpr,
    NEED_DB: tl.constexpr,
    TRIGGER: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    if TRIGGER:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    # dz first: the next kernel waits for it.
    dz_blocks = tl.cdiv(dz_count, BLOCK) if NEED_DZ else 0
    if pid < dz_blocks:
        if NEED_DZ:
            sum_parts(dz_parts_ptr, dz_ptr, pid, strips, dz_count, scaling, BLOCK, EMULATE_BF16)
    elif NEED_DB:
        sum_parts(dB_parts_ptr, dB_ptr, pid - dz_blocks, chunks, dB_count, 1.0, BLOCK, EMULATE_BF16)


_LAUNCHES = Launches()


def grad(
    dy: Tensor,
    z: Tensor,
    lora_B: Tensor | None,
    scaling: float,
    dB_dtype: torch.dtype,
    *,
    config: KernelConfig,
    pdl: bool = False,
    beside: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Return dz (M, R) contiguous in the dtype of dy, and dB (N, R) contiguous in dB_dtype.

    dy (M, N) and z (M, R) of one dtype, fp32, bf16 or fp16; lora_B (N, R) of that dtype or fp32, or None
    where dz is not wanted (dz is then None); any strides. `pdl`: let the next kernel start early, where the
    device can. `beside`: start while the kernel before runs, where the device can; dz is not wanted then, and
    that kernel, or those before it that it waits for, must not write dy or z.
    """
    M, N = dy.shape
    R = z.shape[1]
    need_dz = lora_B is not None
    dz = torch.empty((M, R), dtype=dy.dtype, device=dy.device) if need_dz else None
    dB = torch.empty((N, R), dtype=dB_dtype, device=dy.device)
    if M == 0 or N == 0:
        return dz.zero_() if need_dz else None, dB.zero_()
    strides = dy.stride(), z.stride(), lora_B.stride() if need_dz else None
    dtypes = dy.dtype, lora_B.dtype if need_dz else None, dB_dtype
    precision = input_precision(dy.dtype)
    key = M, N, R, strides, dtypes, dy.device, aligned(dy, z), config, pdl, beside, precision
    strips, chunks, launch, add = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launches(dy, z, lora_B, dB, config, pdl, beside, False, precision, (N,))
    )
    dz_parts = torch.empty((strips, M, R), dtype=torch.float32, device=dy.device) if need_dz else None
    dB_parts = torch.empty((chunks, N, R), dtype=torch.float32, device=dy.device) if chunks > 1 else dB
    launch(dy, z, lora_B, dz_parts, dB_parts)
    if add is not None:
        add(dz_parts, dB_parts, dz, dB, scaling)
    return dz, dB


def grads_beside(
    dys: Sequence[Tensor], zs: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, config: KernelConfig
) -> list[Tensor]:
    """Return dB_i (N_i, R_i) contiguous in dtypes_i for each dy_i (M, N_i) and z_i (M, R_i).

    At least one; dtypes and strides as in grad. Where the device can, each kernel starts while the one before
    it runs, the first of them beside the kernel that was launched last, as with `beside` in grad. That one,
    or those before it that it waits for, must not write a dy_i or z_i.
    """
    device = dys[0].device
    M, widths = dys[0].shape[0], tuple([dy.shape[1] for dy in dys])
    shapes = zip(widths, zs, dtypes, strict=True)
    dBs = [torch.empty((N, z.shape[1]), dtype=dtype, device=device) for N, z, dtype in shapes]
    if M == 0:
        return [dB.zero_() for dB in dBs]
    precision = input_precision(dys[0].dtype)
    filled = [i for i, N in enumerate(widths) if N]
    sums = []
    for i in filled:
        dy, z, dB = dys[i], zs[i], dBs[i]
        # The one behind the last, of a sum or of whatever comes next, is no dependent launch.
        trigger = i != filled[-1]
        key = M, widths, dB.shape, dy.stride(), z.stride(), dy.dtype, dB.dtype, device, aligned(dy, z), config
        key += trigger, precision
        _, chunks, launch, add = _LAUNCHES.get(key) or _LAUNCHES.keep(
            key, _launches(dy, z, None, dB, config, False, True, trigger, precision, widths)
        )
        parts = torch.empty((chunks, *dB.shape), dtype=torch.float32, device=device) if chunks > 1 else dB
        launch(dy, z, None, None, parts)
        if add is not None:
            sums.append((add, parts, dB))
    for add, parts, dB in sums:
        add(None, parts, None, dB, 1.0)
    return dBs


def _launches(
    dy: Tensor,
    z: Tensor,
    lora_B: Tensor | None,
    dB: Tensor,
    config: KernelConfig,
    pdl: bool,
    beside: bool,
    trigger: bool,
    precision: str,
    widths: tuple[int, ...],
) -> tuple[int, int, Launch, Launch | None]:
    """Return how many strips and chunks there are, and the launches that make and add their parts. widths:
    as in row_chunks.
    """
    (M, N), R = dy.shape, z.shape[1]
    need_dz = lora_B is not None
    tma = config.variant == "tma" and dy.element_size() == 2 and addressable(dy, z)
    limits = device_limits(dy.device)
    strips = blocks_of(N, config.BLOCK_N)
    chunks = row_chunks(config, limits, M, *widths)
    chunk_rows = blocks_of(blocks_of(M, chunks), config.BLOCK_M) * config.BLOCK_M
    chunks = blocks_of(M, chunk_rows)
    emulate = emulate_bf16(dy, lora_B, dB)
    wait = beside and dependent_launch(limits)
    launch = Launch(
        _grad_kernel,
        (strips * blocks_of(R, config.BLOCK_R) * chunks,),
        ("dy_ptr", "z_ptr", "lora_B_ptr", "dz_parts_ptr", "dB_parts_ptr"),
        dict(
            M=M,
            N=N,
            R=R,
            chunk_rows=chunk_rows,
            stride_dy_m=dy.stride(0),
            stride_dy_n=dy.stride(1),
            stride_z_m=z.stride(0),
            stride_z_r=z.stride(1),
            stride_lora_B_n=lora_B.stride(0) if need_dz else 0,
            stride_lora_B_r=lora_B.stride(1) if need_dz else 0,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_R=config.BLOCK_R,
            NEED_DZ=need_dz,
            TMA=tma,
            WAIT=wait,
            TRIGGER=trigger and wait,
            INPUT_PRECISION=precision,
            EMULATE_BF16=emulate,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **({"launch_pdl": True} if wait else {}),
        ),
        {"dy_ptr": Block(config.BLOCK_M, config.BLOCK_N), "z_ptr": Block(config.BLOCK_M, config.BLOCK_R)}
        if tma
        else None,
    )
    blocks = blocks_of(N * R, SUM_BLOCK) * (chunks > 1) + blocks_of(M * R, SUM_BLOCK) * need_dz
    if not blocks:
        return strips, chunks, launch, None
    add = Launch(
        _grad_sum_kernel,
        (blocks,),
        ("dz_parts_ptr", "dB_parts_ptr", "dz_ptr", "dB_ptr", "scaling"),
        dict(
            strips=strips,
            chunks=chunks,
            dz_count=M * R,
            dB_count=N * R,
            BLOCK=SUM_BLOCK,
            NEED_DZ=need_dz,
            NEED_DB=chunks > 1,
            TRIGGER=pdl and dependent_launch(limits),
            EMULATE_BF16=emulate,
            num_warps=4,
        ),
    )
    return strips, chunks, launch, add
