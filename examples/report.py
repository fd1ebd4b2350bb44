"""What the demo shows of its runs: a table and remarks for the terminal, a picture, a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from rich.table import Table

import lorafa_kernels

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MIB = 2**20
SMOOTHING_STEPS = 9
LORA, PLAIN, LIBRARY = "LoRA", "LoRA-FA, plain PyTorch", "LoRA-FA, lorafa_kernels"
COLOURS = {LORA: "#d97706", PLAIN: "#7c8aa5", LIBRARY: "#1d4ed8"}
PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Run:
    """One way of fine-tuning. peak_bytes: of a step, above the model that was there before it."""

    name: str
    trained_parameters: int
    saved_activation_bytes: int
    peak_bytes: int
    losses: list[float]
    step_seconds: list[float]
    test_accuracy: float

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


@dataclass(frozen=True)
class OneStep:
    """The memory of a way in a precision that was not trained in: one step of a few snippets."""

    precision: str
    name: str
    saved_activation_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Reloaded:
    """What the saved adapter gave in a fresh model, beside the logits of the trained one."""

    accuracy: float
    same_logits: bool
    largest_difference: float


def machine(device: torch.device) -> dict[str, str | float]:
    """Describe what the numbers were measured on, without naming the machine."""
    description: dict[str, str | float] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        # Above the number of cores the times are those of a machine that was doing other work too.
        description["load_average_1_min"] = round(os.getloadavg()[0], 2)
    description["lorafa-kernels"] = lorafa_kernels.__version__
    return description | {package: version(package) for package in PACKAGES}


def table(runs: Sequence[Run]) -> Table:
    result = Table(
        title="MiniLM on movie-review snippets",
        caption="kept: from forward to backward, every storage once; peak: the most in a step. Both without "
        "the model's parameters.",
    )
    result.add_column("trained")
    # Narrow enough for a terminal of 80 columns.
    for heading in (
        "trained\nparameters",
        "kept\nMiB",
        "peak\nMiB",
        "time\ns",
        "median\nstep ms",
        "test\naccuracy",
    ):
        result.add_column(heading, justify="right")
    for run in runs:
        result.add_row(
            run.name.replace(", ", ",\n"),
            f"{run.trained_parameters:,}",
            f"{run.saved_activation_bytes / MIB:,.1f}",
            f"{run.peak_bytes / MIB:,.1f}",
            f"{run.seconds:.1f}",
            f"{1000 * statistics.median(run.step_seconds):.0f}",
            f"{run.test_accuracy:.3f}",
        )
    return result


def one_step_table(one_step: Sequence[OneStep], snippets: int) -> Table:
    result = Table(
        title=f"Not trained: one step of {snippets} snippets, MiB",
        caption="bf16: the model in bf16, adapters in fp32, A of lorafa_kernels in bf16. autocast: "
        "all in fp32.",
    )
    precisions = list(dict.fromkeys(row.precision for row in one_step))
    result.add_column("kept / peak")
    for precision in precisions:
        result.add_column(precision, justify="right")
    for name in dict.fromkeys(row.name for row in one_step):
        cells = {
            row.precision: f"{row.saved_activation_bytes / MIB:.1f} / {row.peak_bytes / MIB:.1f}"
            for row in one_step
            if row.name == name
        }
        result.add_row(name, *(cells[precision] for precision in precisions))
    return result


def plot(
    runs: Sequence[Run], one_step: Sequence[OneStep], path: Path, options: dict, device: str, mark: str = ""
) -> None:
    """Draw kept and peak bytes, bytes in lower precision, and the loss curves into a PNG file.

    options: of the demo, as results.json has them; device: in words; mark: what the file says of its source.
    """
    snippets = options["one_step_snippets"]
    figure, (bars, lower, curves) = plt.subplots(
        1, 3, figsize=(14, 4.6), width_ratios=(5, 5, 5), layout="constrained"
    )
    figure.suptitle(
        "Fine-tuning MiniLM with lora_dropout 0.05 on all linear layers", fontsize=14, fontweight="bold"
    )
    _pairs(bars, [(run.name, run.saved_activation_bytes, run.peak_bytes) for run in runs])
    bars.set_title("Memory of a training step, fp32", fontsize=11)
    bars.set_xlabel("MiB above the model (solid: kept for backward, pale: peak)")

    shown = [row for row in one_step if row.precision != "fp32"]
    precisions = list(dict.fromkeys(row.precision for row in shown))
    names = [run.name for run in runs]
    height = 0.8 / len(names)
    for row in shown:
        y = precisions.index(row.precision) + (names.index(row.name) - (len(names) - 1) / 2) * height
        size = row.saved_activation_bytes / MIB
        lower.barh(y, size, height=0.92 * height, color=COLOURS[row.name], hatch="///", edgecolor="white")
        lower.annotate(
            _mib(row.saved_activation_bytes),
            (size, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    lower.set_yticks(range(len(precisions)), [precision.replace(" to ", "\nto ") for precision in precisions])
    lower.invert_yaxis()
    lower.set_xlim(0, 1.25 * max(row.saved_activation_bytes for row in shown) / MIB)
    lower.set_title("Kept for backward, not trained", fontsize=11)
    lower.set_xlabel(f"MiB, one step of {snippets} snippets")

    for run in runs:
        steps = range(1, len(run.losses) + 1)
        curves.plot(steps, run.losses, color=COLOURS[run.name], alpha=0.2, linewidth=1)
        label = f"{run.name}: accuracy {run.test_accuracy:.3f}"
        curves.plot(steps, smoothed(run.losses), color=COLOURS[run.name], linewidth=2.2, label=label)
    curves.set_title(f"Training loss (thick: mean of {SMOOTHING_STEPS} steps)", fontsize=11)
    curves.set_xlabel("step")
    curves.set_ylabel("cross-entropy (nats)")
    curves.set_xlim(1, max(2, max(len(run.losses) for run in runs)))
    low, high = curves.get_ylim()
    curves.set_ylim(low, high + 0.3 * (high - low))
    curves.legend(frameon=False, loc="upper right", fontsize=9)

    for axes in (bars, lower, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="both" if axes is curves else "x")
        axes.set_axisbelow(True)
    figure.supxlabel(subtitle(options, device), fontsize=9, color="#4b5563")
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": mark})
    plt.close(figure)


def plot_result(result: dict, path: Path, mark: str) -> None:
    """Draw what results.json holds, as plot does."""
    runs, one_step = (
        [kind(**{name.name: row[name.name] for name in fields(kind)}) for row in result[part]]
        for kind, part in ((Run, "runs"), (OneStep, "one_step"))
    )
    machine = result["machine"]
    device = f"CPU with {machine['threads']} threads" if machine["device"] == "cpu" else machine["device"]
    plot(runs, one_step, path, result["options"], device, mark)


def _pairs(axes, rows: Sequence[tuple[str, int, int]]) -> None:
    """For each row a solid bar of what is kept over a pale one of the peak."""
    for index, (name, kept, peak) in enumerate(rows):
        axes.barh(index, peak / MIB, height=0.62, color=COLOURS[name], alpha=0.3)
        axes.barh(index, kept / MIB, height=0.62, color=COLOURS[name])
        axes.annotate(
            _mib(peak), (peak / MIB, index), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
        axes.annotate(
            _mib(kept),
            (kept / MIB, index),
            (-4, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            color="white",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [name.replace(", ", ",\n") for name, _, _ in rows])
    axes.set_xlim(0, 1.2 * max(peak for _, _, peak in rows) / MIB)
    axes.invert_yaxis()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Centred moving mean over SMOOTHING_STEPS steps, over fewer near the ends."""
    reach = SMOOTHING_STEPS // 2
    return [statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]


def remarks(
    runs: Sequence[Run], reloaded: Reloaded, labels: Sequence[int], device: torch.device
) -> list[str]:
    """Say what the table means and what it does not, a paragraph each."""
    by_name = {run.name: run for run in runs}
    lora, plain, library = (by_name[name] for name in (LORA, PLAIN, LIBRARY))

    def times(other: Run) -> str:
        return f"{other.saved_activation_bytes / library.saved_activation_bytes:.2f}"

    accuracy = library.test_accuracy
    count = len(labels)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    majority = max(sum(labels), count - sum(labels)) / count
    lines = [
        f"LoRA keeps {times(lora)} times the bytes of lorafa_kernels, LoRA-FA in plain PyTorch "
        f"{times(plain)} times: with dropout plain PyTorch keeps a mask for each layer, lorafa_kernels a "
        "seed. Without dropout plain PyTorch keeps as little as lorafa_kernels here. The rest is for "
        "attention, layer norms and GELU.",
        f"The standard error of an accuracy on {count:,} snippets is {error:.3f}, so one run of each does "
        f"not rank them; docs/quality.md has five seeds. Always giving the more frequent label scores "
        f"{majority:.3f}.",
    ]
    if device.type == "cpu":
        lines.append(
            "The times are seconds on this CPU, of PyTorch's own products, in turns, step by step. They say "
            "nothing about a GPU. A CPU takes longer to make a dropout mask from its seed, twice, than to "
            "keep it, and its peak has the mask's random numbers; the GPU kernels make them in registers."
        )
    outcome = (
        "equal bit for bit" if reloaded.same_logits else f"off by up to {reloaded.largest_difference:.3g}"
    )
    lines.append(
        f"Adapter saved and loaded into a fresh model: test accuracy {reloaded.accuracy:.3f}, was "
        f"{accuracy:.3f}; logits {outcome}."
    )
    return lines


def subtitle(options: dict, device: str) -> str:
    """The line below the plot. options: of the demo; device: in words."""
    return (
        f"{options['steps']} steps of {options['batch_size']} snippets, r = {options['rank']} on 36 linear "
        f"layers, {device}. Hatched: measured on one step, not trained."
    )


def device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def write_json(
    path: Path,
    *,
    options: dict,
    data: dict,
    machine: dict,
    runs: Sequence[Run],
    one_step: Sequence[OneStep],
    reloaded: Reloaded,
) -> None:
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "options": options,
        "data": data,
        "runs": [asdict(run) | {"seconds": run.seconds} for run in runs],
        "one_step": [asdict(row) for row in one_step],
        "reloaded_adapter": asdict(reloaded),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.2f} MiB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
