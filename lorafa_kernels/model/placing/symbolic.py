"""What a module's forward computes, as an expression: forward is run once on a tensor that is not there.

The stand-in for the module answers with symbols for its parameters and children; everything else is seen,
and kept from harm, as shield.py says, which also notes what was read. What depends on a tensor's value, on
whether the module is training, or on the inside of a child cannot be an expression: `Untraceable`.

Operations are named alike however they are written (x * y, torch.mul(x, y), x.mul(y); x.float(),
x.to(torch.float32)). Nothing of the module is changed, no child runs, and no state of torch is touched.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .shield import Reads, Self, Untraceable

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ALIASES = {"multiply": "mul", "divide": "div", "true_divide": "div"}
_HIDDEN = ("operation", "arguments", "trace")


class Trace:
    """The expressions of one run of a forward, in order.

    parameter_dtype: what parameters answer when asked for their dtype. may_ask_class: whether isinstance of a
    symbol is answered (no tensor), which torch.pow needs, instead of being untraceable. identities: children
    that return their input, which are left out of expressions: nn.Identity, and nn.Dropout with p = 0.
    """

    def __init__(self, parameter_dtype: torch.dtype, may_ask_class: bool = False) -> None:
        self.parameter_dtype = parameter_dtype
        self.may_ask_class = may_ask_class
        self.values: list[Symbol] = []
        self.identities: list[str] = []

    def record(self, operation: str, *arguments: Any) -> Symbol:
        symbol = Symbol(operation, arguments, self)
        self.values.append(symbol)
        return symbol


class Slot:
    """In a template, a number that the module has as an attribute."""

    def __init__(self, role: str) -> None:
        self.role = role


class Symbol:
    """A tensor that is not there: `operation` of `arguments`, which are symbols and constants.

    Operations of their own: "input"; "parameter", "buffer" and "tensor" with a name; "child" with the child's
    name and its input; "attribute" with a symbol and a name.
    """

    __slots__ = _HIDDEN

    def __init__(self, operation: str, arguments: tuple, trace: Trace) -> None:
        for name, value in zip(_HIDDEN, (operation, arguments, trace), strict=True):
            object.__setattr__(self, name, value)

    # isinstance(x, torch.Tensor) would say no where a tensor says yes. It must never say yes: some of torch's
    # own functions ask, and then read a tensor's memory.
    @property
    def __class__(self):
        if self.trace.may_ask_class:
            return Symbol
        raise Untraceable("asks for the type of its input")

    def lorafa_is_instance(self, kind: type) -> bool:
        """The answer of isinstance to forward itself."""
        if self.trace.may_ask_class and kind in (Tensor, object):
            return True
        raise Untraceable("asks for the type of its input")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        trace = next((a.trace for a in (*args, *kwargs.values()) if type(a) is Symbol), None)
        if trace is None:
            raise Untraceable(f"passes a list of tensors to {function.__name__}")
        return _record(trace, function.__name__, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "dtype" and self.operation == "parameter":
            return self.trace.parameter_dtype
        known = getattr(Tensor, name, None)
        if known is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        if not callable(known):
            return self.trace.record("attribute", self, name)
        return lambda *args, **kwargs: _record(self.trace, name, (self, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"sets {name} of a tensor")


def _binary(name: str, swapped: bool = False):
    def method(self, other):
        return _record(self.trace, name, (other, self) if swapped else (self, other), {})

    return method


def _refusing(what: str):
    def method(self, *_):
        made_by = "its input" if self.operation == "input" else f"the result of {_title(self)}"
        raise Untraceable(what.format(made_by))

    return method


def _title(symbol: Symbol) -> str:
    first = symbol.arguments[0] if symbol.arguments else None
    return first if symbol.operation in ("child", "parameter") else symbol.operation


for _name in ("add", "mul", "sub", "truediv", "pow", "matmul"):
    _operation = {"truediv": "div"}.get(_name, _name)
    setattr(Symbol, f"__{_name}__", _binary(_operation))
    setattr(Symbol, f"__r{_name}__", _binary(_operation, swapped=True))
    setattr(Symbol, f"__i{_name}__", _refusing(f"changes {{}} in place ({_operation})"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "getitem"):
    setattr(Symbol, f"__{_name}__", _binary(_name))
for _name in ("neg", "abs", "invert"):
    setattr(Symbol, f"__{_name}__", lambda self, name=_name: _record(self.trace, name, (self,), {}))
for _name in ("bool", "float", "int", "index", "len", "contains"):
    setattr(Symbol, f"__{_name}__", _refusing("decides by {}"))
Symbol.__iter__ = _refusing("unpacks {}")
Symbol.__setitem__ = _refusing("changes {} in place")
Symbol.__hash__ = object.__hash__


def _record(trace: Trace, name: str, args: tuple, kwargs: dict[str, Any]) -> Symbol:
    """Record an operation under its common name, with its arguments in their common places."""
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    if name.endswith("_"):
        raise Untraceable(f"changes a tensor in place ({name})")
    if name == "square":
        return trace.record("pow", *args, 2)
    if name in _DTYPES and not kwargs and len(args) == 1:
        return trace.record("to", *args, _DTYPES[name])
    if name == "type_as" and len(args) == 2:
        return trace.record("to", args[0], trace.record("attribute", args[1], "dtype"))
    if name in ("to", "type") and set(kwargs) <= {"dtype"} and len(args) + len(kwargs) == 2:
        return trace.record("to", *args, *kwargs.values())
    if name == "mean" and args:
        dim, keepdim, dtype = _arguments(("dim", "keepdim", "dtype"), args[1:], kwargs, (None, False, None))
        dims = tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)
        return trace.record("mean", args[0], dims, bool(keepdim), dtype)
    if name == "silu" and args:
        (inplace,) = _arguments(("inplace",), args[1:], kwargs, (False,))
        if inplace:
            raise Untraceable("changes a tensor in place (silu)")
        return trace.record("silu", args[0])
    if name == "gelu" and args:
        (approximate,) = _arguments(("approximate",), args[1:], kwargs, ("none",))
        return trace.record("gelu", args[0], approximate)
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        raise Untraceable(f"changes a tensor in place ({name})")
    return trace.record(_ALIASES.get(name, name), *args, *sorted(kwargs.items()))


def _arguments(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any], defaults: tuple) -> list[Any]:
    if len(args) > len(names) or not set(kwargs) <= set(names):
        raise Untraceable(f"passes {', '.join(names)} in a form that is not known")
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


class Child:
    """Stands for a child of the module: to be called, and nothing else."""

    def __init__(self, name: str, trace: Trace, module: nn.Module | None = None) -> None:
        self.__dict__.update(_name=name, _trace=trace, _module=module)

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        if type(self._module) is nn.Identity or (
            type(self._module) is nn.Dropout and self._module.p == 0 and len(args) == 1 and not kwargs
        ):
            self._trace.identities.append(self._name)
            return args[0]
        return self._trace.record("child", self._name, *args, *sorted(kwargs.items()))

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"reads {self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"sets {self._name}.{name}")


def input_name(forward) -> str:
    """Name of the one argument that `forward(self, x)` must be given; Untraceable if it is not one."""
    _, *parameters = inspect.signature(forward).parameters.values()
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in rest]
    if len(required) != 1 or required[0].kind is required[0].KEYWORD_ONLY:
        raise Untraceable(f"takes {len(required)} inputs")
    return required[0].name


def original_class(module: nn.Module) -> type:
    """The class of `module`, or what it was before it was fused."""
    return getattr(type(module), "lorafa_original", type(module))


def trace_forward(
    module: nn.Module, parameter_dtype: torch.dtype, may_ask_class: bool = False
) -> tuple[Symbol, Trace, Reads]:
    """Return what the class's forward of `module` computes from one input, everything it computed on the way,
    and what it read.

    The options are those of Trace. Raises Untraceable.
    """
    forward = original_class(module).forward
    input_name(forward)
    if not isinstance(forward, types.FunctionType):
        raise Untraceable(f"is no plain function, but a {type(forward).__name__}")
    trace, reads = Trace(parameter_dtype, may_ask_class), Reads(module)
    stand_in = Self(reads, trace.record, lambda name, child: Child(name, trace, child))
    return run(lambda *args: reads.run(forward, args, {}), stand_in, trace), trace, reads


def run(forward: Callable, stand_in: Any, trace: Trace) -> Symbol:
    """Return what forward(stand_in, x) computes from one input. Raises Untraceable."""
    try:
        result = forward(stand_in, trace.record("input"))
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"cannot be followed ({type(error).__name__}: {error})") from error
    if type(result) is not Symbol:
        raise Untraceable("does not return one tensor")
    return result
