"""The compile gate: every kernel configuration that the heuristics can pick, compiled without the GPU.

    python -m bench.gate --out bench/results/compile-gate.json

The launchers run on meta tensors with their kernels replaced by a recorder, so what is compiled is what they
would launch: the same arguments, specialised by Triton's own rules. A kernel fails that spills registers,
needs more shared memory than the device has or `shared_memory` estimates, leaves the tensor cores unused for
16-bit operands, or turns an IEEE fp32 product into TF32. So does one that is launched to overlap another
without the instructions for it, has them without, or has them in a place where they come too early, too late
or not for every block; and on sm_90 a kernel whose products ptxas takes one after the other, an expand that
waits for each of its products, and a kernel that leaves too little of a multiprocessor to the one that it is
to overlap. specialised.py has the rules for an expand with specialised warps, which no heuristic picks.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from lorafa_kernels.kernels import (
    dequantise,
    expand,
    expand_codes,
    gated,
    grad,
    group,
    mixed,
    recompute,
    shrink,
)
from lorafa_kernels.kernels.dequantise import BLOCK as DEQUANTISE_BLOCK
from lorafa_kernels.kernels.dequantise import NUM_WARPS as DEQUANTISE_WARPS
from lorafa_kernels.kernels.gated import BLOCK as GATED_BLOCK
from lorafa_kernels.kernels.gated import NUM_WARPS as GATED_WARPS
from lorafa_kernels.kernels.launch import forget_launches
from lorafa_kernels.kernels.tile import INTERPRETED
from lorafa_kernels.mlp.activation import ACTIVATIONS
from lorafa_kernels.plan.config import (
    KNOWN_DEVICES,
    MIN_BLOCK,
    OPS,
    WS_SUMS,
    KernelConfig,
    low_rank_block,
    makes_mask,
    rows_aligned,
    shared_memory,
)
from lorafa_kernels.plan.defaults import (
    OVERLAP_REGISTERS,
    OVERLAP_REGISTERS_OF_GROUPS,
    OVERLAP_SHARED_MEMORY,
    SPLIT_ROWS,
    all_default_configs,
    beside_config,
    codes_config,
    default_config,
    expand_total_config,
    mixed_config,
    shrink_group_config,
    shrink_total_config,
)
from lorafa_kernels.plan.specialised import ws_configs

from ..measure.cases import DTYPES
from ..run.environment import origin
from ..run.shell import write_rows, write_whole
from . import pipeline, specialised

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# With the instructions of sm_80.
NEIGHBOURS = ("sm_86", "sm_89", "sm_120")
PRECISIONS = ("bf16", "fp16", "fp32")
LAYOUTS = {"shrink": ("z", "dz"), "expand": ("y", "dx"), "grad": ("dz, dB", "dB")}
# Of layers that share an input: what each launches, and the kernel whose configurations it takes.
GROUP_LAYOUTS = {"shrink_group": "all z", "expand_total": "dx of all", "shrink_total": "dz of all"}
# dB of each member, by the kernel of a layer.
ALL_DB = "dB of all"
GROUP_BASE = {"shrink_group": "shrink", "expand_total": "expand", "shrink_total": "shrink"}
# Of a mixed batch, and so many adapters and samples: numbers in the launch, which change no code.
MIXED_LAYOUTS = {"mixed_shrink": ("z", "dz"), "mixed_expand": ("y", "dx"), "mixed_grad": ("dB",)}
MIXED_BASE = {op: op.removeprefix("mixed_") for op in MIXED_LAYOUTS}
MIXED_ADAPTERS, MIXED_SAMPLES = 4, 64
# The architectures that make gate compiles them for: one of each family.
MIXED_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
QUICK_MIXED = (("z", False), ("dx", True), ("dB", False))
# Of a quantised weight whose codes are read: its kinds; K and N as in SIZES. Of NF4 K is a multiple of
# 64, and rows of x that are not aligned are parts of longer ones.
CODES_KINDS = ("nf4", "nf4-nested", "int8", "fp8")
CODES_SIZES = {"even": (4096, 4096), "ragged": (4160, 4112), "odd": (4099, 4101)}
CODES_ODD_NF4 = (4160, 4101)
CODES_ROWS_TO_COMPILE = (16, 32, 64, 128)
# K and N. even: multiples of every block; ragged: aligned rows, a masked last block; odd: unaligned rows.
SIZES = {"even": (4096, 4096), "ragged": (4112, 4112), "odd": (4099, 4101)}
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async.sync",
    "mma": "mma.sync.",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
}
# Which of them 16-bit products must use, by family of architectures.
EXPECTED = {"ampere": ("mma",), "hopper": ("wgmma",), "blackwell": ("tcgen05", "mma"), "amd": ("mfma",)}
TENSOR_MEMORY_COLUMNS = 512
SUM_KERNELS = ("shrink_sum_kernel", "grad_sum_kernel", "shrink_group_sum_kernel")
# What the kernels of the gated activation write, for each activation; they have no configuration to pick.
GATED_RESULTS = ("h", "dg, du", "dg", "du")
WAITS_FIRST = "waits before its first product"
WITHOUT_PRODUCT = (*SUM_KERNELS, "gated_kernel", "gated_backward_kernel", "dequantise_kernel")
MODULES = ("shrink", "expand", "expand_tma", "recompute", "grad", "group", "group_tma", "gated")
MODULES += ("expand_ws", "expand_ws_z", "expand_codes", "dequantise", "mixed")
KERNELS = (*OPS, "group", "gated")
# By their names alone: no heuristic picks "ws" and "mixed", and the others are for quantised weights.
ASKED_FOR = ("ws", "dequantise", "codes", "mixed")
# Of a multiprocessor of sm_90; each block on it takes another KB of the shared memory.
SM_SHARED_MEMORY = 228 * 1024
SM_REGISTERS = 65536
# What ptxas says where it could not leave a wgmma in flight, whatever the reason (C7510 to C7515), and where
# it put a wait of its own into the code (C7517).
SERIALIZED = ("wgmma.mma_async instructions are serialized", "warpgroup.wait is injected")
WAIT = "griddepcontrol.wait"


@dataclass(frozen=True)
class LauncherCall:
    """One call of a launcher; M and R make the heuristics pick the configuration under test."""

    arch: str
    op: str
    dtype: str
    factor_dtype: str  # of lora_A and lora_B
    layout: str  # the launcher's result: which product of the layer
    sizes: str
    M: int
    R: int
    bias: bool = False
    asked_tf32: bool = False
    recompute: bool = False  # as in default_config
    pdl: bool = True  # asked for; sm_90 and newer have it
    dropout: bool = False
    members: int = 1  # of a group
    beside: bool = False  # dB's kernels run beside expand, which lets them start early
    given: KernelConfig | None = None  # instead of the heuristics'

    @property
    def config(self) -> KernelConfig:
        if self.given:
            return self.given
        operand_bytes = DTYPES[self.dtype].itemsize
        aligned = rows_aligned(operand_bytes, *SIZES[self.sizes])
        limits = KNOWN_DEVICES[self.arch]
        split = limits, operand_bytes, self.M, self.R
        if self.op == "shrink_group":
            return self._shrink_group[0]
        if self.op == "shrink_total":
            return shrink_total_config(*split)
        if self.op == "expand_total":
            return expand_total_config(*split, aligned, self.dropout)
        if self.op in MIXED_BASE:
            return mixed_config(MIXED_BASE[self.op], limits, operand_bytes, self.R, aligned, self.dropout)
        if self.op == "codes":
            return codes_config(*split, aligned)
        if self.op == "gated":
            return KernelConfig(1, GATED_BLOCK, 0, 0, 1, GATED_WARPS, 1)
        if self.op == "dequantise":
            return KernelConfig(1, 2 * DEQUANTISE_BLOCK, 0, 0, 1, DEQUANTISE_WARPS, 1)
        if self.op == "grad" and self.beside:
            return beside_config(*split)
        return default_config(self.op, *split, aligned, self.recompute, self.dropout)

    @property
    def _shrink_group(self) -> tuple[KernelConfig, int]:
        operand_bytes = DTYPES[self.dtype].itemsize
        of_group = self.M, self.R, self.members, self.dropout
        return shrink_group_config(KNOWN_DEVICES[self.arch], operand_bytes, *of_group)

    @property
    def members_at_once(self) -> int:
        """How many members one pass of shrink_group takes."""
        return self._shrink_group[1]

    @property
    def shared_memory(self) -> int:
        """What its configuration is estimated to need."""
        config, limits, operand_bytes = self.config, KNOWN_DEVICES[self.arch], DTYPES[self.dtype].itemsize
        if self.op in ("gated", "dequantise"):
            return 0
        if self.op == "shrink_group":
            # The ranks of all members lie side by side.
            config = replace(config, BLOCK_R=config.BLOCK_R * self.members_at_once)
        op = (GROUP_BASE | MIXED_BASE | {"codes": "expand"}).get(self.op, self.op)
        estimate = shared_memory(op, config, operand_bytes, limits, self.dropout)
        if self.op != "expand_total":
            return estimate
        if self.dropout and config.variant != "tma":
            # A term changes its layout to be masked.
            estimate = max(estimate, 4 * config.BLOCK_M * config.BLOCK_N)
        # The barriers of several loops lie apart.
        return estimate + (1024 if config.variant == "tma" else 0)

    @property
    def overlaps(self) -> bool:
        """Whether its kernels run beside others: expand, and what writes z or dz before it."""
        writes_low_rank = self.layout not in ("y", "dx", "dB", ALL_DB) and self.op != "codes"
        takes_part = writes_low_rank or not self.config.makes_low_rank
        return (
            self.op not in (*GROUP_LAYOUTS, *MIXED_LAYOUTS)
            and self.pdl
            and (self.layout not in ("dB", ALL_DB) or self.beside)
            and takes_part
            and KNOWN_DEVICES[self.arch].dependent_launch
        )


class Recorder:
    """Stands in for a kernel and keeps what a launcher passes to it."""

    def __init__(self, kernel: triton.JITFunction, calls: list):
        self.kernel = kernel
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def record(case: LauncherCall) -> list[tuple[triton.JITFunction, tuple, dict]]:
    """Run the launcher of a case and return the launches it makes: kernel, arguments, keyword arguments."""
    modules = [importlib.import_module(f"lorafa_kernels.kernels.{name}") for name in MODULES]
    calls: list = []
    K, N = SIZES[case.sizes]
    dtype, factor_dtype = DTYPES[case.dtype], DTYPES[case.factor_dtype]
    tensor = functools.partial(torch.empty, device="meta", dtype=dtype)
    x, dy, weight, z = tensor(case.M, K), tensor(case.M, N), tensor(N, K), tensor(case.M, case.R)
    lora_A, lora_B = tensor(case.R, K, dtype=factor_dtype), tensor(N, case.R, dtype=factor_dtype)
    bias = tensor(N) if case.bias else None
    config = {"config": case.config}
    pdl = config | {"pdl": case.pdl}
    drop = {"dropout_p": 0.1, "seed": tensor(1, dtype=torch.int64)} if case.dropout else {}
    # As in linear/fused.py.
    copy = None if factor_dtype == dtype else (lora_B, tensor(N, case.R))
    calls_of = {
        "z": lambda: shrink.shrink(x, lora_A.t(), 2.0, copy=copy, **pdl, **drop),
        "dz": lambda: shrink.shrink(dy, lora_B, 2.0, **pdl),
        "y": lambda: expand.expand(x, weight.t(), z, lora_B.t(), bias, **pdl),
        "dx": lambda: expand.expand(dy, weight, z, lora_A, trigger=case.beside, **pdl, **drop),
        "dz, dB": lambda: grad.grad(dy, z, lora_B, 2.0, factor_dtype, **pdl),
        "dB": lambda: grad.grad(dy, z, None, 1.0, factor_dtype, beside=case.beside, **config),
    }
    if case.config.makes_low_rank:
        dx = {"want_L": False, "drop_P": False}
        config |= drop
        calls_of = {
            "y": lambda: recompute.recompute(x, weight.t(), lora_A.t(), lora_B.t(), bias, 2.0, **config),
            "dx": lambda: recompute.recompute(dy, weight, lora_B, lora_A, None, 2.0, **dx, **config),
        }
    if case.op in GROUP_LAYOUTS:
        n = case.members
        of_group = group.Dropout(tensor(n, dtype=torch.int64), range(n), [0.1] * n) if case.dropout else None
        drop = config | {"dropout": of_group}
        at_once = {"members": case.members_at_once} if case.op == "shrink_group" else {}
        calls_of = {
            "all z": lambda: group.shrink_group(x, [lora_A.t()] * n, [2.0] * n, **at_once, **drop),
            "dx of all": lambda: group.expand_total(
                [dy] * n, [weight] * n, [z] * n, [lora_A] * n, trigger=case.beside, **drop
            ),
            "dz of all": lambda: group.shrink_total([dy] * n, [lora_B] * n, 2.0, **config),
        }
    if case.layout == ALL_DB:
        of_members = [dy] * case.members, [z] * case.members, [factor_dtype] * case.members
        calls_of = {ALL_DB: lambda: grad.grads_beside(*of_members, **config)}
    if case.op in MIXED_LAYOUTS:
        calls_of = mixed_calls(case, x, dy, weight, z, bias)
    if case.op == "gated":
        result, activation = case.layout.split(": ")
        # Contiguous, or rows within a larger matrix.
        g = x if case.sizes == "even" else tensor(case.M, 2 * K)[:, :K]
        u = None if result == "du" else g
        calls_of = {
            case.layout: lambda: (
                gated.gated(g, u, activation)
                if result == "h"
                else gated.gated_backward(g, g, u, activation, result != "dg")
            )
        }
    if case.op == "dequantise":
        codes, scales = tensor(N, K // 2, dtype=torch.uint8), tensor(N, K // 64, dtype=torch.float32)
        nested = None
        if case.layout == "W: nested":
            scales = scales.to(torch.uint8)
            nested = tuple(tensor(n, dtype=torch.float32) for n in (scales.numel() // 256, 256, 1))
        calls_of = {case.layout: lambda: dequantise.dequantise(codes, scales, nested, dtype, dtype)}
    if case.op == "codes":
        calls_of = codes_calls(case)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.asked_tf32 else "ieee"
    with contextlib.ExitStack() as stack:
        for module in modules:
            patches = {
                name: Recorder(value, calls)
                for name, value in vars(module).items()
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
            }
            if hasattr(module, "device_limits"):
                patches["device_limits"] = lambda device: KNOWN_DEVICES[case.arch]
            stack.enter_context(mock.patch.multiple(module, **patches))
        # What was kept launches other kernels, for another device.
        forget_launches()
        stack.callback(forget_launches)
        calls_of[case.layout]()
    return calls


def mixed_calls(case: LauncherCall, x, dy, weight, z, bias) -> dict[str, Callable]:
    """What launches the kernels of a mixed batch, by result. Factors are stacked in the dtype of x."""
    (N, K), E = weight.shape, MIXED_ADAPTERS
    whole = functools.partial(torch.empty, device="meta", dtype=torch.int32)
    lora_As, lora_Bs = x.new_empty((E, case.R, K)), x.new_empty((E, N, case.R))
    reals = x.new_empty(E, dtype=torch.float32)
    sorted_rows = whole(MIXED_SAMPLES), whole(case.M // case.config.BLOCK_M, mixed.FIELDS)
    config = {"config": case.config}
    drop = {"seed": x.new_empty(1, dtype=torch.int64), "thresholds": whole(E)} if case.dropout else {}
    drop |= config
    scales = {"scales": reals} if case.dropout else {}
    of_y = x, weight.t(), z, lora_Bs.transpose(1, 2), bias
    return {
        "z": lambda: mixed.mixed_shrink(x, lora_As.transpose(1, 2), reals, *sorted_rows, **drop),
        "dz": lambda: mixed.mixed_shrink(dy, lora_Bs, reals, *sorted_rows, **config),
        "y": lambda: mixed.mixed_expand(*of_y, *sorted_rows, **config),
        "dx": lambda: mixed.mixed_expand(dy, weight, z, lora_As, None, *sorted_rows, **drop, **scales),
        "dB": lambda: mixed.mixed_grad(dy, z, *sorted_rows, **config),
    }


def codes_calls(case: LauncherCall) -> dict[str, Callable]:
    """What launches the kernel that reads codes; R = 0: of a layer without an adapter."""
    kind, dtype = case.layout.removeprefix("y: "), DTYPES[case.dtype]
    nf4, odd = kind.startswith("nf4"), case.sizes == "odd"
    K, N = CODES_ODD_NF4 if nf4 and odd else CODES_SIZES[case.sizes]
    tensor = functools.partial(torch.empty, device="meta", dtype=dtype)
    real = functools.partial(tensor, dtype=torch.float32)
    x, nested = tensor(case.M, K + (nf4 and odd))[:, :K], None
    codes = tensor(N, K // 2 if nf4 else K, dtype=torch.int8 if kind == "int8" else torch.uint8)
    scale = real(N, K // 64) if nf4 else real(N)
    if kind == "nf4-nested":
        scale, nested = scale.to(torch.uint8), (real(N * K // 64 // 256 + 1), real(256), real(1))
    L, F = (tensor(case.M, case.R), tensor(N, case.R).t()) if case.R else (None, None)
    rest = L, F, tensor(N) if case.bias else None
    how = {"config": case.config, "pdl": case.pdl}
    operands = x, kind, codes, scale, nested, DTYPES[case.factor_dtype], *rest
    return {case.layout: lambda: expand_codes.expand_codes(*operands, **how)}


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def source(arch: str, kernel: triton.JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """Return what triton.compile takes for one launch, specialised as JITFunction.run does it."""
    backend = make_backend(target_of(arch))
    kwargs = {"debug": False, **kwargs}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    return make(kernel, signature, constexprs, attrs), options.__dict__


def resources(arch: str, compiled) -> dict:
    """Return registers per thread and bytes (AMD: registers and bytes) spilled to memory; for AMD also how
    many scalar registers are parked in vector registers.
    """
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        count = {
            key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        # Scalar registers that do not fit are parked in lanes of vector registers, which takes no memory.
        spills = count["vgpr_spill_count"] + count["private_segment_fixed_size"]
        return {"registers": count["vgpr_count"], "spills": spills, "parked": count["sgpr_spill_count"]}
    text = cuobjdump("-res-usage", compiled)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def conversions(arch: str, compiled) -> int | None:
    """Return how many instructions of expand's machine code narrow numbers, two at a time: of the result, and
    of F where the kernel gets it in fp32. None for AMD, and for other kernels.
    """
    name = compiled.metadata.name
    if arch.startswith("gfx") or "codes" in name or not name.startswith(("_expand", "_total")):
        return None
    return len(re.findall(r"\bF2FP?\.", cuobjdump("-sass", compiled)))


def cuobjdump(option: str, compiled) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(
    case: LauncherCall, launch: int, cache: Path | None = None, known_only: bool = False
) -> dict | None:
    """Return the row of the result for one launch of a case, compiled now or, by `cache`, before. known_only:
    None instead of compiling.
    """
    begin = time.perf_counter()
    recorded = record(case)
    kernel, args, kwargs = recorded[launch]
    src, options = source(case.arch, kernel, args, kwargs)
    row = {
        "kernel": kernel.__name__.strip("_"),
        **{key: value for key, value in asdict(case).items() if key not in ("recompute", "given")},
        "last": launch == len(recorded) - 1,
        "followed": any(later is kernel for later, _, _ in recorded[launch + 1 :]),
        "config": asdict(case.config),
    }
    wanted = row["config"]
    if "LOW_RANK_TMA" in kwargs:
        wanted = wanted | {"BLOCK_R": low_rank_block(case.config, kwargs["LOW_RANK_TMA"])}
    if row["kernel"] not in WITHOUT_PRODUCT and any(
        kwargs.get(key, size) != size for key, size in wanted.items()
    ):
        return {**row, "failures": ["launched with another configuration"]}
    key = key_of(case.arch, src, options) if cache else ""
    found = read_cached(cache, key) if cache else None
    if found is None:
        if known_only:
            return None
        try:
            found = compiled_code(case.arch, src, options)
        except Exception as error:
            print(f"{describe({**row, 'failures': ['does not compile']})}\n{error}", file=sys.stderr)
            return {**row, "failures": [f"does not compile: {type(error).__name__}"]}
        if cache:
            write_whole(cache / f"{key}.json", json.dumps({"sum": checksum(found), "code": found}))
    row |= {**found, "estimate": case.shared_memory, "seconds": round(time.perf_counter() - begin, 2)}
    return {**row, "failures": failures(case, row)}


def compiled_code(arch: str, src: ASTSource, options: dict) -> dict:
    """Compile and return what the code needs and contains, apart from what is expected of it."""
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(src, target=target_of(arch), options=options)
    assembly = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    counts = {name: assembly.count(text) for name, text in INSTRUCTIONS.items()}
    ttgir = compiled.asm["ttgir"]
    return {
        **resources(arch, compiled),
        "shared_memory": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None),
        "instructions": {name: count for name, count in counts.items() if count},
        "tf32": len(re.findall("tf32|xf32", assembly)),
        "threads": compiled.metadata.num_warps * compiled.metadata.warp_size,
        # How many products may be in flight behind each wait for wgmma, in the order of the code, where the K
        # loop comes first; 0 waits for the one just started.
        "pendings": [int(n) for n in re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", ttgir)],
        "dependent_launch": sorted(set(re.findall(r"griddepcontrol\.(\w+)", assembly))),
        "launched_dependent": bool(getattr(compiled.metadata, "launch_pdl", False)),
        # How many asynchronous copies may be under way behind each wait for one, in the order of the code.
        "copies_left": [int(n) for n in re.findall(r"async_wait .*?num = (\d+)", ttgir)],
        "misplaced_wait": misplaced_wait(ttgir),
        "conversions": conversions(arch, compiled),
        "serialized": serialized(log.getvalue()),
        **(specialised.code(compiled) if "ttg.warp_specialize" in ttgir else {}),
    }


def key_of(arch: str, src: ASTSource, options: dict) -> str:
    """A name for everything that decides what compiled_code returns: the kernel's source with that of what it
    calls, signature, constants and alignment (all in src.hash()), options, Triton, ptxas, and this file.
    """
    tools = triton.__version__, triton.knobs.nvidia.ptxas.version, hash_of_these_files()
    known = arch, src.hash(), sorted(options.items(), key=str), tools
    return hashlib.sha256(repr(known).encode()).hexdigest()


@functools.cache
def hash_of_these_files() -> str:
    files = Path(__file__), Path(specialised.__file__)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_cached(cache: Path, key: str) -> dict | None:
    """Return what compiled_code returned for this key; None if it is not known or the file is damaged."""
    try:
        entry = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
        return entry["code"] if entry["sum"] == checksum(entry["code"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum(code: dict) -> str:
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def serialized(log: str) -> bool:
    """Whether ptxas says that it takes products one after the other, or waits where Triton did not."""
    return any(text in log for text in SERIALIZED)


def misplaced_wait(ttgir: str) -> list[str]:
    """Name what is wrong with where a kernel waits for the one before it, if it does: above the wait there
    must be products, which are what overlaps, but no copy of L or F and no write to C; and a block that finds
    no tile in its loop must wait too.
    """
    wait = ttgir.find(WAIT)
    if wait < 0:
        return []
    found = []
    product = re.search(r"\b(warp_group_dot|tc_gen5_mma|dot) %", ttgir)
    if product is None or product.start() > wait:
        found.append(WAITS_FIRST)
    must_follow = r"(global_to_local|tt\.load) %[LF](_ptrs\w*)?\b|async_tma_copy_local_to_global|tt\.store"
    first = re.search(must_follow, ttgir)
    if first is not None and first.start() < wait:
        found.append("reads z or lora_B or writes the result before it waits")
    # The operations of a kernel's outermost block are indented by four.
    if not re.search(rf"^ {{4}}\S.*{re.escape(WAIT)}", ttgir, re.MULTILINE):
        found.append("waits within a loop only, which some blocks do not enter")
    return found


def failures(case: LauncherCall, row: dict) -> list[str]:
    """Name the rules that a row breaks."""
    found = []
    limits = KNOWN_DEVICES[case.arch]
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared_memory"] > limits.shared_memory:
        found.append(f"shared memory {row['shared_memory']} of {limits.shared_memory}")
    if (row.get("tensor_memory") or 0) > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory {row['tensor_memory']} of {TENSOR_MEMORY_COLUMNS} columns")
    # Where shrink makes masks, their 24 instructions an element are the time, and the products wait for them.
    if row["serialized"] and not (case.dropout and row["kernel"].startswith(("shrink", "mixed_shrink"))):
        found.append("ptxas does not leave its products in flight")
    found += overlap_failures(case, row) + pipeline.failures(case, row, SIZES[case.sizes][0])
    if row["kernel"] in WITHOUT_PRODUCT:
        return found
    if row["shared_memory"] > row["estimate"]:
        found.append(f"shared memory {row['shared_memory']} above the estimate {row['estimate']}")
    expected = EXPECTED[limits.family]
    if case.config.BLOCK_M < 64:
        # Less than what a warpgroup or a tensor core with its own memory multiplies at once.
        expected = (*expected, "mma")
    if case.dtype != "fp32" and not any(row["instructions"].get(name) for name in expected):
        found.append(f"no {' or '.join(expected)}")
    if bool(row["tf32"]) != case.asked_tf32:
        found.append("no TF32 product where TF32 was asked for" if case.asked_tf32 else "TF32 product")
    by_tma = case.op in ("expand", "expand_total") and case.config.variant == "tma"
    # Each member of a group has a K loop: a wait within it and one behind it.
    in_loops = row["pendings"][: 2 * case.members : 2]
    # Of the result alone, which is rounded in pairs: F has its dtype. "ws_z" rounds its own factors and z.
    of_result = case.config.BLOCK_M * case.config.BLOCK_N // (64 * case.config.num_warps)
    rounded = row["conversions"] if case.dtype != "fp32" and case.config.variant != "ws_z" else None
    if rounded is not None and rounded > of_result:
        found.append(f"{rounded} conversions, {of_result} of the result")
    if by_tma and in_loops != [1] * case.members:
        found.append("no product of the K loop is left in flight")
    return found + (specialised.failures(row) if case.config.variant in WS_SUMS else [])


def overlap_failures(case: LauncherCall, row: dict) -> list[str]:
    """Name the rules of programmatic dependent launch that a row breaks."""
    found = []
    is_expand = row["kernel"].startswith("expand")
    instructions = (["wait"] if is_expand else ["launch_dependents"]) if case.overlaps and row["last"] else []
    is_total = row["kernel"].startswith("total")
    if case.beside:
        # Of a group dx does not wait, and each dB but the last lets the next one start.
        of_grad = ["launch_dependents", "wait"] if row["followed"] else ["wait"]
        of_kernel = {"expand": ["launch_dependents", "wait"], "total": ["launch_dependents"]}
        of_kernel["grad_kernel"] = of_grad
        kind = "expand" if is_expand else "total" if is_total else row["kernel"]
        instructions = of_kernel.get(kind, [])
    if row["dependent_launch"] != instructions:
        found.append(f"griddepcontrol {row['dependent_launch']}, expected {instructions}")
    if row["launched_dependent"] != (case.overlaps and "wait" in instructions):
        found.append(f"launch_pdl is {row['launched_dependent']}")
    # The portable kernel masks the rank-R term before its K loop: only the launch is hidden then.
    first = case.dropout and case.config.variant == "portable"
    found += [fault for fault in row["misplaced_wait"] if not (first and fault == WAITS_FIRST)]
    if not instructions or case.arch != "sm_90" or case.dtype == "fp32" or case.sizes == "odd":
        return found
    registers = -(-row["registers"] // 8) * 8 * row["threads"]
    in_group = is_total or case.layout == ALL_DB
    beside_dx = OVERLAP_REGISTERS_OF_GROUPS if in_group else OVERLAP_REGISTERS
    if not is_expand and not is_total:
        memory, most = OVERLAP_SHARED_MEMORY, beside_dx
    elif case.dropout:
        # The mask takes what registers there are: the launch is hidden, the kernel before is not.
        return found
    elif case.config.variant == "tma" and case.R * DTYPES[case.dtype].itemsize % 16 == 0:
        memory = SM_SHARED_MEMORY - 2 * 1024 - OVERLAP_SHARED_MEMORY
        most = SM_REGISTERS - beside_dx
    else:
        return found
    if row["shared_memory"] > memory:
        found.append(f"shared memory {row['shared_memory']} of {memory} that overlap")
    if registers > most:
        found.append(f"{registers} registers of {most} that overlap")
    return found


def all_cases(archs: tuple[str, ...], ops: tuple[str, ...]) -> Iterator[LauncherCall]:
    """Every configuration, in the layouts and dtypes that change the code, without dropout and with it."""
    for make, dropout in ((variants_with_dropout, True), (variants, False)):
        for arch, op, dtype in itertools.product(archs, ops, PRECISIONS):
            configs = all_default_configs(op, KNOWN_DEVICES[arch], DTYPES[dtype].itemsize, dropout=dropout)
            for layout, (index, (config, key)) in itertools.product(LAYOUTS[op], enumerate(configs.items())):
                M, R, aligned, recompute = key
                sizes = "even" if aligned else "odd"
                case = LauncherCall(arch, op, dtype, "fp32", layout, sizes, M, R, layout == "y")
                yield from make(replace(case, recompute=recompute, dropout=dropout), config, index == 0)


def variants(case: LauncherCall, config: KernelConfig, first: bool) -> Iterator[LauncherCall]:
    """What changes the code of a configuration. Left out: a 16-bit factor where K is even (a mask needs more
    registers, not fewer), and fp16 beyond one configuration per kernel (the same instructions as bf16). R = 8
    and odd sizes stand for unaligned rows, at the smallest rank block; for TMA R = 4 does. Architectures with
    the instructions of sm_80 and other limits: one case for each configuration.
    """
    once = case.sizes == "odd" or case.arch in NEIGHBOURS
    if case.dtype != "fp16" or (first and not once):
        yield case
    if once or case.dtype == "fp16":
        return
    ragged = replace(case, sizes="ragged")
    yield ragged
    if case.layout == "y":
        yield replace(case, bias=False)
    if config.variant == "tma":
        yield from (replace(case, R=4), replace(case, pdl=False))
    elif config.BLOCK_R == MIN_BLOCK:
        yield replace(case, R=8)
        if case.op != "expand" or case.dtype == "fp32":
            yield replace(case, sizes="odd")
    if case.dtype == "bf16":
        yield replace(ragged, factor_dtype="bf16")
        if case.op != "expand" and first:
            yield replace(case, pdl=False)
    elif first and case.arch.startswith("sm_"):
        yield replace(case, asked_tf32=True)


def variants_with_dropout(case: LauncherCall, config: KernelConfig, first: bool) -> Iterator[LauncherCall]:
    """Of a kernel that makes the mask, with fp32 factors: aligned, masked and unaligned rows."""
    makes = makes_mask(case.op, case.layout in ("z", "y"), config)
    if not makes or (case.dtype == "fp16" and not first):
        return
    yield case
    if case.sizes == "odd":
        return
    if case.arch not in NEIGHBOURS and case.dtype != "fp16":
        yield replace(case, sizes="ragged")
    if config.variant == "tma":
        yield replace(case, R=4)


def group_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """Every configuration of the kernels of groups, for two and three members (of the kernel with TMA, which
    takes no more than four: one to four), in the sizes that change the code, as in all_cases; quick: the
    default for many rows of three members alone. And those of group_beside_cases.
    """
    yield from group_beside_cases(archs, quick)
    for arch, (op, layout), dtype in itertools.product(archs, GROUP_LAYOUTS.items(), ("bf16", "fp32")):
        masked = (False, True) if op != "shrink_total" else (False,)
        if quick:
            if dtype == "bf16":
                case = LauncherCall(arch, op, dtype, "fp32", layout, "even", 8192, 16, members=3)
                yield from (replace(case, dropout=dropout) for dropout in masked)
            continue
        seen = set()
        shapes = (8192, SPLIT_ROWS, 64), (16, 64, 128), (1, 2, 3, 4), ("even", "ragged", "odd"), masked
        for M, R, members, sizes, dropout in itertools.product(*shapes):
            many = {"dropout": dropout, "members": members}
            case = LauncherCall(arch, op, dtype, "fp32", layout, sizes, M, R, **many)
            if members not in (2, 3) and case.config.variant != "tma":
                continue
            key = (case.config, members, sizes, dropout, case.shared_memory)
            if key in seen or (arch in NEIGHBOURS and sizes == "ragged"):
                continue
            seen.add(key)
            yield case
            if case.config.variant == "tma" and not dropout:
                yield replace(case, R=4)


def beside_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """dB's kernel beside expand at every rank block, and an expand that lets it start: bf16. quick: as in
    quick_cases.
    """
    for arch in archs:
        if not KNOWN_DEVICES[arch].dependent_launch or arch in NEIGHBOURS or (quick and arch != "sm_90"):
            continue
        ranks, layouts = ((16, 64), ("even",)) if quick else ((16, 32, 64, 128), ("even", "ragged"))
        for R, sizes in itertools.product(ranks, layouts):
            yield LauncherCall(arch, "grad", "bf16", "fp32", "dB", sizes, 8192, R, beside=True)
        for R, dropout in itertools.product(ranks[::2], (False, True)):
            both = {"dropout": dropout, "beside": True}
            yield LauncherCall(arch, "expand", "bf16", "fp32", "dx", "even", 8192, R, **both)


def group_beside_cases(archs: tuple[str, ...], quick: bool) -> Iterator[LauncherCall]:
    """dB of all members beside dx, at every rank block, and a dx that lets them start, of two to four members
    by TMA, of three by pointers: bf16. quick: of three members on sm_90, at R = 16 and 64.
    """
    for arch in archs:
        if not KNOWN_DEVICES[arch].dependent_launch or arch in NEIGHBOURS or (quick and arch != "sm_90"):
            continue
        ranks, layouts = ((16, 64), ("even",)) if quick else ((16, 32, 64, 128), ("even", "ragged"))
        for R, sizes in itertools.product(ranks, layouts):
            case = LauncherCall(arch, "grad", "bf16", "fp32", ALL_DB, sizes, 8192, R, members=3, beside=True)
            yield case
        counts = (3,) if quick else (2, 3, 4)
        for R, dropout, members in itertools.product(ranks[::2], (False, True), counts):
            both = {"dropout": dropout, "beside": True, "members": members}
            case = LauncherCall(arch, "expand_total", "bf16", "fp32", "dx of all", "even", 8192, R, **both)
            yield case
            if members == 3 and not quick:
                yield replace(case, sizes="odd")


def quick_cases(archs: tuple[str, ...], ops: tuple[str, ...]) -> Iterator[LauncherCall]:
    """The default configuration of each kernel for many and for few rows, in the commonest dtypes, without
    dropout and with it: on sm_90 at R = 16 and 64, elsewhere at the larger.
    """
    for arch, op in itertools.product(archs, ops):
        hopper = arch == "sm_90"
        layouts = LAYOUTS[op] if hopper or op == "expand" else LAYOUTS[op][:1]
        for R in (16, 64) if hopper else (64,):
            for layout in layouts:
                yield LauncherCall(arch, op, "bf16", "fp32", layout, "even", 8192, R, bias=layout == "y")
        if op == "expand":
            yield LauncherCall(arch, op, "bf16", "fp32", "y", "even", 16, 64, bias=True, recompute=True)
        dropped = {"shrink": [("z", 8192)], "expand": [("dx", 8192), ("y", 16), ("dx", 16)]}
        for layout, M in dropped.get(op, ()):
            drops = LauncherCall(arch, op, "bf16", "fp32", layout, "even", M, 64, layout == "y", dropout=True)
            yield replace(drops, recompute=M == 16)
        if hopper:
            few = LauncherCall(arch, op, "bf16", "fp32", layouts[0], "even", SPLIT_ROWS, 16)
            fp32 = LauncherCall(arch, op, "fp32", "fp32", layouts[0], "even", 8192, 16)
            yield from (few, replace(few, pdl=False), fp32, replace(fp32, asked_tf32=True))


def ws_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """expand with specialised warps, which sm_90 has: the blocks that a search of either variant begins with
    at ranks that fill a rank block and that do not, in both orders, with lora_A and lora_B in fp32 and in 16
    bits, with bias and without, and in ragged sizes. quick: the first of those blocks.
    """
    limits = KNOWN_DEVICES["sm_90"]
    ranks = (16, 64, 128) if quick else (1, 4, 16, 24, 32, 64, 100, 128)
    for variant, R in itertools.product(WS_SUMS, ranks) if "sm_90" in archs else ():
        for config in ws_configs(limits, 2, R, variant)[: 1 if quick else None]:
            for layout, factor_dtype in itertools.product(LAYOUTS["expand"], ("fp32", "bf16")):
                shape = layout, "even", 8192, R
                case = LauncherCall("sm_90", "expand", "bf16", factor_dtype, *shape, given=config)
                yield replace(case, bias=layout == "y")
                if quick:
                    continue
                yield replace(case, sizes="ragged", bias=layout == "y")
                if factor_dtype == "fp32" and R == 16:
                    yield replace(case, dtype="fp16")
                    if variant == "ws":
                        yield replace(case, pdl=False)


def mixed_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """Every configuration of the kernels of a mixed batch, in the sizes and orders that change the code, and
    with dropout where a kernel makes the mask. quick: z, masked dx and dB in bf16 at R = 16, in whole blocks.
    """
    for arch, (op, layouts), dtype in itertools.product(archs, MIXED_LAYOUTS.items(), ("bf16", "fp32")):
        shapes = layouts, (16, 32, 64, 128), ("even", "ragged", "odd"), (False, True)
        seen = set()
        for layout, R, sizes, dropout in itertools.product(*shapes):
            bias = layout == "y"
            case = LauncherCall(arch, op, dtype, dtype, layout, sizes, 8192, R, bias, dropout=dropout)
            masks = layout in ("z", "dx") or not dropout
            key = layout, case.config, sizes, dropout
            few = (dtype, R, sizes) == ("bf16", 16, "even") and (layout, dropout) in QUICK_MIXED
            if masks and (few or not quick) and key not in seen:
                seen.add(key)
                yield case


def gated_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """The kernels of the gated activation: every activation and result, and both gradients and h also in
    fp32, in rows that are not contiguous, and in fp16. Architectures with the instructions of sm_80: bf16.
    quick: h and both gradients by the commonest activation and the one with the rarest function.
    """
    for arch, result, activation in itertools.product(archs, GATED_RESULTS, ACTIVATIONS):
        layout = f"{result}: {activation}"
        case = LauncherCall(arch, "gated", "bf16", "bf16", layout, "even", 8192, 0, pdl=False)
        usual = result in ("h", "dg, du")
        if quick:
            if usual and activation in ("silu", "gelu"):
                yield case
            continue
        yield case
        if usual and arch not in NEIGHBOURS:
            yield replace(case, sizes="odd")
            wide = replace(case, dtype="fp32", factor_dtype="fp32")
            yield from (wide, replace(wide, sizes="odd"), replace(case, dtype="fp16", factor_dtype="fp16"))


def dequantise_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """The kernel that makes a weight of NF4 codes, with scales in fp32 and nested, for each dtype."""
    for arch, layout, dtype in itertools.product(archs, ("W: nf4", "W: nested"), PRECISIONS):
        if not quick or dtype == "bf16":
            yield LauncherCall(arch, "dequantise", dtype, dtype, layout, "even", 0, 0, pdl=False)


def codes_cases(archs: tuple[str, ...], quick: bool = False) -> Iterator[LauncherCall]:
    """The kernel that reads codes, of every kind: each configuration, in sizes that change the code, with
    bias and without an adapter; fp16, and a weight of another dtype, for the fewest rows. factor_dtype is
    that of the weight. Architectures with the instructions of sm_80: the configurations of NF4. quick: of NF4
    for the fewest rows and the most.
    """
    for arch, kind in itertools.product(archs, CODES_KINDS):
        case = LauncherCall(arch, "codes", "bf16", "bf16", f"y: {kind}", "even", 16, 16, bias=True)
        if quick or arch in NEIGHBOURS:
            if kind == "nf4":
                yield from (replace(case, M=M) for M in ((16, 128) if quick else CODES_ROWS_TO_COMPILE))
            continue
        for M, R in itertools.product(CODES_ROWS_TO_COMPILE, (16, 64)):
            of_rows = replace(case, M=M, R=R)
            yield from (of_rows, replace(of_rows, sizes="ragged"), replace(of_rows, sizes="odd"))
        few = replace(case, R=8)
        yield from (few, replace(few, bias=False, pdl=False), replace(case, R=0, bias=False, pdl=False))
        yield from (replace(case, dtype="fp16", factor_dtype=own) for own in ("fp16", "bf16"))
        yield replace(case, factor_dtype="fp32")


def distinct_launches(cases: Iterator[LauncherCall]) -> list[tuple[LauncherCall, int]]:
    """Return the launches of all cases, without those that compile to the same code as an earlier one."""
    found: dict[tuple, tuple[LauncherCall, int]] = {}
    for case in cases:
        for launch, (kernel, args, kwargs) in enumerate(record(case)):
            src, options = source(case.arch, kernel, args, kwargs)
            found.setdefault((case.arch, src.hash(), str(sorted(options.items()))), (case, launch))
    return list(found.values())


def start_worker(cache_dir: str) -> None:
    # The parent handles Ctrl-C; a worker finishes the compile it is in.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # A compile from the cache would have no log of ptxas and no time.
    triton.knobs.cache.dir = cache_dir
    triton.knobs.nvidia.dump_ptxas_log = True


def compile_all(
    launches: list[tuple[LauncherCall, int]], workers: int, console: Console, cache: Path | None = None
) -> list[dict]:
    """Compile in worker processes what is not in the cache and return the rows in the order of `launches`."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict | None] = [None] * len(launches)
    if cache:
        rows = [measure(*launch, cache, known_only=True) for launch in launches]
    lacking = [index for index, row in enumerate(rows) if row is None]
    if not lacking:
        return rows
    with (
        tempfile.TemporaryDirectory(prefix="compile-gate-") as cache_dir,
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(cache_dir,)
        ) as pool,
        Progress(*columns, console=console) as progress,
    ):
        try:
            futures = {pool.submit(measure, *launches[index], cache): index for index in lacking}
            for future in progress.track(as_completed(futures), total=len(lacking)):
                row = rows[futures[future]] = future.result()
                if row["failures"]:
                    progress.console.print(describe(row), style="red", highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return rows


def describe(row: dict) -> str:
    what = "{arch} {kernel} {layout} {dtype}/{factor_dtype} {sizes} M={M} R={R}".format(**row)
    return f"{what} {tuple(row['config'].values())}: {'; '.join(row['failures'])}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--arch", nargs="+", choices=sorted(KNOWN_DEVICES), default=ARCHS)
    parser.add_argument("--kernel", nargs="+", choices=(*KERNELS, *ASKED_FOR), default=KERNELS)
    few = "only the defaults for many rows at R = 16 and 64"
    parser.add_argument("--quick", action="store_true", help=few)
    before = "take from here, and put here, what compiled before"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=before)
    parser.add_argument("--workers", type=int, default=2, help="compiles at a time")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted; unset it to compile them")
    console = Console(stderr=True)
    begin = time.perf_counter()
    archs, kernels = tuple(options.arch), set(options.kernel)
    ops = tuple(op for op in options.kernel if op in OPS)
    more = {"group": group_cases, "expand grad": beside_cases, "ws": ws_cases, "gated": gated_cases}
    more |= {"dequantise": dequantise_cases, "codes": codes_cases, "mixed": mixed_cases}
    cases = itertools.chain(
        (quick_cases if options.quick else all_cases)(archs, ops),
        *(make(archs, options.quick) for names, make in more.items() if set(names.split()) <= kernels),
    )
    try:
        rows = compile_all(distinct_launches(cases), options.workers, console, options.cache)
    except KeyboardInterrupt:
        console.print("interrupted; nothing written")
        return 130
    failed = [row for row in rows if row["failures"]]
    seconds = round(time.perf_counter() - begin)
    now = origin("triton", "torch")
    now["versions"]["ptxas"] = triton.knobs.nvidia.ptxas.version
    result = {
        "what": "kernels compiled for GPUs that were not present: resources and instructions of the code",
        "command": "python -m bench.gate",
        "kernels": options.kernel,
        "quick": options.quick,
        **now,
        "seconds": seconds,
        "failed": len(failed),
        "rows": rows,
    }
    write_rows(options.out, result)
    for row in failed:
        print(describe(row))
    print(f"{len(rows)} kernels compiled in {seconds} s, {len(failed)} failed: {options.out}")
    return 1 if failed else 0
