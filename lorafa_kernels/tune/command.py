"""The command `tune`: times plans on this GPU and writes the fastest into the user's table."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch

from ..command_line import FAILED, MOST_SIZE_TEXT, USAGE_ERROR, brief, count, one_line
from ..plan.choice import planned_device, triton_obstacle
from ..plan.recipe import Device, Problem, describe
from ..plan.tables import CACHE_VARIABLE, SHIPPED, STUB, cache_path
from .check import OUTPUTS
from .models import MODELS, distinct_shapes
from .search import EventTimer, Result, Timer, tune
from .share import MainLoop, keep, measure_main_loop, versions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (512, 2048, 8192)
RANKS = (16, 64)


def add_command(subparsers) -> None:
    """Add the command `tune` to argparse's `subparsers`."""
    parser = subparsers.add_parser(
        "tune",
        help="find the fastest kernels and block sizes for this GPU by timing them",
        description="Time the ways to compute a layer's forward and backward on this GPU (this library's "
        "kernels or PyTorch's matrix products, with different block sizes) and keep the fastest in the "
        "user's cache; before that, how fast the kernel of the large product is beside PyTorch's, by which "
        "plans of other sizes are chosen. Later runs with impl='auto' (the default) or impl='triton' use "
        "them. Every candidate is checked against fp64 before it is timed. Ctrl-C keeps what was found so "
        "far. Exit code: 0 on success, 1 if the measuring fails, 2 if there is no GPU to tune for or no file "
        "to write.",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        choices=MODELS,
        metavar="NAME",
        help=f"tune the linear layers of this model; may be repeated. Known: {', '.join(MODELS)} "
        "(default: none)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        type=_shape,
        metavar="MxKxNxR",
        help="tune these sizes: rows of x (batch x sequence), in_features, out_features, rank "
        "(default: none)",
    )
    for name, default, metavar, what in (
        ("--rows", ROWS, "M", "rows of x (batch x sequence)"),
        ("--rank", RANKS, "R", "adapter ranks"),
    ):
        parser.add_argument(
            name,
            nargs="+",
            type=count,
            default=default,
            metavar=metavar,
            help=f"{what} for --model (default: {' '.join(map(str, default))})",
        )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="dtype of x and the weight (default: bf16)"
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=math.inf,
        metavar="S",
        help="stop searching after S seconds (default: no limit)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table to FILE (default: in the user's cache)"
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda",
        metavar="DEVICE",
        help="GPU to tune, such as cuda:1 (default: cuda)",
    )
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Tune what the options name; return the exit code."""
    problems = problems_of(options)
    if not problems:
        parser.error("nothing to tune: give --model NAME or --shapes MxKxNxR")
    dtype = DTYPES[options.dtype]
    device = options.device
    if missing := _missing(device, dtype):
        return _fail(f"tune: {missing}")
    try:
        import rich  # noqa: F401
    except ImportError:
        return _fail("tune: the package rich is not installed: pip install 'lorafa-kernels[tune]'")
    target = planned_device(device)
    path = table_file(options.out, target)
    if target.name.startswith(STUB) and not beside_tables(options.out, target):
        return _fail(
            f"tune: {target.name} is a stub driver, which computes nothing: its times must not get into a "
            "cache or the shipped tables. Give --out FILE in another folder"
        )
    if path is None:
        return _fail(f"tune: no home folder to keep the table in: give --out FILE or set {CACHE_VARIABLE}")
    # Checked now: after the measuring it would be too late.
    if path.exists() and not path.is_file():
        return _fail(f"tune: {path} is not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.cuda.device(device):
            return search(problems, device, EventTimer(device), path, options.budget)
    except RuntimeError as error:
        # Out of memory, no plan that can run, or a broken CUDA context.
        print(f"tune: {one_line(str(error).strip().partition(chr(10))[0])}", file=sys.stderr)
        return FAILED


def table_file(out: Path | None, device: Device) -> Path | None:
    """Return the file to write: `out`, else the user's table for the device; None if there is neither."""
    return out or cache_path(device)


def beside_tables(out: Path | None, device: Device) -> bool:
    """Whether `out` is outside the folders of the shipped tables and of the user's tables."""
    folders = [SHIPPED, *([own.parent] if (own := cache_path(device)) else [])]
    return out is not None and out.resolve().parent not in [folder.resolve() for folder in folders]


def search(
    problems: list[Problem], device: torch.device, timer: Timer, path: Path, budget_s: float = math.inf
) -> int:
    """Measure the rate of expand, tune `problems` with a progress bar, print a table of the fastest plans,
    return the exit code.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    found: list[Result] = []
    main_loop: MainLoop | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(problems))

            def progress(text: str) -> None:
                problem = problems[min(len(found), len(problems) - 1)]
                bar.update(task, description=f"{_title(problem)}: {text}")

            # First: predictions of plans that no search has reached yet follow it.
            main_loop = measure_main_loop(device, timer, progress)
            keep(main_loop, path, planned_device(device))
            console.print(str(main_loop), markup=False, highlight=False, soft_wrap=True)
            results = tune(
                problems,
                device,
                timer,
                path,
                about=versions(),
                budget_s=budget_s,
                progress=progress,
                main_loop=main_loop.shares,
            )
            for result in results:
                found.append(result)
                bar.advance(task)
    except KeyboardInterrupt:
        console.print(
            f"interrupted after {len(found)} of {len(problems)} operations; what was found so far is kept"
        )
        raise
    finally:
        if found:
            _print_table(console, found)
            console.print(f"fastest plans written to {path}", soft_wrap=True)
        elif main_loop and main_loop.shares:
            console.print(f"expand's rate written to {path}", soft_wrap=True)
    return 0


def problems_of(options: argparse.Namespace) -> list[Problem]:
    """Return what to tune: forward and backward of all sizes that the options name, without repeats."""
    sizes = [
        (M, one.K, one.N, R, one.bias)
        for model in options.model
        for one, R, M in itertools.product(distinct_shapes(model), options.rank, options.rows)
    ]
    sizes += [(M, K, N, R, False) for M, K, N, R in options.shapes]
    dtype = DTYPES[options.dtype]
    found = [
        Problem(op, dtype, M, N, K, R, bias and op == "forward")
        for M, K, N, R, bias in sizes
        for op in OUTPUTS
    ]
    return list(dict.fromkeys(found))


def _print_table(console, found: list[Result]) -> None:
    from rich.table import Table

    table = Table(
        "operation MxKxN",
        "fastest plan",
        title="median times in microseconds",
        caption="fused: this library's kernels; library: PyTorch's matrix products; frozen: nn.Linear "
        "without an adapter; over frozen: the fastest plan's time against it; predicted: before measuring",
    )
    for name in ("fused", "library", "frozen", "over frozen", "predicted"):
        table.add_column(name, justify="right")
    for result in found:
        winner = result.winner
        times = [
            f"{result.best[name].us:.1f}" if name in result.best else "-" for name in ("fused", "library")
        ]
        over = 100 * (winner.us / result.frozen_us - 1)
        predicted = "-" if result.predicted_us is None else f"{result.predicted_us:.1f}"
        table.add_row(
            _title(result.problem),
            describe(winner.recipe, result.problem.op),
            *times,
            f"{result.frozen_us:.1f}",
            f"{over:+.1f} %",
            predicted,
        )
    console.print(table)
    refused, cut = sum(len(one.refused) for one in found), sum(not one.finished for one in found)
    console.print(
        f"{sum(one.tried for one in found)} candidates timed, {refused} refused (wrong result, or cannot run)"
    )
    if cut:
        console.print(f"--budget ended the search early for {cut} of {len(found)} operations")
    for result in found:
        for name, why in result.fewer.items():
            console.print(f"checked for {_title(result.problem)}: {name} on {why}", markup=False)
        for name, why in result.refused:
            console.print(f"refused for {_title(result.problem)}: {name}: {why}", markup=False)


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why tuning cannot run on this machine, or None if it can."""
    if device.type != "cuda":
        return f"tuning needs a GPU, and --device is {device}"
    if not torch.cuda.is_available():
        return "tuning needs a GPU, and torch sees no GPU here"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"device {device} is not there: torch sees {torch.cuda.device_count()} GPUs"
    return triton_obstacle(device, dtype)


def _title(problem: Problem) -> str:
    p = problem
    return f"{p.op} {p.M}x{p.K}x{p.N} R={p.R}"


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return USAGE_ERROR


def _shape(text: str) -> tuple[int, ...]:
    try:
        M, K, N, R = map(count, text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{brief(text)} is not MxKxNxR, such as 8192x4096x14336x16, each from 1 to {MOST_SIZE_TEXT}"
        ) from None
    return M, K, N, R


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except (RuntimeError, ValueError, IndexError) as error:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a device such as cuda or cuda:1") from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number of seconds above 0")
    return seconds
