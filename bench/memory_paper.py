"""python -m bench.memory_paper: the paper's models in the memory planner, into
bench/results/memory-paper.json, of which python -m bench.tables makes a table of docs/memory.md.
"""

import sys

from .measure.paper import paper_memory
from .run.environment import ROOT, environment, write_json
from .run.shell import Parser, run_command

RESULT = ROOT / "bench" / "results" / "memory-paper.json"


def main() -> int:
    Parser(prog="python -m bench.memory_paper", description=__doc__).parse_args()
    found = environment()
    rows = paper_memory(lambda text: print(text, file=sys.stderr))
    write_json(RESULT, {**found, "rows": rows})
    print(f"written: {RESULT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.memory_paper", main))
