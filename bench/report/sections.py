"""The sections of a device on the performance page, as Markdown.

    device_section(device, records, sources, links, ends)    all of them

A section without records is empty or says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.cases import LLAMA_3, TARGET_RANKS, target_grid
from ..measure.contenders import FROZEN, LORAFA, OURS
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.kernels import LIBRARY
from ..measure.kernels import PARTS as KERNEL_PARTS
from ..measure.kernels import TITLES as KERNEL_TITLES
from ..measure.models import TITLES as MODEL_TITLES
from .predictions import predictions
from .reading import (
    MEASURED,
    MODES,
    PEAKS,
    SCOPES,
    TARGET_ROWS,
    Record,
    Row,
    Sources,
    arranged,
    case_order,
    cell,
    device_title,
    full_title,
    geometric_mean,
    label_of,
    listed,
    markdown,
    number,
    ordered,
    ratio,
    reason_of,
    reasons,
    row_of,
    size,
    spread,
    status,
    time_cell,
    time_of,
    title_of,
    usable,
)

PARTS = ("forward", "backward", "both")
MEMORY = ("saved_bytes", "forward_temporary_bytes", "backward_temporary_bytes")
# PyTorch's own arrangements, by which the target is judged.
ARRANGEMENTS = ("eager-lorafa", "addmm", "library")
TARGETS = {16: 0.05, 64: 0.08}
MARGIN = 0.02
# Of which contenders' losses the deviation is told.
LOSSES = (LORAFA, "peft-lorafa-16bit")
LONG_TABLE, LONG_LIST = 40, 12


def device_section(
    device: str, records: list[Record], sources: Sources, links: dict[str, str], ends: list[Record]
) -> str:
    """Everything about one device, as Markdown."""
    times = sorted((r for r in records if r["kind"] == "time"), key=case_order)
    by_mode = {mode: [r for r in times if r["mode"] == mode] for mode in MODES}
    memory = sorted((r for r in records if r["kind"] == "memory"), key=case_order)
    layers = [r for r in memory if r["scope"] == "layer"]
    blocks = [r for r in memory if r["scope"] == "block"]
    training = sorted((r for r in records if r["kind"] == "training"), key=case_order)
    others = sorted((r for r in records if r["kind"] not in MEASURED), key=lambda record: record["key"])
    everything = times + memory + training + others
    chunks = [
        ceilings_text([r for r in records if r["kind"] == "ceilings"], sources),
        tests_text([r for r in records if r["kind"] == "tests"], sources),
        target_text(by_mode["eager"]) if device != "cpu" else "",
        layer_text(by_mode["eager"], sources, links.get("overhead")),
        directions_text(by_mode["eager"], sources, links.get("roofline")),
        ours_text(by_mode["eager"], sources),
        wall_text(by_mode["wall"], sources),
        graph_text(by_mode["graph"], sources),
        host_text(by_mode["host"], sources),
        kernels_text(by_mode["kernel"], sources),
        blocks_text(by_mode["block"], sources, links.get("block-time")),
        layer_memory_text(layers, sources),
        block_memory_text(blocks, sources, links.get("blocks")),
        training_text(training, sources, links.get("training")),
        not_run_text(everything),
        failed_text(everything),
        left_text(ends, records),
    ]
    title, remark = device_title(device, records)
    head = [f"## {title}", remark, "\n".join(f"- {line}" for line in sources.lines()), sources.legend()]
    return "\n\n".join(chunk for chunk in [*head, *chunks] if chunk)


def folded(header: list[str], rows: list[list[str]]) -> str:
    """A table, folded away if it is long."""
    table = markdown(header, rows)
    if len(rows) <= LONG_TABLE:
        return table
    return f"<details><summary>{len(rows)} rows</summary>\n\n{table}\n\n</details>"


def columns(
    records: Sequence[Record], titles: dict[str, str], baseline: str | None = FROZEN
) -> tuple[list[str], str]:
    """Return the contenders that ran or failed somewhere, and a sentence naming those that ran nowhere."""
    rows = [row for record in records for row in record["rows"] if row["contender"] != baseline]
    here = ordered((row["contender"] for row in rows if status(row) != "not run"), titles)
    absent = [key for key in ordered((row["contender"] for row in rows), titles) if key not in here]
    named = listed([titles.get(key, key) for key in absent]) if absent else ""
    return here, f" Not run: {named} (reasons below)." if named else ""


def rounds_text(records: Sequence[Record]) -> str:
    counts = sorted({record["rounds"] for record in records if record.get("rounds")}) or ["no"]
    sittings = sorted({record.get("sittings") or 1 for record in records}) or [1]
    rounds, sat = (
        " to ".join(str(count) for count in dict.fromkeys((found[0], found[-1])))
        for found in (counts, sittings)
    )
    return f"{rounds} interleaved rounds" + (f" in {sat} sittings" if sittings[-1] > 1 else "")


def layer_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Forward + backward of one layer: everybody over the frozen linear."""
    if not records:
        return "### One layer, forward + backward\n\nNot measured."
    shown, absent = columns(records, LAYER_TITLES)
    predicted = {id(record): predictions(record) for record in records}
    extra = ["predicted: lorafa_kernels"] if any(predicted.values()) else []
    header = ["M×K×N", "frozen nn.Linear, ms", "floor, ms", "frozen / floor", *extra]
    rows = []
    for record in records:
        line = [sources.of(record), time_cell(record, FROZEN, "both"), *floor_cells(record, "both")]
        if extra:
            line.append(number((predicted[id(record)] or {}).get("both")))
        rows.append(line + [cell(record, key, "both") for key in shown])
    if mean := mean_row(records, shown):
        rows.append([mean[0], *[""] * (3 + len(extra)), *mean[1:]])
    note = f"Median of {rounds_text(records)} (p20–p80). Below 1 is faster than the frozen nn.Linear.{absent}"
    table = folded(header + [LAYER_TITLES.get(key, key) for key in shown], rows)
    chunks = ["### One layer, forward + backward: time / time of the frozen nn.Linear", note, table, picture]
    return "\n\n".join(chunk for chunk in chunks if chunk)


def mean_row(records: list[Record], shown: list[str]) -> list[str] | None:
    """The geometric means, of all columns over the same rows: those in which every column has a ratio.

    A column with a ratio in less than half of the rows gets no mean, and takes no rows from the others.
    """
    ratios = [{key: value for key in shown if (value := ratio(r, key, "both"))} for r in records]
    often = [key for key in shown if 2 * sum(key in row for row in ratios) >= len(ratios)]
    complete = [row for row in ratios if all(key in row for key in often)]
    if not often or len(complete) < 2:
        return None
    means = {key: geometric_mean([row[key]["median"] for row in complete]) for key in often}
    return [
        f"geometric mean of {len(complete)} rows, the same for all",
        *(f"{means[key]:.3f}" if key in means else "–" for key in shown),
    ]


def floor_cells(record: Record, part: str) -> list[str]:
    """The floor in ms, and the frozen linear's time over it."""
    floor = (record.get("floor_ms") or {}).get(part)
    frozen = time_of(record, FROZEN, part)
    return [number(floor), number(frozen["median"] / floor) if frozen and floor else "–"]


def directions_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Forward and backward by themselves, of this library only."""
    shown = [key for key in columns(records, LAYER_TITLES)[0] if key in OURS]
    if not records or not shown:
        return ""
    header, rows = ["M×K×N"], []
    for part in ("forward", "backward"):
        header += [f"{part}: frozen, ms", "frozen / floor", *(LAYER_TITLES[key] for key in shown)]
    for record in records:
        line = [sources.of(record)]
        for part in ("forward", "backward"):
            line += [time_cell(record, FROZEN, part), floor_cells(record, part)[1]]
            line += [cell(record, key, part) for key in shown]
        rows.append(line)
    note = "Forward over forward, backward over the gradient of the frozen nn.Linear's input."
    chunks = [
        "### Forward and backward separately: time / time of the frozen nn.Linear",
        note,
        folded(header, rows),
        picture,
    ]
    return "\n\n".join(chunk for chunk in chunks if chunk)


def ours_text(records: list[Record], sources: Sources) -> str:
    """lorafa_kernels over each of the others."""
    shown = [key for key in columns(records, LAYER_TITLES)[0] if key != LORAFA]
    if not records or not shown:
        return ""
    rows = [[sources.of(record), *(against(record, key) for key in shown)] for record in records]
    note = (
        "The baseline is the column's: below 1, lorafa_kernels takes less time than it. Same rounds as above."
    )
    header = ["M×K×N", *(LAYER_TITLES.get(key, key) for key in shown)]
    title = "### lorafa_kernels against the others: its time / theirs, forward + backward"
    return "\n\n".join([title, note, folded(header, rows)])


def against(record: Record, baseline: str) -> str:
    found = status(row_of(record, baseline, "both"))
    if found == "not run" and status(row_of(record, LORAFA, "both")) == "ok":
        return "not run"
    return cell(record, LORAFA, "both", baseline) if found else "–"


def graph_text(records: list[Record], sources: Sources) -> str:
    """Replayed from CUDA graphs, the baseline too."""
    return against_frozen(
        records,
        sources,
        "### In CUDA graphs, forward + backward: time / time of the frozen nn.Linear in a CUDA graph",
        "Everybody is replayed from a graph, the baseline too: median (p20–p80).",
    )


def wall_text(records: list[Record], sources: Sources) -> str:
    """What a program waits for."""
    return against_frozen(
        records,
        sources,
        "### What a program waits for, forward + backward: wall time / that of the frozen nn.Linear",
        "Many calls in a row until the last is done, the Python side included: median (p20–p80).",
    )


def against_frozen(records: list[Record], sources: Sources, title: str, note: str) -> str:
    """A table of forward + backward over the frozen linear, or why there is none."""
    if not records:
        return ""
    shown, absent = columns(records, LAYER_TITLES)
    if not shown:
        return f"{title}\n\nNot run: {reasons(records)}."
    header = ["M×K×N", "frozen nn.Linear, ms", *(LAYER_TITLES.get(key, key) for key in shown)]
    rows = [
        [sources.of(r), time_cell(r, FROZEN, "both"), *(cell(r, key, "both") for key in shown)]
        for r in records
    ]
    return "\n\n".join([title, f"{note}{absent}", folded(header, rows)])


def host_text(records: list[Record], sources: Sources) -> str:
    """The Python side's time for a call."""
    if not records:
        return ""
    shown, absent = columns(records, LAYER_TITLES, baseline=None)
    rows = []
    for record in records:
        for part in PARTS:
            if not any(row["part"] == part for row in record["rows"]):
                continue
            cells = []
            for key in shown:
                value = time_of(record, key, part)
                found = status(row_of(record, key, part))
                cells.append(spread(value, 1e3) if value else found if found not in (None, "ok") else "–")
            part_name = "forward + backward" if part == "both" else part
            rows.append([f"{sources.of(record)}, {part_name}", *cells])
    note = (
        "µs that a call takes on the host, at a shape so small that nothing else does: median (p20–p80)."
        f"{absent}"
    )
    header = ["M×K×N", *(LAYER_TITLES.get(key, key) for key in shown)]
    return "\n\n".join(["### Host time of one call, µs", note, folded(header, rows)])


def kernels_text(records: list[Record], sources: Sources) -> str:
    """Each kernel over the products of the device's library."""
    if not records:
        return ""
    title = "### Kernels by themselves: time / time of the library's products"
    if not columns(records, KERNEL_TITLES, baseline=None)[0]:
        return f"{title}\n\nNot run: {reasons(records)}."
    note = (
        "y and dx: the product with the rank-R step over the bare product. z: the product with the narrow "
        "factor over the same product. z, y: both in a row over the library plan. dz, dB: one pass over dy "
        "over two products. dz, dB, dx: the whole backward over the library plan. Median (p20–p80)."
    )
    others = [key for key in KERNEL_TITLES if key != LIBRARY]
    header = ["M×K×N", "", "library, ms", *(KERNEL_TITLES[key] for key in others)]
    rows = [
        [sources.of(r), part, time_cell(r, LIBRARY, part)]
        + [cell(r, key, part, LIBRARY) if key in keys else "" for key in others]
        for r in records
        for part, keys in KERNEL_PARTS.items()
    ]
    return "\n\n".join([title, note, folded(header, rows)])


def blocks_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Pieces of a Transformer layer: everybody over the frozen one, and lorafa_kernels over everybody."""
    if not records:
        return ""
    title = "### Blocks of a Transformer layer, forward + backward: time / time of the frozen block"
    shown, absent = columns(records, MODEL_TITLES)
    if not shown:
        return f"{title}\n\nNot run: {reasons(records)}."
    header = ["", "frozen, ms", *(MODEL_TITLES.get(key, key) for key in shown)]
    rows = [
        [sources.of(r), time_cell(r, FROZEN, "both"), *(cell(r, key, "both") for key in shown)]
        for r in records
    ]
    note = (
        f"Median of {rounds_text(records)} (p20–p80). lorafa_kernels: the projections as "
        f"one group, the MLP as one node, the layer as `apply_lorafa` leaves it.{absent}"
    )
    chunks = [title, note, folded(header, rows)]
    others = [key for key in shown if key != LORAFA]
    if LORAFA in shown and others:
        lines = [[sources.of(r), *(against(r, key) for key in others)] for r in records]
        chunks.append("lorafa_kernels against the others, its time / theirs in the same rounds:")
        chunks.append(folded(["", *(MODEL_TITLES.get(key, key) for key in others)], lines))
    return "\n\n".join([*chunks, picture] if picture else chunks)


def tests_text(records: list[Record], sources: Sources) -> str:
    """What became of the test suite in the run."""
    lines = [
        f"- {row['contender']}: {status(row)}. {row.get('reason') or ''} {sources.marks(record)}".rstrip()
        for record in sorted(records, key=lambda record: record["key"])
        for row in record["rows"]
    ]
    return "### Tests\n\n" + "\n".join(lines) if lines else ""


def ceilings_text(records: list[Record], sources: Sources) -> str:
    """The rates that the machine reached in the run."""
    rows = []
    for record in sorted(records, key=lambda record: record["key"]):
        for row in record["rows"]:
            marks = sources.marks(record).strip()
            if row["what"] == "product":
                what = f"product {'×'.join(f'{n}' for n in row['size'])} {row['dtype']}, TFLOP/s"
                rates = row["tflops"]
            else:
                what = f"copy of {size(row['bytes'])}, GB/s read and written"
                rates = row["gb_per_s"]
            found = usable(rates)
            rows.append([f"{what} {marks}".strip(), spread(found) if found else "–"])
    if not rows:
        return "### Ceilings\n\nNot measured."
    table = markdown(["through PyTorch, random data", "median (p20–p80)"], rows)
    return f"### Ceilings, measured in the run\n\n{table}"


# The target


def target_text(records: list[Record]) -> str:
    """The target grid: overheads by M and R, cells slower than PyTorch's own arrangements, cells missing."""
    grid = {case.label: case for case in target_grid()}
    measured = {r["case"]["label"]: r for r in records if r["case"]["label"] in grid}
    rows = []
    for M in sorted({case.M for case in grid.values()}):
        for R in TARGET_RANKS:
            cells = [label for label, case in grid.items() if (M, R) == (case.M, case.R)]
            ratios = {key: target_ratios(cells, measured, key) for key in OURS}
            target = TARGETS.get(R) if M == TARGET_ROWS else None
            rows.append(
                [
                    f"M = {M}, R = {R}",
                    f"{len(ratios[LORAFA])} of {len(cells)}",
                    *(overhead_cell(ratios[key], len(cells)) for key in OURS),
                    f"≤ {target:.0%}".replace("%", " %") if target else "",
                    verdict(ratios[LORAFA], len(cells), target),
                ]
            )
    header = ["cells", "with a ratio", *(LAYER_TITLES[key] for key in OURS), "target", ""]
    compared, slower = slower_cells(measured)
    missing = [label for label in grid if label not in measured]
    lines = [
        "### Target: overhead over the frozen nn.Linear",
        f"Projections of {listed(LLAMA_3)}, forward + backward, bf16. Overhead = geometric mean of "
        "time / time of the frozen nn.Linear, minus 1. A value with * covers only some of the cells.",
        markdown(header, rows),
        f"Of {len(grid)} cells {len(missing)} are not measured yet. lorafa_kernels was compared with the "
        f"fastest of these in {compared} cells: "
        f"{'; '.join(LAYER_TITLES[key] for key in ARRANGEMENTS)}. In {len(slower)} of them it is slower by "
        "more than max(2 %, p80 − p20).",
    ]
    if slower:
        lines.append(bullets(slower))
    return "\n\n".join(lines)


def target_ratios(labels: list[str], measured: dict[str, Record], contender: str) -> list[float]:
    """Return the medians of all cells in which the contender has a ratio to the frozen linear."""
    found = (ratio(measured[label], contender, "both") for label in labels if label in measured)
    return [value["median"] for value in found if value]


def overhead_cell(ratios: list[float], cells: int) -> str:
    if not ratios:
        return "–"
    return f"{100 * (geometric_mean(ratios) - 1):+.1f} %{'' if len(ratios) == cells else ' *'}"


def verdict(ratios: list[float], cells: int, target: float | None) -> str:
    """Say whether the target is met; not before every cell has a ratio."""
    if target is None:
        return ""
    if len(ratios) < cells:
        return "not decided: cells missing"
    return "met" if geometric_mean(ratios) - 1 <= target else "missed"


def slower_cells(measured: dict[str, Record]) -> tuple[int, list[str]]:
    """Return in how many cells lorafa_kernels can be compared with PyTorch's fastest arrangement, and a line
    for each in which it is slower by more than the margin.
    """
    compared, slower = 0, []
    for record in sorted(measured.values(), key=case_order):
        times = {key: time_of(record, key, "both") for key in ARRANGEMENTS}
        times = {key: value["median"] for key, value in times.items() if value}
        if not times:
            continue
        fastest = min(times, key=times.get)
        found = ratio(record, LORAFA, "both", fastest)
        if not found:
            continue
        compared += 1
        if found["median"] - 1 > max(MARGIN, found["p80"] - found["p20"]):
            slower.append(f"{label_of(record['case'])}: {spread(found)} of {LAYER_TITLES[fastest]}")
    return compared, slower


# Memory and training


def layer_memory_text(records: list[Record], sources: Sources) -> str:
    if not records:
        return ""
    shown, absent = columns(records, LAYER_TITLES, baseline=None)
    rows = [[sources.of(record), *(memory_cell(record, key) for key in shown)] for record in records]
    header = ["M×K×N", *(LAYER_TITLES.get(key, key) for key in shown)]
    note = (
        "MiB kept for backward / most held besides during forward / during backward. Every storage counts "
        f"once, parameters do not.{absent}"
    )
    chunks = ["### Memory of one layer, MiB", note, folded(header, rows)]
    if peaks := [r for r in records if any(peak(row) for row in r["rows"])]:
        chunks.append("Peak allocated / reserved by the allocator, MiB:")
        lines = [[sources.of(r), *(peak(row_of(r, key) or {}) or "–" for key in shown)] for r in peaks]
        chunks.append(folded(header, lines))
    return "\n\n".join(chunks)


def memory_cell(record: Record, contender: str) -> str:
    row = row_of(record, contender)
    if status(row) != "ok":
        return status(row) or "–"
    return " / ".join(mib(row.get(name)) for name in MEMORY)


def mib(value: int | None) -> str:
    return "–" if value is None else number(value / 2**20)


def peak(row: Row) -> str:
    """Peak allocated / reserved in MiB, or nothing where it was not measured."""
    if not row or status(row) != "ok" or row.get(PEAKS[0]) is None:
        return ""
    return " / ".join(mib(row.get(name)) for name in PEAKS)


def block_memory_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """A table for each block."""
    if not records:
        return ""
    chunks = ["### Memory of one Transformer block"]
    for record in records:
        with_peaks = any(peak(row) for row in record["rows"])
        rows = []
        for row in arranged(record["rows"], MODEL_TITLES):
            if status(row) != "ok":
                rows.append([full_title(row, MODEL_TITLES), status(row), *["–"] * (3 + 2 * with_peaks)])
                continue
            line = [full_title(row, MODEL_TITLES), size(row.get("saved_bytes")), number(row.get("units"))]
            line += [size(row.get(name)) for name in MEMORY[1:]]
            rows.append(line + ([size(row.get(name)) for name in PEAKS] if with_peaks else []))
        header = ["", "kept for backward", "in hidden states", "temporary, forward", "temporary, backward"]
        header += ["peak allocated", "peak reserved"] if with_peaks else []
        chunks.append(
            f"{sources.of(record)}. One hidden state is {size(record.get('unit_bytes'))}; parameters do not "
            "count."
        )
        chunks.append(markdown(header, rows))
    return "\n\n".join([*chunks, picture] if picture else chunks)


def training_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """A table for each model, and how far the losses are apart."""
    if not records:
        return ""
    chunks = ["### Training"]
    for record in records:
        case = record["case"]
        with_peaks = any(peak(row) for row in record["rows"])
        with_batch = any(row.get("batch") for row in record["rows"])
        rows = []
        for row in arranged(record["rows"], MODEL_TITLES):
            if status(row) != "ok":
                blank = ["–"] * (4 + 2 * with_peaks + with_batch)
                rows.append([full_title(row, MODEL_TITLES), status(row), *blank])
                continue
            step = usable(row.get("step_ms"))
            line = [
                full_title(row, MODEL_TITLES),
                *([f"{row['batch']}"] if with_batch else []),
                spread(step) if step else "–",
                number(row.get("tokens_per_s")),
                size(row.get("saved_bytes")),
            ]
            line += [size(row.get(name)) for name in PEAKS] if with_peaks else []
            losses = row.get("losses") or [None]
            trained = row.get("trained_parameters")
            line += [f"{trained:,}" if trained is not None else "–"]
            rows.append([*line, f"{number(losses[0], 4)} → {number(losses[-1], 4)}"])
        header = [
            "",
            *(["batch"] if with_batch else []),
            "step, ms (p20–p80)",
            "tokens/s",
            "kept for backward",
        ]
        header += ["peak allocated", "peak reserved"] if with_peaks else []
        length = f": {case['steps']} steps, learning rate {case['lr']:g}" if "steps" in case else ""
        chunks.append(f"{sources.of(record)}{length}.")
        chunks.append(markdown([*header, "trained parameters", "loss, first → last"], rows))
        if not case.get("largest"):
            chunks.append(deviation_text(record, MODEL_TITLES))
    return "\n\n".join(chunk for chunk in [*chunks, picture] if chunk)


def deviation_text(record: Record, titles: dict[str, str]) -> str:
    """Say how far apart the two LoRA-FA loss curves are at most, without checkpointing and with it."""
    lines = []
    names = " and ".join(titles.get(key, key) for key in LOSSES)
    for checkpointing in (False, True):
        pair = [row_of(record, key, checkpointing=checkpointing) for key in LOSSES]
        how = " with checkpointing" if checkpointing else ""
        if any(status(row) != "ok" for row in pair):
            continue
        curves = [row.get("losses") or [] for row in pair]
        gaps = [abs(a - b) for a, b in zip(*curves, strict=False) if a is not None and b is not None]
        if not gaps:
            continue
        step = gaps.index(max(gaps)) + 1
        lines.append(
            f"Losses of {names}{how}: at most {number(max(gaps), 2)} apart in {len(gaps)} steps (at step "
            f"{step})."
        )
    return " ".join(lines) or f"Losses of {names}: not compared, since not both of them ran."


# What is not there


def where(record: Record) -> str:
    """Name the measurement."""
    if record["kind"] == "time":
        return MODES[record["mode"]]
    if record["kind"] == "memory":
        return SCOPES[record["scope"]]
    return record["kind"]


def not_run_text(records: list[Record]) -> str:
    """Every contender that did not run somewhere, with the reason and where."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for record in records:
        for row in record["rows"]:
            if status(row) == "not run":
                name = (title_of(record, row), row.get("reason") or "no reason given")
                places = found.setdefault(name, {})
                places.setdefault(where(record), set()).add(record["case"]["label"])
    together: dict[tuple[str, str], list[str]] = {}
    for (title, reason), places in sorted(found.items()):
        texts = [f"{place} ({_cases(len(cases))})" for place, cases in sorted(places.items())]
        together.setdefault((reason, ", ".join(texts)), []).append(title)
    lines = [f"- {'; '.join(titles)}: {reason}. In: {text}." for (reason, text), titles in together.items()]
    return "### Not run\n\n" + ("\n".join(lines) or "Nothing: every row ran.")


def failed_text(records: list[Record]) -> str:
    """Every red row, with its reason and its errors."""
    found: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        for row in record["rows"]:
            if status(row) == "failed":
                name = (title_of(record, row), where(record), label_of(record["case"]), reason_of(row))
                found.setdefault(name, []).append(row.get("part") or "")
    lines = [
        f"- The whole measurement: {where(record)}, {label_of(record['case'])}: {record['failed']}."
        for record in records
        if record.get("failed")
    ]
    for (title, place, label, reason), parts in found.items():
        which = listed(["forward + backward" if part == "both" else part for part in parts])
        lines.append(f"- {title}: {place}, {label}{f', {which}' if which else ''}: {reason}.")
    return "### Failed\n\n" + ("\n".join(lines) or "Nothing: every row that ran passed its check.")


def left_text(ends: list[Record], records: list[Record]) -> str:
    """What runs planned and nobody has measured since."""
    measured = {record["key"] for record in records}
    left = {key for end in ends for key in end.get("left") or []} - measured
    if not left:
        return ""
    count = "1 measurement" if len(left) == 1 else f"{len(left)} measurements"
    listing = bullets([f"`{key}`" for key in sorted(left)])
    return f"### Planned and not measured yet\n\n{count}:\n\n{listing}"


def bullets(lines: Sequence[str]) -> str:
    """A list, folded away if it is long."""
    text = "\n".join(f"- {line}" for line in lines)
    if len(lines) <= LONG_LIST:
        return text
    return f"<details><summary>{len(lines)} entries</summary>\n\n{text}\n\n</details>"


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"
