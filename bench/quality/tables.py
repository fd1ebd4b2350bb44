"""The tables of docs/quality.md, docs/choosing.md and docs/paper.md, as Markdown."""

from __future__ import annotations

from ..report.reading import markdown
from .memory import WAYS
from .plan import SWEPT, choosing_task, chosen_rate
from .reading import BITS, Done, Measure, measure_of, rates, scores, swept
from .settings import (
    ATTENTION_ONLY,
    HIGH_RANKS,
    METHODS,
    RANK,
    RANKS,
    SCALINGS,
    SLOWER,
    SWEEP_TASK,
    TARGETS,
    TASKS,
)
from .statistics import Difference, Mean, adjusted, difference, mean_of

NOT_RUN = "not run yet"
BASE = "lora"
SIGNIFICANT = 0.05


def shown(mean: Mean, places: int, sign: bool = False) -> str:
    """A mean with half its interval, and how many values it has."""
    value = f"{mean.value:+.{places}f}" if sign else f"{mean.value:.{places}f}"
    half = "" if mean.half is None else f" ± {mean.half:.{places}f}"
    return f"{value}{half} ({mean.count})"


def _cell(values: dict[int, float], places: int) -> str:
    return shown(mean_of(list(values.values())), places) if values else NOT_RUN


def score_table(done: Done, about: dict[str, dict]) -> str:
    """A row a task, a column a method: mean, interval, seeds."""
    rows = []
    for task in TASKS:
        measure = measure_of(task)
        before = about[task]["before"] if task in about else None
        start = NOT_RUN if before is None else f"{measure.of(before):.{measure.places}f}"
        cells = [_cell(scores(done, task, method), measure.places) for method in METHODS]
        rows.append([f"{TASKS[task].title}: {measure.title}", start, *cells])
    return markdown(["", "before", *(method.title for method in METHODS.values())], rows)


def differences(done: Done) -> dict[tuple[str, str], tuple[Difference, float | None]]:
    """Return for each task and method its paired difference from LoRA, and the corrected p value."""
    found = {}
    for task in TASKS:
        base = scores(done, task, BASE)
        for method in METHODS:
            pair = difference(scores(done, task, method), base) if method != BASE else None
            if pair is not None:
                found[task, method] = pair
    corrected = adjusted([pair.p for pair in found.values()])
    return {key: (pair, p) for (key, pair), p in zip(found.items(), corrected, strict=True)}


def difference_table(done: Done) -> str:
    """Differences from LoRA over shared seeds. Bold: significant after correction."""
    found = differences(done)
    others = [method for method in METHODS if method != BASE]
    rows = []
    for task in TASKS:
        cells = []
        for method in others:
            if (task, method) not in found:
                cells.append(NOT_RUN)
                continue
            pair, p = found[task, method]
            text = shown(pair.mean, measure_of(task).places, sign=True)
            if p is None:
                cells.append(text)
            else:
                value = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
                mark = f"**{value}**" if p < SIGNIFICANT else f"p = {p:.2f}, not significant"
                cells.append(f"{text}; {mark}")
        rows.append([TASKS[task].title, *cells])
    return markdown(["", *(METHODS[method].title for method in others)], rows)


def verdicts(done: Done) -> list[str]:
    """Say for each task whether LoRA-FA's mean is within LoRA's interval, or by how much it is not."""
    found = differences(done)
    lines = []
    for task in TASKS:
        measure = measure_of(task)
        base, own = scores(done, task, BASE), scores(done, task, "lorafa")
        if len(base) < 2 or not own:
            lines.append(f"- {TASKS[task].title}: {NOT_RUN}.")
            continue
        lora, mean = mean_of(list(base.values())), mean_of(list(own.values()))
        lines.append(f"- {TASKS[task].title}: {_verdict(measure, lora, mean)}{_significance(found, task)}")
    return lines


def _verdict(measure: Measure, lora: Mean, own: Mean) -> str:
    interval = f"LoRA's interval, {lora.value - lora.half:.{measure.places}f} to "
    interval += f"{lora.value + lora.half:.{measure.places}f} {measure.unit} ({lora.count} seeds)"
    value = f"LoRA-FA's mean, {own.value:.{measure.places}f}"
    if lora.holds(own.value):
        return f"{value}, is within {interval}."
    outside = abs(own.value - lora.value) - lora.half
    side = "better" if (own.value - lora.value) * measure.better > 0 else "worse"
    return f"{value}, is {outside:.{measure.places}f} outside of {interval}: {side}."


def _significance(found, task: str) -> str:
    pair, p = found.get((task, "lorafa"), (None, None))
    if pair is None or p is None:
        return ""
    words = "significant" if p < SIGNIFICANT else "not significant"
    text = shown(pair.mean, measure_of(task).places, sign=True)
    return f" Paired difference {text}, {words} (p = {p:.2g})."


def rate_table(done: Done) -> str:
    """Validation loss by learning rate on the seed that chooses; the chosen one bold, at an edge marked."""
    rows = []
    for task in dict.fromkeys(choosing_task(task) for task in TASKS):
        for key, method in METHODS.items():
            found, chosen = rates(done, task, key), chosen_rate(task, key, done)
            cells = []
            for rate, nats in found.items():
                text = "broke" if nats is None else f"{nats:.4f}"
                edge = rate in (min(found), max(found))
                text = f"**{text}**{' (edge)' if edge else ''}" if rate == chosen else text
                cells.append(f"{rate:g}: {text}")
            words = "; ".join(cells) or NOT_RUN
            rows.append([TASKS[task].title, method.title, words + ("" if chosen or not cells else "; …")])
    return markdown(
        ["task that the rate is chosen on", "method", "learning rate: validation loss, nats"], rows
    )


def rank_table(done: Done) -> str:
    """A row a rank: at the rate that was chosen for RANK, and high ranks at a lower one."""
    rows = []
    for rank in RANKS:
        cells = []
        for method in SWEPT:
            cells.append(_cell(swept(done, method, rank=rank), BITS.places))
            slow = swept(done, method, rank=rank, slower=SLOWER)
            cells.append(_cell(slow, BITS.places) if rank in HIGH_RANKS else "–")
        rows.append([str(rank), *cells])
    header = []
    for method in SWEPT:
        rate = chosen_rate(SWEEP_TASK, method, done)
        header += [f"{METHODS[method].title}, rate {rate or 0:g}", f"rate {(rate or 0) / SLOWER:g}"]
    return markdown(["R", *header], rows)


def scaling_table(done: Done) -> str:
    rows = []
    for scaling in SCALINGS:
        cells = [_cell(swept(done, method, scaling=scaling), BITS.places) for method in SWEPT]
        rows.append([f"{scaling:g} (lora_alpha = {scaling * RANK:g})", *cells])
    return markdown(["scaling at R = 8", *(METHODS[method].title for method in SWEPT)], rows)


def targets_table(done: Done) -> str:
    rows = []
    for targets in (TARGETS, ATTENTION_ONLY):
        rows.append([targets, *(_cell(swept(done, m, targets=targets), BITS.places) for m in SWEPT)])
    return markdown(["targets", *(METHODS[method].title for method in SWEPT)], rows)


def memory_table(line: dict | None) -> str:
    """Kept and peak MiB by targets, dropout and checkpointing."""
    if line is None:
        return NOT_RUN
    rows: dict[tuple, dict[str, str]] = {}
    for case in line["cases"]:
        key = (case["targets"], case["dropout"], case["checkpointing"])
        cell = f"{case['kept_bytes'] / 2**20:.2f} / {case['peak_bytes'] / 2**20:.2f}"
        rows.setdefault(key, {})[case["way"]] = cell
    named = [
        [
            f"{targets}, dropout {dropout:g}{', checkpointing' if checkpointing else ''}",
            *(cells[way] for way in WAYS),
        ]
        for (targets, dropout, checkpointing), cells in rows.items()
    ]
    return markdown(["kept / peak, MiB", *WAYS.values()], named)
