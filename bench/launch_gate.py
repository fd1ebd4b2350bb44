"""python -m bench.launch_gate: the launch gate (gate/launch.py)."""

import sys

from .gate.launch import main
from .run.shell import run_command

if __name__ == "__main__":
    sys.exit(run_command("python -m bench.launch_gate", main))
