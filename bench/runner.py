"""Runs a list of measurements: within a budget, with a progress bar, and so that it can be cut and gone on
with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .environment import environment, identity
from .results import Store, measured, unfinished


@dataclass(frozen=True)
class Job:
    """One measurement, one line in the result file.

    key: its name in every run. seconds: how long it takes, roughly. run(tick) -> the record's payload; tick
    takes the fraction that is done. describe and contenders: what to write down if it raises.
    """

    key: str
    kind: str
    seconds: float
    run: Callable[[Callable[[float], object]], dict]
    describe: dict = field(default_factory=dict)
    contenders: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a run: its records, the keys that were left, and why it stopped."""

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
    elsewhere: Path | None = None,
    console: Console | None = None,
    about: dict | None = None,
) -> Outcome:
    """Measure what `path` lacks of `jobs`, append each result at once, and return the new records.

    budget: seconds; a job that would not fit any more, by its estimate scaled with how the others did, is
    left out. elsewhere: a folder whose results of the same identity need not be measured again. Ctrl-C stops
    after the line in work; what was measured stays.
    """
    begin = time.monotonic()
    about = about or environment()
    own = identity(about)
    continued, done = unfinished(path, own, grid)
    if elsewhere:
        done |= measured(elsewhere, own)
    todo = [job for job in jobs if job.key not in done]
    if not todo:
        return Outcome([], [], "complete")
    store = Store(path, continued)
    # Also when it goes on: the machine may be busier now.
    store.append("run", command=command, grid=grid, identity=own, environment=about)
    records, left, stopped = [], [], "complete"
    spent = expected = 0.0
    with _progress(console) as progress:
        bar = progress.add_task("", total=sum(job.seconds for job in todo))
        base = 0.0
        try:
            for number, job in enumerate(todo):
                # Half the trust in what was seen so far, so that one odd job does not decide.
                pace = (spent + expected + 5) / (2 * expected + 5)
                if budget is not None and time.monotonic() - begin + job.seconds * pace > budget:
                    left.append(job.key)
                    progress.update(bar, completed=(base := base + job.seconds), refresh=True)
                    continue
                progress.update(bar, description=f"{number + 1}/{len(todo)} {job.key[:60]}", refresh=True)

                def tick(fraction: float, job=job, base=base) -> None:
                    progress.update(bar, completed=base + fraction * job.seconds, refresh=True)

                started = time.monotonic()
                try:
                    payload = job.run(tick)
                except Exception as error:
                    payload = _failed(job, error)
                seconds = time.monotonic() - started
                records.append(store.append(job.kind, key=job.key, seconds=round(seconds, 2), **payload))
                spent, expected = spent + seconds, expected + job.seconds
                progress.update(bar, completed=(base := base + job.seconds), refresh=True)
        except KeyboardInterrupt:
            stopped = "interrupted"
            finished = {record["key"] for record in records}
            left = [job.key for job in todo if job.key not in finished]
    if left and stopped == "complete":
        stopped = "budget"
    store.append("end", done=len(records), left=left, stopped=stopped)
    return Outcome(records, left, stopped)


def _failed(job: Job, error: Exception) -> dict:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    rows = [
        {"contender": key, "part": "both", "status": "failed", "reason": reason, "ms": None, "ratios": {}}
        for key in job.contenders
    ]
    return {**job.describe, "rows": rows, "failed": reason}


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
