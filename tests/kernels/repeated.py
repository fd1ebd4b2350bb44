"""Run beside a stub driver by test_repeated_launches.py: prints what it found, as JSON."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from dataclasses import replace

import torch
import triton
import triton.language as tl

from lorafa_kernels.kernels import launch as module
from lorafa_kernels.kernels.expand import expand
from lorafa_kernels.kernels.group import expand_total
from lorafa_kernels.kernels.shrink import _shrink_kernel, shrink
from lorafa_kernels.plan.config import KernelConfig
from tests import stub_gpu

CONFIG = KernelConfig(64, 0, 64, 16, 1, 4, 3)


def z(rows: torch.Tensor, factor: torch.Tensor, scaling: float = 2.0, **more) -> list[stub_gpu.Launch]:
    with stub_gpu.recording() as launched:
        shrink(rows, factor.t(), scaling, config=CONFIG, **more)
    return launched


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def shown(launched: list[stub_gpu.Launch]) -> list:
    return [[one.kernel, one.repeated, one.faults] for one in launched]


found: dict = {}
A = bf16(16, 256)
found["first"] = shown(z(bf16(128, 256), A))
found["again, other addresses"] = shown(z(bf16(128, 256), bf16(16, 256)))
# One element further: addresses that are no multiples of 16 bytes need other code.
wide = bf16(128 * 256 + 1)[1:].view(128, 256)
found["not aligned"] = shown(z(wide, A))
found["not aligned, again"] = shown(z(bf16(128 * 256 + 1)[1:].view(128, 256), A))
found["aligned behind it"] = shown(z(bf16(128, 256), A))
found["first not aligned"] = shown(z(bf16(64 * 256 + 1)[1:].view(64, 256), A))
found["then aligned"] = shown(z(bf16(64, 256), A))
found["then aligned again"] = shown(z(bf16(64, 256), A))
found["other rows"] = shown(z(bf16(192, 256), A))
# Sixteen divides both numbers of rows above, and not this one.
found["rows that 16 does not divide"] = shown(z(bf16(193, 256), A))
found["others"] = shown(z(bf16(67, 256), A))
found["one row"] = shown(z(bf16(1, 256), A))
found["other strides"] = shown(z(bf16(128, 512)[:, :256], A))
found["other dtype"] = shown(z(torch.zeros(128, 256), A.float()))
# Rounded before the launch.
found["fp32 factor"] = shown(z(bf16(128, 256), A.float()))
copy = torch.zeros(64, 16), bf16(64, 16)
found["a copy beside it"] = shown(z(bf16(128, 256), A, copy=copy))
found["a copy beside it, again"] = shown(z(bf16(128, 256), A, copy=copy))
seeds = torch.zeros(3, dtype=torch.int64)
found["dropout"] = shown(z(bf16(128, 256), A, dropout_p=0.5, seed=seeds[:1]))
# A seed may lie anywhere, and p is a number like any other.
found["dropout, other p and seed"] = shown(z(bf16(128, 256), A, dropout_p=0.1, seed=seeds[1:2]))


# By TMA or by pointers is decided for P and Q, and for L and F, apart.
TMA = KernelConfig(128, 128, 64, 16, 8, 8, 3, "tma", EPILOGUE_SUBTILE=2)
PORTABLE = KernelConfig(64, 64, 32, 16, 4, 4, 2)


def off(*shape: int) -> torch.Tensor:
    """A matrix whose address is a multiple of 8 bytes."""
    return bf16(shape[0] * shape[1] + 4)[4:].view(*shape)


def dx(P: torch.Tensor, L: torch.Tensor, total: bool) -> list[stub_gpu.Launch]:
    Q, F = bf16(256, 512), bf16(16, 512)
    with stub_gpu.recording() as launched:
        if total:
            expand_total([P, P], [Q, Q], [L], [F], config=TMA, unaligned=PORTABLE)
        else:
            expand(P, Q, L, F, config=TMA, unaligned=PORTABLE)
    return launched


for name, total in (("expand", False), ("expand_total", True)):
    found[f"{name}, L not aligned"] = shown(dx(bf16(128, 256), off(128, 16), total))
    found[f"{name}, then P not aligned"] = shown(dx(off(128, 256), bf16(128, 16), total))
    found[f"{name}, then both aligned"] = shown(dx(bf16(128, 256), bf16(128, 16), total))

seen = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
found["a profiler watches"] = shown(z(bf16(128, 256), A))
triton.knobs.runtime.launch_enter_hook.calls.clear()
found["seen by it"] = seen
found["no longer"] = shown(z(bf16(128, 256), A))

# What Triton's own call looks at in each call, and would have other code for.
knobs = triton.knobs
for name, of, attribute, value in (
    ("debugged", knobs.runtime, "debug", True),
    ("instrumented", knobs.compilation, "instrumentation_mode", "on"),
    ("with its stages inspected", knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")),
):
    before = getattr(of, attribute)
    setattr(of, attribute, value)
    found[name] = shown(z(bf16(128, 256), A))
    found[f"new and {name}"] = shown(z(bf16(208, 256), A))
    setattr(of, attribute, before)
    found[f"no longer {name}"] = shown(z(bf16(128, 256), A))
seen_by_hook = []
_shrink_kernel.add_pre_run_hook(lambda **arguments: seen_by_hook.append(arguments["M"]))
found["with a hook of the kernel"] = shown(z(bf16(128, 256), A))
_shrink_kernel.pre_run_hooks.clear()
found["seen by the hook"] = seen_by_hook

# A bool is no number that code serves others for.
found["times True"] = shown(z(bf16(68, 256), A, scaling=True))
found["times a float behind it"] = shown(z(bf16(68, 256), A))

# What fails fails again, and leaves the launches of others as they are.
too_large = replace(CONFIG, BLOCK_M=128, BLOCK_K=256, num_stages=4)
errors = []
for M in (128, 128, 144):
    try:
        shrink(bf16(M, 1024), bf16(16, 1024).t(), 2.0, config=too_large)
    except triton.runtime.errors.OutOfResources as error:
        errors.append(str(error))
found["errors"] = errors


@triton.jit(do_not_specialize_on_alignment=["x_ptr"])
def _anywhere_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def anywhere(of: module.Launch, x: torch.Tensor) -> list:
    with stub_gpu.recording() as launched:
        of(x)
    return shown(launched)


one, other = (module.Launch(_anywhere_kernel, (1,), ("x_ptr",), {}) for _ in range(2))
memory = torch.zeros(2)
found["one code for all addresses"] = [anywhere(*of) for of in ((one, memory), (one, memory[1:]))]
found["one code for all addresses, found"] = anywhere(other, memory[1:])

gc.collect()
gc.disable()
gone = weakref.ref(one)
del one
found["a launch that is dropped is gone"] = gone() is None
operand = bf16(69, 256)
gone = weakref.ref(operand)
z(operand, A)
del operand
found["operands are not kept"] = gone() is None
gc.enable()

kept = module.Launches()
threads = [
    threading.Thread(target=lambda i=i: [kept.keep((i, n), n) for n in range(module.MOST)]) for i in range(4)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
found["kept at most"] = len(kept) == module.MOST
kept.keep("new", 1)
found["the new one is kept"] = kept.get("new") == 1 and len(kept) == module.MOST
module.forget_launches()
found["forgotten"] = len(kept) == 0 and not shown(z(bf16(128, 256), A))[0][1]
print(json.dumps(found))
