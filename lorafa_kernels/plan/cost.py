"""A model of the time that an operation takes: bytes and FLOPs of each way to compute it, against what the
device can do.

    product    launch gap + max( FLOPs / product rate, bytes / copy rate )
    pass       launch gap + bytes / (share of the copy rate that its blocks can draw)
    fused      shrink (or grad and the sum of its parts), then the product with a rank-R step, whose FLOPs it
               adds; with PDL the kernel before expand has no gap and is hidden but for a share
    library    skinny products, the rank-R term written into the output, and the product that reads it again
    quantised  the weight made first, into a temporary that the product reads; or in the product, of codes:
               bytes of these, and instructions for each element
    dropout    arithmetic of one kernel; the library's plan computes keep by passes over int64 tensors
    group      a layer as wide as its members together; its products overlap no kernel before them, and the
               library adds those of dx one by one

Pure functions of shapes, configurations and a table of published device figures, for choosing a plan where
nothing was measured, and to be held against measurements. Everything is an estimate, in microseconds. The
host's time for the operation counts where it exceeds the device's: with few rows the launches are the cost.
The Python of a layer and of autograd is the same for every plan and left out.

One number decides most and is measured first on a device: the rate of expand over that of the library's
product (MAIN_LOOP_SHARE has it where nothing was measured).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..philox import CHUNK, COLUMNS_PER_CALL
from .config import TMA_MEMBERS, DeviceLimits, KernelConfig, rows_aligned, split_size
from .recipe import (
    Problem,
    Recipe,
    drops,
    grad_chunks,
    grad_makes_dz,
    kernel_configs,
    launches,
    runs_beside,
)

# No constant of this file was measured by this project on a GPU yet: each names its source.
#
# Share of the data sheet's 16-bit rate that a large product reaches: 790 of 989 TFLOP/s (published: H200).
PRODUCT_SHARE = 0.8
# Share of the data sheet's memory rate that a copy reaches: 4.3 of 4.8 TB/s (published: H200).
COPY_SHARE = 0.895
# Microseconds from the end of a kernel to full speed of the next one (estimate).
GAP_US = 2.5
# Share of shrink's time that still shows when its launch overlaps the product (estimate).
NOT_HIDDEN = 0.45
# Share of the time of dB's pass over dy that still shows of blocks that run beside the product: they take the
# memory's bandwidth, of which the product needs little (estimate).
SHOWS_BESIDE = 0.4
# Share of the time that this must gain before a plan is chosen for it, while it was not timed (estimate: what
# is lost where 0.9 of the pass shows instead, H100, M = 8192, K = N = 4096).
BESIDE_GAIN = 0.03
# Share of the copy rate that a library product reaches where one side is of rank R (estimate).
SKINNY_SHARE = 0.75
# Share of the time for reading an output back that a product which adds to it does not hide (estimate).
ACCUMULATE_SHARE = 0.35
# Share of the partial sums' bytes that come from memory when they are read back, not from L2 (estimate).
READ_BACK_SHARE = 0.25
# How many times its equal part of the copy rate one multiprocessor draws when the others are idle (estimate:
# 16 KB in flight at a latency of 0.65 µs are 25 GB/s, an equal part is 23 on an H100).
LONE_BLOCK_RATE = 1.0
# Rate of expand's main loop over that of the library's product, by variant. tma (published: Triton's Gluon
# tutorial 07, products not overlapped from tile to tile reach 609 to 630 TFLOP/s beside cuBLAS's 646, H100).
# The others (estimate).
MAIN_LOOP_SHARE = {"tma": 0.96, "portable": 0.95, "recompute": 0.9, "codes": 0.5, "ws": 0.96, "ws_z": 0.96}
# Variants whose kernels take their wide operands by TMA.
BY_DESCRIPTORS = ("tma", "ws", "ws_z")
# The same for pointer loads on tensor cores that read from shared memory, Hopper's (estimate).
PORTABLE_SHARE_ON_HOPPER = 0.85
# Host microseconds of a repeated Triton launch and the tensor that it fills, by pointers and with descriptors
# (estimate: least squares over quiet runs of python -m bench.host_time, beside a stub driver; in the recorded
# one, bench/results/host-time.json, they are 21 and 30).
TRITON_LAUNCH_US = 13.0
DESCRIPTOR_LAUNCH_US = 15.0
# Host microseconds that the driver takes for a launch, which a stub driver does not (estimate).
DRIVER_US = 2.5
# Host microseconds of a library product (estimate).
LIBRARY_CALL_US = 5.0
# Host microseconds of an operation around its launches: the choice of the implementation and of the plan
# (estimate: as for the launches).
OPERATOR_US = 15.0
# Instructions of Philox for an element where one call serves four (counted: ten rounds of philox.py).
PHILOX_INSTRUCTIONS = 24
# Calls of torch that philox.py makes for a chunk (counted).
PHILOX_CALLS = 115
# Bytes that these read and write for a counter (counted): a round is two products, two shifts and two masks
# of 16 bytes each, and four xors of 24.
PHILOX_BYTES = 2000
# Bytes of codes and scales for an element of a quantised weight (counted: base/kinds.py).
CODE_BYTES = {"nf4": 9 / 16, "nf4-nested": 0.5 + 1 / 64, "int8": 1.0, "fp8": 1.0}
# Instructions of the loop of expand_codes for an element (counted: machine code for sm_90 by Triton 3.7.1, 16
# rows).
CODE_INSTRUCTIONS = {"nf4": 11, "nf4-nested": 11, "int8": 9, "fp8": 28}
# PyTorch's calls that make a chunk of an int8 or fp8 weight, elements of one on a GPU, and bytes that they
# read and write for an element beside the result (counted: base/channel.py).
CHANNEL_CALLS, CHANNEL_CHUNK, CHANNEL_BYTES = 5, 2**24, 21
# Rows and columns of a library product's block, by which it fills the device or not (estimate).
ROW_BLOCK = 64


# No share was measured.
ASSUMED: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: dense 16-bit and IEEE fp32 products in TFLOP/s, copies in TB/s counting what is
    read and written. source: where that is from.
    """

    half_tflops: float
    fp32_tflops: float
    copy_tbs: float
    source: str

    def flops_per_us(self, itemsize: int) -> float:
        return 1e6 * (self.half_tflops if itemsize <= 2 else self.fp32_tflops)

    @property
    def bytes_per_us(self) -> float:
        return 1e6 * self.copy_tbs


@dataclass(frozen=True)
class Cost:
    """Predicted microseconds on the device and, for its launches, on the host."""

    device_us: float
    host_us: float

    @property
    def us(self) -> float:
        return max(self.device_us, self.host_us)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.device_us + other.device_us, self.host_us + other.host_us)


# Published, in the makers' data sheets: dense TFLOP/s of 16-bit products accumulated in fp32, TFLOP/s of fp32
# arithmetic, and memory in TB/s.
# The first name that occurs in the device's wins.
_PUBLISHED = {
    "GH200": (989, 67, 4.0),
    "H200": (989, 67, 4.8),
    "H100 PCIe": (756, 51, 2.0),
    "H100 NVL": (835, 60, 3.9),
    "H100": (989, 67, 3.35),
    "H800": (989, 67, 3.35),
    "H20": (148, 44, 4.0),
    "A100-SXM4-80GB": (312, 19.5, 2.04),
    "A100 80GB": (312, 19.5, 1.94),
    "A100": (312, 19.5, 1.56),
    "A800": (312, 19.5, 2.04),
    "A40": (150, 37.4, 0.70),
    "A30": (165, 10.3, 0.93),
    "A10": (125, 31.2, 0.60),
    "L40S": (362, 91.6, 0.86),
    "L40": (181, 90.5, 0.86),
    "L4": (121, 30.3, 0.30),
    "GB200": (2450, 80, 8.0),
    "B200": (2250, 75, 7.7),
    "RTX 5090": (209, 104.8, 1.79),
    "RTX 4090": (165, 82.6, 1.01),
    "RTX 3090": (71, 35.6, 0.94),
    "MI300X": (1307, 163.4, 5.3),
    "MI325X": (1307, 163.4, 6.0),
}
# For a device that is not listed: a listed relative's figures per multiprocessor.
_PER_MULTIPROCESSOR = {
    "sm_80": (312 / 108, 19.5 / 108, 2.04 / 108),
    "sm_86": (71 / 82, 35.6 / 82, 0.94 / 82),
    "sm_89": (165 / 128, 82.6 / 128, 1.01 / 128),
    "sm_9": (989 / 132, 67 / 132, 3.35 / 132),
    "sm_10": (2250 / 148, 75 / 148, 7.7 / 148),
    "sm_12": (209 / 170, 104.8 / 170, 1.79 / 170),
    "gfx9": (1307 / 304, 163.4 / 304, 5.3 / 304),
    "": (71 / 82, 35.6 / 82, 0.94 / 82),
}


def ceilings(name: str, limits: DeviceLimits) -> Ceilings | None:
    """Return what a device reaches by its name, or else by its architecture and multiprocessors; None for
    Triton's interpreter, whose time says nothing.
    """
    if limits.family == "interpreter":
        return None
    for known, figures in _PUBLISHED.items():
        if re.search(rf"\b{re.escape(known)}\b", name):
            return _reached(figures, f"published figures of {known}")
    prefix = next(prefix for prefix in _PER_MULTIPROCESSOR if limits.arch.startswith(prefix))
    figures = tuple(figure * limits.num_sms for figure in _PER_MULTIPROCESSOR[prefix])
    return _reached(figures, f"guessed from {limits.num_sms} multiprocessors of {limits.arch}")


def predict(
    recipe: Recipe,
    problem: Problem,
    limits: DeviceLimits,
    reached: Ceilings,
    main_loop: Mapping[str, float] = ASSUMED,
) -> Cost:
    """Predict the time of `recipe` for `problem`.

    main_loop: by variant of expand, the rate of its main loop over that of the library's 16-bit product as it
    was measured; for others the one assumed.
    """
    model = _Model(problem, limits, reached)
    found = model.library(recipe) if recipe.name == "library" else model.fused(recipe, main_loop)
    expand = recipe.kernels.expand if recipe.name == "fused" else None
    return found if expand and expand.reads_codes else found + model.making()


def main_loop_share(
    variant: str, itemsize: int, limits: DeviceLimits, measured: Mapping[str, float] = ASSUMED
) -> float:
    """Return the rate of expand's main loop over that of the library's product: `measured` by variant for
    16-bit operands, else the one assumed.
    """
    if itemsize <= 2 and variant in measured:
        return measured[variant]
    if variant not in BY_DESCRIPTORS and limits.family in ("hopper", "blackwell") and itemsize <= 2:
        return PORTABLE_SHARE_ON_HOPPER
    return MAIN_LOOP_SHARE[variant]


def frozen(problem: Problem, limits: DeviceLimits, reached: Ceilings) -> Cost:
    """Predict the time of the frozen linear's share of `problem`: y, or dx; nothing for backward_lora_B. Of a
    quantised weight with its making.
    """
    model = _Model(problem, limits, reached)
    if problem.op == "backward_lora_B":
        return Cost(0.0, 0.0)
    return Cost(model.product(), LIBRARY_CALL_US) + model.making()


def frozen_of_codes(config: KernelConfig, problem: Problem, limits: DeviceLimits, reached: Ceilings) -> Cost:
    """Predict the time of y alone, without an adapter, by the kernel that reads codes."""
    model = _Model(problem, limits, reached)
    return Cost(model.expand_codes(config, ASSUMED), TRITON_LAUNCH_US + DRIVER_US)


def predict_step(
    recipes: Mapping[str, Recipe], problem: Problem, limits: DeviceLimits, reached: Ceilings
) -> dict[str, float]:
    """Predict forward and backward of one layer, and of the frozen linear within, for a report.

    recipes: one for "forward" and one for "backward". Returns microseconds under forward_us, backward_us,
    frozen_forward_us, frozen_backward_us, and the overhead (ratio - 1) of both together.
    """
    found: dict[str, float] = {}
    for op in ("forward", "backward"):
        one = replace(problem, op=op)
        found[f"{op}_us"] = predict(recipes[op], one, limits, reached).us
        found[f"frozen_{op}_us"] = frozen(one, limits, reached).us
    both = found["forward_us"] + found["backward_us"]
    found["overhead"] = both / (found["frozen_forward_us"] + found["frozen_backward_us"]) - 1
    return found


class _Model:
    """The pieces, in microseconds, for one problem on one device."""

    def __init__(self, problem: Problem, limits: DeviceLimits, reached: Ceilings) -> None:
        self.problem = problem
        self.limits = limits
        self.reached = reached
        self.itemsize = problem.dtype.itemsize

    def fused(self, recipe: Recipe, main_loop: Mapping[str, float]) -> Cost:
        configs = kernel_configs(recipe, self.problem, self.limits)
        names = launches(recipe, self.problem, self.limits)
        before = self.before_expand(configs, names)
        device = sum(before) + GAP_US * len(before)
        if "expand" in configs:
            # With PDL the launch overlaps the last kernel before it, whose work is mostly hidden: not where a
            # mask, or the specialised warps, take the registers that it needs.
            variant = configs["expand"].variant
            if (
                before
                and variant in ("tma", "ws", "codes")
                and recipe.kernels.pdl
                and self.limits.dependent_launch
                and len(self.problem.widths) < 2
            ):
                alone = variant == "ws" or drops(self.problem, "expand", configs["expand"])
                last = names[len(before) - 1]
                device -= GAP_US + (0.0 if alone else self.hidden(before[-1], last, configs))
            device += self.expand(configs["expand"], main_loop)
        if runs_beside(recipe, self.problem.op):
            parts = self.grad(configs["grad"], makes_dz=False, beside=True)
            device += self.shown_beside(configs) * parts[0]
            device += GAP_US + parts[1] if "grad_sum" in names else 0.0
        # Of forward shrink rounds lora_B itself; where grad makes dz, that reads it as it is.
        rounds = "shrink" in names and self.problem.op in ("backward", "backward_input")
        extra = self.rounding() if rounds else Cost(0.0, 0.0)
        return Cost(device, OPERATOR_US + self.launches_us(configs, names)) + extra

    def rounding(self) -> Cost:
        """Rounding each lora_B, which layers keep in fp32, to the dtype of x. Its bytes are few."""
        times = max(1, len(self.problem.widths)) if self.itemsize < 4 else 0
        return Cost(times * GAP_US, times * LIBRARY_CALL_US)

    def shown_beside(self, configs: Mapping[str, KernelConfig]) -> float:
        """The share of the time of dB's pass that shows though it runs beside expand.

        All of it where expand's blocks do not all run from the start, or leave no registers: a mask and a
        rank-R step by pointers take them. A block waits where it is for the end of expand, so that no more
        run beside it than there are multiprocessors.
        """
        p = self.problem
        expand, grad = configs["expand"], configs["grad"]
        by_tma = expand.variant == "tma" and len(p.widths) <= TMA_MEMBERS and rows_aligned(self.itemsize, p.R)
        if not (self.limits.dependent_launch and by_tma) or drops(p, "expand", expand):
            return 1.0
        blocks = self.grad_blocks(grad, grad_chunks(grad, p, self.limits, True))
        return 1 - (1 - SHOWS_BESIDE) * min(1.0, self.limits.num_sms / blocks)

    def before_expand(self, configs: Mapping[str, KernelConfig], names: tuple[str, ...]) -> list[float]:
        """The kernels in `names` that come before expand. Without the gaps."""
        found: list[float] = []
        if "grad" in configs and names[0] == "grad":
            parts = self.grad(configs["grad"], grad_makes_dz(self.problem, configs))
            found += parts if "grad_sum" in names else parts[:1]
        if "shrink" in configs:
            parts = self.shrink(configs["shrink"])
            found += parts if "shrink_sum" in names else parts[:1]
        return found

    def hidden(self, us: float, name: str, configs: Mapping[str, KernelConfig]) -> float:
        """What does not show of `us`, the time of the kernel `name` whose work expand overlaps.

        A shrink of few blocks takes long because it waits for memory, and leaves the rate to the product.
        """
        drawn = self.drawn(self.shrink_blocks(configs["shrink"])) if name == "shrink" else 1.0
        return (1 - NOT_HIDDEN * drawn) * us

    def library(self, recipe: Recipe) -> Cost:
        p = self.problem
        rows_in = self.library_skinny(p.width)
        if p.op == "backward_lora_B":
            return Cost(rows_in, OPERATOR_US + LIBRARY_CALL_US)
        low_rank = GAP_US + self.bytes_us(p.M * p.out_width + (p.M + p.out_width) * p.R)
        # dx of a group takes a product for each member.
        times = 1 if p.op == "forward" else max(1, len(p.widths))
        accumulate = self.product() + times * ACCUMULATE_SHARE * self.bytes_us(p.M * p.out_width)
        device, host = rows_in + low_rank + accumulate, OPERATOR_US + 3 * LIBRARY_CALL_US
        if p.op == "backward" and recipe.kernels.one_pass:
            configs = kernel_configs(recipe, p, self.limits)
            parts = self.grad(configs["grad"], makes_dz=True)
            device += sum(parts) + GAP_US * len(parts) - rows_in
            host += self.launches_us(configs, launches(recipe, p, self.limits)) - LIBRARY_CALL_US
            extra = Cost(0.0, 0.0)
        else:
            extra = self.rounding()
            if p.op == "backward":
                device += rows_in
                host += LIBRARY_CALL_US
        mask_device, mask_host = self.library_mask()
        return Cost(device + mask_device, host + mask_host) + extra

    def library_mask(self) -> tuple[float, float]:
        """keep, in chunks of rows, and one more pass over x or dx, on the device and on the host."""
        p = self.problem
        if not p.dropout or p.op == "backward_lora_B":
            return 0.0, 0.0
        counters = p.M * _ceil(p.K, COLUMNS_PER_CALL)
        launched = _ceil(counters, CHUNK) * PHILOX_CALLS
        moved = PHILOX_BYTES * counters / self.reached.bytes_per_us + self.bytes_us(2 * p.M * p.K)
        return launched * GAP_US + moved, launched * LIBRARY_CALL_US

    def product(self) -> float:
        """The frozen linear's product, by the library, which tiles small outputs well."""
        p = self.problem
        blocks = _ceil(p.M, ROW_BLOCK) * _ceil(p.out_width, ROW_BLOCK)
        flops = 2 * p.M * p.out_width * p.width
        arithmetic = flops / (self.reached.flops_per_us(self.itemsize) * self.fill(blocks))
        return GAP_US + max(arithmetic, self.bytes_us(self.product_elements()))

    def expand(self, config: KernelConfig, main_loop: Mapping[str, float]) -> float:
        """The fused product: its rank-R step, and z made again in every column of blocks if recomputed."""
        if config.reads_codes:
            return self.expand_codes(config, main_loop)
        p = self.problem
        blocks_m, blocks_n = _ceil(p.M, config.BLOCK_M), _ceil(p.out_width, config.BLOCK_N)
        R = max(p.R, config.BLOCK_R)
        flops = 2 * blocks_m * config.BLOCK_M * p.out_width * (p.width + R)
        elements = self.product_elements() + (p.M + p.out_width) * p.R
        if config.variant == "recompute":
            flops += 2 * blocks_m * config.BLOCK_M * blocks_n * p.width * R
            elements += p.width * p.R
        flags = 0.0
        if config.variant == "ws_z":
            # The first column of blocks makes z, beside flags that a kernel of the library zeroes.
            flops += 2 * blocks_m * config.BLOCK_M * p.width * R
            elements += p.width * p.R
            flags = GAP_US
        share = main_loop_share(config.variant, self.itemsize, self.limits, main_loop)
        fill = self.fill(blocks_m * blocks_n)
        if p.M >= config.BLOCK_M * 8:
            # Many rows: a rest of the last block is not what decides.
            flops = flops * p.M / (blocks_m * config.BLOCK_M)
        arithmetic = flops / (self.reached.flops_per_us(self.itemsize) * share * fill)
        drawn = self.drawn(blocks_m * blocks_n)
        times = blocks_n if config.variant == "recompute" and p.op == "forward" else 1
        mask = times * self.philox_us() if drops(p, "expand", config) else 0.0
        return GAP_US + flags + max(arithmetic, self.bytes_us(elements) / drawn) + mask

    def expand_codes(self, config: KernelConfig, main_loop: Mapping[str, float]) -> float:
        """The product whose K loop makes the weight of codes, once a row of blocks, beside its arithmetic."""
        p = self.problem
        blocks_m, blocks_n = _ceil(p.M, config.BLOCK_M), _ceil(p.N, config.BLOCK_N)
        fill = self.fill(blocks_m * blocks_n)
        share = main_loop_share(config.variant, self.itemsize, self.limits, main_loop)
        flops = 2 * blocks_m * config.BLOCK_M * p.N * (p.K + p.R)
        arithmetic = flops / (self.reached.flops_per_us(self.itemsize) * share)
        # Two FLOPs each at the rate of ordinary fp32 arithmetic.
        instructions = CODE_INSTRUCTIONS[p.codes] * blocks_m * p.N * p.K
        arithmetic += 2 * instructions / self.reached.flops_per_us(4)
        rest = self.bytes_us(p.M * p.K + p.M * p.N + (p.M + p.N) * p.R)
        moved = self.codes_us() + rest
        return GAP_US + max(arithmetic / fill, moved / self.drawn(blocks_m * blocks_n))

    def codes_us(self) -> float:
        """Reading the codes and scales once."""
        p = self.problem
        return CODE_BYTES[p.codes] * p.N * p.K / self.reached.bytes_per_us

    def making(self) -> Cost:
        """A quantised weight made into a temporary: of NF4 by one kernel, of other kinds by PyTorch."""
        p = self.problem
        if not p.codes:
            return Cost(0.0, 0.0)
        device = self.codes_us() + self.bytes_us(p.N * p.K)
        if p.codes.startswith("nf4"):
            return Cost(GAP_US + device, TRITON_LAUNCH_US + DRIVER_US)
        calls = CHANNEL_CALLS * _ceil(p.N * p.K, CHANNEL_CHUNK)
        device += CHANNEL_BYTES * p.N * p.K / self.reached.bytes_per_us
        return Cost(calls * GAP_US + device, calls * LIBRARY_CALL_US)

    def shrink(self, config: KernelConfig) -> list[float]:
        """One pass over x or dy, and the sum of its parts. Without the gaps."""
        p = self.problem
        splits = _ceil(p.width, split_size(config, p.width))
        drawn = self.drawn(self.shrink_blocks(config))
        elements = p.M * p.width + p.width * p.R + p.M * p.R
        arithmetic = 2 * p.M * p.width * p.R / self.reached.flops_per_us(self.itemsize)
        mask = self.philox_us() if drops(p, "shrink", config) else 0.0
        pass_us = max(arithmetic, self.bytes_us(elements) / drawn) + mask
        written = 4 * splits * p.M * p.R / self.reached.bytes_per_us if splits > 1 else 0.0
        return [pass_us + written, READ_BACK_SHARE * written]

    def shrink_blocks(self, config: KernelConfig) -> int:
        p = self.problem
        splits = _ceil(p.width, split_size(config, p.width))
        return _ceil(p.M, config.BLOCK_M) * _ceil(p.R, config.BLOCK_R) * splits

    def grad(self, config: KernelConfig, makes_dz: bool, beside: bool = False) -> list[float]:
        """The pass over each dy, and the sum of its parts. Without the gaps. beside: as in grad_chunks."""
        p = self.problem
        members = grad_chunks(config, p, self.limits, beside)
        rank_blocks = _ceil(p.R, config.BLOCK_R)
        pass_us = written = 0.0
        for N, chunks in members:
            strips = _ceil(N, config.BLOCK_N)
            parts = 4 * ((chunks * N * p.R if chunks > 1 else 0) + (strips * p.M * p.R if makes_dz else 0))
            drawn = self.drawn(self.grad_blocks(config, members if beside else [(N, chunks)]))
            elements = p.M * N * rank_blocks + p.M * p.R + N * p.R
            arithmetic = (4 if makes_dz else 2) * p.M * N * p.R / self.reached.flops_per_us(self.itemsize)
            pass_us += max(arithmetic, self.bytes_us(elements) / drawn)
            written += parts / self.reached.bytes_per_us
        return [pass_us + written, READ_BACK_SHARE * written]

    def grad_blocks(self, config: KernelConfig, members: Sequence[tuple[int, int]]) -> int:
        blocks = sum(_ceil(N, config.BLOCK_N) * chunks for N, chunks in members)
        return max(1, blocks) * _ceil(self.problem.R, config.BLOCK_R)

    def library_skinny(self, width: int) -> float:
        """A library product that reads (M, width) and has rank R on its other side."""
        p = self.problem
        arithmetic = 2 * p.M * width * p.R / self.reached.flops_per_us(self.itemsize)
        read = self.bytes_us(p.M * width + width * p.R + p.M * p.R) / SKINNY_SHARE
        return GAP_US + max(arithmetic, read)

    def product_elements(self) -> int:
        p = self.problem
        return p.M * p.width + p.width * p.out_width + p.M * p.out_width

    def bytes_us(self, elements: float) -> float:
        return elements * self.itemsize / self.reached.bytes_per_us

    def fill(self, blocks: int) -> float:
        """The share of the multiprocessors that have a block; a last, partial round is not counted."""
        return min(1.0, max(1, blocks) / self.limits.num_sms)

    def drawn(self, blocks: int) -> float:
        """The share of the copy rate that so many blocks draw."""
        return min(1.0, LONE_BLOCK_RATE * self.fill(blocks))

    def launches_us(self, configs: Mapping[str, KernelConfig], names: tuple[str, ...]) -> float:
        """The host's time for launching the kernels in `names`."""
        by_descriptors = sum(
            config.variant in BY_DESCRIPTORS and (name in names or config.makes_low_rank)
            for name, config in configs.items()
        )
        by_pointers = len(names) - by_descriptors
        return TRITON_LAUNCH_US * by_pointers + DESCRIPTOR_LAUNCH_US * by_descriptors + DRIVER_US * len(names)

    def philox_us(self) -> float:
        """keep once, in a kernel."""
        instructions = PHILOX_INSTRUCTIONS * self.problem.M * self.problem.K
        # Two FLOPs each at the rate of ordinary fp32 arithmetic.
        return 2 * instructions / self.reached.flops_per_us(4)


def _reached(figures: tuple[float, ...], source: str) -> Ceilings:
    half, fp32, memory = figures
    return Ceilings(half * PRODUCT_SHARE, fp32 * PRODUCT_SHARE, memory * COPY_SHARE, source)


def _ceil(size: int, block: int) -> int:
    return -(-size // max(1, block))
