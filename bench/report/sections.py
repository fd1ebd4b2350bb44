"""The sections of a device on the performance page, as Markdown.

    device_section(device, records, sources, links, ends)    all of them

A section without records is empty or says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..measure.cases import LLAMA_3, TARGET_RANKS, target_grid
from ..measure.contenders import FROZEN, LORAFA, OURS
from ..measure.contenders import TITLES as LAYER_TITLES
from ..measure.kernels import LIBRARY
from ..measure.kernels import PARTS as KERNEL_PARTS
from ..measure.models import TITLES as MODEL_TITLES
from . import reading
from .predictions import predictions
from .reading import (
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
    geometric_mean,
    label_of,
    listed,
    markdown,
    number,
    ordered,
    ratio,
    row_of,
    size,
    spread,
    status,
    time_cell,
    time_of,
    title_of,
    titles_of,
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
MEANS = "Last: the geometric means of the medians, of the p20 and of the p80."
LAYER = ("M×K×N", "frozen nn.Linear, ms")


def device_section(
    device: str, records: list[Record], sources: Sources, links: dict[str, str], ends: list[Record]
) -> str:
    """Everything about one device, as Markdown."""

    def some(kind: str, **wanted: str) -> list[Record]:
        of_kind = [r for r in records if r["kind"] == kind]
        return sorted((r for r in of_kind if wanted.items() <= r.items()), key=case_order)

    layers, others = some("time", mode="eager"), [r for r in records if r["kind"] not in reading.MEASURED]
    others.sort(key=lambda record: record["key"])
    everything = [*some("time"), *some("memory"), *some("training"), *others]
    title, remark = reading.device_title(device, records)
    body = joined(
        ceilings_text([r for r in others if r["kind"] == "ceilings"], sources),
        main_loop_text([r for r in others if r["kind"] == "main-loop"], sources),
        tests_text([r for r in others if r["kind"] == "tests"], sources),
        target_text(layers) if device != "cpu" else "",
        layer_text(layers, sources, links.get("overhead")),
        directions_text(layers, sources, links.get("roofline")),
        ours_text(layers, sources),
        against_frozen(
            some("time", mode="wall"),
            sources,
            "### What a program waits for, forward + backward: wall time / that of the frozen nn.Linear",
            "Many calls in a row until the last is done, the Python side included: median (p20–p80).",
        ),
        against_frozen(
            some("time", mode="graph"),
            sources,
            "### In CUDA graphs, forward + backward: time / time of the frozen nn.Linear in a CUDA graph",
            "Everybody is replayed from a graph, the baseline too: median (p20–p80).",
        ),
        host_text(some("time", mode="host"), sources),
        kernels_text(some("time", mode="kernel"), sources),
        blocks_text(some("time", mode="block"), sources, links.get("block-time")),
        layer_memory_text(some("memory", scope="layer"), sources),
        block_memory_text(some("memory", scope="block"), sources, links.get("blocks")),
        training_text(some("training"), sources, links.get("training")),
        not_run_text(everything),
        failed_text(everything),
        left_text(ends, records),
    )
    lines = "\n".join(f"- {line}" for line in sources.lines())
    # Last: its marks are those that the sections have set.
    return joined(f"## {title}", remark, lines, sources.legend(), body)


def pairs(records: Iterable[Record]) -> Iterator[tuple[Record, Row]]:
    """Every row, with its record."""
    return ((record, row) for record in records for row in record["rows"])


def joined(*chunks: str | None) -> str:
    return "\n\n".join(chunk for chunk in chunks if chunk)


def folded(text: str, count: int, most: int, what: str) -> str:
    """A table or list, folded away if it is long."""
    if count <= most:
        return text
    return f"<details><summary>{count} {what}</summary>\n\n{text}\n\n</details>"


def table(header: Sequence[str], rows: list[list[str]]) -> str:
    return folded(markdown(list(header), rows), len(rows), LONG_TABLE, "rows")


def bullets(lines: Sequence[str]) -> str:
    return folded("\n".join(f"- {line}" for line in lines), len(lines), LONG_LIST, "entries")


def columns(records: Sequence[Record], baseline: str | None = FROZEN) -> tuple[dict[str, str], str]:
    """Return the contenders that ran or failed somewhere, with their titles, and a sentence naming those that
    ran nowhere.
    """
    titles = titles_of(records[0]) if records else {}
    rows = [row for _, row in pairs(records) if row["contender"] != baseline]
    here = {row["contender"] for row in rows if status(row) != "not run"}
    known = {key: titles.get(key, key) for key in ordered((row["contender"] for row in rows), titles)}
    absent = [title for key, title in known.items() if key not in here]
    shown = {key: title for key, title in known.items() if key in here}
    return shown, f" Not run: {listed(absent)} (reasons below)." if absent else ""


def rounds_text(records: Sequence[Record]) -> str:
    counts = sorted({record["rounds"] for record in records if record.get("rounds")}) or ["no"]
    sittings = sorted({record.get("sittings") or 1 for record in records}) or [1]
    rounds, sat = (" to ".join(map(str, dict.fromkeys((n[0], n[-1])))) for n in (counts, sittings))
    return f"{rounds} interleaved rounds" + (f" in {sat} sittings" if sittings[-1] > 1 else "")


# Times


def layer_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Forward + backward of one layer: everybody over the frozen linear."""
    if not records:
        return "### One layer, forward + backward\n\nNot measured."
    shown, absent = columns(records)
    predicted = [predictions(record) for record in records]
    extra = ["predicted: lorafa_kernels"] if any(predicted) else []
    rows = []
    for record, of_model in zip(records, predicted, strict=True):
        line = [sources.of(record), time_cell(record, FROZEN, "both"), *floor_cells(record, "both")]
        line += [number((of_model or {}).get("both"))] if extra else []
        rows.append(line + [cell(record, key, "both") for key in shown])
    if mean := mean_row(records, shown):
        rows.append([mean[0], *[""] * (3 + len(extra)), *mean[1:]])
    return joined(
        "### One layer, forward + backward: time / time of the frozen nn.Linear",
        f"Median of {rounds_text(records)} (p20–p80). Below 1 is faster than the frozen nn.Linear.{absent}",
        table([*LAYER, "floor, ms", "frozen / floor", *extra, *shown.values()], rows),
        picture,
    )


def mean_row(records: list[Record], shown: Iterable[str]) -> list[str] | None:
    """The geometric means, of all columns over the same rows: those in which every column has a ratio.

    A column with a ratio in less than half of the rows gets no mean, and takes no rows from the others.
    """
    ratios = [{key: value for key in shown if (value := ratio(r, key, "both"))} for r in records]
    often = [key for key in shown if 2 * sum(key in row for row in ratios) >= len(ratios)]
    complete = [row for row in ratios if all(key in row for key in often)]
    if not often or len(complete) < 2:
        return None
    means = {key: geometric_mean([row[key]["median"] for row in complete]) for key in often}
    cells = (f"{means[key]:.3f}" if key in means else "–" for key in shown)
    return [f"geometric mean of {len(complete)} rows, the same for all", *cells]


def floor_cells(record: Record, part: str) -> list[str]:
    """The floor in ms, and the frozen linear's time over it."""
    floor = (record.get("floor_ms") or {}).get(part)
    frozen = time_of(record, FROZEN, part)
    return [number(floor), number(frozen["median"] / floor) if frozen and floor else "–"]


def directions_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Forward and backward by themselves, of this library only."""
    shown = {key: title for key, title in columns(records)[0].items() if key in OURS}
    if not shown:
        return ""
    header, rows = ["M×K×N"], [[sources.of(record)] for record in records]
    for part in ("forward", "backward"):
        header += [f"{part}: frozen, ms", "frozen / floor", *shown.values()]
        for record, line in zip(records, rows, strict=True):
            line += [time_cell(record, FROZEN, part), floor_cells(record, part)[1]]
            line += [cell(record, key, part) for key in shown]
    return joined(
        "### Forward and backward separately: time / time of the frozen nn.Linear",
        "Forward over forward, backward over the gradient of the frozen nn.Linear's input.",
        table(header, rows),
        picture,
    )


def ours_text(records: list[Record], sources: Sources) -> str:
    """lorafa_kernels over each of the others."""
    ours = ours_table(records, sources, "M×K×N", means=len(records) > 1)
    title = "### lorafa_kernels against the others: its time / theirs, forward + backward"
    note = "The baseline is the column's: below 1, lorafa_kernels takes less time than it."
    return joined(title, f"{note} Same rounds as above. {MEANS}", ours) if ours else ""


def ours_table(records: list[Record], sources: Sources, first: str, means: bool = False) -> str:
    shown = {key: title for key, title in columns(records)[0].items() if key != LORAFA}
    rows = [[sources.of(record), *(against(record, key) for key in shown)] for record in records]
    if means:
        rows.append(["mean over the cases", *(mean_against(records, key) for key in shown)])
    return table([first, *shown.values()], rows) if shown else ""


def mean_against(records: list[Record], baseline: str) -> str:
    """The geometric means of lorafa_kernels' ratios to a baseline, where every record has one."""
    found = [ratio(record, LORAFA, "both", baseline) for record in records]
    if not all(found):
        return "–"
    return spread({name: geometric_mean([one[name] for one in found]) for name in ("median", "p20", "p80")})


def against(record: Record, baseline: str) -> str:
    found = status(row_of(record, baseline, "both"))
    if found == "not run" and status(row_of(record, LORAFA, "both")) == "ok":
        return "not run"
    return cell(record, LORAFA, "both", baseline) if found else "–"


def against_frozen(
    records: list[Record], sources: Sources, title: str, note: str, header: Iterable[str] = LAYER
) -> str:
    """A table of forward + backward over what is frozen, or why there is none."""
    if not records:
        return ""
    shown, absent = columns(records)
    if not shown:
        return f"{title}\n\nNot run: {reading.reasons(records)}."
    rows = [
        [sources.of(r), time_cell(r, FROZEN, "both"), *(cell(r, key, "both") for key in shown)]
        for r in records
    ]
    return joined(title, f"{note}{absent}", table([*header, *shown.values()], rows))


def host_text(records: list[Record], sources: Sources) -> str:
    """The Python side's time for a call."""
    if not records:
        return ""
    shown, absent = columns(records, baseline=None)

    def host_cell(record: Record, key: str, part: str) -> str:
        value, found = time_of(record, key, part), status(row_of(record, key, part))
        return spread(value, 1e3) if value else found if found not in (None, "ok") else "–"

    rows = [
        [
            f"{sources.of(record)}, {'forward + backward' if part == 'both' else part}",
            *(host_cell(record, key, part) for key in shown),
        ]
        for record in records
        for part in PARTS
        if any(row["part"] == part for row in record["rows"])
    ]
    return joined(
        "### Host time of one call, µs",
        "µs that a call takes on the host, at a shape so small that nothing else does: median (p20–p80)."
        f"{absent}",
        table(["M×K×N", *shown.values()], rows),
    )


def kernels_text(records: list[Record], sources: Sources) -> str:
    """Each kernel over the products of the device's library."""
    if not records:
        return ""
    title = "### Kernels by themselves: time / time of the library's products"
    if not columns(records, baseline=None)[0]:
        return f"{title}\n\nNot run: {reading.reasons(records)}."
    others = {key: text for key, text in titles_of(records[0]).items() if key != LIBRARY}
    rows = [
        [sources.of(r), part, time_cell(r, LIBRARY, part)]
        + [cell(r, key, part, LIBRARY) if key in keys else "" for key in others]
        for r in records
        for part, keys in KERNEL_PARTS.items()
    ]
    return joined(
        title,
        "y and dx: the product with the rank-R step over the bare product. z: the product with the narrow "
        "factor over the same product. z, y: both in a row over the library plan. dz, dB: one pass over dy "
        "over two products. dz, dB, dx: the whole backward over the library plan. Median (p20–p80).",
        table(["M×K×N", "", "library, ms", *others.values()], rows),
    )


def blocks_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """Pieces of a Transformer layer: everybody over the frozen one, and lorafa_kernels over everybody."""
    shown = columns(records)[0]
    ours = ours_table(records, sources, "") if LORAFA in shown else ""
    return joined(
        against_frozen(
            records,
            sources,
            "### Blocks of a Transformer layer, forward + backward: time / time of the frozen block",
            f"Median of {rounds_text(records)} (p20–p80). lorafa_kernels: the projections as "
            "one group, the MLP as one node, the layer as `apply_lorafa` leaves it.",
            ("", "frozen, ms"),
        ),
        "lorafa_kernels against the others, its time / theirs in the same rounds:" if ours else "",
        ours,
        picture if shown else "",
    )


def marked(title: str, lines: Iterable[tuple[str, Record]], sources: Sources) -> str:
    """A list, each line with the marks of the record that it is from."""
    found = [f"- {line} {sources.marks(record)}".rstrip() for line, record in lines]
    return f"{title}\n\n" + "\n".join(found) if found else ""


def tests_text(records: list[Record], sources: Sources) -> str:
    """What became of the test suite in the run."""
    lines = (
        (f"{row['contender']}: {status(row)}. {row.get('reason') or ''}", record)
        for record, row in pairs(records)
    )
    return marked("### Tests", lines, sources)


def ceilings_text(records: list[Record], sources: Sources) -> str:
    """The rates that the machine reached in the run."""
    rows = []
    for record, row in pairs(records):
        if row["what"] == "product":
            what = f"product {'×'.join(f'{n}' for n in row['size'])} {row['dtype']}, TFLOP/s"
        else:
            what = f"copy of {size(row['bytes'])}, GB/s read and written"
        marks = sources.marks(record).strip()
        rows.append([f"{what} {marks}".strip(), reading.rate_cell(row)])
    if not rows:
        return "### Ceilings\n\nNot measured."
    found = markdown(["through PyTorch, random data", "median (p20–p80)"], rows)
    return f"### Ceilings, measured in the run\n\n{found}"


def main_loop_text(records: list[Record], sources: Sources) -> str:
    """The number of the model of the cost that decides most."""
    lines = ((line, record) for record in records for line in reading.main_loop_lines(record))
    return marked("### The rate of expand beside the library's product", lines, sources)


# The target


def target_text(records: list[Record]) -> str:
    """The target grid: overheads by M and R, cells slower than PyTorch's own arrangements, cells missing."""
    grid = {case.label: case for case in target_grid()}
    measured = {r["case"]["label"]: r for r in records if r["case"]["label"] in grid}
    rows = []
    for M in sorted({case.M for case in grid.values()}):
        for R in TARGET_RANKS:
            cells = [label for label, case in grid.items() if (M, R) == (case.M, case.R)]
            here = [measured[label] for label in cells if label in measured]
            # The medians of all cells in which the contender has a ratio.
            ratios = {
                key: [value["median"] for r in here if (value := ratio(r, key, "both"))] for key in OURS
            }
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
    compared, slower = slower_cells(measured)
    missing = [label for label in grid if label not in measured]
    return joined(
        "### Target: overhead over the frozen nn.Linear",
        f"Projections of {listed(LLAMA_3)}, forward + backward, bf16. Overhead = geometric mean of "
        "time / time of the frozen nn.Linear, minus 1. A value with * covers only some of the cells.",
        markdown(["cells", "with a ratio", *(LAYER_TITLES[key] for key in OURS), "target", ""], rows),
        f"Of {len(grid)} cells {len(missing)} are not measured yet. lorafa_kernels was compared with the "
        f"fastest of these in {compared} cells: "
        f"{'; '.join(LAYER_TITLES[key] for key in ARRANGEMENTS)}. In {len(slower)} of them it is slower by "
        "more than max(2 %, p80 − p20).",
        bullets(slower),
    )


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
        times = {key: value["median"] for key in ARRANGEMENTS if (value := time_of(record, key, "both"))}
        fastest = min(times, key=times.get, default=None)
        found = ratio(record, LORAFA, "both", fastest) if fastest else None
        compared += bool(found)
        if found and found["median"] - 1 > max(MARGIN, found["p80"] - found["p20"]):
            slower.append(f"{label_of(record['case'])}: {spread(found)} of {LAYER_TITLES[fastest]}")
    return compared, slower


# Memory and training


def layer_memory_text(records: list[Record], sources: Sources) -> str:
    if not records:
        return ""
    shown, absent = columns(records, baseline=None)

    def sizes(value: Callable[[Row | None], str], some: list[Record]) -> str:
        rows = [[sources.of(r), *(value(row_of(r, key)) for key in shown)] for r in some]
        return table(["M×K×N", *shown.values()], rows)

    peaks = [r for r in records if any(peak(row) for row in r["rows"])]
    return joined(
        "### Memory of one layer, MiB",
        "MiB kept for backward / most held besides during forward / during backward. Every storage counts "
        f"once, parameters do not.{absent}",
        sizes(lambda row: mib(row, MEMORY) if status(row) == "ok" else status(row) or "–", records),
        "Peak allocated / reserved by the allocator, MiB:" if peaks else "",
        sizes(lambda row: peak(row) or "–", peaks) if peaks else "",
    )


def mib(row: Row, names: Iterable[str]) -> str:
    return " / ".join("–" if row.get(name) is None else number(row[name] / 2**20) for name in names)


def peak(row: Row | None) -> str:
    """Peak allocated / reserved in MiB, or nothing where it was not measured."""
    return mib(row, PEAKS) if row and status(row) == "ok" and row.get(PEAKS[0]) is not None else ""


def of_columns(record: Record, *names: str) -> str:
    """A table with a line for each row of the record, and these of reading.COLUMNS; the peaks, and the batch,
    only where there are some.
    """
    known = record["rows"]
    if any(row.get("batch") for row in known):
        names = ("batch", *names)
    if any(map(peak, known)):
        place = names.index("trained parameters") if "trained parameters" in names else len(names)
        names = (*names[:place], "peak allocated", "peak reserved", *names[place:])
    rows = [
        [title_of(record, row)]
        + ([reading.COLUMNS[name](row) for name in names] if status(row) == "ok" else [status(row)])
        for row in arranged(known, MODEL_TITLES)
    ]
    return markdown(["", *names], [line + ["–"] * (1 + len(names) - len(line)) for line in rows])


def block_memory_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """A table for each block."""
    names = ("kept for backward", "in hidden states", "temporary, forward", "temporary, backward")
    chunks = [
        f"{sources.of(record)}. One hidden state is {size(record.get('unit_bytes'))}; parameters do not "
        f"count.\n\n{of_columns(record, *names)}"
        for record in records
    ]
    return joined("### Memory of one Transformer block", *chunks, picture) if records else ""


def training_text(records: list[Record], sources: Sources, picture: str | None) -> str:
    """A table for each model, and how far the losses are apart."""
    names = ("step, ms (p20–p80)", "tokens/s", "kept for backward", "trained parameters")
    chunks = []
    for record in records:
        case = record["case"]
        length = f": {case['steps']} steps, learning rate {case['lr']:g}" if "steps" in case else ""
        chunks += [f"{sources.of(record)}{length}.", of_columns(record, *names, reading.LOSS)]
        if not case.get("largest"):
            chunks.append(deviation_text(record))
    return joined("### Training", *chunks, picture) if records else ""


def deviation_text(record: Record) -> str:
    """Say how far apart the two LoRA-FA loss curves are at most, without checkpointing and with it."""
    lines = []
    names = " and ".join(MODEL_TITLES.get(key, key) for key in LOSSES)
    for checkpointing, how in ((False, ""), (True, " with checkpointing")):
        pair = [row_of(record, key, checkpointing=checkpointing) for key in LOSSES]
        curves = [(row.get("losses") or []) if status(row) == "ok" else [] for row in pair]
        gaps = [abs(a - b) for a, b in zip(*curves, strict=False) if a is not None and b is not None]
        if gaps:
            most = f"at most {number(max(gaps), 2)} apart in {len(gaps)} steps"
            lines.append(f"Losses of {names}{how}: {most} (at step {gaps.index(max(gaps)) + 1}).")
    return " ".join(lines) or f"Losses of {names}: not compared, since not both of them ran."


# What is not there


def where(record: Record) -> str:
    """Name the measurement."""
    named = {"time": MODES.get(record["mode"]), "memory": SCOPES.get(record["scope"])}
    return named.get(record["kind"], record["kind"])


def not_run_text(records: list[Record]) -> str:
    """Every contender that did not run somewhere, with the reason and where."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for record, row in pairs(records):
        if status(row) == "not run":
            name = (title_of(record, row), row.get("reason") or "no reason given")
            found.setdefault(name, {}).setdefault(where(record), set()).add(record["case"]["label"])
    together: dict[tuple[str, str], list[str]] = {}
    for (title, reason), places in sorted(found.items()):
        texts = [f"{place} ({counted(len(cases), 'case')})" for place, cases in sorted(places.items())]
        together.setdefault((reason, ", ".join(texts)), []).append(title)
    lines = [f"- {'; '.join(titles)}: {reason}. In: {text}." for (reason, text), titles in together.items()]
    return "### Not run\n\n" + ("\n".join(lines) or "Nothing: every row ran.")


def failed_text(records: list[Record]) -> str:
    """Every red row, with its reason and its errors."""
    found: dict[tuple[str, ...], list[str]] = {}
    for record, row in pairs(records):
        if status(row) == "failed":
            name = (title_of(record, row), where(record), label_of(record["case"]), reading.reason_of(row))
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
    left = {key for end in ends for key in end.get("left") or []} - {record["key"] for record in records}
    if not left:
        return ""
    listing = bullets([f"`{key}`" for key in sorted(left)])
    return f"### Planned and not measured yet\n\n{counted(len(left), 'measurement')}:\n\n{listing}"


def counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"
