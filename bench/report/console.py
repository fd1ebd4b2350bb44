"""The tables of a run on a console: red where a check failed, yellow where something did not run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..measure.contenders import LORAFA
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.kernels import LIBRARY
from ..measure.kernels import TITLES as KERNEL_TITLES
from .reading import (
    COLUMNS,
    LOSS,
    MEASURED,
    MODES,
    SCOPES,
    Record,
    arranged,
    case_order,
    described,
    label_of,
    main_loop_lines,
    ordered,
    rate_cell,
    ratio,
    reason_of,
    reasons,
    spread,
    status,
    time_cell,
    title_of,
    titles_of,
)

COLOURS = {"failed": "red", "not run": "yellow"}
MEMORY_COLUMNS = ("kept for backward", "temporary, forward", "temporary, backward", "peak allocated")
TRAINING_COLUMNS = ("batch", "step, ms (p20–p80)", "tokens/s", "kept for backward", "peak allocated")


def show(records: Sequence[Record], console: Console) -> None:
    """Print the tables of a run: red where a check failed, yellow where something did not run."""
    shown = sorted((described(r) for r in records if r["kind"] in MEASURED), key=case_order)
    for record in (r for r in records if r["kind"] == "main-loop"):
        for line in main_loop_lines(record):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for record in (r for r in records if r["kind"] == "ceilings"):
        show_ceilings(record, console)
    for mode, title in MODES.items():
        if times := [r for r in shown if r["kind"] == "time" and r.get("mode") == mode]:
            show_times(times, title, console)
    for scope, title in SCOPES.items():
        if kept := [r for r in shown if r["kind"] == "memory" and r["scope"] == scope]:
            names = MEMORY_COLUMNS if scope == "layer" else ("in hidden states", *MEMORY_COLUMNS)
            show_rows(kept, title, names, console)
    if runs := [r for r in shown if r["kind"] == "training"]:
        show_rows(runs, "training", (*TRAINING_COLUMNS, LOSS), console)


def show_ceilings(record: Record, console: Console) -> None:
    table = Table("ceiling", "median (p20–p80)", title="ceilings, through PyTorch")
    for row in record["rows"]:
        product = row["what"] == "product"
        name = f"product {row['dtype']}, TFLOP/s" if product else "copy, GB/s read and written"
        table.add_row(name, rate_cell(row))
    console.print(table)


def show_times(records: Sequence[Record], title: str, console: Console) -> None:
    """A line for each case and contender: times, ratio to the baseline, lorafa_kernels over it."""
    rows = [row for record in records for row in record["rows"]]
    if all(status(row) == "not run" for row in rows):
        console.print(f"{title}: not run: {reasons(records)}", style="yellow", highlight=False)
        return
    parts = list(dict.fromkeys(row["part"] for row in rows))
    layers = titles_of(records[0]) is not KERNEL_TITLES
    baseline = "frozen nn.Linear" if titles_of(records[0]) is LAYER_TITLES else "frozen"
    table = Table("case", "contender", *(f"{part}, ms" for part in parts), title=title)
    if layers:
        table.add_column(f"both: time / {baseline}")
        table.add_column("both: lorafa_kernels / this")
    for record in records:
        titles = titles_of(record)
        for index, key in enumerate(ordered((row["contender"] for row in record["rows"]), titles)):
            rows = [row for row in record["rows"] if row["contender"] == key]
            bad = [row for row in rows if status(row) != "ok"]
            cells = [time_cell(record, key, part) for part in parts]
            if not layers:
                over = [ratio(record, key, part, LIBRARY) for part in parts]
                cells = [f"{a} (×{b['median']:.3f})" if b else a for a, b in zip(cells, over, strict=True)]
            else:
                pairs = (ratio(record, key, "both"), ratio(record, LORAFA, "both", key))
                cells += [spread(value) if value else "" for value in pairs]
            worst = next((row for row in bad if status(row) == "failed"), bad[0] if bad else None)
            if len(bad) == len(rows):
                cells = [f"{status(worst)}: {reason_of(worst)}"]
            name = label_of(record["case"]) if index == 0 else ""
            table.add_row(name, titles.get(key, key), *cells, style=COLOURS.get(status(worst)))
        table.add_section()
    console.print(table)


def show_rows(records: Sequence[Record], title: str, wanted: Sequence[str], console: Console) -> None:
    """A line for each case and contender of measurements without parts."""
    table = Table("case", "contender", *wanted, title=title)
    for record in records:
        for index, row in enumerate(arranged(record["rows"], titles_of(record))):
            name = [label_of(record["case"]) if index == 0 else "", title_of(record, row)]
            sound = status(row) == "ok"
            cells = [COLUMNS[name](row) for name in wanted] if sound else [f"{status(row)}: {reason_of(row)}"]
            table.add_row(*name, *cells, style=COLOURS.get(status(row)))
        table.add_section()
    console.print(table)
