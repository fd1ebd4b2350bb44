"""Fill the tables of README.md and docs/ from committed result files: python -m bench.tables [--check]
[--take-demo FILE]

A table stands between two comments, <!-- NAME --> and <!-- /NAME -->, and is replaced whole. With --check
nothing is written, and the exit code is 1 if a table is not what its result file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .environment import ROOT, environment, write_json

LAYER_RESULTS = "bench/results/cpu/layer.json"
DEMO_RESULTS = "bench/results/cpu/demo.json"
GATE_RESULTS = "bench/results/compile-gate.json"
FROZEN = "frozen nn.Linear"


def provenance(path: str, machine: dict, date: str, versions: dict, commit: str | None) -> str:
    """Say where a table's numbers come from, in one line."""
    chip = (machine.get("gpu") or {}).get("name") or f"{machine['cpu']}, {machine['threads']} threads"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"From `{path}`: {chip}; {date[:10]}; {named}; commit {(commit or 'unknown')[:12]}."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, numbers to the right of the first column."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_table(result: dict) -> str:
    """One row a case: the frozen linear's median time, and everyone's paired ratio to it with its spread."""
    cases: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"]["label"], {})[row["contender"]] = row
    others = [name for name in dict.fromkeys(row["contender"] for row in result["rows"]) if name != FROZEN]
    rows = []
    for label, of_case in cases.items():
        times = [ratio_to_frozen(of_case[name]) if name in of_case else "–" for name in others]
        rows.append([label, f"{of_case[FROZEN]['ms']['median']:.3g}", *times])
    header = ["M×K×N", f"{FROZEN}, ms", *others]
    now = result["environment"]
    source = provenance(LAYER_RESULTS, now["machine"], now["date"], now["versions"], now["commit"])
    note = (
        f"Forward + dx + dB of one layer: time over that of the {FROZEN} (forward + dx) in the same round, "
        f"median of {result['rounds']} interleaved rounds (p20–p80). Host time: so small that it is Python's."
    )
    return f"{note} {source}\n\n{markdown(header, rows)}"


def ratio_to_frozen(row: dict) -> str:
    """A ratio with its spread, or why there is none."""
    if row["ms"] is None:
        return f"{row['status']}: {row['reason']}"
    ratio = row["ratios"][FROZEN]
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"


def gate_table(result: dict) -> str:
    """One row a kernel's product and rank: registers per thread and shared memory, by architecture."""
    chosen: dict[tuple, dict[str, str]] = {}
    for row in result["rows"]:
        common = (row["dtype"], row["factor_dtype"], row["sizes"], row["M"], row["asked_tf32"])
        if common != ("bf16", "fp32", "even", 8192, False):
            continue
        block_r = row["config"]["BLOCK_R"]
        if block_r not in (16, 64) or (row["layout"] == "y" and not row["bias"]):
            continue
        cell = f"{row['registers']} / {row['shared_memory'] / 1024:.0f}"
        key = (row["kernel"].removesuffix("_kernel"), row["layout"], block_r)
        chosen.setdefault(key, {}).setdefault(row["arch"], cell)
    archs = list(dict.fromkeys(row["arch"] for row in result["rows"]))
    rows = [
        [f"{kernel}: {layout}, BLOCK_R = {block_r}", *(cells.get(arch, "–") for arch in archs)]
        for (kernel, layout, block_r), cells in sorted(chosen.items())
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
    rows = []
    for run in result["runs"]:
        trained = run["test_accuracy"] is not None
        rows.append(
            [
                run["name"],
                f"{run['trained_parameters']:,}",
                f"{run['saved_activation_bytes'] / 2**20:,.2f}",
                f"{run['seconds']:.0f}" if trained else "not trained",
                f"{run['test_accuracy']:.3f}" if trained else "–",
            ]
        )
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
    """Keep a result of the demo as the one that README shows, with the commit and without the folder's
    name.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    result["options"].pop("out", None)
    now = environment()
    write_json(ROOT / DEMO_RESULTS, {**result, "commit": now["commit"], "dirty": now["dirty"]})


TABLES: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "layer-table": ("README.md", LAYER_RESULTS, layer_table),
    "gate-table": ("docs/design.md", GATE_RESULTS, gate_table),
    "demo-table": ("README.md", DEMO_RESULTS, demo_table),
}


def fill(text: str, name: str, table: str) -> str:
    """Return `text` with the table `name` replaced. Raises ValueError where its comments are missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"expected the comments of table {name!r} once, found them {count} times")
    return filled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table is out of date"
    )
    parser.add_argument(
        "--take-demo", type=Path, metavar="FILE", help="results.json of a run of the demo to keep"
    )
    options = parser.parse_args(argv)
    check = options.check
    if options.take_demo:
        take_demo(options.take_demo)
    stale = []
    for name, (page, source, render) in TABLES.items():
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = fill(before, name, render(json.loads((ROOT / source).read_text(encoding="utf-8"))))
        if after != before:
            stale.append(f"{page}: {name}")
            if not check:
                path.write_text(after, encoding="utf-8")
    print(
        "\n".join(f"{'out of date' if check else 'written'}: {entry}" for entry in stale) or "all up to date"
    )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
