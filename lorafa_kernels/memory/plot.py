"""A plan as a picture: a bar for each method, of the parts that its total consists of."""

from __future__ import annotations

from pathlib import Path

from .plan import CHECKPOINTING, PLAIN, Plan
from .report import GIB, answer
from .trace import INPUTS, KINDS


def save_plot(plan: Plan, path: Path) -> None:
    """Write the picture to `path` (.png, or another ending that matplotlib knows).

    Raises ImportError without matplotlib, ValueError for an ending that it does not know, OSError where the
    file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'lorafa-kernels[memory]'") from error
    kinds = [kind for kind in KINDS if kind != INPUTS]
    bars = [
        (row.method.title + ("" if variant == PLAIN else ",\nwith checkpointing"), row.variants[variant])
        for row in plan.rows.values()
        for variant in (PLAIN, CHECKPOINTING)
        if variant in row.variants
    ]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind in kinds:
        sizes = [estimate.kinds.get(kind, 0) / GIB for _, estimate in bars]
        axes.barh(range(len(bars)), sizes, left=left, label=kind)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(bars)), [title for title, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak of a step")
    axes.set_title(f"{plan.subject.title}\n{answer(plan)}", fontsize="medium")
    if plan.memory is not None:
        axes.axvline(plan.memory / GIB, color="black", linestyle="--")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)
