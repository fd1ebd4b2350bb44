"""The four operations of a LoRA-FA linear layer, composed of the kernels. Shapes and dtypes as in
reference.py.

Each takes `plan`: None for the heuristics, or an object with the attributes of plan.config.KernelPlan:

    shrink, expand, grad   KernelConfig, or None for the kernel's heuristic default
    one_pass: bool         backward: one pass over dy for dz and dB, or two (dB, then dz)
    pdl: bool              overlap expand with the kernel before it, where the device can

A plan whose expand has variant "recompute" calls no shrink in forward and backward_input, and in backward
makes dx with dz in one launch and dB in another, whatever one_pass says. A pinned variant that cannot address
these operands (TMA: 16-bit, rows at multiples of 16 bytes) gives way to the portable kernel's default.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.expand import expand
from ..kernels.grad import grad
from ..kernels.recompute import recompute
from ..kernels.shrink import shrink
from ..kernels.tile import device_limits
from ..plan.config import KernelConfig, KernelPlan, default_config, default_plan, makes_mask, rows_aligned


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    plan: KernelPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R): one launch for few rows, else two."""
    plan, config = _resolve(plan, x, weight, lora_A.shape[0], dropout_p > 0, forward=True)
    scaling = scaling / (1 - dropout_p)
    dropout = {"dropout_p": dropout_p, "seed": seed}
    if config.variant == "recompute":
        return recompute(x, weight.t(), lora_A.t(), lora_B.t(), bias, scaling, config=config, **dropout)
    pdl = plan.pdl and _launches(x)
    z = shrink(x, lora_A.t(), scaling, config=plan.shrink, pdl=pdl, **dropout)
    return expand(x, weight.t(), z, lora_B.t(), bias, config=config, pdl=pdl), z


def backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    plan: KernelPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) and dB (N, R) with one pass over dy beside the large product's, or with two.

    The kernel that writes dz is the last before expand, which may start while it runs.
    """
    plan, config = _resolve(plan, dy, weight, lora_A.shape[0], dropout_p > 0)
    dropout = {"dropout_p": dropout_p, "seed": seed}
    if plan.one_pass and config.variant != "recompute":
        pdl = plan.pdl and _launches(dy)
        dz, dB = grad(dy, z, lora_B, scaling, lora_B.dtype, config=plan.grad, pdl=pdl)
        return expand(dy, weight, dz, lora_A, config=config, pdl=pdl, **dropout), dB
    dB = grad(dy, z, None, 1.0, lora_B.dtype, config=plan.grad)[1]
    return _input_gradient(dy, weight, lora_A, lora_B, scaling, plan, config, dropout), dB


def backward_input(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    plan: KernelPlan | None = None,
) -> Tensor:
    """Compute dx (M, K) alone: one launch for few rows, else two."""
    plan, config = _resolve(plan, dy, weight, lora_A.shape[0], dropout_p > 0)
    dropout = {"dropout_p": dropout_p, "seed": seed}
    return _input_gradient(dy, weight, lora_A, lora_B, scaling, plan, config, dropout)


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype, *, plan: KernelPlan | None = None) -> Tensor:
    """Compute dB (N, R) in `dtype` alone: one launch for few rows, else two."""
    return grad(dy, z, None, 1.0, dtype, config=plan.grad if plan else None)[1]


def _input_gradient(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    plan: KernelPlan,
    config: KernelConfig,
    dropout: dict,
) -> Tensor:
    if config.variant == "recompute":
        dx, _ = recompute(
            dy, weight, lora_B, lora_A, None, scaling, config=config, want_L=False, drop_P=False, **dropout
        )
        return dx
    pdl = plan.pdl and _launches(dy)
    dz = shrink(dy, lora_B, scaling, config=plan.shrink, pdl=pdl)
    return expand(dy, weight, dz, lora_A, config=config, pdl=pdl, **dropout)


def _launches(rows: Tensor) -> bool:
    """Whether z or dz of these rows takes a kernel, which expand can overlap with: without columns it does
    not.
    """
    return rows.shape[1] > 0


def _resolve(
    plan: KernelPlan | None, rows: Tensor, weight: Tensor, R: int, dropout: bool, forward: bool = False
) -> tuple[KernelPlan, KernelConfig]:
    """Return the plan, the heuristic one if there is none, and its configuration of expand."""
    if plan is not None and plan.expand is not None:
        return plan, plan.expand
    size = rows.element_size()
    key = (device_limits(rows.device), size, rows.shape[0], R, rows_aligned(size, *weight.shape))
    config = default_config("expand", *key)
    if dropout and makes_mask("expand", forward, config):
        config = default_config("expand", *key, dropout=True)
    if plan is None:
        # shrink finds its own: it makes the mask or it does not.
        plan = replace(default_plan(*key), shrink=None)
    return plan, config
