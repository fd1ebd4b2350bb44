"""Few cases that hold every pair of values of every two parameters."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(values: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return cases, one value for each parameter, such that any two values of two parameters meet in one of
    them. The same for the same seed.
    """
    choose = random.Random(seed)
    names = list(values)
    indices = {name: range(len(values[name])) for name in names}
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(indices[a], indices[b])
    }
    cases = []
    while missing:
        best: tuple[int, dict[str, int]] = (-1, {})
        (a, i), (b, j) = min(missing)
        for _ in range(40):
            case = {name: choose.choice(indices[name]) for name in names} | {a: i, b: j}
            best = max(best, (len(missing & _pairs(names, case)), case), key=lambda found: found[0])
        missing -= _pairs(names, best[1])
        cases.append({name: values[name][index] for name, index in best[1].items()})
    return cases


def _pairs(names: list[str], case: Mapping[str, int]) -> set:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}
