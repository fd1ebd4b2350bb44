"""What the GPU call's first stage checks: compositions of kernels that together launch every kernel of the
package, each against fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.checks.blocks import block_results, draw_block, plain_block
from lorafa_kernels.checks.budget import draw_operands, lorafa_results, plain_formula
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.kernels.gated import gated, gated_backward
from lorafa_kernels.linear.quantised import quantised_linear
from lorafa_kernels.mixed.api import lorafa_linear_mixed
from lorafa_kernels.mixed.rows import Rows
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KernelPlan
from lorafa_kernels.plan.defaults import codes_config
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Recipe
from lorafa_kernels.plan.specialised import missing_for_ws, ws_configs

from ..measure.kernels import PORTABLE_CONFIG

# Results by name.
Results = dict[str, torch.Tensor]
# compute(pdl), and the exact and the plain results.
Made = tuple[Callable[[bool], Results], Results, Results]
# A composition of kernels: its name; how to make what it computes; and with and without dependent launch,
# where it makes a difference.
Check = tuple[str, Callable[[], Made], tuple[bool, ...]]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_TEXT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# Of a mixed batch: whose each sample is, -1 nobody's, and the adapters' ranks.
PLACES, RANKS = (2, 0, -1, 1, 0, 2, 2, 0), (16, 5, 64)


def checks(device: str, rows: int = 2048, K: int = 1024, N: int = 1536) -> list[Check]:
    """Return what is checked, the default paths first. Each kernel of the package that runs on the device is
    in at least one (tests/bench/test_gpu_checks.py). rows: where they are many.
    """
    shape, wide, square = (rows, K, N, 16), (rows, K, N, 64), (rows, K // 2, K // 2, 16)
    return [
        layer("bf16", device, shape, BF16),
        block("group", device, square, BF16),
        quantised_layer("nf4", device, (16, K, N, 16)),
        activation("silu", device, rows),
        layer("bf16 R=64", device, wide, BF16),
        layer("bf16, two passes", device, shape, BF16, one_pass=False),
        layer("bf16, dB beside dx", device, shape, BF16, one_pass=False, beside=True),
        block("group", device, square, BF16, ", dB beside dx", one_pass=False, beside=True),
        layer("bf16, portable", device, shape, BF16, expand=PORTABLE_CONFIG),
        layer("bf16, few rows", device, (16, K, N, 16), BF16),
        quantised_layer("nf4-nested", device, (128, K, N, 16)),
        quantised_layer("int8", device, (64, K, N, 16)),
        quantised_layer("fp8", device, (17, K, N, 16)),
        layer("bf16, dropout", device, shape, BF16, dropout=0.1),
        layer("bf16, not aligned", device, (300, K // 2 - 11, N // 2 + 9, 7), BF16),
        activation("gelu", device, rows),
        layer("fp16", device, shape, FP16),
        layer("fp32", device, (rows, K // 2, N // 2, 16), FP32),
        block("mlp", device, square, BF16),
        block("group", device, square, FP32),
        layer("bf16 R=128", device, (rows, K, N, 128), BF16),
        layer("fp16, dropout", device, wide, FP16, dropout=0.1),
        *specialised(device, rows, K, N),
        mixed(device, rows, K, N, BF16, 0.0),
        mixed(device, rows, K, N, FP16, 0.1),
    ]


def some(device: str) -> list[Check]:
    """Return a few checks of few rows, where launching is all there is to see."""
    return checks(device, rows=256)[:4]


def layer(
    name: str, device: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, dropout: float = 0.0, **plan
) -> Check:
    """A layer of sizes M, K, N and R, with these fields of KernelPlan."""

    def make() -> Made:
        o = draw_operands(*sizes, dtype, device, factor_dtype=FP32, dropout_p=dropout)

        def compute(pdl: bool) -> Results:
            with pin_plan(dict.fromkeys(OPERATIONS, Recipe("fused", KernelPlan(pdl=pdl, **plan)))):
                return lorafa_results(o, "triton")

        return compute, plain_formula(o, torch.float64), plain_formula(o)

    return _named(f"layer {name}", sizes), make, (True, False)


def specialised(device: str, M: int, K: int, N: int) -> list[Check]:
    """Layers by the kernels with specialised warps, where they run."""
    here = planned_device(torch.device(device))
    if missing_for_ws(here.limits, here.triton):
        return []
    found = []
    for variant in ("ws", "ws_z"):
        for R in (16, 64):
            plan = {"expand": ws_configs(here.limits, 2, R, variant)[0], "one_pass": variant == "ws"}
            found.append(layer(f"bf16, {variant}", device, (M, K, N, R), BF16, **plan))
    return found


def quantised_layer(kind: str, device: str, sizes: tuple[int, int, int, int]) -> Check:
    """A layer on a base of which codes are read in forward."""

    def make() -> Made:
        o = draw_operands(*sizes, BF16, device, factor_dtype=FP32)
        base = quantised(o.weight, kind)
        o = replace(o, weight=base.dense())
        config = codes_config(planned_device(torch.device(device)).limits, 2, sizes[0], sizes[3])

        def compute(pdl: bool) -> Results:
            x, lora_B = (t.detach().requires_grad_() for t in (o.x, o.lora_B))
            with pin_plan({"forward": Recipe("fused", KernelPlan(expand=config, pdl=pdl))}):
                how = {"scaling": o.scaling, "impl": "triton"}
                y = quantised_linear(x, base, o.lora_A, lora_B, o.bias, **how)
                dx, dB = torch.autograd.grad(y, (x, lora_B), o.dy)
            return {"y": y.detach(), "dx": dx, "dB": dB}

        return compute, plain_formula(o, torch.float64), plain_formula(o)

    return _named(f"layer on {kind}, codes read", sizes), make, (True, False)


def block(
    name: str, device: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, how: str = "", **plan
) -> Check:
    """A block of checks/blocks.py; with these fields of KernelPlan, which `how` says in words, if any."""

    def make() -> Made:
        o = draw_block(name, *sizes, dtype, device)
        exact, plain = plain_block(name, o, torch.float64), plain_block(name, o)

        def compute(pdl: bool) -> Results:
            pinned = dict.fromkeys(OPERATIONS, Recipe("fused", KernelPlan(**plan))) if plan else {}
            with pin_plan(pinned) if pinned else contextlib.nullcontext():
                return block_results(name, o, "triton")

        return compute, exact, plain

    return _named(f"{name} {_TEXT[dtype]}{how}", sizes), make, (True,)


def activation(kind: str, device: str, M: int) -> Check:
    """The product with the activation, forward and backward."""

    def make() -> Made:
        g, u, dh = torch.randn(3, M, 512, device=device, dtype=BF16).unbind()

        def formula(dtype: torch.dtype) -> Results:
            a, b = (value.to(dtype).detach().requires_grad_() for value in (g, u))
            h = (F.silu(a) if kind == "silu" else F.gelu(a)) * b
            dg, du = torch.autograd.grad(h, (a, b), dh.to(dtype))
            return {"h": h.detach(), "dg": dg, "du": du}

        def compute(pdl: bool) -> Results:
            dg = dh.clone()
            return {"h": gated(g, u, kind), "dg": dg, "du": gated_backward(dg, g, u, kind, True)}

        return compute, formula(torch.float64), formula(BF16)

    return f"gated {kind} {M}x512", make, (True,)


def mixed(device: str, M: int, K: int, N: int, dtype: torch.dtype, dropout: float) -> Check:
    """A batch of which each sample takes one of three adapters, or none."""

    def make() -> Made:
        # One x, weight and gradient, and one mask.
        of = draw_operands(M, K, N, 1, dtype, device, factor_dtype=FP32, dropout_p=dropout)
        factors = [
            draw_operands(1, K, N, R, dtype, device, seed=1 + i, factor_dtype=FP32)
            for i, R in enumerate(RANKS)
        ]
        alone = [replace(of, lora_A=one.lora_A, lora_B=one.lora_B) for one in factors]
        whose = torch.tensor(PLACES, device=device).repeat_interleave(M // len(PLACES))

        def formula(wide: torch.dtype | None) -> Results:
            """Of rows that nobody has what they are without the second term."""
            parts = []
            for number, o in enumerate(alone):
                has = (whose == number)[:, None]
                parts.append((has, plain_formula(replace(o, dy=torch.where(has, o.dy, 0)), wide)))
            nobody = replace(of, lora_B=torch.zeros_like(of.lora_B))
            found = plain_formula(nobody, wide)
            for has, part in parts:
                for name in ("y", "dx"):
                    found[name] = torch.where(has, part[name], found[name])
            return {**found, "dB": torch.cat([part["dB"] for _, part in parts], dim=1)}

        def compute(pdl: bool) -> Results:
            x = of.x.detach().view(len(PLACES), -1, K).requires_grad_()
            lora_Bs = [o.lora_B.detach().requires_grad_() for o in alone]
            members = {
                i: LinearOperands(o.weight, o.bias, o.lora_A, lora_B, o.scaling, o.dropout_p)
                for i, (o, lora_B) in enumerate(zip(alone, lora_Bs, strict=True))
            }
            with of.seeded():
                y = lorafa_linear_mixed(x, members, Rows.of(PLACES, len(members)), impl="triton")
            dx, *dBs = torch.autograd.grad(y, (x, *lora_Bs), of.dy.view_as(y))
            return {"y": y.detach().view(M, N), "dx": dx.view(M, K), "dB": torch.cat(dBs, dim=1)}

        return compute, formula(torch.float64), formula(None)

    text = f"mixed {_TEXT[dtype]}{', dropout' if dropout else ''}"
    return _named(text, (M, K, N, max(RANKS))), make, (True,)


def _named(text: str, sizes: tuple[int, int, int, int]) -> str:
    M, K, N, R = sizes
    return f"{text} {M}x{K}x{N} R={R}"
