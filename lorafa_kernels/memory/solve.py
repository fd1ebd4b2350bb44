"""The largest batch, or the longest sequence, whose step fits into a memory.

A step's bytes grow with either at least linearly: they are the most of several sums, each linear, or with
attention's scores quadratic. So two steps give a guess, a third one checks it, and where it does not fit the
line through two checked steps gives the next.
"""

from __future__ import annotations

from collections.abc import Callable

# Three are enough where bytes grow linearly.
_MOST_STEPS = 40
# Above as many units the answer is right to one in as many.
_EXACT_TO = 1000


def largest(
    total: Callable[[int], int], memory: int, start: int, *, unit: int = 1, most: int | None = None
) -> int:
    """Return the largest multiple of `unit`, at most `most`, whose total fits into `memory` bytes; 0 if none
    does. The number that is returned was tried. Above 1,000 units it may be smaller by one in 1,000.

    total: from a number to bytes, growing at least linearly. start: where to begin.

    Raises ValueError for a memory that is not positive.
    """
    if memory <= 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    known: dict[int, int] = {}

    def at(units: int) -> int:
        if units not in known:
            known[units] = total(units * unit)
        return known[units]

    limit = None if most is None else most // unit
    if limit == 0:
        return 0
    first = max(1, start // unit)
    first = first if limit is None else min(first, limit)
    fits, fails = 0, None
    units = first
    for _ in range(_MOST_STEPS):
        if at(units) <= memory:
            fits = max(fits, units)
        else:
            fails = units if fails is None else min(fails, units)
        if fits == limit or (fails is not None and fails - fits <= max(1, fits // _EXACT_TO)):
            break
        units = _next(known, memory, fits, fails, limit)
    return fits * unit


def _next(known: dict[int, int], memory: int, fits: int, fails: int | None, limit: int | None) -> int:
    """The number to try next, between `fits` and `fails`."""
    if len(known) == 1:
        (only,) = known
        # As if there were nothing but what grows: it fits if that grows linearly.
        return _within(only * memory // known[only] if known[only] else 2 * only, fits, fails, limit)
    below = sorted(n for n in known if n <= fits) or [0]
    if fails is None:
        left, right = sorted(known)[-2:]
    elif fits == 0:
        left, right = sorted(known)[:2]
    else:
        left, right = below[-1], fails
    if fails is not None and len(known) > 4 and len(known) % 2:
        # A line through a curve comes near from one side only.
        return _within((fits + fails) // 2, fits, fails, limit)
    slope = (known[right] - known[left]) / (right - left)
    guess = left + int((memory - known[left]) // slope) if slope > 0 else 2 * right
    return _within(guess, fits, fails, limit)


def _within(guess: int, fits: int, fails: int | None, limit: int | None) -> int:
    top = limit if fails is None else fails - 1
    guess = max(guess, fits + 1)
    return guess if top is None else min(guess, top)
