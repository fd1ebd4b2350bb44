"""bench.measure.blocks: pieces of a layer are right before they are timed, and what is named is what runs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_bench_memory import adapt_raising, adapt_with_scaling

from bench.measure import blocks, models, timing
from bench.measure.models import PIECES, BlockCase

pytest.importorskip("transformers")

CASE = BlockCase("Llama block, MHA 256", 2, 8, 4, "fp32", piece="mlp", scope="time")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = tuple(key for key in models.TIME_KEYS if key != "compiled-lorafa")


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**10)


def measure(case=CASE, keys=QUICK, **options) -> dict[tuple[str, str], dict]:
    payload = blocks.time_block(case, keys, DEVICE, rounds=2, **options)
    json.dumps(payload, allow_nan=False)
    assert payload["mode"] == "block" and payload["case"]["label"] == case.label
    return {(row["contender"], row["part"]): row for row in payload["rows"]}


@pytest.mark.numerics
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everyone_is_checked_and_timed_or_says_why_not(piece, dtype):
    pytest.importorskip("peft")
    done = []
    rows = measure(replace(CASE, piece=piece, dtype=dtype), tick=done.append)
    assert list(rows) == [(key, part) for part in blocks.PARTS for key in QUICK]
    assert done == sorted(done) and done[-1] == 1.0
    for (key, part), row in rows.items():
        if row["status"] == "not run":
            assert key == "liger" and row["reason"]
            assert (row["ms"], row["ratios"]) == (None, {})
            continue
        assert (row["status"], row["reason"]) == ("ok", None), key
        assert set(row["errors"]) == ({"y", "dx"} if key == "frozen" else {"y", "dx", "dB"})
        assert row["ms"]["median"] > 0
        if key == "lorafa":
            assert set(row["ratios"]) == {k for k, p in rows if p == part and rows[k, p]["ms"]} - {key}
        else:
            assert set(row["ratios"]) == (set() if key == "frozen" else {"frozen"})


def test_lorafa_is_one_node_for_a_piece():
    from lorafa_kernels.nn.group import LoRAFALinearGroup
    from lorafa_kernels.nn.mlp import LoRAFASwiGLU

    for piece, kind in (("qkv", LoRAFALinearGroup), ("mlp", LoRAFASwiGLU), ("layer", models.Block)):
        case = replace(CASE, piece=piece)
        plain = models.adapt_eager(models.build(case, "cpu"), case.linears, case.rank)
        module = blocks.adapt_modules(models.build(case, "cpu"), case.linears, case.rank)
        assert type(module) is kind
        assert set(models.adapters(module)) == set(models.adapters(plain)) != set()


def test_outputs_and_their_gradients_stay_apart():
    """What is timed is a step on q, k and v, and not on one tensor made of them."""
    case = replace(CASE, piece="qkv")
    module = blocks.adapt_modules(models.build(case, "cpu"), case.linears, case.rank)
    models.fill_adapters(module, case.dtype, zero_B=False)
    x = torch.randn(2, 8, 256, requires_grad=True)
    dy = torch.randn(2, 8, 3 * 256)
    wanted = (x, *(p for p in module.parameters() if p.requires_grad))
    steps = blocks.steps_of(module, wanted, dy)
    assert [y.shape for y in steps["forward"]()] == [(2, 8, 256)] * 3
    want = torch.autograd.grad(models.joined(module, x), wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(steps["both"](), want, strict=True))


@pytest.mark.parametrize(
    ("adapt", "reason"),
    [
        (adapt_with_scaling(1.05), "outside the error budget: y, dx, dB"),
        (adapt_with_scaling(float("nan")), "outside the error budget: y, dx, dB"),
        (adapt_raising, "RuntimeError: does not run here"),
    ],
    ids=["wrong", "nan", "raising"],
)
def test_wrong_results_get_no_time(adapt, reason, monkeypatch):
    planted = models.Contender("planted", "planted", adapt)
    monkeypatch.setitem(models.CONTENDERS, "planted", planted)
    rows = measure(keys=("planted", "frozen", "lorafa"))
    for part in blocks.PARTS:
        row = rows["planted", part]
        assert (row["status"], row["reason"], row["ms"], row["ratios"]) == ("failed", reason, None, {})
        assert "planted" not in rows["lorafa", part]["ratios"]
        assert rows["frozen", part]["status"] == rows["lorafa", part]["status"] == "ok"


def test_what_cannot_run_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    rows = measure(keys=("peft-lora", "liger", "frozen"))
    assert rows["peft-lora", "both"]["reason"] == "peft is not installed"
    assert rows["liger", "both"]["reason"] == "liger_kernel is not installed"
    qkv = measure(replace(CASE, piece="qkv"), keys=("liger", "frozen"))
    assert qkv["liger", "both"]["reason"] == "there is no SwiGLU in this piece"
    with pytest.raises(ValueError, match="unknown contender of a time 'peft-lora-16bit'"):
        measure(keys=("peft-lora-16bit",))


def test_liger_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert models.CONTENDERS["liger"].obstacle("cpu") == "its kernels need a GPU"
    assert models.CONTENDERS["liger"].obstacle("cuda") is None


def test_liger_stands_in_the_mlp(monkeypatch):
    """With the same product in Liger's place, since its own needs a GPU."""
    calls = []

    def liger_swiglu(gate, up):
        calls.append(gate.shape)
        return torch.nn.functional.silu(gate) * up

    package = types.ModuleType("liger_kernel.transformers.functional")
    package.liger_swiglu = liger_swiglu
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    liger = replace(models.CONTENDERS["liger"], needs_gpu=False)
    monkeypatch.setitem(models.CONTENDERS, "liger", liger)
    for piece in ("mlp", "layer"):
        rows = measure(replace(CASE, piece=piece), keys=("liger", "frozen"))
        assert (rows["liger", "both"]["status"], rows["liger", "both"]["reason"]) == ("ok", None)
    assert set(calls) == {(2, 8, 688)}


def test_compiled_contender_is_right(monkeypatch):
    if reason := models.CONTENDERS["compiled-lorafa"].obstacle(DEVICE):
        pytest.skip(reason)
    # The compiler itself is what takes long; what is compared is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = measure(keys=("frozen", "compiled-lorafa"))
    assert (rows["compiled-lorafa", "both"]["status"], rows["compiled-lorafa", "both"]["reason"]) == (
        "ok",
        None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("piece", PIECES)
def test_everyone_runs_on_a_gpu(piece):
    rows = measure(replace(CASE, piece=piece, dtype="bf16"), keys=models.TIME_KEYS)
    for (key, part), row in rows.items():
        optional = key.startswith("peft") or key == "liger"
        assert row["status"] == "ok" or (optional and row["status"] == "not run"), (key, part, row["reason"])


def test_flops_are_those_of_the_layers():
    for piece in PIECES:
        case = replace(CASE, piece=piece)
        module = models.build(case, "cpu")
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
        assert case.flops() == 2 * 2 * case.batch * case.sequence * weights
