"""The command line: python -m lorafa_kernels COMMAND."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, doctor, memory
from .tuning import command as tune

# Each has add_command(subparsers), which sets `run`: parsed arguments -> exit code.
COMMANDS = (doctor, memory, tune)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a failure that the command reports, 2
    where it cannot run on this machine, 130 when interrupted from the keyboard.

    Raises SystemExit with code 2 for arguments that argparse refuses, and 0 after --help and --version.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lorafa_kernels",
        description="Commands of lorafa_kernels, Triton kernels for LoRA-FA (arXiv 2308.03303).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
