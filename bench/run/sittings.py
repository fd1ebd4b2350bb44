"""A measurement in several sittings. A shared machine is faster or slower for half a minute at a time, and
the spread of rounds that follow each other does not show it.

    turns(jobs)                     the order in which jobs have their sittings
    merged(earlier, later)          one record's payload of two: the samples of both
    bare(payload)                   what a sitting needs to leave until the last is done
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ..measure.timing import ratios, summary

if TYPE_CHECKING:
    from .runner import Job

    AnyJob = TypeVar("AnyJob", bound=Job)

Payload = dict
Name = tuple[str, "str | None"]


def turns(jobs: Sequence[AnyJob]) -> list[AnyJob]:
    """Return the jobs in the order of their sittings, each as often as it has some.

    What comes before the first job of several sittings stays there. Jobs of one sitting lie between the
    sittings of the others, about as many after each but the last.
    """
    sitting = [job for job in jobs if job.sittings > 1]
    if not sitting:
        return list(jobs)
    most = max(job.sittings for job in sitting)
    start = jobs.index(sitting[0])
    single = [job for job in jobs[start:] if job.sittings == 1]
    order = list(jobs[:start])
    for number in range(most):
        order += [job for job in sitting if number < job.sittings]
        first, last = (len(single) * place // (most - 1) for place in (number, number + 1))
        order += single[first:last]
    return order


def merged(earlier: Payload, later: Payload) -> Payload:
    """Return the later payload with the samples of both. Who failed or did not run in one has none."""
    before = {_name(row): row for row in earlier["rows"]}
    rows = [_merged_row(before.get(_name(row)), row) for row in later["rows"]]
    against = {_name(row): list(row.get("ratios") or ()) for row in later["rows"]}
    parts: dict[str | None, dict[str, list[float]]] = {}
    for row in rows:
        if row.get("samples_ms"):
            parts.setdefault(row.get("part"), {})[row["contender"]] = row["samples_ms"]
    for row in rows:
        if row.get("samples_ms"):
            row["ms"] = summary(row["samples_ms"])
            row["ratios"] = ratios(row["contender"], parts[row.get("part")], against[_name(row)])
    counts = {
        "rounds": earlier.get("rounds", 0) + later.get("rounds", 0),
        "sittings": earlier.get("sittings", 1) + later.get("sittings", 1),
    }
    if "seconds" in earlier and "seconds" in later:
        counts["seconds"] = earlier["seconds"] + later["seconds"]
    return {**later, **counts, "rows": rows}


def bare(payload: Payload) -> Payload:
    """Return the payload without what follows from its samples or is the same in every sitting."""
    left = ("ms", "ratios", "errors")
    rows = [
        {name: value for name, value in row.items() if row["status"] != "ok" or name not in left}
        for row in payload["rows"]
    ]
    return {**payload, "rows": rows}


def _name(row: dict) -> Name:
    return row["contender"], row.get("part")


def _merged_row(before: dict | None, row: dict) -> dict:
    if before is None:
        return dict(row)
    broken = next((each for each in (before, row) if each["status"] != "ok"), None)
    if broken:
        return {**row, **broken, "ms": None, "ratios": {}, "samples_ms": None}
    return {**row, "samples_ms": [*(before.get("samples_ms") or ()), *(row.get("samples_ms") or ())]}
