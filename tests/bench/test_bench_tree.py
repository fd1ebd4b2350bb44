"""The hash of a checkout's files is that of their commit, with and without git, and the report checks it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.report import reading
from bench.run import tree
from bench.run.environment import ROOT, environment

GPU = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "sm_clock_mhz": "1980"}


def git(root: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(root), *who, *command], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "some")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with files that count and files that do not."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "checkout"
    for name in (
        "lorafa_kernels/deep/er/a.py",
        "lorafa_kernels/plan/measured/gpu.json",
        "bench/b.py",
        "bench/results/cpu/cpu.jsonl",
        "bench/results/gate.json",
        "tests/t.py",
        "csrc_reference/c.c",
        "docs/page.md",
        "pyproject.toml",
        "README.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    git(tmp_path, "init", "-q", str(root))
    commit(root)
    return root


def test_a_clean_checkout_has_the_hash_of_its_commit(repository, tmp_path):
    head = git(repository, "rev-parse", "HEAD")
    found = tree.tree_hash(repository)
    assert tree.commit_hash(head, repository) == found
    assert tree.fitting_commit(found, head, repository) == head
    elsewhere = tmp_path / "without-git"
    shutil.copytree(repository, elsewhere, ignore=shutil.ignore_patterns(".git"))
    assert tree.tree_hash(elsewhere) == found
    assert tree.has_git(repository) and not tree.has_git(elsewhere)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lorafa_kernels/deep/er/a.py", True),
        ("lorafa_kernels/new.py", True),
        ("lorafa_kernels/plan/measured/gpu.json", True),
        ("csrc_reference/c.c", True),
        ("pyproject.toml", True),
        ("bench/results/gate.json", False),
        ("bench/results/gpu/gpu.jsonl", False),
        ("docs/page.md", False),
        ("README.md", False),
        ("bench/__pycache__/b.py", False),
        (".gpu/a.py", False),
        ("tests/.hidden/a.py", False),
    ],
)
def test_what_can_change_a_measurement_changes_the_hash(repository, name, changes):
    before = tree.tree_hash(repository)
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("other")
    after = tree.tree_hash(repository)
    assert (after != before) == changes
    fits = tree.fitting_commit(after, git(repository, "rev-parse", "HEAD"), repository)
    assert (fits is None) == changes
    # The same once it is committed, if it can be.
    assert tree.commit_hash(commit(repository), repository) == after


def test_a_hash_finds_its_commit_among_others(repository):
    first, hashes = git(repository, "rev-parse", "HEAD"), [tree.tree_hash(repository)]
    (repository / "bench" / "b.py").write_text("second")
    second = commit(repository)
    hashes.append(tree.tree_hash(repository))
    for named in (None, first, second, "0" * 40, "--output=x", "no such"):
        assert [tree.fitting_commit(one, named, repository) for one in hashes] == [first, second]
    assert tree.fitting_commit("0" * 64, second, repository) is None


def test_a_result_file_carries_the_hash_of_this_checkout():
    assert environment()["tree"] == tree.tree_hash(ROOT)


def record(about: dict) -> dict:
    base = {"date": "2026-01-01", "machine": {"gpu": GPU}, "versions": {"torch": "2"}, "dirty": None}
    run = {"kind": "run", "run": "r", "date": "2026-01-01", "command": "c", "environment": {**base, **about}}
    return {
        **{"kind": "time", "key": "eager a", "case": {"label": "a"}, "run": "r", "date": "2026-01-01"},
        **{"_run": run, "_file": Path("gpu.jsonl"), "_line": "{}"},
    }


@pytest.mark.parametrize(
    ("named", "hashed", "mark", "said"),
    [
        ("HEAD", "HEAD", "", "fits the commit"),
        (None, "HEAD", "", "Its files are of"),
        ("HEAD", "changed", "§", "fits no commit"),
        ("HEAD", None, "§", "has no hash"),
    ],
    ids=["fits", "commit-not-named", "changed-tree", "no-hash"],
)
def test_the_report_checks_a_gpu_run_against_its_commit(repository, monkeypatch, named, hashed, mark, said):
    monkeypatch.setattr(reading, "ROOT", repository)
    head = git(repository, "rev-parse", "HEAD")
    if hashed == "changed":
        (repository / "bench" / "b.py").write_text("changed")
    about = {"commit": head if named else None, "tree": tree.tree_hash(repository) if hashed else None}
    measured = record(about)
    sources = reading.Sources([measured], repository)
    assert ("§" in sources.marks(measured)) == bool(mark)
    assert ("§" in sources.legend()) == bool(mark)
    assert said in sources.lines()[0]


def test_a_cpu_run_needs_no_hash(repository, monkeypatch):
    monkeypatch.setattr(reading, "ROOT", repository)
    measured = record({"commit": None})
    measured["_run"]["environment"]["machine"] = {"gpu": None, "cpu": "c", "threads": 1}
    sources = reading.Sources([measured], repository)
    assert "§" not in sources.marks(measured) + sources.legend()
    assert "hash" not in sources.lines()[0]
