"""The tables of docs/memory.md: what the records say, and no number from a red row."""

from __future__ import annotations

import json
from pathlib import Path

from bench.measure import memory, models
from bench.report import families
from bench.run.store import parse

UNIT = 1000
ABOUT = {
    "machine": {"cpu": "Chip", "threads": 2, "gpu": None},
    "versions": {"torch": "2.13.0"},
    "commit": "c" * 40,
    "dirty": False,
}


def row(contender: str, kept: float, **values) -> dict:
    parts = {"input": UNIT, "shared": 50 * UNIT, "rest": round((kept - 1) * UNIT)}
    node = {"LoRAFALinearGroupFunctionBackward": UNIT, "RMSNormFunctionBackward": round((kept - 1) * UNIT)}
    return {
        "contender": contender,
        "checkpointing": False,
        "status": "ok",
        "reason": None,
        "errors": {},
        "parts": parts,
        "by_node": node,
        **values,
    }


def records(**changed) -> list[dict]:
    """All layers, of which the n-th keeps n more than the first; changed: values of a contender's rows."""
    lines = [
        {"kind": "run", "run": "r", "date": "2026-11-24", "identity": "i", "grid": "quick", "command": "c"}
        | {"environment": ABOUT}
    ]
    for number, case in enumerate(memory.FAMILIES.values()):
        rows = [
            row(key, kept + number, **changed.get(key.replace("-", "_"), {}))
            for key, kept in (("lorafa", 11.5), ("eager-lora", 20.75), ("peft-lora", 33.25))
        ]
        lines.append({"kind": "memory", "scope": "family", "key": f"family {case.label}", "rows": rows})
        lines[-1] |= {"run": "r", "date": "2026-11-24", "case": case.as_record(), "unit_bytes": UNIT}
    found, warnings = parse("\n".join(map(json.dumps, lines)), Path("memory.jsonl"))
    assert not warnings
    return found


def test_readme_s_table_is_a_part_of_it():
    ours, theirs = families.kept_table(records()), families.memory_table(records())
    header, _, *rows = [line.split(" | ") for line in ours.splitlines() if line.startswith("|")]
    assert [name.strip(" |") for name in header[1:]] == [
        "Llama MHA",
        "Llama GQA 8:2",
        "Qwen3",
        "Gemma2",
        "RoBERTa",
        "T5",
    ]
    lines = {row[0]: row[1].strip(" |") for row in rows}
    assert lines["| lorafa_kernels"] == "11.50" and lines["| eager LoRA"] == "20.75"
    assert all(f"{name} | {number} |" in theirs for name, number in lines.items() if number != "–")
    assert families.kept_table([]) == families.NOTHING


def test_every_layer_has_its_column_without_what_is_shared():
    table = families.memory_table(records())
    llama, others = table.split("### Other families")
    (ours,) = (line for line in llama.splitlines() if line.startswith("| lorafa_kernels |"))
    assert ours == "| lorafa_kernels | 11.50 | 12.50 | 13.50 | 14.50 |"
    assert "|  | Llama MHA | Llama MHA, padding mask | Llama GQA 8:2 | Llama GQA 8:2, padding mask |" in llama
    for name in ("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi-3", "BERT", "RoBERTa", "T5"):
        assert f"| {name} |" in others
    assert "| Gemma2 | 512 | 2048 | 2 | 1 | 2×256 | 8 | bf16 | eager |" in others
    assert "From `memory.jsonl`: Chip, 2 threads; 2026-11-24; torch 2.13.0; commit cccccccccccc" in table
    assert "Without a number" not in table


def test_what_is_kept_by_name_is_of_the_first_layer():
    table = families.memory_table(records()).split("by name")[1]
    assert "- q, k and v projections: z of each: 1.000" in table
    assert "- norms: their inputs, and 1/rms in fp32: 10.50" in table
    assert "- together: 11.50" in table
    failed = families.memory_table(records(lorafa={"status": "failed", "reason": "raised"}))
    assert "by name" not in failed


def test_a_red_row_has_no_number_and_a_reason():
    wrong = {"errors": {"dB": {"error": None, "allowed": 1e-3, "kept": False}}}
    missing = {"status": "not run", "reason": "peft is not installed"}
    table = families.memory_table(records(eager_lora=wrong, peft_lora=missing))
    assert "20.75" not in table and "33.25" not in table
    assert "| eager LoRA | failed | failed | failed | failed |" in table
    assert "- PEFT LoRA, fp32 adapters (default): not run: peft is not installed. In: Llama MHA, " in table


def test_without_records_it_says_so():
    assert families.memory_table([]) == "Not measured yet."
    assert families.memory_table(records()[:1]) == "Not measured yet."


def test_every_family_of_models_is_measured():
    kinds = {models.size_of(case.model).kind for case in memory.FAMILIES.values()}
    assert kinds == set(models.FAMILIES)
    for case in memory.FAMILIES.values():
        size = models.size_of(case.model)
        assert case.sequence == size.hidden // 2 and case.rank == size.hidden // 64
