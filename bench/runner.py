"""Runs a list of measurements: within a budget, with a progress bar, and so that it can be cut and gone on
with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .environment import environment, identity
from .layers import DeviceLost
from .results import Store, history, load, read
from .sittings import bare, merged, turns


class BudgetSpent(BaseException):
    """Raised inside a measurement when the time is up. Not an Exception: no contender has failed."""


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
) -> Outcome:
    """Measure what is lacking of `jobs`, append each result to `path` at once, and return the new records.

    budget: seconds since `started` (time.monotonic; default now). A job that would not fit any more, by its
    estimate scaled with how the others did, is left out; one that takes longer than that is cut at its next
    tick. elsewhere: folders whose results of the same identity count as measured; without any, those of the
    unfinished run in `path` do. What took an earlier call along comes last. Ctrl-C keeps what was measured.
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
    store = Store(path, past.run)
    # Also when it goes on: the machine may be busier now.
    store.append("run", command=command, grid=grid, identity=own, environment=about)
    records, left, stopped = [], [job.key for job in todo], "complete"
    spent = expected = 0.0
    with _progress(console) as progress:
        bar = progress.add_task("", total=sum(job.seconds for job in order))
        base = 0.0
        try:
            for number, job in enumerate(order):
                sittings = book[job.key]
                # Half the trust in what was seen so far, so that one odd job does not decide.
                pace = (spent + expected + 5) / (2 * expected + 5)
                now = time.monotonic()
                late = budget is not None and now - started + job.seconds * pace > budget
                if late or sittings.given_up:
                    progress.update(bar, completed=(base := base + job.seconds), refresh=True)
                    continue
                progress.update(bar, description=f"{number + 1}/{len(order)} {job.key[:60]}", refresh=True)

                def tick(fraction: float, job=job, base=base) -> None:
                    progress.update(bar, completed=base + fraction * job.seconds, refresh=True)
                    if budget is not None and time.monotonic() - started > budget:
                        raise BudgetSpent

                store.append("begin", key=job.key)
                try:
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
                    store.append("sitting", key=job.key, seconds=round(seconds, 2), **bare(payload))
                spent, expected = spent + seconds, expected + job.seconds
                progress.update(bar, completed=(base := base + job.seconds), refresh=True)
                if stopped != "complete":
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
    records += [sittings.write(store) for sittings in book.values() if sittings.unwritten]
    if left and stopped == "complete":
        stopped = "budget"
    store.append("end", done=len(records), left=left, stopped=stopped)
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
        return store.append(self.job.kind, key=self.job.key, seconds=round(self.seconds, 2), **self.payload)


def _failed(job: Job, error: Exception, status: str) -> dict:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    rows = [
        {"contender": key, "part": "both", "status": status, "reason": reason, "ms": None, "ratios": {}}
        for key in job.contenders
    ]
    return {**job.describe, "rows": rows, "retry": reason}


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    # Refreshed between samples only: a thread of its own would take time from them.
    return Progress(*columns, console=console or make_console(), transient=True, auto_refresh=False)


def make_console() -> Console:
    """Return a console; into a file or a log rich would assume 80 columns and break the lines."""
    return Console(width=None if sys.stdout.isatty() else 170)
