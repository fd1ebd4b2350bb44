"""python -m bench quality: make the runs of the accuracy study that are missing, or its report."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .records import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=FILE, help="result file (default: bench/results/quality.jsonl)")
    add("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    add("--limit", type=int, metavar="RUNS", help="stop after so many runs (default: none)")
    add("--report", action="store_true", help="write docs/quality.md and its plots instead, from the file")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    if options.threads < 1 or (options.limit is not None and options.limit < 1):
        raise ValueError("--threads and --limit must be at least 1")
    if options.report:
        from . import report

        for path in report.write(options.out):
            print(f"wrote {path}")
        return 0
    # Models and texts come in installed packages; transformers would ask the hub about them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from examples import DemoError

    from .settings import METHODS
    from .study import possible_methods, run_study

    torch.set_num_threads(options.threads)
    console = Console(highlight=False, soft_wrap=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[loss]}"), TimeElapsedColumn()]
    for method in set(METHODS) - set(possible_methods()):
        console.print(f"{METHODS[method].title}: left out, this version of the library does not have it")
    try:
        with Progress(*columns, console=console) as progress:
            made = run_study(options.out, console.print, progress, options.limit)
    except DemoError as error:
        raise ValueError(str(error)) from error
    console.print(f"{made} runs made; python -m bench quality --report writes docs/quality.md")
    return 0
