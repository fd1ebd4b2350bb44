"""The measurements of a grid as a list of jobs, in the order in which they tell most."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ..measure import blocks, ceilings, kernels, layers, main_loop, memory, models, training
from ..measure.cases import HOST_CASES, Case, cases, find_layers, first_hour_grid, grid, with_dropout
from ..measure.cases import layers as distinct_layers
from ..measure.contenders import CONTENDERS
from .environment import ROOT
from .runner import Job

KINDS = (
    "main-loop",
    "ceilings",
    "time",
    "wall",
    "graph",
    "host",
    "kernel",
    "block-time",
    "memory",
    "block",
    "family",
    "training",
)
# On a CPU a call is done when it returns: "wall" would measure the same again.
QUICK_KINDS = ("ceilings", "time", "graph", "host", "block-time", "memory", "block", "training")
# Rounds of interleaved samples, by device, and the sittings that they are spread over: a CPU that is shared
# changes its pace within a minute, a GPU that is held does not.
ROUNDS = {"cuda": 15, "cpu": 20}
SITTINGS = {"cuda": 1, "cpu": 5}
BLOCKS = {
    "cpu": (memory.BLOCK_CPU, memory.BLOCK_CPU_GQA),
    "cuda": (memory.BLOCK_LLAMA_8B, memory.BLOCK_LLAMA_1B),
}
TRAININGS = {
    "cpu": (training.TRAINING_TINY, training.TRAINING_8B_LARGEST),
    "cuda": (training.TRAINING_1B, training.TRAINING_8B_LARGEST, training.TRAINING_8B),
}
# Compiling takes longer than all that a quick look measures.
COMPILED = "compiled-lorafa"
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


def ceilings_job(setting: Setting) -> Job:
    def run(tick) -> dict:
        setting.ceilings = ceilings.measure(setting.device)
        return setting.ceilings

    return Job("ceilings", "ceilings", ceilings.ESTIMATE[setting.device], run, always=True)


def main_loop_job(setting: Setting) -> Job:
    def run(tick) -> dict:
        return main_loop.measure(setting.device)

    return Job("main-loop", "main-loop", main_loop.ESTIMATE, run, contenders=(kernels.TRITON,))


def time_job(
    case: Case, setting: Setting, mode: str = "eager", left_out: dict[str, str] | None = None
) -> Job:
    """left_out: contenders that are named as not run, with the reason."""
    left_out = left_out or {}
    keys = tuple(key for key in setting.contenders if key not in left_out)

    # Without a GPU nothing is captured: once is enough to say so.
    sittings = 1 if mode == "graph" else setting.sittings
    rounds = setting.rounds if mode == "graph" else setting.rounds_each

    def run(tick, sitting: int = 0) -> dict:
        payload = layers.time_case(
            case,
            keys,
            setting.device,
            mode=mode,
            rounds=rounds,
            ceilings=ceilings.rates(setting.ceilings, case.dtype),
            tick=tick,
            sitting=sitting,
        )
        return _with_left_out(payload, left_out)

    seconds = layers.estimate(case, keys, setting.device, mode, rounds)
    describe = {"case": case.as_record(), "mode": mode, "rounds": rounds * sittings}
    key = f"{mode} {case.label}"
    return Job(key, "time", seconds, run, describe, keys, rounds * sittings, sittings=sittings)


def _with_left_out(payload: dict, left_out: dict[str, str]) -> dict:
    parts = list(dict.fromkeys(row["part"] for row in payload["rows"]))
    payload["rows"] += [
        {"contender": key, "part": part, "status": "not run", "reason": reason, "left_out": True}
        | {"errors": {}, "ms": None, "ratios": {}}
        for key, reason in left_out.items()
        for part in parts
    ]
    return payload


def kernel_job(case: Case, setting: Setting) -> Job:
    def run(tick) -> dict:
        rates = ceilings.rates(setting.ceilings, case.dtype)
        return kernels.time_kernels(case, setting.device, rounds=setting.rounds, ceilings=rates, tick=tick)

    describe = {"case": case.as_record(), "mode": "kernel", "rounds": setting.rounds}
    seconds = kernels.estimate(case, setting.rounds) if setting.device == "cuda" else 0.1
    key = f"kernel {case.label}"
    return Job(key, "time", seconds, run, describe, kernels.KERNELS, setting.rounds)


def block_time_job(case: blocks.BlockTime, setting: Setting, left_out: dict[str, str]) -> Job:
    """left_out: contenders that are named as not run, with the reason."""
    keys = tuple(key for key in models.TIME_KEYS if key not in left_out)

    def run(tick, sitting: int = 0) -> dict:
        payload = blocks.time_block(
            case, keys, setting.device, rounds=setting.rounds_each, tick=tick, sitting=sitting
        )
        return _with_left_out(payload, left_out)

    rounds = setting.rounds_each * setting.sittings
    seconds = blocks.estimate(case, keys, setting.device, setting.rounds_each)
    describe = {"case": case.as_record(), "mode": "block", "rounds": rounds}
    key = f"block-time {case.label}"
    return Job(key, "time", seconds, run, describe, keys, rounds, sittings=setting.sittings)


def memory_job(case: Case, setting: Setting) -> Job:
    keys = tuple(key for key in setting.contenders if setting.device == "cuda" or key != COMPILED)
    left_out = {COMPILED: "compiling takes long on a CPU"} if COMPILED not in keys else {}

    def run(tick) -> dict:
        payload = memory.layer_memory(case, keys, setting.device)
        payload["rows"] += [
            {"contender": key, "status": "not run", "reason": reason, "left_out": True}
            for key, reason in left_out.items()
            if key in setting.contenders
        ]
        return payload

    describe = {"scope": "layer", "case": case.as_record()}
    seconds = memory.estimate(case, keys, setting.device)
    return Job(f"memory {case.label}", "memory", seconds, run, describe, keys)


def block_job(block: memory.BlockCase, setting: Setting) -> Job:
    keys = models.BLOCK_KEYS if block.scope == "block" else models.FAMILY_KEYS

    def run(tick) -> dict:
        return memory.block_memory(block, keys, setting.device)

    seconds = memory.estimate(block, keys, setting.device)
    describe = {"scope": block.scope, "case": block.as_record()}
    return Job(f"{block.scope} {block.label}", "memory", seconds, run, describe, keys)


def training_job(case: training.TrainingCase, setting: Setting) -> Job:
    keys = training.LARGEST_KEYS if case.largest else models.TRAINING_KEYS

    def run(tick) -> dict:
        return training.train(case, keys, setting.device, tick)

    seconds = training.estimate(case, keys, setting.device)
    return Job(f"training {case.label}", "training", seconds, run, {"case": case.as_record()}, keys)


def tests_job() -> Job:
    """The tests that need a GPU, as a measurement: how many passed."""
    name = "tests that need a GPU"

    def run(tick) -> dict:
        # Workers compile beside each other; the tests leave memory enough for as many.
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--maxfail=20", *workers]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=1.5 * TESTS_SECONDS
            )
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
    wanted, kinds = list(wanted), set(kinds)
    found = [main_loop_job(setting)] if "main-loop" in kinds else []
    found += [ceilings_job(setting)] if "ceilings" in kinds else []
    once = {COMPILED: "left out of all cases but the first: compiling takes long"}
    if "time" in kinds:
        found += [
            time_job(case, setting, left_out=None if compiled or number == 0 else once)
            for number, case in enumerate(wanted)
        ]
    if "wall" in kinds:
        found += [time_job(case, setting, "wall") for case in wanted]
    if "host" in kinds:
        quick = None if compiled else once
        found += [time_job(case, setting, "host", quick) for case in HOST_CASES]
    if "graph" in kinds:
        # On a CPU one case is enough to say that there are none.
        of_graphs = wanted if setting.device == "cuda" else wanted[:1]
        found += [time_job(case, setting, "graph") for case in of_graphs]
    if "kernel" in kinds:
        of_kernels = wanted if setting.device == "cuda" else wanted[:1]
        found += [kernel_job(case, setting) for case in of_kernels]
    if "block-time" in kinds:
        found += block_time_jobs(
            setting, "quick" if setting.device == "cpu" and not compiled else setting.device
        )
    if "memory" in kinds:
        found += [memory_job(case, setting) for case in wanted]
    if "block" in kinds:
        found += [block_job(block, setting) for block in BLOCKS[setting.device]]
    if "family" in kinds:
        found += [block_job(block, setting) for block in memory.FAMILIES.values()]
    if "training" in kinds:
        found += [training_job(case, setting) for case in TRAININGS[setting.device]]
    return found


def block_time_jobs(setting: Setting, which: str) -> list[Job]:
    """Return the jobs of blocks.CASES[which]. torch.compile takes part on a GPU, and on a CPU in the first
    case but not in a quick look.
    """
    once = {COMPILED: "left out of all cases but the first: compiling takes long"}
    never = {COMPILED: "compiling takes long on a CPU"}
    return [
        block_time_job(
            case,
            setting,
            {} if setting.device == "cuda" else never if which == "quick" else {} if number == 0 else once,
        )
        for number, case in enumerate(blocks.CASES[which])
    ]


def suite(setting: Setting, tests: bool = True) -> list[Job]:
    """Return what a first hour on a GPU needs, most telling first.

    The rate of expand over the library's product; ceilings; the tests; the large product against the device's
    library; whole layers at M = 8192 against the arrangements of PyTorch; the pass over dy by rank; the
    host's time; blocks, their time and memory; training, then at the largest batch that fits; then dropout,
    other sizes, memory per layer, and CUDA graphs.
    """
    if setting.device != "cuda":
        return jobs_of(grid("quick"), (*QUICK_KINDS, "kernel"), setting, compiled=False)
    telling = [case for case in first_hour_grid() if case.M == 8192 and case.R in (16, 64)]
    rest = [case for case in first_hour_grid() if case not in telling]
    llama = find_layers(["Llama-3-8B"])
    lean = tuple(
        key
        for key in setting.contenders
        if key in ("frozen", "lorafa", "triton", "library", "eager-lorafa", "addmm")
    )
    peers = {key: LEFT_OUT for key in setting.contenders if key not in lean}
    compiled = {COMPILED: LEFT_OUT} if COMPILED in setting.contenders else {}
    few = cases(llama, (8192,), (16,))
    products = cases(distinct_layers(("Llama-3-8B", "Llama-3.2-1B")), (8192,), (16,))
    ranks = cases(find_layers(["Llama-3-8B/gate"]), (8192,), (16, 64, 128))
    found = [main_loop_job(setting), ceilings_job(setting)]
    found += [tests_job()] if tests else []
    found += [kernel_job(case, setting) for case in products]
    found += [time_job(case, setting, left_out=None if case in few else peers) for case in telling]
    found += [kernel_job(case, setting) for case in ranks if case not in products]
    found += [time_job(case, setting, "host", compiled) for case in HOST_CASES]
    found += block_time_jobs(setting, "cuda")
    found += [block_job(block, setting) for block in BLOCKS["cuda"]]
    found += [training_job(case, setting) for case in TRAININGS["cuda"][:2]]
    found += [time_job(case, setting, left_out=peers) for case in with_dropout(few, 0.1)]
    found += [time_job(case, setting, left_out=peers) for case in rest]
    found += [time_job(case, setting, "wall", peers) for case in rest if case.M <= 512]
    found += [training_job(case, setting) for case in TRAININGS["cuda"][2:]]
    found += [memory_job(case, setting) for case in few]
    # Last: a capture that fails can leave the process unable to go on.
    found += [time_job(case, setting, "graph", compiled) for case in cases(llama, (1, 512), (16,))]
    return list({job.key: job for job in found}.values())
