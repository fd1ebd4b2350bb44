"""The weights that the study's own models start from: trained on one text once, then kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import texts
from .models import Model, untrained
from .settings import LLAMA, SIZES, T5, VALIDATION, Task
from .training import test, train

SEED = 0


def path_of(task: Task) -> Path:
    """Where the weights lie; another architecture, text or length of training is another file."""
    about = [task.before, asdict(SIZES[task.model]), {"llama": LLAMA, "t5": T5}[task.model], SEED]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return texts.cache_folder() / f"{task.model}-{task.before}-{digest}.safetensors"


def pretrained(task: Task, on_step: Callable[[float], None] = lambda loss: None) -> tuple[Model, dict]:
    """Return the model of a task with its weights, made now if the cache has none, and what is known of its
    training: nats of a test split of its text, parameters, steps, CPU seconds.
    """
    kind = untrained(task)
    if task.before is None:
        return kind, {}
    path = path_of(task)
    if not path.exists():
        _make(task, kind, path, on_step)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    return type(kind)(load_file(path)), about


def _make(task: Task, kind: Model, path: Path, on_step: Callable[[float], None]) -> None:
    sizes = SIZES[task.model]
    items = kind.items(task.before)
    split = texts.split(items, SEED, sizes.test, len(items) - sizes.test - VALIDATION)
    model = kind.fresh(SEED)
    losses, seconds = train(
        model,
        kind,
        split.train,
        body=list(model.parameters()),
        head=[],
        rate=sizes.pretraining_rate,
        batch=sizes.pretraining_batch,
        steps=sizes.pretraining_steps,
        seed=SEED,
        on_step=on_step,
    )
    about = {
        "text": task.before,
        "items": len(split.train),
        "steps": len(losses),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": round(seconds, 1),
        "test": asdict(test(model, kind, split.test)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    # Cloned: tied weights share a storage, which the format refuses.
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, aside, metadata={"about": json.dumps(about)})
    aside.replace(path)
