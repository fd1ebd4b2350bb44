"""The kernel that makes a weight of NF4 codes: the bits of base/nf4.py, on every element and no other."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same

from lorafa_kernels.base.frozen import quantised

dequantise = pytest.importorskip("lorafa_kernels.kernels.dequantise")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 192), (17, 128), (0, 64), (4, 0), (270, 128)], ids=str)
def test_the_bits_of_plain_pytorch(triton_device, kind, shape):
    """The last shape has more scales than one that a nested absmax2 covers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(triton_device)
    # In the interpreter a launch takes a tenth of a second.
    several = DTYPES if shape == (5, 192) else DTYPES[1:2]
    for own in several:
        base = quantised(weight.to(own), kind)
        for dtype in several:
            assert base.by_kernel(dtype, "triton") and not base.by_kernel(dtype, "torch")
            assert_same(base.dense(dtype, "triton"), base.dense(dtype, "torch"))


@pytest.mark.numerics
@pytest.mark.parametrize("special", [float("inf"), float("nan"), -0.0, 2.0**-140, 3e38])
def test_scales_that_are_no_usual_numbers(triton_device, special):
    base = quantised(torch.randn(2, 64, device=triton_device), "nf4")
    base.tensors[1].view(torch.float32).fill_(special)
    for dtype in DTYPES[:2]:
        got, want = base.dense(dtype, "triton"), base.dense(dtype, "torch")
        assert_same(got, want, equal_nan=True)


def test_writes_every_element_and_no_other(triton_device, monkeypatch):
    """The result is poisoned, with canaries around it."""
    base = quantised(torch.randn(7, 192, device=triton_device), "nf4")
    want = base.dense(torch.float32, "torch")
    room = torch.full((9, 192), float("nan"), device=triton_device)
    monkeypatch.setattr(dequantise.torch, "empty", lambda *args, **kwargs: room[1:8])
    got = base.dense(torch.float32, "triton")
    monkeypatch.undo()
    assert got.data_ptr() == room[1].data_ptr()
    assert_same(got, want)
    assert bool(room[0].isnan().all()) and bool(room[8].isnan().all())


def test_other_layouts_and_dtypes_are_left_to_plain_pytorch(triton_device):
    device = torch.device(triton_device)
    for shape, kind, dtype in (
        ((4, 66), "nf4", torch.float32),
        ((4, 64), "int8", torch.float32),
        ((4, 64), "nf4", torch.float64),
    ):
        base = quantised(torch.randn(shape, device=device), kind)
        assert not base.by_kernel(dtype, "triton")
        assert base.dense(dtype, "torch").shape == shape
