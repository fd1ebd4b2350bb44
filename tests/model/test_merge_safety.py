"""Merging and unloading are right, or an error that names the layer and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    apply_lorafa,
    disable_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.model.saved import lorafa_parameters

pytestmark = pytest.mark.numerics

X = torch.linspace(-1, 1, 18).reshape(3, 6)


def build(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)).to(dtype)
    return apply_lorafa(
        model, LoRAFAConfig(r=3, target_modules=["0", "2", "4"], init_lora_weights=False)
    ).eval()


def state(model):
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            {n: (id(p), p.clone()) for n, p in module._parameters.items() if p is not None},
        )
        for name, module in model.named_modules()
    ]


def assert_unchanged(model, before):
    after = state(model)
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    for (*_, now), (*_, then) in zip(after, before, strict=True):
        assert now.keys() == then.keys()
        for name, (identity, value) in then.items():
            assert now[name][0] == identity, name
            if not value.is_meta:
                assert torch.equal(now[name][1], value) or not torch.isfinite(value).all(), name
    assert not any(layer.merged for layer in lorafa_layers(model).values())


# What is done to a whole model; each must be right or refuse before anything changes.
ACTIONS = {
    "merge": merge_adapter,
    "merge to the CPU": lambda model: merge_adapter(model, keep="cpu"),
    "unload": unload_adapter,
    "safe merge": lambda model: merge_adapter(model, safe_merge=True),
    "safe unload": lambda model: unload_adapter(model, safe_merge=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_round_the_merged_weight(action, dtype, autocast):
    plain, inside = build(dtype), build(dtype)
    ACTIONS[action](plain)
    with torch.autocast("cpu", autocast):
        ACTIONS[action](inside)
    for index in (0, 2, 4):
        assert torch.equal(inside[index].weight, plain[index].weight)
        assert inside[index].weight.dtype == dtype


@pytest.mark.parametrize("action", ACTIONS)
def test_a_weight_that_was_merged_in_inference_mode_is_an_ordinary_one(action):
    model = build()
    with torch.inference_mode():
        ACTIONS[action](model)
    assert not model[0].weight.is_inference()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("action", ACTIONS)
def test_while_the_adapter_is_disabled_nothing_is_merged(action):
    model = build()
    before, y = state(model), model(X)
    with disable_adapter(model):
        base = model(X)
        with pytest.raises(RuntimeError, match="the adapter of 0 is disabled"):
            ACTIONS[action](model)
        assert torch.equal(model(X), base)
    assert_unchanged(model, before)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("action", ACTIONS)
def test_one_disabled_layer_keeps_the_others_from_being_merged(action):
    model = build()
    before = state(model)
    model[4].adapter_enabled = False
    with pytest.raises(RuntimeError, match="the adapter of 4 is disabled"):
        ACTIONS[action](model)
    assert_unchanged(model, before)


def test_a_merged_layer_cannot_be_disabled():
    layer = build()[0]
    layer.merge()
    layer.adapter_enabled = False
    with pytest.raises(RuntimeError, match="cannot be disabled"):
        layer(X)


def on_meta(layer):
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)


def cut(layer):
    layer.lora_B.data = torch.empty(0)


def partitioned(layer):
    layer.lora_A.ds_id, layer.lora_A.ds_shape = 3, layer.lora_A.shape


def flattened(layer):
    layer.weight._fsdp_flattened = True


SPOILT = {
    "offloaded": (on_meta, "weight of 4 is on the meta device.*remove_hook"),
    "cut": (cut, r"4 cannot be (merged|unloaded): its lora_B has shape \(0,\), expected \(4, 3\)"),
    "ZeRO-3": (partitioned, "4 cannot be (merged|unloaded): its lora_A belongs to DeepSpeed's ZeRO-3"),
    "FSDP1": (flattened, "4 cannot be (merged|unloaded): its weight belongs to FullyShardedDataParallel"),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("case", SPOILT)
def test_one_layer_that_cannot_be_merged_keeps_the_others_from_it(case, action):
    spoil, words = SPOILT[case]
    model = build()
    spoil(model[4])
    before = state(model)
    with pytest.raises(RuntimeError, match=words):
        ACTIONS[action](model)
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError):
        model[4].merge()
    with pytest.raises(RuntimeError):
        model[4].to_linear()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_model_that_accelerate_offloads_is_refused(action):
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model = build()
    y = model(X)
    accelerate.cpu_offload(model)
    before = state(model)
    with pytest.raises(RuntimeError, match="weight of 0 is on the meta device"):
        ACTIONS[action](model)
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="forward of 0 was patched"):
        unload_adapter(model, merge=False)
    assert_unchanged(model, before)
    assert torch.equal(model(X), y)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(X), y)


@pytest.fixture
def one_process():
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("action", [*ACTIONS, "give back"])
@pytest.mark.parametrize("ran", [False, True], ids=["sharded", "after a forward"])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("each", [True, False], ids=["each layer", "root alone"])
def test_a_model_under_fully_shard_is_refused(action, ran, reshard, each, one_process):
    from torch.distributed.fsdp import fully_shard

    model = build()
    if each:
        for index in (0, 2, 4):
            fully_shard(model[index], mesh=one_process, reshard_after_forward=reshard)
    fully_shard(model, mesh=one_process, reshard_after_forward=reshard)
    act = ACTIONS.get(action, lambda m: unload_adapter(m, merge=False))
    y = model(X) if ran else None
    before = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="belongs to fully_shard"):
        act(model)
    # A layer by itself knows no root, and its parameters may be plain tensors at the moment.
    with pytest.raises(RuntimeError, match="belongs to fully_shard"):
        model[2].merge()
    assert [type(module) for module in model.modules()] == before
    assert not any(layer.merged for layer in lorafa_layers(model).values())
    if ran:
        assert torch.equal(model(X), y)


def test_what_was_merged_before_fully_shard_is_not_unmerged_under_it(one_process):
    from torch.distributed.fsdp import fully_shard

    model = merge_adapter(build())
    fully_shard(model, mesh=one_process)
    with pytest.raises(RuntimeError, match=r"unmerged.*belongs to fully_shard"):
        unmerge_adapter(model)
    assert all(layer.merged for layer in lorafa_layers(model).values())


def test_what_was_merged_before_it_was_offloaded_is_not_unmerged_into_nothing():
    model = merge_adapter(build())
    on_meta(model[0])
    with pytest.raises(RuntimeError, match="lose its values"):
        unmerge_adapter(model)
    assert model[0].merged and not model[0]._unmerged[0].is_meta


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("action", ["safe merge", "safe unload"])
def test_safe_merge_names_the_layer_that_is_not_finite_and_changes_nothing(action, where, bad):
    model = build()
    with torch.no_grad():
        getattr(model[2], where)[1, 1] = bad
    before = state(model)
    with pytest.raises(ValueError, match="merged weight of 2 is not finite"):
        ACTIONS[action](model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="not finite"):
        model[2].merge(safe_merge=True)
    with pytest.raises(ValueError, match="not finite"):
        model[2].to_linear(safe_merge=True)
    assert not model[2].merged
    merge_adapter(model)
    assert model[2].merged and not torch.isfinite(model[2].weight).all()


def test_safe_merge_sees_what_is_too_large_for_the_dtype():
    model = build(torch.float16)
    with torch.no_grad():
        model[0].lora_B.fill_(6e4)
        model[0].lora_A.fill_(6e4)
    with pytest.raises(ValueError, match=r"merged weight of 0 is not finite.*too large"):
        merge_adapter(model, safe_merge=True)


@pytest.mark.parametrize("action", ["merge", "unload"])
def test_safe_merge_gives_the_same_bits(action):
    plain, safe = build(), build()
    ACTIONS[action](plain)
    ACTIONS[f"safe {action}"](safe)
    for index in (0, 2, 4):
        assert torch.equal(plain[index].weight, safe[index].weight)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_flags_of_merging_are_flags(value):
    model = build()
    for call in (
        lambda: merge_adapter(model, safe_merge=value),
        lambda: unload_adapter(model, safe_merge=value),
        lambda: model[0].merge(safe_merge=value),
    ):
        with pytest.raises(TypeError, match="safe_merge must be True or False"):
            call()
    with pytest.raises(TypeError, match="merge must be True or False"):
        unload_adapter(model, merge=value)
    assert not model[0].merged


# A head that shares the weight of the embedding.


def llama(**options):
    transformers = pytest.importorskip("transformers", reason="the tied model is transformers'")
    torch.manual_seed(0)
    small = dict(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=12
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **options)).eval()


TOKENS = torch.arange(10)[None]


def tied(modules_to_save=None):
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    targets = ["q_proj"] if modules_to_save else ["q_proj", "lm_head"]
    config = LoRAFAConfig(
        r=2, target_modules=targets, init_lora_weights=False, modules_to_save=modules_to_save
    )
    return apply_lorafa(model, config).eval()


def test_an_adapter_on_a_tied_head_is_warned_about():
    with pytest.warns(UserWarning, match=r"lm_head shares its weight with model\.embed_tokens"):
        tied()


@pytest.mark.filterwarnings("ignore:lm_head shares")
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_merging_a_tied_head_cuts_the_tie_and_unmerging_mends_it(keep, monkeypatch):
    model = tied()
    embedding, bits = model.model.embed_tokens.weight, model.model.embed_tokens.weight.clone()
    keeps, merge = {}, LoRAFALinear.merge

    def spy(layer, keep="device", safe_merge=False):
        keeps[id(layer)] = keep
        merge(layer, keep, safe_merge)

    monkeypatch.setattr(LoRAFALinear, "merge", spy)
    assert model.config.tie_word_embeddings is True
    y = model(TOKENS).logits
    merge_adapter(model, keep=keep)
    assert keeps[id(model.lm_head)] == "device", "moved to the CPU it would take the embedding with it"
    assert keeps[id(model.model.layers[0].self_attn.q_proj)] == keep
    assert model.config.tie_word_embeddings is False
    assert model.model.embed_tokens.weight is embedding and torch.equal(embedding, bits)
    merged = model(TOKENS).logits
    model.tie_weights()
    assert torch.equal(model(TOKENS).logits, merged), "tie_weights took the merged head away"
    unmerge_adapter(model)
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is embedding
    assert torch.equal(model(TOKENS).logits, y)


@pytest.mark.filterwarnings("ignore:lm_head shares")
@pytest.mark.parametrize("case", ["adapted", "saved"])
@pytest.mark.parametrize("merge", [True, False])
def test_an_unloaded_tied_model_survives_save_pretrained(case, merge, tmp_path):
    model = tied(["lm_head"] if case == "saved" else None)
    if case == "saved":
        assert model.config.tie_word_embeddings is False, "the trained head has a weight of its own"
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        with disable_adapter(model):
            assert model.config.tie_word_embeddings is True
    names = set(vars(llama()))
    unload_adapter(model, merge=merge)
    assert set(vars(model)) == names
    assert model.config.tie_word_embeddings is not merge
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not merge
    y = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(TOKENS).logits, y)


def test_an_untied_model_keeps_its_flag():
    model = llama(tie_word_embeddings=False)
    apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    unmerge_adapter(merge_adapter(model.eval()))
    unload_adapter(model)
    assert model.config.tie_word_embeddings is False


# resize_token_embeddings after modules_to_save.


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_resized_modules_to_save_are_saved_and_their_originals_do_not_come_back(saved, tmp_path):
    model = llama(tie_word_embeddings=False)
    apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)).eval()
    model.resize_token_embeddings(16, mean_resizing=False)
    for name, module in (("embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)):
        with torch.no_grad():
            module.weight.copy_(torch.arange(module.weight.numel()).reshape(module.weight.shape) / 100)
        trained = any(parameter is module.weight for parameter in lorafa_parameters(model))
        assert trained == (name in saved), name
    before, y = state(model), model(TOKENS).logits
    with pytest.raises(RuntimeError, match="resize the model"), disable_adapter(model):
        pass
    with pytest.raises(RuntimeError, match="resize the model"):
        unload_adapter(model, merge=False)
    assert_unchanged(model, before)
    save_adapter(model, tmp_path)
    fresh = llama(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"\(16, 8\), expected \(12, 8\)"):
        load_adapter(fresh, tmp_path)
    fresh.resize_token_embeddings(16, mean_resizing=False)
    with torch.no_grad():
        fresh.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        fresh.lm_head.weight.copy_(model.lm_head.weight)
    assert torch.equal(load_adapter(fresh, tmp_path).eval()(TOKENS).logits, y)
    assert torch.equal(unload_adapter(model)(TOKENS).logits, unload_adapter(fresh)(TOKENS).logits)
