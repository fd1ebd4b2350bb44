"""Kernel configurations and the pure function that picks one from shapes and device limits.

Nothing here imports Triton or touches a device, so every choice can be made, listed and compiled on a
machine without a GPU.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, replace

OPS = ("shrink", "expand", "grad")
VARIANTS = ("portable", "tma", "recompute", "ws", "ws_z")
# Largest rank block: above it grad has no registers for dB's accumulator (measured: the compile gate's
# spills, bench/results/compile-gate.json). Larger ranks are tiled.
MAX_BLOCK_R = 128
# Most rank columns that one pass over x takes of all members of a group, on Hopper (measured: the compile
# gate's spills, compile-gate-groups.json).
MAX_GROUP_R = 192
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
# Rows and rank up to which expand makes z or dz itself: one launch where a launch costs more than the
# repeated work (estimate).
RECOMPUTE_ROWS = 128
RECOMPUTE_RANK = 64
# Rows up to which shrink cuts its contraction, and into how many parts (estimate).
SPLIT_ROWS = 512
SPLITS = 16
# Row blocks up to which grad is one chunk and dB needs no partial sums (estimate).
DIRECT_BLOCKS = 4
# Bytes of shared memory and registers that one multiprocessor of sm_90 has left beside expand's 180 KB and
# 176 registers a thread (measured: compile-gate.json): what keeps within them overlaps expand.
OVERLAP_SHARED_MEMORY = 45 * 1024
OVERLAP_REGISTERS = 65536 - 256 * 176


@dataclass(frozen=True)
class KernelConfig:
    """Block sizes in elements and launch parameters of one kernel.

    BLOCK_M rows of x or dy; BLOCK_N output columns of expand, or columns of dy in grad; BLOCK_K the
    contraction block of shrink and expand; BLOCK_R the rank block; GROUP_M row blocks that expand visits
    together for reuse in L2. Unused sizes are 0.

    variant: "portable"; "tma", for Hopper: the persistent kernel of expand, and grad with its loads by TMA;
    "recompute", expand alone: for few rows, it makes z or dz itself, in one launch, and shrink is not called;
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


@dataclass(frozen=True)
class KernelPlan:
    """How the kernels compute one layer's forward or backward. None: the heuristic default of the kernel.

    one_pass: dz and dB from one pass over dy (grad), or from one each (shrink, then grad for dB alone). pdl:
    expand is launched while the kernel before it still runs (programmatic dependent launch); a device without
    it ignores it.
    """

    shrink: KernelConfig | None = None
    expand: KernelConfig | None = None
    grad: KernelConfig | None = None
    one_pass: bool = True
    pdl: bool = True


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


def rows_aligned(operand_bytes: int, *sizes: int) -> bool:
    """Whether rows of `sizes` elements all start at multiples of 16 bytes in a contiguous tensor."""
    return all(size * operand_bytes % 16 == 0 for size in sizes)


@functools.lru_cache(maxsize=1024)
def default_config(
    op: str,
    limits: DeviceLimits,
    operand_bytes: int,
    M: int,
    R: int,
    aligned: bool = True,
    recompute: bool = True,
    dropout: bool = False,
) -> KernelConfig:
    """Return the default configuration of kernel `op` for x or dy with M rows of `operand_bytes`-byte
    elements and rank R.

    `aligned`: rows_aligned of the wide sizes, and for expand on Hopper operands that TMA can address;
    `recompute`: expand may make z or dz itself; `dropout`: it is the kernel that makes the mask (makes_mask).

    A pure function. Any device gets an answer: an unknown one that of the nearest family, with fewer
    pipeline stages and then smaller rank blocks until what is in flight fits its shared memory. Raises
    ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"unknown kernel {op!r}: one of {', '.join(OPS)}")
    family = limits.family
    # On gfx942 its twelve strides and pointers spill scalar registers.
    few_rows = M <= RECOMPUTE_ROWS and R <= RECOMPUTE_RANK and family != "amd"
    if family == "interpreter":
        config = _interpreter_config(op)
    elif operand_bytes >= 4:
        config = _fp32_config(op)
    elif op == "expand" and recompute and few_rows:
        config = _recompute_config(family, M, R, aligned, dropout)
    else:
        config = _half_config(op, family, M, R, aligned, dropout)
    config = replace(config, BLOCK_R=min(config.BLOCK_R, max(MIN_BLOCK, _next_power_of_2(R))))
    if op == "shrink" and M <= SPLIT_ROWS and family != "interpreter":
        config = replace(config, SPLIT_K=SPLITS)
    while shared_memory(op, config, operand_bytes, limits, dropout) > limits.shared_memory:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.BLOCK_R > MIN_BLOCK and config.variant != "recompute":
            config = replace(config, BLOCK_R=config.BLOCK_R // 2)
        else:
            break
    return config


@functools.lru_cache(maxsize=1024)
def shrink_group_config(
    limits: DeviceLimits, operand_bytes: int, M: int, R: int, members: int, dropout: bool = False
) -> tuple[KernelConfig, int]:
    """Return the configuration of shrink_group for x with M rows of `operand_bytes`-byte elements and so many
    members, the largest rank R, and how many of the members one pass over x takes.

    BLOCK_R of the configuration is one member's; shared_memory holds with that of all members of a pass.
    """
    half, family = operand_bytes < 4, limits.family
    if half and family == "hopper":
        widest = MAX_GROUP_R
    else:
        widest = default_config("shrink", limits, operand_bytes, M, 1 << 20, dropout=dropout).BLOCK_R
        if half and family == "ampere" and dropout:
            # It holds the operands in registers, and their masks.
            widest = min(widest, max(64, _next_power_of_2(R)))
    BLOCK_R = min(widest, MAX_BLOCK_R, max(MIN_BLOCK, _next_power_of_2(R)))
    members = min(members, widest // BLOCK_R)
    if not half and dropout and family == "ampere":
        # Two members' masks beside fp32 operands spill.
        members = 1
    columns = members * BLOCK_R
    config = default_config("shrink", limits, operand_bytes, M, columns, dropout=dropout)
    if half and family == "hopper":
        # No kernel runs beside it (OVERLAP_*), so it may take what shrink leaves free. Masks are made in
        # registers, of which a thread of four warps has too few for them.
        config = replace(
            config,
            BLOCK_K=32 if dropout and columns > 64 else 64,
            num_warps=4 if columns <= 64 and not dropout else 8,
            num_stages=4 if columns <= 64 else 3,
        )
    elif half and family == "ampere":
        if dropout and (members > 1 or columns > 64):
            config = replace(config, BLOCK_K=64 if columns <= 64 else 32, num_warps=8)
        elif columns > 64:
            # The pointers of the members are in registers too: a few words would spill.
            config = replace(config, BLOCK_K=min(config.BLOCK_K, 32))
    elif not half and dropout and members > 1 and family != "interpreter":
        config = replace(config, num_warps=8)
    return replace(config, BLOCK_R=BLOCK_R), members


@functools.lru_cache(maxsize=1024)
def shrink_total_config(limits: DeviceLimits, operand_bytes: int, M: int, R: int) -> KernelConfig:
    """Return the configuration of shrink_total: shrink's, with a result as wide as a rank block."""
    config = default_config("shrink", limits, operand_bytes, M, R)
    if config.BLOCK_R == 64 and limits.family == "ampere":
        # ptxas squeezes eight warps into 64 registers and spills two.
        config = replace(config, num_warps=4)
    if operand_bytes >= 4 and limits.family == "blackwell":
        # Beside a second stage in registers a few words spill.
        config = replace(config, num_stages=1)
    return replace(config, BLOCK_N=config.BLOCK_R, SPLIT_K=1)


@functools.lru_cache(maxsize=1024)
def expand_total_config(
    limits: DeviceLimits, operand_bytes: int, M: int, R: int, aligned: bool, dropout: bool
) -> KernelConfig:
    """Return the configuration of expand_total: expand's, R the largest rank."""
    config = default_config("expand", limits, operand_bytes, M, R, aligned, recompute=False, dropout=dropout)
    if not dropout:
        # Several K loops hold more pointers than one: a few words would spill.
        if config.variant == "portable" and limits.family == "ampere" and config.BLOCK_M <= 64:
            return replace(config, BLOCK_K=min(config.BLOCK_K, 64), BLOCK_R=min(config.BLOCK_R, 32))
        return config
    # Each member's rank-R term is masked beside the sum of the others': registers for two blocks.
    if config.variant == "tma" and config.BLOCK_N == 256:
        return replace(config, BLOCK_M=256, BLOCK_N=128)
    if operand_bytes >= 4:
        # On sm_100 ptxas squeezes eight warps with a second stage into 128 registers and spills two words.
        return replace(
            config, num_warps=8, num_stages=1 if limits.family == "blackwell" else config.num_stages
        )
    if config.variant == "portable" and config.BLOCK_M * config.BLOCK_N > 128 * 64:
        config = replace(config, BLOCK_N=64)
    if limits.family == "blackwell":
        # A term comes from tensor memory into registers; of 32 columns a few words would spill.
        config = replace(config, BLOCK_R=MIN_BLOCK)
    return config


def makes_mask(op: str, forward: bool, config: KernelConfig) -> bool:
    """Whether kernel `op` in this configuration makes the mask where there is dropout: in forward shrink, in
    backward expand, in both an expand that makes z or dz itself.
    """
    if op == "expand":
        return config.makes_low_rank or not forward
    return op == "shrink" and forward


def row_chunks(config: KernelConfig, limits: DeviceLimits, M: int, N: int) -> int:
    """Return into how many chunks grad splits its M rows: one for few rows, else enough blocks to fill the
    device, once with TMA and a few times without, at least one row block each.
    """
    row_blocks = -(-M // config.BLOCK_M)
    if row_blocks <= DIRECT_BLOCKS:
        return 1
    strips = -(-N // config.BLOCK_N)
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


def shared_memory(
    op: str, config: KernelConfig, operand_bytes: int, limits: DeviceLimits, dropout: bool = False
) -> int:
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
    masked_rows = M * K * operand_bytes if dropout else 0
    if op == "shrink":
        rounded_factor = K * R * operand_bytes
        return stages * K * (M * operand_bytes + R * 4) + rounded_factor + masked_rows + barriers
    if config.variant == "recompute":
        return (stages * (M + N) + R) * K * operand_bytes + stages * K * R * 4 + masked_rows + barriers
    if config.variant in WS_SUMS:
        # Ring, rank-R operands, a part of the result, bias in fp32, and barriers.
        rank_rows = R if config.variant == "ws_z" else 0
        ring = config.num_stages * K * (M + N + rank_rows) + R * (M + N)
        return (ring + M * N // config.EPILOGUE_SUBTILE) * operand_bytes + 4 * N + 1024
    if op == "expand" and config.variant == "tma":
        # The result's buffer lives through the loop over tiles; the rank-R step has two stages of its own.
        loop = config.num_stages * K * (M + N) * operand_bytes
        after_loop = 2 * R * (M * operand_bytes + N * 4) + R * N * operand_bytes
        return max(loop, after_loop) + M * N * operand_bytes // config.EPILOGUE_SUBTILE + barriers
    if op == "expand":
        loop = stages * K * (M + N) * operand_bytes
        after_loop = max(R * (M * operand_bytes + N * 4), M * N * operand_bytes)
        return max(loop, after_loop) + barriers
    loop = stages * M * (N + R) * operand_bytes
    lora_B = 0 if limits.family == "amd" else N * R * operand_bytes
    dz = M * R * 4
    return loop + lora_B + dz + barriers


def all_default_configs(
    op: str, limits: DeviceLimits, operand_bytes: int, dropout: bool = False
) -> dict[KernelConfig, tuple[int, int, bool, bool]]:
    """Return every configuration that default_config can return for this kernel, device, operand size and
    with or without dropout.

    Each comes with an (M, R, aligned, recompute) that it is returned for.
    """
    rows = (8192, 1 << 20, 513, 512, 129, 128, 65, 64, 17, 16, 1)
    ranks = (256, 129, 128, 65, 64, 33, 32, 17, 16, 1)
    found: dict[KernelConfig, tuple[int, int, bool, bool]] = {}
    for recompute, aligned, M, R in itertools.product((True, False), (True, False), rows, ranks):
        shapes = (M, R, aligned, recompute)
        found.setdefault(default_config(op, limits, operand_bytes, *shapes, dropout), shapes)
    return found


def _half_config(op: str, family: str, M: int, R: int, aligned: bool, dropout: bool) -> KernelConfig:
    amd = family == "amd"
    num_warps = 4 if R <= 32 else 8
    if op == "shrink":
        if family == "hopper":
            # Small enough to share a multiprocessor with expand (OVERLAP_*).
            BLOCK_K, num_stages = (64, 3) if R <= 16 else (32, 5) if R <= 32 else (32, 3)
            return KernelConfig(64, 0, BLOCK_K, 64, 1, 4, num_stages)
        # A factor's block of 128 × 128 spills, one of 128 × 64 on sm_80, and on sm_100 if K is split.
        split_on_blackwell = family == "blackwell" and M <= SPLIT_ROWS
        BLOCK_K = 64 if amd or R > 64 or (R > 32 and (family == "ampere" or split_on_blackwell)) else 128
        if dropout and (amd or family == "blackwell"):
            # The mask beside larger blocks spills.
            BLOCK_K = 32 if amd or R > 64 else 64
        return KernelConfig(64, 0, BLOCK_K, MAX_BLOCK_R, 1, num_warps, 2 if amd else 3)
    if op == "grad":
        # dB's accumulator is BLOCK_N × BLOCK_R fp32 in registers; a wider strip means fewer partial sums of
        # dz to write. Ampere holds the operands of both products in registers too and spills at 128 × 128.
        if family == "hopper":
            if R <= 32:
                return KernelConfig(64, 256, 0, MAX_BLOCK_R, 1, 8, 3, "tma")
            return KernelConfig(64, 128, 0, MAX_BLOCK_R, 1, 8, 3, "tma", ctas_per_sm=2 if R <= 64 else 1)
        BLOCK_N = 64 if family == "ampere" and R > 64 else 128
        if family == "blackwell" and R <= 64:
            # The accumulators are in tensor memory; ptxas squeezes eight warps into 64 registers and spills.
            num_warps = 4
        return KernelConfig(64, BLOCK_N, 0, MAX_BLOCK_R, 1, num_warps, 2 if amd else 3)
    # A mask and a wider rank block spill on gfx942 and on sm_100.
    BLOCK_R = 32 if dropout and family in ("amd", "blackwell") else 64
    if not aligned:
        # Such rows cannot be copied asynchronously: they pass through registers, and larger blocks spill.
        return KernelConfig(64, 64, 32, BLOCK_R, 8, 4, 2)
    if family == "hopper":
        # Rank blocks of 16: a wider fp32 block of lora_B takes the registers that shrink needs (OVERLAP_*).
        # With dropout a part of the tile has its rank-R step and its mask beside the whole tile's
        # accumulator: parts of 64 columns fit.
        if M <= 64:
            parts = 2 if dropout else 1
            return KernelConfig(64, 128, 64, MIN_BLOCK, 8, 4, 4, "tma", EPILOGUE_SUBTILE=parts)
        if M <= 512:
            parts = 2 if dropout else 1
            return KernelConfig(128, 128, 64, MIN_BLOCK, 8, 8, 4, "tma", EPILOGUE_SUBTILE=parts)
        parts = 4 if dropout else 2
        return KernelConfig(128, 256, 64, MIN_BLOCK, 8, 8, 3, "tma", EPILOGUE_SUBTILE=parts)
    if M <= 64:
        return KernelConfig(64, 64, 64 if amd else 128, BLOCK_R, 8, 4, 2 if amd else 3)
    if amd:
        return KernelConfig(128, 128, 64, BLOCK_R, 8, 8, 2)
    if M <= 512 or family == "ampere":
        return KernelConfig(128, 128, 64, BLOCK_R, 8, 8, 3)
    return KernelConfig(128, 256, 64, BLOCK_R, 8, 8, 3)


def _recompute_config(family: str, M: int, R: int, aligned: bool, dropout: bool) -> KernelConfig:
    # Blocks of 128 rows spill where the operands pass through registers: unaligned ones, and Ampere's; and
    # beside a mask but on Hopper. The mask and the widest rank leave 32 rows on Ampere.
    through_registers = not aligned or (family == "ampere" and R > 32)
    few = through_registers or (dropout and family != "hopper")
    BLOCK_M = 16 if M <= 16 else 64 if M <= 64 or few else 128
    if BLOCK_M == 64 and dropout and family == "ampere" and R > 32:
        BLOCK_M = 32
    BLOCK_N = 32 if M <= 16 and R <= 16 else 64
    num_stages = 2 if family == "amd" or not aligned else 3
    BLOCK_K = 64 if aligned else 32
    # Four warps spill at 128 rows, and on sm_100 at 64.
    num_warps = 8 if BLOCK_M == 128 or (family == "blackwell" and BLOCK_M == 64) else 4
    return KernelConfig(BLOCK_M, BLOCK_N, BLOCK_K, RECOMPUTE_RANK, 1, num_warps, num_stages, "recompute")


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
