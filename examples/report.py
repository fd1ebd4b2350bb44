"""What the demo shows of its runs: a table and remarks for the terminal, a picture, a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from rich.table import Table

import lorafa_kernels

if TYPE_CHECKING:
    from examples.finetune_minilm import Options

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MIB = 2**20
SMOOTHING_STEPS = 9
COLOURS = {"head only": "#6b7280", "LoRA": "#d97706", "LoRA-FA": "#1d4ed8"}
NOT_TRAINED_COLOUR = "#93b4f5"
PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Run:
    """One way of fine-tuning; without losses and accuracy if it was measured on one step and not trained."""

    name: str
    trained_parameters: int
    saved_activation_bytes: int
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    test_accuracy: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


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
        caption="saved: what autograd keeps from forward to backward, every storage once, without parameters",
    )
    result.add_column("trained")
    # Narrow enough for a terminal of 80 columns.
    for heading in ("parameters", "saved MiB\nper step", "time\ns", "median\nstep ms", "test\naccuracy"):
        result.add_column(heading, justify="right")
    for run in runs:
        result.add_row(
            run.name,
            f"{run.trained_parameters:,}",
            f"{run.saved_activation_bytes / MIB:,.2f}",
            f"{run.seconds:.1f}" if run.losses else "-",
            f"{1000 * statistics.median(run.step_seconds):.0f}" if run.losses else "-",
            f"{run.test_accuracy:.3f}" if run.test_accuracy is not None else "-",
        )
    return result


def plot(runs: Sequence[Run], path: Path, subtitle: str) -> None:
    """Draw the loss curves and the saved bytes of all runs into a PNG file."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained")
    figure.suptitle("Fine-tuning MiniLM on movie-review sentiment", fontsize=14, fontweight="bold")

    trained = [run for run in runs if run.losses]
    for run in trained:
        steps = range(1, len(run.losses) + 1)
        curves.plot(steps, run.losses, color=COLOURS[run.name], alpha=0.25, linewidth=1)
        label = f"{run.name}: test accuracy {run.test_accuracy:.3f}"
        curves.plot(steps, smoothed(run.losses), color=COLOURS[run.name], linewidth=2.2, label=label)
    curves.set_title(f"Training loss (thick: mean of {SMOOTHING_STEPS} steps)", fontsize=11)
    curves.set_xlabel("step")
    curves.set_ylabel("cross-entropy (nats)")
    curves.set_xlim(1, max(2, max(len(run.losses) for run in trained)))
    curves.legend(frameon=False, loc="upper right")

    sizes = [run.saved_activation_bytes / MIB for run in runs]
    colours = [COLOURS.get(run.name, NOT_TRAINED_COLOUR) for run in runs]
    drawn = bars.barh([run.name.replace(", ", ",\n") for run in runs], sizes, color=colours, height=0.6)
    for bar, run in zip(drawn, runs, strict=True):
        if not run.losses:
            bar.set_hatch("///")
            bar.set_edgecolor("white")
    bars.bar_label(drawn, [_mib(size) for size in sizes], padding=5)
    bars.set_xlim(0, 1.25 * max(sizes))
    bars.invert_yaxis()
    bars.set_title("Activations kept for backward, one step", fontsize=11)
    bars.set_xlabel("MiB (every storage once, parameters not counted)")

    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="both" if axes is curves else "x")
        axes.set_axisbelow(True)
    figure.supxlabel(subtitle, fontsize=9, color="#4b5563")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Centred moving mean over SMOOTHING_STEPS steps, over fewer near the ends."""
    reach = SMOOTHING_STEPS // 2
    return [statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]


def remarks(
    runs: Sequence[Run], reloaded: Reloaded, labels: Sequence[int], device: torch.device
) -> list[str]:
    """Say what the table means and what it does not, a paragraph each."""
    accuracy = {run.name: run.test_accuracy for run in runs}
    kept = {run.name: run.saved_activation_bytes for run in runs}
    count = len(labels)
    error = math.sqrt(accuracy["LoRA-FA"] * (1 - accuracy["LoRA-FA"]) / count)
    majority = max(sum(labels), count - sum(labels)) / count
    lines = [
        f"LoRA keeps {kept['LoRA'] / kept['LoRA-FA']:.2f} times the bytes of LoRA-FA. A layer adapted by "
        "LoRA-FA keeps r numbers per token; the rest is there for attention, layer norms and GELU.",
        "Without dropout, plain PyTorch drops x too once A is frozen: the last row is LoRA-FA's formula in "
        "plain PyTorch, measured on one step and not trained.",
        f"The standard error of an accuracy on {count:,} snippets is {error:.3f}, so one run of each does "
        f"not rank LoRA and LoRA-FA. Always giving the more frequent label scores {majority:.3f}.",
    ]
    if device.type == "cpu":
        lines.append(
            "The times are CPU times, of PyTorch's own matrix products. They say nothing about a GPU, and "
            "little about a CPU that was doing other work too."
        )
    outcome = (
        "equal bit for bit" if reloaded.same_logits else f"off by up to {reloaded.largest_difference:.3g}"
    )
    lines.append(
        f"Adapter saved and loaded into a fresh model: test accuracy {reloaded.accuracy:.3f}, was "
        f"{accuracy['LoRA-FA']:.3f}; logits {outcome}."
    )
    return lines


def subtitle(options: Options, device: torch.device) -> str:
    return (
        f"{options.steps} steps of {options.batch_size} snippets, r = {options.rank} on 36 linear layers, "
        f"fp32, no dropout, {device_words(device)}. Hatched: measured on one step, not trained."
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
    reloaded: Reloaded,
) -> None:
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "options": options,
        "data": data,
        "runs": [asdict(run) | {"seconds": run.seconds} for run in runs],
        "reloaded_adapter": asdict(reloaded),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _mib(size: float) -> str:
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.2f} MiB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
