"""python -m lorafa_kernels memory: its bytes are those that autograd keeps of transformers' models."""

from __future__ import annotations

import json

import pytest
import torch

from bench.measure import contenders, models, training
from bench.measure import memory as measured
from lorafa_kernels.__main__ import main
from lorafa_kernels.memory.planner import (
    ITEMSIZE,
    METHODS,
    ModelSizes,
    Step,
    fixed_bytes,
    layer_bytes,
    least_peak,
    model_bytes,
    most_batch,
)

CONTENDERS = {"lorafa": "lorafa", "lorafa-layers": "lorafa-layers", "lora": "eager-lora", "peft": "peft-lora"}
BATCH, SEQUENCE, RANK = 3, 8, 4
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def sizes_of(name: str) -> ModelSizes:
    pytest.importorskip("transformers")
    return ModelSizes.from_config(models.size_of(name).config().to_dict())


def adapted(model, contender: str, zero_B: bool = True):
    if contender.startswith("peft"):
        pytest.importorskip("peft")
    models.CONTENDERS[contender].build(model, models.LLAMA_LINEARS, RANK)
    models.fill_adapters(model, "bf16", zero_B=zero_B)
    return model


BLOCKS = ("Llama block, MHA 256", "Llama block, GQA 8:2 512", "Mistral block", "Qwen2 block")


# Each dtype with each block and with each method.
@pytest.mark.parametrize(
    ("method", "name", "dtype"),
    [
        (method, name, ("bf16", "fp32")[(i + j) % 2])
        for i, method in enumerate(METHODS)
        for j, name in enumerate(BLOCKS)
    ],
)
def test_a_layer_keeps_what_is_planned(name, method, dtype):
    block = models.build_block(name, SEQUENCE, dtype, "cpu", batch=BATCH)
    adapted(block, CONTENDERS[method])
    x = torch.randn(
        BATCH, SEQUENCE, models.size_of(name).hidden, dtype=models.DTYPES[dtype], requires_grad=True
    )
    own = [*block.parameters(), *block.buffers()]
    _, saved = measured.saved_bytes(lambda: block(x), {"input": [x], "shared": block.shared}, own)
    planned = layer_bytes(sizes_of(name), Step(BATCH, SEQUENCE, RANK, dtype), method)
    assert sum(planned.values()) == saved["input"] + saved["rest"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_keeps_what_is_planned(method, checkpointing):
    name = "tiny Llama"
    model = adapted(models.build_causal_lm(name, "bf16", "cpu"), CONTENDERS[method]).train()
    if checkpointing:
        models.checkpoint_layers(model)
    tokens = torch.randint(512, (BATCH, SEQUENCE))
    own = [*model.parameters(), *model.buffers(), tokens]
    _, saved = measured.saved_bytes(lambda: training._loss(model, tokens), {}, own)
    step = Step(BATCH, SEQUENCE, RANK, checkpointing=checkpointing)
    # Checkpointing holds the positions as arguments of the layers, which no hook sees.
    unseen = 2 * SEQUENCE * 64 * 2 if checkpointing else 0
    assert model_bytes(sizes_of(name), step, method) == saved["rest"] + unseen


@pytest.mark.parametrize("method", METHODS)
def test_what_is_fixed_is_what_the_parameters_take(method):
    name = "tiny Llama"
    model = adapted(models.build_causal_lm(name, "bf16", "cpu"), CONTENDERS[method])
    optimizer = contenders.adamw(model, RANK, 1e-3)
    training._loss(model, torch.randint(512, (BATCH, SEQUENCE))).backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state.get(p, {}).values())]
    taken = sum(t.numel() * t.itemsize for t in tensors if t is not None and t.dim())
    assert fixed_bytes(sizes_of(name), Step(BATCH, SEQUENCE, RANK), method) == taken


def test_forward_allocates_at_least_what_a_batch_counts():
    name = "tiny Llama"
    sizes, step = sizes_of(name), Step(BATCH, SEQUENCE, RANK)
    model = adapted(models.build_causal_lm(name, "bf16", "cpu"), "lorafa").train()
    tokens = torch.randint(512, (BATCH, SEQUENCE))
    wanted = [p for p in model.parameters() if p.requires_grad]
    training._loss(model, tokens).backward()
    kept, temporary, _ = measured.allocations(
        lambda: training._loss(model, tokens), lambda loss: torch.autograd.grad(loss, wanted), "cpu"
    )
    counted = least_peak(sizes, step, "lorafa") - fixed_bytes(sizes, step, "lorafa")
    # Not the targets, which the caller has.
    assert 0.5 * (kept + temporary) < counted <= kept + temporary


def test_the_batch_is_the_largest_whose_peak_fits():
    sizes = ModelSizes.from_config(LLAMA_8B)
    for method in METHODS:
        for checkpointing in (False, True):
            step = Step(1, 1024, checkpointing=checkpointing)
            for memory in (10 * 2**30, 20 * 2**30, 80 * 2**30):
                most = most_batch(sizes, step, method, memory)
                peaks = [
                    least_peak(sizes, Step(batch, 1024, checkpointing=checkpointing), method)
                    for batch in (most, most + 1)
                    if batch
                ]
                assert peaks[-1] > memory and (most == 0 or peaks[0] <= memory)


def test_command_prints_the_plan(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(["memory", str(tmp_path), "--batch", "2", "--sequence", "1024", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and all(title in out for title in METHODS.values())
    sizes, step = ModelSizes.from_config(LLAMA_8B), Step(2, 1024)
    assert f"kept for backward: {model_bytes(sizes, step, 'lorafa') / 2**30:.3f} GiB" in out
    most = most_batch(sizes, step, "lorafa", 80 * 2**30)
    assert f"at most {most} sequences fit in 80.000 GiB" in out and "upper bound" in out
    assert main(["memory", str(tmp_path / "config.json"), "--memory", "1"]) == 0
    assert "not even 1 sequence fits in 1.000 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "expected a JSON object"),
        (
            json.dumps({**LLAMA_8B, "model_type": "bert"}),
            "model_type is 'bert', expected one of llama, mistral",
        ),
        (json.dumps({**LLAMA_8B, "hidden_size": 0}), "hidden_size is 0"),
        (json.dumps({**LLAMA_8B, "vocab_size": "many"}), "vocab_size is 'many'"),
        (
            json.dumps({k: v for k, v in LLAMA_8B.items() if k != "num_hidden_layers"}),
            "num_hidden_layers is missing",
        ),
        (None, "No such file"),
    ],
    ids=["cut", "list", "kind", "zero", "text", "missing", "no-file"],
)
def test_a_config_that_cannot_be_read_says_why(text, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    assert main(["memory", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--memory", "-1"], ["--rank", "x"], ["--dtype", "int8"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["memory", "config.json", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_sizes_that_a_config_leaves_out():
    sizes = ModelSizes.from_config({k: v for k, v in LLAMA_8B.items() if k != "num_key_value_heads"})
    assert (sizes.num_key_value_heads, sizes.head_dim, sizes.tie_word_embeddings) == (32, 128, False)
    assert set(ITEMSIZE) == {"bf16", "fp16", "fp32"}
