"""Fill the tables of README.md and docs/ from committed result files: python -m bench.tables [--check]
[--take-demo FILE]

A table stands between two comments, <!-- NAME --> and <!-- /NAME -->, and is replaced whole. With --check
nothing is written, and the exit code is 1 if a table is not what its result file gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..run import store as results
from ..run.environment import ROOT, environment, write_json
from ..run.shell import Parser, run_command, write_whole
from ..run.stub import refuse_stub
from .families import kept_table, memory_table
from .page import readme_table
from .paper import PAPER_RESULTS, paper_table
from .reading import markdown, provenance, wrapped

CPU_RESULTS = "bench/results/cpu/cpu.jsonl"
DEMO_RESULTS = "bench/results/cpu/demo.json"
MEMORY_RESULTS = "bench/results/cpu/memory.jsonl"
GATE_RESULTS = "bench/results/compile-gate.json"


def gate_table(result: dict) -> str:
    """One row a kernel's product and rank: registers per thread and shared memory, by architecture."""
    refuse_stub(result, GATE_RESULTS)
    chosen: dict[tuple, dict[str, str]] = {}
    for row in result["rows"]:
        common = (row["dtype"], row["factor_dtype"], row["sizes"], row["M"], row["asked_tf32"])
        if common != ("bf16", "fp32", "even", 8192, False):
            continue
        kernel = row["kernel"].removesuffix("_kernel")
        # expand walks R in blocks, and the second stages only add up.
        size = ("BLOCK_R", row["config"]["BLOCK_R"]) if kernel.startswith("expand") else ("R", row["R"])
        if size[1] not in (16, 64) or kernel.endswith("_sum") or (row["layout"] == "y" and not row["bias"]):
            continue
        cell = f"{row['registers']} / {row['shared_memory'] / 1024:.0f}"
        layout = row["layout"] + (" with dropout" if row.get("dropout") else "")
        key = (kernel, layout, *size)
        chosen.setdefault(key, {}).setdefault(row["arch"], cell)
    archs = list(dict.fromkeys(row["arch"] for row in result["rows"]))
    rows = [
        [f"{kernel}: {layout}, {what} = {value}", *(cells.get(arch, "–") for arch in archs)]
        for (kernel, layout, what, value), cells in sorted(chosen.items())
    ]
    note = (
        f"{len(result['rows'])} compilations, {result['failed']} failed. Registers per thread / shared "
        "memory in KB of the defaults for bf16 with fp32 lora_B at M = 8192, none of which spills. From "
        f"`{GATE_RESULTS}`: Triton {result['versions']['triton']}; {result['date'][:10]}; commit "
        f"{result['commit'][:12]}."
    )
    return f"{note}\n\n{markdown(['', *archs], rows)}"


def demo_table(result: dict) -> str:
    """One row a way of fine-tuning: what is trained, what is kept for backward, how long, how good."""
    refuse_stub(result, DEMO_RESULTS)
    rows = []
    for run in result["runs"]:
        cells = [f"{run['trained_parameters']:,}", f"{run['saved_activation_bytes'] / 2**20:,.2f}"]
        cells += ["not trained", "–"]
        if run["test_accuracy"] is not None:
            cells[2:] = f"{run['seconds']:.0f}", f"{run['test_accuracy']:.3f}"
        rows.append([run["name"], *cells])
    machine, options, data = result["machine"], result["options"], result["data"]
    versions = {name: machine[name] for name in ("python", "torch", "transformers", "lorafa-kernels")}
    chip = {"cpu": machine["processor"], "threads": machine["threads"]}
    source = provenance(DEMO_RESULTS, chip, result["date"], versions, result["commit"])
    note = (
        f"{options['steps']} steps of {options['batch_size']} snippets, r = {options['rank']} on 36 linear "
        f"layers, {data['train_snippets']:,} snippets to train and {data['test_snippets']:,} to test."
    )
    header = ["", "trained parameters", "kept for backward, MiB", "CPU seconds", "test accuracy"]
    return f"{note} {source}\n\n{markdown(header, rows)}"


def take_demo(path: Path) -> None:
    """Keep a result of the demo as the one that docs/results.md shows, with the commit and without the
    folder's name.
    """
    result = read_json(path)
    if not all(isinstance(result.get(name), kind) for name, kind in (("runs", list), ("options", dict))):
        raise ValueError(f"{path}: it is no result of the demo (make demo writes .demo/results.json)")
    refuse_stub(result, path)
    result["options"].pop("out", None)
    now = environment()
    write_json(ROOT / DEMO_RESULTS, {**result, "commit": now["commit"], "dirty": now["dirty"]})


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is no JSON file") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it holds no JSON object")
    return found


def read_lines(path: Path) -> list[dict]:
    return results.read(path)[0]


@dataclass(frozen=True)
class Table:
    """A table of a page: render(read(source file)) is its text."""

    page: str
    source: str
    read: Callable[[Path], dict | list]
    render: Callable[[dict | list], str]


TABLES = {
    "gate-table": Table("docs/compile-gate.md", GATE_RESULTS, read_json, gate_table),
    "cpu-table": Table("docs/results.md", CPU_RESULTS, read_lines, readme_table),
    "kept-table": Table("README.md", MEMORY_RESULTS, read_lines, kept_table),
    "memory-table": Table("docs/memory.md", MEMORY_RESULTS, read_lines, memory_table),
    "paper-memory-table": Table("docs/memory.md", PAPER_RESULTS, read_json, paper_table),
    "demo-table": Table("docs/results.md", DEMO_RESULTS, read_json, demo_table),
}


def fill(text: str, name: str, table: str) -> str:
    """Return `text` with the table `name` replaced. Raises ValueError where its comments are missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: f"{match[1]}{wrapped(table)}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"expected the comments of table {name!r} once, found them {count} times")
    return filled


def main(argv: list[str] | None = None) -> int:
    return run_command("python -m bench.tables", lambda: fill_all(argv))


def fill_all(argv: list[str] | None) -> int:
    parser = Parser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    stale = "write nothing; exit 1 if a table is out of date"
    parser.add_argument("--check", action="store_true", help=stale)
    demo = "results.json of a run of the demo to keep"
    parser.add_argument("--take-demo", type=Path, metavar="FILE", help=demo)
    options = parser.parse_args(argv)
    check = options.check
    if options.take_demo:
        take_demo(options.take_demo)
    stale = []
    for name, table in TABLES.items():
        path = ROOT / table.page
        before = path.read_text(encoding="utf-8")
        after = fill(before, name, table.render(table.read(ROOT / table.source)))
        if after != before:
            stale.append(f"{table.page}: {name}")
            if not check:
                write_whole(path, after)
    word = "out of date" if check else "written"
    print("\n".join(f"{word}: {entry}" for entry in stale) or "all up to date")
    return 1 if check and stale else 0
