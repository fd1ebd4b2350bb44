"""The tables of docs/memory.md: what one layer of each family of models keeps for backward, in hidden states.

memory_table(records)    from the records of scope "family" (memory.FAMILIES)
kept_table(records)      README's: some of its rows and columns
"""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.memory import FAMILIES
from ..measure.models import TITLES
from ..run.environment import ROOT
from .reading import Record, Sources, arranged, markdown, newest, number, ordered, row_of, status

# What an autograd node keeps, by the start of its name; of a layer of this library's.
NODES = {
    "RMSNorm": "norms: their inputs, and 1/rms in fp32",
    "LoRAFALinearGroup": "q, k and v projections: z of each",
    "ScaledDotProduct": "attention: q, k, v, its output, logsumexp in fp32",
    "LoRAFAGatedMLP": "MLP: outputs of gate and up, z of gate, up and down",
    "LoRAFALinear": "other linear layers: z of each",
}
NOTHING = "Not measured yet."
# README's rows and columns.
SHORT_ROWS = (
    "frozen",
    "lorafa",
    "lorafa-layers",
    "eager-lorafa",
    "compiled-lorafa",
    "eager-lora",
    "peft-lora",
)
SHORT_COLUMNS = ("Llama MHA", "Llama GQA 8:2", "Qwen3", "Gemma2", "T5", "RoBERTa")


def memory_table(records: Sequence[Record]) -> str:
    """Return the tables: one of Llama layers, one of the other families, and what is kept by name."""
    measured = measured_layers(records)
    if not measured:
        return NOTHING
    llama = [record for record in measured if record["case"]["model"].startswith("Llama")]
    chunks = ["\n".join(f"- {line}" for line in Sources(measured, ROOT).lines())]
    for title, some in (("Llama", llama), ("Other families", [r for r in measured if r not in llama])):
        if some:
            chunks += [f"### {title}", table_of(some), sizes_of(some)]
    chunks += by_name(measured)
    if missing := reasons_of(measured):
        chunks.append("Without a number:\n\n" + "\n".join(f"- {line}" for line in missing))
    return "\n\n".join(chunks)


def kept_table(records: Sequence[Record]) -> str:
    """Return README's table."""
    measured = [record for record in measured_layers(records) if short(record) in SHORT_COLUMNS]
    if not measured:
        return NOTHING
    note = "In units of one hidden state (batch × sequence × hidden numbers); parameters do not count."
    rows = [[TITLES[key], *(cell(record, key) for record in measured)] for key in SHORT_ROWS]
    return (
        f"{note} {' '.join(Sources(measured, ROOT).lines())}\n\n{markdown(['', *map(short, measured)], rows)}"
    )


def measured_layers(records: Sequence[Record]) -> list[Record]:
    """The newest record of each layer, in the order of FAMILIES."""
    found = {
        r["key"]: r for r in newest(records).values() if r["kind"] == "memory" and r["scope"] == "family"
    }
    known = {f"family {case.label}": key for key, case in FAMILIES.items()}
    return [found[key] for key in known if key in found]


def table_of(records: Sequence[Record]) -> str:
    """A row for each contender, a column for each layer."""
    keys = ordered((row["contender"] for record in records for row in record["rows"]), TITLES)
    header = ["", *map(short, records)]
    return markdown(
        header, [[TITLES.get(key, key), *(cell(record, key) for record in records)] for key in keys]
    )


def short(record: Record) -> str:
    """Name a layer without its sizes."""
    name = record["case"]["model"].replace(" block", "").replace(",", "")
    text = " ".join(word for word in name.split() if not word.isdigit())
    return text + (", padding mask" if record["case"]["padding"] else "")


def units(record: Record, row: dict) -> float:
    """What a layer keeps for itself: without what all layers share."""
    return (row["parts"]["input"] + row["parts"]["rest"]) / record["unit_bytes"]


def cell(record: Record, contender: str) -> str:
    row = row_of(record, contender)
    if row is None or status(row) != "ok":
        return status(row) or "–"
    return f"{units(record, row):.2f}"


def sizes_of(records: Sequence[Record]) -> str:
    """A row of sizes for each layer."""
    header = ["", "hidden", "intermediate", "heads of q", "of k and v", "tokens", "R", "dtype", "attention"]
    names = ("hidden", "intermediate", "heads", "kv_heads", "tokens", "rank", "dtype", "attention")
    rows = []
    for record in records:
        case = record["case"] | {"tokens": "{batch}×{sequence}".format(**record["case"])}
        rows.append([short(record), *(f"{case[name]}" for name in names)])
    return markdown(header, rows)


def by_name(records: Sequence[Record]) -> list[str]:
    """What this library keeps in the first of the layers, node by node."""
    row = row_of(records[0], "lorafa")
    if status(row) != "ok":
        return []
    found: dict[str, int] = {}
    for node, kept in row["by_node"].items():
        title = next((text for start, text in NODES.items() if node.startswith(start)), node)
        found[title] = found.get(title, 0) + kept
    unit = records[0]["unit_bytes"]
    lines = [f"- {title}: {number(kept / unit, 4)}" for title, kept in found.items()]
    return [
        f"### What lorafa_kernels keeps in the layer {short(records[0])}, by name",
        "\n".join([*lines, f"- together: {number(units(records[0], row), 4)}"]),
    ]


def reasons_of(records: Sequence[Record]) -> list[str]:
    found: dict[str, list[str]] = {}
    for record in records:
        for row in arranged(record["rows"], TITLES):
            if status(row) != "ok":
                text = f"{TITLES.get(row['contender'], row['contender'])}: {status(row)}: {row['reason']}"
                found.setdefault(text, []).append(short(record))
    return [f"{text}. In: {', '.join(names)}." for text, names in found.items()]
