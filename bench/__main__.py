"""python -m bench: what LoRA-FA layers cost here, beside everything one would use instead.

    quick     a look in a minute on a CPU, then the report         (make bench)
    run       cases and kinds of your choice
    suite     what a first hour on a GPU needs, most telling first
    report    docs/performance.md and its plots from bench/results; --compare REV-or-FILE
    gpu       a first call on a machine with a GPU, in stages (also python3 -m bench.gpu)
    quality   the accuracy study: five ways of fine-tuning, several seeds (docs/quality.md)
    list      the known models, grids and contenders

Everybody's results are checked against fp64 before they are timed; contenders take turns; ratios are formed
within one run. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from pathlib import Path

import torch

from lorafa_kernels.tune.models import MODELS

from . import STARTED
from .gpu import __main__ as gpu
from .measure import blocks, memory, models, training
from .measure.cases import (
    DTYPES,
    GRIDS,
    RANKS,
    ROWS,
    cases,
    find_layers,
    grid,
    layers_of,
    unknown,
    with_dropout,
)
from .measure.contenders import BY_NAME, CONTENDERS, TITLES, layer_contenders
from .quality import command as quality
from .report import compare
from .report import page as report
from .report.console import show
from .run.environment import ROOT, device_slug, environment
from .run.jobs import KINDS, QUICK_KINDS, ROUNDS, SITTINGS, Setting, jobs_of, suite
from .run.runner import Job, Outcome, make_console, run
from .run.shell import INTERRUPTED, Parser, run_command
from .run.store import RESULTS, load

QUICK_BUDGET = 140.0
# What the report after a quick look takes of its budget (measured: 4 s on an idle CPU, with matplotlib's
# import).
REPORT_SECONDS = 8.0
PAGE, PLOTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "plots"


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(argv)
        return options.command(options)

    return run_command("python -m bench", command)


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(command=command, name=name)
        return found

    def option(to: argparse.ArgumentParser, flag: str, text: str, **how) -> None:
        to.add_argument(flag, help=text, **how)

    def by_device(values: dict[str, int]) -> str:
        return f"default: {values['cpu']} on a CPU, {values['cuda']} on a GPU"

    def add_measuring(name: str, command, text: str, budget: float | None = None) -> argparse.ArgumentParser:
        found = add(name, command, text)
        limit = f"stop before it takes longer (default: {'none' if budget is None else f'{budget:g}'})"
        option(found, "--budget", limit, type=float, default=budget, metavar="SECONDS")
        place = "result file, or a folder for it (default: bench/results/DEVICE/GRID.jsonl)"
        option(found, "--out", place, type=Path)
        option(found, "--fresh", "discard what the result file has", action="store_true")
        option(found, "--rounds", f"interleaved rounds a case ({by_device(ROUNDS)})", type=int)
        option(found, "--sittings", f"that its rounds are spread over ({by_device(SITTINGS)})", type=int)
        names = "only these, which list names (default: all but those on NF4)"
        option(found, "--contenders", names, nargs="+", metavar="NAME")
        where = "where to measure (default: the GPU if there is one)"
        option(found, "--device", where, choices=("cpu", "cuda"))
        option(found, "--threads", "of PyTorch on the CPU (default: as it chooses)", type=int)
        return found

    # With what `make bench` installs first, less than four minutes.
    quick = add_measuring(
        "quick", measure_quick, "A look in a minute on a CPU, then the report.", QUICK_BUDGET
    )
    option(quick, "--no-report", "measure only", action="store_true")
    chosen = add_measuring("run", measure_chosen, "Measure cases and kinds of your choice.")
    option(chosen, "--grid", f"one of {', '.join(GRIDS)} (default: quick)", metavar="NAME")
    instead = "instead of a grid, with the next five (default: none)"
    option(chosen, "--layers", instead, nargs="+", metavar="MODEL[/LAYER]")
    some = {"type": int, "nargs": "+"}
    option(chosen, "--rows", f"such as {ROWS} (default: 2048)", default=[2048], metavar="M", **some)
    option(chosen, "--ranks", f"such as {RANKS} (default: 16)", default=[16], metavar="R", **some)
    option(chosen, "--dtype", "of x and the base (default: bf16)", choices=DTYPES, default="bf16")
    option(chosen, "--adapter", "of lora_B (default: fp32)", choices=DTYPES)
    option(chosen, "--dropout", "probability (default: 0)", type=float, default=0.0)
    kinds, usual = f"of {', '.join(KINDS)} (default: ceilings time)", ["ceilings", "time"]
    option(chosen, "--kinds", kinds, nargs="+", default=usual, metavar="KIND")
    first = add_measuring("suite", measure_suite, "What a first hour on a GPU needs, most telling first.")
    option(first, "--no-tests", "without the tests that need a GPU", action="store_true")
    made = add("report", make_report, "Make docs/performance.md and its plots from bench/results.")
    option(made, "--compare", "show what changed since, instead (default: none)", metavar="REV-or-FILE")
    option(made, "--results", "folder of result files (default: bench/results)", type=Path, default=RESULTS)
    gpu.add_arguments(add("gpu", gpu.run, "A first call on a GPU, in stages that each print their verdict."))
    quality.add_arguments(add("quality", quality.run, "The accuracy study: make the runs that are missing."))
    add("list", list_names, "Print the known models, grids, kinds, contenders and cases.")
    return parser.parse_args(argv)


def measure_quick(options: argparse.Namespace) -> int:
    setting = make_setting(options)
    jobs = jobs_of(grid("quick"), QUICK_KINDS, setting, compiled=False)
    if options.no_report:
        return measure(options, jobs, setting, "quick")
    if options.budget:
        options.budget = max(options.budget - REPORT_SECONDS, options.budget / 2)
    code = measure(options, jobs, setting, "quick")
    return code or make_report(argparse.Namespace(compare=None, results=RESULTS))


def measure_chosen(options: argparse.Namespace) -> int:
    for kind in options.kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
    if options.layers and options.grid:
        raise ValueError("--grid and --layers exclude each other")
    setting = make_setting(options)
    name = "chosen" if options.layers else options.grid or "quick"
    if options.layers:
        dtypes = ((options.dtype, options.adapter or "fp32"),)
        chosen = find_layers(options.layers)
        wanted = cases(chosen, options.rows, options.ranks, dtypes, (options.dropout,))
    else:
        wanted = with_dropout(grid(name), options.dropout) if options.dropout else grid(name)
    for case in wanted:
        if case.M < 1 or case.R < 1 or not 0 <= case.dropout < 1:
            raise ValueError(f"{case.label}: rows and rank must be at least 1, dropout in [0, 1)")
    if not wanted:
        raise ValueError("there is nothing to measure")
    return measure(options, jobs_of(wanted, options.kinds, setting), setting, name)


def measure_suite(options: argparse.Namespace) -> int:
    setting = make_setting(options)
    jobs = suite(setting, tests=not options.no_tests)
    if options.fresh:
        return measure(options, jobs, setting, "suite")
    # A file of its own for every call: results of several calls can lie in one folder.
    name = f"suite-{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}"
    return measure(options, jobs, setting, name, elsewhere=(RESULTS,))


def make_setting(options: argparse.Namespace) -> Setting:
    """Read the device, the contenders and the rounds off the command line."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no GPU here (torch.cuda.is_available() is False): use --device cpu")
    for name in ("threads", "rounds", "sittings", "budget"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive and finite")
    if options.threads:
        torch.set_num_threads(options.threads)
    keys = tuple(layer_contenders(options.contenders))
    rounds = options.rounds or ROUNDS[device]
    return Setting(device, keys, rounds, min(options.sittings or SITTINGS[device], rounds))


def measure(
    options: argparse.Namespace,
    jobs: list[Job],
    setting: Setting,
    name: str,
    elsewhere: tuple[Path, ...] = (),
) -> int:
    """Run the jobs, show what came out, and return 1 if anybody's results were wrong."""
    about = environment()
    if setting.device == "cpu" and not about.get("stub"):
        about["machine"]["gpu"] = None
    path = result_file(options.out, about, name)
    if about.get("stub") and path.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(
            f"{about['machine']['gpu']['name']} is the stub driver, which computes nothing: no result of it "
            "may lie in bench/results (give --out another folder)"
        )
    if options.fresh:
        path.unlink(missing_ok=True)
    console = make_console()
    if about["commit"] is None:
        console.print("no commit is known: set BENCH_COMMIT to publish these results", style="yellow")
    how = {"grid": name, "command": f"python -m bench {options.name}", "about": about, "console": console}
    how |= {"budget": options.budget, "started": STARTED}
    if elsewhere:
        how["elsewhere"] = (*elsewhere, path.parent)
    try:
        outcome = run(jobs, path, **how)
        if outcome.records:
            show(outcome.records, console)
        return conclude(outcome, path, console)
    except KeyboardInterrupt:
        # While the tables are made, or before the first measurement.
        if path.exists():
            print(f"interrupted; what was measured is in {path}", file=sys.stderr)
        return INTERRUPTED


def result_file(out: Path | None, about: dict, name: str) -> Path:
    """Return the file that results go to: `out` if it is one, a file in it if it is a folder."""
    folder = RESULTS / device_slug(about) if out is None else out
    return folder if folder.suffix == ".jsonl" else folder / f"{name}.jsonl"


def conclude(outcome: Outcome, path: Path, console) -> int:
    """Say where the results are and what is missing."""
    if not outcome.records and outcome.stopped == "complete":
        console.print(f"{path}: everything is measured already (--fresh measures again)", highlight=False)
        return 0
    console.print(f"{len(outcome.records)} measurements in {path}", highlight=False, soft_wrap=True)
    why = {
        "budget": "the budget was too small for",
        "interrupted": "interrupted before",
        "device lost": "the GPU no longer answers, before",
    }
    if outcome.left:
        text = f"{why[outcome.stopped]} {len(outcome.left)} more; the same command goes on with them"
        console.print(text, highlight=False)
    if outcome.stopped == "interrupted":
        return INTERRUPTED
    if outcome.stopped == "device lost":
        return 1
    failed = [row for record in outcome.records for row in record["rows"] if row.get("status") == "failed"]
    if failed:
        names = ", ".join(sorted({row["contender"] for row in failed}))
        console.print(f"outside the error budget or broken: {names}", style="red")
    return 1 if failed else 0


def make_report(options: argparse.Namespace) -> int:
    if not options.results.is_dir():
        raise ValueError(f"--results {options.results}: there is no such folder")
    records, warnings = load(options.results)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.compare is not None:
        old = compare.load_old(options.compare, options.results)
        compare.show(compare.compare(records, old), make_console())
        return 0
    report.write(options.results, PAGE, PLOTS)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def list_names(options: argparse.Namespace) -> int:
    print("models and their linear layers (K -> N), one of each shape, for --layers:")
    for model in MODELS:
        shapes = ", ".join(f"{'+'.join(layer.names)} {layer.K}->{layer.N}" for layer in layers_of(model))
        print(f"  {model}: {shapes}")
    print("grids, for --grid:")
    for name, make in GRIDS.items():
        print(f"  {name}: {len(make())} cases. {make.__doc__.splitlines()[0]}")
    print(f"kinds, for --kinds: {', '.join(KINDS)}")
    print("contenders of layers, for --contenders:")
    for key in (*CONTENDERS, *BY_NAME):
        print(f"  {key}: {TITLES[key]}{' (where it is named)' if key in BY_NAME else ''}")
    print("contenders of blocks (kinds block-time, block and family) and training:")
    for key, title in models.TITLES.items():
        print(f"  {key}: {title} ({', '.join(models.CONTENDERS[key].scopes)})")
    known = {
        "block-time": sum(blocks.CASES.values(), ()),
        "block": sum(memory.BLOCKS.values(), ()),
        "family": memory.FAMILIES.values(),
        "training": dict.fromkeys(sum(training.TRAININGS.values(), ())),
    }
    for kind, some in known.items():
        print(f"cases of kind {kind}:")
        print("\n".join(f"  {case.label}" for case in some))
    return 0


if __name__ == "__main__":
    sys.exit(main())
