"""Result files: JSON lines, one finished measurement a line, so that a run that is cut keeps what it has.

A run begins with a line of kind "run", which says machine, date, versions and commit, and ends with one of
kind "end". Every other line names its run and has a key that is the same for the same measurement in every
run. A line of kind "begin" stands before each measurement, so that one which takes the process along can be
told.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .environment import ROOT
from .shell import Lines

RESULTS = ROOT / "bench" / "results"
MEASURED = ("time", "memory", "training")
# Grids of files that are no benchmark, and have a report of their own.
STUDIES = ("quality",)


class Store(Lines):
    """Appends the records of one run to a file; each line is written whole, in one call, and synced. stub:
    every line says that it was made through the stub driver.
    """

    def __init__(self, path: Path, run: str | None = None, stub: bool = False):
        self.file, self.stub = path, stub
        self.run = run or uuid.uuid4().hex[:12]


def parse(text: str, name: Path | str) -> tuple[list[dict], list[str]]:
    """Return the records of a result file's text, and warnings about lines that are skipped.

    A record gets "_run" (the record of its run), "_file" and "_line" (its text). Skipped: lines that are no
    record, such as one that was cut, and records whose run is not described.
    """
    found, warnings, runs = [], [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            warnings.append(f"{name}, line {number}: damaged, skipped")
            continue
        if record["kind"] == "run":
            runs[record["run"]] = record
        if record["run"] not in runs:
            warnings.append(f"{name}, line {number}: its run is not described, skipped")
            continue
        found.append({**record, "_run": runs[record["run"]], "_file": Path(name), "_line": line})
    return found, warnings


def _is_record(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    kind = record.get("kind")
    texts = ["kind", "run", "date", *(["identity", "grid", "command"] if kind == "run" else [])]
    texts += ["key"] if "rows" in record or kind in ("begin", "sitting", *MEASURED) else []
    if not all(isinstance(record.get(name), str) for name in texts):
        return False
    if kind == "run":
        about = record.get("environment")
        parts = [about.get(name) for name in ("machine", "versions")] if isinstance(about, dict) else [None]
        return all(isinstance(part, dict) for part in parts)
    if kind in ("sitting", *MEASURED) or "rows" in record:
        rows = record.get("rows")
        return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return True


def read(path: Path) -> tuple[list[dict], list[str]]:
    """Return records and warnings of one file (parse); of a missing one, none."""
    if not path.exists():
        return [], []
    return parse(path.read_text(encoding="utf-8", errors="replace"), path)


def load(root: Path = RESULTS) -> tuple[list[dict], list[str]]:
    """Return records and warnings of all result files below `root` but those of STUDIES, oldest record
    first.
    """
    found, warnings = [], []
    for path in sorted(root.rglob("*.jsonl")):
        records, of_file = read(path)
        found += [record for record in records if record["_run"].get("grid") not in STUDIES]
        warnings += of_file
    return sorted(found, key=lambda record: record["date"]), warnings


@dataclass(frozen=True)
class History:
    """What earlier calls left: the records by key, the keys of what broke or took its call along (suspect),
    the run to go on with, and of measurements in several sittings those that there were (sat).
    """

    records: dict[str, dict]
    suspect: frozenset[str]
    run: str | None = None
    sat: dict[str, dict] = field(default_factory=dict)

    def has(self, key: str, contenders: Iterable[str], rounds: int) -> bool:
        """Whether this was measured with all these contenders and at least so many rounds, and need not be
        again.
        """
        record = self.records.get(key)
        return _has_all(record, contenders) and record.get("rounds", rounds) >= rounds

    def partial(self, key: str, contenders: Iterable[str]) -> dict | None:
        """Return the record of the sittings that there were with all these contenders, or None."""
        record = self.sat.get(key)
        return record if _has_all(record, contenders) else None


def _has_all(record: dict | None, contenders: Iterable[str]) -> bool:
    if record is None or record.get("retry"):
        return False
    there = {row.get("contender") for row in record["rows"] if not row.get("left_out")}
    return set(contenders) <= there


def history(records: Iterable[dict], identity: str, grid: str | None = None) -> History:
    """Return the history of this identity; with a grid, only of its last run, and only if that was not
    completed.
    """
    # The stages of bench.gpu read results where PyTorch may be broken.
    from .sittings import merged

    own = [record for record in records if record["_run"]["identity"] == identity]
    run = None
    if grid is not None:
        runs = [record["run"] for record in own if record["kind"] == "run" and record["grid"] == grid]
        run = runs[-1] if runs else None
        own = [record for record in own if record["run"] == run]
        if any(record["kind"] == "end" and record["stopped"] == "complete" for record in own):
            return History({}, frozenset())
    measured: dict[str, dict] = {}
    begun: dict[str, str] = {}
    sat: dict[str, dict] = {}
    suspect = set()
    for record in own:
        kind, now = record["kind"], record["run"]
        if kind in ("run", "begin") and now in begun:
            suspect.add(begun.pop(now))
        if kind == "begin":
            begun[now] = record["key"]
        elif kind != "run":
            begun.pop(now, None)
        if kind == "sitting":
            before = sat.get(record["key"])
            sat[record["key"]] = merged(before, record) if before else {**record, "sittings": 1}
        elif "rows" in record:
            measured[record["key"]] = record
            sat.pop(record["key"], None)
            if "sittings" in record:
                sat[record["key"]] = record
            (suspect.add if record.get("retry") else suspect.discard)(record["key"])
    return History(measured, frozenset(suspect | set(begun.values())), run, sat)
