"""CONTRIBUTING names the files from a module's forward to the kernel: those that a call goes through, at most
eight.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import lorafa_kernels
from lorafa_kernels import LoRAFALinear

pytest.importorskip("triton")
PACKAGE = Path(lorafa_kernels.__file__).parent
MOST = 8


def file_of(frame) -> str | None:
    """The file of a frame below the package, or None for one of another's."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def test_the_path_is_the_one_in_contributing():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"A stranger's path.*?\n\n", text, re.DOTALL)
    named = re.findall(r"`([a-z_/]+\.py)`", told)
    assert 0 < len(named) == len(set(named)) <= MOST
    entered: list[str] = []
    stack: list[str] = []

    def watch(frame, event: str, _) -> None:
        file = file_of(frame) if event == "call" else None
        if file is None:
            return
        entered.append(file)
        if file == named[-1] and not stack:
            while frame is not None:
                stack.extend(filter(None, [file_of(frame)]))
                frame = frame.f_back

    # A shape of this test alone: a plan that was made before is not made again.
    layer = LoRAFALinear(40, 56, r=12)
    layer.impl = "triton"
    x = torch.randn(19, 40, requires_grad=True)
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        layer(x)
    finally:
        sys.setprofile(before)
    first = list(dict.fromkeys(entered))
    assert set(named) <= set(first)
    # Who waits for the kernel, from the module down; and the choice of the plan, which has returned by then.
    waiting = list(dict.fromkeys(reversed(stack)))
    chosen = [file for file in named if file.startswith("plan/")]
    assert [file for file in named if file not in chosen] == waiting
    assert chosen == [file for file in first if file in chosen] == ["plan/choice.py", "plan/make.py"]
