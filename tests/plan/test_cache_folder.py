"""The user's table of plans lies in the user's cache folder, and who has no home has no table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.recipe import Device, Problem, Recipe
from lorafa_kernels.plan.tables import Entry, Measured, cache_path, key_of, update_table, user_table

H200 = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.6.0")
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
NAME = "NVIDIA-H200-triton-3.6.0.json"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (lookup.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    choice.forget_plans()
    yield
    choice.forget_plans()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        pytest.param({"HOME": "/home/a"}, "/home/a/.cache/lorafa_kernels", id="home"),
        pytest.param({"HOME": "/home/a", "XDG_CACHE_HOME": "/c"}, "/c/lorafa_kernels", id="xdg"),
        # Another folder wherever the process is started; the specification says to ignore it.
        pytest.param(
            {"HOME": "/home/a", "XDG_CACHE_HOME": "c"}, "/home/a/.cache/lorafa_kernels", id="relative-xdg"
        ),
        pytest.param(
            {"HOME": "/home/a", "XDG_CACHE_HOME": ""}, "/home/a/.cache/lorafa_kernels", id="empty-xdg"
        ),
        pytest.param({"HOME": "a"}, None, id="relative-home"),
        pytest.param({"HOME": "/home/a", lookup.CACHE_VARIABLE: "/mine"}, "/mine", id="variable"),
    ],
)
def test_where_the_table_lies(monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_path(H200) == (None if folder is None else Path(folder) / NAME)


def nobody_s_home():
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_there_is_no_table_and_everything_runs(monkeypatch, fake_gpu, capsys):
    from lorafa_kernels import explain
    from lorafa_kernels.checks import doctor
    from lorafa_kernels.tune import command

    monkeypatch.setattr(Path, "home", nobody_s_home)
    assert cache_path(H200) is None and user_table(H200) is None
    fake_gpu(KNOWN_DEVICES["sm_90"], "NVIDIA H200", (9, 0))
    assert explain((8192, 4096, 4096, 16)).plans["forward"].plan.source == "heuristic"
    assert any("no home folder" in line for line in doctor._describe_tables(torch.device("cuda")))
    assert command.table_file(None, H200) is None


def test_a_home_that_is_a_file_has_no_table(monkeypatch):
    monkeypatch.setenv("HOME", os.devnull)
    assert user_table(H200) is None


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs root to become nobody")
def test_a_layer_runs_the_kernels_as_a_user_whom_the_machine_does_not_know():
    """As in a container that was started with a user id alone."""
    pytest.importorskip("triton")
    code = (
        "import os, torch\n"
        # What only root can read here, it imports before it becomes somebody else.
        "import lorafa_kernels.linear.fused, lorafa_kernels.kernels.recompute\n"
        "from lorafa_kernels import LoRAFALinear\n"
        "layer, x = LoRAFALinear(32, 32, r=4), torch.randn(4, 32)\n"
        "layer.impl = 'triton'\n"
        "os.setuid(54321)\n"
        "assert torch.isfinite(layer(x)).all()\n"
        "print('done')"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_what_was_written_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = Entry(key_of(PROBLEM), (Measured(Recipe("library"), 1.0, 2.0),))
    update_table(cache_path(H200), H200, [entry], {})
    assert user_table(H200).entries == (entry,)
    assert (tmp_path / ".cache" / "lorafa_kernels" / NAME).is_file()
