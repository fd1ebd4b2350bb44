"""The models of the paper's memory claim (LoRA-FA, arXiv 2308.03303: up to 1.4 times less than LoRA) and what
a step of each takes by the memory planner: no GPU, no weights.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafa_kernels.memory.plan import plan_memory

# Model, batch, sequence. What we have read of the paper gives memory without these sizes.
CASES = (("RoBERTa-large", 64, 128), ("T5-base", 64, 128), ("LLaMA-7B", 4, 1024))
METHODS = ("peft", "lora", "lorafa-plain", "lorafa")
RANK, DROPOUT = 16, 0.05


def paper_memory(told: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Return one row a model, as JSON types: Plan.as_record(), with the model's name."""
    rows = []
    for model, batch, sequence in CASES:
        plan = plan_memory(
            model,
            batch=batch,
            sequence=sequence,
            rank=RANK,
            dropout=DROPOUT,
            methods=METHODS,
            told=lambda text, model=model: told(f"{model}: {text}"),
        )
        rows.append({"name": model, **plan.as_record()})
    return rows
