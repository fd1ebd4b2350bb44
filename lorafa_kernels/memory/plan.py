"""A plan: what a step of a model takes with every method, and how much fits into a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.config import LoRAFAConfig
from . import corrections
from .methods import BY_KEY, METHODS, OPTIMIZERS, Method
from .models import DTYPES, Subject, resolve
from .solve import largest
from .step import Estimate, Planner, Setting

# Sequences that fit are multiples of this.
SEQUENCE_UNIT = 64
PLAIN, CHECKPOINTING, DROPOUT, BOTH = "plain", "checkpointing", "dropout", "checkpointing+dropout"
DEVICES = ("cuda", "cpu")


@dataclass
class Row:
    """What one method takes. variants: by PLAIN, CHECKPOINTING, DROPOUT and BOTH, those that there are.
    batches, sequences: the largest that fit, by PLAIN and CHECKPOINTING, where a memory was given.
    """

    method: Method
    variants: dict[str, Estimate] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)


@dataclass
class Plan:
    """The rows by their methods' keys, and what they are for."""

    subject: Subject
    setting: Setting
    dropout: float
    memory: int | None
    names: tuple[str, ...]
    rows: dict[str, Row]

    def as_record(self) -> dict[str, Any]:
        """Return the plan as JSON types; bytes are whole numbers."""
        setting = self.setting
        return {
            "model": self.subject.title,
            "setting": {
                "batch": setting.batch,
                "sequence": setting.sequence if self.subject.uses_sequence else None,
                "rank": setting.rank,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "adapter_dtype": _name(setting.adapter_dtype or setting.dtype),
                "targets": setting.targets if isinstance(setting.targets, str) else list(setting.targets),
                "adapted_layers": len(self.names),
                "optimizer": setting.optimizer,
                "device": setting.device,
                "devices": setting.devices,
                "dropout": self.dropout,
                "memory_bytes": self.memory,
            },
            "methods": {key: _record(row) for key, row in self.rows.items()},
            "corrections": [vars(entry) for entry in corrections.CUDA] if setting.device == "cuda" else [],
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(row: Row) -> dict[str, Any]:
    found = {"title": row.method.title, **_numbers(row.variants[PLAIN])}
    found["variants"] = {name: _numbers(e) for name, e in row.variants.items() if name != PLAIN}
    if row.batches:
        found |= {"largest_batch": dict(row.batches), "longest_sequence": dict(row.sequences)}
    return found


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {
        "kept_bytes": estimate.kept,
        "peak_bytes": estimate.peak,
        "total_bytes": estimate.total,
        "fixed_bytes": estimate.fixed,
        "kinds": dict(estimate.kinds),
    }


def plan_memory(
    model: str | nn.Module | Subject,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    inputs: Callable[[nn.Module, int, int], Any] | None = None,
    *,
    batch: int = 1,
    sequence: int = 2048,
    rank: int = 16,
    dtype: str = "bf16",
    targets: str | Iterable[str] = "all-linear",
    methods: Iterable[str] | None = None,
    dropout: float = 0.05,
    padding: bool = False,
    optimizer: str = "adamw",
    adapter_dtype: str = "fp32",
    device: str = "cuda",
    devices: int = 1,
    memory: float | None = None,
    whole: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Return what a training step takes in memory with each method of fine-tuning. Nothing is computed and
    no weights are needed: the step runs on fake tensors (step.py).

    Args:
        model: a path, a name or a class as `memory MODEL` takes it; or any nn.Module, which stays as it is,
            on any device, meta included.
        step: of an nn.Module: (model, inputs) -> loss, one forward.
        inputs: of an nn.Module: (model, batch, sequence) -> what step is given; any list, dict or tuple.
        batch, sequence: of a step, on each device.
        rank: of the adapters.
        dtype: of a model by name, "bf16", "fp16" or "fp32". An nn.Module has its own.
        targets: target_modules as of LoRAFAConfig.
        methods: keys of methods.METHODS, all by default.
        dropout: of the adapters, for the variants that have one; 0: no such variants.
        padding: whether sequences have padding, and so a mask.
        optimizer: "adamw", "adamw-8bit" or "sgd".
        adapter_dtype: of what is trained, "fp32" or "model". "lora" has the model's, "peft" fp32.
        device: "cuda" or "cpu": whose rules hold.
        devices: how many share weights, gradients and states, as fully_shard of every layer does.
        memory: GiB, for the largest batch and the longest sequence that fit.
        whole: run every layer, instead of two numbers of each kind.
        told: called with a line of progress.

    Raises ValueError for an argument that is none of these, targets that match nothing (close names are
    listed) and a model that is none; step.CannotRun for a model that does not run on fake tensors, naming
    the operation; OSError for a file that cannot be read; ImportError without transformers.
    """
    for name, value in (("batch", batch), ("sequence", sequence), ("devices", devices)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r:.80}")
    chosen = _chosen(methods)
    _one_of("dtype", dtype, DTYPES)
    _one_of("optimizer", optimizer, OPTIMIZERS)
    _one_of("adapter_dtype", adapter_dtype, ("fp32", "model"))
    _one_of("device", device, DEVICES)
    if memory is not None and not 0 < memory < float("inf"):
        raise ValueError(f"memory must be a number of GiB above 0, got {memory!r:.80}")
    targets = targets if isinstance(targets, str) else tuple(targets)
    # Its checks of rank, dropout and targets.
    LoRAFAConfig(r=rank, lora_dropout=dropout, target_modules=targets)
    subject = _subject(model, step, inputs, padding)
    if subject.most_tokens is not None and sequence > subject.most_tokens:
        raise ValueError(f"sequence is {sequence}, and the model has {subject.most_tokens} positions")
    own = torch.float32 if adapter_dtype == "fp32" else None
    setting = Setting(batch, sequence, rank, DTYPES[dtype], targets, optimizer, device, own, devices=devices)
    planner = Planner(subject, setting, whole)
    planner.template()
    limit = None if memory is None else max(1, round(memory * 2**30))
    rows = {}
    for method in chosen:
        told(f"{method.title}: one step")
        row = rows[method.key] = Row(method)
        for variant, changed in _variants(subject, method, dropout):
            row.variants[variant] = planner.estimate(method, **changed)
        if limit is not None:
            told(f"{method.title}: what fits")
            _solve(planner, row, limit)
        planner.forget()
    return Plan(subject, setting, dropout, limit, planner.names, rows)


def _chosen(methods: Iterable[str] | None) -> list[Method]:
    keys = list(BY_KEY) if methods is None else list(methods)
    for key in keys:
        _one_of("method", key, BY_KEY)
    return [method for method in METHODS if method.key in keys]


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{name} is {value!r:.80}, expected one of {', '.join(known)}")


def _subject(model, step, inputs, padding: bool) -> Subject:
    if isinstance(model, Subject):
        return model
    if isinstance(model, str):
        return resolve(model, padding=padding)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a str or an nn.Module, got {type(model).__name__}")
    if step is None or inputs is None:
        raise ValueError("an nn.Module needs step(model, inputs) and inputs(model, batch, sequence)")
    checkpoints = callable(getattr(model, "gradient_checkpointing_enable", None))
    return Subject(type(model).__name__, lambda dtype: model, inputs, step, checkpoints=checkpoints)


def _variants(subject: Subject, method: Method, dropout: float) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = [(PLAIN, {})]
    drops = dropout > 0 and method.has_adapters
    if subject.checkpoints:
        found.append((CHECKPOINTING, {"checkpointing": True}))
    if drops:
        found.append((DROPOUT, {"dropout": dropout}))
    if drops and subject.checkpoints:
        found.append((BOTH, {"checkpointing": True, "dropout": dropout}))
    return found


def _solve(planner: Planner, row: Row, memory: int) -> None:
    setting, subject = planner.setting, planner.subject
    for variant in (PLAIN, CHECKPOINTING):
        if variant not in row.variants:
            continue
        checkpointing = variant == CHECKPOINTING

        def of_batch(batch: int, checkpointing: bool = checkpointing) -> int:
            return planner.estimate(row.method, checkpointing=checkpointing, batch=batch).total

        def of_sequence(sequence: int, checkpointing: bool = checkpointing) -> int:
            return planner.estimate(row.method, checkpointing=checkpointing, sequence=sequence).total

        row.batches[variant] = largest(of_batch, memory, setting.batch)
        if subject.uses_sequence:
            unit = min(SEQUENCE_UNIT, subject.most_tokens or SEQUENCE_UNIT)
            row.sequences[variant] = largest(
                of_sequence, memory, setting.sequence, unit=unit, most=subject.most_tokens
            )
