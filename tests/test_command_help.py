"""Every option of every command says what it is when it is left out."""

from __future__ import annotations

import argparse
import math

import pytest

from bench import __main__ as bench
from lorafa_kernels.__main__ import make_parser


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, those of bench too, which are made where they are used."""
    found: dict[str, argparse.ArgumentParser] = {}

    def collect(prefix: str, parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update((f"{prefix} {name}", one) for name, one in action.choices.items())

    collect("lorafa-kernels", make_parser())
    made = []

    class Recording(bench.Parser):
        def parse_args(self, *arguments, **options):
            made.append(self)
            raise StopIteration

    right, bench.Parser = bench.Parser, Recording
    try:
        with pytest.raises(StopIteration):
            bench.parse([])
    finally:
        bench.Parser = right
    collect("bench", made[0])
    return found


PARSERS = parsers()
OPTIONS = [
    pytest.param(parser, action, id=f"{name} {action.option_strings[0]}")
    for name, parser in PARSERS.items()
    for action in parser._actions
    # Flags are off when they are left out.
    if action.option_strings and action.nargs != 0
]


def test_all_commands_are_looked_at():
    assert {"lorafa-kernels doctor", "lorafa-kernels memory", "lorafa-kernels tune", "bench run"} <= set(
        PARSERS
    )
    assert len(OPTIONS) > 30


@pytest.mark.parametrize(("parser", "option"), OPTIONS)
def test_the_default_of_an_option_is_in_its_help(parser, option):
    text = option.help % {**vars(option), "prog": parser.prog}
    assert "default: " in text
    default = option.default
    if isinstance(default, (tuple, list)) and default:
        assert f"(default: {' '.join(map(str, default))})" in text
    elif isinstance(default, (str, int, float)) and default != math.inf:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"(default: {shown})" in text
