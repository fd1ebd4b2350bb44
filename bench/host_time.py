"""python -m bench.host_time: time on the host, beside a stub driver (gate/host.py)."""

import sys

from .gate.host import main
from .run.shell import run_command

if __name__ == "__main__":
    sys.exit(run_command("python -m bench.host_time", main))
