"""Which children of a module are fed the same tensor, read from the source of its forward.

Found are calls self.NAME(variable), once each in the whole of forward, of one variable that is not bound
anew between them, in one list of statements: if one of them runs, so do the others. This decides what is
worth computing together. That it is the same tensor, unchanged, is checked again at each call (members.py).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from functools import lru_cache

_MAYBE = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LEAVES = (ast.Return, ast.Break, ast.Continue)


@lru_cache(maxsize=512)
def shared_inputs(kind: type) -> tuple[tuple[str, ...], ...]:
    """Return the groups of at least two names, in the order of the calls; () if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
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
