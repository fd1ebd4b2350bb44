"""A plan as text: the answer, one table with the totals, and of what they consist."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .corrections import CUDA, UNCHECKED
from .plan import BOTH, CHECKPOINTING, DROPOUT, PLAIN, Plan, Row
from .trace import INPUTS, KINDS

GIB = 2**30
WIDTH = 110
_OURS, _LORA = "lorafa", "lora"


def answer(plan: Plan) -> str:
    """Return what a user asks first: what fits, or what is saved."""
    ours, lora = plan.rows.get(_OURS), plan.rows.get(_LORA)
    if plan.memory is not None:
        named = [("LoRA batch", lora), ("LoRA-FA here", ours)]
        parts = [f"{name} {row.batches[PLAIN]}" for name, row in named if row]
        parts = parts or [f"{row.method.title} batch {row.batches[PLAIN]}" for row in plan.rows.values()]
        return f"fits in {plan.memory / GIB:g} GiB: {', '.join(parts)}"
    if ours and lora:
        before, now = (row.variants[PLAIN].total for row in (lora, ours))
        return f"LoRA takes {_gib(before)} GiB, LoRA-FA here {_gib(now)} GiB: {_saving(before, now)}"
    return "; ".join(f"{r.method.title}: {_gib(r.variants[PLAIN].total)} GiB" for r in plan.rows.values())


def _saving(before: int, now: int) -> str:
    return f"{_gib(before - now)} GiB less, {before / now:.2f}x"


def lines_of(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    setting = plan.setting
    tokens = f" x {setting.sequence} tokens" if plan.subject.uses_sequence else " images"
    adapted = f"{len(plan.names)} layers adapted, rank {setting.rank}"
    trained = setting.adapter_dtype or setting.dtype
    lines = [
        answer(plan),
        "",
        f"model: {plan.subject.title}",
        f"step: {setting.batch}{tokens}, {_dtype(setting.dtype)}, {setting.optimizer}, {adapted}",
        f"adapters that are trained: {_dtype(trained)} (LoRA in the model's dtype: {_dtype(setting.dtype)})",
        "",
        *_totals(plan),
        "",
        "Of what the total consists, GiB, without checkpointing and dropout:",
        "",
        *_consists(plan),
    ]
    if plan.memory is not None:
        lines += ["", f"Largest batch, longest sequence that fit in {plan.memory / GIB:g} GiB:", ""]
        lines += _fits(plan)
    notes = [line for note in _notes(plan) for line in textwrap.wrap(note, WIDTH)]
    return [*lines, "", *notes]


def _totals(plan: Plan) -> list[str]:
    baseline = plan.rows.get(_LORA)
    header = ["GiB at the peak", "total", "kept", "less than LoRA", "checkpointing"]
    drops = any(DROPOUT in row.variants for row in plan.rows.values())
    if drops:
        header += [f"dropout {plan.dropout:g}", "both"]
    rows = [header]
    for row in plan.rows.values():
        plain = row.variants[PLAIN]
        saved = "-"
        if baseline and row is not baseline:
            before = baseline.variants[PLAIN].total
            saved = f"{_gib(before - plain.total)} ({before / plain.total:.2f}x)"
        cells = [row.method.title, _gib(plain.total), _gib(plain.kept), saved, _total(row, CHECKPOINTING)]
        if drops:
            cells += [_total(row, DROPOUT), _total(row, BOTH)]
        rows.append(cells)
    return _aligned(rows)


def _total(row: Row, variant: str) -> str:
    return _gib(row.variants[variant].total) if variant in row.variants else "-"


def _consists(plan: Plan) -> list[str]:
    kinds = [kind for kind in KINDS if kind != INPUTS]
    short = {"kept activations": "kept", "logits and loss": "logits, loss"}
    rows = [["", *(short.get(kind, kind) for kind in kinds)]]
    for row in plan.rows.values():
        found = row.variants[PLAIN].kinds
        rows.append([row.method.title, *(_gib(found.get(kind, 0)) for kind in kinds)])
    return _aligned(rows)


def _fits(plan: Plan) -> list[str]:
    columns = [v for v in (PLAIN, CHECKPOINTING) if any(v in row.batches for row in plan.rows.values())]
    setting = plan.setting
    header = [""]
    for variant in columns:
        with_it = "" if variant == PLAIN else f", {variant}"
        header.append(f"batch{with_it}")
        if plan.subject.uses_sequence:
            header.append(f"sequence{with_it}")
    rows = [header]
    for row in plan.rows.values():
        cells = [row.method.title]
        for variant in columns:
            cells.append(str(row.batches.get(variant, "-")))
            if plan.subject.uses_sequence:
                cells.append(str(row.sequences.get(variant, "-")))
        rows.append(cells)
    note = f"(batches of sequence {setting.sequence}; sequences of batch {setting.batch})"
    return [*_aligned(rows), *([note] if plan.subject.uses_sequence else [])]


def _notes(plan: Plan) -> list[str]:
    setting = plan.setting
    notes = [
        "total: the most that is allocated in a step, of what is listed; kept: what forward keeps for "
        "backward.",
    ]
    if setting.device == "cuda":
        about = ", ".join(entry.subject for entry in CUDA if entry.checked == UNCHECKED)
        notes.append(f"CUDA's rules ({about}) are {UNCHECKED}. Fragmentation comes on top.")
    else:
        notes.append("A CPU's rules, with as many threads as torch has here.")
    if setting.devices > 1:
        notes.append(
            f"{setting.devices} devices share weights, adapters, gradients and states; two layers are whole "
            "at a time."
        )
    if not plan.subject.uses_sequence:
        notes.append("The sequence does not matter for images.")
    return notes


def _dtype(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(size: int) -> str:
    # Small models need more digits.
    return f"{size / GIB:.2f}" if abs(size) >= GIB / 10 or size == 0 else f"{size / GIB:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
