"""What each stage does, in a process of its own: python -m bench.gpu.stages NAME, started by driver.py.

A stage writes lines as it goes, prints its verdict last, and ends with 0, 1 for what is wrong, or one of the
codes of driver.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..run.stub import stub_name
from .driver import DONE, NO_GPU, RESTART, UNFINISHED, VARIABLE, VERDICT, Call, Stage, command_of

REPEATS = 200
# Of one check, mostly compiling.
CHECK_SECONDS = 3.0
# Memory of a worker that runs tests: they leave 5 GiB and less, and each has a context of its own.
WORKER_GIB, MOST_WORKERS = 6, 12
# A test past 2^31 elements takes 8.6 GB, and as much again for its reference.
MEMORY_WORKER_GIB = 22
TEST_SECONDS = 100
# compute-sanitizer takes tens of times as long (estimate): every kernel by a few blocks.
SANITIZER_TOOLS, SANITISED_SIZES = ("memcheck", "racecheck"), (256, 256, 384)
# What it is told to end with where it has found something, and what its process says of where it is.
FOUND, CHECKING = 99, "check: "
SANITISED = Stage("sanitised", "", 0)


def verdict(text: str, code: int) -> int:
    print(f"{VERDICT}{text}", flush=True)
    return code


# environment


def environment(call: Call) -> int:
    """Import everything, and say what is here."""
    import torch

    import bench
    import lorafa_kernels

    if not torch.cuda.is_available():
        return verdict("PyTorch finds no GPU here (torch.cuda.is_available() is False)", NO_GPU)
    problems: dict[str, str] = {}
    walked = [pkgutil.walk_packages(of.__path__, f"{of.__name__}.") for of in (lorafa_kernels, bench)]
    names = [one.name for modules in walked for one in modules if not one.name.endswith("__main__")]
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    from ..run.environment import environment as describe

    about = describe()
    call.write("run", command="python -m bench.gpu", grid="gpu", identity="", environment=about)
    status = "failed" if problems else "ok"
    call.write("check", key="imports", status=status, modules=len(names), failed=problems)
    gpu, versions = about["machine"]["gpu"], about["versions"]
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    clocks = f"SM clock {gpu.get('sm_clock_mhz')} of {gpu.get('sm_clock_max_mhz')} MHz"
    state = f"driver {gpu.get('driver')}, {clocks}"
    if problems:
        first = next(iter(problems.items()))
        return verdict(f"{len(problems)} of {len(names)} modules fail, first {first[0]}: {first[1]}", 1)
    return verdict(f"{len(names)} modules import; {gpu['name']}, {state}; {text}", 0)


# kernels


def check_job(key: str, make: Callable, pdl: bool, stub: bool):
    """A check as a job of the runner, which knows what is done and what took its process along. What was
    wrong is tried again in a later call.
    """
    from ..measure.layers import recorded, verdict_of
    from ..run.runner import Job

    def run(tick) -> dict:
        row = {"contender": "triton", **verdict_of(None), "repeats": 0, "equal": None}
        with recorded(row, key=key):
            run_check(make(), pdl, row, stub)
        found = {"pdl": pdl, "rows": [row]}
        return found if row["status"] == "ok" else {**found, "retry": row["reason"]}

    name = f"{key}, {'with' if pdl else 'without'} dependent launch"
    return Job(name, "check", CHECK_SECONDS, run, contenders=("triton",))


def kernels(call: Call) -> int:
    """Run each check once against fp64, and 200 times for the same bits."""
    import torch

    from .checks import checks, some

    small = stub_name() is not None
    # Of this call all that was begun: what broke the process is not tried twice.
    mine = [r for r in call.before(torch.cuda.get_device_name(0)) if r["run"] == call.run and "key" in r]
    begun = {r["key"] for r in mine}
    wrong = {r["key"]: r["retry"] for r in mine if r.get("retry")}
    for key in sorted(begun - {r["key"] for r in mine if r["kind"] == "check"}):
        wrong[key] = "it took its process along"
        row = {"contender": "triton", "status": "failed", "reason": wrong[key]}
        call.write("check", key=key, rows=[row], retry=wrong[key])
    every = [
        check_job(key, make, pdl, small)
        for key, make, pdls in (some("cuda") if small else checks("cuda"))
        for pdl in pdls
    ]
    outcome, code = measured(call, [job for job in every if job.key not in begun], "gpu-kernels")
    wrong |= {record["key"]: record["retry"] for record in outcome.records if record.get("retry")}
    if code == RESTART or wrong:
        first = next((f"first {key}: {reason}" for key, reason in wrong.items()), "")
        return verdict(f"{len(wrong)} of {len(every)} wrong, {first}", code if code == RESTART else 1)
    left = len(outcome.left)
    how = "launched through the stub, no value compared" if small else f"{REPEATS} times alike"
    text = f"{len(every) - left} of {len(every)} right, each {how}"
    return verdict(f"{text}; {left} left, no time" if left else text, code)


def run_check(made: tuple, pdl: bool, row: dict, stub: bool) -> None:
    """Compute once against fp64 and then again for the same bits, and fill in the row. In the stub nothing
    computes: that it launches is all there is to see.
    """
    import torch

    from ..measure.judge import poisoned_memory
    from ..measure.kernels import errors_of
    from ..measure.layers import settle

    compute, exact, plain = made
    with contextlib.nullcontext() if stub else poisoned_memory():
        got = compute(pdl)
    if stub:
        row["reason"] = "launched; values are not compared in the stub"
    else:
        settle(row, errors_of(got, exact, plain))
    same = True
    for _ in range(2 if stub else REPEATS):
        again = compute(pdl)
        row["repeats"] += 1
        same = same and (stub or all(torch.equal(again[name], got[name]) for name in got))
    row["equal"] = None if stub else same
    if not same:
        row.update(status="failed", reason="not the same bits each time")


# sanitizer


def sanitizer(call: Call) -> int:
    """Run the checks under compute-sanitizer, which watches every access of a kernel; a tool at a time."""
    program = find_sanitizer()
    if program is None:
        text = "no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda (it is in the CUDA toolkit)"
        return verdict(text, UNFINISHED)
    # PyTorch's cache would hide a step outside of a tensor in memory that is allocated.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    codes, texts = [], []
    for tool in SANITIZER_TOOLS:
        environment[VARIABLE] = call.for_stage(call.left / (len(SANITIZER_TOOLS) - len(codes)))
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *command_of(SANITISED)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        at = said = first = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(CHECKING):
                at = line.removeprefix(CHECKING).strip()
            elif line.startswith(VERDICT):
                said = line.removeprefix(VERDICT).strip()
            elif not first and (found := re.match("=+ +((?:Error|Invalid|Race|Warning).*)", line)):
                first = f", first in {at}: {found[1].strip()}"
        code = process.wait()
        text = (
            f"errors{first or f', last in {at}'}" if code == FOUND else said or f"ended with {code} in {at}"
        )
        status = {0: "ok", UNFINISHED: "not run"}.get(code, "failed")
        row = {"contender": "triton", "status": status, "reason": text}
        call.write("check", key=f"compute-sanitizer {tool}", rows=[row])
        codes.append(code)
        texts.append(f"{tool}: {text}")
    wrong = any(code not in (0, UNFINISHED) for code in codes)
    return verdict("; ".join(texts), 1 if wrong else max(codes))


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def sanitised(call: Call) -> int:
    """Compute each check once, for a tool that watches."""
    import torch

    from .checks import checks

    done = 0
    every = checks("cuda", *SANITISED_SIZES)
    for name, make, pdls in every:
        if call.left <= 0:
            return verdict(
                f"{done} of {len(every)} checks without an error, then the time was up", UNFINISHED
            )
        print(f"{CHECKING}{name}", flush=True)
        compute, _, _ = make()
        for pdl in pdls:
            compute(pdl)
        torch.cuda.synchronize()
        done += 1
    return verdict(f"{done} checks without an error", 0)


# measurements


def measured(call: Call, jobs, name: str) -> tuple[object, int]:
    """Run jobs of bench into the call's file, and print their tables."""
    from ..report.console import show
    from ..run.runner import make_console, run
    from ..run.store import RESULTS

    console = make_console()
    folders = () if stub_name() else (RESULTS,)
    outcome = run(
        jobs,
        call.file,
        grid=name,
        command="python -m bench.gpu",
        run_id=call.run,
        budget=max(1.0, call.left),
        started=time.monotonic(),
        elsewhere=(*folders, *call.past, call.file.parent),
        console=console,
    )
    if outcome.records:
        show(outcome.records, console)
    failed = {
        row.get("reason") or "outside the error budget"
        for record in outcome.records
        for row in record["rows"]
        if row.get("status") == "failed"
    }
    failed |= {record["retry"] for record in outcome.records if record.get("retry")}
    code = {"complete": 0, "device lost": RESTART}.get(outcome.stopped, UNFINISHED)
    for reason in sorted(failed):
        print(f"failed: {reason}")
    return outcome, 1 if failed and code != RESTART else code


def generator_on_cpu(kind, device="cpu"):
    """torch.Generator for the stub driver's GPU, whose tensors lie on the CPU."""
    return kind.__base__.__new__(kind.__base__, "cpu")


def setting_here(small: bool):
    import torch

    from ..measure import ceilings, timing
    from ..measure import kernels as kernel_jobs
    from ..run.jobs import Setting

    if small:
        # Nothing computes in the stub: sizes that a CPU draws in no time, no value compared, no wait.
        ceilings.SIZES["cuda"] = ({"bf16": (64,)}, 2**16)
        timing.FLUSH_BYTES["cuda"] = 2**12
        timing.WARM_UP = 1
        torch.cuda._sleep = lambda cycles: None
        torch.Generator = type("Generator", (torch.Generator,), {"__new__": generator_on_cpu})
        kernel_jobs.broken = lambda errors: None
        kernel_jobs.verdict = lambda got, exact, plain: {}
        return Setting("cuda", rounds=2)
    return Setting("cuda")


def ceilings(call: Call) -> int:
    """Measure what this GPU can do at best, then the kernels of two layers of Llama-3-8B."""
    from ..measure import kernels as kernel_jobs
    from ..measure.cases import Case, cases, find_layers
    from ..run import jobs

    small = stub_name() is not None
    setting = setting_here(small)
    shapes = cases(find_layers(["Llama-3-8B/q", "Llama-3-8B/gate"]), (8192,), (16,))
    if small:
        shapes = [Case("Llama-3-8B", "q", 256, 128, 128, 16)]
    wanted = [jobs.ceilings_job(setting), *(jobs.kernel_job(case, setting) for case in shapes)]
    if small:
        # The tensors say that they lie on the CPU, where kernels are otherwise interpreted.
        (case,) = shapes
        timed = partial(kernel_jobs.time_kernels, case, "cuda", rounds=2, interpreted=True)
        wanted[1:] = [replace(job, run=lambda tick: timed(tick=tick)) for job in wanted[1:]]
    outcome, code = measured(call, wanted, "gpu-ceilings")
    rates = []
    for record, row in ((of, row) for of in outcome.records for row in of["rows"]):
        if row.get("what") == "copy":
            rates.append(f"copy {row['gb_per_s']['median']:.0f} GB/s")
        elif row.get("what") == "product":
            rates.append(f"{row['dtype']} {row['size'][0]}^3 {row['tflops']['median']:.0f} TFLOP/s")
        elif row.get("contender") == "triton" and (over := row.get("ratios", {}).get("cublas")):
            shape = record["case"]["label"].split(" R=")[0]
            rates.append(f"{shape} {row['part']} {over['median']:.3f} of the library's time")
    text = "; ".join(rates) or "measured by an earlier call"
    if not rates and (outcome.records or outcome.left):
        text = "nothing could be measured"
    return verdict(f"{'STUB, no numbers: ' if small else ''}{text}", code)


def suite(call: Call) -> int:
    """Go on with the suite of bench for the time that is left."""
    from ..run import jobs

    small = stub_name() is not None
    setting = setting_here(small)
    wanted = jobs.suite(setting, tests=False)
    if small:
        wanted = [jobs.ceilings_job(setting)]
    outcome, code = measured(call, wanted, "gpu-suite")
    return verdict(f"{len(outcome.records)} measurements, {len(outcome.left)} left for a later call", code)


# tests


def workers(each_gib: float, most: int) -> int:
    """Return how many processes the GPU's free memory and the cores carry; 0 where xdist is not there."""
    import torch

    if importlib.util.find_spec("xdist") is None:
        return 0
    free = torch.cuda.mem_get_info()[0] / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores - 2, int(free // each_gib)))


def tests(call: Call) -> int:
    """Run the tests that need a GPU, but those of much memory."""
    return run_tests(call, "gpu and not memory", workers(WORKER_GIB, MOST_WORKERS))


def memory(call: Call) -> int:
    """Run the tests past 2^31 elements, as many at a time as the memory carries."""
    count = workers(MEMORY_WORKER_GIB, 3)
    return run_tests(call, "gpu and memory", count if count > 1 else 0)


def run_tests(call: Call, marks: str, count: int, folder: str = "tests") -> int:
    """Run the tests with these marks that no earlier call has seen pass."""
    import pytest
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    lines = [r for r in call.before(device) if r["kind"] == "test" and "name" in r]
    mine = [r for r in lines if r["run"] == call.run]
    passed = {r["name"] for r in lines if r not in mine and r.get("outcome") in ("passed", "skipped")}
    # Of this call all that was begun: what broke the process is not tried twice.
    seen = {r["name"] for r in mine}
    for name in sorted(seen - {r["name"] for r in mine if r.get("outcome") != "begun"}):
        call.write("test", name=name, outcome="failed", text="it took its process along")
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(sorted(passed | seen), file)
    os.environ[DONE] = file.name
    arguments = [
        folder,
        "-m",
        marks,
        *["-q", "-p", "bench.gpu.recorder", "-p", "no:cacheprovider", "--tb=short"],
    ]
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    if count:
        arguments += ["-n", str(count), "--dist", "worksteal"]
    print(f"pytest {' '.join(arguments)}", flush=True)
    try:
        code = int(pytest.main(arguments))
    finally:
        Path(file.name).unlink(missing_ok=True)
    lines = [r for r in call.before(device) if r["kind"] == "test" and r["run"] == call.run]
    counts = {name: sum(r.get("outcome") == name for r in lines) for name in ("passed", "failed", "skipped")}
    text = ", ".join(f"{number} {name}" for name, number in counts.items())
    if passed:
        text += f" ({len(passed)} in earlier calls)"
    if failed := [r["name"] for r in lines if r.get("outcome") == "failed"]:
        return verdict(f"{text}; first failed: {failed[0]}", 1)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return verdict(f"{text}; no test was left to run", 0 if passed or stub_name() else 1)
    if code == pytest.ExitCode.INTERRUPTED:
        return verdict(f"{text}; the time was up, a later call does the rest", UNFINISHED)
    if code == 0:
        return verdict(f"{text}, {count or 1} at a time", 0)
    return verdict(f"{text}; pytest ended with {code}", 1)


STAGES: dict[str, Callable[[Call], int]] = {
    "environment": environment,
    "kernels": kernels,
    "ceilings": ceilings,
    "tests": tests,
    "memory": memory,
    "suite": suite,
    "sanitizer": sanitizer,
    SANITISED.name: sanitised,
}


def main() -> int:
    with contextlib.suppress(OSError, AttributeError):
        # If the driver is killed, its stage must not go on by itself (PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        return STAGES[sys.argv[1]](Call.told())
    except KeyboardInterrupt:
        return verdict("the time was up", UNFINISHED)


if __name__ == "__main__":
    sys.exit(main())
