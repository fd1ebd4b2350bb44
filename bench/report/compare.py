"""What changed between two sets of results, and whether it is beyond the spread.

    load_old(source, root)     the results of a revision, or of a file
    compare(new, old)          every measurement that both have, and what only one has
    show(comparison, console)  machine and versions first, then the biggest changes first

Times are compared as ratios to a baseline of their own run, so that two days of one machine can be compared.
A change is beyond the spread if the intervals p20–p80 do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..run.environment import ROOT
from ..run.shell import git
from ..run.store import RESULTS, parse
from .reading import Record, device_of, full_title, label_of, newest, ratio, size, status, titles_of, usable

SHOWN_WITHIN = 20
BYTES = ("saved_bytes", "peak_allocated_bytes", "forward_temporary_bytes", "backward_temporary_bytes")


@dataclass(frozen=True)
class Name:
    """What was measured: equal in both sets."""

    device: str
    kind: str
    key: str
    contender: str
    part: str | None = None
    baseline: str | None = None
    what: str = "ratio"
    checkpointing: bool = False


@dataclass(frozen=True)
class Change:
    """One measurement in both sets, or in one of them (`old` or `new` is then None).

    old, new: a ratio or a time in ms with its spread, a number of bytes, or a status. percent: new / old − 1.
    beyond: whether the change is beyond the spread (bytes and statuses: whether they differ at all).
    """

    name: Name
    label: str
    title: str
    old: dict | int | str | None
    new: dict | int | str | None
    percent: float | None = None
    beyond: bool = False


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
    latest_new, latest_old = newest(new), newest(old)
    after, before = _values(latest_new.values()), _values(latest_old.values())
    changes = [
        _change(name, after[name].label, after[name].title, before[name].new, after[name].new)
        for name in after
        if name in before
    ]
    return Comparison(
        tuple(sorted(changes, key=_weight)),
        _missing({name: change for name, change in before.items() if name not in after}, old=True),
        _missing({name: change for name, change in after.items() if name not in before}, old=False),
        tuple(_differences(latest_new.values(), latest_old.values())),
    )


def show(comparison: Comparison, console: Console) -> None:
    """Print the differences of the machines, then the changes, then what only one side has."""
    for text in comparison.differences:
        console.print(f"[yellow]differs:[/] {text}", highlight=False)
    if not comparison.differences and comparison.changes:
        console.print("same machine, versions and commit", highlight=False)
    changed = [change for change in comparison.changes if change.beyond]
    within = [change for change in comparison.changes if change.percent and not change.beyond]
    changed += within[:SHOWN_WITHIN]
    table = Table("what", "contender", "old", "new", "change", "", title="changes, biggest first")
    for change in changed:
        percent = "" if change.percent is None else f"{change.percent:+.1f} %"
        words = _verdict(change)
        style = {"worse": "red", "better": "green", "failed": "red"}.get(words.split(",")[0])
        values = (_text(change, change.old), _text(change, change.new))
        table.add_row(describe(change), change.title, *values, percent, words, style=style)
    if changed:
        console.print(table)
    if len(within) > SHOWN_WITHIN:
        console.print(f"and {len(within) - SHOWN_WITHIN} smaller changes within the spread", highlight=False)
    statuses = sum(change.name.what == "status" for change in comparison.changes)
    beyond = sum(change.beyond for change in comparison.changes)
    console.print(
        f"compared: {len(comparison.changes) - statuses} values and {statuses} statuses; {beyond} changed, "
        "ratios and times beyond the spread",
        highlight=False,
    )
    for words, only in (("old", comparison.only_old), ("new", comparison.only_new)):
        if only:
            console.print(f"only in the {words} results:", highlight=False)
            for line in dict.fromkeys(f"  {describe(change)}: {change.title}" for change in only):
                console.print(line, highlight=False, soft_wrap=True, markup=False)


def describe(change: Change) -> str:
    """Say what was measured, in a few words."""
    name = change.name
    words = [f"{name.device}: {change.label}"]
    if name.what == "ratio":
        words.append(f"{name.part}: time / {name.baseline}")
    else:
        words.append(name.what.replace("_", " ") + (f" ({name.part})" if name.part else ""))
    return ", ".join(words)


def _values(records: Iterable[Record]) -> dict[Name, Change]:
    """Return everything that can be compared, as changes with `new` alone."""
    found: dict[Name, Change] = {}
    for record in records:
        if record["kind"] not in ("time", "memory", "training"):
            continue
        titles = titles_of(record)
        place = (device_of(record), record["kind"], record["key"])
        words = record["key"] if record["kind"] == "time" else f"{record['kind']} {record['case']['label']}"
        for row in record["rows"]:

            def add(value, row=row, words=words, place=place, titles=titles, **rest) -> None:
                name = Name(*place, row["contender"], checkpointing=bool(row.get("checkpointing")), **rest)
                text = label_of({"label": words})
                found[name] = Change(name, text, full_title(row, titles), None, value)

            add(status(row), part=row.get("part"), what="status")
            if status(row) != "ok":
                continue
            if record["kind"] == "time":
                for baseline in row.get("ratios") or {}:
                    if value := ratio(record, row["contender"], row["part"], baseline):
                        add(value, part=row["part"], baseline=titles.get(baseline, baseline))
            if step := usable(row.get("step_ms")):
                add(step, what="step_ms")
            for name in BYTES:
                if row.get(name) is not None:
                    add(row[name], what=name)
    return found


def _change(name: Name, label: str, title: str, old, new) -> Change:
    percent, beyond = None, old != new
    if isinstance(old, dict):
        percent = 100 * (new["median"] / old["median"] - 1)
        beyond = new["p20"] > old["p80"] or new["p80"] < old["p20"]
    elif isinstance(old, int):
        percent = 100 * (new / old - 1) if old else (0.0 if new == old else math.inf)
    return Change(name, label, title, old, new, percent, beyond)


def _weight(change: Change) -> tuple:
    """Changed statuses first, then what is beyond the spread, then by size."""
    is_status = change.name.what == "status"
    return (
        not (is_status and change.beyond),
        not change.beyond,
        -abs(change.percent or 0),
        change.label,
        change.title,
        change.name.part or "",
        change.name.baseline or "",
        change.name.what,
    )


def _missing(values: dict[Name, Change], old: bool) -> tuple[Change, ...]:
    """Rows that one side lacks. A row that is there and lost its numbers is a changed status instead."""
    rows = [change for name, change in values.items() if name.what == "status"]
    return tuple(replace(row, old=row.new, new=None) if old else row for row in sorted(rows, key=_weight))


def _differences(new: Iterable[Record], old: Iterable[Record]) -> list[str]:
    """Say where machines, versions and commits differ, device by device."""
    after, before = _environments(new), _environments(old)
    lines = []
    for device in sorted(after.keys() & before.keys()):
        for name in dict.fromkeys((*before[device], *after[device])):
            was, now = before[device].get(name, set()), after[device].get(name, set())
            if was != now:
                lines.append(f"{device}: {name} was {_joined(was)}, now {_joined(now)}")
    return lines


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


def _joined(values: Sequence[str]) -> str:
    return " / ".join(sorted(values)) or "not there"


def _verdict(change: Change) -> str:
    if change.name.what == "status":
        return {"ok": "better", "failed": "failed"}.get(change.new, "changed")
    direction = "worse" if change.percent > 0 else "better"
    if isinstance(change.new, dict):
        return f"{direction}, beyond the spread" if change.beyond else "within the spread"
    return direction


def _text(change: Change, value: dict | int | str | None) -> str:
    if isinstance(value, dict):
        digits = 2 if change.name.what == "ratio" else 1
        digits = digits + 1 if value["median"] < 10 else digits
        return "{median:.{d}f} ({p20:.{d}f}–{p80:.{d}f})".format(d=digits, **value)
    return size(value) if isinstance(value, int) else str(value)
