"""The package in a process of its own, as a user has it: imported where Triton, a GPU and everything optional
is missing, it trains; and it imports nothing that it does not need.

Starting Python and torch is what takes long, so there are two processes, each for several promises.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONAL = ("peft", "transformers", "rich", "matplotlib", "platformdirs")


class NoTriton:
    """An importer that finds no Triton, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without_triton():
    sys.meta_path.insert(0, NoTriton())
    for name in OPTIONAL:
        sys.modules[name] = None

    from lorafa_kernels.plan.config import KNOWN_DEVICES
    from lorafa_kernels.plan.defaults import default_config

    assert default_config("expand", KNOWN_DEVICES["sm_90"], 2, 8192, 16).BLOCK_R == 16

    import lorafa_kernels

    assert lorafa_kernels.__version__
    train_one_step("triton is not installed")
    pinned_plans_say("triton is not installed")

    assert lorafa_kernels.explain((8, 8, 8, 8), device="cpu").impl == "torch"
    fails_with(
        "triton is not installed",
        lambda: lorafa_kernels.explain((8, 8, 8, 8), device="cpu", impl="triton"),
    )
    assert "triton" not in sys.modules


class MakesOthers(TorchDispatchMode):
    """As FakeTensorMode does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is called by an import")


def without_a_gpu():
    # What a mode made of the package's constants would stay.
    with MakesOthers():
        import lorafa_kernels
    import lorafa_kernels.model.checkpoint

    # Nor is Triton imported before a kernel is needed.
    assert not {name for name in sys.modules if name.startswith("lorafa_kernels.kernels")}
    assert not {"peft", "transformers"} & sys.modules.keys()
    lorafa_kernels.explain((8, 8, 8, 8), device="cpu", impl="torch")
    assert "triton" not in sys.modules
    train_one_step("interpreter is off")
    pinned_plans_say("interpreter is off")


def train_one_step(missing):
    """By default; and impl="triton" says what is missing."""
    import torch

    import lorafa_kernels

    layer = lorafa_kernels.LoRAFALinear(8, 6, r=2)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.lora_B.grad is not None
    layer.impl = "triton"
    fails_with(missing, lambda: layer(torch.randn(3, 8)))
    assert not torch.cuda.is_initialized()


def pinned_plans_say(missing):
    import torch

    import lorafa_kernels
    from lorafa_kernels.plan.pin import pin_plan
    from lorafa_kernels.plan.recipe import Recipe

    layer = lorafa_kernels.LoRAFALinear(8, 6, r=2)
    x = torch.randn(3, 8, requires_grad=True)
    for plan in ("fused", {"backward": Recipe("library")}):
        with pin_plan(plan):
            message = fails_with(missing, lambda: layer(x).sum().backward())
            assert "the pinned plan cannot run" in message
    with pin_plan("library"):
        layer(x).sum().backward()


def fails_with(words, call):
    try:
        call()
    except RuntimeError as error:
        assert words in str(error), error
        return str(error)
    raise AssertionError(f"ran, where {words!r} was expected")


@pytest.mark.parametrize("situation", [without_triton, without_a_gpu], ids=lambda f: f.__name__)
def test_a_fresh_process(situation):
    if situation is without_a_gpu:
        pytest.importorskip("triton")
    here = Path(__file__).resolve()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(here.parent.parent), str(here.parent), environment.get("PYTHONPATH", "")]
    )
    code = f"import {here.stem} as here; here.{situation.__name__}(); print('ok')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "ok\n", done.stdout + done.stderr
