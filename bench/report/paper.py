"""The table of docs/memory.md that stands beside the paper's claim, from bench/results/memory-paper.json."""

from __future__ import annotations

from ..run.stub import refuse_stub
from .reading import markdown, provenance

PAPER_RESULTS = "bench/results/memory-paper.json"
GIB = 2**30
# Total memory, LoRA over LoRA-FA: arXiv 2308.03303, version 1, as reviews quote its tables.
OF_THE_PAPER = {"RoBERTa-large": "22.5 / 15.7 GB: 1.43", "T5-base": "32.1 / 25.3 GB: 1.27"}
CLAIM = "up to 1.4"
TITLES = {
    "peft": "LoRA, PEFT's default",
    "lora": "LoRA, model's dtype",
    "lorafa-plain": "LoRA-FA, plain PyTorch",
    "lorafa": "LoRA-FA, this library",
}


def paper_table(result: dict) -> str:
    """Return two tables: totals by method, without and with dropout, and the ratios beside the paper's."""
    refuse_stub(result, PAPER_RESULTS)
    rows = result["rows"]
    sizes = [f"{row['name']}, {row['setting']['batch']} × {row['setting']['sequence']}" for row in rows]
    setting = rows[0]["setting"]
    source = provenance(
        PAPER_RESULTS, result["machine"], result["date"], result["versions"], result["commit"]
    )
    note = (
        f"Planned, not measured: total GiB at the peak of a step (batch × sequence), {setting['dtype']}, "
        f"rank {setting['rank']}, all linear layers, {setting['optimizer']}, CUDA's rules, not checked on a "
        f"GPU. {source} `python -m bench.memory_paper`."
    )
    chunks = [note]
    for variant in (None, "dropout"):
        name = f"dropout {setting['dropout']:g}" if variant else "no dropout"
        chunks.append(markdown([f"GiB, {name}", *sizes], _totals(rows, variant)))
        chunks.append(markdown([f"LoRA / LoRA-FA, {name}", *sizes], _ratios(rows, variant)))
    return "\n\n".join(chunks)


def _total(row: dict, method: str, variant: str | None) -> int:
    found = row["methods"][method]
    return (found["variants"][variant] if variant else found)["total_bytes"]


def _totals(rows: list[dict], variant: str | None) -> list[list[str]]:
    return [
        [title, *(f"{_total(row, key, variant) / GIB:.2f}" for row in rows)] for key, title in TITLES.items()
    ]


def _ratios(rows: list[dict], variant: str | None) -> list[list[str]]:
    found = []
    for key in ("peft", "lora"):
        for other in ("lorafa-plain", "lorafa"):
            ratios = (_total(row, key, variant) / _total(row, other, variant) for row in rows)
            found.append([f"{TITLES[key]} / {TITLES[other]}", *(f"{ratio:.2f}" for ratio in ratios)])
    paper = [OF_THE_PAPER.get(row["name"], CLAIM) for row in rows]
    return [*found, ["the paper's LoRA / LoRA-FA", *paper]]
