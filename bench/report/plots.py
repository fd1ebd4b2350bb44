"""The pictures of the performance page: PNG files, drawn from sound rows only.

    overhead     time over that of the frozen nn.Linear, by shape
    roofline     achieved TFLOP/s over arithmetic intensity, under the measured ceilings
    block-time   time over that of the frozen block, by piece of a layer
    blocks       memory that a Transformer block keeps for backward
    training     loss curves, step time and memory

    draw(device, records, sources, folder)    a device's plots

A row that is not "ok" has no point. A function without data writes nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..measure.cases import DTYPES
from ..measure.contenders import FROZEN, LORAFA
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.models import PIECES
from ..measure.models import TITLES as MODEL_TITLES
from . import reading
from .reading import PEAKS, TARGET_ROWS, Record, Row, arranged, full_title, label_of, ordered, status, usable

PLOTTED_SHAPES, PLOTTED_FACETS = 14, 3
# Okabe and Ito's palette, told apart with any colour vision; the marker says it a second time.
STYLES: dict[str, tuple[str, str]] = {
    "frozen": ("#000000", "s"),
    "lorafa": ("#0072B2", "o"),
    "triton": ("#56B4E9", "D"),
    "library": ("#009E73", "v"),
    "eager-lorafa": ("#E69F00", "^"),
    "eager-lora": ("#D55E00", "<"),
    "addmm": ("#CC79A7", "X"),
    "compiled-lorafa": ("#666666", "P"),
    "compiled-lora": ("#666666", "p"),
    "peft-lorafa": ("#B8860B", ">"),
    "peft-lorafa-16bit": ("#E69F00", ">"),
    "peft-lorafa-optimizer": ("#CC79A7", "*"),
    "peft-lora": ("#999999", "*"),
    "peft-lora-16bit": ("#D55E00", "<"),
    "lorafa-layers": ("#009E73", "v"),
    "liger": ("#CC79A7", "X"),
}
OTHER = ("#999999", ".")
# LoRA-FA in all of them: their losses differ by rounding alone.
SAME_MATHEMATICS = ("lorafa", "peft-lorafa", "peft-lorafa-16bit")
NAME_WIDTH = 30
INK, FAINT = "#222222", "#6b7280"
# What the marks of reading.Sources say of some of a plot's points.
ADMITTED = {"†": "some not committed", "‡": "some with uncommitted changes", "§": "some of no commit"}


class Point(NamedTuple):
    """One dot. facet: its panel; place: its row, or in the roofline the direction; value: median, p20 and p80
    of a ratio or of TFLOP/s; intensity: FLOPs a byte, in the roofline.
    """

    facet: str
    place: str
    contender: str
    title: str
    value: dict[str, float]
    intensity: float = 0.0


def draw(device: str, records: list[Record], sources: reading.Sources, folder: Path) -> dict[str, Path]:
    """Draw the device's plots and return the paths of those that had data."""
    shown = sorted((r for r in records if r["kind"] in reading.MEASURED), key=reading.case_order)
    paths = {name: folder / f"{name}-{device}.png" for name in reading.PLOTS}
    for path in paths.values():
        path.unlink(missing_ok=True)

    def subtitle(kind: str, remark: str = "") -> str:
        used = [r for r in shown if r["kind"] == kind]
        marks = {mark for r in used for mark in sources.marks(r)}
        dates = sorted({r["date"][:10] for r in used})
        days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
        # Another kind may be from another machine.
        title = reading.device_title(device, used or records)[0]
        admitted = [f"{mark} {text}" for mark, text in ADMITTED.items() if mark in marks]
        return "; ".join(word for word in (title, days, remark, *admitted) if word)

    points, remark = overhead_points(shown)
    overhead(points, paths["overhead"], subtitle("time", remark))
    rates = best_rates([r for r in records if r["kind"] == "ceilings"])
    roofline(roofline_points(shown), *rates, paths["roofline"], subtitle("time"))
    overhead(block_time_points(shown), paths["block-time"], subtitle("time"), "the frozen block")
    blocks(block_bars(shown), paths["blocks"], subtitle("memory"))
    runs, remark = training_runs(shown)
    training(runs, paths["training"], subtitle("training", remark))
    return {name: path for name, path in paths.items() if path.exists()}


# What is drawn


def overhead_points(records: Sequence[Record]) -> tuple[list[Point], str]:
    """Return the points of the overhead plot, and which rows it is about if not all.

    With too many shapes for a picture those at one M are kept: the target's, else the one with most cases.
    """
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
    times = [r for r in times if facet_of(r["case"]) in often]
    return ratio_points(times, LAYER_TITLES, facet_of, shape_of), remark


def block_time_points(records: Sequence[Record]) -> list[Point]:
    """Return the points of the blocks' plot, a panel for each piece of a layer."""
    return ratio_points(
        [r for r in records if r["kind"] == "time" and r["mode"] == "block"],
        MODEL_TITLES,
        lambda case: PIECES.get(case.get("piece"), ""),
        lambda case: f"{case.get('model')}\n{case.get('batch')}×{case.get('sequence')} {case.get('dtype')}",
    )


def ratio_points(
    records: Sequence[Record], titles: dict[str, str], facet: Callable[[dict], str], place: Callable
) -> list[Point]:
    """Return forward + backward over what is frozen, contenders in the order of their titles, whoever happens
    to be in the first case.
    """
    points = [
        Point(facet(record["case"]), place(record["case"]), key, titles.get(key, key), value)
        for record in records
        for key in dict.fromkeys(row["contender"] for row in record["rows"])
        if (value := reading.ratio(record, key, "both"))
    ]
    order = ordered((point.contender for point in points), titles)
    return sorted(points, key=lambda point: order.index(point.contender))


def shape_of(case: dict) -> str:
    if not case.get("K"):
        return ""
    return f"{case['model']} {case['projection']}\n{case['M']}×{case['K']}×{case['N']}"


def facet_of(case: dict) -> str:
    adapter = f", B {case['adapter']}" if case["adapter"] != case["dtype"] else ""
    dropout = f", dropout {case['dropout']:g}" if case["dropout"] else ""
    return f"R = {case['R']}, {case['dtype']}{adapter}{dropout}"


def roofline_points(records: Sequence[Record]) -> list[Point]:
    """Return what the frozen linear and lorafa_kernels achieve, forward and backward by themselves."""
    points = []
    for record in records:
        if record["kind"] != "time" or record["mode"] != "eager" or not record.get("flops"):
            continue
        for key in (FROZEN, LORAFA):
            for part in ("forward", "backward"):
                if time := reading.time_of(record, key, part):
                    flops, moved = work_of(record, key, part)
                    # flops / ms = 1e9 TFLOP/s; the slow end of the time is the low end of the rate.
                    slower = {"median": "median", "p20": "p80", "p80": "p20"}
                    rate = {name: flops / time[other] * 1e-9 for name, other in slower.items()}
                    dtype, title = record["case"]["dtype"], LAYER_TITLES[key]
                    points.append(Point(dtype, part, key, title, rate, flops / moved))
    return points


def work_of(record: Record, contender: str, part: str) -> tuple[int, int]:
    """Return FLOPs and least bytes of a direction: the record's are LoRA-FA's, the frozen linear has less."""
    if contender != FROZEN:
        return record["flops"][part], record["least_bytes"][part]
    case = record["case"]
    M, K, N = case["M"], case["K"], case["N"]
    bias = N if case["bias"] and part == "forward" else 0
    return 2 * M * K * N, (N * K + M * K + M * N + bias) * DTYPES[case["dtype"]].itemsize


def best_rates(records: Sequence[Record]) -> tuple[dict[str, float], float | None]:
    """Return the best measured medians: of each dtype's product in TFLOP/s, and of the copy in GB/s."""
    products: dict[str, float] = {}
    copies = []
    for row in (row for record in records for row in record["rows"]):
        found = usable(row["tflops"] if row["what"] == "product" else row["gb_per_s"])
        if found and row["what"] == "product":
            products[row["dtype"]] = max(found["median"], products.get(row["dtype"], 0))
        elif found:
            copies.append(found["median"])
    return products, max(copies, default=None)


def block_bars(records: Sequence[Record]) -> dict[str, list[Row]]:
    """Return the rows of each block, by its label."""
    return {
        label_of(record["case"]): [
            row
            for row in arranged(record["rows"], MODEL_TITLES)
            if status(row) == "ok" and row.get("units") is not None
        ]
        for record in records
        if record["kind"] == "memory" and record["scope"] == "block"
    }


def training_runs(records: Sequence[Record]) -> tuple[list[Row], str]:
    """Return the rows of the largest model that was trained, and its name."""
    candidates = []
    for record in records:
        # At batches of their own the losses are of other tokens.
        if record["kind"] == "training" and not record["case"].get("largest"):
            rows = arranged(record["rows"], MODEL_TITLES)
            runs = [row for row in rows if status(row) == "ok" and usable(row.get("step_ms"))]
            if runs:
                slowest = max(run["step_ms"]["median"] for run in runs)
                candidates.append((slowest, label_of(record["case"]), runs))
    _, label, runs = max(candidates, key=lambda candidate: candidate[:2], default=(0, "", []))
    return runs, label


# The drawing


def overhead(
    points: Sequence[Point], path: Path, subtitle: str, baseline: str = "the frozen nn.Linear"
) -> None:
    """A panel for each facet, a row for each shape, a dot with p20–p80 for each contender."""
    if not points:
        return
    facets = list(dict.fromkeys(point.facet for point in points))
    shapes = list(dict.fromkeys(point.place for point in points))
    contenders = {point.contender: point.title for point in points}
    pitch = 0.8 / max(1, len(contenders) - 1)
    height = max(2.0, len(shapes) * max(0.5, 0.1 * len(contenders)))
    width = max(8.5, 4.6 + 2.7 * len(facets))
    figure, panels = _panels(1, len(facets), width, height + 2.6, sharey=True)
    top = max(point.value["p80"] for point in points)
    bottom = min(point.value["p20"] for point in points)
    for axes, facet in zip(panels, facets, strict=True):
        axes.axvline(1, color=INK, linewidth=1)
        for row in range(0, len(shapes), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f3f4f6", zorder=0)
        for point in points:
            if point.facet != facet:
                continue
            offset = list(contenders).index(point.contender) * pitch - 0.4 if len(contenders) > 1 else 0
            colour, marker = STYLES.get(point.contender, OTHER)
            place = point.value["median"], shapes.index(point.place) + offset
            style = {"fmt": marker, "color": colour, "markersize": 5.5, "elinewidth": 1.4}
            axes.errorbar(*place, xerr=_both_sides(point.value), **style)
        _ratio_axis(axes, bottom, top)
        axes.set_xlabel(f"time / time of {baseline}\nforward + backward (bars: p20–p80)")
        axes.set_title(facet, fontsize=11)
    panels[0].set_yticks(range(len(shapes)), shapes)
    panels[0].set_ylim(len(shapes) - 0.5, -0.5)
    handles = [_dot(*STYLES.get(key, OTHER), title) for key, title in contenders.items()]
    _finish(figure, f"Overhead of adapters over {baseline}", subtitle, path, handles, 3)


def roofline(
    points: Sequence[Point], products: dict[str, float], copied: float | None, path: Path, subtitle: str
) -> None:
    """A panel for each dtype: achieved rate over arithmetic intensity, both axes logarithmic. products: the
    ceilings in TFLOP/s by dtype; copied: GB/s.
    """
    dtypes = [dtype for dtype in dict.fromkeys(point.facet for point in points) if dtype in products]
    if not dtypes or not copied:
        return
    figure, panels = _panels(1, len(dtypes), max(7.5, 5.2 * len(dtypes)), 5.4)
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = [point for point in points if point.facet == dtype]
        product, copy = products[dtype], copied / 1e3
        ridge = product / copy
        low = min(ridge / 4, *(point.intensity for point in own)) / 1.6
        high = max(ridge * 4, *(point.intensity for point in own)) * 1.6
        axes.plot([low, ridge, high], [low * copy, product, product], color=INK, linewidth=1.5)
        words = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"product: {_rate(product)} TFLOP/s", (high, product), (-4, 16), ha="right", **words)
        middle = math.sqrt(low * ridge)
        text = f"copy: {_rate(copied)} GB/s"
        axes.annotate(text, (middle, middle * copy), (10, -12), ha="left", **words)
        for point in own:
            colour, forward = _colour(point.contender), point.place == "forward"
            style = {"fmt": ">", "color": colour, "markersize": 7, "elinewidth": 1.2}
            style |= {} if forward else {"fmt": "<", "markerfacecolor": "white"}
            place = point.intensity, point.value["median"]
            axes.errorbar(*place, yerr=_both_sides(point.value), **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        bottom = min(low * copy, *(point.value["p20"] for point in own))
        axes.set_ylim(bottom / 1.5, max(product, *(point.value["p80"] for point in own)) * 2)
        for axis, (first, last) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last / first < 200 else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("FLOPs a byte\n(every operand read once, every result written once)")
        axes.set_title(dtype, fontsize=11)
        _plain(axes)
    panels[0].set_ylabel("achieved TFLOP/s")
    contenders = {point.contender: point.title for point in points}
    handles = [Patch(color=_colour(key), label=title) for key, title in contenders.items()]
    handles += [_dot(FAINT, ">", "forward"), _dot(FAINT, "<", "backward", markerfacecolor="white")]
    _finish(figure, "Roofline: one layer under the measured ceilings", subtitle, path, handles, 4)


def blocks(panels: dict[str, Sequence[Row]], path: Path, subtitle: str) -> None:
    """A panel for each block: bars in units of one hidden state, checkpointing hatched below."""
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return
    counts = [len({bar["contender"] for bar in bars}) for bars in panels.values()]
    height = 1.9 + sum(0.52 * count + 0.9 for count in counts)
    figure, places = _panels(len(panels), 1, 9, height, height_ratios=counts)
    for axes, (title, bars) in zip(places, panels.items(), strict=True):
        texts = [f"{bar['units']:.3g}  ({_bytes(bar['saved_bytes'])})" for bar in bars]
        _pairs(axes, bars, [bar["units"] for bar in bars], texts)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("kept for backward, in units of one hidden state (parameters do not count)")
    handles = _hatches([bar for bars in panels.values() for bar in bars])
    _finish(figure, "Memory of one Transformer block", subtitle, path, handles, 2)


def training(runs: Sequence[Row], path: Path, subtitle: str) -> None:
    """Above the loss curves and their distances from lorafa_kernels', below time and memory of a step."""
    if not runs:
        return
    count = len({run["contender"] for run in runs})
    heights = (3.6, 1 + 0.52 * count)
    figure = plt.figure(figsize=(11.5, sum(heights) + 1.9), layout="constrained")
    spec = figure.add_gridspec(2, 2, height_ratios=heights)
    curves, distances, times = (figure.add_subplot(spec[where]) for where in ((0, 0), (0, 1), (1, 0)))
    sizes = figure.add_subplot(spec[1, 1], sharey=times)

    # The later a curve, the thinner: equal ones show as layers of one line.
    plain = [run for run in runs if not run.get("checkpointing")]
    for index, run in enumerate(plain or runs):
        last = len(plain or runs) - 1
        width = 1.2 + 4.8 * (last - index) / max(1, last)
        losses = _losses(run)
        colour = _colour(run["contender"])
        curves.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width)
    curves.set_title("Loss (earlier in the list: wider)", fontsize=11)
    curves.set_ylabel("cross-entropy, nats")
    ours = next((run for run in plain if run["contender"] == LORAFA), None)
    for run in runs:
        if ours is None or run is ours or run["contender"] not in SAME_MATHEMATICS:
            continue
        gaps = [1e3 * (theirs - loss) for theirs, loss in zip(_losses(run), _losses(ours), strict=False)]
        style = "--" if run.get("checkpointing") else "-"
        name = full_title(run, MODEL_TITLES)
        distances.plot(range(1, len(gaps) + 1), gaps, style, color=_colour(run["contender"]), label=name)
    distances.axhline(0, color=INK, linewidth=0.8)
    distances.set_title("Loss of LoRA-FA by others, minus lorafa_kernels'", fontsize=11)
    distances.set_ylabel("0.001 nats")
    if distances.get_legend_handles_labels()[0]:
        # Room above the curves.
        low, high = distances.get_ylim()
        distances.set_ylim(low, high + 0.6 * (high - low))
        distances.legend(frameon=False, fontsize=8.5, loc="upper left")
    for axes in (curves, distances):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes)

    steps = [run["step_ms"] for run in runs]
    medians = [step["median"] for step in steps]
    _pairs(times, runs, medians, [f"{value:,.4g}" for value in medians], steps)
    times.set_xlabel("time of a step, ms (bars: p20–p80)")
    # Where there is no peak: what is kept for backward.
    peaks = [run.get(PEAKS[0]) for run in runs]
    kept = [run.get("saved_bytes") if peak is None else peak for run, peak in zip(runs, peaks, strict=True)]
    texts = [_bytes(size) if size else "–" for size in kept]
    _pairs(sizes, runs, [(size or 0) / 2**20 for size in kept], texts)
    sizes.tick_params(axis="y", labelleft=False)
    at_peak = None not in peaks
    sizes.set_xlabel("peak memory allocated, MiB" if at_peak else "kept for the backward of a step, MiB")
    _finish(figure, "Training", subtitle, path, _hatches(runs), 2)


def _panels(rows: int, columns: int, width: float, height: float, **rest) -> tuple:
    """Return a figure and its panels in one row or column."""
    size = {"figsize": (width, height), "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(rows, columns, **size, **rest)
    return figure, list(grid.flat)


def _losses(run: Row) -> list[float]:
    return [math.nan if loss is None else loss for loss in run.get("losses") or ()]


def _pairs(axes, bars: Sequence[Row], values: Sequence[float], texts: Sequence[str], spreads=None) -> None:
    """A row for each contender, in it a bar without checkpointing and, hatched, one with it."""
    rows = list(dict.fromkeys(bar["contender"] for bar in bars))
    both = len({bool(bar.get("checkpointing")) for bar in bars}) > 1
    height = 0.4 if both else 0.68
    for index, (bar, value, text) in enumerate(zip(bars, values, texts, strict=True)):
        hatched = bool(bar.get("checkpointing"))
        y = rows.index(bar["contender"]) + (height * (hatched - 0.5) if both else 0)
        hatch = {"hatch": "////", "edgecolor": "white"} if hatched else {}
        axes.barh(y, value, height=height * 0.94, color=_colour(bar["contender"]), linewidth=0, **hatch)
        end = value
        if spreads:
            end = spreads[index]["p80"]
            axes.errorbar(value, y, xerr=_both_sides(spreads[index]), color=INK, elinewidth=1.2, capsize=2)
        axes.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    names = [textwrap.fill(MODEL_TITLES.get(key, key), NAME_WIDTH) for key in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(*values, 1e-9))
    _plain(axes, "x")


def _hatches(bars: Sequence[Row]) -> list[Patch]:
    """The legend of bars of which some are hatched, or nothing."""
    if not any(bar.get("checkpointing") for bar in bars):
        return []
    hatch = {"edgecolor": "white", "hatch": "////", "linewidth": 0}
    return [
        Patch(facecolor="#aaaaaa", label="without checkpointing"),
        Patch(facecolor="#aaaaaa", label="with checkpointing", **hatch),
    ]


def _colour(contender: str) -> str:
    return STYLES.get(contender, OTHER)[0]


def _dot(colour: str, marker: str, title: str, **rest) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=title, **rest)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _both_sides(value: dict[str, float]) -> list[list[float]]:
    return [[max(0.0, value["median"] - value["p20"])], [max(0.0, value["p80"] - value["median"])]]


def _ratio_axis(axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(0.97, low / 1.03), max(1.1, high * 1.05))
    span = high / min(1.0, low)
    if span < 1.35:
        ticks = [0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]
    elif span < 3:
        ticks = [0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.6, 2, 2.5]
    else:
        ticks = [0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _plain(axes, "x")


def _plain(axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis=grid)
    axes.set_axisbelow(True)


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**30:,.3g} GiB"


def _finish(figure, title: str, subtitle: str, path: Path, handles: Sequence, columns: int) -> None:
    if handles:
        where = "outside lower center"
        figure.legend(handles=handles, loc=where, ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, so that equal data give equal bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
