"""One layer timed: everybody is checked, then those who passed take turns.

Parts: forward with what training keeps; backward on a graph that stays; both as one. Modes: "eager" as one
calls it; "graph" replayed from a CUDA graph; "host" the time that the Python side takes for a call, at a
shape where nothing else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch

from lorafa_kernels.accuracy import Operands

from .cases import Case
from .contenders import FROZEN, OURS, Contender, Layer, gradients, layer_contenders
from .judge import Judge, broken, draw
from .timing import (
    WARM_UP,
    CPUTimer,
    EventTimer,
    HostTimer,
    Step,
    captured,
    interleave,
    one_thread,
    summary,
)

PARTS = ("forward", "backward", "both")
MODES = ("eager", "graph", "host")


def steps_of(layer: Layer, operands: Operands) -> dict[str, Step]:
    """Return what is timed for each part."""
    y = layer.module(operands.x)
    return {
        "forward": lambda: layer.module(operands.x),
        "backward": lambda: gradients(layer, y, operands, keep_graph=True),
        "both": lambda: gradients(layer, layer.module(operands.x), operands),
    }


def estimate(case: Case, keys: Iterable[str], device: str, mode: str, rounds: int) -> float:
    """Return roughly how many seconds time_case takes, for budgets and progress bars."""
    if mode == "graph" and device != "cuda":
        return 0.1
    flops = sum(case.flops().values())
    rate = {"cuda": 5e14, "cpu": 4e10}[device]
    step = flops / rate + {"cuda": 5e-4, "cpu": 1e-2}[device]
    if mode == "host" or device == "cpu":
        step = max(step, 0.02)
    contenders = len(list(keys))
    compiling = (15 if device == "cpu" else 8) * ("compiled-lorafa" in keys)
    checking = (4 * flops / rate * 10 if device == "cuda" else 4 * flops / rate) + 0.1
    return contenders * (2 * step * rounds + checking) + compiling


def time_case(
    case: Case,
    keys: Iterable[str],
    device: str,
    *,
    mode: str = "eager",
    rounds: int = 15,
    ceilings: dict[str, float | None] | None = None,
    tick: Callable[[float], object] = lambda fraction: None,
    known: dict[str, Contender] | None = None,
) -> dict:
    """Measure the contenders `keys` of one case and return the record's payload (README of bench/results).

    ceilings: FLOP/s of the case's dtype ("product") and bytes/s ("copy"), for the floor. tick is called with
    the fraction that is done. A contender that raises, or whose results are outside the budget, gets status
    "failed" and no time; one that cannot run here "not run" and the reason.
    """
    with one_thread() if mode == "host" else contextlib.nullcontext():
        rows = rows_of(case, known or layer_contenders(keys), device, mode, rounds, tick)
    ceilings = ceilings or {}
    return {
        "case": case.as_record(),
        "mode": mode,
        "rounds": rounds,
        "flops": case.flops(),
        "least_bytes": case.least_bytes(),
        "floor_ms": case.floor_ms(ceilings.get("product"), ceilings.get("copy")),
        "rows": rows,
    }


def rows_of(
    case: Case,
    contenders: dict[str, Contender],
    device: str,
    mode: str,
    rounds: int,
    tick: Callable[[float], object],
) -> list[dict]:
    """Check everybody, then time who passed, part by part; return a row for each contender and part."""
    operands = draw(case, device)
    steps, verdicts = check(case, operands, contenders, device, mode)
    rows = []
    parts = PARTS if mode != "host" else ("forward", "both")
    for number, part in enumerate(parts):
        now = {name: of_layer[part] for name, of_layer in steps.items()}
        for name, step in list(now.items()):
            try:
                now[name] = prepare(step, mode)
            except Exception as error:
                now.pop(name)
                verdicts[name].update(failure(error))
        samples: dict[str, list[float]] = {}
        if now:
            timer = timer_for(device, mode)(list(now.values()))
            done = iter(range(1, rounds + 1))
            samples = interleave(
                now,
                rounds,
                timer,
                lambda number=number, done=done: tick((number + next(done) / rounds) / len(parts)),
            )
        rows += [row_of(key, part, verdicts[key], samples) for key in contenders]
    return rows


def check(
    case: Case, operands: Operands, contenders: dict[str, Contender], device: str, mode: str
) -> tuple[dict[str, dict[str, Step]], dict[str, dict]]:
    """Build and check everybody. Return the steps of those who passed, and everybody's verdict."""
    judge = Judge(case, operands)
    steps: dict[str, dict[str, Step]] = {}
    verdicts: dict[str, dict] = {}
    for key, contender in contenders.items():
        found = verdicts[key] = {"status": "ok", "reason": None, "errors": {}}
        if mode == "graph" and device != "cuda":
            found.update(status="not run", reason="CUDA graphs need a GPU")
        elif obstacle := contender.obstacle(case, device):
            found.update(status="not run", reason=obstacle)
        if found["status"] != "ok":
            continue
        try:
            layer = contender.build(operands, case)
            found["errors"] = judge.errors(contender, layer)
            if reason := broken(found["errors"]):
                found.update(status="failed", reason=reason)
            else:
                steps[key] = steps_of(layer, operands)
        except Exception as error:
            found.update(failure(error))
    return steps, verdicts


def failure(error: Exception) -> dict[str, str]:
    """Return status and reason of a row whose contender raised."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "not run", "reason": "out of memory"}
    if isinstance(error, NotImplementedError):
        return {"status": "not run", "reason": reason}
    return {"status": "failed", "reason": reason}


def prepare(step: Step, mode: str) -> Step:
    """Warm a step up, and capture it where graphs are measured."""
    if mode == "graph":
        step = captured(step)
    for _ in range(WARM_UP):
        step()
    return step


def timer_for(device: str, mode: str) -> Callable[[list[Step]], Callable[[Step], float]]:
    """Return the clock for this device and mode."""
    if mode == "host":
        return HostTimer
    return EventTimer if device == "cuda" else CPUTimer


def row_of(key: str, part: str, found: dict, samples: dict[str, list[float]]) -> dict:
    """Return one contender's row for one part, with its ratios."""
    row = {"contender": key, "part": part, **found, "ms": None, "ratios": {}}
    own = samples.get(key)
    if own and found["status"] == "ok":
        row["ms"] = summary(own, 1e3)
        for baseline, others in samples.items():
            if baseline != key and (baseline == FROZEN or key in OURS):
                row["ratios"][baseline] = summary([a / b for a, b in zip(own, others, strict=True)])
    return row
