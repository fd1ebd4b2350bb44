"""The study's result file: JSON lines, as bench/run/store.py has them; a line for each finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..run.store import RESULTS, Store, read
from .plan import choosing_task, sizes_hash
from .settings import METHODS, SIZES, SWEEP_TASK, TASKS, Task

FILE = RESULTS / "quality.jsonl"
RUN, TASK, MEMORY = "fine-tuning", "quality-task", "quality-memory"


def describe(store: Store, about: dict) -> None:
    """Begin a call's lines: machine, versions, commit, and the settings of all its runs."""
    store.write(
        "run",
        identity="quality-" + "-".join(sizes_hash(task) for task in TASKS),
        grid="quality",
        command="python -m bench quality",
        environment=about,
        learning_rates={method.key: method.rates for method in METHODS.values()},
        chosen_on={task: choosing_task(task) for task in TASKS},
        sizes={name: vars(sizes) for name, sizes in SIZES.items()},
    )


def describe_task(store: Store, task: Task, about: dict, before: dict, items: int) -> None:
    """Say what a task's model was before adaptation: its scores, or the share of the more frequent label."""
    key = f"{task.key}/{sizes_hash(task.key)}"
    if key not in {record["key"] for record in read(store.file)[0] if record["kind"] == TASK}:
        store.write(TASK, key=key, task=task.key, items=items, pretraining=about, before=before)


def describe_memory(store: Store, measure: Callable[[], list[dict]]) -> None:
    """Say once a file what a step keeps (memory.py)."""
    if memory(store.file) is None:
        store.write(MEMORY, key=sizes_hash(SWEEP_TASK), cases=measure())


def memory(path: Path) -> dict | None:
    """Return the line of describe_memory for the present settings, or None."""
    lines = [r for r in read(path)[0] if r["kind"] == MEMORY and r["key"] == sizes_hash(SWEEP_TASK)]
    return lines[0] if lines else None


def finished(path: Path) -> dict[str, dict]:
    """Return the finished runs of a result file by key, the first one of each: none replaces another."""
    found: dict[str, dict] = {}
    for record in read(path)[0]:
        if record["kind"] == RUN:
            found.setdefault(record["key"], record)
    return found


def tasks(path: Path) -> dict[str, dict]:
    """Return what is said of each task, by its name, for the present settings."""
    keys = {f"{task}/{sizes_hash(task)}" for task in TASKS}
    return {r["task"]: r for r in read(path)[0] if r["kind"] == TASK and r["key"] in keys}
