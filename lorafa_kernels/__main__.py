"""The command line: lorafa-kernels COMMAND, or python -m lorafa_kernels COMMAND."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .checks import doctor
from .command_line import Parser, exit_code
from .memory import command as memory
from .tune import command as tune

# Each has add_command(subparsers), which sets `run`: parsed arguments -> exit code.
COMMANDS = (doctor, memory, tune)
SCRIPT = "lorafa-kernels"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a failure that the command reports, 2
    where it cannot run on this machine, 130 when interrupted from the keyboard, 141 when nobody reads on.

    Raises SystemExit with code 2 for arguments that argparse refuses, and 0 after --help and --version.
    """

    def run() -> int:
        options = make_parser().parse_args(arguments)
        return options.run(options)

    return exit_code(SCRIPT, run)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    installed = os.path.basename(sys.argv[0]).startswith(SCRIPT)
    parser = Parser(
        prog=SCRIPT if installed else "python -m lorafa_kernels",
        description="Commands of lorafa_kernels, Triton kernels for LoRA-FA (arXiv 2308.03303).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_command(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
