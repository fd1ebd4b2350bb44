"""What the backward of the plan with dB beside dx launches: a script for a stub GPU.

    python -m tests.stub_gpu tests/beside_launches.py OUT.json

writes for each of CASES its launches in order, in the first call and by the launches that were kept.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import torch

from lorafa_kernels import lorafa_linear
from lorafa_kernels.plan.config import KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

BESIDE = Recipe("fused", KernelPlan(one_pass=False, beside=True))
K, N = 768, 512
# M, R, dropout, bias.
CASES = [*itertools.product((16, 512, 1100, 8192), (16, 64), (0.0, 0.25), (True, False))]


def main(out: str) -> None:
    stub = importlib.import_module("tests.stub_gpu")
    rows = []
    for M, R, dropout_p, with_bias in CASES:
        x = torch.zeros(M, K, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(N, K, dtype=torch.bfloat16)
        lora_A, lora_B = torch.zeros(R, K, dtype=torch.bfloat16), torch.zeros(N, R, requires_grad=True)
        bias = torch.zeros(N, dtype=torch.bfloat16) if with_bias else None
        calls = []
        for _ in range(2):
            with pin_plan({"backward": BESIDE}):
                y = lorafa_linear(x, weight, lora_A, lora_B, bias, dropout_p=dropout_p, impl="triton")
                with stub.recording() as launched:
                    torch.autograd.grad(y, (x, lora_B), torch.zeros_like(y))
            calls.append(
                {
                    "kernels": [launch.kernel for launch in launched],
                    "dependent": [launch.dependent for launch in launched],
                    "waits": [launch.waits for launch in launched],
                    "triggers": [launch.triggers for launch in launched],
                    "repeated": sum(launch.repeated for launch in launched),
                    "faults": stub.faults(launched),
                }
            )
        rows.append({"case": [M, R, dropout_p, with_bias], "calls": calls})
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
