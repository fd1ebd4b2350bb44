"""Fill the tables of README.md and docs/ from committed result files: python -m bench.tables [--check]

A table stands between two comments, <!-- NAME --> and <!-- /NAME -->, and is replaced whole. With --check
nothing is written, and the exit code is 1 if a table is not what its result file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable

from .environment import ROOT

LAYER_RESULTS = "bench/results/cpu/layer.json"
DEMO_RESULTS = "bench/results/cpu/demo.json"
GATE_RESULTS = "bench/results/compile-gate.json"


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
    """One row a case: each contender's median time, and its paired ratio to PEFT with A frozen and to the
    frozen linear.
    """
    rows = []
    for row in result["rows"]:
        label = row["case"]["label"]
        if row["ms"] is None:
            rows.append([label, row["contender"], f"{row['status']}: {row['reason']}", "", ""])
            continue
        time = f"{row['ms']['median']:.3f}" if row["ms"]["median"] < 10 else f"{row['ms']['median']:.1f}"
        rows.append([label, row["contender"], time, *(ratio(row, name) for name in baselines(result))])
    header = ["case", "layer", "ms (median)", *(f"over {name}" for name in baselines(result))]
    environment = result["environment"]
    source = provenance(
        LAYER_RESULTS,
        environment["machine"],
        environment["date"],
        environment["versions"],
        environment["commit"],
    )
    note = (
        f"Forward + dx + dB of one layer, {result['rounds']} interleaved rounds; ratios are medians over the "
        "rounds (p20 to p80)."
    )
    return f"{note} {source}\n\n{markdown(header, rows)}"


def baselines(result: dict) -> list[str]:
    """The baselines that ratios were formed with, in the order of their first use."""
    return list(dict.fromkeys(name for row in result["rows"] for name in row["ratios"]))


def ratio(row: dict, baseline: str) -> str:
    """A ratio with its spread, or a dash where a contender is not compared with that baseline."""
    found = row["ratios"].get(baseline)
    return f"{found['median']:.2f} ({found['p20']:.2f}–{found['p80']:.2f})" if found else "–"


TABLES: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "layer-table": ("README.md", LAYER_RESULTS, layer_table),
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
    check = parser.parse_args(argv).check
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
