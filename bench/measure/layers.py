"""One layer timed: everybody is checked, then those who passed take turns.

Parts: forward with what training keeps; backward on a graph that stays; both as one. Modes: "eager", the time
that the device takes; "wall", what a program waits for, the Python side included; "graph", replayed from a
CUDA graph; "host", the time that the Python side takes, at a shape where nothing else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch._functorch.config as functorch_config

from lorafa_kernels.checks.budget import Operands

from .cases import Case
from .contenders import FROZEN, OURS, Contender, Layer, gradients, layer_contenders
from .judge import Judge, broken, draw
from .timing import (
    WARM_UP,
    CallTimer,
    EventTimer,
    Step,
    captured,
    digits,
    interleave,
    one_thread,
    ratios,
    summary,
    synchronize,
)

PARTS = ("forward", "backward", "both")
MODES = ("eager", "wall", "graph", "host")
# What a graph captures is a whole step; the Python side of a backward alone is autograd's.
PARTS_OF = {"eager": PARTS, "wall": PARTS, "graph": ("forward", "both"), "host": ("forward", "both")}
GRADIENTS = ("dx", "dB", "dA")


class DeviceLost(Exception):
    """The GPU no longer answers: nothing after this in the process can be trusted."""


def steps_of(layer: Layer, operands: Operands, parts: Iterable[str]) -> dict[str, Step]:
    """Return what is timed for each part."""
    steps: dict[str, Step] = {
        "forward": lambda: layer.module(operands.x),
        "both": lambda: gradients(layer, layer.module(operands.x), operands),
    }
    if "backward" in parts:
        y = layer.module(operands.x)
        steps["backward"] = lambda: gradients(layer, y, operands, keep_graph=True)
    return {part: steps[part] for part in parts}


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
    sitting: int = 0,
) -> dict:
    """Measure the contenders `keys` of one case and return the record's payload (docs/benchmarks.md).

    ceilings: FLOP/s of the case's dtype ("product") and bytes/s ("copy"), for the floor.
    """
    contenders = known or layer_contenders(keys)
    with contextlib.ExitStack() as stack:
        # The timed backward runs many times on one graph.
        stack.enter_context(functorch_config.patch(donated_buffer=False))
        if mode == "host":
            stack.enter_context(one_thread())
        if device == "cuda" and mode == "graph":
            # All on one stream: a capture must not meet a graph that another stream built.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        judge = Judge(case, draw(case, device))
        steps, verdicts = check(judge, contenders, device, mode, tick)
        judged = partial(judged_replay, judge, contenders) if mode == "graph" else None
        # Its fp64 tensors are as large as everything else together.
        del judge
        by_part = parted(PARTS_OF[mode], steps, verdicts)
        rows = timed_parts(*by_part, device, mode, rounds, tick, sitting, judged=judged)
    return timed_payload(case, mode, rounds, ceilings, rows)


def timed_payload(case: Case, mode: str, rounds: int, ceilings: dict | None, rows: list[dict]) -> dict:
    """Return the payload of a layer's times, with the least that its work can take on these ceilings."""
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


def parted(parts: Iterable[str], steps: dict[str, dict[str, Step]], verdicts: dict[str, dict]) -> tuple:
    """Return steps and verdicts by part and contender, of those by contender."""
    found = {part: {key: dict(verdict) for key, verdict in verdicts.items()} for part in parts}
    return {part: {key: of[part] for key, of in steps.items()} for part in found}, found


def timed_parts(
    steps: dict[str, dict[str, Step]],
    verdicts: dict[str, dict[str, dict]],
    device: str,
    mode: str,
    rounds: int,
    tick: Callable[[float], object],
    sitting: int = 0,
    *,
    judged: Callable[[str, str, Step, dict], bool] | None = None,
    **against,
) -> list[dict]:
    """Time those who have a step, part by part, in turns; return a row for each verdict.

    steps, verdicts: by part and contender. judged: whether a step is right that was prepared. against: of
    row_of.
    """
    rows = []
    for number, (part, found) in enumerate(verdicts.items()):
        ready: dict[str, Step] = {}
        for key, step in steps[part].items():
            tick(number / len(verdicts))
            with recorded(found[key], key=key):
                prepared = prepare(step, mode)
                if judged is None or judged(part, key, prepared, found[key]):
                    ready[key] = prepared
        done = iter(range(1, rounds + 1))
        samples, raised = interleave(
            ready,
            rounds,
            timer_for(device, mode),
            lambda number=number, done=done: tick((number + next(done) / rounds) / len(verdicts)),
            sitting,
        )
        for key, error in raised.items():
            found[key].update(failure(error, key))
        rows += [row_of(key, part, row, samples, **against) for key, row in found.items()]
    return rows


def checked(
    contenders: Iterable[Contender],
    obstacle: Callable[[Contender], str | None],
    check: Callable[[Contender], tuple[dict[str, dict], Callable[[], object]]],
    tick: Callable[[float], object] = lambda fraction: None,
) -> tuple[dict[str, object], dict[str, dict]]:
    """Check everybody; return by key what those who passed have to show, and everybody's verdict.

    obstacle says what keeps a contender from running. check builds one and returns its errors and how to make
    what it is to show.
    """
    passed: dict[str, object] = {}
    verdicts: dict[str, dict] = {}
    for contender in contenders:
        tick(0.0)
        key = contender.key
        found = verdicts[key] = verdict_of(obstacle(contender))
        if found["status"] == "ok":
            with recorded(found, key=key):
                errors, make = check(contender)
                if settle(found, errors):
                    passed[key] = make()
    return passed, verdicts


def check(
    judge: Judge, contenders: dict[str, Contender], device: str, mode: str, tick: Callable[[float], object]
) -> tuple[dict[str, dict[str, Step]], dict[str, dict]]:
    """Build and check everybody. Return the steps of those who passed, and everybody's verdict."""
    case, operands = judge.case, judge.operands

    def built(contender: Contender) -> tuple[dict, Callable]:
        layer = contender.build(operands, case)
        # A leaf of its own, that no other contender's graph hangs on.
        own = replace(operands, x=operands.x.detach().requires_grad_())
        return judge.errors(contender, layer), partial(steps_of, layer, own, PARTS_OF[mode])

    return checked(
        contenders.values(), lambda contender: obstacle_of(contender, case, device, mode), built, tick
    )


def obstacle_of(contender: Contender, case: Case, device: str, mode: str) -> str | None:
    """Say what keeps a contender from being timed in a mode, or None if nothing does."""
    if mode == "graph" and device != "cuda":
        return "CUDA graphs need a GPU"
    if mode == "graph" and case.dropout:
        return "every replay draws another mask, which cannot be checked"
    return contender.obstacle(device, case)


def judged_replay(
    judge: Judge, contenders: dict[str, Contender], part: str, key: str, replay: Step, row: dict
) -> bool:
    """Whether what a captured step leaves when it is replayed is right."""
    results = replay()
    torch.cuda.synchronize()
    named = {"y": results.detach()} if part == "forward" else dict(zip(GRADIENTS, results, strict=False))
    return settle(row, judge.errors_of(contenders[key], named))


def verdict_of(obstacle: str | None) -> dict:
    """Return status, reason and errors of a contender before it is checked, or with what keeps it from it."""
    return {"status": "not run" if obstacle else "ok", "reason": obstacle, "errors": {}}


def settle(row: dict, errors: dict[str, dict]) -> bool:
    """Write errors and what follows from them into the row; return whether they are within the budget."""
    row["errors"] = errors
    if reason := broken(errors):
        row.update(status="failed", reason=reason)
    return reason is None


@contextlib.contextmanager
def recorded(*rows: dict, key: str = "") -> Iterator[None]:
    """What is raised inside is written into the rows, as failure says."""
    try:
        yield
    except Exception as error:
        found = failure(error, key)
        for row in rows:
            row.update(found)


def failure(error: Exception, key: str = "") -> dict[str, str]:
    """Return status and reason of a row whose contender `key` raised. Raises DeviceLost if it took the GPU
    along.
    """
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "not run", "reason": "out of memory"}
    if isinstance(error, NotImplementedError):
        return {"status": "not run", "reason": reason}
    try:
        synchronize()
    except Exception:
        raise DeviceLost(f"{key} {reason}".strip()) from error
    return {"status": "failed", "reason": reason}


def prepare(step: Step, mode: str) -> Step:
    """Warm a step up, and capture it where graphs are measured."""
    for _ in range(WARM_UP):
        step()
    return captured(step, torch.cuda.current_stream()) if mode == "graph" else step


def timer_for(device: str, mode: str) -> Callable[[Step], float]:
    """Return a clock for this device and mode."""
    if mode in ("host", "wall"):
        return CallTimer(waits=mode == "wall")
    return EventTimer() if device == "cuda" else CallTimer(cold=True)


def row_of(
    key: str,
    part: str,
    found: dict,
    samples: dict[str, list[float]],
    *,
    baseline: str = FROZEN,
    ours: Iterable[str] = OURS,
) -> dict:
    """Return one contender's row for one part, with its ratio to the baseline, of `ours` to everybody."""
    row = {"contender": key, "part": part, **found, "ms": None, "ratios": {}, "samples_ms": None}
    own = samples.get(key)
    if own and found["status"] == "ok":
        row["ms"] = summary(own, 1e3)
        row["ratios"] = ratios(key, samples, [other for other in samples if other == baseline or key in ours])
        row["samples_ms"] = [digits(seconds * 1e3) for seconds in own]
    return row
