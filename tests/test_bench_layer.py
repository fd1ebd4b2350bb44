"""bench.layer, bench.first_gpu, bench.environment: what they refuse to publish, and the files they write."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import environment, first_gpu, layer
from bench.layer import FROZEN, PEFT, Case, Contender, Layer

TINY = Case(24, 40, 32, 4, "fp32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(layer, "SAMPLE_SECONDS", 1e-4)


def quiet() -> Console:
    return Console(
        width=200, force_terminal=True, color_system="standard", file=open(os.devnull, "w"), record=True
    )


def without_peft(dtype: str) -> list[Contender]:
    return [contender for contender in layer.layer_contenders(dtype) if not contender.name.startswith("PEFT")]


def rows_of(contenders: list[Contender]) -> dict[str, layer.Row]:
    rows = layer.run([TINY], 2, quiet(), lambda dtype: contenders)
    return {row.contender: row for row in rows}


def build_scaled_wrongly(operands) -> Layer:
    right = layer.build_eager(operands)
    right.module.scaling *= 1.05
    return right


def build_raising(operands) -> Layer:
    raise RuntimeError("does not run here\nsecond line")


def build_nan(operands) -> Layer:
    right = layer.build_eager(operands)
    return Layer(lambda x: right.module(x) * float("nan"), right.lora_B)


def test_quick_run_writes_a_complete_file(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "new" / "layer.json"
    threads = torch.get_num_threads()
    assert layer.main(["--quick", "--rounds", "2", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    assert result["quick"] is True
    assert result["environment"]["machine"]["threads"] == threads
    assert set(result["environment"]) == {"date", "machine", "versions", "commit", "dirty"}
    rows = result["rows"]
    assert {row["case"]["dtype"] for row in rows} == {"fp32", "bf16"}
    assert {row["case"]["host"] for row in rows} == {True, False}
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert set(row["errors"]) == ({"y", "dx"} if row["contender"] == FROZEN else {"y", "dx", "dB"})
        assert 0 < row["ms"]["min"] <= row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert (PEFT in row["ratios"]) == (row["contender"] != PEFT)
    assert os.listdir(out.parent) == ["layer.json"]
    assert "lorafa_kernels" in capsys.readouterr().out


def test_quick_run_leaves_the_published_file_alone(monkeypatch):
    monkeypatch.setattr(layer, "run", lambda *args: [])
    monkeypatch.setattr(layer, "write_json", lambda *args: pytest.fail("--quick wrote a result"))
    assert layer.main(["--quick"]) == 0


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (build_scaled_wrongly, "outside the error budget: y, dx, dB"),
        (build_nan, "outside the error budget: y, dx, dB"),
        (build_raising, "RuntimeError: does not run here"),
    ],
    ids=["wrong", "nan", "raising"],
)
def test_planted_failure_is_red_and_has_no_number(build, reason):
    rows = rows_of([Contender("planted", build), *without_peft("fp32")])
    planted = rows["planted"]
    assert (planted.status, planted.reason) == ("failed", reason)
    assert planted.ms is None
    assert planted.ratios == {}
    assert rows["lorafa_kernels"].ms is not None
    json.dumps([vars(row) for row in rows.values()], allow_nan=False)
    console = quiet()
    layer.show(list(rows.values()), "title", (FROZEN,), console)
    line = next(line for line in console.export_text(styles=True).splitlines() if "planted" in line)
    assert "\x1b[31m" in line


def test_failed_contender_fails_the_command(monkeypatch):
    monkeypatch.setattr(layer, "layer_contenders", lambda dtype: [Contender("planted", build_raising)])
    monkeypatch.setattr(layer.run, "__defaults__", (layer.layer_contenders,))
    assert layer.main(["--quick", "--rounds", "1"]) == 1


def test_failed_baseline_gives_nobody_a_ratio():
    others = [contender for contender in without_peft("fp32") if contender.name != FROZEN]
    rows = rows_of([Contender(FROZEN, build_nan, adapted=False), *others])
    assert rows["lorafa_kernels"].ms is not None
    assert rows["lorafa_kernels"].ratios == {}


def test_missing_peft_stays_in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = rows_of(layer.layer_contenders("fp32"))
    assert (rows[PEFT].status, rows[PEFT].ms) == ("not run", None)
    assert set(rows["lorafa_kernels"].ratios) == {FROZEN}
    console = quiet()
    layer.show(list(rows.values()), "title", (PEFT, FROZEN), console)
    assert "not run: peft is not installed" in console.export_text()


def test_ratios_are_formed_within_rounds_and_every_contender_starts_one():
    # The clock runs slower from round to round; within each, "slow" takes twice the time of the baseline.
    steps = {"base": lambda: 1.0, "slow": lambda: 2.0, "third": lambda: 3.0}
    calls = itertools.count()
    order = []

    def seconds(step) -> float:
        order.append(step())
        return step() * 10 ** (next(calls) // len(steps))

    samples = layer.interleave(steps, 3, seconds, lambda: None)
    assert samples == {"base": [1, 10, 100], "slow": [2, 20, 200], "third": [3, 30, 300]}
    assert order[::3] == [1.0, 2.0, 3.0]

    builds = {name: Contender(name, layer.build_eager) for name in steps}
    now = itertools.count(1)
    rows = layer.measure(
        {},
        layer.make_operands(TINY),
        list(builds.values()),
        layer.whole_step,
        lambda steps: lambda step: float((next(now) + 2) // 3),
        rounds=5,
        baselines=("base",),
        advance=lambda: None,
    )
    ratio = rows[1].ratios["base"]
    assert rows[1].ms["p20"] < rows[1].ms["p80"]
    assert ratio["median"] == ratio["p20"] == ratio["p80"] == 1.0


def test_memory_is_poisoned_only_inside():
    before = torch.are_deterministic_algorithms_enabled()
    with layer.poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_ctrl_c_leaves_the_previous_result(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    out = tmp_path / "layer.json"
    out.write_text("previous")
    monkeypatch.setattr(layer, "interleave", interrupted)
    assert layer.main(["--quick", "--out", str(out)]) == 130
    assert out.read_text() == "previous"
    assert os.listdir(tmp_path) == ["layer.json"]
    assert "interrupted" in capsys.readouterr().err


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    environment.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    with pytest.raises(ValueError, match="JSON"):
        environment.write_json(path, {"a": float("nan")})
    for place, name in ((os, "replace"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            with pytest.raises(OSError, match="no space"):
                environment.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert os.listdir(tmp_path) == ["result.json"]


def test_environment_names_versions_and_commit_but_no_place(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    found = environment.environment()
    assert (found["commit"], found["dirty"]) == ("abc123", None)
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"].endswith("+00:00")
    text = json.dumps(found)
    assert str(environment.ROOT) not in text
    assert str(Path.home()) not in text


def test_commit_of_a_repository_around_the_checkout_is_not_ours(monkeypatch, tmp_path):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(environment, "_output", lambda *command: str(tmp_path))
    assert environment.environment()["commit"] is None


def test_first_gpu_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_first_gpu_measures_forward_and_backward(tmp_path):
    pytest.importorskip("triton")
    rows = first_gpu.run(DEVICE, shapes=((48, 32),), M=16, ranks=(4,), rounds=2)
    assert [(row.status, row.reason) for row in rows] == [("ok", None)] * 8
    assert [row.part for row in rows] == ["forward"] * 4 + ["backward"] * 4
    assert all(set(row.ratios) == {first_gpu.EAGER, FROZEN} - {row.contender} for row in rows)
    assert first_gpu.report(environment.environment(), rows, tmp_path) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("first-")
    assert len(json.loads(path.read_text())["rows"]) == 8


def test_first_gpu_shows_a_wrong_kernel_as_failed(tmp_path, monkeypatch, capsys):
    wrong = [Contender('impl="triton"', build_scaled_wrongly), *first_gpu.contenders()[1:]]
    monkeypatch.setattr(first_gpu, "contenders", lambda: wrong)
    rows = first_gpu.run(DEVICE, shapes=((48, 32),), M=16, ranks=(4,), rounds=1)
    assert [row.status for row in rows] == ["failed", "ok", "ok", "ok"] * 2
    assert first_gpu.report(environment.environment(), rows, tmp_path) == 1
    assert "outside the error budget" in capsys.readouterr().out
