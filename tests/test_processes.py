"""Processes of a test: they end without Python's finalization, and a failure in one is the test's."""

import ast
import atexit
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start
from torch.multiprocessing import ProcessRaisedException

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def _abort_at_exit(rank, world, folder):
    atexit.register(os.abort)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    Path(folder, str(rank)).write_text(f"{total.item():g} of {world}, {torch.get_num_threads()} thread")


def _fail(rank, world, folder):
    assert rank == 0, "the second one fails"


@pytest.mark.slow
def test_a_worker_that_returned_is_not_finalized(tmp_path):
    start(_abort_at_exit, 2, tmp_path)
    assert [(tmp_path / name).read_text() for name in "01"] == 2 * ["3 of 2, 1 thread"]


@pytest.mark.slow
def test_a_worker_that_fails_fails_the_test(tmp_path):
    with pytest.raises(ProcessRaisedException, match="the second one fails"):
        start(_fail, 2, tmp_path)


def test_no_test_starts_its_processes_in_another_way():
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path in TESTS.rglob("*.py")
        if path.name != "processes.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("spawn", "start_processes")
    ]
    assert found == []
