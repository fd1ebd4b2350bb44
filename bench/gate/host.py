"""Host time: what a process spends between a Python call and the driver, without a GPU.

    python -m bench.host_time --out bench/results/host-time.json [--before FILE]

Every operation is called beside a stub driver (tests/stub_gpu), which accepts launches and computes nothing,
and so is an empty kernel of 20 arguments, through Triton's own `kernel[grid](…)`: an operation's time is
given in such launches too, a ratio within one run. The model of the cost (plan/cost.py) has its host times
from the launches and operations by themselves. Thread CPU time of one thread, in rounds that take turns; what
the driver and the device need is in none of it. The time of Python on one processor: on another one the
microseconds differ, the ratios less.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..run.environment import ROOT, origin, write_json

if TYPE_CHECKING:
    from lorafa_kernels.plan.pin import Pin

EMPTY = "an empty kernel of 20 arguments"
# Small matrices cost the allocator little; many rows of them have the plan of large ones.
K = N = 512
RANK = 16
FEW, MANY = 1, 256
# So many rows that no contraction is cut: shrink is one launch.
WHOLE = 1024
CALLS = 20
# More numbers of rows than launchers keep shapes of (kernels/launch.py), from WHOLE on: each is new.
LENGTHS = 2048
# Plans with specialised warps, which no heuristic picks: by the names of the rows of a layer.
SPECIALISED = ("ws", "ws_z")


def subjects() -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; each has been called before, so that nothing is compiled any more."""
    import torch

    from lorafa_kernels import LoRAFASwiGLU, lorafa_linear
    from lorafa_kernels.group.api import lorafa_linear_group
    from lorafa_kernels.group.operands import LinearOperands
    from lorafa_kernels.plan.pin import pin_plan

    from .empty_kernel import empty

    bf16 = torch.bfloat16
    zeros = torch.zeros
    weight, lora_A = zeros(N, K, dtype=bf16), zeros(RANK, K, dtype=bf16)
    lora_B = zeros(N, RANK, requires_grad=True)
    found: dict[str, Callable[[], object]] = {}

    tensors = [zeros(16, 16, dtype=bf16) for _ in range(5)]
    found[EMPTY] = lambda: empty[(1,)](*tensors, *[256] * 15, BLOCK=1)

    def both_ways(
        name: str,
        call: Callable,
        x: torch.Tensor,
        trained: Sequence[torch.Tensor],
        pin: Pin | None = None,
    ) -> None:
        outputs = call(x)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        dys = [torch.ones_like(y) for y in outputs]
        wanted = outputs, (x, *trained), dys
        forward = lambda: call(x)  # noqa: E731
        backward = lambda: torch.autograd.grad(*wanted, retain_graph=True)  # noqa: E731
        for way, run in (("forward", forward), ("backward", backward)):
            found[f"{name}, {way}"] = run if pin is None else pinned_to(pin, run)

    def pinned_to(pin: Pin, run: Callable[[], object]) -> Callable[[], object]:
        def pinned_run() -> object:
            with pin_plan(pin):
                return run()

        return pinned_run

    found |= pieces(weight, lora_A, lora_B.detach())
    for M in (FEW, MANY):
        x = zeros(M, K, dtype=bf16, requires_grad=True)
        layer = lambda x: lorafa_linear(x, weight, lora_A, lora_B, impl="triton")  # noqa: E731
        both_ways(f"a layer, M = {M}", layer, x, (lora_B,))

        members = [LinearOperands(weight, None, lora_A, zeros(N, RANK, requires_grad=True)) for _ in range(3)]
        group = lambda x, members=members: lorafa_linear_group(x, members, impl="triton")  # noqa: E731
        both_ways(f"q, k and v, M = {M}", group, x, [member.lora_B for member in members])

        mlp = LoRAFASwiGLU(K, N, r=RANK, dtype=bf16)
        mlp.impl = "triton"
        both_ways(f"a gated MLP, M = {M}", mlp, x, [p for p in mlp.parameters() if p.requires_grad])
    for variant in SPECIALISED:
        x = zeros(MANY, K, dtype=bf16, requires_grad=True)
        both_ways(f"a layer with {variant}, M = {MANY}", layer, x, (lora_B,), pin_of(variant))
    longest = zeros(WHOLE + 4 * LENGTHS, K, dtype=bf16)
    dy = torch.ones(len(longest), N, dtype=bf16)
    lengths = itertools.cycle(range(WHOLE, len(longest), 4))

    def step_of_another_length() -> object:
        x = longest[: next(lengths)].requires_grad_()
        return torch.autograd.grad(layer(x), (x, lora_B), dy[: len(x)])

    found["a layer, another M in each call, forward and backward"] = step_of_another_length
    for call in found.values():
        for _ in range(LENGTHS if call is step_of_another_length else 1):
            call()
    return found


def pin_of(variant: str) -> Pin:
    """Return a plan for every operation with an expand of that variant, "ws" or "ws_z"."""
    from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelPlan
    from lorafa_kernels.plan.pin import make_pin
    from lorafa_kernels.plan.recipe import OPERATIONS, Recipe
    from lorafa_kernels.plan.specialised import ws_configs

    expand = ws_configs(KNOWN_DEVICES["sm_90"], 2, RANK, variant)[0]
    # expand_ws_z makes dz itself, and leaves no pass that dB could share.
    plan = KernelPlan(expand=expand, one_pass=variant == "ws", pdl=variant == "ws")
    return make_pin(dict.fromkeys(OPERATIONS, Recipe("fused", plan)))


def pieces(weight, lora_A, lora_B) -> dict[str, Callable[[], object]]:
    """Return a layer's launches, each with the tensor that it fills, and its operations without autograd."""
    import torch

    from lorafa_kernels.kernels.expand import expand
    from lorafa_kernels.kernels.shrink import shrink
    from lorafa_kernels.linear import ops
    from lorafa_kernels.plan.choice import choose_plan

    x, z = (torch.zeros(WHOLE, size, dtype=weight.dtype) for size in (K, RANK))
    dy = torch.zeros(WHOLE, N, dtype=weight.dtype)
    plan = choose_plan("triton", "forward", x.device, x.dtype, WHOLE, N, K, RANK, False).kernels
    down, base, up = lora_A.t(), weight.t(), lora_B.t()
    both = {"config": plan.expand, "unaligned": plan.expand_unaligned}
    forward = x, weight, lora_A, lora_B, None, 1.0, "triton"
    backward = dy, z, weight, lora_A, lora_B, 1.0, "triton"
    return {
        "shrink, one launch": lambda: shrink(x, down, 1.0, config=plan.shrink),
        "expand by descriptors, one launch": lambda: expand(x, base, z, up, **both),
        "forward of a layer, the operation, two launches": lambda: ops.forward(*forward),
        "backward of a layer, the operation, three launches": lambda: ops.backward(*backward),
    }


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return {name: median and least microseconds, and the median of the ratios to an empty launch}."""
    subject = subjects()
    times: dict[str, list[float]] = {name: [] for name in subject}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, call in subject.items():
            begin = time.thread_time()
            for _ in range(CALLS):
                call()
            times[name].append(1e6 * (time.thread_time() - begin) / CALLS)
        gc.collect()
    empty = times[EMPTY]
    return {
        name: {
            "median_us": round(statistics.median(found), 2),
            "least_us": round(min(found), 2),
            "empty_launches": round(statistics.median(a / b for a, b in zip(found, empty, strict=True)), 2),
        }
        for name, found in times.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=200, help="(default: %(default)s)")
    kept = "a result of an earlier commit, to be kept beside this one"
    parser.add_argument("--before", type=Path, help=kept)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    stub = importlib.import_module("tests.stub_gpu")
    if options.worker:
        stub.install("sm_90", watch=False)
        import torch

        torch.set_num_threads(1)
        print(json.dumps(measure(options.rounds)))
        return 0
    if lacks := stub.missing():
        parser.error(lacks)
    command = [sys.executable, "-m", "bench.host_time", "--worker", "--rounds", str(options.rounds)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)
    now = origin("triton", "torch", "python", more=("machine",))
    result = {
        "what": "host time beside a stub driver for a GPU that was not present: nothing was computed",
        "command": "python -m bench.host_time",
        **now,
        "rounds": options.rounds,
        "rows": rows,
    }
    for name, row in rows.items():
        print(f"{name:52s} {row['median_us']:8.1f} us {row['empty_launches']:7.2f} empty launches")
    if options.before:
        before = json.loads(options.before.read_text(encoding="utf-8"))
        # What that one was compared with goes on to be compared with.
        before = before.get("before", before)
        result["before"] = {key: before[key] for key in ("date", "commit", "rows")}
    if options.out:
        write_json(options.out, result)
    return 0
