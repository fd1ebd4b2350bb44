"""examples/trainer.py, sft.py, accelerate_loop.py and lightning_module.py as users run them: killed, and
gone on with by --resume, they end with the losses and the adapter of a run that was not.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "trainer": ("transformers", "accelerate"),
    "sft": ("trl", "datasets"),
    "accelerate_loop": ("transformers", "accelerate"),
    "lightning_module": ("transformers", "lightning"),
}
# A process that ends itself with SIGKILL when it saves for the third time.
KILLED = """
import importlib, os, signal, sys
import torch
save, calls = torch.save, []
def saving(*args, **kwargs):
    calls.append(args)
    if len(calls) == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)
torch.save = saving
importlib.import_module("examples.{name}").main(sys.argv[1:])
"""


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(out):
    return json.loads((out / "losses.json").read_text())


def test_nothing_left_to_do_leaves_the_results(tmp_path, capsys):
    tiny = pytest.importorskip("examples.tiny")
    tiny.report(tmp_path, [2.0, 1.0])
    tiny.report(tmp_path, [])
    assert json.loads((tmp_path / "losses.json").read_text()) == [2.0, 1.0]
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing left to do")


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEEDED)
def test_killed_and_resumed_it_ends_alike(name, tmp_path, one_thread):
    for package in NEEDED[name]:
        pytest.importorskip(package, reason="the example trains with it")
    from examples.tiny import tiny_llama

    example = importlib.import_module(f"examples.{name}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert example.main(["--out", str(whole), "--steps", "20"]) == 0
    if name == "trainer":
        # A checkpoint of step 5 has four calls; the sixth is that of step 10, after the adapter.
        killed = run("-c", KILLED.format(name=name, calls=6), "--out", str(cut), "--steps", "20")
        assert killed.returncode == -9, killed.stderr
        assert sorted(path.name for path in cut.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    else:
        assert example.main(["--out", str(cut), "--steps", "10"]) == 0
    done = run("-m", f"examples.{name}", "--out", str(cut), "--steps", "20", "--resume")
    assert done.returncode == 0, done.stderr
    assert ("was interrupted while it was written" in done.stderr) == (name == "trainer")
    wanted, got = losses(whole), losses(cut)
    assert len(wanted) == 20 and wanted[-1] < wanted[0]
    # Lightning's are those since it was resumed.
    assert got == wanted[-len(got) :] and len(got) == (10 if name == "lightning_module" else 20)
    adapters = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole, cut)]
    assert adapters[0] == adapters[1]
    assert f"{len(got)} steps, loss " in done.stdout
    largest = max(path.stat().st_size for path in cut.rglob("*") if path.is_file())
    assert largest < sum(weight.nbytes for weight in tiny_llama().parameters()) / 2
