"""The study's plots: scores of all tasks with their intervals, rank, learning rates."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from .plan import SWEPT, choosing_task, chosen_rate
from .reading import Done, measure_of, rates, scores, swept
from .settings import HIGH_RANKS, METHODS, RANKS, SLOWER, SWEEP_TASK, TASKS
from .statistics import mean_of

STYLES = {
    "full": ("#111827", "D"),
    "lora": ("#d97706", "s"),
    "lorafa": ("#1d4ed8", "o"),
    "lorafa-dropout": ("#0891b2", "^"),
    "lorafa-corrected": ("#7c3aed", "v"),
}
FAINT = "#6b7280"


def draw(done: Done, folder: Path, mark: str) -> list[Path]:
    """Write all plots and return their paths. mark: what the files say of their source."""
    made = []
    for name, plot in (("tasks", tasks), ("rank", rank), ("rates", learning_rates)):
        path = folder / f"quality-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = plot(done)
        figure.savefig(path, dpi=110, metadata={"Software": None, "Source": mark})
        plt.close(figure)
        made.append(path)
    return made


def tasks(done: Done):
    """A panel a task: a dot a method with its interval, the seeds pale behind it, LoRA's interval a band."""
    figure, grid = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
    for axes, task in zip(grid.flat, TASKS, strict=True):
        measure = measure_of(task)
        for row, method in enumerate(METHODS):
            colour, marker = STYLES[method]
            values = list(scores(done, task, method).values())
            if not values:
                axes.annotate(
                    "not run yet",
                    (0.5, row),
                    xycoords=("axes fraction", "data"),
                    color=FAINT,
                    va="center",
                    ha="center",
                )
                continue
            mean = mean_of(values)
            axes.plot(values, [row] * len(values), "|", color=colour, alpha=0.5, markersize=11)
            axes.errorbar(mean.value, row, xerr=mean.half, fmt=marker, color=colour, markersize=7, capsize=3)
            if method == "lora" and mean.half is not None:
                axes.axvspan(
                    mean.value - mean.half, mean.value + mean.half, color=colour, alpha=0.12, linewidth=0
                )
        axes.set_yticks(range(len(METHODS)), [method.title for method in METHODS.values()])
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
        better = "more is better" if measure.better > 0 else "less is better"
        axes.set_xlabel(f"{measure.title} ({better})")
        axes.set_title(TASKS[task].title, fontsize=10.5)
        _plain(axes, "x")
    for row in grid:
        for axes in row[1:]:
            axes.tick_params(labelleft=False)
    figure.suptitle(
        "Means with 95 % intervals (bars) and single seeds (ticks); band: LoRA's interval",
        fontsize=12,
    )
    return figure


def rank(done: Done):
    """Bits a byte over the rank, with intervals."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for method in SWEPT:
        colour, marker = STYLES[method]
        for slower, style in ((1, "-"), (SLOWER, ":")):
            ranks = RANKS if slower == 1 else HIGH_RANKS
            found = {
                r: mean_of(list(v.values()))
                for r in ranks
                if (v := swept(done, method, rank=r, slower=slower))
            }
            rate = chosen_rate(SWEEP_TASK, method, done)
            if not found or rate is None:
                continue
            shift = 0.97 if method == "lora" else 1.03
            axes.errorbar(
                [r * shift for r in found],
                [mean.value for mean in found.values()],
                yerr=[mean.half or 0.0 for mean in found.values()],
                fmt=f"{style}{marker}",
                color=colour,
                markerfacecolor=colour if slower == 1 else "white",
                capsize=3,
                label=f"{METHODS[method].title}, learning rate {rate / slower:g}",
            )
    full = list(scores(done, SWEEP_TASK, "full").values())
    if full:
        axes.axhline(
            mean_of(full).value, color=STYLES["full"][0], linestyle="--", label=METHODS["full"].title
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.set_xlabel("rank R (solid: at the learning rate chosen for R = 8)")
    axes.set_ylabel("bits a byte (less is better)")
    axes.set_title(TASKS[SWEEP_TASK].title, fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    _plain(axes)
    return figure


def learning_rates(done: Done):
    """Validation loss over the learning rate, a panel a model; the chosen one is filled."""
    chosen_on = list(dict.fromkeys(choosing_task(task) for task in TASKS))
    figure, grid = plt.subplots(1, len(chosen_on), figsize=(13, 4.2), layout="constrained")
    for axes, task in zip(grid, chosen_on, strict=True):
        for key, method in METHODS.items():
            colour, marker = STYLES[key]
            found = {rate: nats for rate, nats in rates(done, task, key).items() if nats is not None}
            if not found:
                continue
            axes.plot(
                found.keys(),
                found.values(),
                f"-{marker}",
                color=colour,
                markerfacecolor="white",
                label=method.title,
            )
            best = chosen_rate(task, key, done)
            if best in found:
                axes.plot([best], [found[best]], marker, color=colour)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("learning rate")
        axes.set_title(TASKS[task].title, fontsize=10.5)
        _plain(axes)
    grid[0].set_ylabel("validation loss, nats (one seed)")
    handles = grid[0].get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside lower center", ncols=len(METHODS), frameon=False)
    return figure


def _plain(axes, which: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis=which)
    axes.set_axisbelow(True)
