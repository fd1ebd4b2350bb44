"""python -m bench.launch_gate: the launch gate (gate/launch.py)."""

import sys

from .gate.launch import main

if __name__ == "__main__":
    sys.exit(main())
