"""Fill the tables of README.md and docs/ from committed result files: python -m bench.tables [--check]
[--take-demo FILE]

A table stands between two comments, <!-- NAME --> and <!-- /NAME -->, and is replaced whole. With --check
nothing is written, and the exit code is 1 if a table is not what its result file gives.
"""

from __future__ import annotations

import hashlib
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
DEMO_PLOT = ROOT / "docs" / "images" / "demo.png"
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
    """What each way trains, keeps, takes at its peak, how long, how good; one step in lower precision."""
    refuse_stub(result, DEMO_RESULTS)
    machine, options, data = result["machine"], result["options"], result["data"]
    rows = [
        [
            run["name"],
            f"{run['trained_parameters']:,}",
            f"{run['saved_activation_bytes'] / 2**20:,.1f}",
            f"{run['peak_bytes'] / 2**20:,.1f}",
            f"{run['seconds']:.0f}",
            f"{run['test_accuracy']:.3f}",
        ]
        for run in result["runs"]
    ]
    cells: dict[str, dict[str, str]] = {}
    for row in result["one_step"]:
        both = f"{row['saved_activation_bytes'] / 2**20:.1f} / {row['peak_bytes'] / 2**20:.1f}"
        cells.setdefault(row["name"], {})[row["precision"]] = both
    precisions = list(dict.fromkeys(row["precision"] for row in result["one_step"]))
    lower = [[name, *(found[precision] for precision in precisions)] for name, found in cells.items()]
    versions = {name: machine[name] for name in ("python", "torch", "transformers", "lorafa-kernels")}
    chip = {"cpu": machine["processor"], "threads": machine["threads"]}
    source = provenance(DEMO_RESULTS, chip, result["date"], versions, result["commit"])
    note = (
        f"{options['steps']} steps of {options['batch_size']} snippets, r = {options['rank']} on 36 linear "
        f"layers, dropout {options['dropout']:g}, fp32, {data['train_snippets']:,} snippets to train and "
        f"{data['test_snippets']:,} to test. The ways took turns, step by step, on a machine with other work "
        f"(load average {machine.get('load_average_1_min', 'unknown')} on {machine['cores']} cores): compare "
        "the seconds with each other alone."
    )
    header = ["", "trained parameters", "kept, MiB", "peak, MiB", "seconds on the CPU", "test accuracy"]
    words = f"Not trained: one step of {options['one_step_snippets']} snippets, kept / peak in MiB."
    return "\n\n".join(
        [f"{note} {source}", markdown(header, rows), words, markdown(["", *precisions], lower)]
    )


def take_demo(path: Path) -> None:
    """Keep a result of the demo as the one that README and docs/results.md show, with the commit and without
    the folder's name.
    """
    result = read_json(path)
    if not all(isinstance(result.get(name), kind) for name, kind in (("runs", list), ("options", dict))):
        raise ValueError(f"{path}: it is no result of the demo (make demo writes .demo/results.json)")
    refuse_stub(result, path)
    result["options"].pop("out", None)
    now = environment()
    kept = {**result, "commit": now["commit"], "dirty": now["dirty"]}
    write_json(ROOT / DEMO_RESULTS, kept)
    draw_demo(kept, DEMO_PLOT)


def draw_demo(result: dict, path: Path) -> None:
    """Draw README's picture from the demo's result. The file names its source (demo_mark)."""
    from examples.report import plot_result

    plot_result(result, path, demo_mark(result))


def demo_mark(result: dict) -> str:
    """What the picture says of the result that it was made from."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


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
