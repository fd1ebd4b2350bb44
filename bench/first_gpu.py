"""The first measurement on a GPU: Llama-8B's projections, forward and backward, beside a frozen nn.Linear.

    python -m bench.first_gpu --out DIR

Every contender's y, dx and dB must be within the error budget against fp64 before it is timed (layer.py).
Times are the device's (events), with a cold L2, contenders taking turns; ratios are of times of one round.
Needs torch, Triton, numpy and rich, no installation of this package, and less than three minutes on an H200.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from lorafa_kernels.accuracy import Operands

from .environment import ROOT, environment, write_json
from .layer import (
    FROZEN,
    Case,
    Contender,
    Layer,
    Row,
    Step,
    advance,
    build_eager,
    build_frozen,
    build_lorafa,
    cpu_seconds,
    gradients,
    make_console,
    make_operands,
    make_progress,
    measure,
    show,
)

M = 8192
# K, N: query and output projection, gate and up, down.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
RANKS = (16, 64)
ROUNDS = 30
EAGER = "eager LoRA-FA"
BASELINES = (EAGER, FROZEN)
# Written before each sample. It empties the L2, and takes so long (0.2 ms and more) that the host has queued
# the step's kernels by the time they start: no launch gaps are timed.
FLUSH_BYTES = 2**30


class EventTimer:
    """Seconds that the device takes for a step, starting with a cold L2."""

    def __init__(self, device: str):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, step: Step) -> float:
        self.flush.zero_()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


def contenders() -> list[Contender]:
    """bf16 base, fp32 lora_B (the layer's default)."""
    wide = torch.float32
    return [
        Contender('impl="triton"', partial(build_lorafa, impl="triton", adapter_dtype=wide)),
        Contender('impl="torch"', partial(build_lorafa, impl="torch", adapter_dtype=wide)),
        Contender(EAGER, partial(build_eager, adapter_dtype=wide)),
        Contender(FROZEN, build_frozen, adapted=False),
    ]


def forward_and_backward(layer: Layer, operands: Operands) -> dict[str, Step]:
    """The parts that are timed: forward with what training keeps, and backward on a graph that stays."""
    y = layer.module(operands.x)
    return {
        "forward": lambda: layer.module(operands.x),
        "backward": lambda: gradients(layer, y, operands, keep_graph=True),
    }


def run(device: str = "cuda", shapes=SHAPES, M: int = M, ranks=RANKS, rounds: int = ROUNDS) -> list[Row]:
    """Measure all cases. On another device than a GPU the same steps run, timed by the host's clock."""
    timer = EventTimer(device) if device == "cuda" else partial(cpu_seconds, calls=1)
    rows: list[Row] = []
    with make_progress(make_console()) as progress:
        task = progress.add_task("", total=2 * len(shapes) * len(ranks) * rounds)
        for K, N in shapes:
            for R in ranks:
                case = Case(M, K, N, R, "bf16")
                progress.update(task, description=str(case), refresh=True)
                rows += measure(
                    {"label": str(case), "M": M, "K": K, "N": N, "R": R, "dtype": "bf16", "lora_B": "fp32"},
                    make_operands(case, device, bias=False),
                    contenders(),
                    forward_and_backward,
                    lambda steps: timer,
                    rounds=rounds,
                    baselines=BASELINES,
                    advance=partial(advance, progress, task),
                )
    return rows


def report(about: dict, rows: list[Row], out: Path) -> int:
    """Write the result file, print the table, and return 1 if a check failed."""
    gpu = about["machine"]["gpu"]
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"
    result = {
        "what": "device times, cold L2; ratio = time / that of the named baseline",
        "command": "python -m bench.first_gpu",
        "rounds": ROUNDS,
        "environment": about,
        "rows": [asdict(row) for row in rows],
    }
    write_json(out / f"first-{name}.json", result)
    show(rows, f"{gpu['name'] if gpu else 'no GPU'}: one layer, bf16, lora_B fp32", BASELINES, make_console())
    return 1 if any(row.status == "failed" for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_gpu", description="First measurement on a GPU."
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder (bench/results/gpu)"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "bench.first_gpu needs a GPU, and PyTorch finds none here (torch.cuda.is_available() is False). "
            "For the CPU there is python -m bench.layer.",
            file=sys.stderr,
        )
        return 2
    try:
        return report(environment(), run(), options.out)
    except KeyboardInterrupt:
        print("interrupted; no result was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
