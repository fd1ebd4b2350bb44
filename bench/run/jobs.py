"""The measurements of a grid as a list of jobs, in the order in which they tell most."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from ..measure import blocks, ceilings, kernels, layers, main_loop, memory, models, training
from ..measure.cases import HOST_CASES, Case, cases, find_layers, first_hour_grid, grid, with_dropout
from ..measure.cases import layers as distinct_layers
from ..measure.contenders import BY_NAME, CONTENDERS
from ..measure.timing import SAMPLE_SECONDS
from .environment import ROOT, gpu_state
from .runner import Job

KINDS = ("main-loop", "ceilings", "time", "wall", "graph", "host", "kernel")
KINDS += ("block-time", "memory", "block", "family", "training")
# On a CPU a call is done when it returns: "wall" would measure the same again.
QUICK_KINDS = ("ceilings", "time", "graph", "host", "block-time", "memory", "block", "training")
# Rounds of interleaved samples, by device, and the sittings that they are spread over: a CPU that is shared
# changes its pace within a minute, a GPU that is held does not.
ROUNDS = {"cuda": 15, "cpu": 20}
SITTINGS = {"cuda": 1, "cpu": 5}
# Compiling takes longer than all that a quick look measures.
COMPILED, NOT_ON_A_CPU = "compiled-lorafa", "compiling takes long on a CPU"
ONCE = {COMPILED: "left out of all cases but the first: compiling takes long"}
LEFT_OUT = "left out of this case, to save time"
TESTS_SECONDS = 100.0


@dataclass
class Setting:
    """Where and with whom is measured. contenders: keys of layer contenders; rounds: of all sittings;
    ceilings: the payload of that record, filled by its job.
    """

    device: str
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = 15
    sittings: int = 1
    ceilings: dict | None = None

    @property
    def rounds_each(self) -> int:
        """Rounds of one sitting."""
        return math.ceil(self.rounds / self.sittings)


def seconds_of(
    device: str,
    keys: Iterable[str],
    flops: float,
    samples: float,
    least: float = 0.0,
    fixed: float = 0.2,
    exact: float = 4,
) -> float:
    """Return roughly how many seconds a measurement takes, for budgets and progress: each contender computes
    `flops` so many times, none of them in less than `least` seconds, and takes `fixed` seconds beside; the
    reference computes them `exact` times in fp64, and compilers come on top.
    """
    keys = list(keys)
    rate, exact_rate, compiling = {"cuda": (3e14, 3e13, 12.0), "cpu": (4e10, 1e10, 17.0)}[device]
    compiled = sum(key.startswith("compiled") for key in keys)
    each = samples * max(flops / rate, least) + fixed
    return len(keys) * each + exact * flops / exact_rate + compiled * compiling


def job(
    key: str,
    kind: str,
    seconds: float,
    measure: Callable[..., dict],
    describe: dict,
    keys: tuple[str, ...],
    left_out: dict[str, str] | None = None,
    rounds: int = 0,
    sittings: int = 1,
) -> Job:
    """rounds: of each sitting; left_out: contenders that are named as not run, with the reason."""

    def run(tick, sitting: int | None = None) -> dict:
        how = {} if sitting is None else {"sitting": sitting}
        return with_left_out(measure(tick=tick, **how), left_out or {})

    rounds *= sittings
    if kind == "time":
        describe |= {"rounds": rounds}
    return Job(key, kind, seconds, run, describe, keys, rounds, sittings=sittings)


def ceilings_job(setting: Setting) -> Job:
    def run(tick) -> dict:
        setting.ceilings = ceilings.measure(setting.device, gpu_state)
        return setting.ceilings

    return Job("ceilings", "ceilings", ceilings.ESTIMATE[setting.device], run, always=True)


def main_loop_job(setting: Setting) -> Job:
    keys, seconds = (kernels.TRITON,), main_loop.ESTIMATE
    run = partial(main_loop.measure, setting.device)
    # Always: a run may go on where the user's table does not have it.
    return Job("main-loop", "main-loop", seconds, lambda tick: run(), contenders=keys, always=True)


def with_left_out(payload: dict, left_out: dict[str, str]) -> dict:
    """Add rows for those who were left out, one for each part where rows have parts."""
    of_time = {"errors": {}, "ms": None, "ratios": {}}
    parts = dict.fromkeys(row.get("part") for row in payload["rows"])
    payload["rows"] += [
        {"contender": key, "status": "not run", "reason": reason, "left_out": True}
        | ({} if part is None else {"part": part, **of_time})
        for key, reason in left_out.items()
        for part in parts
    ]
    return payload


def time_job(
    case: Case, setting: Setting, mode: str = "eager", left_out: dict[str, str] | None = None
) -> Job:
    keys, device = without(setting.contenders, left_out), setting.device
    # Without a GPU nothing is captured: once is enough to say so.
    sittings, rounds = (1, setting.rounds) if mode == "graph" else (setting.sittings, setting.rounds_each)

    def measure(**how) -> dict:
        rates = ceilings.rates(setting.ceilings, case.dtype)
        return layers.time_case(case, keys, device, mode=mode, rounds=rounds, ceilings=rates, **how)

    long = device == "cpu" or mode in ("host", "wall")
    # Each part is about two thirds of a step.
    samples = len(layers.PARTS_OF[mode]) * rounds * 2 / 3
    times = seconds_of(device, keys, sum(case.flops().values()), samples, SAMPLE_SECONDS if long else 2e-3)
    seconds = 0.1 if mode == "graph" and device != "cuda" else times
    describe = {"case": case.as_record(), "mode": mode}
    return job(f"{mode} {case.label}", "time", seconds, measure, describe, keys, left_out, rounds, sittings)


def nf4_job(case: Case, setting: Setting) -> Job:
    """The contenders on NF4 beside those on the dense weight, in a measurement of its own."""
    one = time_job(case, replace(setting, contenders=("frozen", "lorafa", *BY_NAME)))
    return replace(one, key=f"nf4 {one.key}")


def kernel_job(case: Case, setting: Setting) -> Job:
    def measure(tick) -> dict:
        rates = ceilings.rates(setting.ceilings, case.dtype)
        return kernels.time_kernels(case, setting.device, rounds=setting.rounds, ceilings=rates, tick=tick)

    keys, flops = kernels.KERNELS, sum(case.flops().values())
    times = seconds_of(setting.device, keys, flops, 2 * setting.rounds, fixed=1.2)
    seconds = times if setting.device == "cuda" else 0.1
    describe = {"case": case.as_record(), "mode": "kernel"}
    return job(f"kernel {case.label}", "time", seconds, measure, describe, keys, None, setting.rounds)


def block_time_job(case: models.BlockCase, setting: Setting, left_out: dict[str, str]) -> Job:
    keys, rounds, device = without(models.TIME_KEYS, left_out), setting.rounds_each, setting.device
    measure = partial(blocks.time_block, case, keys, device, rounds=rounds)
    least = {"cuda": 2e-3, "cpu": SAMPLE_SECONDS}[device]
    seconds = seconds_of(device, keys, case.flops(), len(blocks.PARTS) * rounds, least)
    describe = {"case": case.as_record(), "mode": "block"}
    key = f"block-time {case.label}"
    return job(key, "time", seconds, measure, describe, keys, left_out, rounds, setting.sittings)


def without(keys: Iterable[str], left_out: dict[str, str] | None) -> tuple[str, ...]:
    return tuple(key for key in keys if key not in (left_out or ()))


def memory_job(case: Case, setting: Setting) -> Job:
    left_out = {COMPILED: NOT_ON_A_CPU} if setting.device == "cpu" and COMPILED in setting.contenders else {}
    keys = without(setting.contenders, left_out)

    measure = partial(memory.layer_memory, case, keys, setting.device)
    describe = {"scope": "layer", "case": case.as_record()}
    seconds = seconds_of(setting.device, keys, sum(case.flops().values()), 5, fixed=0.05)
    key = f"memory {case.label}"
    return job(key, "memory", seconds, lambda tick: measure(), describe, keys, left_out)


def block_job(block: models.BlockCase, setting: Setting) -> Job:
    keys = models.BLOCK_KEYS if block.scope == "block" else models.FAMILY_KEYS
    measure = partial(memory.block_memory, block, keys, setting.device)
    run = [key for key in keys if block.compiled or not models.CONTENDERS[key].compiled]
    seconds = seconds_of(setting.device, run, block.flops(), 5 * len(block.checkpointing))
    describe = {"scope": block.scope, "case": block.as_record()}
    return job(f"{block.scope} {block.label}", "memory", seconds, lambda tick: measure(), describe, keys)


def training_job(case: training.TrainingCase, setting: Setting) -> Job:
    keys, device = training.LARGEST_KEYS if case.largest else models.TRAINING_KEYS, setting.device
    # Building a model draws its weights. One contender more is the base.
    fixed = {"cuda": case.size.parameters() / 1e10 + 1.5, "cpu": case.size.parameters() / 1e8 + 0.4}[device]
    seconds = seconds_of(device, ("", *keys), case.flops(), 1, fixed=fixed, exact=0)
    if case.needs_gpu and device != "cuda":
        seconds = 0.1
    describe = {"case": case.as_record()}
    measure = partial(training.train, case, keys, device)
    return job(f"training {case.label}", "training", seconds, measure, describe, keys)


def tests_job() -> Job:
    """The tests that need a GPU, as a measurement: how many passed."""
    name = "tests that need a GPU"

    def run(tick) -> dict:
        # Workers compile beside each other; the tests leave memory enough for as many.
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--maxfail=20", *workers]
        how = {"capture_output": True, "text": True, "timeout": 1.5 * TESTS_SECONDS}
        try:
            done = subprocess.run(command, cwd=ROOT, **how)
        except subprocess.TimeoutExpired as error:
            printed = (error.stdout or b"").decode(errors="replace")
            reason = f"stopped after {error.timeout:.0f} s: {printed[-200:]}"
            return {"rows": [{"contender": name, "status": "not run", "reason": reason}], "retry": reason}
        lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
        status = "ok" if done.returncode == 0 else "failed"
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        row = {"contender": name, "status": status, "reason": lines[-1], "failed": failed[:20]}
        return {"rows": [row]}

    return Job("tests", "tests", TESTS_SECONDS, run, {}, (name,))


def jobs_of(
    wanted: Iterable[Case], kinds: Iterable[str], setting: Setting, compiled: bool = True
) -> list[Job]:
    """Return the jobs of these kinds for these cases. compiled: whether torch.compile takes part in every
    case, or in the first only.
    """
    wanted = list(wanted)
    # On a CPU one case is enough to say that there are none.
    on_a_gpu = wanted if setting.device == "cuda" else wanted[:1]
    look = setting.device == "cpu" and not compiled
    made = {
        "main-loop": lambda: [main_loop_job(setting)],
        "ceilings": lambda: [ceilings_job(setting)],
        "time": lambda: [
            time_job(case, setting, left_out=None if compiled or number == 0 else ONCE)
            for number, case in enumerate(wanted)
        ],
        "wall": lambda: [time_job(case, setting, "wall") for case in wanted],
        "host": lambda: [time_job(case, setting, "host", None if compiled else ONCE) for case in HOST_CASES],
        "graph": lambda: [time_job(case, setting, "graph") for case in on_a_gpu],
        "kernel": lambda: [kernel_job(case, setting) for case in on_a_gpu],
        "block-time": lambda: block_time_jobs(setting, "quick" if look else setting.device),
        "memory": lambda: [memory_job(case, setting) for case in wanted],
        "block": lambda: [block_job(block, setting) for block in memory.BLOCKS[setting.device]],
        "family": lambda: [block_job(block, setting) for block in memory.FAMILIES.values()],
        "training": lambda: [training_job(case, setting) for case in training.TRAININGS[setting.device]],
    }
    return [job for kind, make in made.items() if kind in set(kinds) for job in make()]


def block_time_jobs(setting: Setting, which: str) -> list[Job]:
    """Return the jobs of blocks.CASES[which]. torch.compile takes part on a GPU, and on a CPU in the first
    case but not in a quick look.
    """
    first, *rest = blocks.CASES[which]
    once = ONCE if setting.device == "cpu" else {}
    found = [block_time_job(first, setting, {COMPILED: NOT_ON_A_CPU} if which == "quick" else {})]
    return found + [block_time_job(case, setting, once) for case in rest]


def suite(setting: Setting, tests: bool = True) -> list[Job]:
    """Return what a first hour on a GPU needs, most telling first.

    The rate of expand over the library's product; ceilings; the tests; the large product against the device's
    library; whole layers at M = 8192 against the arrangements of PyTorch; the pass over dy by rank; layers on
    NF4, few rows and many; the host's time; blocks, their time and memory; training, then at the largest
    batch that fits; then dropout, other sizes, memory per layer, and CUDA graphs.
    """
    if setting.device != "cuda":
        return jobs_of(grid("quick"), (*QUICK_KINDS, "kernel"), setting, compiled=False)
    telling = [case for case in first_hour_grid() if case.M == 8192 and case.R in (16, 64)]
    rest = [case for case in first_hour_grid() if case not in telling]
    llama = find_layers(["Llama-3-8B"])
    lean = ("frozen", "lorafa", "triton", "library", "eager-lorafa", "addmm")
    peers = dict.fromkeys(without(setting.contenders, dict.fromkeys(lean)), LEFT_OUT)
    compiled = {COMPILED: LEFT_OUT} if COMPILED in setting.contenders else {}
    few = cases(llama, (8192,), (16,))
    products = cases(distinct_layers(("Llama-3-8B", "Llama-3.2-1B")), (8192,), (16,))
    ranks = cases(find_layers(["Llama-3-8B/gate"]), (8192,), (16, 64, 128))
    found = [main_loop_job(setting), ceilings_job(setting)]
    found += [tests_job()] if tests else []
    found += [kernel_job(case, setting) for case in products]
    found += [time_job(case, setting, left_out=None if case in few else peers) for case in telling]
    found += [kernel_job(case, setting) for case in ranks if case not in products]
    found += [nf4_job(case, setting) for case in cases(llama, (16, 8192), (16,))]
    found += [time_job(case, setting, "host", compiled) for case in HOST_CASES]
    found += block_time_jobs(setting, "cuda")
    found += [block_job(block, setting) for block in memory.BLOCKS["cuda"]]
    found += [training_job(case, setting) for case in training.TRAININGS["cuda"][:2]]
    found += [time_job(case, setting, left_out=peers) for case in with_dropout(few, 0.1)]
    found += [time_job(case, setting, left_out=peers) for case in rest]
    found += [time_job(case, setting, "wall", peers) for case in rest if case.M <= 512]
    found += [training_job(case, setting) for case in training.TRAININGS["cuda"][2:]]
    found += [memory_job(case, setting) for case in few]
    # Last: a capture that fails can leave the process unable to go on.
    found += [time_job(case, setting, "graph", compiled) for case in cases(llama, (1, 512), (16,))]
    return list({job.key: job for job in found}.values())
