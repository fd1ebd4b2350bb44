"""Memory: its counts are exact on graphs one counts by hand, and what it refuses to publish."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.measure import contenders, memory, models
from bench.measure.cases import Case
from bench.measure.memory import NUMBERS
from bench.measure.models import BlockCase

pytest.importorskip("transformers")

M, K = 24, 40
N = M * K * 4
LAYER = Case("test", "layer", 32, 40, 48, 8, dtype="fp32", adapter="fp32")
# Proportions of Llama-2-7B with R/hidden of 1/64: the setting in which the project's units were measured.
BLOCK = BlockCase("Llama block, MHA 256", 4, 16, rank=4, compiled=False)


@pytest.fixture
def x(device):
    return torch.randn(M, K, device=device, requires_grad=True)


def by_row(payload: dict) -> dict:
    json.dumps(payload, allow_nan=False)
    return {(row["contender"], row.get("checkpointing", False)): row for row in payload["rows"]}


def has_no_number(row: dict) -> bool:
    return all(row[name] is None for name in NUMBERS) and row.get("units") is None


def test_saved_bytes_of_known_graphs(x):
    weight = nn.Parameter(torch.randn(K, device=x.device))

    def saved(forward):
        return memory.saved_bytes(forward, {"input": [x]}, [weight])[1]

    assert saved(lambda: x + 1) == {"input": 0, "rest": 0}
    assert saved(lambda: x.square()) == {"input": N, "rest": 0}
    assert saved(lambda: x.exp()) == {"input": 0, "rest": N}
    # Parameters do not count; views of one storage count once, and the whole of it.
    assert saved(lambda: x.detach() * weight) == {"input": N, "rest": 0}
    assert saved(lambda: x.exp()[0] * x.exp()[1]) == {"input": 0, "rest": 2 * N}
    assert saved(lambda: (y := x.exp())[0] * y[1]) == {"input": 0, "rest": N}
    # An input of half the width leaves its fp32 copy behind.
    half = x.detach().bfloat16().requires_grad_()
    assert saved(lambda: half.float().square()) == {"input": 0, "rest": N}


def test_allocations_of_known_operations(x):
    dy = torch.ones_like(x)

    def allocations(forward):
        def backward(y):
            return torch.autograd.grad(y, x, dy)

        backward(forward())
        return memory.allocations(forward, backward, x.device.type)

    assert allocations(lambda: x.neg()) == (N, 0, 0)
    # −x dies as soon as its exponential is there.
    assert allocations(lambda: x.neg().exp()) == (N, N, N)
    # Both terms live until they are added; backward takes the sum of two gradients.
    assert allocations(lambda: x.neg() + x.neg()) == (N, 2 * N, N)
    # Never more than two gradients at once, of which one is returned.
    assert allocations(lambda: x.exp().exp().exp()) == (3 * N, 0, N)


def test_temporaries_inside_a_custom_operator_count(x):
    with torch.library._scoped_library("bench_memory_test", "FRAGMENT") as library:
        library.define("with_temporary(Tensor x) -> Tensor")

        def with_temporary(x):
            torch.empty(3 * N, dtype=torch.int8, device=x.device)
            torch.empty(2 * N, dtype=torch.int8, device=x.device)
            return x.clone()

        library.impl("with_temporary", with_temporary, "CompositeExplicitAutograd")
        operator = torch.ops.bench_memory_test.with_temporary.default

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return operator(x)

            @staticmethod
            def backward(ctx, dy):
                return operator(dy)

        kept, forward, backward = memory.allocations(
            lambda: Function.apply(x), lambda y: torch.autograd.grad(y, x, y.detach()), x.device.type
        )
    # The temporaries are gone when the result is allocated, so only what exceeds it was needed besides.
    assert (kept, forward, backward) == (N, 2 * N, 2 * N)


@pytest.mark.numerics
def test_layer_rows(device):
    keys = ("frozen", "lorafa", "eager-lorafa", "eager-lora", "addmm")
    rows = by_row(memory.layer_memory(LAYER, keys, device))
    assert [(row["status"], row["reason"]) for row in rows.values()] == [("ok", None)] * 5
    saved = {key: row["parts"] for (key, _), row in rows.items()}
    z = LAYER.M * LAYER.R * 4
    assert saved["frozen"] == {"input": 0, "rest": 0}
    assert saved["lorafa"] == saved["eager-lorafa"] == saved["addmm"] == {"input": 0, "rest": z}
    assert saved["eager-lora"] == {"input": LAYER.M * LAYER.K * 4, "rest": z}
    lorafa, eager = rows["lorafa", False], rows["eager-lorafa", False]
    assert lorafa["saved_bytes"] == z
    # The plain formula makes the low-rank term on its own before adding it.
    assert eager["forward_temporary_bytes"] >= LAYER.M * LAYER.N * 4
    if device == "cpu":
        assert lorafa["forward_temporary_bytes"] < LAYER.M * LAYER.N * 4
        assert lorafa["peak_allocated_bytes"] is None and lorafa["peak_reserved_bytes"] is None
    else:
        assert 0 < lorafa["peak_allocated_bytes"] <= lorafa["peak_reserved_bytes"]


@pytest.mark.numerics
def test_planted_failures_of_a_layer_have_no_number():
    def scaled(operands, case):
        right = contenders.build_eager(operands, case)
        right.module.scaling *= 1.05
        return right

    def nan(operands, case):
        right = contenders.build_eager(operands, case)
        return contenders.Layer(lambda x: right.module(x) * float("nan"), right.lora_B)

    def raising(operands, case):
        raise RuntimeError("does not run here\nsecond line")

    planted = {build.__name__: build for build in (scaled, nan, raising)}
    known = {name: contenders.Contender(name, name, build) for name, build in planted.items()}
    known["absent"] = contenders.Contender("absent", "absent", raising, ("no_such_package",))
    known["frozen"] = contenders.CONTENDERS["frozen"]
    rows = by_row(memory.layer_memory(LAYER, (), "cpu", known=known))
    for name in planted:
        assert rows[name, False]["status"] == "failed" and has_no_number(rows[name, False])
    assert rows["scaled", False]["reason"] == "outside the error budget: y, dx, dB"
    assert rows["raising", False]["reason"] == "RuntimeError: does not run here"
    assert (rows["absent", False]["status"], rows["absent", False]["reason"]) == (
        "not run",
        "no_such_package is not installed",
    )
    assert rows["frozen", False]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.numerics
def test_units_of_a_llama_block():
    pytest.importorskip("peft")
    payload = memory.block_memory(BLOCK, models.BLOCK_KEYS, "cpu")
    rows = by_row(payload)
    unit = payload["unit_bytes"]
    assert unit == 4 * 16 * 256 * 2

    R, hidden, wide = 4 / 256, 256, 688 / 256
    # SwiGLU's gate, its activation and up; two norms in fp32 with their 1/rms; q, k, v and the attention's
    # output with its logsumexp; in 16 bit z of each layer.
    common = 3 * wide + 2 * (2 + 2 / hidden) + 4 + 2 * 2 / hidden
    expected = {
        "frozen": common,
        # Gate and up alone; the norms' inputs, of which the first is the block's.
        "lorafa": common + 7 * R - wide - 2,
        "lorafa-layers": common + 7 * R,
        "eager-lorafa": common + 7 * R,
        "eager-lora": common + 7 * R + 2 + wide,
        "peft-lorafa-16bit": common + 7 * R,
        "peft-lora-16bit": common + 7 * R + 2 + wide,
        "peft-lorafa": common + 7 * 2 * R,
        "peft-lora": common + 7 * 2 * R + 2 * (3 + 1 + 2 + wide),
    }
    for key, units in expected.items():
        row, checkpointed = rows[key, False], rows[key, True]
        assert (
            (row["status"], row["reason"]) == (checkpointed["status"], checkpointed["reason"]) == ("ok", None)
        )
        assert row["parts"]["input"] + row["parts"]["rest"] == units * unit, key
        assert row["saved_bytes"] == sum(row["parts"].values())
        assert row["units"] == pytest.approx(row["saved_bytes"] / unit, abs=1e-4)
        # The layer's input is all that remains, and backward makes the rest again.
        assert checkpointed["parts"] == {"input": unit, "shared": 0, "rest": 0}
        assert checkpointed["backward_temporary_bytes"] > row["backward_temporary_bytes"]
        assert set(row["errors"]) == ({"y", "dx"} if key == "frozen" else {"y", "dx", "dB"})
    # What the project's documents say of the same block, position embeddings included.
    for key, units in (
        ("peft-lora-16bit", 20.93),
        ("eager-lorafa", 16.24),
        ("peft-lora", 33.7),
        ("peft-lorafa", 16.4),
    ):
        assert rows[key, False]["parts"]["rest"] / unit == pytest.approx(units, abs=0.1)
    for key in ("compiled-lorafa", "compiled-lora"):
        assert rows[key, False]["status"] == rows[key, True]["status"] == "not run"
        assert "takes a minute" in rows[key, False]["reason"] and has_no_number(rows[key, False])


# What the others are made of is in these; `make memory` runs them all. A Llama's layer has a test of its own.
UNLIKE = ("BERT", "RoBERTa", "T5", "Qwen3", "Gemma2", "Gemma3", "Phi-3", "Llama block, MHA 512, padding")


# BERT's is the quickest.
@pytest.mark.numerics
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=key, marks=[] if key == "BERT block" else [pytest.mark.slow])
        for key, case in memory.FAMILIES.items()
        if key.removesuffix(" block") in UNLIKE
    ],
)
def test_every_family_passes_its_check(case):
    """At few tokens; the units, of any size, are in docs/memory.md."""
    few = replace(case, sequence=32, rank=4, compiled=False)
    payload = memory.block_memory(few, ("frozen", "lorafa", "eager-lorafa", "eager-lora"), "cpu")
    rows = {row["contender"]: row for row in payload["rows"]}
    assert [(row["status"], row["reason"]) for row in rows.values()] == [("ok", None)] * 4
    assert set(rows["lorafa"]["errors"]) == {"y", "dx", "dB"}
    for row in rows.values():
        own = row["parts"]["input"] + row["parts"]["rest"]
        assert sum(row["by_node"].values()) == own == row["saved_bytes"] - row["parts"]["shared"]
    layers = len(models.adapters(models.adapt_eager(models.build(few, "cpu"), few.linears, 4)))
    z = layers * 2 * 32 * 4 * 2
    assert rows["eager-lorafa"]["saved_bytes"] == rows["frozen"]["saved_bytes"] + z
    assert (
        rows["lorafa"]["saved_bytes"]
        <= rows["eager-lorafa"]["saved_bytes"]
        < rows["eager-lora"]["saved_bytes"]
    )


def test_what_a_llama_layer_keeps_by_name():
    """Every tensor of apply_lorafa's layer with its defaults, in Llama-2-7B's proportions."""
    case = replace(BLOCK, sequence=32)
    block = models.build(case, "cpu")
    models.adapt_lorafa(block, models.LLAMA_LINEARS, case.rank)
    models.fill_adapters(block, case.dtype, zero_B=False)
    x = torch.randn(4, 32, 256, dtype=torch.bfloat16, requires_grad=True)
    parts = {"input": [x], "shared": block.shared}
    _, saved = memory.saved_bytes(lambda: block(x), parts, block.parameters())
    found = {}
    for node, tensors in nodes_of(block(x)):
        kept = [t for t in tensors if not isinstance(t, nn.Parameter)]
        if "RMSNorm" in node:
            # From the end of the layer on.
            name = "norm 1" if "norm 2" in found else "norm 2"
            found[name], found[f"{name} rstd"] = kept
        elif "GatedMLP" in node:
            found["gate"], found["up"], found["z gate, up"], found["z down"] = kept
        elif "LinearGroup" in node:
            (found["z q, k, v"],) = kept
        elif "LoRAFALinear" in node:
            (found["z o"],) = kept
        elif "ScaledDotProduct" in node:
            found |= dict(zip(("key", "logsumexp", "output", "query", "value"), kept, strict=True))
    assert found["norm 1"] is x
    M, R, half = 4 * 32, 4, 2
    want = {
        **{name: M * 256 * half for name in ("norm 1", "norm 2", "query", "key", "value", "output")},
        **{name: M * 4 for name in ("norm 1 rstd", "norm 2 rstd")},
        "logsumexp": M * 2 * 4,
        **{name: M * 688 * half for name in ("gate", "up")},
        "z q, k, v": M * 3 * R * half,
        "z o": M * R * half,
        "z gate, up": M * 2 * R * half,
        "z down": M * R * half,
    }
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in found.items()} == want
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(want)
    assert sum(want.values()) == saved["input"] + saved["rest"], "and nothing else"
    assert sum(want.values()) / case.unit_bytes() < 11.6


def nodes_of(y):
    """(name, saved tensors) of the nodes of a graph that keep something, from y on."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop(0)
        if node in seen or node is None:
            continue
        seen.add(node)
        if tensors := memory._saved_by(node):
            yield node.name(), tensors
        waiting += [below for below, _ in node.next_functions]


def test_a_block_is_called_as_its_model_calls_it():
    case = memory.FAMILIES["Llama block, GQA 8:2 512, padding"]
    case = replace(case, sequence=8)
    block = models.build(case, "cpu")
    mask, *positions = (tensor for tensor in block.shared if tensor.dtype in (torch.bool, torch.bfloat16))
    assert mask.shape == (2, 1, 8, 8) and mask.dtype == torch.bool
    assert not mask[0, 0, :, -2:].any() and mask[1, 0].tril().equal(mask[1, 0]) and mask[1, 0, -1].all()
    assert [part.shape[-2:] for part in positions] == [(8, 64)] * 2
    # The second of two layers: a T5's first one makes the position bias that the others are given.
    t5 = models.build(replace(memory.FAMILIES["T5 block"], sequence=8), "cpu")
    assert any(part.shape == (1, 6, 8, 8) for part in t5.shared)
    assert not any("relative_attention_bias" in name for name, _ in t5.named_parameters())


def test_bytes_by_node_of_a_known_graph(x):
    weight = nn.Parameter(torch.randn(K, device=x.device), requires_grad=False)
    y = (x * weight).exp().square()
    assert memory.saved_by_node(y, []) == {"PowBackward0": N}, (
        "the exponential's result is the square's input"
    )
    assert memory.saved_by_node(y.exp(), []) == {"ExpBackward0": N, "PowBackward0": N}
    assert memory.saved_by_node(y, [x, weight]) == {"PowBackward0": N}
    assert memory.saved_by_node((x * x).exp(), []) == {"ExpBackward0": N, "MulBackward0": N}
    assert memory.saved_by_node((x * x).exp(), [x]) == {"ExpBackward0": N}


def test_hooks_see_all_that_a_block_keeps():
    """What forward leaves allocated is its result and the saved bytes: nothing is kept past the hooks."""
    reference = models.reference(BLOCK, "cpu")
    block = models.build(BLOCK, "cpu")
    models.adapt_lorafa(block, models.LLAMA_LINEARS, BLOCK.rank)
    models.fill_adapters(block, BLOCK.dtype, zero_B=False)
    x = reference.x.requires_grad_()
    parts = {"input": [x], "shared": block.shared}
    _, saved = memory.saved_bytes(lambda: block(x), parts, block.parameters())
    kept, _, _ = memory.allocations(
        lambda: block(x), lambda y: torch.autograd.grad(y, x, reference.dy), "cpu"
    )
    assert kept == saved["rest"] + BLOCK.unit_bytes()


def adapt_with_scaling(factor):
    def adapt(model, linears, rank):
        models.adapt_eager(model, linears, rank)
        for module in model.modules():
            if isinstance(module, models.EagerLoRA):
                module.scaling *= factor
        return model

    return adapt


def adapt_raising(model, linears, rank):
    raise RuntimeError("does not run here\nsecond line")


def adapt_some(model, linears, rank):
    return models.adapt_eager(model, linears[:3], rank)


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("adapt", "reason"),
    [
        (adapt_with_scaling(1.05), "outside the error budget: y, dx, dB"),
        (adapt_with_scaling(float("nan")), "outside the error budget: y, dx, dB"),
        (adapt_raising, "RuntimeError: does not run here"),
        (adapt_some, "ValueError: adapts 3 linear layers, expected 7"),
    ],
    ids=["wrong", "nan", "raising", "incomplete"],
)
def test_planted_failures_of_a_block_have_no_number(adapt, reason, monkeypatch):
    planted = models.Contender("planted", "planted", adapt)
    monkeypatch.setitem(models.CONTENDERS, "planted", planted)
    rows = by_row(memory.block_memory(BLOCK, ("planted", "frozen"), "cpu"))
    for checkpointing in (False, True):
        row = rows["planted", checkpointing]
        assert (row["status"], row["reason"]) == ("failed", reason)
        assert has_no_number(row)
        assert rows["frozen", checkpointing]["status"] == "ok"


def test_missing_peft_stays_in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = by_row(memory.block_memory(BLOCK, ("peft-lora", "lorafa"), "cpu"))
    for checkpointing in (False, True):
        row = rows["peft-lora", checkpointing]
        assert (row["status"], row["reason"]) == ("not run", "peft is not installed")
        assert has_no_number(row)
        assert rows["lorafa", checkpointing]["status"] == "ok"


@pytest.mark.numerics
def test_encoder_block():
    case = BlockCase("MiniLM", 2, 8, rank=4, dtype="fp32", compiled=False)
    rows = by_row(memory.block_memory(case, ("frozen", "lorafa"), "cpu"))
    assert [row["status"] for row in rows.values()] == ["ok"] * 4
    kept = {key: row["saved_bytes"] for (key, checkpointing), row in rows.items() if not checkpointing}
    # z of six layers, (16 tokens, 4) each.
    assert kept["lorafa"] - kept["frozen"] == 6 * 16 * 4 * 4


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown contender of a block 'lorfa' \(did you mean lorafa.*peft-lora"
    ):
        memory.block_memory(BLOCK, ("lorfa",), "cpu")
    with pytest.raises(ValueError, match=r"unknown model 'Llama'.*Llama-3-8B"):
        replace(BLOCK, model="Llama")


def test_too_small_outputs_are_refused():
    with pytest.raises(ValueError, match=r"256 elements or more, fewer: dB layer.self_attn.k_proj"):
        models.reference(BlockCase("Llama block, GQA 512", 1, 4, rank=1), "cpu")


def test_error_of_one_gradient_in_a_chain_is_pooled():
    errors = {"y": 0.1, "dx": 0.2, "dB a": 0.01, "dB b": 0.07}
    common = 0.05
    assert models.pooled(errors) == {"y": 0.1, "dx": 0.2, "dB a": pytest.approx(common), "dB b": 0.07}
    assert models.pooled({"y": 0.1, "dB a": 0.01}) == {"y": 0.1, "dB a": pytest.approx(0.01)}
    assert models.pooled({"y": 0.1}) == {"y": 0.1}


@pytest.mark.numerics
@pytest.mark.parametrize("which", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_wrong_gradient_of_one_layer_is_found(which):
    """Right outputs and dx, one dB of seven that is 5 % off."""

    def adapt(model, linears, rank):
        models.adapt_eager(model, linears, rank)
        wrong = [module for module in model.modules() if isinstance(module, models.EagerLoRA)][which]
        wrong.lora_B.register_hook(lambda grad: 1.05 * grad)
        return model

    reference = models.reference(memory.BLOCKS["cpu"][0], "cpu")
    size = models.size_of(memory.BLOCKS["cpu"][0].model)
    block = adapt(models.build(memory.BLOCKS["cpu"][0], "cpu"), size.linears, 8)
    models.fill_adapters(block, "bf16", zero_B=False)
    errors = reference.errors(models.Contender("planted", "planted", adapt), block)
    assert [name for name, error in errors.items() if not error["kept"]] == ["dB"]
