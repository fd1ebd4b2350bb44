"""python -m bench.host_time: time on the host, beside a stub driver (gate/host.py)."""

import sys

from .gate.host import main

if __name__ == "__main__":
    sys.exit(main())
