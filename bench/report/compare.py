"""What changed between two sets of results, and whether it is beyond the spread.

    load_old(source, root)     the results of a revision, or of a file
    compare(new, old)          every measurement that both have, and what only one has
    show(comparison, console)  machine and versions first, then the biggest changes first

Times are compared as ratios to a baseline of their own run, so that two days of one machine can be compared.
A change is beyond the spread if the intervals p20–p80 do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..run.environment import ROOT
from ..run.shell import git
from ..run.store import MEASURED, RESULTS, parse
from .reading import Record, device_of, full_title, label_of, newest, ratio, size, status, titles_of, usable

SHOWN_WITHIN = 20
BYTES = ("saved_bytes", "peak_allocated_bytes", "forward_temporary_bytes", "backward_temporary_bytes")
STYLES = {"worse": "red", "better": "green", "failed": "red"}


@dataclass(frozen=True)
class Change:
    """One measurement in both sets, or in one of them (`old` or `new` is then None).

    what: measured, in a few words; sort: what its contenders, parts and baselines are ordered by. old, new: a
    ratio or a time in ms with its spread, a number of bytes, or a status. percent: new / old − 1. beyond:
    whether the change is beyond the spread (bytes and statuses: whether they differ at all).
    """

    kind: str  # "ratio", "step_ms", one of BYTES, or "status"
    what: str
    title: str
    sort: tuple
    old: dict | int | str | None
    new: dict | int | str | None

    @property
    def percent(self) -> float | None:
        if isinstance(self.old, dict):
            return 100 * (self.new["median"] / self.old["median"] - 1)
        if isinstance(self.old, int):
            return 100 * (self.new / self.old - 1) if self.old else 0.0 if self.new == self.old else math.inf
        return None

    @property
    def beyond(self) -> bool:
        if isinstance(self.old, dict):
            return self.new["p20"] > self.old["p80"] or self.new["p80"] < self.old["p20"]
        return self.old != self.new

    @property
    def weight(self) -> tuple:
        """Changed statuses first, then what is beyond the spread, then by size."""
        changed_status = self.kind == "status" and self.beyond
        return not changed_status, not self.beyond, -abs(self.percent or 0), *self.sort

    @property
    def verdict(self) -> str:
        if self.kind == "status":
            return {"ok": "better", "failed": "failed"}.get(self.new, "changed")
        direction = "worse" if self.percent > 0 else "better"
        if isinstance(self.new, dict):
            return f"{direction}, beyond the spread" if self.beyond else "within the spread"
        return direction

    def text(self, value: dict | int | str | None) -> str:
        if isinstance(value, dict):
            digits = (2 if self.kind == "ratio" else 1) + (value["median"] < 10)
            return "{median:.{d}f} ({p20:.{d}f}–{p80:.{d}f})".format(d=digits, **value)
        return size(value) if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Comparison:
    """changes: of what both have, the biggest first. differences: of machine and versions, by device."""

    changes: tuple[Change, ...]
    only_old: tuple[Change, ...]
    only_new: tuple[Change, ...]
    differences: tuple[str, ...]


def load_old(source: str, root: Path = RESULTS) -> list[Record]:
    """Return the records of a result file, or of all result files below `root` in a revision.

    Raises ValueError for a file that is missing or has no results, an unknown revision, and a revision
    without results.
    """
    file = Path(source)
    if file.is_file():
        records, _ = parse(file.read_text(encoding="utf-8", errors="replace"), file)
        if not records:
            raise ValueError(f"{source}: there are no results in this file")
        return records
    if source.endswith(".jsonl"):
        raise ValueError(f"{source}: there is no such file")
    top = root if root.is_dir() else ROOT
    if source.startswith("-") or git(top, "rev-parse", "--verify", "--quiet", f"{source}^{{commit}}") is None:
        raise ValueError(
            f"{source!r} is neither a result file nor a revision that git knows here (such as HEAD~1, a "
            "branch or a commit)"
        )
    paths = (git(top, "ls-tree", "-r", "--name-only", "-z", source, "--", ".") or "").split("\0")
    found: list[Record] = []
    for path in sorted(path for path in paths if path.endswith(".jsonl")):
        records, _ = parse(git(top, "show", f"{source}:./{path}") or "", top / path)
        found += records
    if not found:
        raise ValueError(f"revision {source!r} has no result files (*.jsonl) below {top.name}/")
    return sorted(found, key=lambda record: record["date"])


def compare(new: Iterable[Record], old: Iterable[Record]) -> Comparison:
    """Compare what counts in both sets: of several runs of a measurement, the newest."""
    latest_new, latest_old = newest(new).values(), newest(old).values()
    after, before = ({name: rest for name, *rest in _values(some)} for some in (latest_new, latest_old))

    def change(name: tuple) -> Change:
        (words, title, sort, value), (*_, was) = after.get(name) or before[name], before.get(name) or [None]
        return Change(name[-1], words, title, sort, was, value if name in after else None)

    changes = [change(name) for name in after if name in before]
    # A row that is there and lost its numbers is a changed status: what one side lacks is told by statuses.
    only_old, only_new = (
        sorted((change(name) for name in a if name not in b and name[-1] == "status"), key=lambda c: c.sort)
        for a, b in ((before, after), (after, before))
    )
    differences = tuple(_differences(_environments(latest_new), _environments(latest_old)))
    return Comparison(
        tuple(sorted(changes, key=lambda c: c.weight)), tuple(only_old), tuple(only_new), differences
    )


def show(comparison: Comparison, console: Console) -> None:
    """Print the differences of the machines, then the changes, then what only one side has."""
    for text in comparison.differences:
        console.print(f"[yellow]differs:[/] {text}", highlight=False)
    if not comparison.differences and comparison.changes:
        console.print("same machine, versions and commit", highlight=False)
    changed = [change for change in comparison.changes if change.beyond]
    within = [change for change in comparison.changes if change.percent and not change.beyond]
    table = Table("what", "contender", "old", "new", "change", "", title="changes, biggest first")
    for change in (*changed, *within[:SHOWN_WITHIN]):
        percent = "" if change.percent is None else f"{change.percent:+.1f} %"
        cells = change.text(change.old), change.text(change.new), percent, change.verdict
        table.add_row(change.what, change.title, *cells, style=STYLES.get(change.verdict.split(",")[0]))
    if table.rows:
        console.print(table)
    if len(within) > SHOWN_WITHIN:
        console.print(f"and {len(within) - SHOWN_WITHIN} smaller changes within the spread", highlight=False)
    statuses = sum(change.kind == "status" for change in comparison.changes)
    console.print(
        f"compared: {len(comparison.changes) - statuses} values and {statuses} statuses; {len(changed)} "
        "changed, ratios and times beyond the spread",
        highlight=False,
    )
    for words, only in (("old", comparison.only_old), ("new", comparison.only_new)):
        if only:
            console.print(f"only in the {words} results:", highlight=False)
            for line in dict.fromkeys(f"  {change.what}: {change.title}" for change in only):
                console.print(line, highlight=False, soft_wrap=True, markup=False)


def _values(records: Iterable[Record]) -> Iterator[tuple]:
    """Yield everything that can be compared: (name, words, title, sort, value). The name is equal in both
    sets, and ends with what kind of value it is.
    """
    for record in (record for record in records if record["kind"] in MEASURED):
        titles, device = titles_of(record), device_of(record)
        timed = record["kind"] == "time"
        label = label_of({"label": record["key"] if timed else f"{record['kind']} {record['case']['label']}"})
        for row in record["rows"]:
            title, part = full_title(row, titles), row.get("part")
            found = [("status", part, None, status(row))]
            if status(row) == "ok":
                named = row.get("ratios") or {} if timed else ()
                found += [
                    ("ratio", part, titles.get(baseline, baseline), value)
                    for baseline in named
                    if (value := ratio(record, row["contender"], part, baseline))
                ]
                found += [("step_ms", None, None, step) for step in [usable(row.get("step_ms"))] if step]
                found += [(name, None, None, row[name]) for name in BYTES if row.get(name) is not None]
            place = device, record["kind"], record["key"], row["contender"], bool(row.get("checkpointing"))
            for kind, of_part, baseline, value in found:
                words = kind.replace("_", " ") + (f" ({of_part})" if of_part else "")
                if kind == "ratio":
                    words = f"{of_part}: time / {baseline}"
                sort = label, title, of_part or "", baseline or "", kind
                yield (*place, of_part, baseline, kind), f"{device}: {label}, {words}", title, sort, value


def _differences(after: dict[str, dict], before: dict[str, dict]) -> Iterator[str]:
    """Say where machines, versions and commits differ, device by device."""
    for device in sorted(after.keys() & before.keys()):
        for name in dict.fromkeys((*before[device], *after[device])):
            was, now = (found[device].get(name, set()) for found in (before, after))
            if was != now:
                was, now = (" / ".join(sorted(values)) or "not there" for values in (was, now))
                yield f"{device}: {name} was {was}, now {now}"


def _environments(records: Iterable[Record]) -> dict[str, dict[str, set[str]]]:
    """Return by device what its records were measured on, each property with all its values."""
    found: dict[str, dict[str, set[str]]] = {}
    for record in records:
        now = record["_run"]["environment"]
        machine = now["machine"]
        gpu = machine.get("gpu") or {}
        about = {
            "CPU": machine.get("cpu"),
            "threads": machine.get("threads"),
            "GPU": gpu.get("name"),
            "driver": gpu.get("driver"),
            **now["versions"],
            "commit": (now.get("commit") or "unknown")[:12] + (" with changes" if now.get("dirty") else ""),
        }
        for name, value in about.items():
            if value is not None:
                found.setdefault(device_of(record), {}).setdefault(name, set()).add(str(value))
    return found
