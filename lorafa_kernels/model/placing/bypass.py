"""Layers that an adapter cannot act on, since their weight is read without calling them.

Read from the source of each module's forward, of the methods and functions that it calls, and of those of its
ancestors: which child is called, and of which child the weight is read (`self.child.weight`, through names,
lists, getattr and arguments). What cannot be followed counts as a call. The dtype, shape or device of a
weight, and isinstance of it, are no reads.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

# In a path: some child, it is not known which.
_SOME = None
_METADATA = frozenset(
    {
        "dtype",
        "device",
        "shape",
        "ndim",
        "requires_grad",
        "is_cuda",
        "size",
        "dim",
        "numel",
        "layout",
        "is_meta",
    }
    | {"grad", "itemsize", "element_size", "nbytes", "stride", "is_floating_point"}
)
_ASKING = frozenset({"isinstance", "hasattr", "id", "type", "callable", "len", "repr", "str", "print"})
_ITERATING = frozenset({"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted", "next"})
_CHILDREN = frozenset({"children", "modules", "values", "items", "named_children", "named_modules"})
_DEPTH = 6

Path = tuple


class Use(NamedTuple):
    """What a class does to the module that `path` leads to, from an instance of it: calls it, or reads its
    weight; where: the function.
    """

    path: Path
    called: bool
    where: str


@lru_cache(maxsize=1024)
def uses_of(kind: type) -> tuple[Use, ...]:
    """What forward of a class does to the modules inside; () without source."""
    forward = inspect.unwrap(getattr(kind, "forward", None))
    if not isinstance(forward, types.FunctionType):
        return ()
    reader = _Reader(kind)
    reader.follow(forward, {0: {()}}, {}, 0)
    return tuple(reader.found)


@lru_cache(maxsize=2048)
def _definition(code: types.CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    first = tree.body[0] if tree.body else None
    return first if isinstance(first, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


class _Reader:
    """Reads the functions that one class's forward leads to. Paths start at its instance."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.found: dict[Use, None] = {}
        self._seen: set[tuple] = set()

    def follow(
        self,
        function: types.FunctionType,
        given: Mapping[int, set[Path]],
        named: Mapping[str, set[Path]],
        depth: int,
    ) -> bool:
        """Read `function`, whose arguments are modules at the paths `given` by place and `named`. Returns
        whether it has a source.
        """
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType) or depth > _DEPTH:
            return False
        definition = _definition(function.__code__)
        if definition is None:
            return False
        arguments = [argument.arg for argument in (*definition.args.posonlyargs, *definition.args.args)]
        known = {name: set(paths) for name, paths in named.items()}
        for place, paths in given.items():
            if place < len(arguments):
                known.setdefault(arguments[place], set()).update(paths)
        key = (
            function.__code__,
            tuple(sorted((name, repr(sorted(map(repr, p)))) for name, p in known.items())),
        )
        if key not in self._seen:
            self._seen.add(key)
            _Function(self, function, definition, known, depth).read()
        return True


class _Function:
    """One function while it is read. known: paths of what its variables may be."""

    def __init__(self, reader, function, definition, known: dict[str, set[Path]], depth: int) -> None:
        self.reader, self.function, self.definition = reader, function, definition
        self.known, self.depth = known, depth
        self.where = function.__qualname__

    def read(self) -> None:
        nodes = list(ast.walk(self.definition))
        parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
        # Variables first, whatever the order in which they are bound.
        for _ in range(3):
            for node in nodes:
                self._bind(node)
        for node in nodes:
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self._attribute(node, parents)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            paths = {(*path, _SOME) for path in self.paths(node.iter)}
            for name in _names(node.target):
                self.known.setdefault(name, set()).update(paths)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._assign(node.optional_vars, node.context_expr)

    def _assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for place, part in enumerate(target.elts):
                self._assign(part, value.elts[place] if pairs else value)
        elif isinstance(target, ast.Name):
            paths = self.paths(value)
            if paths:
                self.known.setdefault(target.id, set()).update(paths)

    def paths(self, node: ast.AST) -> set[Path]:
        """Where the modules lie that an expression may be."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self.paths(node.value)}
        if isinstance(node, ast.Subscript):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            step = str(key) if type(key) in (int, str) else _SOME
            return {(*path, step) for path in self.paths(node.value)}
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = (node.body, node.orelse) if isinstance(node, ast.IfExp) else node.values
            return set().union(*map(self.paths, parts))
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return set().union(*map(self.paths, node.elts))
        if isinstance(node, (ast.NamedExpr, ast.Starred, ast.Await)):
            return self.paths(node.value)
        if isinstance(node, ast.Call):
            return self._result(node)
        return set()

    def _result(self, node: ast.Call) -> set[Path]:
        if isinstance(node.func, ast.Name) and node.args:
            if node.func.id == "getattr" and len(node.args) > 1:
                name = node.args[1]
                step = name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else _SOME
                return {(*path, step) for path in self.paths(node.args[0])}
            if node.func.id in _ITERATING:
                return set().union(*map(self.paths, node.args))
        if isinstance(node.func, ast.Attribute) and node.func.attr in _CHILDREN:
            return self.paths(node.func.value)
        return set()

    def _call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name in _ASKING or name in _ITERATING or name in ("getattr", "setattr", "delattr"):
            return
        if name == "super":
            return
        function, offset, own = self._callee(node.func)
        given: dict[int, set[Path]] = {0: own} if offset else {}
        given |= {place + offset: self.paths(arg) for place, arg in enumerate(node.args)}
        named = {keyword.arg: self.paths(keyword.value) for keyword in node.keywords if keyword.arg}
        followed = False
        if function is not None and (offset or any(given.values()) or any(named.values())):
            followed = self.reader.follow(function, given, named, self.depth + 1)
        if not followed:
            for paths in (self.paths(node.func), *given.values(), *named.values()):
                for path in paths:
                    self._add(path, called=True)
        for path in self.paths(node.func):
            # By the name of its forward, or of another method.
            self._add(path, called=True)
            self._add(path[:-1], called=True)

    def _callee(self, func: ast.AST) -> tuple[Any, int, set[Path]]:
        """The function that is called if it is known, how many arguments it is given before those that are
        written, and what the first of these is.
        """
        if isinstance(func, ast.Name):
            return self._global(func.id), 0, set()
        if not isinstance(func, ast.Attribute):
            return None, 0, set()
        if isinstance(func.value, ast.Call) and getattr(func.value.func, "id", None) == "super":
            return self._inherited(func.attr), 1, {()}
        if () in self.paths(func.value):
            return _method(self.reader.kind, func.attr), 1, {()}
        if isinstance(func.value, ast.Name) and isinstance(self._global(func.value.id), types.ModuleType):
            return vars(self._global(func.value.id)).get(func.attr), 0, set()
        return None, 0, set()

    def _global(self, name: str) -> Any:
        closure = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        if name in closure:
            try:
                return closure[name].cell_contents
            except ValueError:
                return None
        return self.function.__globals__.get(name)

    def _inherited(self, name: str) -> Any:
        """What super() finds in this function."""
        later = False
        for base in self.reader.kind.__mro__:
            if later and name in vars(base):
                return vars(base)[name]
            own = inspect.unwrap(vars(base).get(self.function.__name__))
            later = later or getattr(own, "__code__", None) is self.function.__code__
        return None

    def _attribute(self, node: ast.Attribute, parents: dict[int, ast.AST]) -> None:
        owners = self.paths(node.value)
        if not owners:
            return
        if () in owners:
            # A method that is handed on, to a checkpoint say, or a property.
            function = _method(self.reader.kind, node.attr)
            if function is not None:
                self.reader.follow(function, {0: {()}}, {}, self.depth + 1)
        if node.attr != "weight":
            return
        parent = parents.get(id(node))
        if isinstance(parent, ast.Attribute) and parent.attr in _METADATA:
            return
        if isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in _ASKING:
            return
        if isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops):
            return
        for path in owners:
            self._add(path, called=False)

    def _add(self, path: Path, called: bool) -> None:
        if path:
            self.reader.found[Use(path, called, self.where)] = None


def _names(target: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _method(kind: type, name: str) -> Any:
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, functools.cached_property):
        found = found.func
    return (
        found if isinstance(found, types.FunctionType) and found.__module__ != nn.Module.__module__ else None
    )


def _reached(module: object, path: Path) -> Iterator[nn.Module]:
    """The modules that `path` leads to from `module`."""
    if not path:
        if isinstance(module, nn.Module):
            yield module
        return
    step, rest = path[0], path[1:]
    if isinstance(module, nn.Module):
        if step is _SOME:
            inside: Iterable = module._modules.values()
        else:
            inside = [module._modules.get(step, vars(module).get(step))]
        if step is _SOME or (step.isdecimal() and step not in module._modules):
            # An element of what was written as a tuple, whose paths are those of its elements.
            yield from _reached(module, rest)
        for child in inside:
            yield from _reached(child, rest)
    elif step is _SOME and isinstance(module, (list, tuple, dict)):
        for child in module.values() if isinstance(module, dict) else module:
            yield from _reached(child, rest)


def check_calls(model: nn.Module, layers: Mapping[int, str]) -> tuple[str, ...]:
    """Return what to warn of where layers of `model`, {id: name}, may not be called: their weight is read in
    one place and they are called in another, or something else than the tree of modules holds them.

    Raises ValueError for those that are certainly not called.
    """
    called: set[int] = set()
    read: dict[int, str] = {}
    for module in _around(model, layers):
        compiled = module._modules.get("_orig_mod")
        if id(compiled) in layers:
            raise ValueError(
                f"{layers[id(compiled)]} was compiled by itself, and the compiled code would ignore the "
                "adapter: call torch.compile after apply_lorafa (or leave the layer out with exclude_modules)"
            )
        for use in uses_of(getattr(type(module), "lorafa_original", type(module))):
            for found in _reached(module, use.path):
                if id(found) in layers and found is not module:
                    if use.called:
                        called.add(id(found))
                    else:
                        read.setdefault(id(found), use.where)
    if never := [key for key in read if key not in called]:
        names = ", ".join(layers[key] for key in never)
        raise ValueError(
            f"{names}: {read[never[0]]} reads the weight and never calls the layer, so an adapter would have "
            "no effect (leave it out with exclude_modules)"
        )
    found = [
        f"{layers[key]}: {where} reads the weight in one place and calls the layer in another; the adapter "
        "has no effect where the weight is read"
        for key, where in read.items()
    ]
    found += [
        f"{name} is also held by {attribute}: a call through {attribute} runs the layer without the adapter"
        for name, attribute in _kept_elsewhere(model, layers).items()
    ]
    return tuple(found)


def _around(model: nn.Module, layers: Mapping[int, str]) -> list[nn.Module]:
    """The modules that hold one of `layers` at any depth."""
    found: dict[int, nn.Module] = {}
    holds: dict[int, bool] = {}

    def visit(module: nn.Module) -> bool:
        if id(module) not in holds:
            holds[id(module)] = False
            inside = [visit(child) for child in module._modules.values() if child is not None]
            holds[id(module)] = any(inside)
            if any(inside):
                found[id(module)] = module
        return holds[id(module)] or id(module) in layers

    visit(model)
    return list(found.values())


def _kept_elsewhere(model: nn.Module, layers: Mapping[int, str]) -> dict[str, str]:
    """{name: attribute} of those of `layers` that an attribute of a module holds, itself, a method of it, or
    in a list, where a layer in its place would not be seen.
    """
    found: dict[str, str] = {}
    for owner_name, owner in model.named_modules():
        for attribute, value in vars(owner).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for part in _parts(value):
                if id(part) in layers and part is not owner:
                    found.setdefault(layers[id(part)], f"{owner_name}.{attribute}".lstrip("."))
    return found


def _parts(value: object, depth: int = 0) -> Iterator[object]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _parts(part, depth + 1)
    elif isinstance(value, (list, tuple, set)) and depth < 2:
        for part in value:
            yield from _parts(part, depth + 1)
    elif isinstance(value, dict) and depth < 2:
        for part in value.values():
            yield from _parts(part, depth + 1)
