"""The pictures of the performance page: PNG files, drawn from points that the report has already judged.

    overhead   time over that of the frozen nn.Linear, by shape
    roofline   achieved TFLOP/s over arithmetic intensity, under the measured ceilings
    blocks     memory that a Transformer block keeps for backward
    training   loss curves, step time and memory

A function without data writes nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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


@dataclass(frozen=True)
class Overhead:
    """One contender's time over that of the frozen nn.Linear, forward + backward. facet: the panel."""

    facet: str
    shape: str
    contender: str
    title: str
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Achieved:
    """One direction of one layer: FLOPs a byte and TFLOP/s (p20 and p80 of the rate)."""

    dtype: str
    contender: str
    title: str
    part: str
    intensity: float
    tflops: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ceilings:
    """The best measured rates: products in TFLOP/s by dtype, copies in GB/s (bytes read and written)."""

    tflops: dict[str, float] = field(default_factory=dict)
    gb_per_s: float | None = None


@dataclass(frozen=True)
class Kept:
    """What one contender keeps for the backward of one block: units of one hidden state, and bytes."""

    contender: str
    title: str
    checkpointing: bool
    units: float
    saved_bytes: int


@dataclass(frozen=True)
class Trained:
    """One training run. step_ms: median, p20, p80. memory_bytes: peak allocated, else kept for backward."""

    contender: str
    title: str
    checkpointing: bool
    losses: tuple[float, ...]
    step_ms: tuple[float, float, float]
    memory_bytes: int | None
    peak: bool


def overhead(
    points: Sequence[Overhead], path: Path, subtitle: str, baseline: str = "the frozen nn.Linear"
) -> None:
    """A panel for each facet, a row for each shape, a dot with p20–p80 for each contender."""
    if not points:
        return
    facets = list(dict.fromkeys(point.facet for point in points))
    shapes = list(dict.fromkeys(point.shape for point in points))
    contenders = list(dict.fromkeys((point.contender, point.title) for point in points))
    pitch = 0.8 / max(1, len(contenders) - 1)
    height = max(2.0, len(shapes) * max(0.5, 0.1 * len(contenders)))
    figure, grid = plt.subplots(
        1,
        len(facets),
        figsize=(max(8.5, 4.6 + 2.7 * len(facets)), height + 2.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    top = max(point.p80 for point in points)
    bottom = min(point.p20 for point in points)
    for axes, facet in zip(grid[0], facets, strict=True):
        axes.axvline(1, color=INK, linewidth=1)
        for row in range(0, len(shapes), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f3f4f6", zorder=0)
        for point in points:
            if point.facet != facet:
                continue
            index = [contender for contender, _ in contenders].index(point.contender)
            colour, marker = STYLES.get(point.contender, OTHER)
            axes.errorbar(
                point.median,
                shapes.index(point.shape) + (index * pitch - 0.4 if len(contenders) > 1 else 0),
                xerr=_both_sides(point.median, point.p20, point.p80),
                fmt=marker,
                color=colour,
                markersize=5.5,
                elinewidth=1.4,
            )
        _ratio_axis(axes, bottom, top)
        axes.set_xlabel(f"time / time of {baseline}\nforward + backward (bars: p20–p80)")
        axes.set_title(facet, fontsize=11)
    grid[0][0].set_yticks(range(len(shapes)), shapes)
    grid[0][0].set_ylim(len(shapes) - 0.5, -0.5)
    handles = [_dot(contender, title) for contender, title in contenders]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _finish(figure, f"Overhead of adapters over {baseline}", subtitle, path)


def roofline(points: Sequence[Achieved], ceilings: Ceilings, path: Path, subtitle: str) -> None:
    """A panel for each dtype: achieved rate over arithmetic intensity, both axes logarithmic."""
    dtypes = [dtype for dtype in dict.fromkeys(point.dtype for point in points) if dtype in ceilings.tflops]
    if not dtypes or not ceilings.gb_per_s:
        return
    figure, grid = plt.subplots(
        1, len(dtypes), figsize=(max(7.5, 5.2 * len(dtypes)), 5.4), squeeze=False, layout="constrained"
    )
    contenders = list(dict.fromkeys((point.contender, point.title) for point in points))
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        own = [point for point in points if point.dtype == dtype]
        product, copy = ceilings.tflops[dtype], ceilings.gb_per_s / 1e3
        ridge = product / copy
        low = min(ridge / 4, *(point.intensity for point in own)) / 1.6
        high = max(ridge * 4, *(point.intensity for point in own)) * 1.6
        axes.plot([low, ridge, high], [low * copy, product, product], color=INK, linewidth=1.5)
        words = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"product: {_rate(product)} TFLOP/s", (high, product), (-4, 16), ha="right", **words)
        middle = math.sqrt(low * ridge)
        text = f"copy: {_rate(ceilings.gb_per_s)} GB/s"
        axes.annotate(text, (middle, middle * copy), (10, -12), ha="left", **words)
        for point in own:
            colour, _ = STYLES.get(point.contender, OTHER)
            forward = point.part == "forward"
            axes.errorbar(
                point.intensity,
                point.tflops,
                yerr=_both_sides(point.tflops, point.p20, point.p80),
                fmt=">" if forward else "<",
                color=colour,
                markerfacecolor=colour if forward else "white",
                markersize=7,
                elinewidth=1.2,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        bottom = min(low * copy, *(point.p20 for point in own))
        axes.set_ylim(bottom / 1.5, max(product, *(point.p80 for point in own)) * 2)
        for axis, (first, last) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last / first < 200 else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("FLOPs a byte\n(every operand read once, every result written once)")
        axes.set_title(dtype, fontsize=11)
        _plain(axes)
    grid[0][0].set_ylabel("achieved TFLOP/s")
    handles = [Patch(color=STYLES.get(key, OTHER)[0], label=title) for key, title in contenders]
    handles += [
        Line2D([], [], linestyle="", marker=">", color=FAINT, label="forward"),
        Line2D([], [], linestyle="", marker="<", color=FAINT, markerfacecolor="white", label="backward"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _finish(figure, "Roofline: one layer under the measured ceilings", subtitle, path)


def blocks(panels: dict[str, Sequence[Kept]], path: Path, subtitle: str) -> None:
    """A panel for each block: bars in units of one hidden state, checkpointing hatched below."""
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return
    counts = [len({bar.contender for bar in bars}) for bars in panels.values()]
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(9, 1.9 + sum(0.52 * count + 0.9 for count in counts)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, bars) in zip(grid[:, 0], panels.items(), strict=True):
        values = [bar.units for bar in bars]
        _pairs(axes, bars, values, [f"{bar.units:.3g}  ({_bytes(bar.saved_bytes)})" for bar in bars])
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("kept for backward, in units of one hidden state (parameters do not count)")
    _hatch_legend(figure, any(bar.checkpointing for bars in panels.values() for bar in bars))
    _finish(figure, "Memory of one Transformer block", subtitle, path)


def training(runs: Sequence[Trained], path: Path, subtitle: str) -> None:
    """Above the loss curves and their distances from lorafa_kernels', below time and memory of a step."""
    if not runs:
        return
    count = len({run.contender for run in runs})
    heights = (3.6, 1 + 0.52 * count)
    figure = plt.figure(figsize=(11.5, sum(heights) + 1.9), layout="constrained")
    spec = figure.add_gridspec(2, 2, height_ratios=heights)
    curves, distances, times = (figure.add_subplot(spec[where]) for where in ((0, 0), (0, 1), (1, 0)))
    sizes = figure.add_subplot(spec[1, 1], sharey=times)

    # The later a curve, the thinner: equal ones show as layers of one line.
    plain = [run for run in runs if not run.checkpointing] or list(runs)
    for index, run in enumerate(plain):
        width = 1.2 + 4.8 * (len(plain) - index - 1) / max(1, len(plain) - 1)
        curves.plot(range(1, len(run.losses) + 1), run.losses, color=_colour(run), linewidth=width)
    curves.set_title("Loss (earlier in the list: wider)", fontsize=11)
    curves.set_ylabel("cross-entropy, nats")
    ours = next((run for run in runs if run.contender == "lorafa" and not run.checkpointing), None)
    for run in runs:
        if ours is None or run is ours or run.contender not in SAME_MATHEMATICS:
            continue
        gaps = [1e3 * (theirs - loss) for theirs, loss in zip(run.losses, ours.losses, strict=False)]
        style = "--" if run.checkpointing else "-"
        distances.plot(range(1, len(gaps) + 1), gaps, style, color=_colour(run), label=_name(run))
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

    medians = [run.step_ms[0] for run in runs]
    _pairs(times, runs, medians, [f"{value:,.4g}" for value in medians], [run.step_ms[1:] for run in runs])
    times.set_xlabel("time of a step, ms (bars: p20–p80)")
    kept = [run.memory_bytes or 0 for run in runs]
    _pairs(sizes, runs, [size / 2**20 for size in kept], [_bytes(size) if size else "–" for size in kept])
    sizes.tick_params(axis="y", labelleft=False)
    peak = all(run.peak for run in runs)
    sizes.set_xlabel("peak memory allocated, MiB" if peak else "kept for the backward of a step, MiB")
    _hatch_legend(figure, any(run.checkpointing for run in runs))
    _finish(figure, "Training", subtitle, path)


def _pairs(
    axes,
    bars: Sequence[Kept] | Sequence[Trained],
    values: Sequence[float],
    texts: Sequence[str],
    spreads: Sequence[Sequence[float]] | None = None,
) -> None:
    """A row for each contender, in it a bar without checkpointing and, hatched, one with it."""
    rows = list(dict.fromkeys(bar.contender for bar in bars))
    titles = {bar.contender: bar.title for bar in bars}
    both = len({bar.checkpointing for bar in bars}) > 1
    height = 0.4 if both else 0.68
    for index, (bar, value, text) in enumerate(zip(bars, values, texts, strict=True)):
        y = rows.index(bar.contender) + (height * (bar.checkpointing - 0.5) if both else 0)
        hatch = {"hatch": "////", "edgecolor": "white"} if bar.checkpointing else {}
        axes.barh(y, value, height=height * 0.94, color=_colour(bar), linewidth=0, **hatch)
        end = value
        if spreads:
            low, end = spreads[index]
            axes.errorbar(value, y, xerr=_both_sides(value, low, end), color=INK, elinewidth=1.2, capsize=2)
        axes.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [textwrap.fill(titles[key], NAME_WIDTH) for key in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(*values, 1e-9))
    _plain(axes, "x")


def _hatch_legend(figure, checkpointing: bool) -> None:
    if checkpointing:
        handles = [
            Patch(facecolor="#aaaaaa", label="without checkpointing"),
            Patch(
                facecolor="#aaaaaa", edgecolor="white", hatch="////", linewidth=0, label="with checkpointing"
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _colour(of: Kept | Trained) -> str:
    return STYLES.get(of.contender, OTHER)[0]


def _name(run: Trained) -> str:
    return f"{run.title}{', checkpointing' if run.checkpointing else ''}"


def _dot(contender: str, title: str) -> Line2D:
    colour, marker = STYLES.get(contender, OTHER)
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=title)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _both_sides(middle: float, low: float, high: float) -> list[list[float]]:
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]


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


def _finish(figure, title: str, subtitle: str, path: Path) -> None:
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, so that equal data give equal bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
