"""The stages of the call in their order: each a process of its own with a time limit, none hides the next.

    run(stages, call)    run what earlier calls left, print each verdict, and return the exit code

What a stage did is in the file of JSON lines as it happens, its output in the log. A stage that may take
longer than its limit (`stretches`) gets what the ones before it left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..run.environment import ROOT
from ..run.shell import INTERRUPTED, Lines
from ..run.stub import stub_name

# What a stage is told, and the file with the tests that are not to be run again.
VARIABLE, DONE = "LORAFA_GPU_CALL", "LORAFA_GPU_DONE"
# Exit codes of a stage's process: its work is not done but nothing is wrong; there is no GPU; it cannot go on
# in this process (a GPU's error that sticks), and should be started again.
UNFINISHED, NO_GPU, RESTART = 3, 4, 75
# Seconds between the request to end and the end.
GRACE = 8.0
PROGRESS_S = 15.0
LOG_BYTES = 8 * 2**20
# A verdict, the last line with this start in a stage's output.
VERDICT = "verdict: "
PASSED, FAILED, LEFT = "passed", "failed", "unfinished"


@dataclass(frozen=True)
class Stage:
    """One stage. answers: the question, for the screen; limit: seconds; restarts: how often its process is
    started again after it broke, to do what is left; command: instead of its own in stages.py.
    """

    name: str
    answers: str
    limit: float
    stretches: bool = False
    restarts: int = 0
    command: tuple[str, ...] | None = None


STAGES = (
    Stage("environment", "does everything import here, and on which GPU, driver and clocks?", 40),
    Stage(
        "kernels",
        "is each kernel right, with and without dependent launch, 200 times alike?",
        100,
        restarts=3,
    ),
    Stage("ceilings", "how fast can this GPU be, and the kernels of two Llama-8B shapes?", 75),
    Stage("tests", "do the tests that need a GPU pass?", 200, stretches=True, restarts=1),
    Stage("memory", "do the tests past 2^31 elements pass?", 45, restarts=2),
    Stage("suite", "what do layers, blocks and training cost, most telling first?", 65, stretches=True),
)
TOTAL = 540.0
# Of the total, for starting, and for packing Triton's cache.
RESERVE = 15.0


@dataclass
class Call(Lines):
    """One call of the command. file: of JSON lines; past: folders of earlier calls; cache: Triton's folder;
    done: names of stages that earlier calls completed.
    """

    file: Path
    log: Path
    run: str
    budget: float
    started: float
    past: tuple[Path, ...] = ()
    done: frozenset[str] = frozenset()
    tree: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)


def say(call: Call, text: str) -> None:
    line = f"[{time.monotonic() - call.started:4.0f} s] {text}"
    print(line, flush=True)
    with contextlib.suppress(OSError), call.log.open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def limits(stages: tuple[Stage, ...], budget: float) -> dict[str, float]:
    """Return the seconds of each stage: its own, less if together they are more than the budget, and more if
    that is for a machine that is slower than the limits were made for.
    """
    room = max(1.0, budget - min(RESERVE, budget / 10))
    fitting = room / sum(stage.limit for stage in stages)
    scale = min(1.0, fitting) if budget <= TOTAL else min(budget / TOTAL, fitting)
    return {stage.name: stage.limit * scale for stage in stages}


def run(stages: tuple[Stage, ...], call: Call) -> int:
    """Run the stages that are not done, and return 0 if none failed, 1 if one did, 2 where there is no GPU,
    130 after Ctrl-C.
    """
    own = limits(stages, call.budget)
    verdicts: dict[str, str] = {}
    code = 0
    for number, stage in enumerate(stages):
        later = sum(own[one.name] for one in stages[number + 1 :] if one.name not in call.done)
        if stage.name in call.done:
            say(call, f"{stage.name}: done by an earlier call")
            continue
        room = call.left - later - min(RESERVE, call.budget / 10) / 2
        limit = room if stage.stretches else min(own[stage.name], room)
        if code == 2 or limit < min(5.0, own[stage.name]):
            why = "there is no GPU" if code == 2 else "no time was left"
            conclude(call, stage, "not run", why, 0.0, None)
            continue
        say(call, f"{stage.name}: {stage.answers} (at most {limit:.0f} s)")
        try:
            verdict, exit_code = run_stage(stage, call, limit)
        except KeyboardInterrupt:
            conclude(call, stage, "interrupted", "", 0.0, None)
            say(
                call, f"interrupted; what was found is in {call.file}; the same command goes on with the rest"
            )
            return INTERRUPTED
        verdicts[stage.name] = verdict
        if exit_code == NO_GPU:
            code = 2
        elif verdict == FAILED and code == 0:
            code = 1
    if not verdicts and any(stage.name not in call.done for stage in stages):
        return code or 1
    return code


def run_stage(stage: Stage, call: Call, limit: float) -> tuple[str, int | None]:
    """Run one stage, started again as often as it may be; return its verdict and last exit code."""
    began = time.monotonic()
    broke: list[str] = []
    call.write("stage", name=stage.name, verdict="begun", limit=round(limit, 1))
    for attempt in range(stage.restarts + 1):
        seconds = limit - (time.monotonic() - began)
        code, verdict, last = watch(stage, call, seconds, attempt)
        if code in (0, 1, UNFINISHED, NO_GPU) or code is None:
            break
        broke.append(verdict or last or ended(code))
        if limit - (time.monotonic() - began) < 2 * GRACE:
            break
        if attempt < stage.restarts:
            say(call, f"{stage.name}: its process {ended(code)}; started again for the rest")
    seconds = time.monotonic() - began
    if code is None:
        said = (
            f"did not end by itself within {limit:.0f} s and was killed; last: {verdict or last or 'nothing'}"
        )
    elif code in (0, 1, UNFINISHED, NO_GPU):
        said = verdict or last or "nothing was said"
    else:
        said = f"its process {ended(code)}: {verdict or last or 'nothing was said'}"
    found = {0: PASSED, UNFINISHED: LEFT}.get(code, FAILED)
    if broke:
        found = FAILED
        said += f"; its process broke {len(broke)} times, first: {broke[0]}"
    conclude(call, stage, found, said, seconds, code)
    return found, code


def conclude(call: Call, stage: Stage, verdict: str, said: str, seconds: float, code: int | None) -> None:
    """Write a stage's verdict down, and print it."""
    rounded = round(seconds, 1)
    call.write(
        "stage",
        name=stage.name,
        verdict=verdict,
        said=said[:2000],
        seconds=rounded,
        code=code,
        tree=call.tree,
    )
    say(call, f"{stage.name}: {verdict.upper()} in {seconds:.0f} s{f': {said[:400]}' if said else ''}")


def ended(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"ended with code {code}"
    if code == -signal.SIGINT:
        return "was ended as its time was up"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def command_of(stage: Stage) -> list[str]:
    """Return the command of a stage's process; through the stub driver where this process runs through it."""
    if stage.command is not None:
        return list(stage.command)
    own = ["-m", "bench.gpu.stages", stage.name]
    name = stub_name()
    through = ["-m", "tests.stub_gpu", "--arch", name.split()[1]] if name else []
    return [sys.executable, "-u", *through, *own]


def watch(stage: Stage, call: Call, limit: float, attempt: int) -> tuple[int | None, str, str]:
    """Run a stage's process for at most `limit` seconds, with its output in the log. Return its exit code, or
    None if it had to be killed, its verdict, and its last line.
    """
    began = time.monotonic()
    grace = min(GRACE, limit / 4)
    about = {
        "file": str(call.file),
        "run": call.run,
        "past": [str(folder) for folder in call.past],
        "tree": call.tree,
        "attempt": attempt,
        "seconds": limit - grace,
    }
    environment = {**os.environ, **call.environment, VARIABLE: json.dumps(about), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command_of(stage),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,
    )
    output = Output(call.log)
    asked = killed = False
    told = began
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdout.fileno(), False)
            selector.register(process.stdout, selectors.EVENT_READ)
            while process.poll() is None:
                if selector.select(timeout=0.2) and not output.read(process.stdout):
                    time.sleep(0.05)  # Its output is closed; it has not ended yet.
                passed = time.monotonic() - began
                if passed > limit - grace and not asked:
                    asked = True
                    send(process, signal.SIGINT)
                if passed > limit:
                    killed = True
                    break
                if time.monotonic() - told > PROGRESS_S:
                    told = time.monotonic()
                    say(call, f"{stage.name}: {passed:.0f} of {limit:.0f} s; {output.last[:100]}")
    finally:
        # Also what the process has started, and after Ctrl-C.
        send(process, signal.SIGKILL)
        process.wait()
        output.read(process.stdout)
        output.close()
        process.stdout.close()
    return (None if killed else process.returncode), output.verdict, output.last


def send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class Output:
    """What a stage prints: into the log, up to LOG_BYTES of it, with its verdict and its last line kept."""

    def __init__(self, path: Path):
        self.file = path.open("ab")
        self.rest = b""
        self.verdict = self.last = ""

    def read(self, stream) -> bool:
        """Take what there is; return whether there can be more."""
        while True:
            try:
                data = stream.read(65536)
            except (BlockingIOError, ValueError):
                return True
            if data is None:
                return True
            if not data:
                return False
            self.take(data)

    def take(self, data: bytes) -> None:
        room = LOG_BYTES - self.file.tell()
        if room > 0:
            self.file.write(data[:room])
            if len(data) >= room:
                self.file.write(b"\n(the log ends here: it is full)\n")
            self.file.flush()
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.rest = self.rest[-4096:]
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if text.startswith(VERDICT):
                self.verdict = text.removeprefix(VERDICT)
            elif text and not text.startswith("STUB "):
                self.last = text

    def close(self) -> None:
        if self.rest:
            self.take(b"\n")
        self.file.close()


def earlier(folders: tuple[Path, ...], tree: str, device: str | None) -> tuple[frozenset[str], list[dict]]:
    """Return the names of the stages that earlier calls completed with these files on this device, and all
    their lines. folders: where those calls wrote.
    """
    found: list[dict] = []
    for path in sorted({path.resolve() for folder in folders for path in folder.glob("*.jsonl")}):
        runs: set[str] = set()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict):
                continue
            if record.get("kind") == "run" and device_in(record) == device and tree_in(record) == tree:
                runs.add(record.get("run"))
            elif record.get("run") in runs:
                found.append(record)
    done = {
        r["name"] for r in found if r.get("kind") == "stage" and r.get("verdict") == PASSED and "name" in r
    }
    return frozenset(done), found


def device_in(run: dict) -> str | None:
    """Return the name of the GPU in a record of kind "run"."""
    with contextlib.suppress(KeyError, TypeError):
        return run["environment"]["machine"]["gpu"]["name"]
    return None


def tree_in(run: dict) -> str | None:
    with contextlib.suppress(KeyError, TypeError):
        return run["environment"]["tree"]
    return None


def answers() -> bool:
    """Whether the GPU, if this process uses one, still does what it is asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
