"""What the backward of a group launches by the plan with dB beside dx: a script for a stub GPU.

    python -m tests.stub_gpu tests/group_beside_launches.py OUT.json

writes for each of CASES its launches in order, in the first call and by the launches that were kept.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.group.quantised import quantised_linear_group
from lorafa_kernels.plan.config import KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

BESIDE = Recipe("fused", KernelPlan(one_pass=False, beside=True))
K = 768


@dataclass(frozen=True)
class Case:
    """A group of layers of these widths and ranks, None for one without an adapter."""

    M: int = 8192
    widths: tuple[int, ...] = (512, 256, 256)
    ranks: tuple[int | None, ...] = (16, 16, 16)
    dropout_p: float = 0.0
    share_A: bool = False
    frozen: tuple[int, ...] = ()  # members whose lora_B needs no gradient
    unused: tuple[int, ...] = ()  # and those whose output is not used
    need_dx: bool = True
    kind: str = ""  # of a quantised base
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        changed = {key: value for key, value in asdict(self).items() if value != getattr(Case, key)}
        return " ".join(f"{key}={value}" for key, value in changed.items()) or "qkv"


CASES = (
    Case(),
    Case(M=512),
    Case(M=16),
    Case(widths=(4096, 4096, 4096)),
    Case(ranks=(64, 64, 64)),
    Case(ranks=(64, 4, 24)),
    Case(dropout_p=0.25),
    Case(share_A=True),
    Case(share_A=True, dropout_p=0.25),
    Case(frozen=(0,)),
    Case(frozen=(2,)),
    Case(frozen=(1, 2)),
    Case(frozen=(0, 1, 2)),
    Case(unused=(0,)),
    Case(unused=(2,)),
    Case(need_dx=False),
    Case(ranks=(16, None, 16)),
    Case(ranks=(16, 16, None)),
    Case(widths=(512, 256), ranks=(16, 16)),
    Case(widths=(512,), ranks=(16,)),
    Case(widths=(256,) * 4, ranks=(16,) * 4),
    Case(widths=(256,) * 5, ranks=(16,) * 5),
    Case(widths=(509, 251, 256)),
    Case(dtype=torch.float32),
    Case(kind="int8"),
)


def operands(case: Case, index: int, lora_A: torch.Tensor | None) -> LinearOperands:
    N, R, dtype = case.widths[index], case.ranks[index], case.dtype
    weight, bias = torch.zeros(N, K, dtype=dtype), torch.zeros(N, dtype=dtype)
    weight = quantised(weight, case.kind) if case.kind else weight
    if R is None:
        return LinearOperands(weight, bias)
    lora_A = torch.zeros(R, K, dtype=dtype) if lora_A is None else lora_A
    lora_B = torch.zeros(N, R, requires_grad=index not in case.frozen)
    return LinearOperands(weight, bias, lora_A, lora_B, 2.0, case.dropout_p)


def main(out: str) -> None:
    stub = importlib.import_module("tests.stub_gpu")
    rows = []
    for case in CASES:
        x = torch.zeros(case.M, K, dtype=case.dtype, requires_grad=case.need_dx)
        members: list[LinearOperands] = []
        for index in range(len(case.widths)):
            shared = members[0].lora_A if case.share_A and members else None
            members.append(operands(case, index, shared))
        group = quantised_linear_group if case.kind else lorafa_linear_group
        leaves = [x] * case.need_dx + [m.lora_B for m in members if m.lora_B is not None]
        calls = []
        for _ in range(2):
            with pin_plan({"backward": BESIDE}):
                ys = group(x, members, share_A=case.share_A, impl="triton")
                used = [y for i, y in enumerate(ys) if i not in case.unused]
                leaves = [leaf for leaf in leaves if leaf.requires_grad]
                with stub.recording() as launched:
                    dys = [torch.zeros_like(y) for y in used]
                    torch.autograd.grad(used, leaves, dys, allow_unused=True)
            calls.append(
                {
                    "kernels": [launch.kernel.removesuffix("_kernel") for launch in launched],
                    "dependent": [launch.dependent for launch in launched],
                    "waits": [launch.waits for launch in launched],
                    "triggers": [launch.triggers for launch in launched],
                    "blocks": [launch.grid[0] for launch in launched],
                    "repeated": sum(launch.repeated for launch in launched),
                    "faults": stub.faults(launched),
                }
            )
        rows.append({"case": case.name, "calls": calls})
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
