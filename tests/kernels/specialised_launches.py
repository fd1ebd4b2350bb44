"""Run beside a stub driver by test_specialised_launches.py: prints what it found, as JSON.

Layers, groups and MLPs of drawn sizes, steps of memory and addresses. Of each launch that does not go through
Triton's call it says whether that call would have launched the same compiled kernel.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable

import torch
from triton.runtime.jit import JITFunction

from lorafa_kernels import LoRAFASwiGLU, lorafa_linear
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.kernels import launch as module
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Recipe
from tests import stub_gpu

DRAWS = 24
WS = KernelConfig(128, 128, 64, 16, 8, 8, 3, "ws", EPILOGUE_SUBTILE=2)
WS_Z = KernelConfig(128, 128, 64, 16, 8, 8, 2, "ws_z", EPILOGUE_SUBTILE=2)
launch, through_triton = module.Ready.launch, JITFunction.run
found: dict[str, list] = {"other code": [], "kept": [], "found": [], "anew": [], "known": [], "faults": []}
seen: set[int] = set()
kept_alive: list[module.Launch] = []
compiled_before: list = []


def launch_and_ask(self: module.Ready, values: tuple) -> bool:
    done = launch(self, values)
    if done:
        kernel = self.of.kernel
        stock = through_triton(kernel, grid=self.of.grid, warmup=True, **self.of.arguments(values))
        new = id(self.of) not in seen
        found["found" if new else "kept"].append(kernel.__name__)
        remember(self.of)
        if stock is not self.compiled:
            found["other code"].append(kernel.__name__)
    return done


def remember(of: module.Launch) -> None:
    """Its number stays its own while it is alive."""
    kept_alive.append(of)
    seen.add(id(of))


def run_and_count(self: JITFunction, *args, grid, warmup, **kwargs):
    compiled = through_triton(self, *args, grid=grid, warmup=warmup, **kwargs)
    found["anew" if compiled not in compiled_before else "known"].append(self.__name__)
    compiled_before.append(compiled)
    return compiled


module.Ready.launch = launch_and_ask
JITFunction.run = run_and_count


def matrix(rows: int, columns: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """kind: "whole"; "offset", one element further than memory begins; "part" of a wider one;
    "transposed".
    """
    if kind == "offset":
        return torch.zeros(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)
    if kind == "part":
        return torch.zeros(rows, columns + 16, dtype=dtype)[:, :columns]
    if kind == "transposed":
        return torch.zeros(columns, rows, dtype=dtype).t()
    return torch.zeros(rows, columns, dtype=dtype)


def step(draw: random.Random) -> None:
    dtype = draw.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    M, K, N, R = draw.choice([1, 17, 33, 144, 160, 1040, 1056, 1057]), 128, draw.choice([136, 131]), 16
    x = matrix(M, K, dtype, draw.choice(["whole", "whole", "offset", "part", "transposed"]))
    dropout_p = draw.choice([0.0, 0.0, 0.0, 0.1, 0.6])
    kind = draw.choice(["layer", "layer", "group", "MLP"])
    if kind == "MLP":
        mlp = LoRAFASwiGLU(K, N, r=R, dtype=dtype)
        mlp.impl = "triton"
        train(x, mlp)
        return
    members = [
        LinearOperands(
            matrix(N, K, dtype, draw.choice(["whole", "whole", "part"])),
            draw.choice([None, torch.zeros(N, dtype=dtype)]),
            matrix(R, K, dtype, draw.choice(["whole", "whole", "offset"])),
            torch.zeros(N, R, dtype=torch.float32, requires_grad=True),
            dropout_p=dropout_p,
        )
        for _ in range(1 if kind == "layer" else 2)
    ]
    train(x, lambda x: lorafa_linear_group(x, members, impl="triton"))


def train(x: torch.Tensor, call: Callable) -> None:
    outputs = call(x.requires_grad_())
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def by_descriptors(dtype: torch.dtype, pin: dict) -> None:
    """A number of rows that is new, and one that 16 does not divide."""
    weight, lora_A = torch.zeros(256, 128, dtype=dtype), torch.zeros(16, 128, dtype=dtype)
    lora_B = torch.zeros(256, 16, dtype=dtype, requires_grad=True)
    with pin_plan(pin) if pin else contextlib.nullcontext():
        for M in (1040, 1056, 1057):
            train(
                torch.zeros(M, 128, dtype=dtype),
                lambda x: lorafa_linear(x, weight, lora_A, lora_B, impl="triton"),
            )


with stub_gpu.recording() as launched:
    for index in range(DRAWS):
        step(random.Random(index))
    for dtype in (torch.bfloat16, torch.float16):
        by_descriptors(dtype, {})
        for config in (WS, WS_Z):
            plan = KernelPlan(expand=config, one_pass=config is WS, pdl=config is WS)
            by_descriptors(dtype, dict.fromkeys(OPERATIONS, Recipe("fused", plan)))
found["faults"] = stub_gpu.faults(launched)
print(json.dumps(found))
