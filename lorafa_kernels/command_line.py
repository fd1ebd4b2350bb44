"""What the command lines share: how they end, and how they read numbers."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
# As a shell reports a process that SIGPIPE ended.
PIPE_CLOSED = 141
# Larger sizes are typing errors, and products of them overflow a float.
MOST_SIZE = 2**40
MOST_SIZE_TEXT = "2**40"


class Parser(argparse.ArgumentParser):
    """Answers a wrong call with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {one_line(message)} (see --help)\n")


def exit_code(name: str, run: Callable[[], int]) -> int:
    """Return what `run` returns, and the exit code where it is interrupted or nobody reads its output.

    130 after Ctrl-C; 141 where the reader of a pipe (head, less) has seen enough; 1, with one line on stderr,
    for a file that cannot be read or written, standard output included.
    """
    try:
        try:
            return run()
        finally:
            # Here and not at exit, where Python would print a traceback. There is none after `>&-`.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        _discard_output()
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return FAILED


def _discard_output() -> None:
    """Let what is still buffered go nowhere."""
    # Under pytest standard output has no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def one_line(text: object) -> str:
    """Return a text without line breaks and other control characters, for a message of one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def count(text: str) -> int:
    """Read a whole number from 1 to MOST_SIZE: a `type` for argparse."""
    # isdigit also accepts superscripts, and more digits than Python converts.
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and 1 <= int(text) <= MOST_SIZE):
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a whole number from 1 to {MOST_SIZE_TEXT}")
    return int(text)


def brief(text: str) -> str:
    """Return repr(text) for a message, not long."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."
