"""The four operations of a LoRA-FA linear layer, composed of the kernels. Shapes and dtypes as in
reference.py.

Each takes `plan`, the configurations that plan/kernels.py fills in. Where its expand makes z or dz itself
("recompute", and "ws_z" of operands that TMA can address), no shrink is called in forward and backward_input,
and in backward one launch makes dx with dz and another dB, whatever one_pass says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.frozen import QuantisedBase
from ..base.reading import product_of_codes
from ..kernels.expand import expand
from ..kernels.grad import grad
from ..kernels.recompute import recompute, serves
from ..kernels.shrink import shrink
from ..kernels.tile import rounded
from ..plan.config import KernelConfig
from ..plan.kernels import KernelConfigs


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
    plan: KernelConfigs,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R): one launch for few rows, else two."""
    scaling = scaling / (1 - dropout_p)
    dropout = {"dropout_p": dropout_p, "seed": seed}
    base = weight.t()
    if plan.recomputes and serves(plan.expand, x, base):
        factors = lora_A.t(), lora_B.t()
        return recompute(x, base, *factors, bias, scaling, config=plan.expand, **dropout)
    pdl = plan.pdl and _launches(x)
    lora_B, copy = copied(lora_B, x.dtype)
    z = shrink(x, lora_A.t(), scaling, config=plan.shrink, pdl=pdl, copy=copy, **dropout)
    return expand(x, base, z, lora_B.t(), bias, **expand_configs(plan), pdl=pdl), z


def forward_of_codes(
    x: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    plan: KernelConfigs,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) of a quantised base whose codes are read, without a dense weight: in
    two launches, or three where shrink cuts its contraction.
    """
    pdl = plan.pdl and _launches(x)
    lora_B, copy = copied(lora_B, x.dtype)
    how = {"config": plan.shrink, "pdl": pdl, "copy": copy, "dropout_p": dropout_p, "seed": seed}
    z = shrink(x, lora_A.t(), scaling / (1 - dropout_p), **how)
    return product_of_codes(x, base, bias, z, lora_B.t(), config=plan.expand, pdl=pdl), z


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
    plan: KernelConfigs,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) and dB (N, R) with one pass over dy beside the large product's, or with two.

    The kernel that writes dz is the last before expand, which may start while it runs; and dB's, where it
    comes last, while expand runs: nothing waits for dB.
    """
    dropout = {"dropout_p": dropout_p, "seed": seed}
    if plan.one_pass and not plan.recomputes:
        pdl = plan.pdl and _launches(dy)
        lora_A = rounded(lora_A, dy.dtype)
        dz, dB = grad(dy, z, lora_B, scaling, lora_B.dtype, config=plan.grad, pdl=pdl)
        return expand(dy, weight, dz, lora_A, **expand_configs(plan), pdl=pdl, **dropout), dB
    if plan.beside:
        pdl = _launches(dy)
        lora_A = rounded(lora_A, dy.dtype)
        dz = shrink(dy, lora_B, scaling, config=plan.shrink, pdl=pdl)
        dx = expand(dy, weight, dz, lora_A, **expand_configs(plan), pdl=pdl, trigger=True, **dropout)
        return dx, grad(dy, z, None, 1.0, lora_B.dtype, config=plan.grad, beside=dx.numel() > 0)[1]
    dB = grad(dy, z, None, 1.0, lora_B.dtype, config=plan.grad)[1]
    return _input_gradient(dy, weight, lora_A, lora_B, scaling, plan, dropout), dB


def backward_input(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    plan: KernelConfigs,
) -> Tensor:
    """Compute dx (M, K) alone: one launch for few rows, else two."""
    dropout = {"dropout_p": dropout_p, "seed": seed}
    return _input_gradient(dy, weight, lora_A, lora_B, scaling, plan, dropout)


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype, *, plan: KernelConfigs) -> Tensor:
    """Compute dB (N, R) in `dtype` alone: one launch for few rows, else two."""
    return grad(dy, z, None, 1.0, dtype, config=plan.grad)[1]


def _input_gradient(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    plan: KernelConfigs,
    dropout: dict,
) -> Tensor:
    if plan.recomputes and serves(plan.expand, dy, weight):
        operands = dy, weight, lora_B, lora_A, None, scaling
        return recompute(*operands, config=plan.expand, want_L=False, drop_P=False, **dropout)[0]
    pdl = plan.pdl and _launches(dy)
    # Here, so that no launch comes between those of dz and dx.
    lora_A = rounded(lora_A, dy.dtype)
    dz = shrink(dy, lora_B, scaling, config=plan.shrink, pdl=pdl)
    return expand(dy, weight, dz, lora_A, **expand_configs(plan), pdl=pdl, **dropout)


def _launches(rows: Tensor) -> bool:
    """Whether z or dz of these rows takes a kernel, which expand can overlap with: without columns it does
    not.
    """
    return rows.shape[1] > 0


def copied(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return a low-rank factor in `dtype`, and what shrink has to copy before that has its values, if
    anything: an fp32 lora_B beside 16-bit x, in a matrix that lives for the call.
    """
    if factor.dtype == dtype:
        return factor, None
    target = torch.empty(factor.shape, dtype=dtype, device=factor.device)
    return target, (factor, target)


def expand_configs(plan: KernelConfigs) -> dict[str, KernelConfig]:
    """Return the configurations that expand takes where z or dz is made before it, by name."""
    return {"config": plan.expand_after, "unaligned": plan.expand_unaligned}
