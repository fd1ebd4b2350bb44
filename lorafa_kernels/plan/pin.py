"""Pinning a plan: by LORAFA_KERNELS_PLAN, or for a block of code by pin_plan.

    LORAFA_KERNELS_PLAN=fused | library     which of the two wherever impl="auto" could take either
    LORAFA_KERNELS_PLAN=FILE.json           one plan for each operation that the file names:

    {"forward": {"name": "fused", "pdl": false, "configs": {"expand": {"BLOCK_M": 128, …}}},
     "backward": {"name": "library", "one_pass": true}}

A plan as in a table (tables.py). one_pass and pdl are true where left out, a configuration that is left out
is the heuristics' choice. Operations that the file does not name are planned as always. A file that holds
something else is ignored, with one warning that names it and what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json, shown
from .config import OPS
from .recipe import NAMES, OPERATIONS, Recipe, check_config, recipe_from_json

PLAN_VARIABLE = "LORAFA_KERNELS_PLAN"
# What opening a word that names no file raises.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Pin:
    """What is pinned, and by what: a plan's name for all operations, or a recipe for some of them."""

    origin: str
    name: str | None = None
    recipes: tuple[tuple[str, Recipe], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.origin, self.name, self.recipes))

    def __hash__(self) -> int:
        # Looked up with in each call: that of nested recipes takes longer than the look-up.
        return self._hash

    def recipe(self, op: str) -> Recipe | None:
        return next((recipe for pinned, recipe in self.recipes if pinned == op), None)

    def needs_kernels(self, op: str) -> bool:
        """Whether what is pinned for an operation is, or contains, a Triton kernel."""
        recipe = self.recipe(op)
        if recipe is None:
            return self.name == "fused"
        return recipe.name == "fused" or (op == "backward" and recipe.kernels.one_pass)

    def name_for(self, op: str) -> str | None:
        """Return the name of the plan that is pinned for an operation, or None."""
        recipe = self.recipe(op)
        return recipe.name if recipe else self.name


_by_code: Pin | None = None


def pinned() -> Pin | None:
    """Return what is pinned now, by pin_plan or else by the environment variable, which is read once.

    Raises ValueError for a variable that is neither a plan's name nor a file. A file that holds no plans is
    ignored, with one warning.
    """
    return _by_environment() if _by_code is None else _by_code


@contextlib.contextmanager
def pin_plan(plan: str | Mapping[str, Recipe] | Pin) -> Iterator[None]:
    """Pin "fused" or "library", or a Recipe for some operations, while the block runs.

    For the whole process, its other threads included: on a GPU autograd runs backward in a thread of its
    own. A plan pinned here goes before the environment's. It concerns impl="auto" and impl="triton";
    "triton" means the kernels whatever name is pinned. What is pinned and cannot run raises RuntimeError when
    it is called.

    Raises TypeError for what is no plan, and ValueError for an unknown name or operation and for a
    configuration that no device can run.
    """
    global _by_code
    before, _by_code = _by_code, plan if isinstance(plan, Pin) else make_pin(plan)
    try:
        yield
    finally:
        _by_code = before


@functools.lru_cache(maxsize=1)
def _by_environment() -> Pin | None:
    value = os.environ.get(PLAN_VARIABLE)
    if not value:
        return None
    if value in NAMES:
        return Pin(PLAN_VARIABLE, value)
    origin = f"{PLAN_VARIABLE}={value}"
    try:
        found = read_json(Path(value))
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object with a plan for each operation")
        return make_pin({op: recipe_from_json(plan) for op, plan in found.items()}, origin)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_FILE:
            raise ValueError(f"{origin}: expected 'fused', 'library' or a JSON file: {error}") from error
        warnings.warn(f"{origin} is ignored: {error}", stacklevel=2)
        return None


def forget_environment() -> None:
    """Read the environment variable again when it is needed next."""
    _by_environment.cache_clear()


def make_pin(plan: str | Mapping[str, Recipe], origin: str = "pin_plan") -> Pin:
    """Return what pin_plan pins for `plan`. Raises TypeError for what is no plan, and ValueError for an
    unknown name or operation and for a configuration that no device can run.
    """
    if isinstance(plan, Mapping):
        return Pin(origin, recipes=_checked(plan))
    if not isinstance(plan, str):
        raise TypeError(f"plan is {shown(plan)}, expected a name ('fused', 'library') or a dict of Recipes")
    if plan not in NAMES:
        raise ValueError(f"unknown plan {shown(plan)}, expected one of {', '.join(map(repr, NAMES))}")
    return Pin(origin, plan)


def _checked(recipes: Mapping[str, Recipe]) -> tuple[tuple[str, Recipe], ...]:
    if unknown := recipes.keys() - set(OPERATIONS):
        raise ValueError(f"unknown operations {_listed(unknown)}, expected some of {', '.join(OPERATIONS)}")
    for op, recipe in recipes.items():
        if not isinstance(recipe, Recipe):
            raise TypeError(f"the plan of {op} is {shown(recipe)}, expected a Recipe")
        for kernel in OPS:
            if config := getattr(recipe.kernels, kernel):
                try:
                    check_config(kernel, config)
                except ValueError as error:
                    raise ValueError(f"the plan of {op}: {error}") from error
    return tuple(sorted(recipes.items()))


def _listed(names: Iterable[object]) -> str:
    # A file's names can be of any length.
    return shown(", ".join(sorted(map(str, names))))[1:-1]
