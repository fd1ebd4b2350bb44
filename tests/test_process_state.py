"""conftest: a test that leaves state of the process behind is red itself, whatever comes after it."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from conftest import process_state
from torch import nn

from lorafa_kernels.plan.pin import pin_plan


def left_behind(change) -> set[str]:
    before = process_state()
    undo = change()
    try:
        after = process_state()
    finally:
        undo()
    assert process_state() == before
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def variable():
    os.environ["LORAFA_KERNELS_TEST"] = "1"
    return lambda: os.environ.pop("LORAFA_KERNELS_TEST")


def default_dtype():
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    return lambda: torch.set_num_threads(before)


def plan():
    pin = pin_plan("library")
    pin.__enter__()
    return lambda: pin.__exit__(None, None, None)


def distutils():
    """What `importlib.util.find_spec("pip")` does to setuptools' finder."""
    finder = next((finder for finder in sys.meta_path if hasattr(finder, "spec_for_pip")), None)
    if finder is None:
        pytest.skip("setuptools put no finder here")
    finder.spec_for_distutils = lambda: None
    return lambda: delattr(finder, "spec_for_distutils")


def hook():
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(variable, "variable LORAFA_KERNELS_TEST", id="variable"),
        pytest.param(default_dtype, "default dtype", id="dtype"),
        pytest.param(threads, "threads", id="threads"),
        pytest.param(plan, "pinned plan", id="plan"),
        pytest.param(distutils, "distutils of Python", id="distutils"),
        pytest.param(hook, "hooks of all modules", id="hook"),
    ],
)
def test_what_is_left_behind_is_named(change, name):
    assert left_behind(change) == {name}
