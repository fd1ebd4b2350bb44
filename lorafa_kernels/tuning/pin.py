"""Pinning a plan: by LORAFA_KERNELS_PLAN, or for a block of code by pin_plan.

    LORAFA_KERNELS_PLAN=fused | library     which of the two wherever impl="auto" could take either
    LORAFA_KERNELS_PLAN=FILE.json           one plan for each operation that the file names:

    {"forward": {"name": "fused", "pdl": false, "configs": {"expand": {"BLOCK_M": 128, …}}},
     "backward": {"name": "library", "one_pass": true}}

A plan as in a table (lookup.py). one_pass and pdl are true where left out, a configuration that is left out
is the heuristics' choice. Operations that the file does not name are planned as always.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .recipe import NAMES, OPERATIONS, Recipe, recipe_from_json

PLAN_VARIABLE = "LORAFA_KERNELS_PLAN"


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

    Raises ValueError for a variable that is neither a plan's name nor a file with plans.
    """
    return _by_environment() if _by_code is None else _by_code


@contextlib.contextmanager
def pin_plan(plan: str | Mapping[str, Recipe] | Pin) -> Iterator[None]:
    """Pin "fused" or "library", or a Recipe for some operations, while the block runs.

    For the whole process, its other threads included: on a GPU autograd runs backward in a thread of its
    own. A plan pinned here goes before the environment's. It concerns impl="auto" and impl="triton";
    "triton" means the kernels whatever name is pinned. What is pinned and cannot run raises RuntimeError when
    it is called.

    Raises ValueError for an unknown name or operation.
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
        found = json.loads(Path(value).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return make_pin({op: recipe_from_json(plan) for op, plan in found.items()}, origin)
    except OSError as error:
        raise ValueError(f"{origin}: expected 'fused', 'library' or a JSON file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def forget_environment() -> None:
    """Read the environment variable again when it is needed next."""
    _by_environment.cache_clear()


def make_pin(plan: str | Mapping[str, Recipe], origin: str = "pin_plan") -> Pin:
    """Return what pin_plan pins for `plan`. Raises ValueError for an unknown name or operation."""
    if not isinstance(plan, str):
        return Pin(origin, recipes=_checked(plan))
    if plan not in NAMES:
        raise ValueError(f"unknown plan {plan!r}: one of {', '.join(map(repr, NAMES))}")
    return Pin(origin, plan)


def _checked(recipes: Mapping[str, Recipe]) -> tuple[tuple[str, Recipe], ...]:
    if unknown := recipes.keys() - set(OPERATIONS):
        raise ValueError(f"unknown operations {', '.join(sorted(unknown))}: {', '.join(OPERATIONS)}")
    return tuple(sorted(recipes.items()))
