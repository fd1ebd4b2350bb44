"""Checkpoints that survive a kill at any moment, by torch.distributed.checkpoint (DCP).

    FOLDER/step-00000040/progress.json     step, position in the text, losses, schedule, options
    FOLDER/step-00000040/*.distcp, .metadata   DCP: adapter, optimizer, each process's random state

One is written under another name, `.step-00000040.part`, and renamed when all of it is on disk. Thus whatever
has the name is complete. One that is removed is renamed first, too. DCP reads shards of any number of
processes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from examples import DemoError
from examples.llama.processes import Processes

KEPT = 2
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far training has come. position: rows of the text that it has seen; evaluations: [step, loss]."""

    step: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)


@dataclass
class State:
    """What a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    progress: Progress


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def options_of(checkpoint: Path) -> dict[str, Any]:
    """The options that a checkpoint was written under."""
    return json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))["options"]


def save(state: State, folder: Path, options: dict[str, Any], processes: Processes) -> None:
    """Write a checkpoint of `state`, and remove all but the newest KEPT. All processes call this.

    Raises OSError or DemoError if it cannot be written; those before are as they were.
    """
    final = folder / f"step-{state.progress.step:08d}"
    aside = folder / f".{final.name}.part"
    if processes.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.wait()
    with _quiet("written"):
        dcp.save(_tensors(state, processes), checkpoint_id=aside, no_dist=not processes.together)
    if processes.first:
        content = {**asdict(state.progress), "schedule": state.schedule.state_dict(), "options": options}
        with open(aside / _PROGRESS, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(aside)
        aside.rename(final)
        _sync(folder)
        for old in _complete(folder)[:-KEPT]:
            _remove(old)
    processes.wait()


def load(state: State, checkpoint: Path, processes: Processes) -> bool:
    """Read a checkpoint into `state`, all processes together. Returns whether this process's random state was
    in it, as it is when as many processes wrote it; if not, that stays as it is.
    """
    reader = dcp.FileSystemReader(checkpoint)
    known = reader.read_metadata().state_dict_metadata
    tensors = _tensors(state, processes)
    mine = tensors["random"]
    found = all(f"random.{name}" in known for name in mine)
    if not found:
        del tensors["random"]
    with _quiet("read"):
        dcp.load(tensors, storage_reader=reader, no_dist=not processes.together)
    set_optimizer_state_dict(state.model, state.optimizer, tensors["optimizer"])
    if found:
        _set_random(mine)
    content = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
    state.schedule.load_state_dict(content["schedule"])
    state.progress = Progress(**{name: content[name] for name in asdict(state.progress)})
    return found


def clear(folder: Path) -> None:
    """Remove what runs that were killed have left half written or half removed."""
    for left in folder.glob(".step-*.part"):
        shutil.rmtree(left, ignore_errors=True)


def _tensors(state: State, processes: Processes) -> dict[str, Any]:
    adapter = {
        name: parameter.detach()
        for name, parameter in state.model.named_parameters()
        if name.endswith(("lora_A", "lora_B"))
    }
    random = {f"{processes.rank}.cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        random[f"{processes.rank}.cuda"] = torch.cuda.get_rng_state()
    # Makes the moments where there are none yet, so that there is something to load into.
    optimizer = get_optimizer_state_dict(state.model, state.optimizer)
    return {"adapter": adapter, "optimizer": optimizer, "random": random}


def _set_random(states: dict[str, Tensor]) -> None:
    for name, value in states.items():
        if name.endswith(".cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)


@contextmanager
def _quiet(done: str) -> Iterator[None]:
    """Without DCP's warning that one process saves and loads alone, which is meant; its error in a line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise DemoError(f"the checkpoint cannot be {done}: process {rank}: {cause}") from error


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _remove(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f".{checkpoint.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
