"""The study's report: intervals, differences, verdicts, what is missing; committed pages are up to date."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("scipy", reason="the study needs scipy")
pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
pytest.importorskip("transformers", reason="the study needs transformers")

from PIL import Image

from bench.quality import command, reading, records, report, tables
from bench.quality.plan import Run
from bench.quality.settings import METHODS, SEEDS, TASKS
from bench.quality.statistics import adjusted, difference, mean_of
from bench.run.environment import ROOT

TASK = "llama-manual"


def test_the_interval_is_student_s():
    # t with 2 degrees of freedom at 97.5 %: 4.303; standard error 1/√3.
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, round(mean.half, 2), mean.count) == (2.0, 2.48, 3)
    assert mean.holds(4.4) and not mean.holds(4.6)
    assert mean_of([7.0]).half is None and mean_of([7.0]).holds(7.0) is None
    with pytest.raises(ValueError, match="no value"):
        mean_of([])


def test_differences_are_of_shared_seeds_alone():
    found = difference({0: 1.0, 1: 2.5, 2: 100.0}, {0: 0.0, 1: 1.0, 7: -100.0})
    assert (found.mean.value, found.mean.count) == (1.25, 2)
    # t = 1.25 / 0.25 = 5 with one degree of freedom: p = 1 − 2/π · arctan 5.
    assert round(found.p, 4) == 0.1257
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).p is None
    assert adjusted([0.01, None, 0.04]) == [0.02, None, 0.04]


def study_of(scores: dict[str, list[float]]) -> dict[str, dict]:
    """Finished runs of TASK with these bits a byte by method and seed; the middle rate is best."""
    done = {}
    for method, values in scores.items():
        for number, rate in enumerate(METHODS[method].rates):
            line = {"validation": {"nats": 1.0 + abs(number - 1)}, "test": {"nats": 9.0, "right": 0.0}}
            done[Run(TASK, method, rate, 0).key] = line
        for seed, value in zip(SEEDS, values, strict=False):
            line = {"validation": {"nats": 1.0}, "test": {"nats": value * 0.6931471805599453, "right": 0.5}}
            done[Run(TASK, method, METHODS[method].rates[1], seed).key] = line
    return done


def verdict(done: dict[str, dict]) -> str:
    (found,) = [line for line in tables.verdicts(done) if TASKS[TASK].title in line]
    return found


def test_the_verdict_says_within_or_by_how_much_not():
    lora = [2.0, 2.1, 2.2]
    # Half of the interval: 4.303 · 0.1/√3 = 0.248.
    assert (
        "LoRA-FA's mean, 2.300, is within LoRA's interval, 1.852 to 2.348 bits a byte (3 seeds)"
        in verdict(study_of({"lora": lora, "lorafa": [2.2, 2.4, 2.3]}))
    )
    assert "is 0.152 outside of LoRA's interval, 1.852 to 2.348 bits a byte (3 seeds): worse." in verdict(
        study_of({"lora": lora, "lorafa": [2.4, 2.6, 2.5]})
    )
    assert ": better." in verdict(study_of({"lora": lora, "lorafa": [1.4, 1.62, 1.5]}))
    assert verdict(study_of({"lora": [2.0], "lorafa": [2.0]})).endswith("not run yet.")


def test_significance_is_said_either_way():
    noisy = study_of({"lora": [2.0, 2.4, 2.2], "lorafa": [2.3, 2.2, 2.4]})
    assert "not significant" in verdict(noisy) and "not significant" in tables.difference_table(noisy)
    clear = study_of({"lora": [2.0, 2.1, 2.2], "lorafa": [2.500, 2.601, 2.699]})
    assert ", significant (p = " in verdict(clear) and "**p < 0.001**" in tables.difference_table(clear)


def test_what_is_missing_is_named_and_no_seed_is_left_out():
    done = study_of({"lora": [2.0, 2.1], "lorafa": [2.0, 2.1, 2.2, 2.3, 2.4]})
    left = reading.missing(done)
    assert f"{TASKS[TASK].title}, LoRA: 2 of 5 seeds" in left
    assert not any(f"{TASKS[TASK].title}, LoRA-FA:" in line for line in left)
    assert f"{TASKS['t5-tweets'].title}, LoRA: 0 of 5 seeds" in left
    assert "not run yet" in tables.score_table(done, {})
    assert set(reading.scores(done, TASK, "lorafa")) == set(SEEDS)


def test_cpu_time_is_added_up_by_model():
    runs = [Run(TASK, "lora", 1e-3, 0), Run(TASK, "lora", 1e-3, 1), Run("t5-tweets", "lora", 1e-3, 0)]
    done = {r.key: {"cpu_seconds": 90.0, "settings": {"task": r.task}} for r in runs}
    about = {TASK: {"pretraining": {"cpu_seconds": 60.0}}}
    assert report.cpu_words(done, about) == "CPU minutes of training: llama 4, t5 2."


def test_a_repeated_line_does_not_replace_the_first(tmp_path):
    path = tmp_path / "quality.jsonl"
    lines = [json.loads(line) for line in records.FILE.read_text(encoding="utf-8").splitlines()]
    header = next(line for line in lines if line["kind"] == "run")
    run = next(line for line in lines if line["kind"] == records.RUN and line["run"] == header["run"])
    better = {**run, "test": {"nats": 0.0, "right": 1.0}}
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, run, better)))
    assert records.finished(path)[run["key"]]["test"] == run["test"]


@pytest.mark.parametrize("page", report.PAGES)
def test_pages_are_what_the_committed_file_gives(page):
    assert report.filled(records.FILE)[page] == (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["tasks", "rank", "rates"])
def test_plots_are_of_the_committed_file(name):
    with Image.open(report.PLOTS / f"quality-{name}.png") as plot:
        assert plot.info["Source"] == report.digest(records.FILE)


def test_the_committed_file_says_where_it_comes_from():
    text = report.origin(records.FILE)
    assert "CPU (" in text and "commits " in text and "unknown" not in text and "torch " in text


def test_a_file_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run of the study is in it"):
        report.write(tmp_path / "none.jsonl")


def test_wrong_calls_are_answered():
    import argparse

    with pytest.raises(ValueError, match="at least 1"):
        command.run(argparse.Namespace(threads=1, limit=0, report=False, out=records.FILE))
