"""PEFT models on these kernels: numbers, bytes kept, PEFT's own calls and files, and lora_A frozen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accuracy import assert_same
from saved import pickled
from torch import nn

from lorafa_kernels.checks.budget import allowed_error, relative_error
from lorafa_kernels.integrations.peft import PeftReport, accelerate_peft, register

peft = pytest.importorskip("peft", reason="the models are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
lora = pytest.importorskip("peft.tuners.lora")
beds = pytest.importorskip("peft_beds", reason="the models are transformers' and PEFT's")
ServedLinear = pytest.importorskip("lorafa_kernels.integrations.peft_layers").ServedLinear

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def accelerated(family, dtype=torch.float32, *, made=beds.config, **fields):
    model = peft.get_peft_model(beds.base(family, dtype), made(**fields))
    beds.draw(model)
    return accelerate_peft(model).train()


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


@pytest.mark.numerics
@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True], ids=["eager", "checkpointing"])
@pytest.mark.parametrize("family", beds.FAMILIES)
def test_results_are_those_of_peft_and_of_apply_lorafa(family, checkpointing, dtype):
    models = accelerated(family, dtype), beds.with_peft(family, dtype), beds.with_lorafa(family, dtype)
    exact = copy.deepcopy(models[1]).double()
    if checkpointing:
        for model in models:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got, plain, ours = map(beds.results, models)
    check_results(got, plain, beds.results(exact), dtype)
    assert_same(got, dict(sorted(ours.items(), key=lambda item: list(got).index(item[0]))))


@pytest.mark.numerics
@DTYPES
@pytest.mark.parametrize("family", beds.FAMILIES)
def test_kept_bytes_and_trained_numbers_are_those_of_apply_lorafa(family, dtype):
    model, ours = accelerated(family, dtype), beds.with_lorafa(family, dtype)
    # As PEFT trains it, lora_A too.
    plain = peft.get_peft_model(beds.base(family, dtype), beds.config()).train()
    assert beds.kept_bytes(model) == beds.kept_bytes(ours) < beds.kept_bytes(plain)
    assert beds.trained(model) == beds.trained(ours) == model.lorafa_report.trained_parameters
    assert model.get_nb_trainable_parameters() == beds.with_peft(family, dtype).get_nb_trainable_parameters()


@pytest.mark.numerics
@pytest.mark.parametrize("family", beds.FAMILIES)
def test_the_same_blocks_are_fused_as_by_apply_lorafa(family):
    def fused(model):
        return {(b.name, b.kind, b.layers) for b in model.lorafa_report.blocks if b.fused}

    assert fused(accelerated(family)) == fused(beds.with_lorafa(family))


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_are_those_of_peft(family, tmp_path):
    model, theirs = accelerated(family), beds.with_peft(family)
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    loaded = peft.PeftModel.from_pretrained(beds.base(family), tmp_path / "ours", is_trainable=True)
    assert_same(beds.results(accelerate_peft(loaded.train())), beds.results(model))


def add_and_switch(model):
    model.add_adapter("other", beds.config(r=2))
    model.set_adapter("other")


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def disable_and_back(model):
    with model.disable_adapter():
        pass


def layers_off_and_on(model):
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def add_and_delete(model):
    model.add_adapter("other", beds.config())
    model.delete_adapter("default")


CALLS = {
    "disable_adapter": disable_and_back,
    "set_adapter": lambda model: model.set_adapter("default"),
    "enable_adapter_layers": layers_off_and_on,
    "add_adapter": add_and_switch,
    "delete_adapter": add_and_delete,
    "set_requires_grad": lambda model: model.set_requires_grad("default"),
}


def thawed(model):
    return [n for n, p in model.named_parameters() if ".lora_A." in n and p.requires_grad]


@pytest.mark.parametrize("way", ["accelerate_peft", "register"])
@pytest.mark.parametrize("call", [*CALLS, "merge", "train"])
def test_lora_A_stays_frozen(call, way):
    act = CALLS.get(call) or {"merge": merge_and_back, "train": lambda model: model.train()}[call]
    model = (
        accelerated("llama")
        if way == "accelerate_peft"
        else peft.get_peft_model(beds.base("llama"), register(beds.config()))
    )
    act(model)
    assert not thawed(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    active = model.active_adapter
    assert trained and all(f".lora_B.{active}." in n for n in trained)
    if call in CALLS:
        # PEFT itself trains lora_A again then: what is held above does not hold by itself.
        plain = beds.with_peft("llama")
        act(plain)
        assert thawed(plain)


@pytest.mark.numerics
def test_adapters_that_are_added_later_are_served():
    model = accelerated("llama", target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", beds.config(target_modules=["k_proj", "q_proj"]))
    model.set_adapter("other")
    kinds = [type(m) for m in model.modules() if isinstance(m, lora.Linear)]
    assert len(kinds) == 6 and all(issubclass(kind, ServedLinear) for kind in kinds)
    plain = beds.with_peft("llama", target_modules=["q_proj", "v_proj"])
    plain.add_adapter("other", beds.config(target_modules=["k_proj", "q_proj"]))
    plain.set_adapter("other")
    for one in (model, plain):
        beds.draw(one)
    beds.freeze(plain)
    plain.train()
    got, exact = beds.results(model.train()), beds.results(copy.deepcopy(plain).double())
    check_results(got, beds.results(plain), exact, torch.float32)


class Mixed(nn.Module):
    """What can be served beside what cannot."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.convolution, self.parametrised = nn.Conv1d(8, 8, 1), nn.Linear(8, 8)
        torch.nn.utils.parametrizations.weight_norm(self.parametrised)

    def forward(self, ids):
        x = self.linear(self.embedding(ids))
        x = self.parametrised(x)
        return self.convolution(x.mT).mT


IDS = torch.arange(6).reshape(2, 3)
TARGETS = ["embedding", "linear", "convolution", "parametrised"]


def mixed(**fields):
    torch.manual_seed(0)
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(**{"target_modules": TARGETS} | fields))
    beds.draw(model)
    return model


@pytest.mark.numerics
def test_what_cannot_be_served_keeps_peft_s_path_with_the_reason():
    model, plain = accelerate_peft(mixed()), mixed()
    report = model.lorafa_report
    assert [layer.name for layer in report.layers] == ["linear"]
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons["embedding"] == "an embedding" and reasons["convolution"] == "a convolution"
    assert reasons["parametrised"].startswith("a parametrised layer cannot be adapted")
    assert "1 of 4 LoRA layers" in str(report) and "Embedding: an embedding" in str(report)
    beds_A = {n: p.requires_grad for n, p in model.named_parameters() if "lora_A" in n}
    assert [n for n, trained in beds_A.items() if not trained] == [
        "base_model.model.linear.lora_A.default.weight"
    ]
    for one in (model, plain):
        one(IDS).square().sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad and "linear" not in n}
    check_results(
        {"y": model(IDS).detach()} | {n: p.grad for n, p in model.named_parameters() if n in grads},
        {"y": plain(IDS).detach()} | grads,
        double_results(grads),
        torch.float32,
    )


def double_results(names):
    exact = mixed().double()
    y = exact(IDS)
    y.square().sum().backward()
    return {"y": y.detach()} | {n: p.grad for n, p in exact.named_parameters() if n in names}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "Dora is not plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "its bias is trained"),
    ],
    ids=["DoRA", "lora_bias", "bias"],
)
@pytest.mark.parametrize("way", ["accelerate_peft", "register"])
def test_adapters_that_are_more_than_lora_are_peft_s(fields, reason, way):
    def made(**more):
        return peft.LoraConfig(target_modules=["linear"], **more)

    torch.manual_seed(0)
    theirs = peft.get_peft_model(Mixed(), made(**fields))
    torch.manual_seed(0)
    ours = peft.get_peft_model(
        Mixed(), made(**fields) if way == "accelerate_peft" else register(made(**fields))
    )
    if way == "accelerate_peft":
        ours = accelerate_peft(ours)
        assert [kept.reason for kept in ours.lorafa_report.kept] == [reason]
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert_same(ours(IDS), theirs(IDS))


@pytest.mark.numerics
@pytest.mark.parametrize("state", ["two active", "merged", "disabled", "mixed batch", "hook on lora_B"])
def test_states_that_are_peft_s_while_they_last(state):
    models = accelerated("bert"), beds.with_peft("bert")
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
        elif state == "mixed batch":
            inputs |= {"adapter_names": ["default", "other"]}
        else:
            next(
                m for n, m in model.named_modules() if n.endswith("query.lora_B.default")
            ).register_forward_hook(lambda module, args, y: y * 2)
        found.append(model.eval()(**inputs)[0])
    if state == "hook on lora_B":
        # The other layers run on the kernels.
        assert relative_error(*found) < relative_error(found[0], accelerated("bert").eval()(**inputs)[0])
    else:
        assert_same(*found)
    if state in ("two active", "merged", "disabled"):
        report = accelerate_peft(models[0]).lorafa_report
        assert not report.layers and len({kept.reason for kept in report.kept}) == 1


def test_two_active_adapters_are_told():
    model = accelerated("llama")
    model.add_adapter("other", beds.config())
    model.base_model.set_adapter(["default", "other"])
    assert {kept.reason for kept in accelerate_peft(model).lorafa_report.kept} == {"2 adapters are active"}
    model.set_adapter("other")
    assert not accelerate_peft(model).lorafa_report.kept


@pytest.mark.numerics
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unloading_gives_peft_s_model_back(family, merge):
    found = []
    for model in (accelerated(family), beds.with_peft(family)):
        model = model.merge_and_unload() if merge else model.unload()
        found.append(model)
    ours, theirs = found
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.numerics
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(way):
    model = accelerated("llama")
    other = way(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert_same(beds.results(other), beds.results(model))
    disable_and_back(other)
    assert not thawed(other)


@pytest.mark.numerics
def test_a_registered_config_gives_served_layers_and_plain_files(tmp_path):
    model = beds.with_peft("llama", made=lambda **fields: register(beds.config(**fields)))
    assert {type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)} == {ServedLinear}
    plain = beds.with_peft("llama")
    check_results(
        beds.results(model), beds.results(plain), beds.results(copy.deepcopy(plain).double()), torch.float32
    )
    assert_same(beds.results(accelerate_peft(model)), beds.results(accelerated("llama")))
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    name = "adapter_config.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    registered = register(beds.config())
    for other in (copy.deepcopy(registered), pickle.loads(pickle.dumps(registered))):
        assert other._custom_modules == registered._custom_modules


@pytest.mark.numerics
def test_autocast_and_dropout_are_those_of_apply_lorafa():
    model = accelerated("llama", lora_dropout=0.1)
    ours = beds.with_lorafa("llama", lora_dropout=0.1)
    found = []
    for one in (model, ours):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(beds.results(one))
    got, wanted = found
    assert_same(got, {name: wanted[name] for name in got})
    assert beds.kept_bytes(model) == beds.kept_bytes(ours)


def test_a_frozen_matrix_that_is_thawed_by_hand_is_refused():
    model = accelerated("bert")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="requires grad, but LoRA-FA keeps it frozen"):
        model(**beds.tokens(model))


def test_wrong_calls_say_what_to_do():
    with pytest.raises(ValueError, match=r"holds no LoRA layer of PEFT.*apply_lorafa"):
        accelerate_peft(beds.base("llama"))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        accelerate_peft(3)
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig, got IA3Config"):
        register(peft.IA3Config())
    model = accelerated("llama", target_modules=["q_proj"])
    assert isinstance(model.lorafa_report, PeftReport)
    assert str(model.lorafa_report).startswith("LoRA-FA in PEFT: 2 of 2 LoRA layers on these kernels, 512 of")


def test_an_older_peft_is_refused(monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = beds.with_peft("llama")
    monkeypatch.delattr(BaseTunerLayer, "_freeze_non_trainable_peft_weights")
    with pytest.raises(ImportError, match=r"PEFT 0\.20 or newer"):
        accelerate_peft(model)


def test_models_that_transformers_gave_an_adapter_are_served():
    model = beds.base("llama")
    model.add_adapter(beds.config(target_modules=["q_proj", "k_proj", "v_proj"]))
    accelerate_peft(model)
    assert len(model.lorafa_report.layers) == 6 and not thawed(model)
    model.disable_adapters()
    model.enable_adapters()
    assert not thawed(model)


@pytest.mark.slow
@pytest.mark.numerics
def test_a_whole_model_is_compiled_in_one_graph():
    torch._dynamo.reset()
    model, plain = accelerated("llama"), beds.with_peft("llama")
    found = []
    for one, call in ((model, torch.compile(model, fullgraph=True, backend="aot_eager")), (plain, plain)):
        y = call(**beds.tokens(one), use_cache=False)[0]
        y.backward(torch.ones_like(y))
        grads = {beds.plain_name(n): p.grad for n, p in one.named_parameters() if p.grad is not None}
        found.append({"y": y.detach()} | dict(sorted(grads.items())))
    exact = copy.deepcopy(plain).double()
    exact.zero_grad(set_to_none=True)
    y = exact(**beds.tokens(exact), use_cache=False)[0]
    y.backward(torch.ones_like(y))
    grads = {beds.plain_name(n): p.grad for n, p in exact.named_parameters() if p.grad is not None}
    check_results(*found, {"y": y.detach()} | dict(sorted(grads.items())), torch.float32)


@pytest.mark.numerics
@pytest.mark.parametrize("state", ["disabled", "merged", "two active"])
def test_fused_blocks_give_way_to_peft(state):
    found = []
    for ours in (True, False):
        model = beds.with_peft("llama")
        model.add_adapter("other", beds.config(r=2))
        beds.draw(model)
        if ours:
            # Without norms, which round in another order.
            accelerate_peft(model, norm=False)
            assert any(block.fused for block in model.lorafa_report.blocks)
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        elif state == "merged":
            model.merge_adapter()
        else:
            model.base_model.set_adapter(["default", "other"])
        # With gradients: without them blocks give way anyway.
        found.append(model(**beds.tokens(model))[0])
    assert_same(*found)


@pytest.mark.numerics
def test_a_head_that_peft_trains_whole_is_trained():
    kind, fields = transformers.BertForSequenceClassification, beds.FAMILIES["bert"][1]
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = kind(kind.config_class(**fields))
        model = peft.get_peft_model(model, beds.config(target_modules=["query", "key"], task_type="SEQ_CLS"))
        beds.draw(model)
        if ours:
            accelerate_peft(model)
        beds.freeze(model)
        y = model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), labels=torch.tensor([0, 1]))
        y.loss.backward()
        found.append({n for n, p in model.named_parameters() if p.grad is not None})
    assert found[0] == found[1] and any("classifier.modules_to_save" in name for name in found[0])


@pytest.mark.numerics
def test_an_adapter_that_is_loaded_beside_another_is_served(tmp_path):
    other = beds.with_peft("llama", r=2)
    other.save_pretrained(tmp_path)
    model = accelerated("llama")
    model.load_adapter(tmp_path, "second", is_trainable=True)
    assert not thawed(model)
    model.set_adapter("second")
    assert not thawed(model) and not accelerate_peft(model).lorafa_report.kept
    got = {n.replace(".second.weight", ""): t for n, t in beds.results(model.train()).items()}
    plain = beds.results(other)
    check_results(got, plain, beds.results(copy.deepcopy(other).double()), torch.float32)
    model.delete_adapter("second")
    assert model.active_adapters == ["default"] and not thawed(model)


@pytest.mark.parametrize("way", ["accelerate_peft", "PEFT"])
def test_trained_parameters_are_printed_as_by_peft(way, capsys):
    model = accelerated("llama") if way == "accelerate_peft" else beds.with_peft("llama")
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 3,584 || all params: 76,992 || trainable%: 4.6550\n"
