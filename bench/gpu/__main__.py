"""python3 -m bench.gpu: a first call on a machine with a GPU, in stages that each print their verdict.

Runs from the checkout with the machine's own Python; nothing of the checkout need be installed. In all less
than nine minutes. It writes at most five files of at most 16 MiB into --out: gpu.jsonl (one line for each
thing that was found, as it is found), gpu.log, and Triton's cache in up to three parts. A later call takes
up what lies in --past, and in --out: what was completed with the same files on the same GPU is not done
again, and kernels are not compiled again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from .. import STARTED
from ..run.environment import ROOT, environment
from ..run.shell import Parser, output, run_command
from ..run.stub import stub_name
from . import cache, driver
from .driver import ON_REQUEST, STAGES, TOTAL, Call

# Ignored by git, so that it can be named where ignored files are carried to the machine.
PAST = ROOT / ".gpu"
RESULTS = ROOT / "bench" / "results"
LARGEST_FILE = 16 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual, all_names = ([stage.name for stage in some] for some in (STAGES, (*STAGES, *ON_REQUEST)))
    where = "folder for what is found (default: $OUT, else .gpu)"
    parser.add_argument("--out", type=Path, help=where)
    some = {"nargs": "+", "choices": all_names, "metavar": "STAGE"}
    listed = f"only these of {', '.join(all_names)} (default: {', '.join(usual)})"
    parser.add_argument("--stages", help=listed, **some)
    seconds = {"type": float, "default": TOTAL, "metavar": "SECONDS"}
    parser.add_argument("--budget", help="for all of them (default: %(default)g)", **seconds)
    folders = {"type": Path, "nargs": "*", "metavar": "FOLDER"}
    parser.add_argument("--past", help=f"of earlier calls (default: {PAST.name})", **folders)
    parser.add_argument("--again", action="store_true", help="do again what earlier calls completed")


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        raw = argparse.RawDescriptionHelpFormatter
        parser = Parser(prog="python -m bench.gpu", description=__doc__, formatter_class=raw)
        add_arguments(parser)
        return run(parser.parse_args(argv))

    return run_command("python -m bench.gpu", command)


def run(options: argparse.Namespace) -> int:
    """Make the call, and return its exit code."""
    if not 0 < options.budget < float("inf"):
        raise ValueError("--budget must be positive and finite")
    out = options.out or Path(os.environ.get("OUT") or PAST)
    if out.resolve().is_relative_to(RESULTS.resolve()):
        raise ValueError(f"--out {out}: bench/results is for files that are committed; give another folder")
    if stub_name() is None and not gpu_is_there():
        raise ValueError("there is no GPU here: neither nvidia-smi nor rocm-smi finds one")
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".triton-cache*"):
        left.unlink()
    about = environment(with_torch=False)
    past = tuple(dict.fromkeys((*([PAST] if options.past is None else options.past), out)))
    device = about["machine"]["gpu"]["name"]
    done, _ = driver.earlier(past, about["tree"], device)
    call = Call(
        file=out / "gpu.jsonl",
        log=out / "gpu.log",
        run=uuid.uuid4().hex[:12],
        budget=options.budget,
        started=STARTED,
        past=() if options.again else past,
        # What is asked for by name is done.
        done=frozenset() if options.again or options.stages else done,
        tree=about["tree"],
    )
    elsewhere = Path(tempfile.gettempdir()) / f"lorafa-gpu-triton-{os.getuid()}"
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or elsewhere)
    call.environment["TRITON_CACHE_DIR"] = str(folder)
    call.write("run", command="python -m bench.gpu", grid="gpu", identity="", environment=about)
    driver.say(call, f"{device}, driver {about['machine']['gpu'].get('driver')}; results in {out}")
    count, problems = cache.unpack(past, folder)
    for problem in problems:
        driver.say(call, f"Triton's cache: {problem}")
    if count:
        driver.say(call, f"Triton's cache: {count} entries of earlier calls")
    chosen = STAGES
    if options.stages:
        chosen = tuple(stage for stage in (*STAGES, *ON_REQUEST) if stage.name in options.stages)
    signal.signal(signal.SIGTERM, interrupted)
    code = driver.INTERRUPTED
    try:
        code = driver.run(chosen, call)
    finally:
        left = cache.pack(folder, out)
        if left:
            driver.say(call, f"Triton's cache: {left} entries found no room in its parts")
    too_large = [path.name for path in out.iterdir() if path.is_file() and path.stat().st_size > LARGEST_FILE]
    if too_large:
        driver.say(call, f"larger than 16 MiB: {', '.join(too_large)}")
    driver.say(call, f"everything is in {out}; to go on, put it into {PAST.name}/ and call again")
    return code


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def gpu_is_there() -> bool:
    return any("GPU" in (output(*command) or "") for command in (("nvidia-smi", "-L"), ("rocm-smi", "-i")))


if __name__ == "__main__":
    sys.exit(main())
