"""Make the runs that are missing, one line of the result file each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, fields

import torch

from lorafa_kernels import LoRAFAConfig

from ..run.environment import environment
from ..run.store import Store
from . import memory, records, texts
from .methods import prepare
from .models import Model
from .plan import Run, runs, whole
from .pretraining import pretrained
from .settings import CHOOSING_SEED, METHODS, SIZES, TASKS, Task
from .training import test, train

CORRECTION = "lorafa-corrected"


def possible_methods() -> tuple[str, ...]:
    """The methods that this version of the library has."""
    corrects = any(field.name == "gradient_correction" for field in fields(LoRAFAConfig))
    return tuple(method for method in METHODS if corrects or method != CORRECTION)


def run_study(path, say: Callable[[str], None], progress, limit: int | None = None) -> int:
    """Make what is missing, at most `limit` runs; return how many runs were made. progress: rich's."""
    done = records.finished(path)
    methods = possible_methods()
    store = Store(path)
    records.describe(store, environment())
    records.describe_memory(store, memory.cases)
    bar = progress.add_task("runs", total=whole(done, methods), completed=0, loss="")
    made, seen = 0, set()
    for run in runs(done, methods):
        if run.key in seen:
            continue
        seen.add(run.key)
        progress.update(bar, total=whole(done, methods), completed=len(seen) - 1)
        if run.key in done:
            continue
        if limit is not None and made >= limit:
            break
        steps = progress.add_task(f"  {run.task}, {METHODS[run.method].title}", total=None, loss="")
        record = one_run(run, store, functools.partial(_advance, progress, steps))
        progress.remove_task(steps)
        done[run.key] = record
        made += 1
        score, seconds = record["test"], record["cpu_seconds"]
        outcome = f"test {score['nats']:.4f} nats, right {score['right']:.4f}" if score else "broke"
        say(f"{len(seen)}/{whole(done, methods)} {run.key}: {outcome}, {seconds:.1f} CPU seconds")
    progress.update(bar, total=len(seen) if limit is None else None, completed=len(seen))
    return made


def _advance(progress, task: int, loss: float) -> None:
    progress.update(task, advance=1, loss=f"loss {loss:.3f}")


def one_run(run: Run, store: Store, on_step: Callable[[float], None]) -> dict:
    """Train and test once; return the line that was written."""
    task = TASKS[run.task]
    sizes = SIZES[task.model]
    kind, items = ready(task, store)
    split = texts.split(items, run.seed, sizes.test)
    model = kind.fresh(run.seed)
    how = {"rank": run.rank, "scaling": run.scaling, "targets": run.targets, "seed": run.seed}
    body, head = prepare(model, run.method, task.model, **how)
    loop = {"body": body, "head": head, "rate": run.rate, "batch": sizes.batch, "steps": sizes.steps}
    validation = tested = None
    losses: list[float] = []
    seconds = 0.0
    try:
        losses, seconds = train(model, kind, split.train, seed=run.seed, on_step=on_step, **loop)
        if run.seed == CHOOSING_SEED:
            validation = asdict(test(model, kind, split.validation))
        tested = asdict(test(model, kind, split.test))
    except FloatingPointError:
        validation = tested = None
    return store.write(
        records.RUN,
        key=run.key,
        settings=asdict(run),
        trained_parameters=sum(p.numel() for p in (*body, *head)),
        validation=validation,
        test=tested,
        losses=[round(loss, 4) for loss in losses],
        cpu_seconds=round(seconds, 2),
        threads=torch.get_num_threads(),
    )


@functools.cache
def ready(task: Task, store: Store) -> tuple[Model, list]:
    """The model of a task and its items; says once a file what it was before adaptation."""
    kind, about = pretrained(task)
    items = kind.items(task.text)
    split = texts.split(items, CHOOSING_SEED, SIZES[task.model].test)
    if about:
        before = asdict(test(kind.fresh(CHOOSING_SEED), kind, split.test))
    else:
        positive = sum(label for _, label in split.test) / len(split.test)
        before = {"nats": None, "right": max(positive, 1 - positive)}
    records.describe_task(store, task, about, before, items=len(items))
    return kind, items
