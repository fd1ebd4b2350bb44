"""The stages of the call in their order: each a process of its own with a time limit, none hides the next.

    run(stages, call)    run what earlier calls left, print each verdict, and return the exit code

What a stage did is in the file of JSON lines as it happens, its output in the log. A stage that may take
longer than its limit (`stretches`) gets what the ones before it left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..run.environment import ROOT
from ..run.shell import INTERRUPTED, Lines
from ..run.store import read
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
        125,
        restarts=3,
    ),
    Stage("ceilings", "how fast can this GPU be, and the kernels of two Llama-8B shapes?", 65),
    Stage("tests", "do the tests that need a GPU pass?", 185, stretches=True, restarts=1),
    Stage("memory", "do the tests past 2^31 elements pass?", 45, restarts=2),
    Stage("suite", "what do layers, blocks and training cost, most telling first?", 65, stretches=True),
)
# Only where they are asked for by name.
ON_REQUEST = (
    Stage(
        "sanitizer",
        "does compute-sanitizer find a wrong or a racing access in a kernel?",
        500,
        stretches=True,
    ),
)
TOTAL = 540.0
# Of the total, for starting, and for packing Triton's cache.
RESERVE = 15.0


@dataclass
class Call(Lines):
    """One call of the command, for its driver and, as told, for the process of a stage. file: of JSON lines;
    log: of everything that is printed, or None; budget: seconds from `started`; past: folders of earlier
    calls; done: names of stages that they completed; tree: the hash of the files.
    """

    file: Path
    log: Path | None
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

    def for_stage(self, seconds: float) -> str:
        """Return what a stage's process is told, for VARIABLE; it should end within so many seconds."""
        past = [str(folder) for folder in self.past]
        about = {"file": str(self.file), "run": self.run, "past": past, "tree": self.tree}
        return json.dumps(about | {"seconds": seconds})

    @classmethod
    def told(cls) -> Call:
        about = json.loads(os.environ[VARIABLE])
        rest = {"past": tuple(map(Path, about["past"])), "tree": about["tree"]}
        return cls(Path(about["file"]), None, about["run"], about["seconds"], time.monotonic(), **rest)

    def before(self, device: str | None) -> list[dict]:
        """Return the lines of earlier calls with these files, and of this call."""
        return earlier((*self.past, self.file.parent), self.tree, device)[1]


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
            conclude(call, stage, "not run", why)
            continue
        say(call, f"{stage.name}: {stage.answers} (at most {limit:.0f} s)")
        try:
            verdict, exit_code = run_stage(stage, call, limit)
        except KeyboardInterrupt:
            conclude(call, stage, "interrupted", "")
            found = f"what was found is in {call.file}"
            say(call, f"interrupted; {found}; the same command goes on with the rest")
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
        code, verdict, last = watch(stage, call, limit - (time.monotonic() - began))
        said = verdict or last or "nothing was said"
        if code in (0, 1, UNFINISHED, NO_GPU) or code is None:
            break
        broke.append(verdict or last or ended(code))
        said = f"its process {ended(code)}: {said}"
        if limit - (time.monotonic() - began) < 2 * GRACE:
            break
        if attempt < stage.restarts:
            say(call, f"{stage.name}: its process {ended(code)}; started again for the rest")
    if code is None:
        last = verdict or last or "nothing"
        said = f"did not end by itself within {limit:.0f} s and was killed; last: {last}"
    found = {0: PASSED, UNFINISHED: LEFT}.get(code, FAILED)
    if broke:
        found = FAILED
        said += f"; its process broke {len(broke)} times, first: {broke[0]}"
    conclude(call, stage, found, said, time.monotonic() - began, code)
    return found, code


def conclude(
    call: Call, stage: Stage, verdict: str, said: str, seconds: float = 0.0, code: int | None = None
) -> None:
    """Write a stage's verdict down, and print it."""
    about = {"said": said[:2000], "seconds": round(seconds, 1), "code": code, "tree": call.tree}
    call.write("stage", name=stage.name, verdict=verdict, **about)
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


def watch(stage: Stage, call: Call, limit: float) -> tuple[int | None, str, str]:
    """Run a stage's process for at most `limit` seconds, with its output in the log. Return its exit code, or
    None if it had to be killed, its verdict, and its last line.
    """
    began = time.monotonic()
    grace = min(GRACE, limit / 4)
    environment = {**os.environ, **call.environment, VARIABLE: call.for_stage(limit - grace)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command_of(stage),
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A group of its own, with all that it starts.
        start_new_session=True,
    )
    output = Output()
    reader = threading.Thread(target=output.follow, args=(process.stdout, call.log))
    reader.start()

    def ends_within(seconds: float) -> bool:
        while (left := seconds - (time.monotonic() - began)) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, PROGRESS_S))
                return True
            if left > PROGRESS_S:
                passed = time.monotonic() - began
                say(call, f"{stage.name}: {passed:.0f} of {limit:.0f} s; {output.last[:100]}")
        return False

    killed = False
    try:
        if not ends_within(limit - grace):
            send(process, signal.SIGINT)
            killed = not ends_within(limit)
    finally:
        # Also what the process has started, and after Ctrl-C.
        send(process, signal.SIGKILL)
        process.wait()
        reader.join()
        process.stdout.close()
    return (None if killed else process.returncode), output.verdict, output.last


def send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class Output:
    """What a stage prints: into the log, up to LOG_BYTES of it, with its verdict and its last line kept."""

    verdict = last = ""

    def follow(self, stream: BinaryIO, path: Path) -> None:
        """Take all lines until everybody who writes them has ended."""
        with path.open("ab") as log:
            for line in stream:
                room = LOG_BYTES - log.tell()
                # A full disk must not keep a stage from printing.
                with contextlib.suppress(OSError):
                    log.write(line[: max(0, room)])
                    if 0 < room <= len(line):
                        log.write(b"\n(the log ends here: it is full)\n")
                    log.flush()
                text = line[-4096:].decode("utf-8", "replace").strip()
                if text.startswith(VERDICT):
                    self.verdict = text.removeprefix(VERDICT)
                elif text and not text.startswith("STUB "):
                    self.last = text


def earlier(folders: tuple[Path, ...], tree: str, device: str | None) -> tuple[frozenset[str], list[dict]]:
    """Return the names of the stages that earlier calls completed with these files on this device, and all
    their lines. folders: where those calls wrote.
    """

    def fits(about: dict) -> bool:
        return about.get("tree") == tree and (about["machine"].get("gpu") or {}).get("name") == device

    files = sorted({path.resolve() for folder in folders for path in folder.glob("*.jsonl")})
    records = [record for file in files for record in read(file)[0]]
    runs = {r["run"] for r in records if r["kind"] == "run" and fits(r["environment"])}
    found = [r for r in records if r["kind"] != "run" and r["run"] in runs]
    passed = (r for r in found if r["kind"] == "stage" and r.get("verdict") == PASSED)
    return frozenset(r["name"] for r in passed if "name" in r), found


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
