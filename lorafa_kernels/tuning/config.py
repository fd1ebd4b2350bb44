"""Kernel configurations and the pure function that picks one from shapes and device limits.

Nothing here imports Triton or touches a device, so every choice can be made, listed and compiled on a
machine without a GPU.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

OPS = ("shrink", "expand", "grad")
# Rank blocks above this leave the grad kernel no registers for its dB accumulator; larger ranks are tiled.
MAX_BLOCK_R = 128
# The tensor cores contract at least 16 16-bit elements, and tl.dot asks for 16 rows and columns.
MIN_BLOCK = 16


@dataclass(frozen=True)
class KernelConfig:
    """Block sizes in elements and launch parameters of one kernel.

    BLOCK_M rows of x or dy; BLOCK_N output columns of expand, or columns of dy in grad; BLOCK_K the
    contraction block of shrink and expand; BLOCK_R the rank block; GROUP_M row blocks that expand visits
    together for reuse in L2. Unused sizes are 0.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DeviceLimits:
    """What a configuration depends on: `arch` as in Triton's target ("sm_90", "gfx942", "cpu" for the
    interpreter), shared memory
    that one block may use in bytes, and the number of multiprocessors."""

    arch: str
    shared_memory: int
    num_sms: int

    @property
    def family(self) -> str:
        """The group of architectures that share their defaults."""
        if self.arch.startswith("gfx"):
            return "amd"
        number = re.match(r"sm_(\d+)", self.arch)
        if not number:
            return "interpreter"
        # Consumer Blackwell (sm_120) has Ampere's tensor core instructions and little shared memory.
        return {9: "hopper", 10: "blackwell"}.get(int(number[1]) // 10, "ampere")


# Published limits, for compiling without the device. num_sms only decides how many blocks grad splits its
# rows into.
KNOWN_DEVICES = {
    "sm_80": DeviceLimits("sm_80", 163 * 1024, 108),
    "sm_86": DeviceLimits("sm_86", 99 * 1024, 84),
    "sm_89": DeviceLimits("sm_89", 99 * 1024, 128),
    "sm_90": DeviceLimits("sm_90", 227 * 1024, 132),
    "sm_100": DeviceLimits("sm_100", 227 * 1024, 148),
    "sm_120": DeviceLimits("sm_120", 99 * 1024, 170),
    "gfx942": DeviceLimits("gfx942", 64 * 1024, 304),
}
INTERPRETER = DeviceLimits("cpu", 1 << 30, 2)


def rows_aligned(operand_bytes: int, *sizes: int) -> bool:
    """Whether rows of `sizes` elements all start at multiples of 16 bytes in a contiguous tensor."""
    return all(size * operand_bytes % 16 == 0 for size in sizes)


def default_config(
    op: str, limits: DeviceLimits, operand_bytes: int, M: int, R: int, aligned: bool = True
) -> KernelConfig:
    """Return the default configuration of kernel `op` for x or dy with M rows of `operand_bytes`-byte
    elements and rank R; `aligned` is rows_aligned of the wide sizes.

    A pure function. Any device gets an answer: an unknown one that of the nearest family, with fewer
    pipeline stages and then smaller rank blocks until what is in flight fits its shared memory. Raises
    ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"unknown kernel {op!r}: one of {', '.join(OPS)}")
    family = limits.family
    if family == "interpreter":
        config = _interpreter_config(op)
    elif operand_bytes >= 4:
        config = _fp32_config(op)
    else:
        config = _half_config(op, family, M, R, aligned)
    config = replace(config, BLOCK_R=min(config.BLOCK_R, max(MIN_BLOCK, _next_power_of_2(R))))
    while shared_memory(op, config, operand_bytes, limits) > limits.shared_memory:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.BLOCK_R > MIN_BLOCK:
            config = replace(config, BLOCK_R=config.BLOCK_R // 2)
        else:
            break
    return config


def row_chunks(config: KernelConfig, limits: DeviceLimits, M: int, N: int) -> int:
    """Return into how many chunks grad splits its M rows: enough blocks to fill the device a few times, at
    least one row block each.
    """
    strips = -(-N // config.BLOCK_N)
    wanted = -(-4 * limits.num_sms // strips)
    return max(1, min(wanted, -(-M // config.BLOCK_M)))


def shared_memory(op: str, config: KernelConfig, operand_bytes: int, limits: DeviceLimits) -> int:
    """Estimate the shared memory in bytes that a kernel needs: the blocks in flight and what is kept beside.

    An upper estimate for operands of `operand_bytes` and a low-rank factor in fp32; the compile gate holds it
    against the compiler.
    """
    M, N, K, R = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    # Hopper's and Blackwell's tensor cores read 16-bit operands from shared memory; elsewhere the block in
    # use is in registers already. TF32 makes copies of fp32 operands.
    from_shared = limits.family in ("hopper", "blackwell")
    all_stages = from_shared or operand_bytes >= 4
    stages = config.num_stages if all_stages else max(1, config.num_stages - 1)
    barriers = 64 if from_shared else 0
    if op == "shrink":
        rounded_factor = K * R * operand_bytes
        return stages * K * (M * operand_bytes + R * 4) + rounded_factor + barriers
    if op == "expand":
        loop = stages * K * (M + N) * operand_bytes
        after_loop = max(R * (M * operand_bytes + N * 4), M * N * operand_bytes)
        return max(loop, after_loop) + barriers
    loop = stages * M * (N + R) * operand_bytes
    lora_B = 0 if limits.family == "amd" else N * R * operand_bytes
    dz = M * R * 4
    return loop + lora_B + dz + barriers


def all_default_configs(
    op: str, limits: DeviceLimits, operand_bytes: int
) -> dict[KernelConfig, tuple[int, int, bool]]:
    """Return every configuration that default_config can return for this kernel, device and operand size.

    Each comes with an (M, R, aligned) that it is returned for.
    """
    rows = (8192, 1 << 20, 513, 512, 129, 128, 65, 64, 1)
    ranks = (256, 129, 128, 65, 64, 33, 32, 17, 16, 1)
    found: dict[KernelConfig, tuple[int, int, bool]] = {}
    for aligned, M, R in itertools.product((True, False), rows, ranks):
        found.setdefault(default_config(op, limits, operand_bytes, M, R, aligned), (M, R, aligned))
    return found


def _half_config(op: str, family: str, M: int, R: int, aligned: bool) -> KernelConfig:
    amd = family == "amd"
    num_warps = 4 if R <= 32 else 8
    if op == "shrink":
        # A factor's block of 128 × 128 spills on sm_80 and sm_90, one of 128 × 64 on sm_80.
        BLOCK_K = 64 if amd or R > 64 or (R > 32 and family == "ampere") else 128
        return KernelConfig(64, 0, BLOCK_K, MAX_BLOCK_R, 1, num_warps, 2 if amd else 3)
    if op == "grad":
        # dB's accumulator is BLOCK_N × BLOCK_R fp32 in registers; a wider strip means fewer partial sums of
        # dz to write. Ampere holds the operands of both products in registers too and spills at 128 × 128.
        BLOCK_N = 64 if family == "ampere" and R > 64 else 128
        if family == "blackwell" and R <= 64:
            # The accumulators are in tensor memory; ptxas squeezes eight warps into 64 registers and spills.
            num_warps = 4
        return KernelConfig(64, BLOCK_N, 0, MAX_BLOCK_R, 1, num_warps, 2 if amd else 3)
    if not aligned:
        # Such rows cannot be copied asynchronously: they pass through registers, and larger blocks spill.
        return KernelConfig(64, 64, 32, 64, 8, 4, 2)
    if M <= 64:
        return KernelConfig(64, 64, 64 if amd else 128, 64, 8, 4, 2 if amd else 3)
    if amd:
        return KernelConfig(128, 128, 64, 64, 8, 8, 2)
    if M <= 512 or family == "ampere":
        return KernelConfig(128, 128, 64, 64, 8, 8, 3)
    return KernelConfig(128, 256, 64, 64, 8, 8, 3)


def _fp32_config(op: str) -> KernelConfig:
    # IEEE fp32 products run on the ordinary arithmetic units, which need registers rather than deep
    # pipelines.
    if op == "shrink":
        return KernelConfig(32, 0, 32, 32, 1, 4, 2)
    if op == "grad":
        return KernelConfig(64, 64, 0, 32, 1, 8, 2)
    return KernelConfig(64, 64, 16, 16, 8, 4, 2)


def _interpreter_config(op: str) -> KernelConfig:
    # The interpreter pays per operation, not per element: large blocks.
    if op == "shrink":
        return KernelConfig(128, 0, 128, MAX_BLOCK_R, 1, 4, 1)
    if op == "grad":
        return KernelConfig(64, 128, 0, MAX_BLOCK_R, 1, 4, 1)
    return KernelConfig(128, 128, 128, MAX_BLOCK_R, 4, 4, 1)


def _next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
