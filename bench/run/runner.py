"""Runs a list of measurements: within a budget, with its progress shown, and so that it can be cut and gone
on with.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ..measure.layers import DeviceLost
from .environment import environment, identity
from .sittings import bare, merged, turns
from .store import Store, history, load, read

# In a log: seconds between two lines about one measurement, and the least between any two.
HEARTBEAT_S, LINE_S = 10.0, 1.0


class BudgetSpent(BaseException):
    """Raised inside a measurement when the time is up. Not an Exception: no contender has failed."""


@contextlib.contextmanager
def alarm(end: float | None) -> Iterator[None]:
    """Raise BudgetSpent inside at `end` (time.monotonic), also in a measurement that never ticks.

    A signal, once more every second in case something swallows it; so in the main thread alone, and not on
    Windows. What was set for SIGALRM before counts again afterwards.
    """
    if (
        end is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    armed = True

    def ring(number, frame) -> None:
        if armed:
            raise BudgetSpent

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, max(1e-3, end - began), 1.0)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, delay - (time.monotonic() - began)), interval)


@dataclass(frozen=True)
class Job:
    """One measurement, one line in the result file.

    key: its name in every run. seconds: how long it takes, roughly. run(tick) -> the record's payload; tick
    takes the fraction that is done. describe: what to write down if it raises. contenders and rounds: what an
    earlier measurement must have to stand for this one. always: measured in every call. sittings: how often
    it is run to be complete; where that is more than once, run(tick, number) with the sitting's, and seconds
    is for one of them.
    """

    key: str
    kind: str
    seconds: float
    run: Callable[..., dict]
    describe: dict = field(default_factory=dict)
    contenders: tuple[str, ...] = ()
    rounds: int = 0
    always: bool = False
    sittings: int = 1


@dataclass
class Outcome:
    """What became of a run: its records, the keys that were left, and why it stopped: "complete", "budget",
    "interrupted", or "device lost".
    """

    records: list[dict]
    left: list[str]
    stopped: str


def run(
    jobs: list[Job],
    path: Path,
    *,
    grid: str,
    command: str,
    budget: float | None = None,
    started: float | None = None,
    elsewhere: tuple[Path, ...] = (),
    console: Console | None = None,
    about: dict | None = None,
    run_id: str | None = None,
) -> Outcome:
    """Measure what is lacking of `jobs`, append each result to `path` at once, and return the new records.

    budget: seconds since `started` (time.monotonic; default now). A job that would not fit any more, by its
    estimate scaled with how the others did, is left out; one that takes longer than that is cut when the
    budget is spent. elsewhere: folders whose results of the same identity count as measured; without any,
    those of the unfinished run in `path` do. What took an earlier call along comes last. Ctrl-C keeps what
    was measured. run_id: of the lines, where no run is gone on with.
    """
    started = time.monotonic() if started is None else started
    about = about or environment()
    own = identity(about)
    if elsewhere:
        past = history([record for folder in elsewhere for record in load(folder)[0]], own)
    else:
        past = history(read(path)[0], own, grid)
    lacking = [job for job in jobs if not past.has(job.key, job.contenders, job.rounds)]
    if not lacking:
        return Outcome([], [], "complete")
    todo = [job for job in jobs if job.always or job in lacking]
    todo.sort(key=lambda job: job.key in past.suspect)
    book = {job.key: _Sittings(job, past.partial(job.key, job.contenders)) for job in todo}
    order = turns([replace(job, sittings=book[job.key].lacking) for job in todo])
    store = Store(path, past.run or run_id, stub=bool(about.get("stub")))
    # Also when it goes on: the machine may be busier now.
    store.write("run", command=command, grid=grid, identity=own, environment=about)
    records, left, stopped = [], [job.key for job in todo], "complete"
    spent = expected = 0.0
    end = None if budget is None else started + budget
    log = _Log(console, len(order), started, end)
    total = sum(job.seconds for job in order)
    log.say(f"measuring {grid} into {path}: {len(order)} steps, about {total:.0f} s")
    try:
        for number, job in enumerate(order):
            sittings = book[job.key]
            # Half the trust in what was seen so far, so that one odd job does not decide.
            pace = (spent + expected + 5) / (2 * expected + 5)
            now = time.monotonic()
            late = budget is not None and now - started + job.seconds * pace > budget
            if late or sittings.given_up:
                continue
            log.begin(number, job)

            def tick(fraction: float, job=job) -> None:
                log.advance(job, fraction)
                if end is not None and time.monotonic() > end:
                    raise BudgetSpent

            store.write("begin", key=job.key)
            try:
                with alarm(end):
                    payload = sittings.sit(tick)
            except BudgetSpent:
                break
            except DeviceLost as error:
                payload, stopped = _failed(job, error, "not run"), "device lost"
            except Exception as error:
                payload = _failed(job, error, "failed")
            seconds = time.monotonic() - now
            if sittings.add(payload, seconds):
                records.append(sittings.write(store))
                if not payload.get("retry"):
                    left.remove(job.key)
            else:
                store.write("sitting", key=job.key, seconds=round(seconds, 2), **bare(payload))
            spent, expected = spent + seconds, expected + job.seconds
            if stopped != "complete":
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    records += [sittings.write(store) for sittings in book.values() if sittings.unwritten]
    if left and stopped == "complete":
        stopped = "budget"
    store.write("end", done=len(records), left=left, stopped=stopped)
    return Outcome(records, left, stopped)


class _Sittings:
    """What a job has of its sittings. partial: the record that earlier calls left of them, or None."""

    def __init__(self, job: Job, partial: dict | None):
        self.job, self.payload = job, partial
        self.had = partial["sittings"] if partial else 0
        self.seconds = partial["seconds"] if partial else 0.0
        self.unwritten = self.given_up = False

    @property
    def lacking(self) -> int:
        """How many it still needs."""
        return max(1, self.job.sittings - self.had)

    def sit(self, tick: Callable[[float], object]) -> dict:
        """Measure once."""
        return self.job.run(tick, self.had) if self.job.sittings > 1 else self.job.run(tick)

    def add(self, payload: dict, seconds: float) -> bool:
        """Take the payload of a sitting, and return whether it was the last."""
        self.had, self.seconds, self.unwritten = self.had + 1, self.seconds + seconds, True
        self.given_up = bool(payload.get("retry"))
        if self.job.sittings > 1 and not self.given_up:
            payload = {**payload, "sittings": 1}
            payload = merged(self.payload, payload) if self.payload else payload
        self.payload = payload
        return self.given_up or self.had >= self.job.sittings

    def write(self, store: Store) -> dict:
        """Append the record of all its sittings so far, and return it."""
        self.unwritten = False
        return store.write(self.job.kind, key=self.job.key, seconds=round(self.seconds, 2), **self.payload)


def _failed(job: Job, error: Exception, status: str) -> dict:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    rows = [
        {"contender": key, "part": "both", "status": status, "reason": reason, "ms": None, "ratios": {}}
        for key in job.contenders
    ]
    return {**job.describe, "rows": rows, "retry": reason}


class _Log:
    """The lines about a run: what begins, at most one a second, and one every ten seconds while it lasts.
    end: when the budget is spent (time.monotonic), or None.
    """

    def __init__(self, console: Console | None, count: int, started: float, end: float | None):
        self.console = console or make_console()
        self.count, self.started, self.end, self.said = count, started, end, 0.0

    def say(self, text: str) -> None:
        """Print a line with the seconds that have passed and, with a budget, those that are left."""
        now = self.said = time.monotonic()
        left = "" if self.end is None else f", {max(0.0, self.end - now):.0f} s left"
        words = f"[{now - self.started:.0f} s{left}] {text}"
        self.console.print(words, highlight=False, markup=False, soft_wrap=True)

    def begin(self, number: int, job: Job) -> None:
        if job.seconds >= LINE_S or time.monotonic() - self.said >= LINE_S:
            self.say(f"{number + 1}/{self.count} {job.key[:60]}: about {job.seconds:.0f} s")

    def advance(self, job: Job, fraction: float) -> None:
        if time.monotonic() - self.said >= HEARTBEAT_S:
            self.say(f"{job.key[:60]}: {100 * fraction:.0f} %")


class _Console(Console):
    """A console whose closed pipe ends the command, and not the process as rich's does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console() -> Console:
    """Return a console; into a file or a log rich would assume 80 columns and break the lines."""
    return _Console(width=None if sys.stdout.isatty() else 170)
