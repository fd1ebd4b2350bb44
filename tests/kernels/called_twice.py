"""Run by test_second_calls.py: counts what two calls of each operation launch, beside a stub driver that does
not watch, as host time is measured. Prints {operation: [[calls of Triton's JIT, launches], the same]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests import stub_gpu

# Before anything imports Triton.
stub = stub_gpu.install("sm_90", watch=False)

import torch  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lorafa_kernels import LoRAFASwiGLU, lorafa_linear  # noqa: E402
from lorafa_kernels.group.api import lorafa_linear_group  # noqa: E402
from lorafa_kernels.group.operands import LinearOperands  # noqa: E402

K, N, R = 256, 512, 16
counted = 0
run = JITFunction.run


def run_counted(self: Any, *args: Any, **kwargs: Any) -> Any:
    global counted
    counted += 1
    return run(self, *args, **kwargs)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def member() -> LinearOperands:
    return LinearOperands(bf16(N, K), None, bf16(R, K), torch.zeros(N, R, requires_grad=True))


def operations() -> dict[str, Callable[[torch.Tensor], Any]]:
    one, several, mlp = member(), [member() for _ in range(3)], LoRAFASwiGLU(K, N, r=R, dtype=torch.bfloat16)
    mlp.impl = "triton"
    return {
        "a layer": lambda x: (lorafa_linear(x, one.weight, one.lora_A, one.lora_B, impl="triton"),),
        "a group": lambda x: lorafa_linear_group(x, several, impl="triton"),
        "a gated MLP": lambda x: (mlp(x),),
    }


def step(call: Callable[[torch.Tensor], Any], M: int) -> list[int]:
    """Run forward and backward on new tensors; return how often Triton's JIT is called, and launches."""
    x = bf16(M, K).requires_grad_()
    before = counted, stub.launched
    ys = call(x)
    torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])
    return [counted - before[0], stub.launched - before[1]]


JITFunction.run = run_counted
found = {
    f"{name}, M = {M}": [step(call, M), step(call, M)]
    for name, call in operations().items()
    for M in (1, 256, 1100)
}
print(json.dumps(found))
