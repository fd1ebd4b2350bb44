"""The configuration that each kernel takes where none is given: a table, its exceptions, and the look-up.

ROWS has configurations by kernel, family of architectures, operands and size. EXCEPTIONS has the calls for
which a row spills registers, what changes for them, and why. The functions take the first row that holds and
the exceptions that hold, and fit the result to the rank and to the device's shared memory. Nothing here
imports Triton or touches a device, so every choice can be made, listed and compiled without a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import MIN_BLOCK, OPS, DeviceLimits, KernelConfig, shared_memory

# Largest rank block: above it grad has no registers for dB's accumulator (measured: the compile gate's
# spills, bench/results/compile-gate.json). Larger ranks are tiled.
MAX_BLOCK_R = 128
# Rows and rank up to which expand makes z or dz itself: one launch where a launch costs more than the
# repeated work (estimate).
RECOMPUTE_ROWS = 128
RECOMPUTE_RANK = 64
# Rows up to which expand may read the codes of a quantised weight: one block of rows, since each makes the
# weight's elements anew (estimate).
CODES_ROWS = 128
# Rows up to which shrink cuts its contraction, and into how many parts at most (estimate).
SPLIT_ROWS = 512
SPLITS = 16
# Share of the multiprocessors that shrink's blocks must reach on Hopper before its contraction is left whole:
# 8192 rows do, which then have at least 30 KB under way on each (bytes_in_flight).
SHRINK_FILL = 15 / 16
# Bytes of shared memory and registers that one multiprocessor of sm_90 has left beside expand's 180 KB and
# 176 registers a thread (measured: compile-gate.json): what keeps within them overlaps expand.
OVERLAP_SHARED_MEMORY = 45 * 1024
OVERLAP_REGISTERS = 65536 - 256 * 176
# The same beside dx of a group, which takes 192 of four members, for the kernels of dB.
OVERLAP_REGISTERS_OF_GROUPS = 65536 - 256 * 192

AMPERE, HOPPER, BLACKWELL, AMD = (frozenset({name}) for name in ("ampere", "hopper", "blackwell", "amd"))
NVIDIA = AMPERE | HOPPER | BLACKWELL
GPU = NVIDIA | AMD
CPU = frozenset({"interpreter"})
# Operands of 16 bits, and wider ones.
HALF, FP32 = (frozenset({name}) for name in ("half", "fp32"))
BOTH = HALF | FP32
ANY = math.inf
EITHER = None


@dataclass(frozen=True)
class Call:
    """What a row or an exception asks of a call.

    R: the rank, or the columns of a pass where a row of shrink_group is looked up. columns and members: those
    of a pass of shrink_group, 0 before they are known.
    """

    family: str
    operands: str  # "half" or "fp32"
    M: int
    R: int
    aligned: bool = True
    dropout: bool = False
    columns: int = 0
    members: int = 0

    @property
    def ragged_rank(self) -> bool:
        """Whether rows of z and lora_B are not at multiples of 16 bytes, so that TMA cannot address them."""
        return self.R % 8 != 0


@dataclass(frozen=True)
class Row:
    """A configuration for up to M rows and rank R. aligned: for rows_aligned alone, for others, or EITHER."""

    families: frozenset[str]
    operands: frozenset[str]
    M: float
    R: float
    aligned: bool | None
    config: KernelConfig

    def holds(self, call: Call) -> bool:
        return (
            call.family in self.families
            and call.operands in self.operands
            and call.M <= self.M
            and call.R <= self.R
            and self.aligned in (EITHER, call.aligned)
        )


@dataclass(frozen=True)
class Departure:
    """What of a kernel's configuration changes, when, and the reason.

    when: names of fields of Call, or of the configuration so far, each with its value, or with a tuple of the
    least and the most. changes: BLOCK_K and BLOCK_R are upper bounds, other fields replace what is there.
    """

    families: frozenset[str]
    operands: frozenset[str]
    when: Mapping[str, object]
    changes: Mapping[str, int]
    reason: str

    def holds(self, call: Call, config: KernelConfig) -> bool:
        if call.family not in self.families or call.operands not in self.operands:
            return False
        for name, wanted in self.when.items():
            value = getattr(call if hasattr(call, name) else config, name)
            low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
            if not low <= value <= high:
                return False
        return True

    def changed(self, config: KernelConfig) -> KernelConfig:
        changes = dict(self.changes)
        for name in changes.keys() & {"BLOCK_K", "BLOCK_R"}:
            changes[name] = min(changes[name], getattr(config, name))
        return replace(config, **changes)


def _row(
    families: frozenset[str],
    operands: frozenset[str],
    M: float,
    R: float,
    aligned: bool | None,
    *blocks: Any,
    **others: int,
) -> Row:
    return Row(families, operands, M, R, aligned, KernelConfig(*blocks, **others))


# By kernel; the first row that holds is taken. "recompute" is expand that makes z or dz itself, asked first
# where it may. A kernel of groups without a row takes the configuration of shrink or expand. BLOCK_R is the
# most: a smaller rank makes it smaller. Numbers: estimates; with EXCEPTIONS, none spills (measured:
# compile-gate.json, compile-gate-groups.json).
# Columns: families, operands, M up to, R up to, aligned; BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
# num_warps, num_stages, variant.
# fmt: off
ROWS: dict[str, tuple[Row, ...]] = {
    "shrink": (
        _row(AMPERE | BLACKWELL, HALF, ANY, 32,  EITHER,  64, 0, 128, 128, 1, 4, 3),
        _row(AMPERE | BLACKWELL, HALF, ANY, ANY, EITHER,  64, 0, 128, 128, 1, 8, 3),
        # Small enough to share a multiprocessor with expand (OVERLAP_*), and within that as much under way as
        # there can be (bytes_in_flight): of blocks with a BLOCK_K of 64 fewer fit.
        _row(HOPPER,             HALF, ANY, 16,  EITHER,  64, 0,  32, 128, 1, 4, 8),
        _row(HOPPER,             HALF, ANY, 32,  EITHER,  64, 0,  32, 128, 1, 4, 7),
        _row(HOPPER,             HALF, ANY, 64,  EITHER,  64, 0,  32, 128, 1, 4, 5),
        _row(HOPPER,             HALF, ANY, ANY, EITHER,  64, 0,  32, 128, 1, 4, 3),
        _row(AMD,                HALF, ANY, 32,  EITHER,  64, 0,  64, 128, 1, 4, 2),
        _row(AMD,                HALF, ANY, ANY, EITHER,  64, 0,  64, 128, 1, 8, 2),
        # IEEE products run on the ordinary arithmetic units, which need registers rather than deep pipelines.
        _row(GPU,                FP32, ANY, ANY, EITHER,  32, 0,  32,  32, 1, 4, 2),
        # The interpreter pays per operation, not per element: large blocks.
        _row(CPU,                BOTH, ANY, ANY, EITHER, 128, 0, 128, 128, 1, 4, 1),
    ),
    # R is the columns of a pass. No kernel runs beside it (OVERLAP_*): it may take what shrink leaves free.
    # More columns spill (measured: compile-gate-groups.json).
    "shrink_group": (
        _row(HOPPER,             HALF, ANY, 64,  EITHER,  64, 0,  64, 192, 1, 4, 4),
        _row(HOPPER,             HALF, ANY, ANY, EITHER,  64, 0,  64, 192, 1, 8, 3),
    ),
    # Not on gfx942, where its twelve strides and pointers spill scalar registers. Unaligned operands pass
    # through registers: blocks of 128 rows spill. With aligned ones four warps spill at 128 rows.
    "recompute": (
        _row(NVIDIA, HALF, 16,             16,             False,  16, 32, 32, 64, 1, 4, 2, "recompute"),
        _row(NVIDIA, HALF, 16,             RECOMPUTE_RANK, False,  16, 64, 32, 64, 1, 4, 2, "recompute"),
        _row(NVIDIA, HALF, RECOMPUTE_ROWS, RECOMPUTE_RANK, False,  64, 64, 32, 64, 1, 4, 2, "recompute"),
        _row(NVIDIA, HALF, 16,             16,             True,   16, 32, 64, 64, 1, 4, 3, "recompute"),
        _row(NVIDIA, HALF, 16,             RECOMPUTE_RANK, True,   16, 64, 64, 64, 1, 4, 3, "recompute"),
        _row(NVIDIA, HALF, 64,             RECOMPUTE_RANK, True,   64, 64, 64, 64, 1, 4, 3, "recompute"),
        _row(NVIDIA, HALF, RECOMPUTE_ROWS, RECOMPUTE_RANK, True,  128, 64, 64, 64, 1, 8, 3, "recompute"),
    ),
    "expand": (
        # Unaligned rows cannot be copied asynchronously: they pass through registers, larger blocks spill.
        _row(GPU,         HALF, ANY, ANY, False,   64,  64,  32,  64, 8, 4, 2),
        _row(AMPERE,      HALF, 64,  ANY, True,    64,  64, 128,  64, 8, 4, 3),
        _row(AMPERE,      HALF, ANY, ANY, True,   128, 128,  64,  64, 8, 8, 3),
        # A rank block of 128 beside 256 columns takes the shared memory that shrink needs (OVERLAP_*).
        _row(HOPPER,      HALF, 64,  ANY, True,    64, 128,  64, 128, 8, 4, 4, "tma"),
        _row(HOPPER,      HALF, 512, ANY, True,   128, 128,  64, 128, 8, 8, 4, "tma"),
        _row(HOPPER,      HALF, ANY, ANY, True,   128, 256,  64,  64, 8, 8, 3, "tma", EPILOGUE_SUBTILE=2),
        _row(BLACKWELL,   HALF, 64,  ANY, True,    64,  64, 128,  64, 8, 4, 3),
        _row(BLACKWELL,   HALF, 512, ANY, True,   128, 128,  64,  64, 8, 8, 3),
        _row(BLACKWELL,   HALF, ANY, ANY, True,   128, 256,  64,  64, 8, 8, 3),
        _row(AMD,         HALF, 64,  ANY, True,    64,  64,  64,  64, 8, 4, 2),
        _row(AMD,         HALF, ANY, ANY, True,   128, 128,  64,  64, 8, 8, 2),
        _row(GPU,         FP32, ANY, ANY, EITHER,  64,  64,  16,  16, 8, 4, 2),
        _row(CPU,         BOTH, ANY, ANY, EITHER, 128, 128, 128, 128, 4, 4, 1),
    ),
    # dB's accumulator is BLOCK_N × BLOCK_R fp32 in registers; a wider strip means fewer partial sums of dz to
    # write.
    "grad": (
        _row(AMPERE | BLACKWELL, HALF, ANY, 32,  EITHER,  64, 128, 0, 128, 1, 4, 3),
        _row(AMPERE | BLACKWELL, HALF, ANY, ANY, EITHER,  64, 128, 0, 128, 1, 8, 3),
        _row(HOPPER,             HALF, ANY, 32,  EITHER,  64, 256, 0, 128, 1, 8, 3, "tma"),
        _row(HOPPER,             HALF, ANY, 64,  EITHER,  64, 128, 0, 128, 1, 8, 3, "tma", ctas_per_sm=2),
        _row(HOPPER,             HALF, ANY, ANY, EITHER,  64, 128, 0, 128, 1, 8, 3, "tma"),
        _row(AMD,                HALF, ANY, 32,  EITHER,  64, 128, 0, 128, 1, 4, 2),
        _row(AMD,                HALF, ANY, ANY, EITHER,  64, 128, 0, 128, 1, 8, 2),
        _row(GPU,                FP32, ANY, ANY, EITHER,  64,  64, 0,  32, 1, 8, 2),
        _row(CPU,                BOTH, ANY, ANY, EITHER,  64, 128, 0, 128, 1, 4, 1),
    ),
    # grad for dB alone that runs beside expand: small enough to share a multiprocessor with it (OVERLAP_*).
    "beside": (
        _row(HOPPER,             HALF, ANY, 16,  EITHER,  64,  64, 0, 128, 1, 4, 4, "tma"),
        _row(HOPPER,             HALF, ANY, 32,  EITHER,  64,  64, 0, 128, 1, 4, 3, "tma"),
        _row(HOPPER,             HALF, ANY, ANY, EITHER,  32,  64, 0, 128, 1, 4, 3, "tma"),
    ),
    # Of a quantised weight whose codes are read. Few columns a block, since blocks_n alone fills the device;
    # of 32 there are enough multiprocessors busy at N = 4096 (estimate).
    "codes": (
        _row(NVIDIA, HALF, 16,         ANY, EITHER,  16, 32, 128, 64, 1, 4, 4, "codes"),
        _row(NVIDIA, HALF, 32,         ANY, EITHER,  32, 64, 128, 64, 1, 4, 4, "codes"),
        _row(NVIDIA, HALF, 64,         ANY, EITHER,  64, 64,  64, 64, 1, 4, 4, "codes"),
        _row(NVIDIA, HALF, ANY,        ANY, EITHER, 128, 64,  64, 64, 1, 8, 4, "codes"),
        _row(AMD,    HALF, 16,         ANY, EITHER,  16, 32, 128, 64, 1, 4, 2, "codes"),
        _row(AMD,    HALF, 64,         ANY, EITHER,  64, 64,  64, 64, 1, 4, 2, "codes"),
        _row(AMD,    HALF, ANY,        ANY, EITHER, 128, 64,  64, 64, 1, 8, 2, "codes"),
        _row(CPU,    HALF, ANY,        ANY, EITHER, 128, 128, 128, 128, 1, 4, 1, "codes"),
    ),
    # Of a mixed batch. Never timed, so no more rows than the compiler asks for: a pointer for each row takes
    # registers (measured: compile-gate-mixed.json).
    "mixed_shrink": (
        _row(AMPERE | BLACKWELL, HALF, ANY, ANY, EITHER,  64,   0,  32, 128, 1, 8, 3),
        _row(HOPPER,             HALF, ANY, 32,  EITHER,  64,   0,  64, 128, 1, 4, 3),
        _row(HOPPER,             HALF, ANY, ANY, EITHER,  64,   0,  64, 128, 1, 8, 3),
        _row(AMD,                HALF, ANY, ANY, EITHER,  64,   0,  64, 128, 1, 8, 2),
        _row(GPU,                FP32, ANY, ANY, EITHER,  32,   0,  32,  32, 1, 8, 2),
        _row(CPU,                BOTH, ANY, ANY, EITHER, 128,   0, 128, 128, 1, 4, 1),
    ),
    "mixed_expand": (
        _row(GPU,    HALF, ANY, ANY, False,   64,  64,  32,  64, 8, 4, 2),
        _row(NVIDIA, HALF, ANY, ANY, True,   128, 128,  64,  64, 8, 8, 3),
        _row(AMD,    HALF, ANY, ANY, True,   128, 128,  64,  64, 8, 8, 2),
        _row(GPU,    FP32, ANY, ANY, EITHER,  64,  64,  16,  16, 8, 8, 2),
        _row(CPU,    BOTH, ANY, ANY, EITHER, 128, 128, 128, 128, 4, 4, 1),
    ),
    "mixed_grad": (
        _row(NVIDIA, HALF, ANY, 32,  EITHER,  64, 128,   0, 128, 1, 4, 3),
        _row(NVIDIA, HALF, ANY, ANY, EITHER,  64, 128,   0, 128, 1, 8, 3),
        _row(AMD,    HALF, ANY, ANY, EITHER,  64, 128,   0, 128, 1, 8, 2),
        _row(GPU,    FP32, ANY, ANY, EITHER,  64,  64,   0,  32, 1, 8, 2),
        _row(CPU,    BOTH, ANY, ANY, EITHER,  64, 128,   0, 128, 1, 4, 1),
    ),
}
# fmt: on

OVER_16, OVER_32, OVER_64 = (17, ANY), (33, ANY), (65, ANY)
# What departs from the rows, by kernel: all that hold apply, in order. Those of the kernels of groups apply
# to a configuration that fits the device. "Spills": in the compile gate when the line was written. With these
# lines nothing does (measured: compile-gate.json, compile-gate-groups.json).
# Columns: families, operands, when, changes, the reason.
# fmt: off
EXCEPTIONS: dict[str, tuple[Departure, ...]] = {
    "shrink": (
        Departure(AMPERE, HALF, {"R": OVER_32}, {"BLOCK_K": 64},
            "a factor's block of 128 × 64 spills on sm_80"),
        Departure(AMPERE, HALF, {"dropout": True, "R": OVER_32}, {"BLOCK_K": 32},
            "the mask beside larger blocks spills on sm_80"),
        Departure(AMPERE, HALF, {"R": (17, 32), "M": (0, SPLIT_ROWS)}, {"num_warps": 8},
            "ptxas squeezes four warps into 96 registers on sm_86 if K is split, and spills two words"),
        Departure(BLACKWELL, HALF, {"R": OVER_64}, {"BLOCK_K": 64},
            "a factor's block of 128 × 128 spills"),
        Departure(BLACKWELL, HALF, {"R": OVER_32, "M": (0, SPLIT_ROWS)}, {"BLOCK_K": 64},
            "a factor's block of 128 × 64 spills on sm_100 if K is split"),
        Departure(BLACKWELL, HALF, {"dropout": True}, {"BLOCK_K": 64},
            "the mask beside larger blocks spills"),
        Departure(BLACKWELL, HALF, {"dropout": True, "R": OVER_64}, {"BLOCK_K": 32},
            "the mask beside larger blocks spills"),
        Departure(AMD, HALF, {"dropout": True}, {"BLOCK_K": 32},
            "the mask beside larger blocks spills"),
    ),
    "shrink_group": (
        Departure(HOPPER, HALF, {"R": OVER_64, "M": (0, SPLIT_ROWS)}, {"num_stages": 1},
            "ptxas of Triton 3.6.0 takes the products of eight warps one after the other if K is split"),
        Departure(HOPPER, HALF, {"dropout": True}, {"num_warps": 8},
            "masks are made in registers, of which a thread of four warps has too few"),
        Departure(HOPPER, HALF, {"dropout": True, "columns": OVER_64}, {"BLOCK_K": 32},
            "masks are made in registers: of larger blocks they spill"),
        Departure(AMPERE, HALF, {"columns": OVER_64}, {"BLOCK_K": 32},
            "the pointers of the members are in registers too: a few words spill"),
        Departure(AMPERE, HALF, {"members": (3, ANY)}, {"BLOCK_K": 32},
            "the pointers of the members are in registers too: two words spill on sm_120"),
        Departure(BLACKWELL, HALF, {"dropout": True, "members": (2, ANY)}, {"BLOCK_K": 32},
            "two members' masks beside larger blocks spill a few words"),
        Departure(AMPERE, HALF, {"dropout": True, "R": (0, 64)}, {"BLOCK_R": 64},
            "operands and their masks are in registers: more columns in a pass spill"),
        Departure(AMPERE, HALF, {"dropout": True, "members": (2, ANY)}, {"BLOCK_K": 64, "num_warps": 8},
            "operands and their masks are in registers: larger blocks spill"),
        Departure(AMPERE, FP32, {"dropout": True, "R": (0, 16)}, {"BLOCK_R": 16},
            "two members' masks beside fp32 operands spill: one member in a pass"),
        Departure(HOPPER | BLACKWELL | AMD, FP32, {"dropout": True, "members": (2, ANY)}, {"num_warps": 8},
            "more threads for the masks of several members (estimate: no spills in four warps either)"),
    ),
    "shrink_total": (
        Departure(AMPERE, HALF, {}, {"BLOCK_K": 64},
            "the pointers of several members: ptxas squeezes a block of 128 into 72 registers on sm_120"),
        Departure(BLACKWELL, FP32, {}, {"num_stages": 1},
            "beside a second stage in registers a few words spill"),
    ),
    "recompute": (
        Departure(AMPERE, HALF, {"M": OVER_64, "R": OVER_32}, {"BLOCK_M": 64, "num_warps": 4},
            "operands pass through registers: 128 rows spill"),
        Departure(AMPERE | BLACKWELL, HALF, {"M": OVER_64, "dropout": True}, {"BLOCK_M": 64, "num_warps": 4},
            "the mask beside 128 rows spills"),
        Departure(AMPERE, HALF, {"M": OVER_16, "R": OVER_32, "dropout": True}, {"BLOCK_M": 32},
            "the mask and the widest rank leave registers for 32 rows"),
        Departure(BLACKWELL, HALF, {"M": OVER_16}, {"num_warps": 8},
            "four warps spill at 64 rows on sm_100"),
    ),
    "expand": (
        Departure(BLACKWELL | AMD, HALF, {"dropout": True}, {"BLOCK_R": 32},
            "a mask and a wider rank block spill on sm_100 and gfx942"),
        Departure(HOPPER, HALF, {"dropout": True, "aligned": True}, {"EPILOGUE_SUBTILE": 2},
            "a part has its rank-R step and its mask beside the tile's accumulator: 64 columns fit"),
        Departure(HOPPER, HALF, {"dropout": True, "aligned": True, "M": (513, ANY)}, {"EPILOGUE_SUBTILE": 4},
            "as for smaller tiles: 64 of 256 columns fit"),
        Departure(HOPPER, HALF,
            {"dropout": True, "aligned": True, "ragged_rank": True},
            {"BLOCK_N": 128, "EPILOGUE_SUBTILE": 2, "num_stages": 4},
            "the pointers of L and F beside a mask and 256 columns: two words spill (R = 4)"),
    ),
    "expand_total": (
        Departure(AMPERE, HALF, {"dropout": True}, {"BLOCK_R": 32},
            "each member's term is masked beside the sum of the others': of 64 columns three members spill"),
        Departure(HOPPER, HALF, {"dropout": True}, {"BLOCK_R": 16},
            "each member's term is masked beside the sum of the others': of 32 columns three members spill"),
        Departure(AMPERE, HALF, {"dropout": False, "BLOCK_M": 64}, {"BLOCK_K": 64, "BLOCK_R": 32},
            "several K loops hold more pointers than one: a few words spill"),
        Departure(HOPPER, HALF, {"dropout": True, "BLOCK_N": 256}, {"BLOCK_M": 256, "BLOCK_N": 128},
            "each member's term is masked beside the sum of the others': registers for two blocks"),
        Departure(AMPERE | BLACKWELL | AMD | CPU, HALF, {"dropout": True}, {"BLOCK_N": 64},
            "each member's term is masked beside the sum of the others': registers for two blocks"),
        Departure(GPU | CPU, FP32, {"dropout": True}, {"num_warps": 8},
            "each member's term is masked beside the sum of the others': registers for two blocks"),
        Departure(BLACKWELL, FP32, {"dropout": True}, {"num_stages": 1},
            "ptxas squeezes eight warps with a second stage into 128 registers and spills two words"),
        Departure(BLACKWELL, HALF, {"dropout": True}, {"BLOCK_R": 16},
            "a term comes from tensor memory into registers: of 32 columns a few words spill"),
    ),
    "grad": (
        Departure(AMPERE, HALF, {"R": OVER_64}, {"BLOCK_N": 64},
            "the operands of both products are in registers too: 128 × 128 spills"),
        Departure(BLACKWELL, HALF, {"R": (33, 64)}, {"num_warps": 4},
            "the accumulators are in tensor memory: ptxas squeezes eight warps into 64 registers and spills"),
    ),
    "codes": (
        Departure(AMPERE, HALF, {"M": (17, 32)}, {"BLOCK_K": 64},
            "nested scales of 128 elements beside 32 rows: two words spill on sm_80"),
        Departure(NVIDIA, HALF, {"M": (17, 64), "aligned": False}, {"num_warps": 8},
            "codes of unaligned rows come byte by byte, each by a pointer: four warps spill"),
        Departure(BLACKWELL, HALF, {"aligned": True}, {"num_warps": 4},
            "the sums are in tensor memory: ptxas squeezes eight warps into 64 registers and spills"),
    ),
    "mixed_shrink": (),
    "mixed_expand": (
        Departure(BLACKWELL, HALF, {"dropout": True}, {"BLOCK_R": 32},
            "a mask and a wider rank block spill two words on sm_100"),
        Departure(BLACKWELL, FP32, {"aligned": False}, {"BLOCK_M": 32},
            "unaligned rows pass through registers: of 64 two words spill on sm_100"),
    ),
    "mixed_grad": (
        Departure(BLACKWELL, HALF, {"R": (33, 64)}, {"num_warps": 4},
            "as in grad: the accumulators are in tensor memory"),
    ),
}
# fmt: on


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
    call = Call(limits.family, _operands(operand_bytes), M, R, aligned, dropout)
    remade = op == "expand" and recompute and _first_row("recompute", call)
    kernel = "recompute" if remade else op
    config = _with_exceptions(kernel, call, _first_row(kernel, call))
    config = replace(config, BLOCK_R=min(config.BLOCK_R, _rank_block(R)))
    if op == "shrink":
        config = replace(config, SPLIT_K=_parts(call, config, limits))
    return _fitted(op, config, limits, operand_bytes, dropout)


def _fitted(
    op: str, config: KernelConfig, limits: DeviceLimits, operand_bytes: int, dropout: bool
) -> KernelConfig:
    """The configuration with fewer stages, and then smaller rank blocks, until it fits the device."""
    while shared_memory(op, config, operand_bytes, limits, dropout) > limits.shared_memory:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.BLOCK_R > MIN_BLOCK and config.variant != "recompute":
            config = replace(config, BLOCK_R=config.BLOCK_R // 2)
        else:
            break
    return config


@functools.lru_cache(maxsize=1024)
def beside_config(limits: DeviceLimits, operand_bytes: int, M: int, R: int) -> KernelConfig:
    """Return the configuration of a grad that runs beside expand; where no room was made for one, grad's."""
    config = _first_row("beside", Call(limits.family, _operands(operand_bytes), M, R))
    if config is None:
        return default_config("grad", limits, operand_bytes, M, R)
    return replace(config, BLOCK_R=min(config.BLOCK_R, _rank_block(R)))


@functools.lru_cache(maxsize=1024)
def shrink_group_config(
    limits: DeviceLimits, operand_bytes: int, M: int, R: int, members: int, dropout: bool = False
) -> tuple[KernelConfig, int]:
    """Return the configuration of shrink_group for x with M rows of `operand_bytes`-byte elements and so many
    members, the largest rank R, and how many of the members one pass over x takes.

    BLOCK_R of the configuration is one member's; shared_memory holds with that of all members of a pass.
    """
    call = Call(limits.family, _operands(operand_bytes), M, R, dropout=dropout)

    def of_pass(columns: int, call: Call) -> KernelConfig:
        config = default_config("shrink", limits, operand_bytes, M, columns, dropout=dropout)
        if own := _first_row("shrink_group", replace(call, R=columns)):
            config = replace(own, SPLIT_K=config.SPLIT_K)
        return _with_exceptions("shrink_group", call, config)

    widest = of_pass(1 << 20, call).BLOCK_R
    BLOCK_R = min(widest, MAX_BLOCK_R, _rank_block(R))
    members = min(members, widest // BLOCK_R)
    columns = members * BLOCK_R
    config = of_pass(columns, replace(call, columns=columns, members=members))
    return replace(config, BLOCK_R=BLOCK_R), members


@functools.lru_cache(maxsize=1024)
def shrink_total_config(limits: DeviceLimits, operand_bytes: int, M: int, R: int) -> KernelConfig:
    """Return the configuration of shrink_total: shrink's, with a result as wide as a rank block."""
    config = default_config("shrink", limits, operand_bytes, M, R)
    config = _with_exceptions("shrink_total", Call(limits.family, _operands(operand_bytes), M, R), config)
    return replace(config, BLOCK_N=config.BLOCK_R, SPLIT_K=1)


@functools.lru_cache(maxsize=1024)
def expand_total_config(
    limits: DeviceLimits, operand_bytes: int, M: int, R: int, aligned: bool, dropout: bool
) -> KernelConfig:
    """Return the configuration of expand_total: expand's, R the largest rank."""
    config = default_config("expand", limits, operand_bytes, M, R, aligned, recompute=False, dropout=dropout)
    call = Call(limits.family, _operands(operand_bytes), M, R, aligned, dropout)
    return _with_exceptions("expand_total", call, config)


@functools.lru_cache(maxsize=1024)
def mixed_config(
    op: str, limits: DeviceLimits, operand_bytes: int, R: int, aligned: bool = True, dropout: bool = False
) -> KernelConfig:
    """Return the configuration of mixed_shrink, mixed_expand or mixed_grad, op being the last part of the
    name, for operands of `operand_bytes`-byte elements and the largest rank R; aligned and dropout as in
    default_config.
    """
    call = Call(limits.family, _operands(operand_bytes), 0, R, aligned, dropout)
    config = _with_exceptions(f"mixed_{op}", call, _first_row(f"mixed_{op}", call))
    config = replace(config, BLOCK_R=min(config.BLOCK_R, _rank_block(R)))
    return _fitted(op, config, limits, operand_bytes, dropout)


@functools.lru_cache(maxsize=1024)
def codes_config(
    limits: DeviceLimits, operand_bytes: int, M: int, R: int, aligned: bool = True
) -> KernelConfig | None:
    """Return the configuration of expand_codes for x with M rows of `operand_bytes`-byte elements and rank R;
    aligned: rows of x and of the codes start at multiples of 16 bytes. None where it has none: it takes
    operands of 16 bits.
    """
    call = Call(limits.family, _operands(operand_bytes), M, R, aligned)
    config = _first_row("codes", call)
    if config is None or operand_bytes != 2:
        return None
    config = _with_exceptions("codes", call, config)
    config = replace(config, BLOCK_R=min(config.BLOCK_R, _rank_block(R)))
    return _fitted("expand", config, limits, operand_bytes, False)


def all_default_configs(
    op: str, limits: DeviceLimits, operand_bytes: int, dropout: bool = False
) -> dict[KernelConfig, tuple[int, int, bool, bool]]:
    """Return every configuration that default_config can return for this kernel, device, operand size and
    with or without dropout.

    Each comes with an (M, R, aligned, recompute) that it is returned for.
    """
    rows = (8192, 1 << 20, 32768, 16384, 4096, 2048, 1024, 513, 512, 129, 128, 65, 64, 17, 16, 1)
    ranks = (256, 129, 128, 65, 64, 33, 32, 17, 16, 1)
    found: dict[KernelConfig, tuple[int, int, bool, bool]] = {}
    for recompute, aligned, M, R in itertools.product((True, False), (True, False), rows, ranks):
        shapes = (M, R, aligned, recompute)
        found.setdefault(default_config(op, limits, operand_bytes, *shapes, dropout), shapes)
    return found


def _parts(call: Call, config: KernelConfig, limits: DeviceLimits) -> int:
    """Return SPLIT_K of shrink: for few rows the most, then on Hopper the least power of 2 that fills the
    device. Each part is M·R fp32 numbers more, which at M = 4096 and R = 64 are two parts of 1 MB: they stay
    in L2.
    """
    if call.family in CPU:
        return 1
    if call.M <= SPLIT_ROWS:
        return SPLITS
    parts = 1
    if call.family in HOPPER and call.operands in HALF:
        blocks = -(-call.M // config.BLOCK_M)
        while parts < SPLITS and blocks * parts < SHRINK_FILL * limits.num_sms:
            parts *= 2
    return parts


def _operands(operand_bytes: int) -> str:
    return "half" if operand_bytes < 4 else "fp32"


def _first_row(kernel: str, call: Call) -> KernelConfig | None:
    return next((row.config for row in ROWS[kernel] if row.holds(call)), None)


def _with_exceptions(kernel: str, call: Call, config: KernelConfig) -> KernelConfig:
    for exception in EXCEPTIONS[kernel]:
        if exception.holds(call, config):
            config = exception.changed(config)
    return config


def _rank_block(R: int) -> int:
    """The least block that has R columns."""
    return max(MIN_BLOCK, 1 << max(0, R - 1).bit_length())
