"""Regular expressions that come from configurations, matched in bounded time.

Python's `re` may need time exponential in a name's length, for (.*a)* say, or a power of it, for
.*.*.*.*.*. Where its worst case is small it decides, as in PEFT. Elsewhere the same parsed expression is run
as a program that visits each instruction once at each position, in the same order of preference, so that the
answer is the same and the time is bounded by their product.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

try:
    from re import _compiler, _parser
    from re import _constants as codes
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_constants as codes
    import sre_parse as _parser

# Steps of `re` that one name may take: some 0.2 s (estimate).
_MANY_STEPS = 10_000_000
# Steps beyond which the time for all names is looked at (estimate).
_FEW_STEPS = 100_000
# Longest expression in characters and in codes of `re` (estimate: far beyond what anyone writes).
_LONGEST_EXPRESSION = 1_000_000
_LARGEST_PROGRAM = 20_000
# A length that names do not exceed; only to refuse an expression before there is a name.
_LONG_NAME = 200
# For all names of a model together (estimate).
_SECONDS = 60.0
_LIMIT = threading.local()

_ONE_CHARACTER = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}
_REPEATS = {codes.MAX_REPEAT, codes.MIN_REPEAT}
# Since Python 3.11.
_POSSESSIVE = getattr(codes, "POSSESSIVE_REPEAT", None)
_ATOMIC = getattr(codes, "ATOMIC_GROUP", None)


@contextmanager
def limited() -> Iterator[None]:
    """Within this context matching takes a minute of this thread's time at most, then it is a ValueError."""
    if getattr(_LIMIT, "deadline", None) is not None:
        yield
        return
    _LIMIT.deadline = time.thread_time() + _SECONDS
    try:
        yield
    finally:
        _LIMIT.deadline = None


def check_expression(field: str, source: str, before: str = "", after: str = "") -> None:
    """Raise ValueError, naming the field, if `source` cannot be matched, by itself and between `before` and
    `after`.
    """
    if len(source) > _LONGEST_EXPRESSION:
        raise ValueError(
            f"{field}: a regular expression has {len(source):,} characters, at most {_LONGEST_EXPRESSION:,} "
            "are allowed"
        )
    shown = source if len(source) <= 200 else f"{source[:200]}…"
    try:
        alone = re.compile(source)
        if before and alone.flags != re.compile("").flags:
            raise ValueError(
                f"{field}: {shown!r} sets flags globally, but becomes part of a longer expression: write "
                "(?i:...)"
            )
        compiled(before + source + after).check()
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{field}: {shown!r} is not a regular expression: {reason}") from None
    except Unbounded as error:
        raise ValueError(
            f"{field}: {shown!r} may take for ever to match ({error}): use a simpler expression or a list of "
            "names"
        ) from None


class Unbounded(ValueError):
    """An expression whose time cannot be bounded; the message says what in it is the reason."""


@lru_cache(maxsize=65536)
def compiled(source: str) -> Expression:
    """The expression, compiled once."""
    return Expression(source)


class Expression:
    """A regular expression for whole names. Raises what re.compile raises."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._known = re.compile(source)
        self._tree = _parser.parse(source)
        self._steps: dict[int, float] = {}
        self._program: list[tuple] | None = None

    def check(self) -> None:
        """Raise Unbounded if long names cannot be matched in bounded time."""
        if self._worst(_LONG_NAME) > _MANY_STEPS:
            self._compile()

    def matches(self, name: str) -> bool:
        """Whether the whole name matches."""
        return self.groups(name) is not None

    def groups(self, name: str) -> dict[str, str | None] | None:
        """The named groups of the match of the whole name, or None where it does not match."""
        steps = self._worst(len(name))
        if steps <= _MANY_STEPS:
            found = self._known.fullmatch(name)
            result = None if found is None else found.groupdict()
        else:
            result = _Run(name).groups(self._compile(), self._tree.state.groupdict)
        deadline = getattr(_LIMIT, "deadline", None)
        if steps > _FEW_STEPS and deadline is not None and time.thread_time() > deadline:
            raise ValueError(
                f"matching names takes more than {_SECONDS:.0f} s in all, the last regular expression was "
                f"{self._source[:200]!r}: use simpler expressions, or lists of names"
            )
        return result

    def _worst(self, length: int) -> float:
        if length not in self._steps:
            self._steps[length] = _cost(self._tree, max(1, length))
        return self._steps[length]

    def _compile(self) -> list[tuple]:
        if self._program is None:
            self._program = _Program(self._tree.state).of(self._tree)
        return self._program


def _cost(items: Any, length: int) -> float:
    """Ways in which `re` may try to match a text of this length, at most."""
    ways = 1.0
    for code, value in items:
        if code is codes.BRANCH:
            ways *= sum(_cost(branch, length) for branch in value[1])
        elif code is codes.SUBPATTERN:
            ways *= _cost(value[3], length)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            ways *= _cost(value[1], length)
        elif code is _ATOMIC:
            ways *= _cost(value, length)
        elif code in _REPEATS or code is _POSSESSIVE:
            ways *= _repeat_cost(*value, length)
        elif code is codes.GROUPREF_EXISTS:
            ways *= sum(_cost(part, length) for part in value[1:] if part is not None)
        if ways > 1e18:
            return float("inf")
    return ways


def _repeat_cost(least: int, most: int, body: Any, length: int) -> float:
    most, least = min(int(most), length), min(int(least), length)
    inner = _cost(body, length)
    if most <= 1:
        return inner if least else 1 + inner
    if inner <= 1:
        return most - least + 1
    if most * math.log(inner) > math.log(_MANY_STEPS):
        return float("inf")
    return sum(inner**count for count in range(least, most + 1))


class _Program:
    """Instructions for an expression: (kind, ...), with places in the list to go on at."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.size = 0
        self.singles: dict[str, Any] = {}

    def of(self, items: Any, add: int = 0, remove: int = 0) -> list[tuple]:
        """The program of a whole (part of an) expression."""
        program: list[tuple] = []
        self._emit(program, items, add, remove)
        program.append(("match",))
        return program

    def _emit(self, program: list[tuple], items: Any, add: int, remove: int) -> None:
        for code, value in items:
            self.size += 1
            if self.size > _LARGEST_PROGRAM:
                raise Unbounded("its repeat counts are too large")
            if code in _ONE_CHARACTER:
                program.append(("character", self._single(code, value, add, remove)))
            elif code is codes.AT:
                program.append(("at", self._single(code, value, add, remove)))
            elif code is codes.BRANCH:
                self._emit_branch(program, value[1], add, remove)
            elif code is codes.SUBPATTERN:
                group, more, less, body = value
                if group is not None:
                    program.append(("save", 2 * group))
                self._emit(program, body, (add & ~less) | more, (remove & ~more) | less)
                if group is not None:
                    program.append(("save", 2 * group + 1))
            elif code in _REPEATS:
                self._emit_repeat(program, code is codes.MAX_REPEAT, *value, add, remove)
            elif code in (codes.ASSERT, codes.ASSERT_NOT):
                direction, body = value
                width = body.getwidth()[0] if direction < 0 else None
                program.append(("look", self.of(body, add, remove), width, code is codes.ASSERT))
            else:
                raise Unbounded(f"it has nested repeats together with {str(code).lower()}")

    def _emit_branch(self, program: list[tuple], branches: list, add: int, remove: int) -> None:
        ends = []
        for index, branch in enumerate(branches):
            if index == len(branches) - 1:
                self._emit(program, branch, add, remove)
                break
            split = len(program)
            program.append(())
            self._emit(program, branch, add, remove)
            ends.append(len(program))
            program.append(())
            program[split] = ("split", split + 1, len(program))
        for end in ends:
            program[end] = ("jump", len(program))

    def _emit_repeat(
        self, program: list[tuple], greedy: bool, least: int, most: int, body: Any, add: int, remove: int
    ) -> None:
        for _ in range(int(least)):
            before = len(program)
            self._emit(program, body, add, remove)
            if len(program) == before:
                return
        if most is codes.MAXREPEAT:
            split = len(program)
            program.append(())
            self._emit(program, body, add, remove)
            program.append(("jump", split))
            program[split] = self._split(greedy, split + 1, len(program))
            return
        splits = []
        for _ in range(int(most) - int(least)):
            splits.append(len(program))
            program.append(())
            before = len(program)
            self._emit(program, body, add, remove)
            if len(program) == before:
                break
        for split in splits:
            program[split] = self._split(greedy, split + 1, len(program))

    @staticmethod
    def _split(greedy: bool, body: int, out: int) -> tuple:
        return ("split", body, out) if greedy else ("split", out, body)

    def _single(self, code: Any, value: Any, add: int, remove: int) -> Any:
        """What tells whether one item matches at a place: `re` itself, with the flags that hold there."""
        key = f"{code} {value} {add} {remove}"
        if key not in self.singles:
            item = _parser.SubPattern(self.state, [(code, value)])
            flagged = _parser.SubPattern(self.state, [(codes.SUBPATTERN, (None, add, remove, item))])
            self.singles[key] = _compiler.compile(flagged, 0).match
        return self.singles[key]


class _Run:
    """One name, and what was spent on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0

    def groups(self, program: list[tuple], numbers: dict[str, int]) -> dict[str, str | None] | None:
        """The named groups (name: number) of the first way, in order of preference, to match all."""
        saved = self._run(program, 0, len(self.name))
        if saved is None:
            return None
        places = dict(saved)
        return {
            group: self.name[places[2 * number] : places[2 * number + 1]]
            if 2 * number + 1 in places
            else None
            for group, number in numbers.items()
        }

    def _run(self, program: list[tuple], start: int, end: int | None) -> tuple | None:
        name, seen = self.name, set()
        waiting = [(0, start, ())]
        while waiting:
            place, position, saved = waiting.pop()
            while (place, position) not in seen:
                seen.add((place, position))
                self.steps += 1
                if self.steps > _MANY_STEPS:
                    raise Unbounded(f"matching {self.name[:200]!r} takes more than {_MANY_STEPS:,} steps")
                kind, *rest = program[place]
                if kind == "match":
                    if end is None or position == end:
                        return saved
                    break
                if kind == "split":
                    waiting.append((rest[1], position, saved))
                    place = rest[0]
                    continue
                if kind == "jump":
                    place = rest[0]
                    continue
                if kind == "save":
                    saved = (*((key, at) for key, at in saved if key != rest[0]), (rest[0], position))
                elif kind == "look":
                    if not self._look(position, *rest):
                        break
                elif rest[0](name, position) is None:
                    break
                elif kind == "character":
                    position += 1
                place += 1
        return None

    def _look(self, position: int, program: list[tuple], width: int | None, wanted: bool) -> bool:
        if width is None:
            return (self._run(program, position, None) is not None) == wanted
        found = position >= width and self._run(program, position - width, position) is not None
        return found == wanted
