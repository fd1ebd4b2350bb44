"""Products that read the codes of a quantised base, where a kernel does: W (N, K) is nowhere then.

plan/ decides, by rows and the model of the cost, between that and W made into a temporary (frozen.py). Which
base the kernel reads at all:

    nf4, nf4-nested   by rows (K a multiple of 64)       int8, fp8   any
    x bf16 or fp16; W in any dtype but fp64; neither empty
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import chosen
from ..plan.choice import Decision, choose_frozen, choose_plan, planned_device
from ..plan.config import KernelConfig
from ..plan.defaults import CODES_ROWS
from ..plan.pin import Pin, pinned
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


class Decisions(dict):
    """What was decided where plans had to be compared, by all that it depends on: {key: (device, decision)}.

    At most MOST entries. They hold until plan.choice.forget_plans(): plans made after it are for another
    Device object.
    """

    MOST = 4096

    def find(self, device: torch.device, key: Hashable) -> Any:
        """Return the decision for a key that contains `device`, or None."""
        found = self.get(key)
        return found[1] if found is not None and found[0] is planned_device(device) else None

    def keep(self, device: torch.device, key: Hashable, decision: Any) -> Any:
        """Keep a decision and return it."""
        if len(self) >= self.MOST:
            self.clear()
        self[key] = planned_device(device), decision
        return decision


_decisions = Decisions()


def decide_forward(x: Tensor, base: QuantisedBase, R: int, bias: bool, dropout: bool, impl: str) -> Decision:
    """Decide how the forward of a layer with an adapter of rank R runs: on the codes (`reads_codes`), or
    on W made before it, and then as the layer does on that W. impl as of the layer; raises as decide().
    """
    choice, pin = chosen("forward", impl, x)
    M = x.shape[0]
    if choice.impl != "triton" or type(M) is not int:
        return choice.without_plan
    problem = (impl, "forward", x.device, x.dtype, M, *base.shape, R, bias, dropout, pin)
    codes = readable(base, x.dtype) if may_read_codes(M, pin) else ""
    if not codes:
        return Decision("triton", choose_plan(*problem))
    key = (problem, codes)
    if (found := _decisions.find(x.device, key)) is not None:
        return found
    decision = Decision("triton", choose_plan(*problem, codes=codes))
    if not reads_codes(decision):
        # Nothing but products with dense weights was measured.
        decision = Decision("triton", choose_plan(*problem))
    return _decisions.keep(x.device, key, decision)


def reads_codes(decision: Decision) -> bool:
    """Whether forward_of_codes of linear/fused.py computes what was decided on."""
    plan = decision.plan
    return plan is not None and plan.name == "fused" and plan.kernels.expand.reads_codes


def may_read_codes(M: int, pin: Pin | None) -> bool:
    """Whether a plan for so many rows could read codes."""
    return M <= CODES_ROWS or pin is not None


def reading_config(x: Tensor, base: QuantisedBase, bias: bool) -> KernelConfig | None:
    """Return the configuration with which a layer without an adapter reads codes, or None."""
    M = x.shape[0]
    if type(M) is not int or not may_read_codes(M, pinned()):
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
