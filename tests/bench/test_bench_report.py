"""The report says what the result files say: no number from a red row, every missing row named."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from bench.measure import contenders, models
from bench.measure.cases import Case, cases, find_layers, target_grid
from bench.measure.models import BlockCase
from bench.report import compare, console, plots, reading
from bench.report import page as report
from bench.report.predictions import predictions
from bench.run.store import load, parse

BLOCK, TRAINING = "block tiny", "training tiny"
# Time over the frozen linear's; no two alike, so that a number can be found by its digits.
RATIOS = {
    "frozen": 1.0,
    "lorafa": 1.111,
    "triton": 1.122,
    "library": 1.133,
    "eager-lorafa": 1.244,
    "eager-lora": 1.355,
    "addmm": 1.166,
    "compiled-lorafa": 1.177,
    "peft-lorafa": 1.388,
    "peft-lora": 1.499,
}
UNITS = {
    "frozen": 5.0,
    "lorafa": 6.25,
    "peft-lora": 16.0,
    "peft-lora-16bit": 12.5,
    "peft-lorafa": 9.0,
    "peft-lorafa-16bit": 6.3,
    "compiled-lorafa": 6.1,
    "compiled-lora": 11.0,
}
PARTS = {"forward": 0.4, "backward": 0.6, "both": 1.0}
CPU_CASES = cases(find_layers(["MiniLM"])[:2], (256,), (16,), (("fp32", "fp32"), ("bf16", "bf16")))
GPU_CASES = [case for case in target_grid() if case.M in (8192, 512)]
H200 = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "memory_gib": 139.8,
    "driver": "580.1",
    "runtime": "13.0",
    "sm_clock_mhz": "1980",
}


def summary(median: float, share: float = 0.01) -> dict:
    return {
        "median": round(median, 5),
        "p20": round(median * (1 - share), 5),
        "p80": round(median * (1 + share), 5),
        "min": round(median * (1 - 2 * share), 5),
    }


def time_record(case: Case, frozen_ms: float, gpu: bool, mode: str = "eager") -> dict:
    """All contenders of a case, with ratios that the times bear out."""
    rows = []
    obstacle = {"triton": "needs a GPU"} if not gpu else {}
    for part, share in PARTS.items():
        for index, (key, factor) in enumerate(RATIOS.items()):
            row = {"contender": key, "part": part, "status": "ok", "reason": None, "ms": None, "ratios": {}}
            rows.append(row)
            reason = "CUDA graphs need a GPU" if mode == "graph" and not gpu else obstacle.get(key)
            if reason:
                row.update(status="not run", reason=reason)
                continue
            factor += index * case.R * 1e-3 if key != "frozen" else 0
            row["errors"] = {name: {"error": 1e-3, "allowed": 4e-3, "kept": True} for name in ("y", "dx")}
            row["ms"] = summary(frozen_ms * share * factor)
            for other, theirs in RATIOS.items():
                if other != key and other not in obstacle and (other == "frozen" or key in contenders.OURS):
                    row["ratios"][other] = summary(factor / theirs)
    floor = {part: frozen_ms * share / 1.25 for part, share in PARTS.items()}
    return {
        "kind": "time",
        "key": f"{mode} {case.label}",
        "case": case.as_record(),
        "mode": mode,
        "rounds": 15,
        "flops": case.flops(),
        "least_bytes": case.least_bytes(),
        "floor_ms": floor,
        "rows": rows,
    }


def layer_memory(case: Case, gpu: bool) -> dict:
    rows = [
        {
            "contender": key,
            "status": "ok",
            "reason": None,
            "saved_bytes": 2**20 * (1 + index),
            "forward_temporary_bytes": 2**19,
            "backward_temporary_bytes": 2**18,
            "peak_allocated_bytes": 2**24 if gpu else None,
            "peak_reserved_bytes": 2**25 if gpu else None,
        }
        for index, key in enumerate(("frozen", "lorafa", "eager-lora"))
    ]
    rows.append({"contender": "peft-lora", "status": "not run", "reason": "peft is not installed"})
    return {
        "kind": "memory",
        "key": f"memory {case.label}",
        "scope": "layer",
        "case": case.as_record(),
        "rows": rows,
    }


def block_time(gpu: bool) -> dict:
    """Contenders of a block, each slower than the frozen one by its own factor."""
    case = BlockCase("Llama-3.2-1B", 4, 2048, piece="mlp", scope="time")
    factors = {"frozen": 1.0, "lorafa": 1.211, "lorafa-layers": 1.322, "peft-lora": 1.433}
    rows = []
    for part, share in (("forward", 0.4), ("both", 1.0)):
        for key, factor in factors.items():
            others = [k for k in factors if k != key and (k == "frozen" or key == "lorafa")]
            ratios = {other: summary(factor / factors[other]) for other in others}
            rows.append({"contender": key, "part": part, "status": "ok", "reason": None, "errors": {}})
            rows[-1] |= {"ms": summary(7 * share * factor), "ratios": ratios}
        reason = "its kernels need a GPU"
        rows.append({"contender": "liger", "part": part, "status": "not run", "reason": reason})
        rows[-1] |= {"ms": None, "ratios": {}}
    return {
        "kind": "time",
        "key": f"block-time {case.label}",
        "case": case.as_record(),
        "mode": "block",
        "rounds": 15,
        "rows": rows,
    }


def block_memory(gpu: bool) -> dict:
    unit = 2**21 if not gpu else 2**26
    rows = [
        {
            "contender": key,
            "status": "ok",
            "reason": None,
            "errors": {},
            "checkpointing": checkpointing,
            "units": 1.0 if checkpointing else units,
            "saved_bytes": int(unit * (1.0 if checkpointing else units)),
            "forward_temporary_bytes": unit,
            "backward_temporary_bytes": 2 * unit,
            "peak_allocated_bytes": 20 * unit if gpu else None,
            "peak_reserved_bytes": 24 * unit if gpu else None,
        }
        for checkpointing in (False, True)
        for key, units in UNITS.items()
    ]
    case = {"label": "tiny block 2x128", "model": "tiny", "batch": 2, "sequence": 128, "hidden": 64}
    return {
        "kind": "memory",
        "key": BLOCK,
        "scope": "block",
        "case": {**case, "intermediate": 172, "heads": 4, "dtype": "bf16"},
        "unit_bytes": unit,
        "rows": rows,
    }


def training_record(gpu: bool) -> dict:
    rows = []
    for index, key in enumerate(models.TRAINING_KEYS):
        for checkpointing in (False, True):
            losses = [5 - 0.15 * step + 0.001 * step * (key == "lorafa") for step in range(16)]
            rows.append(
                {
                    "contender": key,
                    "checkpointing": checkpointing,
                    "status": "ok",
                    "reason": None,
                    "step_ms": summary(100 + 7 * index + 30 * checkpointing, 0.03),
                    "tokens_per_s": 12345.0 - 100 * index,
                    "saved_bytes": 2**24 * (1 + index),
                    "peak_allocated_bytes": 2**28 * (4 + index) if gpu else None,
                    "peak_reserved_bytes": 2**28 * (5 + index) if gpu else None,
                    "trained_parameters": 1000 * index,
                    "losses": losses,
                }
            )
    case = {"label": "tiny 2x128", "model": "tiny", "batch": 2, "sequence": 128, "steps": 16, "rank": 8}
    case |= {"lr": 1e-3, "dtype": "bf16"}
    return {"kind": "training", "key": TRAINING, "case": case, "rows": rows}


def ceilings_record(gpu: bool) -> dict:
    scale = 700.0 if gpu else 0.4
    products = [
        {"what": "product", "dtype": dtype, "size": [1024] * 3, "tflops": summary(scale * factor)}
        for dtype, factor in (("bf16", 1.0), ("fp32", 0.5))
    ]
    copy = {"what": "copy", "bytes": 2**27, "gb_per_s": summary(4300.0 if gpu else 18.0)}
    return {"kind": "ceilings", "key": "ceilings", "rows": [*products, copy]}


def main_loop_record(share: float | None = 0.93125, card: str = H200["name"]) -> dict:
    row = {"contender": "triton", "variant": "tma", "share": share, "expand_us": 200.0, "library_us": 186.0}
    row |= {"status": "ok" if share else "failed", "reason": None if share else "y has a relative error of 1"}
    return {
        "kind": "main-loop",
        "key": "main-loop",
        "card": card,
        "size": [4096] * 3,
        "rank": 16,
        "rows": [row],
    }


def run_record(run: str, gpu: bool, date: str, dirty: bool | None = False, commit: str = "c" * 40) -> dict:
    machine = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "load_average": 0.1, "gpu": H200 if gpu else None}
    versions = {"python": "3.12.1", "torch": "2.11.0", "peft": None, "lorafa_kernels": "0.1"}
    about = {"date": date, "machine": machine, "versions": versions, "commit": commit, "dirty": dirty}
    return {
        "kind": "run",
        "run": run,
        "date": date,
        "command": "python -m bench quick",
        "grid": "quick",
        "identity": "abc",
        "environment": about,
    }


def measurements(gpu: bool) -> list[dict]:
    if gpu:
        sizes = {case: 2 * case.M * case.K * case.N * 2 / 700e12 * 1.2e3 for case in GPU_CASES}
    else:
        sizes = {case: 0.9 + 0.1 * index for index, case in enumerate(CPU_CASES)}
    found = [ceilings_record(gpu)]
    found += [time_record(case, ms, gpu) for case, ms in sizes.items()]
    case = next(iter(sizes))
    found += [time_record(case, 0.5, gpu, mode) for mode in ("graph", "host")]
    return [*found, block_time(gpu), layer_memory(case, gpu), block_memory(gpu), training_record(gpu)]


def write_run(
    root: Path,
    gpu: bool = False,
    records: list[dict] | None = None,
    run: str = "r1",
    date: str = "2026-11-24T10:00:00+00:00",
    left: tuple[str, ...] = (),
    **rest,
) -> Path:
    """Append a run to a result file below `root` and return the file."""
    path = root / ("nvidia-h200" if gpu else "cpu") / "quick.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [run_record(run, gpu, date, **rest)]
    lines += [{**record, "run": run, "date": date, "seconds": 1.0} for record in records or measurements(gpu)]
    lines.append(
        {"kind": "end", "run": run, "date": date, "done": 1, "left": list(left), "stopped": "budget"}
    )
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def page_of(root: Path) -> str:
    page = root.parent / "docs" / "performance.md"
    report.write(root, page, page.parent / "plots")
    # A line a paragraph and item, however they are broken.
    return re.sub(r"(?<=[^\n|])\n(?:  )?(?![\n|#!-])", " ", page.read_text(encoding="utf-8"))


def change(records: list[dict], contender: str, **values) -> list[dict]:
    """Return the records with this contender's rows changed, all else, its numbers too, left as it was."""
    records = copy.deepcopy(records)
    for record in records:
        for row in record["rows"]:
            if row.get("contender") == contender:
                row.update(values)
    return records


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def no_plots(monkeypatch):
    """Most tests are about words, and drawing takes seconds."""
    monkeypatch.setattr(report, "draw", lambda *args: {})


def numbers_of(factor: float, case: Case, key: str) -> str:
    """The ratio as the page prints it."""
    return f"{factor + list(RATIOS).index(key) * case.R * 1e-3:.3f} ("


def test_the_page_has_every_part(root, no_plots):
    write_run(root)
    write_run(root, gpu=True)
    page = page_of(root)
    gpu, cpu = page.index("## NVIDIA H200"), page.index("## CPU numbers: AMD EPYC, 2 threads")
    assert gpu < cpu and report.NOT_MEASURED_ON_A_GPU not in page
    for heading in ("Ceilings", "Target", "One layer", "Forward and backward", "lorafa_kernels against"):
        assert f"### {heading}" in page[gpu:cpu]
    headings = (
        "Host time",
        "Blocks of",
        "Memory of one layer",
        "Memory of one Transformer block",
        "Training",
    )
    for heading in headings:
        assert f"### {heading}" in page[gpu:cpu] and f"### {heading}" in page[cpu:]
    assert "### Target" not in page[cpu:]
    for title in (contender.title for contender in contenders.CONTENDERS.values()):
        assert title in page[cpu:]
    assert "`cpu/quick.jsonl`: AMD EPYC, 2 threads; 2026-11-24; python 3.12.1, torch 2.11.0" in page
    assert f"commit {'c' * 12}; `python -m bench quick`" in page
    assert "driver 580.1" in page[gpu:cpu]
    case = CPU_CASES[0]
    assert numbers_of(RATIOS["lorafa"], case, "lorafa") in page[cpu:]
    assert "(6.25" not in page and "| lorafa_kernels | 12.5 MiB | 6.25 |" in page[cpu:]
    assert "at most 0.015 apart in 16 steps (at step 16)" in page


def test_blocks_are_compared_with_the_frozen_one_and_with_us(root, no_plots):
    write_run(root)
    section = page_of(root).split("### Blocks of")[1].split("\n### ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| Llama-3.2-1B, MLP, 4×2048 tokens")]
    assert [cells.count("(") for cells in rows] == [3, 2]
    assert all(f"{factor} (" in rows[0] for factor in (1.211, 1.322, 1.433))
    assert f"{1.211 / 1.322:.3f} (" in rows[1]
    assert "Not run: eager LoRA-FA with Liger's SwiGLU" in section
    records = [reading.described(record) for record in loaded(root) if record["kind"] not in ("run", "end")]
    found = {
        (point.facet, point.contender): point.value["median"] for point in plots.block_time_points(records)
    }
    assert found == {("MLP", "lorafa"): 1.211, ("MLP", "lorafa-layers"): 1.322, ("MLP", "peft-lora"): 1.433}


def test_a_failed_block_has_no_number(root, no_plots):
    write_run(root, records=change([block_time(False)], "lorafa-layers", **FAILED))
    page = page_of(root)
    assert "1.322" not in page and f"{1.211 / 1.322:.3f}" not in page
    assert "- lorafa_kernels, fuse=False, norm=False: blocks of a Transformer layer" in page
    write_run(root, records=change([block_time(False)], "frozen", **FAILED), run="r2", date="2026-11-25")
    section = page_of(root).split("### Blocks of")[1].split("\n### ")[0]
    assert "1.211 (" not in section and "baseline failed" in section
    assert plots.block_time_points(list(reading.newest(loaded(root)).values())) == []


def test_training_at_the_largest_batch_says_which(root, no_plots):
    record = training_record(False)
    case = {**record["case"], "largest": True, "label": "tiny, largest batchx1024 tokens"}
    for batch, row in enumerate(record["rows"], 3):
        row["batch"] = batch
    write_run(root, records=[{**record, "case": case, "key": "training largest"}])
    section = page_of(root).split("### Training")[1].split("\n### ")[0]
    assert "|  | batch | step, ms" in section and "| lorafa_kernels | 5 | " in section
    assert "Losses of" not in section
    assert plots.training_runs(list(reading.newest(loaded(root)).values())) == ([], "")


def test_without_results_of_a_gpu_the_page_says_so(root, no_plots):
    write_run(root)
    assert report.NOT_MEASURED_ON_A_GPU in page_of(root)


def test_all_plots_are_drawn_and_shown(root):
    # As little as makes all of them: drawing takes long.
    few = [ceilings_record(False), time_record(CPU_CASES[0], 1.0, False), block_time(False)]
    few += [block_memory(False), training_record(False)]
    for record in few[-2:]:
        record["rows"] = record["rows"][:3]
    write_run(root, records=few)
    page = page_of(root)
    drawn = {path.name: path.read_bytes() for path in (root.parent / "docs" / "plots").iterdir()}
    assert sorted(drawn) == [f"{name}-cpu.png" for name in sorted(reading.PLOTS)]
    for name, content in drawn.items():
        assert content.startswith(b"\x89PNG") and f"](plots/{name})" in page


def test_equal_results_give_equal_pages_and_plots(root, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *args: {})
    write_run(root)
    write_run(root, gpu=True)
    before = page_of(root)
    assert page_of(root) == before
    for name in ("one.png", "two.png"):
        bars = [{"contender": "lorafa", "checkpointing": False, "units": 2.0, "saved_bytes": 2**20}]
        plots.blocks({"block": bars}, tmp_path / name, "CPU")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_plot_without_data_is_not_there(root):
    plot = root.parent / "docs" / "plots" / "training-cpu.png"
    plot.parent.mkdir(parents=True)
    plot.write_bytes(b"of an earlier report")
    write_run(root, records=[layer_memory(CPU_CASES[0], gpu=False)])
    assert ".png" not in page_of(root)
    assert not plot.exists()


def test_a_plot_names_the_machine_of_its_own_records(root, monkeypatch):
    """Bytes were measured on another one than times."""
    write_run(root, records=[time_record(CPU_CASES[0], 1.0, gpu=False), block_memory(gpu=False)])
    records = [record for record in loaded(root) if record["kind"] in reading.MEASURED]
    of_bytes = next(record for record in records if record["kind"] == "memory")
    of_bytes["_run"] = copy.deepcopy(of_bytes["_run"])
    of_bytes["_run"]["environment"]["machine"]["cpu"] = "Xeon"
    said = {}
    for name in ("overhead", "roofline", "blocks", "training"):
        monkeypatch.setattr(plots, name, lambda *args, name=name: said.setdefault(name, args))
    plots.draw("cpu", records, reading.Sources(records, root), root)
    assert "CPU numbers: AMD EPYC, 2 threads; 2026-11-24" in said["overhead"]
    assert "CPU numbers: Xeon, 2 threads; 2026-11-24" in said["blocks"]


# Red rows


FAILED = {"status": "failed", "reason": "outside the error budget: dB"}


def loaded(root: Path) -> list[dict]:
    records, warnings = load(root)
    assert not warnings
    return records


@pytest.mark.parametrize("how", ["status", "errors"])
def test_a_failed_contender_has_no_number_anywhere(root, no_plots, how):
    """Its rows keep all their numbers, which a careless report would print."""
    wrong = {"errors": {"dB": {"error": None, "allowed": 1e-3, "kept": False}}}
    write_run(
        root, records=change(measurements(False), "peft-lora", **(FAILED if how == "status" else wrong))
    )
    write_run(root, gpu=True, records=change(measurements(True), "peft-lora", **FAILED))
    page = page_of(root)
    table = report.readme_table(loaded(root))
    for case in (CPU_CASES[0], GPU_CASES[0], GPU_CASES[-1]):
        number = numbers_of(RATIOS["peft-lora"], case, "peft-lora")
        assert number not in page and number not in table
    ours = f"{(RATIOS['lorafa'] + 0.016) / RATIOS['peft-lora']:.3f}"
    assert ours not in page
    assert "16.0 |" not in page.split("### Memory of one Transformer block")[2].split("###")[0]
    for text in (page, table):
        rows = [line for line in text.splitlines() if line.startswith("| MiniLM/query") and "fp32" in line]
        assert rows and rows[0].endswith("| failed |")
    assert "- PEFT LoRA: one layer, MiniLM/query 256×384×384 R=16 fp32" in page
    assert (
        "outside the error budget: dB" if how == "status" else "dB: error not finite, allowed 0.00100"
    ) in page
    records = [record for record in reading.newest(loaded(root)).values()]
    assert "peft-lora" not in {point.contender for point in plots.overhead_points(records)[0]}
    assert "peft-lora" not in {
        bar["contender"] for bars in plots.block_bars(records).values() for bar in bars
    }
    assert "peft-lora" not in {run["contender"] for run in plots.training_runs(records)[0]}


def test_the_same_contender_is_there_when_it_passes(root, no_plots):
    """What the test above looks for is where it looks."""
    write_run(root)
    page = page_of(root)
    number = numbers_of(RATIOS["peft-lora"], CPU_CASES[0], "peft-lora")
    assert number in page and number in report.readme_table(loaded(root))
    assert f"{(RATIOS['lorafa']) / RATIOS['peft-lora']:.2f}" in page
    records = [reading.described(record) for record in loaded(root) if record["kind"] not in ("run", "end")]
    assert "peft-lora" in {point.contender for point in plots.overhead_points(records)[0]}
    assert "peft-lora" in {run["contender"] for run in plots.training_runs(records)[0]}


def test_a_failed_baseline_takes_all_ratios_to_it_along(root, no_plots):
    write_run(root, records=change(measurements(False), "frozen", **FAILED))
    page = page_of(root)
    assert numbers_of(RATIOS["lorafa"], CPU_CASES[0], "lorafa") not in page
    assert "baseline failed" in page
    assert "geometric mean of" not in page
    # Against the others there still is one.
    assert f"{RATIOS['lorafa'] / RATIOS['eager-lora']:.3f}"[:4] in page
    records = [reading.described(record) for record in loaded(root) if record["kind"] not in ("run", "end")]
    assert plots.overhead_points(records)[0] == []
    assert {point.contender for point in plots.roofline_points(records)} == {"lorafa"}


def test_a_failed_cell_is_in_no_geometric_mean(root, no_plots):
    """One wrong cell of twelve: its ratio, a hundred times the others', would show in every mean."""
    records = measurements(True)
    cell = next(r for r in records if r["kind"] == "time" and r["mode"] == "eager" and r["case"]["M"] == 8192)
    R = cell["case"]["R"]
    for row in cell["rows"]:
        if row["contender"] == "lorafa":
            row.update(FAILED)
            row["ratios"]["frozen"] = summary(100.0)
    write_run(root, gpu=True, records=records)
    target = next(line for line in page_of(root).splitlines() if line.startswith(f"| M = 8192, R = {R} "))
    expected = RATIOS["lorafa"] + list(RATIOS).index("lorafa") * R * 1e-3 - 1
    assert f"| 11 of 12 | {100 * expected:+.1f} % * |" in target
    assert "not decided: cells missing" in target


def test_means_are_over_the_same_rows(root, no_plots):
    """Of four rows one has no ratio of lorafa_kernels, and three none of torch.compile."""
    records = measurements(False)
    times = [r for r in records if r["kind"] == "time" and r["mode"] == "eager"]
    for index, record in enumerate(times):
        for row in record["rows"]:
            if row["contender"] == "compiled-lorafa" and index > 0:
                row.update(status="not run", reason="takes long")
            if row["contender"] == "lorafa" and index == 1:
                row.update(FAILED)
            if row["contender"] == "eager-lora" and index == 1:
                row["ratios"]["frozen"] = summary(50.0)
    write_run(root, records=records)
    mean = next(line for line in page_of(root).splitlines() if line.startswith("| geometric mean of"))
    assert mean.startswith("| geometric mean of 3 rows, the same for all |")
    cells = [cell.strip() for cell in mean.split("|")]
    expected = {key: f"{RATIOS[key] + list(RATIOS).index(key) * 0.016:.3f}" for key in RATIOS}
    assert expected["lorafa"] in cells and expected["eager-lora"] in cells and "–" in cells
    assert expected["compiled-lorafa"] not in cells


def test_ratios_to_an_arrangement_have_a_mean_with_its_spread(root, no_plots):
    """Ours over "product, then addmm_" is 0.81 in one case and 1 in three; of PEFT one case has none."""
    records = measurements(False)
    times = [r for r in records if r["kind"] == "time" and r["mode"] == "eager"]
    for index, record in enumerate(times):
        for row in record["rows"]:
            if row["contender"] == "lorafa":
                row["ratios"]["addmm"] = {"median": 1.0, "p20": 0.9, "p80": 1.1, "min": 0.8}
                if index == 0:
                    row["ratios"]["addmm"] = {"median": 0.81, "p20": 0.6, "p80": 1.2, "min": 0.5}
                    del row["ratios"]["peft-lora"]
    write_run(root, records=records)
    section = page_of(root).split("### lorafa_kernels against the others")[1].split("\n#")[0]
    header, *rows = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    mean = dict(zip(map(str.strip, header), map(str.strip, rows[-1]), strict=True))
    count = len(times)
    median, low, high = (
        (first * others ** (count - 1)) ** (1 / count)
        for first, others in ((0.81, 1.0), (0.6, 0.9), (1.2, 1.1))
    )
    assert mean["M×K×N"] == "mean over the cases"
    assert mean["product, then addmm_ (as Unsloth)"] == f"{median:.2f} ({low:.2f}–{high:.2f})"
    assert mean["PEFT LoRA"] == "–"


def test_the_target_is_judged(root, no_plots):
    write_run(root, gpu=True)
    page = page_of(root)
    assert "| M = 8192, R = 16 | 12 of 12 | +12.7 % |" in page and "| ≤ 5 % | missed |" in page
    missing = len(target_grid()) - len(GPU_CASES)
    assert f"Of {len(target_grid())} cells {missing} are not measured yet" in page
    # At R = 64 ours is 1.037 of the fastest arrangement, spread 0.02; at R = 16 it is 0.995.
    slower = sum(case.R == 64 for case in GPU_CASES)
    assert f"in {len(GPU_CASES)} cells" in page and f"In {slower} of them it is slower" in page


def test_a_slower_cell_within_its_spread_is_not_counted(root, no_plots):
    records = measurements(True)
    for record in records:
        for row in record["rows"] if record["kind"] == "time" else ():
            row["ratios"] = {key: summary(value["median"], 0.03) for key, value in row["ratios"].items()}
    write_run(root, gpu=True, records=records)
    assert "In 0 of them it is slower" in page_of(root)


# What is not there


def test_rows_that_did_not_run_are_named_with_their_reason(root, no_plots):
    write_run(root, left=("eager far too large",))
    page = page_of(root)
    listing = page.split("### Not run")[1].split("###")[0]
    assert "- lorafa_kernels, Triton: needs a GPU. In:" in listing
    assert f"one layer ({len(CPU_CASES)} cases)" in listing
    assert "- PEFT LoRA: peft is not installed. In: memory of a layer (1 case)." in listing
    (graphs,) = (line for line in listing.splitlines() if "CUDA graphs" in line)
    assert graphs.endswith(": CUDA graphs need a GPU. In: one layer in a CUDA graph (1 case).")
    assert set(graphs.partition(": ")[0].removeprefix("- ").split("; ")) == {
        c.title for c in contenders.CONTENDERS.values()
    }
    assert "Not run: CUDA graphs need a GPU." in page
    assert "- `eager far too large`" in page


def test_a_measurement_that_raised_as_a_whole_is_named(root, no_plots):
    rows = [{"contender": "lorafa", "part": "both", "status": "failed", "reason": "ValueError: no"}]
    broken = {"kind": "training", "key": "training huge", "rows": rows, "failed": "ValueError: no"}
    nothing = {"kind": "ceilings", "key": "ceilings", "rows": [], "failed": "ValueError: never"}
    records = [r for r in measurements(False) if r["kind"] != "ceilings"]
    write_run(root, records=[*records, broken, nothing])
    failed = page_of(root).split("### Failed")[1].split("###")[0]
    assert "training huge" in failed and "ValueError: no." in failed and "ValueError: never" in failed


def test_the_rate_of_expand_is_told_with_its_card(root, no_plots):
    write_run(root, gpu=True, records=[*measurements(True), main_loop_record()])
    line = "NVIDIA H200: expand (tma) runs at 0.93 of the library's product, 4096×4096×4096, R = 16, bf16"
    assert f"### The rate of expand beside the library's product\n\n- {line}" in page_of(root)
    shown = io.StringIO()
    console.show([main_loop_record()], Console(file=shown, width=60))
    assert line in shown.getvalue()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, ""),
        ({"kept": True, "not_kept": None}, "; later plans follow it"),
        ({"kept": False, "not_kept": "no home"}, "; plans do not follow it: no home"),
    ],
    ids=str,
)
def test_whether_plans_follow_the_rate_is_told(told, words):
    record = main_loop_record()
    record["rows"][0] |= told
    (line,) = reading.main_loop_lines(record)
    assert line.endswith(f"R = 16, bf16{words}")


def test_a_refused_rate_of_expand_is_among_what_failed(root, no_plots):
    write_run(root, gpu=True, records=[*measurements(True), main_loop_record(share=None)])
    page = page_of(root)
    assert "### The rate of expand" not in page
    assert "main-loop: y has a relative error of 1." in page.split("### Failed")[1]


def test_a_damaged_line_is_skipped_and_named(root, no_plots):
    path = write_run(root)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], lines[-2][:100], lines[-1]]) + "\n")
    page = page_of(root)
    assert "## Skipped\n\n- cpu/quick.jsonl, line" in page
    assert str(root) not in page


# Marks


def git(folder: Path, *command: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True)


def test_a_line_that_is_not_committed_is_marked(root, no_plots):
    path = write_run(root)
    assert "could not be checked: there is no git here" in page_of(root)
    git(root.parent, "init")
    git(root.parent, "add", "results")
    git(root.parent, "commit", "-m", "results")
    page = page_of(root)
    assert "†" not in page and "could not be checked" not in page

    text = path.read_text()
    label = reading.label_of({"label": CPU_CASES[0].label})
    key = f'"key": "eager {CPU_CASES[0].label}"'
    assert text.count(key) == 1
    path.write_text(text.replace(key, f'"edited": true, {key}'))
    page = page_of(root)
    assert f"| {label} † |" in page and "† the row's line is not in the committed version" in page
    others = [line for line in page.splitlines() if "†" in line and label not in line]
    assert others == ["† the row's line is not in the committed version of its file."]

    git(root.parent, "commit", "-am", "edited")
    assert "†" not in page_of(root)


@pytest.mark.parametrize(
    "dirty, words", [(True, "with uncommitted changes;"), (None, "(tree not checked);"), (False, None)]
)
def test_a_tree_with_uncommitted_changes_is_marked(root, no_plots, dirty, words):
    write_run(root, dirty=dirty)
    page = page_of(root)
    assert ("‡" in page) == (dirty is True)
    assert words is None or f"commit {'c' * 12} {words}" in page


def test_the_newest_run_counts(root, no_plots):
    """Whichever comes last in the file."""
    records = [r for r in measurements(False) if r["kind"] == "time"]
    newer = change(records, "lorafa", ratios={"frozen": summary(1.777)})
    write_run(root, records=newer, run="new", date="2026-11-25T09:00:00+00:00", commit="d" * 40)
    assert "1.777 (" in page_of(root)
    write_run(root, records=records[:1], run="old", date="2026-11-24T09:00:00+00:00")
    write_run(root, records=[layer_memory(CPU_CASES[0], False)], run="old2", date="2026-11-24T09:30:00+00:00")
    page = page_of(root)
    assert page.count("1.777 (") >= len(CPU_CASES)
    assert numbers_of(RATIOS["lorafa"], CPU_CASES[0], "lorafa") not in page
    for mixed in (loaded(root), loaded(root)[::-1]):
        assert {r["run"] for (_, kind, _), r in reading.newest(mixed).items() if kind == "time"} == {"new"}
    # Two runs are in use: each row says which, and the run that counts nowhere is not named.
    assert "- [1] From `cpu/quick.jsonl`" in page and "- [2] From `cpu/quick.jsonl`" in page
    assert "- [3]" not in page
    assert f"| {reading.label_of({'label': CPU_CASES[0].label})} [2] |" in page


# README and console


def test_readme_table_says_where_it_comes_from(root):
    write_run(root, gpu=True)
    with pytest.raises(ValueError, match="no CPU times"):
        report.readme_table(loaded(root))
    write_run(root)
    table = report.readme_table(loaded(root))
    assert "AMD EPYC, 2 threads; 2026-11-24; python 3.12.1, torch 2.11.0" in table
    assert f"commit {'c' * 12}" in table and "H200" not in table
    assert table.count("| MiniLM/") == len(CPU_CASES)
    assert "in hidden states of 2.00 MiB): frozen model 5.00; lorafa_kernels 6.25;" in table


def shown(call, *values) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    call(*values, console)
    return console.export_text(styles=True)


def test_the_console_shows_red_rows_without_numbers():
    """Records straight from a run, which know no file."""
    records = [{**record, "run": "r", "date": "d"} for record in measurements(False)]
    text = shown(console.show, change(records, "peft-lora", **FAILED))
    line = next(line for line in text.splitlines() if "PEFT LoRA" in line)
    assert "failed: outside the error budget: dB" in line and "\x1b[31m" in line
    assert f"{RATIOS['peft-lora']:.1f}" not in line
    line = next(line for line in text.splitlines() if "lorafa_kernels, Triton" in line)
    assert "not run: needs a GPU" in line and "\x1b[33m" in line
    assert "training" in text and "tiny block" in text and "TFLOP/s" in text


def test_predictions_stand_beside_measurements_on_a_gpu_alone(root, no_plots):
    write_run(root)
    assert "predicted" not in page_of(root)
    cases_of_8192 = [case for case in GPU_CASES if case.M == 8192]
    records = [time_record(case, 1.0, gpu=True) for case in cases_of_8192]
    write_run(root, gpu=True, records=records)
    page = page_of(root)
    assert "predicted: lorafa_kernels" in page
    about = run_record("r", True, "2026-11-24T10:00:00+00:00")
    for record in records:
        found = predictions({**record, "_run": about})
        case = record["case"]
        assert 1 < found["both"] < (1.25 if min(case["K"], case["N"]) >= 2048 else 2), record["key"]
        low, high = sorted((found["forward"], found["backward"]))
        assert low <= found["both"] <= high
        assert f"| {reading.number(found['both'])} |" in page
    about["environment"]["machine"]["gpu"]["capability"] = "99.0"
    assert predictions({**records[0], "_run": about}) is None


# Comparing


def both(root: Path, new: list[dict], old: list[dict], **rest) -> compare.Comparison:
    """Compare two sets of measurements through result files."""
    a = write_run(root / "new", records=new, run="n", date="2026-11-25T10:00:00+00:00", **rest)
    b = write_run(root / "old", records=old, run="o")
    return compare.compare(loaded(a.parent.parent), compare.load_old(str(b)))


def find(comparison: compare.Comparison, contender: str, what: str = "ratio") -> list[compare.Change]:
    title = contenders.TITLES[contender]
    return [c for c in comparison.changes if (c.title, c.kind) == (title, what)]


@pytest.mark.parametrize("factor, beyond", [(1.0, False), (1.015, False), (1.03, True), (0.97, True)])
def test_a_change_is_beyond_the_spread_if_the_intervals_are_apart(root, factor, beyond):
    old = [time_record(CPU_CASES[0], 1.0, False)]
    new = change(old, "eager-lora", ratios={"frozen": summary((RATIOS["eager-lora"] + 0.08) * factor)})
    comparison = both(root, new, old)
    found = find(comparison, "eager-lora")
    assert len(found) == len(PARTS) and {c.beyond for c in found} == {beyond}
    assert all(c.percent == pytest.approx(100 * (factor - 1), abs=0.01) for c in found)
    assert not any(c.beyond for c in comparison.changes if c not in found)
    text = shown(compare.show, comparison)
    assert ("beyond the spread\x1b" in text or "beyond the spread " in text.split("compared:")[0]) == beyond
    if beyond:
        assert comparison.changes[0].title == contenders.TITLES["eager-lora"]


def test_bytes_and_statuses_are_compared(root):
    old = [layer_memory(CPU_CASES[0], False)]
    new = change(change(old, "lorafa", saved_bytes=2**20), "eager-lora", **FAILED)
    comparison = both(root, new, old)
    (saved,) = find(comparison, "lorafa", "saved_bytes")
    assert (saved.old, saved.new, saved.percent, saved.beyond) == (2**21, 2**20, -50.0, True)
    assert not find(comparison, "eager-lora", "saved_bytes")
    (status,) = find(comparison, "eager-lora", "status")
    assert (status.old, status.new, status.beyond) == ("ok", "failed", True)
    assert comparison.changes[0] is status
    assert "failed" in shown(compare.show, comparison)


def test_what_only_one_side_has_is_listed(root):
    first, second = (time_record(case, 1.0, False) for case in CPU_CASES[:2])
    comparison = both(root, [first], [second])
    assert not comparison.changes
    for only, record in ((comparison.only_new, first), (comparison.only_old, second)):
        assert only and {c.what for c in only} == {
            f"cpu: {reading.label_of({'label': record['key']})}, status ({part})" for part in PARTS
        }
    assert "only in the old results" in shown(compare.show, comparison)


def test_differences_of_the_machines_come_first(root):
    records = [time_record(CPU_CASES[0], 1.0, False)]
    comparison = both(root, records, records, commit="d" * 40)
    assert comparison.differences == (f"cpu: commit was {'c' * 12}, now {'d' * 12}",)
    assert shown(compare.show, comparison).splitlines()[0].endswith("now dddddddddddd")


def test_results_of_a_revision(root):
    path = write_run(root, records=[time_record(CPU_CASES[0], 1.0, False)])
    git(root.parent, "init")
    with pytest.raises(ValueError, match="neither a result file nor a revision"):
        compare.load_old("HEAD", root)
    git(root.parent, "add", "results")
    git(root.parent, "commit", "-m", "results")
    committed = compare.load_old("HEAD", root)
    assert [r["_line"] for r in committed] == [r["_line"] for r in parse(path.read_text(), path)[0]]
    path.unlink()
    git(root.parent, "commit", "-am", "none")
    assert compare.load_old("HEAD~1", root) == committed
    with pytest.raises(ValueError, match="no result files"):
        compare.load_old("HEAD", root)


@pytest.mark.parametrize("source", ["no-such-revision", "--output=x", "missing.jsonl"])
def test_an_unknown_source_is_named(root, source):
    with pytest.raises(ValueError, match=source):
        compare.load_old(source, root)


def test_a_file_without_results_is_an_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"kind": "time"')
    with pytest.raises(ValueError, match="no results in this file"):
        compare.load_old(str(path))
