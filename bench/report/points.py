"""The data behind the plots of the performance page: points and bars, of sound rows only.

    draw(device, records, sources, folder)    a device's plots, from the functions below

A row that is not "ok" has no point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..measure.blocks import PIECES
from ..measure.cases import DTYPES
from ..measure.contenders import FROZEN, LORAFA
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.models import TITLES as MODEL_TITLES
from .reading import (
    MEASURED,
    PEAKS,
    TARGET_ROWS,
    Record,
    Sources,
    arranged,
    case_order,
    device_title,
    label_of,
    ordered,
    ratio,
    status,
    time_of,
    usable,
)

if TYPE_CHECKING:
    from .plots import Achieved, Ceilings, Kept, Overhead, Trained

PLOTS = ("overhead", "roofline", "block-time", "blocks", "training")
PLOTTED_SHAPES, PLOTTED_FACETS = 14, 3


def draw(device: str, records: list[Record], sources: Sources, plots_dir: Path) -> dict[str, Path]:
    """Draw the device's plots and return the paths of those that had data."""
    # matplotlib takes a while to import, and only the page needs it.
    from . import plots

    shown = sorted((r for r in records if r["kind"] in MEASURED), key=case_order)
    rates = best_rates([r for r in records if r["kind"] == "ceilings"])
    paths = {name: plots_dir / f"{name}-{device}.png" for name in PLOTS}
    for path in paths.values():
        path.unlink(missing_ok=True)

    def subtitle(kind: str, remark: str = "") -> str:
        used = [r for r in shown if r["kind"] == kind]
        marks = {mark for r in used for mark in sources.marks(r)}
        words = {
            "†": "† some not committed",
            "‡": "‡ some with uncommitted changes",
            "§": "§ some of no commit",
        }
        dates = sorted({r["date"][:10] for r in used})
        days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
        title = device_title(device, records)[0]
        admitted = [text for mark, text in words.items() if mark in marks]
        return "; ".join(word for word in (title, days, remark, *admitted) if word)

    points, remark = overhead_points(shown)
    plots.overhead(points, paths["overhead"], subtitle("time", remark))
    plots.roofline(roofline_points(shown), rates, paths["roofline"], subtitle("time"))
    plots.overhead(block_time_points(shown), paths["block-time"], subtitle("time"), "the frozen block")
    plots.blocks(block_bars(shown), paths["blocks"], subtitle("memory"))
    runs, remark = training_runs(shown)
    plots.training(runs, paths["training"], subtitle("training", remark))
    return {name: path for name, path in paths.items() if path.exists()}


def overhead_points(records: Sequence[Record]) -> tuple[list[Overhead], str]:
    """Return the points of the overhead plot, and which rows it is about if not all.

    With too many shapes for a picture those at one M are kept: the target's, else the one with most cases.
    """
    from .plots import Overhead

    times = [r for r in records if r["kind"] == "time" and r["mode"] == "eager" and shape_of(r["case"])]
    remark = ""
    if len({shape_of(r["case"]) for r in times}) > PLOTTED_SHAPES:
        counts = {M: sum(r["case"]["M"] == M for r in times) for M in {r["case"]["M"] for r in times}}
        M = TARGET_ROWS if TARGET_ROWS in counts else max(counts, key=lambda M: (counts[M], M))
        times = [r for r in times if r["case"]["M"] == M]
        remark = f"M = {M}, the other rows are in the table"
    facets = [facet_of(r["case"]) for r in times]
    often = sorted(dict.fromkeys(facets), key=lambda facet: -facets.count(facet))[:PLOTTED_FACETS]
    if len(set(facets)) > len(often):
        remark = "; ".join(text for text in (remark, "more in the table") if text)
    points = []
    for record in times:
        facet, shape = facet_of(record["case"]), shape_of(record["case"])
        for key in ordered((row["contender"] for row in record["rows"]), LAYER_TITLES):
            value = ratio(record, key, "both") if facet in often else None
            if value:
                numbers = (value["median"], value["p20"], value["p80"])
                points.append(Overhead(facet, shape, key, LAYER_TITLES.get(key, key), *numbers))
    # In the order of the titles, whoever happens to be in the first case.
    order = ordered((point.contender for point in points), LAYER_TITLES)
    return sorted(points, key=lambda point: order.index(point.contender)), remark


def block_time_points(records: Sequence[Record]) -> list[Overhead]:
    """Return the points of the blocks' plot, a panel for each piece of a layer."""
    from .plots import Overhead

    points = []
    for record in records:
        if record["kind"] != "time" or record["mode"] != "block":
            continue
        case = record["case"]
        facet = PIECES.get(case.get("piece"), "")
        shape = f"{case.get('model')}\n{case.get('batch')}×{case.get('sequence')} {case.get('dtype')}"
        for key in ordered((row["contender"] for row in record["rows"]), MODEL_TITLES):
            if value := ratio(record, key, "both"):
                numbers = (value["median"], value["p20"], value["p80"])
                points.append(Overhead(facet, shape, key, MODEL_TITLES.get(key, key), *numbers))
    order = ordered((point.contender for point in points), MODEL_TITLES)
    return sorted(points, key=lambda point: order.index(point.contender))


def shape_of(case: dict) -> str:
    if not case.get("K"):
        return ""
    return f"{case['model']} {case['projection']}\n{case['M']}×{case['K']}×{case['N']}"


def facet_of(case: dict) -> str:
    adapter = f", B {case['adapter']}" if case["adapter"] != case["dtype"] else ""
    dropout = f", dropout {case['dropout']:g}" if case["dropout"] else ""
    return f"R = {case['R']}, {case['dtype']}{adapter}{dropout}"


def roofline_points(records: Sequence[Record]) -> list[Achieved]:
    """Return what the frozen linear and lorafa_kernels achieve, forward and backward by themselves."""
    from .plots import Achieved

    points = []
    for record in records:
        if record["kind"] != "time" or record["mode"] != "eager" or not record.get("flops"):
            continue
        for key in (FROZEN, LORAFA):
            for part in ("forward", "backward"):
                value = time_of(record, key, part)
                if not value:
                    continue
                flops, moved = work_of(record, key, part)
                # flops / ms = 1e9 TFLOP/s; the slow end of the time is the low end of the rate.
                rates = [flops / value[name] * 1e-9 for name in ("median", "p80", "p20")]
                title = LAYER_TITLES[key]
                points.append(Achieved(record["case"]["dtype"], key, title, part, flops / moved, *rates))
    return points


def work_of(record: Record, contender: str, part: str) -> tuple[int, int]:
    """Return FLOPs and least bytes of a direction: the record's are LoRA-FA's, the frozen linear has less."""
    if contender != FROZEN:
        return record["flops"][part], record["least_bytes"][part]
    case = record["case"]
    M, K, N = case["M"], case["K"], case["N"]
    bias = N if case["bias"] and part == "forward" else 0
    return 2 * M * K * N, (N * K + M * K + M * N + bias) * DTYPES[case["dtype"]].itemsize


def best_rates(records: Sequence[Record]) -> Ceilings:
    """Return the best measured median of each dtype's product, and of the copy."""
    from .plots import Ceilings

    products: dict[str, float] = {}
    copies = []
    for row in (row for record in records for row in record["rows"]):
        found = usable(row["tflops"] if row["what"] == "product" else row["gb_per_s"])
        if found and row["what"] == "product":
            products[row["dtype"]] = max(found["median"], products.get(row["dtype"], 0))
        elif found:
            copies.append(found["median"])
    return Ceilings(products, max(copies, default=None))


def block_bars(records: Sequence[Record]) -> dict[str, list[Kept]]:
    """Return the bars of each block, by its label."""
    from .plots import Kept

    panels: dict[str, list[Kept]] = {}
    for record in records:
        if record["kind"] != "memory" or record["scope"] != "block":
            continue
        panels[label_of(record["case"])] = [
            Kept(
                row["contender"],
                MODEL_TITLES.get(row["contender"], row["contender"]),
                bool(row.get("checkpointing")),
                row["units"],
                row["saved_bytes"],
            )
            for row in arranged(record["rows"], MODEL_TITLES)
            if status(row) == "ok" and row.get("units") is not None
        ]
    return panels


def training_runs(records: Sequence[Record]) -> tuple[list[Trained], str]:
    """Return the runs of the largest model that was trained, and its name."""
    from .plots import Trained

    candidates = []
    for record in records:
        if record["kind"] != "training" or record["case"].get("largest"):
            # At batches of their own the losses are of other tokens.
            continue
        runs = []
        for row in arranged(record["rows"], MODEL_TITLES):
            step = usable(row.get("step_ms"))
            if status(row) != "ok" or not step:
                continue
            at_peak = row.get(PEAKS[0]) is not None
            runs.append(
                Trained(
                    row["contender"],
                    MODEL_TITLES.get(row["contender"], row["contender"]),
                    bool(row.get("checkpointing")),
                    tuple(math.nan if loss is None else loss for loss in row.get("losses") or ()),
                    (step["median"], step["p20"], step["p80"]),
                    row[PEAKS[0]] if at_peak else row.get("saved_bytes"),
                    at_peak,
                )
            )
        if runs:
            candidates.append((max(run.step_ms[0] for run in runs), label_of(record["case"]), runs))
    if not candidates:
        return [], ""
    _, label, runs = max(candidates, key=lambda candidate: candidate[:2])
    return runs, label
