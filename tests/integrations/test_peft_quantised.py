"""PEFT models on quantised bases, on these kernels: bitsandbytes' Linear4bit, and quantize_base."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_same
from saved import pickled
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    apply_lorafa,
    lorafa_parameters,
    merge_adapter,
    quantize_base,
    save_adapter,
)
from lorafa_kernels.base import bnb
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.checks.budget import allowed_error, relative_error
from lorafa_kernels.integrations.peft import accelerate_peft, register
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.nn.quantised import QuantisedLinear

peft = pytest.importorskip("peft", reason="the models are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
lora = pytest.importorskip("peft.tuners.lora")
beds = pytest.importorskip("peft_beds", reason="the models are transformers' and PEFT's")
ServedOnQuantised = pytest.importorskip("lorafa_kernels.integrations.peft_quantised").ServedOnQuantised

pytestmark = pytest.mark.filterwarnings("ignore")
# Relative difference of the losses of 20 steps in fp32 that users are promised.
PROMISED = 1e-5
KINDS = pytest.mark.parametrize("kind", ["bitsandbytes", "bitsandbytes nested", "nf4", "nf4-nested", "int8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLaMA on disk."""
    folder = tmp_path_factory.mktemp("base")
    beds.save_llama(folder)
    return folder


def load(folder, kind, dtype=torch.float32) -> nn.Module:
    """The same model each time, on a base of the kind."""
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        pytest.importorskip("accelerate", reason="needs accelerate")
    return beds.load_quantised(folder, kind, dtype)


def with_peft(model, **fields) -> nn.Module:
    """PEFT's, with lora_A frozen by hand."""
    model = peft.get_peft_model(model, beds.config(**fields))
    beds.draw(model)
    beds.freeze(model)
    return model.train()


def served(model, way="accelerate_peft", **fields) -> nn.Module:
    config = beds.config(**fields)
    model = peft.get_peft_model(model, register(config) if way == "register" else config)
    beds.draw(model)
    if way == "accelerate_peft":
        accelerate_peft(model)
    kinds = [type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)]
    assert kinds and all(issubclass(kind, ServedOnQuantised) for kind in kinds)
    return model.train()


def with_lorafa(model, theirs) -> nn.Module:
    """apply_lorafa with the adapter of `theirs`."""
    model = apply_lorafa(model, LoRAFAConfig(r=4, target_modules="all-linear"))
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in lorafa_layers(model).items():
            for factor in ("lora_A", "lora_B"):
                getattr(layer, factor).copy_(values[f"base_model.model.{name}.{factor}.default.weight"])
    return model.train()


def exactly(model) -> nn.Module:
    """A copy in fp64 with the weights that the codes stand for."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer):
            layer.base_layer = dense(layer.base_layer)
    return model.double()


def dense(base) -> nn.Module:
    if isinstance(base, QuantisedLinear):
        return base.to_linear()
    linear = nn.Linear(base.in_features, base.out_features, bias=False)
    linear.weight = nn.Parameter(bnb.from_linear4bit(base).dense(), requires_grad=False)
    return linear


def check_results(got, plain, exact, dtype):
    """One vector of all gradients: many have fewer elements than an error can be told from."""
    assert list(got) == list(plain) == list(exact)
    pooled = [
        {"y": r["y"], "grads": torch.cat([g.double().flatten() for n, g in r.items() if n != "y"])}
        for r in (got, plain, exact)
    ]
    for name in ("y", "grads"):
        one, other, wanted = (r[name] for r in pooled)
        error, allowed = relative_error(one, wanted), allowed_error(relative_error(other, wanted), dtype)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def codes(model) -> dict[str, torch.Tensor]:
    """Everything of the bases, by names."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "proj" in n}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["eager", "checkpointing"])
@KINDS
def test_results_are_those_of_peft_and_of_apply_lorafa(kind, checkpointing, dtype, folder):
    plain = with_peft(load(folder, kind, dtype))
    exact = exactly(plain)
    models = served(load(folder, kind, dtype)), plain, with_lorafa(load(folder, kind, dtype), plain)
    if checkpointing:
        for model in models:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got, theirs, ours = map(beds.results, models)
    check_results(got, theirs, beds.results(exact), dtype)
    assert_same(got, {name: ours[name] for name in got})


@pytest.mark.numerics
@KINDS
def test_codes_are_used_where_they_are_and_bytes_kept_are_those_of_apply_lorafa(kind, folder):
    base = load(folder, kind)
    before = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    model = served(base)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    found = layer.quantised_base(layer.base_layer)
    assert found.tensors[0].data_ptr() == layer.base_layer.weight.data_ptr() == before
    ours = with_lorafa(load(folder, kind), model)
    assert kept(model) == kept(ours) > 0
    assert {line.base for line in model.lorafa_report.layers} == {found.kind.name}
    # Of the weights that the codes stand for, and all the rest.
    dense = sum(p.numel() for p in transformers.LlamaForCausalLM(base.config).parameters())
    lora_numbers = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.lorafa_report.total_parameters == dense + lora_numbers
    assert beds.trained(model) == beds.trained(ours) == model.lorafa_report.trained_parameters
    theirs = with_peft(load(folder, kind))
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def kept(model) -> int:
    """Bytes kept for backward beside what the model owns; bitsandbytes' scales are in no parameter."""
    scales = []
    for module in model.modules():
        if bnb.is_linear4bit(module):
            scales += bnb.from_linear4bit(module).tensors
    for number, scale in enumerate(scales):
        model.register_buffer(f"known_{number}", scale, persistent=False)
    try:
        return beds.kept_bytes(model)
    finally:
        for number in range(len(scales)):
            delattr(model, f"known_{number}")


def thawed(model):
    return [n for n, p in model.named_parameters() if ".lora_A." in n and p.requires_grad]


def calls(model):
    """What thaws lora_A in PEFT, one after another; yields after each."""
    with model.disable_adapter():
        pass
    yield "disable_adapter"
    model.set_adapter("default")
    yield "set_adapter"
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    yield "enable_adapter_layers"
    model.set_requires_grad("default")
    yield "set_requires_grad"
    model.merge_adapter()
    model.unmerge_adapter()
    yield "merge_adapter"
    model.add_adapter("other", beds.config(r=2))
    yield "add_adapter"
    model.set_adapter("other")
    yield "set_adapter to another"
    model.delete_adapter("default")
    yield "delete_adapter"


@pytest.mark.parametrize("way", ["accelerate_peft", "register"])
@pytest.mark.parametrize("kind", ["bitsandbytes nested", "nf4"])
def test_lora_A_stays_frozen(kind, way, folder):
    model = served(load(folder, kind), way)
    for call in calls(model):
        assert not thawed(model), call
        active = model.active_adapter
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".lora_B.{active}." in n for n in trained), call
    assert all(isinstance(m, ServedOnQuantised) for m in model.modules() if isinstance(m, lora.LoraLayer))
    plain = with_peft(load(folder, kind))
    with plain.disable_adapter():
        pass
    assert thawed(plain), "PEFT itself trains lora_A again then"


@pytest.mark.numerics
@pytest.mark.parametrize("safe", [False, True])
def test_bitsandbytes_layers_merge_as_in_peft(safe, folder):
    found = []
    for make in (served, with_peft):
        model = make(load(folder, "bitsandbytes nested"))
        model.merge_adapter(safe_merge=safe)
        merged = codes(model)
        model.unmerge_adapter()
        unmerged = codes(model)
        unloaded = model.merge_and_unload(safe_merge=safe)
        found.append(({"merged": merged, "unmerged": unmerged, "unloaded": codes(unloaded)}, unloaded))
    (ours, one), (theirs, other) = found
    assert_same(ours, theirs)
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert_same(codes(served(load(folder, "bitsandbytes")).unload()), codes(load(folder, "bitsandbytes")))


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8", "fp8"])
def test_quantised_layers_merge_into_new_codes_and_back(kind, folder):
    model = served(load(folder, kind))
    before, layer = codes(model), model.base_model.model.model.layers[1].mlp.up_proj
    wanted = quantised(layer.base_layer.dense_weight() + layer.get_delta_weight("default"), kind)
    y = model(**beds.tokens(model))[0]
    with pytest.warns(UserWarning, match="quantises the merged weight anew"):
        model.merge_adapter()
    assert layer.merged and type(layer.base_layer) is QuantisedLinear
    assert_same(layer.base_layer.base().tensors, wanted.tensors)
    assert not torch.equal(model(**beds.tokens(model))[0], y)
    model.unmerge_adapter()
    assert_same(codes(model), before)
    assert_same(model(**beds.tokens(model))[0], y)
    unloaded = model.merge_and_unload()
    assert_same(unloaded.model.layers[1].mlp.up_proj.base().tensors, wanted.tensors)
    assert not any(isinstance(m, lora.LoraLayer) for m in unloaded.modules())
    assert_same(served(load(folder, kind)).unload().state_dict(), load(folder, kind).state_dict())


def test_merging_what_is_not_finite_is_refused(folder):
    model = served(load(folder, "nf4"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight merged with default is not finite"):
        layer.merge()
    assert not layer.merged and layer.base_layer.weight is before


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["bitsandbytes nested", "nf4"])
def test_files_are_those_of_peft_and_of_save_adapter(kind, folder, tmp_path):
    model, theirs = served(load(folder, kind)), with_peft(load(folder, kind))
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    loaded = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path / "ours", is_trainable=True)
    assert_same(beds.results(accelerate_peft(loaded.train())), beds.results(model))


@pytest.mark.numerics
@pytest.mark.parametrize("state", ["two active", "merged", "disabled", "mixed batch"])
@pytest.mark.parametrize("kind", ["bitsandbytes nested", "int8"])
def test_states_that_are_peft_s_while_they_last(kind, state, folder):
    if (kind, state) == ("int8", "merged"):
        pytest.skip("PEFT alone cannot merge into it")
    ours = with_peft(load(folder, kind))
    # Without norms, which round in another order.
    models = accelerate_peft(ours, norm=False), with_peft(load(folder, kind))
    found = []
    for model in models:
        model.add_adapter("other", beds.config(r=2))
        beds.draw(model)
        inputs = beds.tokens(model)
        if state == "two active":
            model.base_model.set_adapter(["default", "other"])
        elif state == "merged":
            model.merge_adapter()
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        else:
            inputs |= {"adapter_names": ["default", "other"]}
            model.eval()
        with torch.set_grad_enabled(state != "mixed batch"):
            found.append(model(**inputs)[0])
        assert state != "mixed batch" or torch.isfinite(found[-1]).all()
    assert_same(*found)


@pytest.mark.numerics
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["bitsandbytes nested", "nf4"])
def test_copies_compute_the_same(kind, way, folder):
    model = served(load(folder, kind))
    beds.results(model)
    other = way(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert_same(beds.results(other), beds.results(model))
    assert kept(other) == kept(model)


def options(folder, **fields):
    """Arguments of a Trainer: 20 steps on a CPU."""
    fixed = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 20}
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    } | (fixed | fields)


def rows():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, beds.VOCABULARY, (2, 12), generator=generator).repeat(20, 1)
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def losses(trainer, **how):
    trainer.train(**how)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(model, folder, **fields):
    arguments = transformers.TrainingArguments(**options(folder, **fields))
    return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2])


def as_promised(got, wanted):
    assert len(got) == len(wanted) == 20 and got[-1] < got[0]
    assert max(abs(one - other) / other for one, other in zip(got, wanted, strict=True)) <= PROMISED


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("checkpointing", [False, True], ids=["eager", "checkpointing"])
def test_trainer_on_bitsandbytes_saves_and_resumes(checkpointing, folder, tmp_path):
    """Trainer takes a quantised model with PEFT's adapter alone."""
    kind, how = "bitsandbytes nested", {"gradient_checkpointing": checkpointing}
    wanted = losses(trainer(with_peft(load(folder, kind)), tmp_path, **how))
    first = trainer(served(load(folder, kind)), tmp_path / "run", save_strategy="steps", save_steps=10, **how)
    uninterrupted = losses(first)
    as_promised(uninterrupted, wanted)
    written = {path.name for path in (tmp_path / "run" / "checkpoint-10").iterdir()}
    assert "adapter_model.safetensors" in written and "model.safetensors" not in written
    # An evaluation makes bitsandbytes pack codes on some CPUs, whereupon they give no gradients.
    model = served(load(folder, kind))
    resumed = trainer(model, tmp_path / "again", eval_strategy="steps", eval_steps=1, **how)
    got = losses(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert got == uninterrupted and not thawed(model)
    last = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path / "run" / "checkpoint-20")
    accelerate_peft(last)
    assert_same(*(one.eval()(**beds.tokens(one))[0].detach() for one in (last, model)))


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["bitsandbytes nested", "nf4"])
def test_sft_trainer(kind, folder, tmp_path):
    trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer takes its datasets")
    trainers = pytest.importorskip("test_peft_trainers")
    found = []
    for ours in (False, True):
        config = beds.config(task_type="CAUSAL_LM")
        made = trl.SFTTrainer(
            model=load(folder, kind),
            args=trl.SFTConfig(**options(tmp_path), max_length=12),
            train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]),
            processing_class=trainers.tokenizer(),
            peft_config=register(config) if ours else config,
        )
        # TRL has cast to bf16 what PEFT trains on bitsandbytes.
        for name, parameter in made.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        beds.draw(made.model)
        if not ours:
            beds.freeze(made.model)
        found.append(losses(made))
        assert not thawed(made.model)
    as_promised(found[1], found[0])


def test_preparing_for_k_bit_training_and_bf16_factors(folder):
    """prepare_model_for_kbit_training makes norms and biases fp32, TRL what is trained bf16."""
    model = served(peft.prepare_model_for_kbit_training(load(folder, "bitsandbytes", torch.bfloat16)))
    assert model.base_model.model.model.norm.weight.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        found = beds.results(model)
        assert found["y"].dtype == torch.float32
        assert {g.dtype for n, g in found.items() if n != "y"} == {dtype}
    model = served(load(folder, "bitsandbytes", torch.float32))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_B["default"].to(torch.bfloat16)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and layer.lora_B["default"].weight.grad.dtype == torch.bfloat16
    before = layer.base_layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, before)


@pytest.mark.numerics
def test_inference_does_not_pack_the_codes(folder):
    model = served(load(folder, "bitsandbytes"))
    wanted = beds.results(model)
    with torch.no_grad():
        model.eval()(**beds.tokens(model))
        with model.disable_adapter():
            alone = model(**beds.tokens(model))[0]
    assert not any(bnb.is_packed(m) for m in model.modules() if bnb.is_linear4bit(m))
    assert_same(alone, load(folder, "bitsandbytes").train()(**beds.tokens(model))[0].detach())
    assert_same(beds.results(model.train()), wanted)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="packed this Linear4bit for CPU inference"):
        layer(torch.randn(2, 64, requires_grad=True))


@pytest.mark.slow
@pytest.mark.numerics
def test_a_whole_model_is_compiled_in_one_graph(folder):
    torch._dynamo.reset()
    model = served(load(folder, "bitsandbytes nested"))
    wanted = beds.results(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    got = beds.results(model)
    exact = exactly(with_peft(load(folder, "bitsandbytes nested")))
    check_results(got, wanted, beds.results(exact), torch.float32)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"load_in_4bit": True}, "this Linear4bit holds fp4, and only nf4 is supported"),
        ({"load_in_8bit": True}, "PEFT's bnb.Linear8bitLt on a quantised or parallel Linear8bitLt"),
    ],
    ids=["fp4", "8 bit"],
)
def test_other_layers_of_bitsandbytes_are_peft_s(fields, reason, folder):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pytest.importorskip("accelerate", reason="needs accelerate")
    base = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**fields), dtype=torch.float32
    )
    model = peft.get_peft_model(base, register(beds.config()))
    report = accelerate_peft(model).lorafa_report
    assert not report.layers and {line.reason for line in report.kept} == {reason}
    assert thawed(model)


def test_frozen_matrices_that_are_thawed_by_hand_are_refused(folder):
    model = served(load(folder, "nf4"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lora_A requires grad, but LoRA-FA keeps it frozen"):
        model(**beds.tokens(model))


def test_wrong_order_and_functions_of_the_other_way_in_say_what_to_do(folder):
    model = peft.get_peft_model(beds.base("llama"), beds.config())
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="call quantize_base before get_peft_model"):
        quantize_base(model, "nf4")
    assert [type(module) for module in model.modules()] == before
    for call in (lorafa_parameters, merge_adapter, lambda model: save_adapter(model, folder)):
        with pytest.raises(ValueError, match=r"the model is PEFT's, and has PEFT's methods for this"):
            call(model)


@pytest.mark.parametrize("way", ["accelerate_peft", "register"])
def test_variants_that_read_the_weight_are_refused_on_codes(way, folder):
    config, base = beds.config(use_dora=True), load(folder, "int8")
    with pytest.raises(ValueError, match="Dora is not plain LoRA, and PEFT would compute it from the codes"):
        if way == "register":
            peft.get_peft_model(base, register(config))
        accelerate_peft(peft.get_peft_model(base, config))


def blocks_of(model) -> set:
    return {(block.name, block.kind, block.layers) for block in model.lorafa_report.blocks if block.fused}


@pytest.mark.numerics
@KINDS
def test_blocks_are_those_of_apply_lorafa_and_end_where_peft_must_compute(kind, folder):
    plain = with_peft(load(folder, kind))
    exact, model = exactly(plain), served(load(folder, kind))
    ours = with_lorafa(load(folder, kind), plain)
    found = blocks_of(model)
    assert found == blocks_of(ours) and {kind for _, kind, _ in found} == {"shared input", "MLP", "norm"}
    together, alone = kept(model), served(load(folder, kind))
    accelerate_peft(alone, fuse=False)
    assert together < kept(alone)
    # A copy has groups of its own.
    for other in (model, pickled(model), copy.deepcopy(model)):
        check_results(beds.results(other), beds.results(plain), beds.results(exact), torch.float32)
        assert kept(other) == together
    # One layer with a hook: its blocks give way.
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda *_: None)
    check_results(beds.results(model), beds.results(plain), beds.results(exact), torch.float32)
    assert together < kept(model)
    handle.remove()
    assert kept(model) == together
    with model.disable_adapter(), plain.disable_adapter():
        got, theirs, wanted = (m(**beds.tokens(m))[0] for m in (model, plain, exactly(plain)))
        error, allowed = relative_error(got, wanted), relative_error(theirs, wanted)
        assert error <= allowed_error(allowed, torch.float32)
    assert not any("Served" in type(module).__name__ for module in model.unload().modules())
