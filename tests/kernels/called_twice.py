"""Run by test_second_calls.py: counts what two calls of each operation launch, beside a stub driver that does
not watch, as host time is measured. Prints {operation: [[calls of Triton's JIT, kernels that are looked up by
what they are specialised on, launches], the same]}.
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
from lorafa_kernels.kernels import launch  # noqa: E402

K, N, R = 256, 512, 16
calls = {"run": 0, "look up": 0}


def counted(name: str, function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


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
    """Run forward and backward on new tensors, and return what is counted."""
    x = bf16(M, K).requires_grad_()
    before = [*calls.values(), stub.launched]
    ys = call(x)
    torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])
    return [now - then for now, then in zip([*calls.values(), stub.launched], before, strict=True)]


JITFunction.run = counted("run", JITFunction.run)
launch.specialisation = counted("look up", launch.specialisation)
found = {
    f"{name}, M = {M}": [step(call, M), step(call, M)]
    for name, call in operations().items()
    for M in (1, 256, 1100)
}
print(json.dumps(found))
