"""What the results say, in Markdown: docs/performance.md with its plots, and README's table.

    write(root, page, plots)     the page, from every result file below root
    readme_table(records)        the short table of the CPU results

What a device's part of the page says is in sections.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..measure.contenders import FROZEN
from ..measure.models import TITLES as MODEL_TITLES
from ..run.environment import ROOT
from ..run.shell import write_whole
from ..run.store import load
from .reading import (
    MEASURED,
    PLOTS,
    Record,
    Sources,
    arranged,
    case_order,
    cell,
    device_of,
    full_title,
    label_of,
    markdown,
    newest,
    number,
    origin,
    provenance,
    size,
    status,
    time_cell,
    wrapped,
)
from .sections import columns, device_section, rounds_text

# What `make host-time` writes.
HOST_TIME = "host-time.json"
NOT_MEASURED_ON_A_GPU = "Speed on a GPU is not measured yet: there is no result file of one."
INTRODUCTION = """# Performance

Written by `python -m bench report` from the files below `bench/results/`. No number here was typed.

- A time stands over that of a named baseline: the ratio of two times taken in the same round, as the median
  of all rounds (p20–p80). 1.05 is 5 % slower than the baseline. The limit is the frozen `nn.Linear`: forward
  and the gradient of its input.
- Before anything is timed, its output and gradients are checked against fp64. What fails the check is listed
  as failed: it has no time here, and nothing is compared with it.
- What could not run is listed as not run, with the reason.
- If something was measured several times, the newest run counts.
- The floor is the least time that the FLOPs and bytes of LoRA-FA allow at the rates measured in the run."""


def draw(*arguments) -> dict[str, Path]:
    """Draw a device's plots (plots.draw)."""
    # matplotlib takes a while to import, and only the page needs it.
    from . import plots

    return plots.draw(*arguments)


def write(root: Path, page: Path, plots_dir: Path) -> list[str]:
    """Write the page and its plots from every result file below `root`; return warnings about the files.

    Plots of an earlier report that have no data any more are removed. Raises ValueError where there is
    nothing to report; the page and its plots are then as they were, as they are after an error or Ctrl-C
    before the new ones are all made.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder")
    records, warnings = load(root)
    if not any(record["kind"] in MEASURED for record in records):
        damaged = f"; {len(warnings)} damaged lines" if warnings else ""
        raise ValueError(f"{root}: there are no results to report (time, memory or training){damaged}")
    plots_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=plots_dir) as aside:
        text, drawn = _page(root, page, plots_dir, Path(aside), records, warnings)
        # The page first: until its plots follow, it shows those of before.
        write_whole(page, text)
        for path in drawn:
            os.replace(path, plots_dir / path.name)
    for name in PLOTS:
        for path in plots_dir.glob(f"{name}-*.png"):
            if path.name not in {new.name for new in drawn}:
                path.unlink()
    return warnings


def _page(
    root: Path, page: Path, plots_dir: Path, aside: Path, records: list[Record], warnings: list[str]
) -> tuple[str, list[Path]]:
    """Return the page's text, and its plots, which are drawn into `aside`."""
    sections = []
    drawn: list[Path] = []
    by_device: dict[str, list[Record]] = {}
    for (device, _, _), record in newest(records).items():
        by_device.setdefault(device, []).append(record)
    devices = sorted(by_device, key=lambda device: (device == "cpu", device))
    if not any(device != "cpu" for device in devices):
        sections.append(f"## GPU\n\n{NOT_MEASURED_ON_A_GPU}")
    for device in devices:
        sources = Sources(by_device[device], root)
        ends = [r for r in records if r["kind"] == "end" and device_of(r) == device]
        pictures = draw(device, by_device[device], sources, aside)
        drawn += pictures.values()
        links = {
            name: f"![{name}]({Path(os.path.relpath(plots_dir / path.name, page.parent)).as_posix()})"
            for name, path in pictures.items()
        }
        sections.append(device_section(device, by_device[device], sources, links, ends))
    if (root / HOST_TIME).is_file():
        sections.append(host_section(json.loads((root / HOST_TIME).read_text(encoding="utf-8"))))
    if warnings:
        lines = "\n".join(f"- {_without_folders(text, root)}" for text in warnings)
        sections.append(f"## Skipped\n\n{lines}")
    return wrapped("\n\n".join([INTRODUCTION, *sections])) + "\n", drawn


def host_section(result: dict) -> str:
    """Return the section about the time on the host, from what `python -m bench.host_time` wrote."""
    before = result.get("before", {"rows": {}, "commit": None})
    rows = []
    for name, row in result["rows"].items():
        line = [name, f"{row['median_us']:.0f}", f"{row['empty_launches']:.1f}", "–", "–"]
        if old := before["rows"].get(name):
            share = row["empty_launches"] / old["empty_launches"]
            line[3:] = f"{old['empty_launches']:.1f}", f"{share:.0%}"
        rows.append(line)
    source = provenance(
        f"bench/results/{HOST_TIME}", result["machine"], result["date"], result["versions"], result["commit"]
    )
    earlier = f" Before: commit {before['commit'][:12]}." if before["commit"] else ""
    header = ["", "CPU time, µs", "in empty launches", "before", "of that"]
    return (
        "## Host time\n\n"
        "What a process spends between a Python call and the driver, in thread CPU time, beside a stub "
        "driver that accepts launches and computes nothing: no GPU was present. An empty launch is a kernel "
        "of 20 arguments that does nothing, through Triton's own launcher, in the same run.\n\n"
        f"{markdown(header, rows)}\n\n{source}{earlier}"
    )


def readme_table(records: Sequence[Record]) -> str:
    """Return the CPU's newest results for README: one layer's ratios, and a block's memory in one line.

    Raises ValueError if there are none.
    """
    found = [r for (device, _, _), r in newest(records).items() if device == "cpu"]
    times = sorted((r for r in found if r["kind"] == "time" and r["mode"] == "eager"), key=case_order)
    if not times:
        raise ValueError("there are no CPU times of a layer among the results: run `python -m bench quick`")
    sources = Sources(times, ROOT)
    shown, absent = columns(times)
    rows = [
        [label_of(r["case"]), time_cell(r, FROZEN, "both"), *(cell(r, key, "both") for key in shown)]
        for r in times
    ]
    note = (
        "Forward + backward of one layer: time over that of the frozen nn.Linear (forward + dx) in the same "
        f"round, median of {rounds_text(times)} (p20–p80)."
        f"{absent.replace(' (reasons below)', '')}"
    )
    header = ["M×K×N", "frozen nn.Linear, ms", *shown.values()]
    lines = [" ".join([note, *(origin(sources.runs[name], name[0]) for name in sources.order)])]
    lines.append(markdown(header, rows))
    kept_by = [r for r in found if r["kind"] == "memory" and r["scope"] == "block"]
    for record in sorted(kept_by, key=case_order):
        kept = [
            f"{full_title(row, MODEL_TITLES)} {number(row['units']) if status(row) == 'ok' else status(row)}"
            for row in arranged(record["rows"], MODEL_TITLES)
            if not row.get("checkpointing")
        ]
        if kept:
            block = f"{label_of(record['case'])}; in hidden states of {size(record['unit_bytes'])}"
            text = "Kept for backward by one block without checkpointing"
            lines.append(f"{text} ({block}): {'; '.join(kept)}.")
    return "\n\n".join(lines)


def _without_folders(text: str, root: Path) -> str:
    for top in (ROOT, root.absolute(), root):
        text = text.replace(f"{top}{os.sep}", "")
    return text
