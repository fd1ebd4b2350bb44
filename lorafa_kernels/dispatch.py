"""What every operation shares on its way from an autograd node to an implementation.

define            registers an operator of the library `lorafa_kernels`: schema, body, shape function
decide            which implementation runs and, of the Triton kernels, by which plan
Implementations   the functions of an operation's folder: which of them is called
call              calls one with autocast off and the tensors' device current
first_order       gradients that raise when they are differentiated

An operator (torch.ops.lorafa_kernels.*) is called where that is needed: for the Triton kernels, which shape
propagation must not enter, under a compiler, where there is something to cast, or dropout, and where a
TorchDispatchMode watches: it would see the library's products accumulate into each other's outputs, which
selective activation checkpointing cannot save, and which FlopCounterMode does not count (flops.py). Otherwise
what is made of PyTorch's own operators alone is called directly, which saves the dispatcher's ~5 µs a call on
the CPU (estimate). Under a compiler the plan is chosen when the operator runs, for the sizes
it then has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .flops import tell_flop_counters
from .operands import autocast_enabled
from .plan.choice import choose, choose_plan
from .plan.make import Plan
from .plan.pin import pinned

# Absent or renamed, direct calls would go unnoticed: an error at import is better.
watching_modes = torch._C._len_torch_dispatch_stack
_library = torch.library.Library("lorafa_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(name: str, schema: str, operation: Callable, fake: Callable) -> Callable:
    """Register an operator and return it. operation: its body; fake: the same on shapes and dtypes alone."""
    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafa_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.lorafa_kernels, name).default


def open_to_direct_calls(device_type: str) -> bool:
    """Whether what is made of PyTorch's own operators may be called as it is: nothing compiles, casts or
    watches.
    """
    return not (torch.compiler.is_compiling() or autocast_enabled(device_type) or watching_modes())


def watched() -> bool:
    """Whether a TorchDispatchMode sees what is called now."""
    return not torch.compiler.is_compiling() and watching_modes() > 0


def announce() -> None:
    """Prepare what watches for an operator that is about to be called."""
    if watched():
        tell_flop_counters()


Decision = tuple[str, Plan | None]


def decide(
    op: str,
    impl: str,
    x: Tensor,
    sizes: Callable[[], tuple[int, int, int]],
    bias: bool = False,
    dropout: bool = False,
) -> Decision:
    """Return the implementation of an operation, and its plan if that is "triton" and M is known.

    op: one of plan.recipe.OPERATIONS. x: (M, K), or dy (M, N). sizes: returns N, K and R; K is 0 where no
    weight is read. bias, dropout: whether there is one.
    """
    pin = pinned() if impl in ("auto", "triton") else None
    kernels = pin is not None and pin.needs_kernels(op)
    name = choose(impl, x.device, x.dtype, kernels).impl
    M = x.shape[0]
    # While shapes are propagated a size can be a symbol, and nothing is computed.
    if name != "triton" or type(M) is not int:
        return name, None
    return name, choose_plan(impl, op, x.device, x.dtype, M, *sizes(), bias, dropout, pin)


@dataclass(frozen=True)
class Implementations:
    """The implementations of one operation.

    reference, library: modules made of PyTorch's own operators, and therefore open to direct calls. fused:
    name of the module that composes the kernels; importing it imports Triton. one_pass: the library's
    backward, but for dz and dB, which come from the kernel that reads dy once; takes a plan first.
    """

    reference: ModuleType
    library: ModuleType
    fused: str
    one_pass: Callable[..., Any]

    def direct(self, function: str, op: str, decision: Decision) -> Callable[..., Any] | None:
        """Return the function to call as it is, or None where the operator must be called."""
        name, plan = decision
        if plan is None:
            if name == "torch":
                return getattr(self.library, function)
            return getattr(self.reference, function) if name == "reference" else None
        if plan.name == "library" and not _takes_grad_kernel(op, plan):
            return getattr(self.library, function)
        return None

    def find(self, function: str, op: str, decision: Decision) -> Callable[..., Any]:
        """Return the function that computes as decided. op: as in `decide`."""
        _, plan = decision
        if plan is not None and plan.name == "fused":
            return partial(getattr(importlib.import_module(self.fused), function), plan=plan.kernels)
        if plan is not None and _takes_grad_kernel(op, plan):
            return partial(self.one_pass, plan)
        found = self.direct(function, op, decision)
        if found is None:
            raise RuntimeError(f"{decision[0]} has no plan for sizes that are not known")
        return found


def _takes_grad_kernel(op: str, plan: Plan) -> bool:
    """Whether a plan of the library's products takes dz and dB from the kernel that reads dy once."""
    return op == "backward" and plan.kernels.one_pass


def call(function: Callable[..., Any], device: torch.device, *arguments):
    """Return function(*arguments), computed with autocast off and `device` current."""
    # It would change the dtypes of the products within.
    if autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return call(function, device, *arguments)
    # Triton launches on the current device, wherever its arguments lie.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return function(*arguments)
    return function(*arguments)


def first_order(compute: Callable[..., tuple[Tensor | None, ...]], *arguments) -> tuple[Tensor | None, ...]:
    """Return the gradients compute(*arguments), which raise RuntimeError when they are differentiated."""
    if not torch.is_grad_enabled():
        return compute(*arguments)
    with torch.no_grad():
        gradients = compute(*arguments)
    # Under create_graph=True. dx and dB depend on more than dy (on lora_B, and through z on x), so they must
    # not pass for constants even where dy is one.
    anchor = torch.empty(0, requires_grad=True)
    return tuple(None if grad is None else _RefuseSecondBackward.apply(grad, anchor) for grad in gradients)


class _RefuseSecondBackward(torch.autograd.Function):
    """Passes a gradient on; raises when it is differentiated."""

    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "double backward through a LoRA-FA layer is not supported: its gradients can be taken once"
        )
