"""Tests marked gpu, run beside a GPU that is not there (stub_gpu, of sm_90).

    python tests/gpu_tests_on_stub.py FILE… [options of pytest]

What they call is called as on a GPU, in their threads too, and nothing is computed: of numbers only dtypes
and shapes are compared. A CUDA graph is launched once, and the allocator holds the tensors that are alive.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import stub_gpu

# Before anything imports Triton. Launches are not watched: those of several threads come in no order.
stub_gpu.install("sm_90", redirect=True, watch=False)

import accuracy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


def assert_alike(got: Any, want: Any, *, equal_nan: bool = False, name: str = "result") -> None:
    """As assert_same, but for values."""
    if isinstance(want, (Mapping, tuple, list)):
        keys = list(want) if isinstance(want, Mapping) else range(len(want))
        assert len(got) == len(want), name
        for key in keys:
            assert_alike(got[key], want[key], name=f"{name}[{key!r}]")
    elif want is None:
        assert got is None, name
    else:
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name


class Graph:
    """A torch.cuda.CUDAGraph that launches nothing again."""

    captured = False

    def replay(self) -> None:
        assert self.captured, "a graph is replayed that captured nothing"


@contextlib.contextmanager
def capture(graph: Graph, **options: object) -> Iterator[None]:
    """torch.cuda.graph."""
    assert not graph.captured
    yield
    graph.captured = True


def main(arguments: list[str]) -> int:
    accuracy.assert_same = assert_alike
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    from gpu_or_cpu import live_bytes

    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda device=None: live_bytes()
    return pytest.main(["-m", "gpu", "-n", "0", "-p", "no:cacheprovider", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
