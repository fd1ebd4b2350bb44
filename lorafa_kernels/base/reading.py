"""Products that read the codes of a quantised base, where a kernel does: W (N, K) is nowhere then.

plan/ decides, by rows and the model of the cost, between that and W made into a temporary (frozen.py). Which
base the kernel reads at all:

    nf4, nf4-nested   by rows (K a multiple of 64)       int8, fp8   any
    x bf16 or fp16; W in any dtype but fp64; neither empty
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..plan.choice import choose, choose_frozen, choose_plan
from ..plan.config import KernelConfig
from ..plan.defaults import CODES_ROWS
from ..plan.make import Plan
from ..plan.pin import pinned
from .frozen import QuantisedBase
from .kinds import has_rows, values

_DTYPES = (torch.bfloat16, torch.float16)


def readable(base: QuantisedBase, dtype: torch.dtype) -> str:
    """The kind of a base whose codes a kernel can read for x of this dtype, as Problem.codes has it; "" for
    another.
    """
    N, K = base.shape
    by_rows = has_rows(K) or not base.kind.name.startswith("nf4")
    served = by_rows and N > 0 and K > 0 and dtype in _DTYPES and base.dtype != torch.float64
    return base.kind.name if served else ""


def reading_plan(x: Tensor, base: QuantisedBase, R: int, bias: bool, dropout: bool, impl: str) -> Plan | None:
    """Return the plan of the forward of a layer with an adapter of rank R where it reads codes, else None.
    impl as of the layer; raises as choose() and choose_plan().
    """
    M, pin = x.shape[0], pinned()
    if type(M) is not int or (M > CODES_ROWS and pin is None) or impl not in ("auto", "triton"):
        return None
    codes = readable(base, x.dtype)
    if not codes:
        return None
    needs = pin is not None and pin.needs_kernels("forward")
    if choose(impl, x.device, x.dtype, needs).impl != "triton":
        return None
    sizes = (M, *base.shape, R)
    plan = choose_plan(impl, "forward", x.device, x.dtype, *sizes, bias, dropout, pin, codes=codes)
    return plan if plan.name == "fused" and plan.kernels.expand.reads_codes else None


def reading_config(x: Tensor, base: QuantisedBase, bias: bool) -> KernelConfig | None:
    """Return the configuration with which a layer without an adapter reads codes, or None."""
    M = x.shape[0]
    if type(M) is not int or (M > CODES_ROWS and pinned() is None):
        return None
    codes = readable(base, x.dtype)
    return choose_frozen(x.device, x.dtype, M, *base.shape, bias, codes) if codes else None


def product_of_codes(
    x: Tensor,
    base: QuantisedBase,
    bias: Tensor | None,
    z: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    config: KernelConfig,
    pdl: bool = False,
) -> Tensor:
    """Compute x Wᵀ + z · factor + bias (M, N) by the kernel. z (M, R), factor (R, N), or both None."""
    kernels = importlib.import_module("..kernels.expand_codes", __package__)
    named = dict(zip(base.kind.names, base.tensors, strict=True))
    codes, scale, nested = named["weight"].contiguous(), named.get("scale", named.get("absmax")), None
    scale = scale.contiguous()
    if "nested_absmax" in named:
        nested = tuple(values(named[name]) for name in ("nested_absmax", "nested_code", "nested_offset"))
    else:
        scale = values(scale)
    operands = x, base.kind.name, codes, scale, nested, base.dtype, z, factor, bias
    return kernels.expand_codes(*operands, config=config, pdl=pdl)
