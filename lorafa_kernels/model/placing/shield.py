"""Lets a forward run once without touching anything that lives, and notes all that it reads on the way.

A function is run as a copy of its code whose globals, closure and defaults are stand-ins. A stand-in answers
with plain values (numbers, strings, dtypes) as they are and with further stand-ins for everything else; it
can be asked, but not changed, and a call of anything but torch's operations, math and Python functions, which
are run in the same way, is `Untraceable`. So is code with effects beside its result: what it assigns outside
of its own variables, `with`, `try`, generators, imports.

Each read is a guard: where it was read, and what was found. `Guards.hold` asks again, before each use of what
the run has shown.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Untraceable(Exception):
    """A forward that is no expression of its input; the message says why and completes "its forward ..."."""


class _Token:
    """What stands in a guard for a value that is compared by something else than itself."""

    def __init__(self, kind: str, *parts: Any) -> None:
        self.kind, self.parts = kind, parts

    def __repr__(self) -> str:
        return self.kind

    def __deepcopy__(self, memo):
        return self


ABSENT, PRESENT = _Token("absent"), _Token("present")
_PLAIN = (
    *(int, float, complex, bool, str, bytes, type(None), type(...), slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_PLAIN_TYPES = frozenset(_PLAIN)
# Of the classes that have none of their own, and of a plain bag of attributes.
_PLAIN_LOOKUPS = (object.__getattribute__, types.SimpleNamespace.__getattribute__)


def _is_plain(value: object) -> bool:
    """Whether `value` is one that nothing can change."""
    if type(value) in (tuple, frozenset):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN_TYPES


def _token(value: Any, owner: object) -> Any:
    """What a guard keeps of `value`, found in `owner` or one of its attributes."""
    if isinstance(value, (nn.Module, Tensor)):
        return PRESENT
    if isinstance(value, types.MethodType):
        if value.__self__ is owner:
            return _Token("method", value.__func__)
        return _Token("other method", value.__func__, value.__self__)
    if type(value) is functools.partial:
        keywords = tuple((name, _token(part, owner)) for name, part in sorted(value.keywords.items()))
        args = tuple(_token(part, owner) for part in value.args)
        return _Token("partial", _token(value.func, owner), args, keywords)
    if _is_plain(value) or value is ABSENT or _by_identity(value):
        return value
    return _Token("object", type(value))


def _by_identity(value: object) -> bool:
    """Whether copies of `value` are `value` itself."""
    kinds = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, property)
    return isinstance(value, kinds) or callable(value)


def _same(expected: Any, value: Any, owner: object) -> bool:
    if expected is value:
        return True
    if type(expected) is not _Token:
        # 1 equals True and 1.0, and forward may tell them apart.
        if type(expected) is not type(value) or not _is_plain(expected):
            return False
        if type(expected) in (tuple, frozenset) and list(map(type, expected)) != list(map(type, value)):
            return False
        return expected == value
    if expected is PRESENT:
        return isinstance(value, (nn.Module, Tensor))
    if expected is ABSENT:
        return False
    parts = expected.parts
    if expected.kind == "method":
        return isinstance(value, types.MethodType) and (
            value.__func__ is parts[0] and value.__self__ is owner
        )
    if expected.kind == "other method":
        return isinstance(value, types.MethodType) and (
            value.__func__ is parts[0] and value.__self__ is parts[1]
        )
    if expected.kind == "partial":
        if type(value) is not functools.partial or len(value.args) != len(parts[1]):
            return False
        if sorted(value.keywords) != [name for name, _ in parts[2]]:
            return False
        return (
            _same(parts[0], value.func, owner)
            and all(_same(one, other, owner) for one, other in zip(parts[1], value.args, strict=True))
            and all(_same(part, value.keywords[name], owner) for name, part in parts[2])
        )
    return type(value) is parts[0]


def _static(kind: type, name: str) -> Any:
    """The attribute `name` of a class as it is stored, ABSENT if there is none."""
    for base in kind.__mro__:
        found = base.__dict__.get(name, ABSENT)
        if found is not ABSENT:
            return found
    return ABSENT


def _read(owner: object, name: str) -> Any:
    """What `owner.name` is made from, without running any code of its class; ABSENT if there is none."""
    kind = type(owner)
    own = owner.__dict__
    if name in own:
        found = _static(kind, name)
        return found if hasattr(type(found), "__set__") else own[name]
    found = _static(kind, name)
    if found is ABSENT and isinstance(owner, nn.Module):
        for group in (owner._parameters, owner._buffers, owner._modules):
            if name in group:
                return group[name]
    return found


class Guards:
    """What one run of a forward has read, to be asked for again.

    own: ((names that lead there from the module, what was found), ...). outside: ((mapping, key, what was
    found), ...) for globals and attributes of modules. cells: closures. codes: the functions that ran. A copy
    of a module shares them, since they hold for it as well; what comes out of a pickle may be in a process
    with other globals, so that they are `stale` there and the forward must be run again.
    """

    def __init__(
        self, own=(), outside=(), cells=(), codes=(), stored=(), forward=None, stale: bool = False
    ) -> None:
        self.own, self.outside, self.cells, self.codes = own, outside, cells, codes
        self.forward = forward
        # The names in `stored` lie in the module's own dict, where they are found fastest.
        self._stored = tuple((names[0], found) for names, found in own if names in stored)
        self._looked_up = tuple((names, found) for names, found in own if names not in stored)
        self.stale = stale
        # Whether anything but torch's own functions was read from outside of the module.
        self.asks_others = bool(cells) or any(not _is_torchs(*read) for read in outside)

    @classmethod
    def of(cls, runs: list[Reads], without: tuple[str, ...] = (), forward: Callable | None = None) -> Guards:
        """Those of several runs of one forward, but for the module's attributes `without`. forward: what its
        class is to have, where nobody else asks.
        """
        own, outside, cells, codes, stored = {}, {}, {}, {}, set()
        for reads in runs:
            stored |= {(name,) for name in vars(reads.module) if _static(type(reads.module), name) is ABSENT}
            own |= {names: found for names, found in reads.own_reads.items() if names[0] not in without}
            outside |= reads.outside_reads
            cells |= reads.cells
            codes |= reads.codes
        return cls(*(tuple(reads.values()) for reads in (own, outside, cells, codes)), stored, forward)

    def __deepcopy__(self, memo) -> Guards:
        return self

    def __reduce__(self):
        return _stale_guards, ()

    def hold(self, module: nn.Module) -> bool:
        """Whether all is as it was, for `module`, a copy of the one that was run or itself."""
        if self.forward is not None and type(module).forward is not self.forward:
            return False
        own = module.__dict__
        for name, expected in self._stored:
            value = own.get(name, ABSENT)
            if expected is not value and not _same(expected, value, module):
                return False
        for mapping, key, expected in self.outside:
            value = mapping.get(key, ABSENT)
            if expected is not value and not _same(expected, value, None):
                return False
        for function, code, defaults, kwdefaults in self.codes:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ != kwdefaults:
                return False
        return not (self._looked_up or self.cells) or self._hold_rest(module)

    def _hold_rest(self, module: nn.Module) -> bool:
        for names, expected in self._looked_up:
            value = owner = module
            for name in names:
                owner = value
                value = _read(owner, name) if hasattr(owner, "__dict__") else ABSENT
            if expected is not value and not _same(expected, value, module):
                return False
        for cell, expected in self.cells:
            try:
                value = cell.cell_contents
            except ValueError:
                return False
            if expected is not value and not _same(expected, value, None):
                return False
        return True

    def hold_compiled(self, module: nn.Module) -> bool:
        """As hold, in a way that torch.compile can follow and guards by itself; not of what it cannot."""
        if self.stale or self.asks_others:
            return False
        if self.forward is not None and type(module).forward is not self.forward:
            return False
        for names, expected in self.own:
            value = module
            for name in names:
                value = getattr(value, name, None)
            if expected is PRESENT:
                if value is None:
                    return False
            elif type(expected) is _Token or value != expected:
                return False
        return True


def _is_torchs(mapping: Mapping, key: str, expected: Any) -> bool:
    if isinstance(expected, types.ModuleType):
        return expected.__name__.split(".")[0] == "torch"
    return expected is ABSENT or mapping.get("__name__", "").split(".")[0] == "torch"


def _stale_guards() -> Guards:
    return Guards(stale=True)


class Reads:
    """Collects guards while forwards run, and makes the stand-ins. module: what `self` is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own_reads: dict[tuple[str, ...], tuple[tuple[str, ...], Any]] = {}
        self.outside_reads: dict[tuple[int, str], tuple[Mapping, str, Any]] = {}
        self.cells: dict[int, tuple[types.CellType, Any]] = {}
        self.codes: dict[int, tuple] = {}
        # One stand-in for each object: forward may ask whether two are the same.
        self._made: dict[int, tuple[Any, Any]] = {}

    def own(self, names: tuple[str, ...], owner: object) -> Any:
        """Read the last of `names`, which `owner` has, as it is stored, and note it."""
        value = _read(owner, names[-1])
        self.own_reads[names] = names, _token(value, self.module)
        return value

    def outside(self, mapping: Mapping, key: str) -> Any:
        """Read a global or the attribute of a module, and note it."""
        value = mapping.get(key, ABSENT)
        self.outside_reads[id(mapping), key] = mapping, key, _token(value, None)
        return value

    def stand_in(self, value: Any, title: str, names: tuple[str, ...] = ()) -> Any:
        """What forward gets to see of `value`, called `title` in reasons; names: how `self` leads there."""
        if _is_plain(value):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, self._make(value, title, names)
        return self._made[id(value)][1]

    def _make(self, value: Any, title: str, names: tuple[str, ...]) -> Any:
        if isinstance(value, types.ModuleType):
            return _Namespace(value, title, self)
        if isinstance(value, type):
            return _Kind(value, title, self)
        if is_operation(value):
            return _Operation(value, title, self)
        if getattr(value, "__module__", None) == "math" and isinstance(value, types.BuiltinFunctionType):
            return _Operation(value, title, self)
        if isinstance(value, types.FunctionType) and (value.__module__ or "").split(".")[0] != "torch":
            return _Function(value, title, self)
        if type(value) is functools.partial:
            function = self.stand_in(value.func, title, names)
            args = [self.stand_in(part, title, names) for part in value.args]
            keywords = {name: self.stand_in(part, title, names) for name, part in value.keywords.items()}
            return functools.partial(function, *args, **keywords)
        simple = type(value).__getattribute__ in _PLAIN_LOOKUPS and hasattr(value, "__dict__")
        if simple and not isinstance(value, (nn.Module, Tensor, list, dict, set)) and not callable(value):
            return _Object(value, title, self, names)
        return _Opaque(value, title, self)

    def run(self, function: types.FunctionType, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a copy of `function` that sees nothing but stand-ins."""
        code = function.__code__
        self.codes[id(function)] = function, code, function.__defaults__, function.__kwdefaults__
        names = _global_names(code)
        known: dict[str, Any] = {"__builtins__": {}, "__name__": function.__module__}
        for name in names:
            value = self.outside(function.__globals__, name)
            if value is not ABSENT:
                known[name] = self.stand_in(value, name)
            elif name in _BUILTINS:
                known[name] = _BUILTINS[name]
            elif hasattr(builtins, name):
                known[name] = _Opaque(getattr(builtins, name), name, self)
        cells = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                raise Untraceable(f"uses {name}, which has no value") from None
            self.cells[id(cell)] = cell, _token(value, None)
            cells.append(types.CellType(self.stand_in(value, name)))
        defaults = tuple(self.stand_in(value, "a default") for value in function.__defaults__ or ())
        copy = types.FunctionType(code, known, function.__name__, defaults or None, tuple(cells))
        copy.__kwdefaults__ = {
            name: self.stand_in(value, name) for name, value in (function.__kwdefaults__ or {}).items()
        } or None
        return copy(*args, **kwargs)


_EFFECTS = {
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "SETUP_ASYNC_WITH", "BEFORE_ASYNC_WITH"), "has a with"),
    **dict.fromkeys(("SETUP_FINALLY", "PUSH_EXC_INFO", "LOAD_SPECIAL"), "has a try or with"),
    **dict.fromkeys(("IMPORT_NAME", "IMPORT_FROM"), "imports"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "sets the global {}"),
    "LOAD_BUILD_CLASS": "makes a class",
}
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_of(constant)


@functools.lru_cache(maxsize=512)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that `code` reads. Raises Untraceable for code that does more than to compute a result."""
    names: dict[str, None] = {}
    # What nested code assigns to a variable of the code around it is nobody else's.
    inner = {name for part in _codes_of(code) for name in part.co_cellvars}
    for part in _codes_of(code):
        if part.co_flags & _GENERATORS and part.co_name != "<genexpr>":
            raise Untraceable("is a generator")
        instructions = list(dis.get_instructions(part))
        # A with is told from a try: both catch exceptions.
        for instruction in sorted(instructions, key=lambda one: "WITH" not in one.opname):
            if instruction.opname in _EFFECTS:
                raise Untraceable(_EFFECTS[instruction.opname].format(instruction.argval))
            if instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval not in inner:
                raise Untraceable(f"sets {instruction.argval} of the function around it")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names[instruction.argval] = None
    return tuple(names)


def is_stand_in(value: object) -> bool:
    """Whether `value` stands for an object that forward does not get to see."""
    return issubclass(type(value), _StandIn)


def is_operation(value: object) -> bool:
    """Whether `value` is a function of torch that computes tensors from tensors."""
    module = getattr(value, "__module__", None)
    if isinstance(value, types.BuiltinFunctionType):
        return module in ("torch", "torch._C._nn", "torch._C._special", "torch._C._linalg")
    if isinstance(value, types.FunctionType):
        return module in ("torch.nn.functional", "torch.functional", "torch._tensor")
    return isinstance(value, types.MethodDescriptorType) and issubclass(Tensor, value.__objclass__)


class _StandIn:
    """Stands for `value`; a use that its kind does not know is Untraceable."""

    def __init__(self, value: Any, title: str, reads: Reads) -> None:
        self.__dict__.update(_value=value, _title=title, _reads=reads)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"reads {name} of {self._shown()}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"sets {name} of {self._shown()}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable(f"calls {self._shown()}")

    def _shown(self) -> str:
        kind = type(self._value).__name__
        return self._title if kind.startswith(("builtin", "function")) else f"{self._title} ({kind})"


def _refusing(what: str) -> Callable:
    def method(self, *_):
        raise Untraceable(f"{what} {self._shown()}")

    return method


for _name in ("iter", "len", "contains", "getitem", "bool", "float", "int", "index", "delattr", "enter"):
    setattr(_StandIn, f"__{_name}__", _refusing("reads"))
for _name in ("setitem", "delitem", "iadd", "imul", "ior", "isub"):
    setattr(_StandIn, f"__{_name}__", _refusing("changes"))
for _name in ("lt", "le", "gt", "ge", "add", "radd", "mul", "rmul", "sub", "rsub", "or", "and"):
    setattr(_StandIn, f"__{_name}__", _refusing("computes with"))


class _Opaque(_StandIn):
    """An object of which nothing is known but whether it is another one."""

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        raise Untraceable(f"compares {self._shown()}")

    __hash__ = object.__hash__


class _Namespace(_StandIn):
    """A module of Python."""

    def __getattr__(self, name: str) -> Any:
        value = self._reads.outside(vars(self._value), name)
        if value is ABSENT:
            raise Untraceable(f"reads {name} of the module {self._title}")
        return self._reads.stand_in(value, f"{self._title}.{name}")


class _Kind(_StandIn):
    """A class: to be asked for its members and its attributes."""

    def __instancecheck__(self, other: object) -> bool:
        if is_stand_in(other):
            return isinstance(other._value, self._value)
        answer = getattr(type(other), "lorafa_is_instance", None)
        return isinstance(other, self._value) if answer is None else answer(other, self._value)

    def __getattr__(self, name: str) -> Any:
        value = _static(self._value, name)
        if not _is_plain(value) and not is_operation(value) and not isinstance(value, self._value):
            raise Untraceable(f"reads {name} of the class {self._title}")
        return self._reads.stand_in(value, f"{self._title}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._value in (torch.finfo, torch.iinfo):
            return self._value(*args, **kwargs)
        return super().__call__()


class _Operation(_StandIn):
    """A function of torch or math, of what is being traced or of numbers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        for value in list(given):
            if type(value) in (list, tuple):
                given += value
        for value in given:
            if is_stand_in(value):
                raise Untraceable(f"passes {value._shown()} to {self._title}")
        traced = any(hasattr(type(value), "lorafa_is_instance") for value in given)
        if not traced and getattr(self._value, "__module__", None) != "math":
            raise Untraceable(f"calls {self._title} on something other than its input")
        return self._value(*args, **kwargs)


class _Function(_StandIn):
    """A function written in Python, which is run as forward is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reads.run(self._value, args, kwargs)


class _Object(_StandIn):
    """An object with attributes, a configuration say."""

    def __init__(self, value: Any, title: str, reads: Reads, names: tuple[str, ...]) -> None:
        super().__init__(value, title, reads)
        self.__dict__["_names"] = names

    def __getattr__(self, name: str) -> Any:
        if self._names:
            value = self._reads.own((*self._names, name), self._value)
        else:
            value = self._reads.outside(vars(self._value), name)
            for base in type(self._value).__mro__ if value is ABSENT else ():
                if name in vars(base):
                    value = self._reads.outside(vars(base), name)
                    break
        if value is ABSENT:
            if hasattr(type(self._value), "__getattr__"):
                raise Untraceable(f"reads {name} of {self._shown()}, which makes it on demand")
            raise AttributeError(name)
        if name not in vars(self._value) and hasattr(type(value), "__get__"):
            raise Untraceable(f"reads {name} of {self._shown()}, which is computed")
        return self._reads.stand_in(value, f"{self._title}.{name}", (*self._names, name))

    __eq__ = _Opaque.__eq__
    __hash__ = object.__hash__


class Self:
    """Stands for the module itself. tensor(kind, name): what its tensors are; child(name, module)."""

    def __init__(self, reads: Reads, tensor: Callable[[str, str], Any], child: Callable) -> None:
        self.__dict__.update(_reads=reads, _tensor=tensor, _child=child)

    def __getattr__(self, name: str) -> Any:
        if name == "training":
            raise Untraceable("reads self.training")
        reads, module = self._reads, self._reads.module
        kind = type(module)
        if kind.__getattribute__ is not object.__getattribute__:
            raise Untraceable("belongs to a class with a __getattribute__ of its own")
        value = reads.own((name,), module)
        if value is ABSENT:
            if kind.__getattr__ is not nn.Module.__getattr__:
                raise Untraceable("belongs to a class with a __getattr__ of its own")
            raise AttributeError(f"{kind.__name__} has no {name}")
        if value is None:
            return None
        if isinstance(value, (Tensor, nn.Module)):
            return _part_of(self, name, value)
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return types.MethodType(reads.stand_in(value.__func__, name), self)
        if name in vars(module) and not isinstance(value, property):
            return reads.stand_in(value, name, (name,))
        return _of_class(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"sets self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"deletes self.{name}")

    def lorafa_is_instance(self, kind: type) -> bool:
        raise Untraceable("asks for the type of self")


def _part_of(stand: Self, name: str, value: Tensor | nn.Module) -> Any:
    """What stands for a parameter, buffer, child or other tensor."""
    module = stand._reads.module
    for what, group in (("parameter", module._parameters), ("buffer", module._buffers)):
        if group.get(name) is value:
            return stand._tensor(what, name)
    if module._modules.get(name) is value:
        return stand._child(name, value)
    if isinstance(value, nn.Module):
        raise Untraceable(f"uses {name}, a module that is none of its children")
    return stand._tensor("tensor", name)


def _of_class(stand: Self, name: str, value: Any) -> Any:
    """What stands for something that the module's class has."""
    reads = stand._reads
    if isinstance(value, types.FunctionType):
        return types.MethodType(reads.stand_in(value, name), stand)
    if isinstance(value, staticmethod):
        return reads.stand_in(value.__func__, name)
    if isinstance(value, property) and isinstance(value.fget, types.FunctionType):
        return reads.run(value.fget, (stand,), {})
    if hasattr(type(value), "__get__") and not is_operation(value):
        raise Untraceable(f"reads {name}, a {type(value).__name__}")
    return reads.stand_in(value, name)


_BUILTINS = {
    name: getattr(builtins, name)
    for name in (
        *("isinstance", "getattr", "hasattr", "len", "super", "abs", "min", "max", "sum", "round"),
        *(
            "int",
            "float",
            "bool",
            "str",
            "complex",
            "tuple",
            "list",
            "dict",
            "set",
            "frozenset",
            "range",
            "slice",
        ),
        *("zip", "enumerate", "reversed", "sorted", "any", "all", "map", "filter", "divmod", "pow", "format"),
        *(
            "ValueError",
            "TypeError",
            "RuntimeError",
            "AssertionError",
            "NotImplementedError",
            "AttributeError",
        ),
        *("KeyError", "IndexError", "Exception", "NotImplemented", "Ellipsis"),
    )
}
