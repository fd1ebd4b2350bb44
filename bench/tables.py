"""python -m bench.tables: the tables of README.md and docs/, from result files (report/tables.py)."""

import sys

from .report.tables import main

if __name__ == "__main__":
    sys.exit(main())
