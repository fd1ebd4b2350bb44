"""python -m bench: what a user types, and what comes back."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench.measure import main_loop, timing
from bench.measure.cases import HOST_CASES, grid
from bench.measure.contenders import CONTENDERS
from bench.run import jobs
from bench.run import store as results
from bench.run.jobs import COMPILED, KINDS, Setting
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.choice import choose_plan, forget_plans, planned_device
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES
from lorafa_kernels.plan.make import make_plan
from lorafa_kernels.plan.recipe import Device, Problem
from lorafa_kernels.tune import share
from lorafa_kernels.tune.search import Sample

TINY = ["--layers", "MiniLM/query", "--rows", "16", "--ranks", "4", "--dtype", "fp32", "--rounds", "2"]
ONCE = ["--sittings", "1"]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**10)


def run(out, *more: str) -> int:
    return command.main(["run", *TINY, *ONCE, "--device", "cpu", "--out", str(out), *more])


def test_run_writes_a_file_and_shows_a_table(tmp_path, capsys):
    assert run(tmp_path, "--kinds", "time", "--contenders", "frozen", "lorafa") == 0
    records, warnings = results.load(tmp_path)
    assert not warnings
    assert [record["kind"] for record in records] == ["run", "begin", "time", "end"]
    about = records[0]["environment"]
    assert set(about) == {"date", "machine", "versions", "commit", "dirty", "tree"}
    assert about["machine"]["threads"] == torch.get_num_threads()
    assert {row["contender"] for row in records[2]["rows"]} == {"frozen", "lorafa"}
    assert {row["status"] for row in records[2]["rows"]} == {"ok"}
    shown = capsys.readouterr().out
    assert "lorafa_kernels" in shown
    assert str(tmp_path / "chosen.jsonl") in shown


def test_rounds_are_spread_over_sittings(tmp_path):
    more = ("--kinds", "time", "--contenders", "frozen", "lorafa", "--rounds", "3", "--sittings", "2")
    assert run(tmp_path, *more) == 0
    records, _ = results.load(tmp_path)
    first, last = (record for record in records if "rows" in record)
    assert (first["kind"], first["rounds"], last["kind"]) == ("sitting", 2, "time")
    assert (last["rounds"], last["sittings"]) == (4, 2)
    for row in last["rows"]:
        assert len(row["samples_ms"]) == 4
        assert row["ms"]["min"] == min(row["samples_ms"])


def test_fresh_discards_and_plain_appends(tmp_path):
    options = ("--kinds", "time", "--contenders", "frozen")
    path = tmp_path / "here.jsonl"
    for more, runs in (((), 1), ((), 2), (("--fresh",), 1)):
        assert run(path, *options, *more) == 0
        assert len([record for record in results.read(path)[0] if record["kind"] == "run"]) == runs


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["run", "--grid", "targt"], ["unknown grid", "target", "first-hour"]),
        (["run", "--layers", "Lama"], ["unknown model", "Llama-3-8B", "T5-base"]),
        (["run", "--layers", "Llama-3-8B/quary"], ["unknown layer of Llama-3-8B", "gate", "down"]),
        (["run", "--contenders", "peft"], ["unknown contender", *CONTENDERS]),
        (["quick", "--contenders", "pefft-lora"], ["did you mean peft-lora", *CONTENDERS]),
        (["run", "--kinds", "times"], ["unknown kind", *KINDS]),
        (["run", "--rows", "0", "--layers", "MiniLM"], ["at least 1"]),
        (["run", "--dropout", "1"], ["dropout in [0, 1)"]),
        (["run", "--budget", "-1"], ["--budget must be positive"]),
        (["run", "--grid", "quick", "--layers", "MiniLM"], ["exclude each other"]),
        (["report", "--compare", "no-such-revision"], ["no-such-revision"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_says_what_would_be_right(arguments, listed, capsys, tmp_path):
    more = [] if arguments[0] == "report" else ["--out", str(tmp_path), "--device", "cpu"]
    assert command.main([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in listed), said
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(capsys, tmp_path):
    assert run(tmp_path, "--device", "cuda") == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_wrong_contender_fails_the_command(tmp_path, monkeypatch, capsys):
    from bench.measure import contenders

    def planted(operands, case):
        right = contenders.build_eager(operands, case)
        right.module.scaling *= 2
        return right

    wrong = contenders.Contender("eager-lorafa", "planted", planted)
    monkeypatch.setitem(contenders.CONTENDERS, "eager-lorafa", wrong)
    options = ("--kinds", "time", "--contenders", "frozen", "lorafa", "eager-lorafa")
    assert run(tmp_path, *options) == 1
    shown = capsys.readouterr().out
    assert "outside the error budget" in shown
    assert "eager-lorafa" in shown


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    right = jobs.layers.time_case

    def interrupted_later(case, *args, **options):
        if case.M == 32:
            raise KeyboardInterrupt
        return right(case, *args, **options)

    options = ("--kinds", "time", "--contenders", "frozen", "--rows", "16", "32")
    with monkeypatch.context() as patch:
        patch.setattr(jobs.layers, "time_case", interrupted_later)
        assert run(tmp_path, *options) == 130
    assert "goes on" in capsys.readouterr().out
    assert run(tmp_path, *options) == 0
    records, _ = results.load(tmp_path)
    assert [record["case"]["M"] for record in records if record["kind"] == "time"] == [16, 32]


def test_the_rate_of_expand_needs_a_gpu(tmp_path, capsys):
    assert run(tmp_path, "--kinds", "main-loop") == 0
    (record,) = (one for one in results.load(tmp_path)[0] if one["kind"] == "main-loop")
    (row,) = record["rows"]
    assert (row["status"], row["share"]) == ("not run", None) and "on a GPU" in row["reason"]


def test_the_rate_of_expand_is_measured_as_tune_does(monkeypatch, tmp_path):
    """By bench's clock, which gives seconds."""
    found = share.MainLoop("tma", 0.931254, 200.0, 185.5)

    def measured(device, timer):
        assert device.type == "cuda" and timer(None) == Sample(250.0, 0.0)
        return found

    monkeypatch.setattr(share, "measure_main_loop", measured)
    monkeypatch.setattr(main_loop, "EventTimer", lambda: lambda step: 250e-6)
    monkeypatch.setattr(main_loop, "planned_device", lambda device: H200)
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    job = jobs.main_loop_job(Setting("cuda"))
    payload = job.run(lambda fraction: None)
    (row,) = payload.pop("rows")
    assert payload == {"card": "NVIDIA H200", "size": [4096] * 3, "rank": 16}
    assert (row["contender"], row["status"], row["variant"]) == (*job.contenders, "ok", "tma")
    assert (row["share"], row["expand_us"], row["library_us"]) == (0.93125, 200.0, 185.5)
    found = share.MainLoop("tma", refused="y is wrong")
    (row,) = job.run(lambda fraction: None)["rows"]
    assert (row["status"], row["reason"], row["share"]) == ("failed", "y is wrong", None)


H200 = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.7.1")
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)


@pytest.fixture
def rate_job(monkeypatch, tmp_path):
    """A function (found, device) that runs the suite's first job as if `found` were measured on `device`, and
    returns its row.
    """
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(main_loop, "EventTimer", lambda: None)
    forget_plans()

    def run_job(found, device=H200) -> dict:
        monkeypatch.setattr(share, "measure_main_loop", lambda *_: found)
        monkeypatch.setattr(main_loop, "planned_device", lambda _: device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device.name)
        first = jobs.suite(Setting("cuda"))[0]
        (row,) = first.run(lambda fraction: None)["rows"]
        return row

    yield run_job
    forget_plans()


def test_what_the_suite_measures_next_is_planned_with_the_rate_of_expand(rate_job):
    assert make_plan(PROBLEM, H200).name == "fused"
    row = rate_job(share.MainLoop("tma", 0.7, 200.0, 140.0))
    assert (row["kept"], row["not_kept"]) == (True, None)
    table = lookup.read_table(lookup.cache_path(H200))
    assert table.device == "NVIDIA H200" and table.main_loop == (("tma", 0.7),) and table.entries == ()
    assert dict(table.about)["torch"] == torch.__version__
    plan = make_plan(PROBLEM, H200)
    assert (plan.name, plan.main_loop) == ("library", (0.7, "measured on this device"))
    # Measured again, the last one counts.
    rate_job(share.MainLoop("tma", 0.97, 200.0, 194.0))
    assert make_plan(PROBLEM, H200).name == "fused"


def test_plans_that_were_made_before_are_made_again(rate_job, fake_gpu):
    pytest.importorskip("triton")
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H200", (9, 0))
    device = torch.device("cuda")

    def planned() -> str:
        return choose_plan("auto", "forward", device, torch.bfloat16, 8192, 4096, 4096, 16, False).name

    assert planned() == "fused"
    rate_job(share.MainLoop("tma", 0.7, 200.0, 140.0), planned_device(device))
    assert planned() == "library"


@pytest.mark.parametrize(
    ("found", "device", "why"),
    [
        pytest.param(
            share.MainLoop("tma", 0.7), replace(H200, name="STUB sm_90"), "a stub driver", id="stub"
        ),
        pytest.param(share.MainLoop("tma", refused="y is wrong"), H200, "not known: y is wrong", id="wrong"),
        pytest.param(
            share.MainLoop("portable", 0.7),
            replace(H200, name="Triton's interpreter", limits=INTERPRETER),
            "of no GPU",
            id="interpreter",
        ),
    ],
)
def test_a_rate_that_means_nothing_is_not_kept_and_the_record_says_why(
    rate_job, tmp_path, found, device, why
):
    row = rate_job(found, device)
    assert row["kept"] is False and why in row["not_kept"]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_the_rate_alone(rate_job, tmp_path):
    (tmp_path / "cache").write_text("a file")
    row = rate_job(share.MainLoop("tma", 0.7, 200.0, 140.0))
    assert (row["status"], row["share"], row["kept"]) == ("ok", 0.7, False)
    assert "cannot be written" in row["not_kept"] and str(tmp_path) not in row["not_kept"]


def test_a_rate_is_measured_on_a_gpu_alone(rate_job, tmp_path):
    (row,) = main_loop.measure("cpu")["rows"]
    assert (row["status"], row["kept"]) == ("not run", False)
    assert not (tmp_path / "cache").exists()


def test_the_rate_is_measured_anew_by_a_run_that_goes_on():
    """It may go on where the user's table is another one."""
    assert jobs.main_loop_job(Setting("cuda")).always


def test_list_names_everything(capsys):
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*CONTENDERS, *KINDS, "Llama-3-70B", "first-hour"))


def test_quick_names_everyone_and_compiles_once():
    setting = Setting("cpu")
    found = jobs.jobs_of(grid("quick"), KINDS, setting, compiled=False)
    assert len({job.key for job in found}) == len(found)
    kinds = [job.kind for job in found]
    assert kinds[:2] == ["main-loop", "ceilings"]
    assert {"time", "memory", "training"} <= set(kinds)
    timed = [job for job in found if job.key.startswith("eager")]
    assert len(timed) == len(grid("quick"))
    everyone = set(setting.contenders)
    assert [set(job.contenders) for job in timed] == [everyone] + [everyone - {COMPILED}] * 3
    # What is left out of a case is a row of it all the same.
    case = HOST_CASES[0]
    setting.rounds = 1
    row = {
        row["contender"]: row
        for row in jobs.time_job(case, setting, "host", {COMPILED: "takes long"}).run(lambda f: None)["rows"]
    }[COMPILED]
    assert (row["status"], row["reason"], row["ms"]) == ("not run", "takes long", None)


def test_suite_goes_in_the_order_of_what_tells_most():
    found = jobs.suite(Setting("cuda"))
    keys = [job.key for job in found]
    assert len(set(keys)) == len(keys)
    assert keys[:3] == ["main-loop", "ceilings", "tests"]

    def first(start: str) -> int:
        return next(number for number, key in enumerate(keys) if key.startswith(start))

    order = [
        "kernel Llama-3-8B/q",
        "eager Llama-3",
        "kernel Llama-3-8B/gate 8192x4096x14336 R=64",
        "nf4",
        "host",
    ]
    order += ["block-time", "block Llama", "training Llama-3.2-1B", "training Llama-3-8B, largest", "wall"]
    order += ["training Llama-3-8B, 1x2048", "memory", "graph"]
    assert [first(start) for start in order] == sorted(first(start) for start in order)
    timed = [job for job in found if job.key.startswith("eager")]
    assert any(job.contenders == tuple(CONTENDERS) for job in timed)
    assert all({"frozen", "lorafa", "triton", "library"} <= set(job.contenders) for job in timed)
    target = [job for job in timed[:24] if " 8192x" in job.key]
    assert len(target) == 24, "all cells that the target names come first"
    assert any("dropout=0.1" in job.key for job in timed)
    assert "tests" not in [job.key for job in jobs.suite(Setting("cuda"), tests=False)]


def test_suite_measures_only_what_no_committed_file_has(tmp_path, monkeypatch, capsys):
    kept, out = tmp_path / "kept", tmp_path / "out"
    monkeypatch.setattr(command, "RESULTS", kept)
    case = HOST_CASES[0]

    def two(setting, tests):
        only = Setting(setting.device, ("frozen",), 1)
        return [jobs.ceilings_job(only), jobs.time_job(case, only, "host")]

    monkeypatch.setattr(command, "suite", two)
    monkeypatch.setitem(jobs.ceilings.SIZES, "cpu", ({"fp32": (32,)}, 1024))
    arguments = ["suite", "--device", "cpu", "--budget", "5400", "--out"]
    assert command.main([*arguments, str(kept / "cpu")]) == 0
    (path,) = (kept / "cpu").iterdir()
    for folder in (out, kept / "cpu"):
        assert command.main([*arguments, str(folder)]) == 0
        assert "measured already" in capsys.readouterr().out
    assert not out.exists()
    assert os.listdir(kept / "cpu") == [path.name]
    lines = [line for line in path.read_text().splitlines() if '"kind":"time"' not in line]
    path.write_text("\n".join(lines))
    assert command.main([*arguments, str(out)]) == 0
    records = results.load(out)[0]
    assert [record["kind"] for record in records if record["kind"] != "begin"] == [
        "run",
        "ceilings",
        "time",
        "end",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_job_says_roughly_how_long_it_takes(device):
    """A budget that is planned with a zero would start what it cannot finish."""
    few, many = (
        {job.key: job.seconds for job in jobs.jobs_of(grid("quick"), KINDS, Setting(device, keys))}
        for keys in (("frozen",), ("frozen", "lorafa", COMPILED))
    )
    assert few.keys() == many.keys() and all(0 < few[key] <= many[key] for key in few)
    layers = [key for key in few if key.startswith(("eager", "host", "memory"))]
    assert layers and all(few[key] < many[key] for key in layers)
    one, all_of_them = (jobs.seconds_of(device, keys, 1e9, 5) for keys in (("a",), ("a", "compiled-a")))
    assert 0 < one < all_of_them
