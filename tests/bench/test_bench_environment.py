"""bench/run/environment.py: what a result file says about its origin, and how files are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench.run import environment


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


def test_identity_changes_with_the_machine_the_versions_and_the_code(monkeypatch, tmp_path):
    about = environment.environment()
    before = environment.identity(about)
    assert environment.identity(json.loads(json.dumps(about))) == before
    later = {**about, "date": "2099-01-01T00:00:00+00:00", "commit": "another"}
    assert environment.identity(later) == before
    other = {**about, "machine": {**about["machine"], "cpu": "another"}}
    assert environment.identity(other) != before
    newer = {**about, "versions": {**about["versions"], "torch": "99"}}
    assert environment.identity(newer) != before
    for folder in ("lorafa_kernels", "bench"):
        (tmp_path / folder / "report").mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / "bench" / "timing.py").write_text("rounds = 1")
    one = environment.identity(about)
    (tmp_path / "bench" / "report" / "page.py").write_text("what reads results changes no measurement")
    assert environment.identity(about) == one
    (tmp_path / "bench" / "timing.py").write_text("rounds = 2")
    assert environment.identity(about) != one


def test_folder_of_results_is_named_after_the_device():
    assert environment.device_slug({"machine": {"gpu": None}}) == "cpu"
    assert environment.device_slug({"machine": {"gpu": {"name": "NVIDIA H200"}}}) == "nvidia-h200"


def test_gpu_state_is_read_where_there_is_a_tool(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda *command: "570.1, 1980, 1980, 3201, 700.00, 31")
    assert environment.gpu_state()["sm_clock_mhz"] == "1980"
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    assert set(environment.gpu_state().values()) == {None}
