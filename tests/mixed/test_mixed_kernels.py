"""The kernels of a mixed batch: right in tiles that rows, columns and ranks do not fill, and taken where they
are asked for and nowhere else. test_mixed.py asks of them what it asks of every implementation.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import Budget, assert_same
from conftest import GPU
from memory_beds import Beds, far_rows
from torch import Tensor

from lorafa_kernels.checks.budget import Operands, draw_operands, plain_formula
from lorafa_kernels.mixed import library, ops
from lorafa_kernels.mixed.rows import SortedRows, sorted_rows
from lorafa_kernels.plan import choice
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.kernels import MixedConfigs
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

pytest.importorskip("triton")
pytestmark = pytest.mark.numerics
fused = pytest.importorskip("lorafa_kernels.mixed.fused")
kernels = pytest.importorskip("lorafa_kernels.kernels.mixed")

# Several tiles of an adapter's rows, several blocks of K, N and of the largest rank.
SMALL = MixedConfigs(
    shrink=KernelConfig(16, 0, 32, 32, 1, 4, 1),
    expand=KernelConfig(16, 64, 32, 32, 2, 4, 1),
    grad=KernelConfig(16, 64, 0, 32, 1, 4, 1),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
K, N = 45, 67
WIDENED = ("x", "weight", "lora_A", "lora_B", "bias", "dy")
BATCHES = {
    "mixed": dict(places=(2, 0, -1, 1, 0, 2, 5), size=11, ranks=(17, 5, 64, 4), ps=(0.0,) * 4),
    "dropout": dict(places=(2, 0, -1, 1, 0, 2, 5), size=11, ranks=(17, 5, 64, 4), ps=(0.5, 0.0, 0.2, 0.1)),
    "one-adapter": dict(places=(1, 1), size=19, ranks=(4, 33), ps=(0.0, 0.0)),
    "rows-of-one": dict(places=(0, 1, 1, 0, 1, -1) * 3, size=1, ranks=(8, 5), ps=(0.0, 0.0)),
    "no-adapter": dict(places=(-1, -1), size=9, ranks=(4, 2), ps=(0.0, 0.0)),
}
batches = pytest.mark.parametrize("batch", BATCHES)


def draw(batch: str, dtype: torch.dtype, device: str) -> tuple[list[Operands], Tensor]:
    """Operands of each adapter on all rows, and which number each row has."""
    kind = BATCHES[batch]
    M, ranks = len(kind["places"]) * kind["size"], kind["ranks"]
    first = draw_operands(M, K, N, 1, dtype, device, factor_dtype=torch.float32)
    found = []
    for i, (R, p) in enumerate(zip(ranks, kind["ps"], strict=True)):
        own = draw_operands(1, K, N, R, dtype, device, seed=i + 1, factor_dtype=torch.float32)
        changed = {"lora_A": own.lora_A, "lora_B": own.lora_B, "scaling": 0.5 + i, "dropout_p": p}
        found.append(replace(first, **changed))
    return found, torch.tensor(kind["places"]).repeat_interleave(kind["size"])


def arguments(batch: str, adapters: list[Operands]) -> tuple[tuple, tuple]:
    """What forward and backward take between the factors and the plan."""
    one, places = adapters[0], BATCHES[batch]["places"]
    index = torch.tensor(places, dtype=torch.int32, device=one.x.device)
    numbers = tuple(range(len(adapters)))
    how = index, places, numbers, [a.scaling for a in adapters], [a.dropout_p for a in adapters]
    return ([a.lora_A for a in adapters], [a.lora_B for a in adapters]), how


def seed_of(adapters: list[Operands]) -> Tensor | None:
    drops = any(a.dropout_p for a in adapters)
    return torch.tensor([1234], device=adapters[0].x.device) if drops else None


def compute(batch: str, adapters: list[Operands], module=fused, **plan) -> dict[str, Tensor]:
    one = adapters[0]
    factors, how = arguments(batch, adapters)
    seed = seed_of(adapters)
    y, z = module.forward(one.x, one.weight, *factors, one.bias, *how, seed, **plan)
    needs = True, [True] * len(adapters)
    dx, dBs = module.backward(one.dy, z, one.weight, *factors, *how, seed, *needs, **plan)
    return {"y": y, "z": z, "dx": dx} | {f"dB{i}": dB for i, dB in enumerate(dBs)}


def by_formula(adapters: list[Operands], of_rows: Tensor, dtype=None) -> dict[str, Tensor]:
    """An adapter at a time on the rows that it has, by the plain formula."""
    one = adapters[0]
    want = plain_formula(replace(one, lora_B=torch.zeros_like(one.lora_B), dropout_p=0.0), dtype)
    want.pop("dB")
    for i, adapter in enumerate(adapters):
        own = (of_rows == i).to(one.x.device)
        found = plain_formula(replace(adapter, dy=adapter.dy * own[:, None]), dtype)
        want["y"][own], want["dx"][own] = found["y"][own], found["dx"][own]
        want[f"dB{i}"] = found["dB"]
    return want


@dtypes
@batches
def test_accuracy_in_small_tiles(triton_device, dtype, batch):
    adapters, of_rows = draw(batch, dtype, triton_device)
    got = compute(batch, adapters, plan=SMALL)
    got.pop("z")
    if batch == "dropout":
        # By the library's products, whose mask test_mixed.py holds to the plain formula.
        wide = [replace(a, **{name: getattr(a, name).double() for name in WIDENED}) for a in adapters]
        exact, plain = compute(batch, wide, library), compute(batch, adapters, library)
    else:
        exact = by_formula(adapters, of_rows, torch.float64)
        plain = by_formula(adapters, of_rows)
    budget = Budget()
    # A gradient of zeros has no relative error.
    rows = {f"dB{i}" for i in range(len(adapters)) if not (of_rows == i).any()}
    for name in rows:
        assert_same(got[name], torch.zeros_like(adapters[int(name[2:])].lora_B), name=name)
    names = got.keys() - rows
    budget.compare(*({name: values[name] for name in names} for values in (got, exact, plain)))
    budget.check()


@dtypes
def test_z_is_zero_beyond_a_rank_and_without_an_adapter(triton_device, dtype):
    adapters, of_rows = draw("mixed", dtype, triton_device)
    adapters = [replace(a, x=torch.full_like(a.x, float("nan"))) for a in adapters]
    z = compute("mixed", adapters, plan=SMALL)["z"]
    for number in of_rows.unique().tolist():
        rank = BATCHES["mixed"]["ranks"][number] if 0 <= number < len(adapters) else 0
        own = z[of_rows == number]
        assert own[:, :rank].isnan().all() and not own[:, rank:].any()


@dtypes
def test_what_is_not_finite_stays_with_its_adapter(triton_device, dtype):
    """In either factor; tiles that an adapter does not fill lie beside another's rows."""
    adapters, of_rows = draw("mixed", dtype, triton_device)
    found = compute("mixed", adapters, plan=SMALL)
    own = of_rows == 0
    for factor in ("lora_A", "lora_B"):
        changed = {factor: torch.full_like(getattr(adapters[0], factor), float("nan"))}
        again = compute("mixed", [replace(adapters[0], **changed), *adapters[1:]], plan=SMALL)
        assert again["y"][own].isnan().all() and again["dx"][own].isnan().all()
        for name in ("y", "z", "dx"):
            assert_same(again[name][~own], found[name][~own], name=name)
        for i in (1, 2, 3):
            assert_same(again[f"dB{i}"], found[f"dB{i}"], name=f"dB{i}")


@pytest.mark.parametrize("batch", ["dropout", "rows-of-one"])
def test_the_same_bits_again(triton_device, batch):
    adapters, _ = draw(batch, torch.float32, triton_device)
    first = compute(batch, adapters, plan=SMALL)
    for _ in range(200 if GPU else 2):
        assert_same(compute(batch, adapters, plan=SMALL), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", ["mixed", "dropout", "no-adapter"])
def test_nothing_is_read_or_written_beside_operands_and_results(monkeypatch, triton_device, batch, dtype):
    beds = Beds()
    monkeypatch.setattr(torch, "empty", beds.make)
    adapters, _ = draw(batch, dtype, triton_device)
    shared = {name: beds.lay(getattr(adapters[0], name)) for name in ("x", "weight", "bias", "dy")}
    adapters = [replace(a, **shared, lora_A=beds.lay(a.lora_A), lora_B=beds.lay(a.lora_B)) for a in adapters]
    compute(batch, adapters, plan=SMALL)
    assert len(beds.results) >= 4
    beds.check()


def test_rows_that_start_beyond_2_to_the_31(triton_device):
    """Offsets are in 64 bits."""
    adapters = [
        replace(a, x=a.x[:5], dy=a.dy[:5]) for a in draw("one-adapter", torch.bfloat16, triton_device)[0]
    ]
    far = [replace(a, x=far_rows(a.x), dy=far_rows(a.dy)) for a in adapters]

    def results(adapters: list[Operands]) -> list[Tensor]:
        one = adapters[0]
        factors, (_, _, *how) = arguments("one-adapter", adapters)
        how = torch.tensor([1], dtype=torch.int32, device=triton_device), (1,), *how, None
        y, z = fused.forward(one.x, one.weight, *factors, one.bias, *how, plan=SMALL)
        dx, dBs = fused.backward(one.dy, z, one.weight, *factors, *how, True, [True, True], plan=SMALL)
        return [y, z, dx, *dBs]

    assert_same(results(far), results(adapters))


def test_tables_of_sorted_rows():
    rows = SortedRows(torch.device("cpu"), (1, -1, 0, 1), (0, 1), (4, 2), 12)
    assert rows.order.tolist() == [1, 2, 0, 3] and rows.adapters == (0, 1)
    assert rows.tiles(4).tolist() == [[-1, 0, 3, 0], [0, 3, 3, 4], [1, 6, 4, 2], [1, 10, 2, 2]]
    assert rows.runs([1]).tolist() == [[1, 6, 6, 2]]
    assert rows.tiles(4) is rows.tiles(4)


def test_tables_live_as_long_as_their_index():
    index = torch.tensor([0, 1], dtype=torch.int32)
    first = sorted_rows(index, (0, 1), (0, 1), (4, 2), 12)
    assert sorted_rows(index, (0, 1), (0, 1), (4, 2), 12) is first
    assert sorted_rows(index, (0, 1), (0, 1), (4, 2), 14) is not first
    before = len(sorted_rows.__globals__["_sorted"])
    del index
    assert len(sorted_rows.__globals__["_sorted"]) == before - 1


def takes_kernels(monkeypatch, impl: str) -> bool:
    """Whether a forward and backward of the operators launch the kernels."""
    called = []
    for name in ("mixed_shrink", "mixed_expand", "mixed_grad"):
        launcher = getattr(kernels, name)
        monkeypatch.setattr(
            fused, name, lambda *a, f=launcher, n=name, **k: (called.append(n), f(*a, **k))[1]
        )
    device = "cuda" if GPU else "cpu"
    adapters, _ = draw("one-adapter", torch.float32, device)
    one = adapters[0]
    factors, how = arguments("one-adapter", adapters)
    _, z = ops.mixed_forward(one.x, one.weight, *factors, one.bias, *how, None, impl)
    ops.mixed_backward(one.dy, z, one.weight, *factors, *how, None, True, [True, True], impl)
    assert called in ([], ["mixed_shrink", "mixed_expand", "mixed_grad", "mixed_shrink", "mixed_expand"])
    return bool(called)


def _called(called: list[str], name: str, launcher, *args, **kwargs):
    called.append(name)
    return launcher(*args, **kwargs)


def test_who_takes_the_kernels(monkeypatch):
    assert takes_kernels(monkeypatch, "triton")
    assert not takes_kernels(monkeypatch, "auto")
    assert not takes_kernels(monkeypatch, "torch")
    with pin_plan("fused"):
        assert takes_kernels(monkeypatch, "auto")
        assert not takes_kernels(monkeypatch, "torch")
    with pin_plan("library"):
        assert takes_kernels(monkeypatch, "triton")
        assert not takes_kernels(monkeypatch, "auto")
    with pin_plan({op: Recipe("fused", KernelPlan()) for op in ("forward", "backward")}):
        assert takes_kernels(monkeypatch, "auto")


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_auto_takes_the_library_on_every_gpu(monkeypatch, name):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "triton_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(choice, "_device_name", lambda device: name)
    choice.choose.cache_clear()
    found = choice.choose_mixed("auto", "forward", gpu, torch.bfloat16, None)
    assert found.impl == "torch" and "never timed" in found.reason
    assert choice.choose_mixed("triton", "forward", gpu, torch.bfloat16, None).impl == "triton"
    choice.choose.cache_clear()


def test_what_the_kernels_need_is_said():
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        choice.choose_mixed("triton", "forward", torch.device("cpu"), torch.float64, None)
