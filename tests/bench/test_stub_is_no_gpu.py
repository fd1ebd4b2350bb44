"""A run through the stub driver, where nothing computes, can never pass for one on a GPU."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.measure import timing
from bench.report import families, tables
from bench.report import page as report
from bench.run import environment, stub
from bench.run import store as results
from lorafa_kernels.__main__ import main as lorafa_kernels_main
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.recipe import Device, Recipe
from lorafa_kernels.plan.tables import Entry, Key, Measured
from lorafa_kernels.tune import command as tune

NAME = "STUB sm_90"
TINY = ["--layers", "MiniLM/query", "--rows", "16", "--ranks", "4", "--dtype", "fp32", "--rounds", "1"]
TINY += ["--kinds", "time", "--contenders", "frozen", "--device", "cpu"]


@pytest.fixture
def stubbed(monkeypatch):
    """What tests/stub_gpu sets, for a run of bench."""
    monkeypatch.setenv(stub.VARIABLE, "sm_90")
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


def test_the_environment_names_the_stub_and_nothing_of_a_gpu_beside_it(stubbed, monkeypatch):
    def never(*arguments):
        raise AssertionError("asked nvidia-smi")

    monkeypatch.setattr(environment, "gpu_state", never)
    about = environment.environment()
    assert about["stub"] is True
    assert about["machine"]["gpu"]["name"] == NAME
    assert not any(about["machine"]["gpu"].get(name) for name in ("driver", "sm_clock_mhz", "smi_name"))


def test_without_the_stub_there_is_no_mark():
    assert "stub" not in environment.environment()


def test_every_line_of_a_stub_run_is_marked(stubbed, tmp_path):
    assert command.main(["run", *TINY, "--out", str(tmp_path / "a.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "begin", "time", "end"]
    assert all(line["stub"] is True for line in lines)
    assert lines[0]["environment"]["machine"]["gpu"]["name"] == NAME


@pytest.mark.parametrize("out", [None, "stub-sm-90", "cpu/a.jsonl", "cpu/../cpu"], ids=str)
def test_bench_writes_no_stub_run_among_the_results(stubbed, tmp_path, monkeypatch, capsys, out):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    more = [] if out is None else ["--out", str(tmp_path / out)]
    for name in ("run", "quick", "suite"):
        arguments = TINY if name == "run" else ["--device", "cpu", "--budget", "1"]
        assert command.main([name, *arguments, *more]) == 2
        assert "stub driver" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def hidden(lines: list[dict], how: str) -> list[dict]:
    """Take one of the two signs out of a stub run's lines."""
    lines = copy.deepcopy(lines)
    for line in lines:
        if how == "mark removed":
            line.pop("stub", None)
            line.get("environment", {}).pop("stub", None)
        if how == "renamed" and "environment" in line:
            line["environment"]["machine"]["gpu"]["name"] = "NVIDIA H100 80GB HBM3"
            line["environment"].pop("stub")
        if how == "only the measurement marked" and "environment" in line:
            line["environment"].update(stub=False, machine={**line["environment"]["machine"], "gpu": None})
            line.pop("stub")
    return lines


@pytest.fixture(params=["as written", "mark removed", "renamed", "only the measurement marked"])
def stub_file(request, stubbed, tmp_path) -> Path:
    """A folder with a stub run, and with CPU results beside it."""
    written = tmp_path / "a.jsonl"
    assert command.main(["run", *TINY, "--out", str(written)]) == 0
    folder = tmp_path / "results" / "nvidia-h100"
    folder.mkdir(parents=True)
    lines = hidden([json.loads(line) for line in written.read_text().splitlines()], request.param)
    (folder / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sound = (results.RESULTS / "cpu" / "cpu.jsonl").read_text()
    (folder.parent / "cpu").mkdir()
    (folder.parent / "cpu" / "cpu.jsonl").write_text(sound)
    return folder / "gpu.jsonl"


def test_the_report_refuses_a_stub_run(stub_file, tmp_path, monkeypatch, capsys):
    root = stub_file.parent.parent
    page = tmp_path / "docs" / "performance.md"
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "PLOTS", tmp_path / "docs" / "plots")
    assert command.main(["report", "--results", str(root)]) == 2
    assert "stub driver" in capsys.readouterr().err
    assert command.main(["report", "--results", str(root), "--compare", str(stub_file)]) == 2
    assert not page.exists() and not list(tmp_path.rglob("*.png"))


def test_tables_refuse_a_stub_run(stub_file):
    records = tables.read_lines(stub_file)
    for table in (report.readme_table, families.memory_table):
        with pytest.raises(ValueError, match="stub driver"):
            table(records)


@pytest.mark.parametrize("name", ["gate-table", "demo-table"])
def test_tables_of_one_object_refuse_a_stub(name):
    table = tables.TABLES[name]
    result = table.read(environment.ROOT / table.source)
    table.render(result)
    for sign in ({"stub": True}, {"device": NAME}, {"machine": {**result.get("machine", {}), "gpu": NAME}}):
        with pytest.raises(ValueError, match="stub driver"):
            table.render({**result, **sign})


def test_a_demo_run_through_the_stub_is_not_taken(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(tables, "write_json", lambda *arguments: written.append(arguments))
    source = json.loads((environment.ROOT / tables.DEMO_RESULTS).read_text())
    (tmp_path / "results.json").write_text(json.dumps({**source, "stub": True}))
    assert tables.main(["--check", "--take-demo", str(tmp_path / "results.json")]) == 2
    assert "stub driver" in capsys.readouterr().err
    assert not written


# Tables of tune

DEVICE = Device(NAME, KNOWN_DEVICES["sm_90"], "3.7.1")
ENTRY = Entry(Key("forward", "bfloat16", 512, 512, 16, 512), (Measured(Recipe("library"), 1.0, 1.0),))


@pytest.mark.parametrize("out", [None, "cache", "shipped"])
def test_tune_keeps_no_stub_table(tmp_path, monkeypatch, capsys, out):
    folders = {"cache": tmp_path / "cache", "shipped": tmp_path / "tables"}
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(folders["cache"]))
    monkeypatch.setattr(tune, "SHIPPED", folders["shipped"])
    monkeypatch.setattr(tune, "_missing", lambda device, dtype: None)
    monkeypatch.setattr(tune, "planned_device", lambda device: DEVICE)
    monkeypatch.setattr(tune, "EventTimer", lambda device: pytest.fail("it would be measured"))
    more = [] if out is None else ["--out", str(folders[out] / "nvidia-h100.json")]
    assert lorafa_kernels_main(["tune", "--shapes", "512x512x512x16", *more]) == 2
    assert "stub driver" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sign", ["as written", "mark removed", "renamed"])
def test_a_stub_table_is_never_read(tmp_path, sign):
    path = tmp_path / "table.json"
    for entry in (ENTRY, replace(ENTRY, key=replace(ENTRY.key, K=1024))):
        lookup.update_table(path, DEVICE, [entry], {})
    written = json.loads(path.read_text())
    assert (written["stub"], written["device"], len(written["entries"])) == (True, NAME, 2)
    if sign == "mark removed":
        del written["stub"]
    if sign == "renamed":
        written["device"] = "NVIDIA H100 80GB HBM3"
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="stub driver"):
        lookup.read_table(path)
    # The same table of a GPU is read.
    path.write_text(json.dumps({**written, "stub": False, "device": "NVIDIA H100 80GB HBM3"}))
    assert len(lookup.read_table(path).entries) == 2
