"""No launch of a second call goes through Triton's JIT, which takes most of a launch's time on the host, nor
looks for its kernel by what that is specialised on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    unset = ("TRITON_INTERPRET", "LORAFA_KERNELS_PLAN")
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    # Nor a plan that was measured on this machine.
    kept["LORAFA_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("no-plans"))
    command = [sys.executable, "-m", "tests.kernels.called_twice"]
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("M", [1, 256, 1100])
@pytest.mark.parametrize("operation", ["a layer", "a group", "a gated MLP"])
def test_a_second_call_launches_what_was_kept(found, operation, M):
    """Forward and backward, of the plan that is chosen without a measured one."""
    (_, looked_up, launched), again = found[f"{operation}, M = {M}"]
    assert 0 < looked_up <= launched
    assert again == [0, 0, launched]


def test_first_calls_go_through_triton(found):
    """What is counted is called at all."""
    compiled, looked_up, _ = found["a layer, M = 1"][0]
    assert 0 < compiled <= looked_up
