"""Kernel configurations, device limits, and what follows from them: validity, shared memory, parts, chunks.

Nothing here imports Triton or touches a device. Which configuration a kernel takes is in defaults.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

OPS = ("shrink", "expand", "grad")
VARIANTS = ("portable", "tma", "recompute", "codes", "ws", "ws_z")
# Least block: tl.dot asks for 16 rows and columns, the tensor cores contract 16 16-bit elements (published:
# Triton's documentation, PTX ISA).
MIN_BLOCK = 16
# What a configuration that somebody wrote down may hold (published): a tensor of Triton's has at most 2**20
# elements, a box of TMA 256 rows and columns, a block of threads 32 warps. Stages and parts: an estimate.
MOST_BLOCK = 1024
MOST_TMA_BLOCK = 256
MOST_WARPS = 32
MOST_STAGES = 16
MOST_PARTS = 1024
# What the kernels of expand_ws.py and expand_ws_z.py are written for, beside at least two stages, and fp32
# sums of a tile, of a tile with its rows of z, that fill so many registers of their 256 threads at most
# (measured: the compile gate's spills, compile-gate-ws.json).
WS_SIZES = {
    "BLOCK_M": (128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "BLOCK_R": (16, 32, 64, 128),
    "num_warps": (8,),
    "ctas_per_sm": (1,),
}
WS_SUMS = {"ws": 128, "ws_z": 144}
# Elements of a weight of NF4 that share a scale, which expand_codes.py takes at least (base/nf4.py).
CODES_BLOCK = 64
# Members whose dx the kernel of group_tma.py takes. Triton 3.6.0 and 3.7.1 cannot launch a kernel that takes
# a tuple of descriptors: those of each member are arguments of their own.
TMA_MEMBERS = 4
# Row blocks up to which grad is one chunk and dB needs no partial sums (estimate).
DIRECT_BLOCKS = 4


@dataclass(frozen=True)
class KernelConfig:
    """Block sizes in elements and launch parameters of one kernel.

    BLOCK_M rows of x or dy; BLOCK_N output columns of expand, or columns of dy in grad; BLOCK_K the
    contraction block of shrink and expand; BLOCK_R the rank block; GROUP_M row blocks that expand visits
    together for reuse in L2. Unused sizes are 0.

    variant: "portable"; "tma", for Hopper: the persistent kernel of expand, and grad with its loads by TMA;
    "recompute", expand alone: for few rows, it makes z or dz itself, in one launch, and shrink is not called;
    "codes", expand alone, for few rows of 16 bits on a quantised weight: it reads the codes of that
    (expand_codes.py), and no dense weight is made;
    "ws" and "ws_z", expand on sm_90 alone: a warp for each kind of work (expand_ws.py), num_warps of them for
    products; "ws_z" makes z or dz itself, too (expand_ws_z.py).
    EPILOGUE_SUBTILE, expand by TMA: into how many parts (1, 2 or 4) a tile of the result is cut on its way
    out. ctas_per_sm, tma alone: blocks per multiprocessor in the grid. SPLIT_K, shrink alone: the most parts
    that the contraction is cut into.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    variant: str = "portable"
    SPLIT_K: int = 1
    EPILOGUE_SUBTILE: int = 1
    ctas_per_sm: int = 1

    @property
    def makes_low_rank(self) -> bool:
        """Whether it is of an expand that makes z or dz itself: no shrink is called."""
        return self.variant in ("recompute", "ws_z")

    @property
    def reads_codes(self) -> bool:
        """Whether it is of an expand that takes a quantised weight as it is."""
        return self.variant == "codes"


@dataclass(frozen=True)
class KernelPlan:
    """How the kernels compute one layer's forward or backward. None: the heuristic default of the kernel.

    one_pass: dz and dB from one pass over dy (grad), or from one each (shrink, then grad for dB alone). pdl:
    expand is launched while the kernel before it still runs (programmatic dependent launch); a device without
    it ignores it. beside: backward without one_pass and with pdl launches grad last, of a group one for each
    member, to run beside expand, since nothing waits for dB.
    """

    shrink: KernelConfig | None = None
    expand: KernelConfig | None = None
    grad: KernelConfig | None = None
    one_pass: bool = True
    pdl: bool = True
    beside: bool = False


@dataclass(frozen=True)
class DeviceLimits:
    """What a configuration depends on: `arch` as in Triton's target ("sm_90", "gfx942", "cpu" for the
    interpreter), shared memory
    that one block may use in bytes, and the number of multiprocessors."""

    arch: str
    shared_memory: int
    num_sms: int

    @functools.cached_property
    def family(self) -> str:
        """The group of architectures that share their defaults."""
        if self.arch.startswith("gfx"):
            return "amd"
        number = re.match(r"sm_(\d+)", self.arch)
        if not number:
            return "interpreter"
        # Consumer Blackwell (sm_120) has Ampere's tensor core instructions and little shared memory.
        return {9: "hopper", 10: "blackwell"}.get(int(number[1]) // 10, "ampere")

    @functools.cached_property
    def dependent_launch(self) -> bool:
        """Whether a kernel can be launched while the one before it runs."""
        number = re.match(r"sm_(\d+)", self.arch)
        return number is not None and int(number[1]) >= 90


# Limits for compiling without the device (published: the makers' programming guides). num_sms only decides
# into how many blocks grad splits its rows.
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


# The block sizes that a kernel reads, and the variants it has.
_BLOCKS = {
    "shrink": ("BLOCK_M", "BLOCK_K", "BLOCK_R"),
    "expand": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"),
    "grad": ("BLOCK_M", "BLOCK_N", "BLOCK_R"),
}
_VARIANTS = {"shrink": ("portable",), "expand": VARIANTS, "grad": ("portable", "tma")}


def wrong_field(op: str, config: KernelConfig) -> str | None:
    """Return the name of a field of a configuration with which kernel `op` cannot be launched on any device,
    or None. A pure function, for configurations that a person or a file gives.
    """
    if not isinstance(config.variant, str) or config.variant not in _VARIANTS[op]:
        return "variant"

    def counts(name: str, most: int) -> bool:
        value = getattr(config, name)
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    def power_of_2(name: str, most: int) -> bool:
        return counts(name, most) and getattr(config, name).bit_count() == 1

    most_block = MOST_TMA_BLOCK if config.variant in ("tma", *WS_SUMS) else MOST_BLOCK
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"):
        value = getattr(config, name)
        unused = name not in _BLOCKS[op] and value == 0 and not isinstance(value, bool)
        if not unused and not (power_of_2(name, most_block) and value >= MIN_BLOCK):
            return name
    if config.reads_codes and config.BLOCK_K < CODES_BLOCK:
        return "BLOCK_K"
    if not power_of_2("num_warps", MOST_WARPS):
        return "num_warps"
    for name, most in (
        ("num_stages", MOST_STAGES),
        ("GROUP_M", MOST_PARTS),
        ("SPLIT_K", MOST_PARTS),
        ("ctas_per_sm", MOST_WARPS),
    ):
        if not counts(name, most):
            return name
    if not power_of_2("EPILOGUE_SUBTILE", 4):
        return "EPILOGUE_SUBTILE"
    return _wrong_for_ws(config) if config.variant in WS_SUMS else None


def _wrong_for_ws(config: KernelConfig) -> str | None:
    for name, sizes in WS_SIZES.items():
        if getattr(config, name) not in sizes:
            return name
    columns = config.BLOCK_N + (config.BLOCK_R if config.variant == "ws_z" else 0)
    if config.BLOCK_M * columns > WS_SUMS[config.variant] * 32 * config.num_warps:
        return "BLOCK_N"
    # A slot of the ring is given back while the next product runs from another one.
    return "num_stages" if config.num_stages < 2 else None


def low_rank_block(config: KernelConfig, by_tma: bool) -> int:
    """Return the rank block of an expand by TMA: where L and F come by pointers, the least one, since a wider
    one passes through more registers than are left (measured: compile-gate.json).
    """
    return config.BLOCK_R if by_tma else min(config.BLOCK_R, MIN_BLOCK)


def rows_aligned(operand_bytes: int, *sizes: int) -> bool:
    """Whether rows of `sizes` elements all start at multiples of 16 bytes in a contiguous tensor."""
    return all(size * operand_bytes % 16 == 0 for size in sizes)


def makes_mask(op: str, forward: bool, config: KernelConfig) -> bool:
    """Whether kernel `op` in this configuration makes the mask where there is dropout: in forward shrink, in
    backward expand, in both an expand that makes z or dz itself.
    """
    if op == "expand":
        return config.makes_low_rank or not forward
    return op == "shrink" and forward


def row_chunks(config: KernelConfig, limits: DeviceLimits, M: int, *widths: int) -> int:
    """Return into how many chunks grad splits its M rows: one for few rows, else enough blocks to fill the
    device, once with TMA and a few times without, at least one row block each. widths: the columns of all
    matrices whose blocks are to fill it together.
    """
    row_blocks = -(-M // config.BLOCK_M)
    if row_blocks <= DIRECT_BLOCKS:
        return 1
    strips = max(1, sum(-(-N // config.BLOCK_N) for N in widths))
    if config.variant == "tma":
        # What runs at once: a block's stages keep the memory busy, and each chunk has partial sums to write.
        wanted = config.ctas_per_sm * limits.num_sms // strips
    else:
        wanted = -(-4 * limits.num_sms // strips)
    return max(1, min(wanted, row_blocks))


def split_size(config: KernelConfig, K: int) -> int:
    """Return how many of the K contracted elements one part of shrink takes: a multiple of BLOCK_K, at least
    two blocks where there is more than one part.
    """
    parts = max(1, min(config.SPLIT_K, K // (2 * config.BLOCK_K)))
    blocks = -(-K // (parts * config.BLOCK_K))
    return max(1, blocks) * config.BLOCK_K


def bytes_in_flight(
    config: KernelConfig, limits: DeviceLimits, operand_bytes: int, M: int, K: int, R: int
) -> float:
    """Return how many bytes shrink has under way, on average on each multiprocessor:

        (num_stages − 1) · BLOCK_K · (BLOCK_M + BLOCK_R) · operand_bytes · blocks that run at once / num_sms

    since one stage is in use. By Little's law 15 to 21 KB draw the 3.0 to 4.3 TB/s that a copy reaches on an
    H100 or H200 of 132 multiprocessors, at a latency of 0.65 µs (measured, and published).
    """
    size = split_size(config, K)
    blocks = -(-M // config.BLOCK_M) * -(-R // config.BLOCK_R) * -(-K // size)
    # Each block takes another KB.
    of_block = shared_memory("shrink", config, operand_bytes, limits) + 1024
    resident = (limits.shared_memory + 1024) // of_block
    columns = min((config.num_stages - 1) * config.BLOCK_K, size)
    under_way = columns * (config.BLOCK_M + config.BLOCK_R) * operand_bytes
    return under_way * min(blocks, resident * limits.num_sms) / limits.num_sms


def shared_memory(
    op: str, config: KernelConfig, operand_bytes: int, limits: DeviceLimits, dropout: bool = False
) -> int:
    """Estimate the shared memory in bytes that a kernel needs: the blocks in flight and what is kept beside.

    An upper estimate for operands of `operand_bytes`, and for grad and recompute a low-rank factor in fp32;
    the compile gate holds it against the compiler.
    """
    M, N, K, R = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    # Hopper's and Blackwell's tensor cores read 16-bit operands from shared memory; elsewhere the block in
    # use is in registers already. TF32 makes copies of fp32 operands.
    from_shared = limits.family in ("hopper", "blackwell")
    all_stages = from_shared or operand_bytes >= 4
    stages = config.num_stages if all_stages else max(1, config.num_stages - 1)
    barriers = 64 if from_shared else 0
    masked_rows = M * K * operand_bytes if dropout else 0
    if op == "shrink":
        # The result changes its layout on its way out, where the operands were.
        return max(stages * K * (M + R) * operand_bytes + masked_rows, 4 * M * R) + barriers
    if config.variant == "recompute":
        return (stages * (M + N) + R) * K * operand_bytes + stages * K * R * 4 + masked_rows + barriers
    if config.reads_codes:
        # Codes of a byte each, scales, and CODE, which other numbers of a block pass through too; the weight
        # on its way to tensor cores that do not take it from registers. The result changes its layout.
        loop = stages * K * (M * operand_bytes + N) + stages * N * 4 * max(1, K // CODES_BLOCK)
        return max(loop + N * K * operand_bytes, R * (M + N) * operand_bytes, 4 * M * N) + 1024
    if config.variant in WS_SUMS:
        # Ring, rank-R operands, a part of the result, bias in fp32, and barriers.
        rank_rows = R if config.variant == "ws_z" else 0
        ring = config.num_stages * K * (M + N + rank_rows) + R * (M + N)
        return (ring + M * N // config.EPILOGUE_SUBTILE) * operand_bytes + 4 * N + 1024
    if op == "expand" and config.variant == "tma":
        # The result's buffer lives through the loop over tiles; the rank-R step has two stages of its own.
        loop = config.num_stages * K * (M + N) * operand_bytes
        after_loop = 2 * R * (M + N) * operand_bytes
        # The barriers of the loop over rank blocks lie apart.
        barriers += 1024
        return max(loop, after_loop) + M * N * operand_bytes // config.EPILOGUE_SUBTILE + barriers
    if op == "expand":
        loop = stages * K * (M + N) * operand_bytes
        after_loop = max(R * (M + N), M * N) * operand_bytes
        return max(loop, after_loop) + barriers
    loop = stages * M * (N + R) * operand_bytes
    lora_B = 0 if limits.family == "amd" else N * R * operand_bytes
    dz = M * R * 4
    return loop + lora_B + dz + barriers
