"""Gated MLPs and RMS norms, recognised by what their forward computes.

A module is one of them if its forward, as an expression (symbolic.py), is that of a template below: operation
by operation, with the roles of the template bound to the module's own names. Anything else in it, a clamp, a
multiplier, a dropout, rejects it with a reason that names it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ...nn.quantised import Quantised
from .guards import ADAPTED
from .shield import Guards, Reads, Untraceable
from .symbolic import Child, Slot, Symbol, Trace, input_name, original_class, run, trace_forward

_COMMUTE = frozenset({"add", "mul"})
# Forwards may ask for the dtype of their parameters, and it may change later: all answers must do.
_PARAMETER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MLP(NamedTuple):
    """A gated MLP: down(activation(gate(x)) * up(x)).

    gate, up, down: names of linear children. activation: "silu", "gelu" or "gelu_tanh". others: names and
    classes of the other children that forward calls, the activation and those that return their input.
    input: name of x. guards: what forward read beside its layers; activation_guards: the activation's, and
    the class it is of.
    """

    gate: str
    up: str
    down: str
    activation: str
    others: tuple[tuple[str, type], ...]
    input: str
    guards: Guards
    activation_guards: tuple[str, Guards] | None


class Norm(NamedTuple):
    """An RMS norm of a form of norm.py; weight, eps, input: names of attributes and of x; guards: what
    forward read beside the weight.
    """

    form: str
    weight: str
    eps: str
    input: str
    guards: Guards


def _gated(self, x):
    return self.down(self.activation(self.gate(x)) * self.up(x))


def _llama(self, x):
    wide = x.to(torch.float32)
    rounded = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
    return self.weight * rounded


def _gemma(self, x):
    wide = x.to(torch.float32)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (normal * (1 + self.weight.to(torch.float32))).to(x.dtype)


def _t5(self, x):
    normal = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
    if self.weight.dtype in (torch.float16, torch.bfloat16):
        normal = normal.to(self.weight.dtype)
    return self.weight * normal


NORMS: dict[str, Callable] = {"llama": _llama, "gemma": _gemma, "t5": _t5}


class _Roles:
    """`self` of a template."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.eps = Slot("eps")

    @property
    def weight(self) -> Symbol:
        return self._trace.record("parameter", "weight")

    def __getattr__(self, role: str) -> Child:
        return Child(role, self._trace)


def _template(forward: Callable, parameter_dtype: torch.dtype) -> tuple[Symbol, Trace]:
    trace = Trace(parameter_dtype)
    return run(forward, _Roles(trace), trace), trace


def _match(template: Any, value: Any, roles: dict[str, Any]) -> dict[str, Any] | None:
    """Roles bound so that `template` becomes `value`, in addition to those given; None if there are none."""
    if type(template) is Slot:
        return _bind(roles, template.role, value) if type(value) in (int, float) else None
    if type(template) is not Symbol or type(value) is not Symbol:
        alike = type(template) is not Symbol and type(value) is not Symbol
        return roles if alike and _equal(template, value) else None
    wanted, given = list(template.arguments), list(value.arguments)
    if template.operation == "child" and wanted[0] == "activation" and value.operation in ("silu", "gelu"):
        bound = _bind(roles, "activation", (value.operation, *given[1:]))
        return bound and _match(wanted[1], given[0], bound)
    if template.operation != value.operation or len(wanted) != len(given):
        return None
    bound: dict[str, Any] | None = roles
    if template.operation in ("child", "parameter"):
        bound = _bind(roles, wanted.pop(0), given.pop(0))
    orders = [given, given[::-1]] if template.operation in _COMMUTE else [given]
    for order in orders:
        found = bound
        for left, right in zip(wanted, order, strict=True):
            found = None if found is None else _match(left, right, found)
        if found is not None:
            return found
    return None


def _bind(roles: dict[str, Any], role: str, value: Any) -> dict[str, Any] | None:
    if role in roles:
        return roles if roles[role] is value or roles[role] == value else None
    # No module has two roles.
    if isinstance(value, str) and value in roles.values():
        return None
    return {**roles, role: value}


def _equal(template: Any, value: Any) -> bool:
    # 1 and 1.0 are the same argument, 1 and True are not.
    numbers = type(template) in (int, float) and type(value) in (int, float)
    return (numbers or type(template) is type(value)) and template == value


def _reached(symbol: Symbol, found: dict[int, Symbol] | None = None) -> dict[int, Symbol]:
    found = {} if found is None else found
    if id(symbol) not in found:
        found[id(symbol)] = symbol
        for argument in symbol.arguments:
            if type(argument) is Symbol:
                _reached(argument, found)
    return found


def _unused(result: Symbol, trace: Trace) -> Iterator[Symbol]:
    """What forward computed and did not return: looking at a tensor is harmless, a child's call is not."""
    reached = _reached(result)
    for symbol in trace.values:
        if id(symbol) not in reached and symbol.operation not in ("attribute", "parameter", "buffer"):
            yield symbol


def _operations(symbols: Any) -> Counter[str]:
    ignored = ("attribute", "input", "parameter")
    return Counter(s.operation for s in symbols if s.operation not in ignored)


def _bound(module: nn.Module, template: Callable, kind: str) -> tuple[dict[str, Any], Trace, list[Reads]]:
    """Roles of `template` in `module`, the trace, and what was read. Raises Untraceable, which names what is
    more.
    """
    roles: dict[str, Any] = {}
    read = []
    for dtype in _PARAMETER_DTYPES:
        result, trace, reads = trace_forward(module, dtype)
        read.append(reads)
        wanted, wanted_trace = _template(template, dtype)
        unused = list(_unused(result, trace))
        if unused:
            raise Untraceable(f"also computes {_names(module, unused)}, which it does not return")
        found = _match(wanted, result, roles)
        if found is None:
            more = _surplus(module, trace, wanted_trace)
            raise Untraceable(f"is not that of {kind}" + (f": it also computes {more}" if more else ""))
        roles = found
    return roles, trace, read


def _surplus(module: nn.Module, trace: Trace, template: Trace) -> str:
    """What the trace has more of than the template has, in words."""
    left = _operations(template.values)
    linears = left["child"] - 1 if left["child"] else 0
    more = []
    for symbol in trace.values:
        if symbol.operation == "child" and isinstance(
            module._modules[symbol.arguments[0]], (nn.Linear, *ADAPTED)
        ):
            linears -= 1
            if linears < 0:
                more.append(symbol)
        elif symbol.operation == "child" and _names_activation(module, symbol):
            continue
        elif symbol.operation == "child":
            more.append(symbol)
        elif symbol.operation in _operations([symbol]):
            left[symbol.operation] -= 1
            if left[symbol.operation] < 0 and symbol.operation not in ("silu", "gelu"):
                more.append(symbol)
    return _names(module, more)


def _names_activation(module: nn.Module, symbol: Symbol) -> bool:
    child = module._modules[symbol.arguments[0]]
    return not isinstance(child, nn.Dropout) and not any(True for _ in child.parameters())


def _names(module: nn.Module, symbols: list[Symbol]) -> str:
    return ", ".join(dict.fromkeys(_name(module, symbol) for symbol in symbols))


def _name(module: nn.Module, symbol: Symbol) -> str:
    if symbol.operation == "child":
        child = module._modules[symbol.arguments[0]]
        p = f" with p={child.p:g}" if isinstance(child, nn.Dropout) else ""
        return f"{symbol.arguments[0]} ({type(child).__name__}{p})"
    numbers = [f"{a:g}" for a in symbol.arguments if type(a) in (int, float)]
    return symbol.operation + (f" ({', '.join(numbers)})" if numbers else "")


def recognise_mlp(module: nn.Module) -> MLP:
    """Return the roles of the children of `module` in a gated MLP. Raises Untraceable if it is none."""
    roles, trace, read = _bound(module, _gated, "a gated MLP")
    for role in ("gate", "up", "down"):
        child = module._modules[roles[role]]
        if type(child) is not nn.Linear and not isinstance(child, (Quantised, *ADAPTED)):
            raise Untraceable(f"calls a layer of another class, {roles[role]} ({type(child).__name__})")
    activation, others = roles["activation"], tuple(dict.fromkeys(trace.identities))
    guards = None
    if isinstance(activation, str):
        others = (activation, *others)
        known, reads = _identified(module._modules[activation])
        if reads is not None:
            forward = type(module._modules[activation]).forward
            guards = activation, Guards.of([reads], forward=forward)
        shown = f"{activation} ({type(module._modules[activation]).__name__})"
    else:
        known = {("silu",): "silu", ("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh"}.get(activation)
        shown = activation[0]
    if known is None:
        raise Untraceable(f"uses the activation {shown}, which is none of {', '.join(ACTIVATIONS)}")
    kinds = tuple((name, type(module._modules[name])) for name in others)
    names = roles["gate"], roles["up"], roles["down"]
    # The children that are asked for at each call are guarded there.
    own = Guards.of(read, without=(*names, *others))
    return MLP(*names, known, kinds, input_name(original_class(module).forward), own, guards)


def recognise_norm(module: nn.Module) -> Norm:
    """Return the form and names of `module` as an RMS norm. Raises Untraceable if it is none."""
    _, trace, _ = trace_forward(module, torch.float32)

    def distance(form: str) -> int:
        ours, theirs = _operations(trace.values), _operations(_template(NORMS[form], torch.float32)[1].values)
        return sum((ours - theirs).values()) + sum((theirs - ours).values())

    refused = None
    for form in sorted(NORMS, key=distance):
        try:
            roles, _, read = _bound(module, NORMS[form], "a known RMS norm")
        except Untraceable as error:
            # The reason that counts is what keeps it from being the nearest form.
            refused = refused or error
            continue
        eps = next((name for name, value in vars(module).items() if value is roles["eps"]), None)
        if eps is None:
            raise Untraceable("takes eps from outside the module's attributes")
        guards = Guards.of(read, without=(roles["weight"],))
        return Norm(form, roles["weight"], eps, input_name(original_class(module).forward), guards)
    raise refused


def _gelu(x: float, approximate: str = "none") -> float:
    if approximate == "tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": lambda x: _gelu(x, "tanh"),
}
# Functions that are analytic: if two compositions of them agree on many points they agree everywhere.
_SMOOTH: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a / b,
    "pow": math.pow,
    "neg": lambda a: -a,
    "tanh": math.tanh,
    "erf": math.erf,
    "exp": _exp,
    "sigmoid": _sigmoid,
    "silu": ACTIVATIONS["silu"],
    "gelu": _gelu,
}


def _value(symbol: Any, x: float) -> Any:
    """What an expression of smooth functions is at x, in fp64."""
    if type(symbol) is not Symbol:
        return symbol
    if symbol.operation == "input":
        return x
    return _SMOOTH[symbol.operation](*(_value(argument, x) for argument in symbol.arguments))


def identify_activation(module: nn.Module) -> str | None:
    """The name of the function that `module` is, one of ACTIVATIONS, or None.

    It must consist of smooth elementwise functions, without state, and agree with the known one in fp64 on
    points of all sizes to twelve digits.
    """
    return _identified(module)[0]


def _identified(module: nn.Module) -> tuple[str | None, Reads | None]:
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None, None
    try:
        # What it answers to a question for a class, its values are compared all the same.
        result, trace, reads = trace_forward(module, torch.float32, may_ask_class=True)
    except Untraceable:
        return None, None
    if not {symbol.operation for symbol in trace.values} <= {"input", *_SMOOTH}:
        return None, None
    sizes = [10 ** (-3 + 6 * step / 63) for step in range(64)]
    points = [*(-size for size in sizes), *sizes]
    try:
        # Without torch, whose modes and default device are the user's.
        got = [_value(result, x) for x in points]
        for name, function in ACTIVATIONS.items():
            wanted = map(function, points)
            if all(abs(one - two) <= 1e-12 * (1 + abs(one)) for one, two in zip(got, wanted, strict=True)):
                return name, reads
    except (ArithmeticError, TypeError, ValueError):
        # Arguments that are not known, or numbers that no fp64 holds.
        pass
    return None, None
