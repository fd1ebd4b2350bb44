"""Which children of a module are fed the same tensor, read from the source of its forward.

Found are calls self.NAME(variable), once each in the whole of forward, of one variable that is not bound
anew between them, in one list of statements: if one of them runs, so do the others. This decides what is
worth computing together. That it is the same tensor, at the same version, is checked again at each call
(members.py). A write through `.data` changes no version, so what forward does between the calls is read as
well (`obstacle_between`): it must not hand the tensor, or what may be a view of it, to anything but
operations that are known to write nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from .shield import is_operation

_MAYBE = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LEAVES = (ast.Return, ast.Break, ast.Continue)


@lru_cache(maxsize=512)
def shared_inputs(kind: type) -> tuple[tuple[str, ...], ...]:
    """Return the groups of at least two names, in the order of the calls; () if there is no source."""
    function = _definition(kind.forward)
    if function is None:
        return ()
    own = function.args.args[0].arg
    uses = Counter(
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    )
    groups: list[list[str]] = []
    _read(function.body, own, groups)
    found = (tuple(name for name in group if uses[name] == 1) for group in groups)
    return tuple(group for group in found if len(group) > 1)


def _definition(function: object) -> ast.FunctionDef | None:
    """The syntax tree of a method, None without a source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0] if tree.body else None
    return definition if isinstance(definition, ast.FunctionDef) and definition.args.args else None


def _read(statements: list[ast.stmt], own: str, groups: list[list[str]]) -> None:
    """Add the groups of one list of statements, then those of the lists inside of it."""
    open_groups: dict[str, list[str]] = {}
    for statement in statements:
        bodies = [body for body in _bodies(statement) if body]
        if not bodies:
            for name, variable in _calls(statement, own):
                if variable not in open_groups:
                    open_groups[variable] = []
                    groups.append(open_groups[variable])
                open_groups[variable].append(name)
        for variable in _bound_names(statement):
            open_groups.pop(variable, None)
        if any(isinstance(node, _LEAVES) for node in ast.walk(statement)):
            open_groups.clear()
        for body in bodies:
            _read(body, own, groups)


def _bodies(statement: ast.stmt) -> list[list[ast.stmt]]:
    if isinstance(statement, _SCOPES):
        # What a function inside of forward does is not read.
        return [[ast.Pass()]]
    lists = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
    lists += [part.body for part in (*getattr(statement, "handlers", []), *getattr(statement, "cases", []))]
    return lists


def _calls(node: ast.AST, own: str):
    """(name, variable) of each call self.name(variable) that is made whenever `node` runs."""
    if isinstance(node, _MAYBE):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, own)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == own
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Name)
        and not node.keywords
    ):
        yield node.func.attr, node.args[0].id


def _bound_names(statement: ast.stmt) -> set[str]:
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del))
    }


# Of a tensor: numbers and the like, which lead to none of its elements.
_FACTS = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_cuda",
        "layout",
        "size",
        "dim",
        "numel",
        "stride",
    }
    | {
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "get_device",
        "ndimension",
        "nelement",
        "is_meta",
    }
)
# Of a tensor: operations that write nothing, whatever they return.
_READERS = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "to", "type_as", "float", "half", "bfloat16"}
    | {
        "double",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "chunk",
        "split",
        "unbind",
        "expand",
        "repeat",
    }
    | {"expand_as", "view_as", "reshape_as", "movedim", "swapaxes", "narrow", "select", "clone", "detach"}
    | {
        "T",
        "mT",
        "H",
        "mean",
        "sum",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "mul",
        "add",
        "sub",
        "div",
        "neg",
        "abs",
    }
    | {"matmul", "softmax", "sigmoid", "tanh", "clamp", "type", "cpu", "cuda", "new_zeros", "new_ones", "t"}
    | {"repeat_interleave", "index_select", "masked_fill", "norm", "any", "all", "max", "min", "tile", "roll"}
)
_ASKING = frozenset(
    {"isinstance", "len", "hasattr", "type", "id", "int", "float", "bool", "str", "repr", "range"}
)
_REACHING = frozenset({"exec", "eval", "locals", "globals", "vars", "setattr", "delattr"})
_LEAVING = (ast.Yield, ast.YieldFrom, ast.Await)
_DEPTH = 4


@lru_cache(maxsize=512)
def obstacle_between(kind: type, names: tuple[str, ...], linears: tuple[str, ...] = ()) -> str | None:
    """Why forward might change the tensor that it feeds to the children `names`, or one of them, between its
    calls of them, and nothing would show it; None if it cannot. linears: children that are plain linear
    layers, which may be given the tensor as well.
    """
    definition = _definition(kind.forward)
    if definition is None:
        return "the source of its forward is not there"
    own = definition.args.args[0].arg
    window = _window(definition.body, own, frozenset(names))
    if window is None:
        return "its forward does not call them one after the other"
    forward = inspect.unwrap(kind.forward)
    arguments = {name for name in _arguments(definition) if name != own}
    loops = any(isinstance(node, (ast.For, ast.AsyncFor, ast.While)) for node in ast.walk(definition))
    last = None if loops else window[-1].end_lineno
    harmless = frozenset((*names, *linears))
    return _Between(kind, forward, definition, own, names, harmless, arguments, 0, last).obstacle(window)


def _arguments(definition: ast.FunctionDef) -> Iterator[str]:
    given = definition.args
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        if argument is not None:
            yield argument.arg


def _window(statements: list[ast.stmt], own: str, names: frozenset[str]) -> list[ast.stmt] | None:
    """The statements from the first call to the last."""
    places: list[int] = []
    found: set[str] = set()
    for place, statement in enumerate(statements):
        bodies = [body for body in _bodies(statement) if body]
        if not bodies:
            here = {name for name, _ in _calls(statement, own)} & names
            found |= here
            places += [place] if here else []
        for body in bodies:
            if (inside := _window(body, own, names)) is not None:
                return inside
    return statements[places[0] : places[-1] + 1] if found == names else None


class _Between:
    """Reads statements of one function: may they change what a variable in `arguments` is, or refers to?

    Every variable may be a view of the tensor but those that only ever are new tensors and numbers, up to
    the line `last`.
    """

    def __init__(
        self,
        kind: type,
        function: types.FunctionType,
        definition: ast.FunctionDef,
        own: str,
        members: tuple[str, ...],
        harmless: frozenset[str],
        arguments: set[str],
        depth: int,
        last: int | None = None,
    ) -> None:
        self.kind, self.function, self.own, self.members = kind, function, own, members
        self.harmless = harmless
        self.definition, self.depth = definition, depth
        self.local = set(_arguments(definition)) | {
            node.id
            for node in ast.walk(definition)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self.views = set(arguments)
        # A variable is one as soon as one of its values may be one.
        while True:
            before = len(self.views)
            for node in ast.walk(definition):
                if last is not None and getattr(node, "lineno", 0) > last:
                    continue
                for target, value in _bindings(node):
                    if self.is_view(value):
                        self.views |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)} - {own}
            if len(self.views) == before:
                break

    def is_view(self, node: ast.AST | None) -> bool:
        """Whether the value of an expression may share memory with the tensor, or hold what does."""
        if node is None or isinstance(
            node, (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.JoinedStr)
        ):
            return False
        if isinstance(node, ast.Name):
            return node.id in self.views
        if isinstance(node, (ast.Lambda, *_SCOPES)):
            return any(isinstance(n, ast.Name) and n.id in self.views for n in ast.walk(node))
        if isinstance(node, ast.Attribute):
            return node.attr not in _FACTS and self.is_view(node.value)
        if isinstance(node, ast.Call):
            if self._member(node) is not None:
                return False
            if isinstance(node.func, ast.Name) and node.func.id in _ASKING:
                return False
            if isinstance(node.func, ast.Attribute) and node.func.attr in _FACTS:
                return False
            return any(map(self.is_view, (node.func, *_given(node))))
        return any(map(self.is_view, ast.iter_child_nodes(node)))

    def _member(self, node: ast.AST) -> str | None:
        """The name of the linear layer that is called."""
        if isinstance(node, ast.Call) and (name := self._attribute(node.func)) in self.harmless:
            return name
        return None

    def _attribute(self, node: ast.AST) -> str | None:
        """NAME of self.NAME."""
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        return node.attr if own and node.value.id == self.own else None

    def obstacle(self, statements: list[ast.stmt]) -> str | None:
        for node in ast.walk(self.definition):
            # What is kept in the module could come back from a method of it.
            for target, value in _bindings(node):
                if any(map(self._attribute, ast.walk(target))) and self.is_view(value):
                    return f"its forward stores their input in {ast.unparse(target)}"
        for statement in statements:
            parents = {id(c): node for node in ast.walk(statement) for c in ast.iter_child_nodes(node)}
            for node in ast.walk(statement):
                found = self._obstacle(node, parents)
                if found is not None:
                    return found
        return None

    def _obstacle(self, node: ast.AST, parents: dict[int, ast.AST]) -> str | None:
        parent = parents.get(id(node))
        if isinstance(node, _LEAVING):
            return "its forward can end or jump between their calls"
        if isinstance(node, ast.Name) and node.id in _REACHING and node.id not in self.local:
            return f"its forward calls {node.id} between their calls"
        if isinstance(node, ast.Name) and node.id == self.own and not isinstance(parent, ast.Attribute):
            return f"its forward passes {self.own} on between their calls"
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            return (
                f"its forward writes {ast.unparse(node)} between their calls"
                if self.is_view(node.value)
                else None
            )
        if isinstance(node, ast.AugAssign) and self.is_view(node.target):
            return f"its forward changes {ast.unparse(node.target)} in place between their calls"
        if isinstance(node, ast.Attribute) and self.is_view(node.value):
            called = isinstance(parent, ast.Call) and parent.func is node
            if node.attr not in _FACTS and not (
                node.attr in _READERS and (called or node.attr in ("T", "mT", "H"))
            ):
                return f"its forward uses {ast.unparse(node)} between their calls"
        if isinstance(node, ast.Call) and self._member(node) is None:
            return self._obstacle_of_call(node)
        name = self._attribute(node)
        method = None if name is None else inspect.getattr_static(self.kind, name, None)
        if isinstance(method, property) and method.fget is not None:
            return self._obstacle_inside(method.fget, name, set())
        return None

    def _obstacle_of_call(self, node: ast.Call) -> str | None:
        name = self._attribute(node.func)
        method = None if name is None else inspect.getattr_static(self.kind, name, None)
        if isinstance(method, types.FunctionType):
            return self._obstacle_inside(method, name, self._handed(method, node))
        if not isinstance(node.func, ast.Attribute) and self.is_view(node.func):
            called = ast.unparse(node.func)
            return f"its forward calls {called} between their calls, which may know their input"
        if not any(map(self.is_view, _given(node))):
            return None
        if isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            return None
        if isinstance(node.func, ast.Attribute) and name is None and node.func.attr in (*_FACTS, *_READERS):
            return None
        # As torch.cat, and not as F.silu(x, inplace=True) or torch.relu_(x).
        plain = not any(keyword.arg in ("out", "inplace", None) for keyword in node.keywords)
        if plain and self._is_operation(node.func):
            return None
        return f"its forward passes their input to {ast.unparse(node.func)} between their calls"

    def _handed(self, method: types.FunctionType, node: ast.Call) -> set[str] | None:
        """The arguments of `method` that may be views of the tensor."""
        definition = _definition(method)
        if definition is None or any(isinstance(argument, ast.Starred) for argument in node.args):
            return None
        names = [a.arg for a in (*definition.args.posonlyargs, *definition.args.args)][1:]
        handed = {name for name, value in zip(names, node.args, strict=False) if self.is_view(value)}
        more = [value for value in node.args[len(names) :] if self.is_view(value)]
        handed |= {word.arg for word in node.keywords if word.arg and self.is_view(word.value)}
        spread = any(word.arg is None and self.is_view(word.value) for word in node.keywords)
        return None if more or spread else handed

    def _obstacle_inside(self, method: types.FunctionType, name: str, handed: set[str] | None) -> str | None:
        method = inspect.unwrap(method)
        definition = _definition(method) if isinstance(method, types.FunctionType) else None
        if definition is None or handed is None or self.depth >= _DEPTH:
            return f"its forward calls {name} between their calls, whose source cannot be read"
        own = definition.args.args[0].arg
        uses = {n.attr for n in ast.walk(definition) if isinstance(n, ast.Attribute)}
        if used := [member for member in self.members if member in uses]:
            return f"its {name}, which is called between them, uses {used[0]}"
        inside = _Between(
            self.kind, method, definition, own, self.members, self.harmless, handed, self.depth + 1
        )
        return inside.obstacle(definition.body)

    def _is_operation(self, func: ast.AST) -> bool:
        """Whether `func` names a function of torch that writes into no argument."""
        parts = []
        while isinstance(func, ast.Attribute):
            parts.append(func.attr)
            func = func.value
        if not isinstance(func, ast.Name) or func.id in self.local:
            return False
        value = self.function.__globals__.get(func.id)
        for part in reversed(parts):
            value = vars(value).get(part) if isinstance(value, types.ModuleType) else None
        return is_operation(value) and not getattr(value, "__name__", "_").endswith("_")


def _given(node: ast.Call) -> list[ast.AST]:
    receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    return [*receiver, *node.args, *(keyword.value for keyword in node.keywords)]


def _bindings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(target, value) of what a node assigns."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            pairs = isinstance(target, (ast.Tuple, ast.List)) and isinstance(
                node.value, (ast.Tuple, ast.List)
            )
            if pairs and len(target.elts) == len(node.value.elts):
                yield from zip(target.elts, node.value.elts, strict=True)
            else:
                yield target, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, _SCOPES):
        yield ast.Name(node.name, ast.Store()), node
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        yield node.target, node.iter
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, node.context_expr
