"""Blocks in transformers' models: what is found in each family, and that nothing else changes."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch

from lorafa_kernels.checks.budget import allowed_error, relative_error
from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.checkpoint import load_adapter, save_adapter
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.merge import unload_adapter
from lorafa_kernels.model.saved import lorafa_parameters

transformers = pytest.importorskip("transformers", reason="the models are transformers'")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 61
# The square root of the width, by which Gemma multiplies its embeddings, is exact in bf16.
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 16}
BERT = {**COMMON, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def decoder(name, norms):
    """What is fused in a decoder of two layers."""
    return {("shared input", f"{name}Attention", QKV): 2, ("MLP", f"{name}MLP", MLP): 2} | {
        ("norm", f"{name}RMSNorm", ()): norms
    }


# Class of the model, its configuration, what is fused, and the reasons for the rest.
FAMILIES = {
    "llama": ("LlamaForCausalLM", DECODER, decoder("Llama", 5), {}),
    "mistral": ("MistralForCausalLM", DECODER, decoder("Mistral", 5), {}),
    "qwen2": ("Qwen2ForCausalLM", DECODER, decoder("Qwen2", 5), {}),
    "qwen3": ("Qwen3ForCausalLM", DECODER, decoder("Qwen3", 9), {}),
    "gemma": ("GemmaForCausalLM", DECODER, decoder("Gemma", 5), {}),
    "gemma2": ("Gemma2ForCausalLM", DECODER, decoder("Gemma2", 9), {}),
    "gemma3": ("Gemma3ForCausalLM", DECODER, decoder("Gemma3", 13), {}),
    "phi3": (
        "Phi3ForCausalLM",
        {key: value for key, value in DECODER.items() if key != "head_dim"},
        {("norm", "Phi3RMSNorm", ()): 5},
        {
            "Phi3Attention": "none of its adapted layers share an input",
            "Phi3MLP": "its forward unpacks the result of chunk",
        },
    ),
    "bert": (
        "BertModel",
        BERT,
        {("shared input", "BertSelfAttention", ("query", "key", "value")): 2},
        {
            "LayerNorm": "its forward is not that of a known RMS norm: it also computes layer_norm",
            "BertSelfOutput": "it has one linear layer only, dense",
            "BertIntermediate": "it has one linear layer only, dense",
            "BertOutput": "it has one linear layer only, dense",
            "BertPooler": "it has one linear layer only, dense",
        },
    ),
    "roberta": (
        "RobertaModel",
        BERT,
        {("shared input", "RobertaSelfAttention", ("query", "key", "value")): 2},
        {
            "LayerNorm": "its forward is not that of a known RMS norm: it also computes layer_norm",
            "RobertaSelfOutput": "it has one linear layer only, dense",
            "RobertaIntermediate": "it has one linear layer only, dense",
            "RobertaOutput": "it has one linear layer only, dense",
            "RobertaPooler": "it has one linear layer only, dense",
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5,
        {("shared input", "T5Attention", ("k", "v")): 6, ("norm", "T5LayerNorm", ()): 12},
        {"T5DenseActDense": "its forward reads wo.weight"},
    ),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        {
            ("shared input", "T5Attention", ("k", "v")): 6,
            ("shared input", "T5DenseGatedActDense", ("wi_0", "wi_1")): 4,
            ("norm", "T5LayerNorm", ()): 12,
        },
        {"T5DenseGatedActDense": "its forward reads wo.weight"},
    ),
}


def adapted(family, dtype=torch.float32, *, fuse=True, norm=True, **changes):
    """The same model each time, with adapters that are not zero and are exact in bf16."""
    kind, fields, *_ = FAMILIES[family]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**fields, **changes})).to(dtype)
    config = LoRAFAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    apply_lorafa(model, config, fuse=fuse, norm=norm)
    with torch.no_grad():
        for parameter in lorafa_parameters(model):
            parameter.copy_(parameter.bfloat16())
    return model.train()


def unfused(family, dtype=torch.float32, **changes):
    return adapted(family, dtype, fuse=False, norm=False, **changes)


def tokens(model, batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    )


def results(model, call=None):
    """The logits (or last states), and the gradients of all adapters as one vector."""
    y = (model if call is None else call)(**tokens(model), use_cache=False)[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    model.zero_grad(set_to_none=True)
    y.backward(dy)
    # BERT's pooler gets none: its output is not used.
    grads = [p.grad.double().flatten() for p in lorafa_parameters(model) if p.grad is not None]
    return y.detach(), torch.cat(grads)


def check_budget(got, plain, exact, dtype):
    for one, other, wanted in zip(got, plain, exact, strict=True):
        assert one.shape == wanted.shape
        error, allowed = relative_error(one, wanted), allowed_error(relative_error(other, wanted), dtype)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused_in_each_family(family):
    _, _, wanted, reasons = FAMILIES[family]
    report = adapted(family).lorafa_report
    assert Counter((b.kind, b.module, b.layers) for b in report.blocks if b.fused) == wanted
    assert {b.module: b.reason for b in report.blocks if not b.fused} == reasons
    for block in report.blocks:
        assert str(block) in str(report)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_within_the_budget(family, dtype):
    plain = unfused(family, dtype)
    exact = copy.deepcopy(plain).double()
    check_budget(results(adapted(family, dtype)), results(plain), results(exact), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_keys_and_classes_stay(family):
    model, plain = adapted(family), unfused(family)
    assert list(model.state_dict()) == list(plain.state_dict())
    for (name, one), (other_name, other) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert name == other_name and isinstance(one, type(other))
    unload_adapter(model, merge=False)
    unload_adapter(plain, merge=False)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "t5 v1.1"])
def test_generation_with_a_cache_is_the_same_bit_by_bit(family):
    found = []
    for model in (adapted(family), unfused(family)):
        ids = tokens(model)["input_ids"]
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        found.append(model.eval().generate(ids, **options, output_logits=True))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(torch.equal(one, other) for one, other in zip(found[0].logits, found[1].logits, strict=True))


@pytest.mark.numerics
@pytest.mark.parametrize("reentrant", [False, True], ids=["early stop", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5 v1.1"])
def test_gradient_checkpointing(family, reentrant):
    found = []
    for model in (adapted(family), unfused(family)):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        found.append(results(model))
    check_budget(*found, results(unfused(family).double()), torch.float32)


@pytest.mark.slow
@pytest.mark.numerics
def test_a_whole_model_is_compiled_in_one_graph():
    found = []
    for model in (adapted("llama", num_hidden_layers=1), unfused("llama", num_hidden_layers=1)):
        torch._dynamo.reset()
        found.append(results(model, torch.compile(model, fullgraph=True, backend="aot_eager")))
    exact = results(unfused("llama", num_hidden_layers=1).double())
    check_budget(*found, exact, torch.float32)


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "t5 v1.1"])
def test_copies_and_pickles(family):
    model = adapted(family)
    wanted = results(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert all(torch.equal(one, two) for one, two in zip(results(other), wanted, strict=True))


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "bert", "t5 v1.1"])
def test_offloaded_by_accelerate_it_computes_the_same(family):
    accelerate = pytest.importorskip("accelerate", reason="offloads the model")
    model = adapted(family)
    inputs = tokens(model)
    wanted = model(**inputs)[0]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    got = model(**inputs)[0]
    # What is offloaded layer by layer is computed layer by layer.
    check_budget([got], [unfused(family)(**inputs)[0]], [unfused(family).double()(**inputs)[0]], got.dtype)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], unfused(family)(**inputs)[0])
    assert wanted.shape == got.shape


@pytest.mark.numerics
@pytest.mark.parametrize("saved_fused", [True, False])
def test_adapters_are_saved_and_loaded_across(saved_fused, tmp_path):
    source = adapted("llama") if saved_fused else unfused("llama")
    save_adapter(source, tmp_path)
    other = unfused("llama") if saved_fused else adapted("llama")
    with torch.no_grad():
        for parameter in lorafa_parameters(other):
            parameter.zero_()
    load_adapter(other, tmp_path)
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    fresh = transformers.LlamaForCausalLM(source.config)
    load_adapter(fresh, tmp_path)
    assert {block.kind for block in fresh.lorafa_report.blocks if block.fused} == {
        "MLP",
        "shared input",
        "norm",
    }


@pytest.mark.numerics
def test_peft_reads_the_adapter_of_a_fused_model(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT reads the file")
    model = adapted("llama").eval()
    save_adapter(model, tmp_path)
    base = unload_adapter(copy.deepcopy(model), merge=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = tokens(model)
    exact = unfused("llama").eval().double()(**inputs)[0]
    check_budget([model(**inputs)[0]], [theirs(**inputs)[0]], [exact], torch.float32)


@pytest.mark.numerics
def test_training_through_the_blocks_lowers_the_loss():
    """And the next step is that of the same weights without blocks."""
    model, losses = adapted("llama"), []
    optimizer = torch.optim.SGD(lorafa_parameters(model), lr=0.5)
    inputs = tokens(model)
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[2] < losses[1] < losses[0]
    plain = unfused("llama")
    plain.load_state_dict(model.state_dict())
    exact = copy.deepcopy(plain).double()
    check_budget(results(model), results(plain), results(exact), torch.float32)


def test_weights_that_are_trained_whole_are_left_alone():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    config = LoRAFAConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm", "0.mlp"])
    apply_lorafa(model, config)
    blocks = {block.name: block for block in model.lorafa_report.blocks}
    assert blocks["model.norm"].reason == "its weight is trained"
    assert blocks["model.layers.0.mlp"].reason == "gate_proj.weight is trained"
    assert blocks["model.layers.1.mlp"].fused and blocks["model.layers.0.input_layernorm"].fused
    assert blocks["model.layers.0.self_attn"].layers == ("q_proj", "v_proj")
    y = model(**tokens(model))[0]
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in lorafa_parameters(model))


def kept(layer, x, positions):
    """Bytes of storage that a forward keeps for backward, without parameters, buffers and the positions."""
    own = [*layer.parameters(), *layer.buffers(), *positions]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, position_embeddings=positions)
    return y, sum(storage.nbytes() for storage in found.values())


def test_a_llama_layer_keeps_at_most_11_6_units():
    """In units of a bf16 hidden state: gate and up 5.375, norms 2, attention 4, z and statistics the rest."""
    batch, length, width, rank = 1, 64, 256, 4
    sizes = {"hidden_size": width, "intermediate_size": 688, "num_key_value_heads": 4, "head_dim": 64}
    units = {}
    for fuse, norm in ((True, True), (False, False)):
        model = adapted("llama", torch.bfloat16, fuse=fuse, norm=norm, **sizes, attn_implementation="sdpa")
        x = torch.randn(batch, length, width, dtype=torch.bfloat16).requires_grad_()
        positions = model.model.rotary_emb(x, torch.arange(length)[None])
        y, count = kept(model.model.layers[0], x, positions)
        units[fuse] = count / (batch * length * width * 2)
        assert y.requires_grad
    z, statistics = 7 * rank / width, (4 * 4 + 2 * 4) / (2 * width)
    assert units[True] == pytest.approx(2 * 688 / width + 2 + 4 + z + statistics, abs=1e-3)
    assert units[True] <= 11.6 < units[False]
