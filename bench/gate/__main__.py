"""python -m bench.gate: the compile gate (compile.py)."""

import sys

from ..run.shell import run_command
from .compile import main

if __name__ == "__main__":
    sys.exit(run_command("python -m bench.gate", main))
