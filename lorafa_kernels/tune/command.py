"""The command `tune`: measures plans for this GPU and keeps the fastest for this user."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch

from .. import __version__
from ..command_line import FAILED, MOST_SIZE, USAGE_ERROR, brief, count, one_line
from ..plan.choice import planned_device, triton_obstacle
from ..plan.recipe import Device, Problem, describe
from ..plan.tables import CACHE_VARIABLE, SHIPPED, STUB, cache_path
from .models import MODELS, distinct_shapes
from .search import OUTPUTS, EventTimer, Result, Timer, tune

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (512, 2048, 8192)
RANKS = (16, 64)


def add_command(subparsers) -> None:
    """Add the command `tune` to argparse's `subparsers`."""
    parser = subparsers.add_parser(
        "tune",
        help="measure plans and block sizes on this GPU and keep the fastest",
        description="Measure plans and block sizes on this GPU and keep the fastest in the user's cache, "
        "where impl='auto' and impl='triton' find them. Every candidate is checked against fp64 before it is "
        "timed. Ctrl-C keeps what was found. Exit code: 0; 1 where the measuring fails; 2 where there is no "
        "GPU to tune for or no file to write.",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        choices=MODELS,
        metavar="NAME",
        help=f"tune the linear layers of this model, may be repeated: {', '.join(MODELS)} (default: none)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        type=_shape,
        metavar="MxKxNxR",
        help="tune these: rows of x, in_features, out_features, rank (default: none)",
    )
    for name, default, metavar, what in (
        ("--rows", ROWS, "M", "rows of x"),
        ("--rank", RANKS, "R", "ranks"),
    ):
        parser.add_argument(
            name,
            nargs="+",
            type=count,
            default=default,
            metavar=metavar,
            help=f"{what} for --model (default: {' '.join(map(str, default))})",
        )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the weight (default: bf16)")
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=math.inf,
        metavar="S",
        help="stop searching after S seconds (default: when everything is searched)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table here (default: in the user's cache)"
    )
    parser.add_argument(
        "--device", type=_device, default="cuda", metavar="DEVICE", help="the GPU (default: cuda)"
    )
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Tune as asked for; return the exit code."""
    problems = problems_of(options)
    if not problems:
        parser.error("what should be tuned? Give --model NAME or --shapes MxKxNxR")
    dtype = DTYPES[options.dtype]
    device = options.device
    if missing := _missing(device, dtype):
        return _fail(f"tune: {missing}")
    try:
        import rich  # noqa: F401
    except ImportError:
        return _fail("tune: the progress bar and the table need rich: pip install 'lorafa-kernels[tune]'")
    target = planned_device(device)
    path = table_file(options.out, target)
    if target.name.startswith(STUB) and not beside_tables(options.out, target):
        return _fail(
            f"tune: {target.name} is a stub driver, where nothing computes: its table is for no cache and "
            "nothing that is shipped (give --out FILE)"
        )
    if path is None:
        return _fail(f"tune: no home folder to keep the table in: give --out FILE or set {CACHE_VARIABLE}")
    # Before the measuring, not after it.
    if path.exists() and not path.is_file():
        return _fail(f"tune: {path} is not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.cuda.device(device):
            return search(problems, device, EventTimer(device), path, options.budget)
    except RuntimeError as error:
        # No memory for a size, no plan that runs, or a device that gave up.
        print(f"tune: {one_line(str(error).strip().partition(chr(10))[0])}", file=sys.stderr)
        return FAILED


def table_file(out: Path | None, device: Device) -> Path | None:
    """Return the file that is written: `out` or the user's table for the device; None if neither is there."""
    return out or cache_path(device)


def beside_tables(out: Path | None, device: Device) -> bool:
    """Whether a file lies neither where tables are shipped nor where the user's are."""
    folders = [SHIPPED, *([own.parent] if (own := cache_path(device)) else [])]
    return out is not None and out.resolve().parent not in [folder.resolve() for folder in folders]


def search(
    problems: list[Problem], device: torch.device, timer: Timer, path: Path, budget_s: float = math.inf
) -> int:
    """Tune `problems` with a progress bar, print the table of what was found, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    about = {"torch": torch.__version__, "lorafa_kernels": __version__, "commit": None}
    found: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(problems))

            def progress(text: str) -> None:
                problem = problems[min(len(found), len(problems) - 1)]
                bar.update(task, description=f"{_title(problem)}: {text}")

            results = tune(problems, device, timer, path, about=about, budget_s=budget_s, progress=progress)
            for result in results:
                found.append(result)
                bar.advance(task)
    except KeyboardInterrupt:
        console.print(f"interrupted after {len(found)} of {len(problems)}; what was found is kept")
        raise
    finally:
        if found:
            _print_table(console, found)
            console.print(f"written to {path}", soft_wrap=True)
    return 0


def problems_of(options: argparse.Namespace) -> list[Problem]:
    """Return the problems that the arguments ask for, forward and backward, each once, in order."""
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

    table = Table("MxKxN", "fastest plan", title="microseconds, medians")
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
        f"{sum(one.tried for one in found)} candidates timed, {refused} refused; the budget ended the search "
        f"for {cut} of {len(found)}"
    )
    for result in found:
        for name, why in result.refused:
            console.print(f"refused for {_title(result.problem)}: {name}: {why}", markup=False)


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps this machine from tuning, or None."""
    if device.type != "cuda":
        return f"times on {device} say nothing: tuning needs a GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU here, and times in Triton's interpreter say nothing"
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
            f"{brief(text)} is not MxKxNxR, such as 8192x4096x14336x16, each from 1 to {MOST_SIZE}"
        ) from None
    return M, K, N, R


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except (RuntimeError, ValueError, IndexError) as error:
        raise argparse.ArgumentTypeError(f"{brief(text)} is no device such as cuda or cuda:1") from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number of seconds above 0")
    return seconds
