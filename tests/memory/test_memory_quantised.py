"""The planner's row of an NF4 base: its bytes are those of a model that is quantised, and what its operators
allocate inside a call is what they really do.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_memory_temporaries import events
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa, quantize_base
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.memory import cpu
from lorafa_kernels.memory.plan import plan_memory

M, N, K, R = 8, 96, 128, 4


def test_bytes_are_those_of_the_quantised_model():
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 66), nn.ReLU(), nn.Linear(66, 8))
    step = lambda module, x: module(x).square().mean()  # noqa: E731
    rows = lambda module, batch, sequence: torch.randn(batch, 128)  # noqa: E731
    targets = ["0", "2", "4"]
    options = {"methods": ["lorafa", "lorafa-nf4"], "targets": targets, "rank": R, "device": "cpu"}
    plan = plan_memory(model, step, rows, batch=4, dropout=0, **options)
    dense, nf4 = (plan.rows[key].variants["plain"] for key in ("lorafa", "lorafa-nf4"))
    real = apply_lorafa(quantize_base(copy.deepcopy(model), "nf4"), LoRAFAConfig(r=R, target_modules=targets))
    weights = [t for name, t in real.named_parameters() if "lora_" not in name]
    assert nf4.kinds["weights"] == sum(tensor.nbytes for tensor in weights)
    assert nf4.kinds["adapters"] == dense.kinds["adapters"]
    assert nf4.kinds["weights"] < dense.kinds["weights"] / 5
    assert nf4.kept == dense.kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_temporaries_are_what_a_call_takes(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    base = quantised(draw(N, K), kind)
    parts = (list(base.tensors), base.kind.name, base.shape, base.dtype)
    factors = draw(R, K), draw(N, R)
    half = quantised(draw(N // 2, K), kind)
    group = [*base.tensors, *half.tensors], 2 * [kind], [N, K, N // 2, K], dtype
    of_group = [draw(R, K), draw(R, K)], [draw(N, R), draw(N // 2, R)], [None, None]
    how = [0.5, 0.5], [0.0, 0.0], None, False
    ours = torch.ops.lorafa_kernels
    table = cpu.temporaries()
    for op, arguments in (
        (ours.quantised_forward.default, (draw(M, K), *parts, *factors, None, 0.5, "torch")),
        (ours.quantised_backward.default, (draw(M, N), draw(M, R), *parts, *factors, 0.5, "torch")),
        (ours.quantised_backward_input.default, (draw(M, N), *parts, *factors, 0.5, "torch")),
        (ours.frozen_product.default, (draw(M, K), *parts, None)),
        (ours.frozen_gradient.default, (draw(M, N), *parts)),
        (ours.quantised_group_forward.default, (draw(M, K), *group, *of_group, *how, "torch")),
        (
            ours.quantised_group_backward.default,
            ([draw(M, N), draw(M, N // 2)], draw(M, 2 * R), *group, *of_group[:2], *how, 2 * [True], "torch"),
        ),
    ):
        out, peak = events(lambda op=op, arguments=arguments: op(*arguments))
        results = out if isinstance(out, (tuple, list)) else [out]
        # Making the weight is what takes most: the results are not there yet.
        planned = table[op](arguments, {}, out)
        sizes = sum(result.nbytes for result in results)
        # Tables of 256 values, scales in fp32, and what a product of 16 bits takes of its own.
        room = 4096 + 8 * N * K // 64
        assert planned - sizes <= peak <= planned + sizes + room, f"{op}: planned {planned}, really {peak}"
        assert planned >= N * K * dtype.itemsize
