"""What every operation shares on its way from an autograd node to an implementation.

define            registers an operator of the library `lorafa_kernels`: schema, body, shape function
decide            which implementation runs (chosen) and, of the Triton kernels, by which plan (planned)
Implementations   the functions of an operation's folder: which of them is called
call              calls one with autocast off and the tensors' device current
bare_apply        an autograd node without PyTorch's Python around it
first_order       gradients that raise when they are differentiated

An operator (torch.ops.lorafa_kernels.*) is called where something else than a plain call in eager mode goes
on: under a compiler or a tracer, which must see one operator; where there is something to cast; and where a
TorchDispatchMode watches, which would see the library's products accumulate into each other's outputs, what
selective activation checkpointing cannot save and FlopCounterMode does not count (flops.py). Otherwise the
implementation is called directly, which saves the dispatcher's ~5 µs a call on the CPU (estimate) and a
second decision. Under a compiler the plan is chosen when the operator runs, for the sizes it then has.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .flops import tell_flop_counters
from .operands import any_autocast, autocast_enabled
from .plan.choice import Choice, Decision, choose, choose_plan
from .plan.pin import Pin, pinned

# Absent or renamed, direct calls would go unnoticed: an error at import is better.
dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
functorch_level = torch._C._functorch.peek_interpreter_stack
transforming = torch._C._are_functorch_transforms_active
unwrapped = torch._C._functorch.unwrap_if_dead
_onlookers = threading.local()
_library = torch.library.Library("lorafa_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(
    name: str, schema: str, operation: Callable, fake: Callable, tags: tuple[torch.Tag, ...] = ()
) -> Callable:
    """Register an operator and return it. operation: its body; fake: the same on shapes and dtypes alone;
    tags: besides those of every operator.
    """
    _library.define(f"{name}{schema}", tags=(*_TAGS, *tags))
    _library.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafa_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.lorafa_kernels, name).default


def watching_modes() -> int:
    """How many TorchDispatchModes are on that operators must be called for."""
    count = dispatch_modes()
    return count if not count or not getattr(_onlookers, "see_inside", False) else 0


@contextlib.contextmanager
def only_looked_on(operators: bool) -> Iterator[None]:
    """Within it, dispatch modes of this thread change nothing of what runs: they only look on.

    operators: the operators are called all the same, as where kernels run of which a mode sees nothing.
    Selective checkpointing and FLOP counters are no onlookers: they read or keep what is called.
    """
    before = vars(_onlookers).copy()
    _onlookers.there, _onlookers.see_inside = True, not operators
    try:
        yield
    finally:
        vars(_onlookers).clear()
        vars(_onlookers).update(before)


def open_to_direct_calls() -> bool:
    """Whether what is made of PyTorch's own operators may be called as it is: nothing compiles, casts or
    watches.
    """
    return not (is_compiling() or any_autocast() or (dispatch_modes() and watching_modes()))


def holds_data(x: Tensor) -> bool:
    """Whether a kernel may be launched on x without its operator: x has data of its own, and nothing traces
    or transforms the call.
    """
    return type(x) is Tensor and tracing_state() is None and functorch_level() is None


def watched() -> bool:
    """Whether a TorchDispatchMode that does more than look on sees what is called now."""
    return not is_compiling() and watching_modes() > 0 and not getattr(_onlookers, "there", False)


def announce() -> None:
    """Prepare what watches for an operator that is about to be called."""
    if watched():
        tell_flop_counters()


def decide(
    op: str,
    impl: str,
    x: Tensor,
    sizes: Callable[[], tuple],
    bias: bool = False,
    dropout: bool = False,
) -> Decision:
    """Return the implementation of an operation, and its plan if that is "triton" and M is known.

    op: one of plan.recipe.OPERATIONS. x: (M, K), or dy (M, N). sizes: returns N, K (0 where no weight is
    read) and R, and of a group widths and makers of Problem. bias, dropout: whether there is one.
    """
    choice, pin = chosen(op, impl, x)
    if choice.impl != "triton":
        return choice.without_plan
    return planned(choice, pin, op, impl, x, sizes, bias, dropout)


def chosen(op: str, impl: str, x: Tensor) -> tuple[Choice, Pin | None]:
    """Return the implementation of an operation, and what is pinned where that concerns `impl`."""
    pin = pinned() if impl in ("auto", "triton") else None
    return choose(impl, x.device, x.dtype, pin is not None and pin.needs_kernels(op)), pin


def planned(
    choice: Choice,
    pin: Pin | None,
    op: str,
    impl: str,
    x: Tensor,
    sizes: Callable[[], tuple],
    bias: bool = False,
    dropout: bool = False,
) -> Decision:
    """Return what decide() does where `chosen` gives a `choice` of "triton"."""
    M = x.shape[0]
    # While shapes are propagated a size can be a symbol, and nothing is computed.
    if type(M) is not int:
        return choice.without_plan
    N, K, R, *of_group = sizes()
    plan = choose_plan(impl, op, x.device, x.dtype, M, N, K, R, bias, dropout, pin, *of_group)
    return Decision(choice.impl, plan)


@dataclass(frozen=True, eq=False)
class Implementations:
    """The implementations of one operation.

    reference, library: modules made of PyTorch's own operators. fused: name of the module that composes the
    kernels; importing it imports Triton. one_pass: the library's backward, but for dz and dB, which come from
    the kernel that reads dy once; takes the configurations of the kernels first.
    """

    reference: ModuleType
    library: ModuleType
    fused: str
    one_pass: Callable[..., Any]

    def plain(self, function: str, impl: str) -> Callable[..., Any]:
        """Return `function` of "torch" or "reference"."""
        return getattr(self.library if impl == "torch" else self.reference, function)

    def find(self, function: str, decision: Decision) -> Callable[..., Any]:
        """Return `function` of the implementation that was decided on."""
        plan = decision.plan
        if plan is None:
            if decision.impl == "triton":
                raise RuntimeError("no plan: the sizes are symbolic, and a plan needs numbers")
            return self.plain(function, decision.impl)
        if plan.name == "fused":
            return partial(getattr(_import(self.fused), function), plan=plan.kernels)
        if plan.takes_grad_kernel:
            return partial(self.one_pass, plan.kernels)
        return getattr(self.library, function)

    def direct(self, function: str, decision: Decision, x: Tensor) -> Callable[..., Any] | None:
        """Return the same, to be called without its operator, or None where that must be called: the kernels
        need an x with data of its own, and a tracer must not see into them.
        """
        if decision.plan is None and decision.impl == "triton":
            return None
        found = self.find(function, decision)
        if not decision.takes_kernels:
            return found
        return partial(call, found, x.device) if holds_data(x) else None


@functools.cache
def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


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


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `apply` of a Function without what torch.autograd.Function.apply does in Python for torch.func
    (3 to 5 µs a call on the CPU, the time of two small products).

    To be called where that has nothing to do: nothing compiles, which must see that one; no transform is on
    (transforming), for which it raises; and what gradients are wanted for is not left over from a transform
    (unwrapped returns another tensor then).
    """
    return super(torch.autograd.Function, function).apply


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
