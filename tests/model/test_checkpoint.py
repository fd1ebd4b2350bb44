"""Adapter files go to PEFT and come from it, and neither a bad file nor a crash costs anything.

As in test_adapt.py the toy models compute with small integers, exactly, so outputs are compared by
torch.equal.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.card import CARD_FILE
from lorafa_kernels.model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    lorafa_state_dict,
    save_adapter,
)
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.merge import disable_adapter, merge_adapter, unmerge_adapter
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.model.saved import lorafa_parameters
from lorafa_kernels.nn.linear import LoRAFALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.q(x))))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.up = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.norm.register_buffer("scratch", torch.ones(1), persistent=False)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.up(x)))


TOKENS = torch.arange(7)
CONFIG = LoRAFAConfig(r=4, lora_alpha=8, target_modules=["q", "up"], modules_to_save=["head", "norm"])


@torch.no_grad()
def integers(model, seed=0, only=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters() if only is None else only:
        parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    return model


def toy():
    return integers(Toy()).eval()


def trained(config=CONFIG):
    model = apply_lorafa(toy(), config)
    integers(model, 1, only=[layer.lora_A for layer in lorafa_layers(model).values()])
    return integers(model, 2, only=lorafa_parameters(model))


def snapshot(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(t), t.requires_grad, t.detach().numpy().tobytes()) for name, t in tensors],
        [sorted(vars(module)) for module in model.modules()],
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit_config(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, change):
    path = folder / WEIGHTS_FILE
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """A folder with the adapter of trained()."""
    folder = tmp_path / "adapter"
    save_adapter(trained(), folder)
    return folder


def assert_same_adapter(model, other):
    ours, theirs = lorafa_state_dict(model), lorafa_state_dict(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_the_files_are_those_that_are_documented(saved):
    with safe_open(saved / WEIGHTS_FILE, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in saved.iterdir()) == [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]
    prefix = "base_model.model."
    assert shapes[prefix + "blocks.1.up.lora_A.weight"] == (4, 6)
    assert shapes[prefix + "blocks.1.up.lora_B.weight"] == (8, 4)
    assert {key.removeprefix(prefix) for key in shapes if "lora_" not in key} == {
        "head.weight",
        "head.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


@pytest.mark.numerics
@pytest.mark.parametrize("target", [toy, lambda: apply_lorafa(toy(), CONFIG)], ids=["fresh", "adapted"])
def test_round_trip(saved, target):
    model = target()
    assert load_adapter(model, saved) is model
    assert_same_adapter(model, trained())
    assert torch.equal(model(TOKENS), trained()(TOKENS))
    assert model.lorafa_config == CONFIG
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_B",
        "weight",
        "bias",
    }
    assert not any(layer.lora_A.requires_grad for layer in lorafa_layers(model).values())


def test_loading_writes_into_the_parameters_an_optimizer_holds(saved):
    model = apply_lorafa(toy(), CONFIG)
    before = [id(parameter) for parameter in lorafa_parameters(model)]
    load_adapter(model, saved)
    assert [id(parameter) for parameter in lorafa_parameters(model)] == before


@pytest.mark.numerics
def test_values_are_cast_to_the_parameters_dtype(saved):
    model = load_adapter(toy().to(torch.bfloat16), saved)
    layer = model.blocks[0].q
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(layer.lora_A.float(), trained().blocks[0].q.lora_A)
    assert model.norm.num_batches_tracked.dtype is torch.int64


def test_within_disable_adapter_the_trained_tensors_are_saved(tmp_path, saved):
    model = trained()
    with disable_adapter(model):
        save_adapter(model, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(saved)


@pytest.mark.numerics
def test_a_model_built_by_hand_gets_a_config_of_its_own(tmp_path):
    def build(linear):
        torch.manual_seed(0)
        return integers(
            nn.Sequential(
                nn.Sequential(linear(6, 6, r=2, lora_alpha=4), linear(6, 6, r=2, lora_alpha=4)),
                linear(6, 6, r=4, lora_alpha=16),
            )
        )

    def plain(*shape, **_):
        return nn.Linear(*shape)

    model = build(LoRAFALinear)
    save_adapter(model, tmp_path)
    base = build(plain)
    with torch.no_grad():
        for ours, theirs in zip([*model[0], *model[1:]], [*base[0], *base[1:]], strict=True):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    load_adapter(base, tmp_path)
    assert list(lorafa_layers(base)) == ["0.0", "0.1", "1"]
    assert [(x.r, x.scaling) for x in lorafa_layers(base).values()] == [(2, 2.0), (2, 2.0), (4, 4.0)]
    x = torch.ones(2, 6)
    assert torch.equal(base(x), model(x))


def test_targets_that_end_other_names_are_written_as_a_regular_expression(tmp_path):
    model = toy().requires_grad_(False)
    model.up = LoRAFALinear.from_linear(model.up)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == "up"
    assert list(lorafa_layers(load_adapter(toy(), tmp_path))) == ["up"]


@pytest.mark.numerics
def test_the_order_of_patterns_survives(tmp_path):
    pattern = {"up": 2, "blocks.0.up": 4, "0.q": 1}
    with pytest.warns(UserWarning, match="blocks.1.q"):
        model = trained(
            LoRAFAConfig(r=4, target_modules=["q", "up"], rank_pattern=pattern | {"^blocks.1.qq": 1})
        )
    save_adapter(model, tmp_path)
    other = load_adapter(toy(), tmp_path)
    assert list(other.lorafa_config.rank_pattern) == [*pattern, "^blocks.1.qq"]
    assert_same_adapter(model, other)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.LayerNorm(4)
        self.last_norm = self.norm


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore")
def test_shared_modules_load_here_and_in_peft(tmp_path):
    config = LoRAFAConfig(target_modules=["first", "mid"], modules_to_save=["norm"])
    model = integers(apply_lorafa(Twice(), config))
    save_adapter(model, tmp_path)
    assert_same_adapter(load_adapter(Twice(), tmp_path), model)
    peft = pytest.importorskip("peft", reason="the other half of the promise is PEFT's")
    loaded = peft.PeftModel.from_pretrained(Twice(), str(tmp_path))
    theirs = peft.get_peft_model_state_dict(loaded)
    assert theirs.keys() == lorafa_state_dict(model).keys()
    assert all(torch.equal(theirs[key], value) for key, value in lorafa_state_dict(model).items())

    edit_weights(tmp_path, lambda tensors: tensors["base_model.model.last_norm.weight"].add_(1))
    with pytest.raises(ValueError, match=r"last_norm\.weight differs from .*\.norm\.weight"):
        load_adapter(Twice(), tmp_path)


class Tied(nn.Module):
    """`pair` shares a weight within, `apart` shares it from outside."""

    def __init__(self):
        super().__init__()
        self.q, self.apart = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.pair = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        self.pair[0].weight = self.pair[1].weight = self.apart.weight


@pytest.mark.numerics
def test_ties_within_a_saved_module_hold_and_those_between_two_end(tmp_path):
    config = LoRAFAConfig(target_modules=["q"], modules_to_save=["pair", "apart"])
    model = apply_lorafa(Tied(), config)
    assert model.pair[0].weight is model.pair[1].weight and model.pair[0].weight is not model.apart.weight
    integers(model, only=lorafa_parameters(model))
    assert not torch.equal(model.pair[0].weight, model.apart.weight)
    save_adapter(model, tmp_path)
    assert_same_adapter(load_adapter(Tied(), tmp_path), model)
    edit_weights(tmp_path, lambda tensors: tensors["base_model.model.pair.1.weight"].add_(1))
    with pytest.raises(ValueError, match=r"pair\.1\.weight differs from .*pair\.0\.weight"):
        load_adapter(Tied(), tmp_path)


PEFT_CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "up"]},
    "regex": {"r": 4, "target_modules": r"blocks\.\d\.(q|down)", "lora_alpha": 4, "lora_dropout": 0.25},
    "all-linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["head"]},
    "rslora": {"r": 16, "lora_alpha": 8, "target_modules": ["q"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q", "up"],
        "rank_pattern": {"^up": 1, "blocks.0.q": 2},
        "alpha_pattern": {"blocks.1.up": 16},
    },
    "layers": {"r": 1, "lora_alpha": 2, "target_modules": ["q"], "init_lora_weights": False},
    "modules_to_save": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q", "up"],
        "modules_to_save": ["head", "norm"],
        "init_lora_weights": "gaussian",
    },
}


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_loads_ours(case, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT reads the file")
    model = trained(LoRAFAConfig(**PEFT_CASES[case]))
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy(), str(tmp_path)).eval()
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    theirs, ours = peft.get_peft_model_state_dict(loaded), lorafa_state_dict(model)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.numerics
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["fresh", "adapted"])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_ours_loads_pefts(case, target, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT writes the file")
    fields = PEFT_CASES[case]
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(**fields)).eval()
    integers(theirs, 3, only=[p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(str(tmp_path))
    model = load_adapter(
        toy() if target == "fresh" else apply_lorafa(toy(), LoRAFAConfig(**fields)), tmp_path
    )
    assert torch.equal(model(TOKENS), theirs(TOKENS))
    assert not torch.equal(model(TOKENS), toy()(TOKENS))


def tiny(kind):
    transformers = pytest.importorskip("transformers", reason="the models are transformers'")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**small, num_labels=3)
        ).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()


TINY_CONFIG = {
    "bert": {
        "target_modules": ["query", "value", "dense"],
        "modules_to_save": ["classifier"],
        "exclude_modules": "bert.pooler.dense",
    },
    "llama": {"target_modules": "all-linear"},
}


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.numerics
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("way", ["peft loads ours", "ours loads peft's"])
def test_transformers_models_compute_alike(kind, way, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the other side")
    fields = {"r": 4, "lora_alpha": 8, **TINY_CONFIG[kind]}
    if way == "peft loads ours":
        ours = apply_lorafa(tiny(kind), LoRAFAConfig(**fields))
        for parameter in lorafa_parameters(ours):
            nn.init.normal_(parameter, std=0.1)
        save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path)).eval()
    else:
        task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[kind]
        theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(task_type=task, **fields)).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(str(tmp_path))
        ours = load_adapter(tiny(kind), tmp_path)
    tokens = torch.arange(12).reshape(2, 6)
    exact = copy.deepcopy(theirs).double()(tokens).logits
    base = tiny(kind)(tokens).logits
    error, bound = (
        relative_error(ours(tokens).logits, exact),
        2 * relative_error(theirs(tokens).logits, exact),
    )
    assert error <= bound + torch.finfo(torch.float32).eps / 2
    assert relative_error(base, exact) > 1e-2


# One wrong thing at a time: (what is done to the folder, the error, what it says).
KEY = "base_model.model.blocks.0.q.lora_B.weight"
BAD_FILES = {
    "no folder": (shutil.rmtree, FileNotFoundError, "not a folder"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, CONFIG_FILE),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, WEIGHTS_FILE),
    "pickle": (lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"), ValueError, "adapter_model.bin"),
    "config is not JSON": (lambda f: (f / CONFIG_FILE).write_text("{'r': 4}"), ValueError, "not valid JSON"),
    "config is not text": (
        lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe{"),
        ValueError,
        "not valid JSON",
    ),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), ValueError, "JSON object"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), ValueError, "peft_type"),
    "weights empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), ValueError, "damaged"),
    "header damaged": (
        lambda f: (f / WEIGHTS_FILE).write_bytes(b"\xff" * 12 + (f / WEIGHTS_FILE).read_bytes()[12:]),
        ValueError,
        "damaged",
    ),
    "truncated": (
        lambda f: os.truncate(f / WEIGHTS_FILE, (f / WEIGHTS_FILE).stat().st_size - 1),
        ValueError,
        "damaged",
    ),
    "missing key": (lambda f: edit_weights(f, lambda t: t.pop(KEY)), ValueError, f"{KEY} is missing"),
    "unexpected key": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 6)})),
        ValueError,
        "base_model.model.x.lora_A.weight is unexpected",
    ),
    "DoRA's vector": (
        lambda f: edit_weights(
            f, lambda t: t.update({KEY.replace("lora_B", "lora_magnitude_vector"): torch.ones(6)})
        ),
        ValueError,
        "lora_magnitude_vector",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({KEY: torch.ones(5, 4)})),
        ValueError,
        rf"{KEY} has shape \(5, 4\), expected \(6, 4\)",
    ),
    "wrong rank": (
        lambda f: edit_weights(f, lambda t: t.update({KEY: torch.ones(6, 2)})),
        ValueError,
        rf"{KEY} has shape \(6, 2\), expected \(6, 4\)",
    ),
    "wrong rank in the config": (lambda f: edit_config(f, r=2), ValueError, "r=4|lora_A.weight has shape"),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({KEY: torch.ones(6, 4, dtype=torch.int32)})),
        ValueError,
        f"{KEY} has dtype torch.int32",
    ),
    "another base": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 7)})),
        ValueError,
        "head.weight",
    ),
}


@pytest.mark.parametrize("target", [toy, lambda: apply_lorafa(toy(), CONFIG)], ids=["fresh", "adapted"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_leaves_the_model_untouched(case, target, saved):
    spoil, error, message = BAD_FILES[case]
    spoil(saved)
    model = target()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, saved)
    assert snapshot(model) == before


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "target_parameters": ["blocks.0.q.weight"],
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [3],
    "megatron_config": {"x": 1},
    "kasa_config": {"x": 1},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 8},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "ensure_weight_tying": True,
    "a_field_of_tomorrow": "on",
    "target_modules": None,
    "r": 0,
    "lora_alpha": "8",
    "lora_dropout": 1.5,
}


# What PEFT writes whether it is used or not, and how it drew the values that the file has.
HARMLESS = {
    "fan_in_fan_out": True,
    "megatron_core": "other.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"x": 1},
    "lora_ga_config": {"direction": "ArB2r"},
    "qalora_group_size": 32,
    "init_lora_weights": "eva",
    "inference_mode": True,
    "bias": None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_difference_is_taken(name, saved):
    edit_config(saved, **{name: HARMLESS[name]})
    assert_same_adapter(load_adapter(toy(), saved), trained())


@pytest.mark.parametrize("target", [toy, lambda: apply_lorafa(toy(), CONFIG)], ids=["fresh", "adapted"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_is_named_and_the_model_untouched(name, target, saved):
    edit_config(saved, **{name: UNSUPPORTED[name]})
    model = target()
    before = snapshot(model)
    with pytest.raises(ValueError, match=name):
        load_adapter(model, saved)
    assert snapshot(model) == before


def test_every_field_of_peft_is_supported_neutral_or_refused(saved):
    """A LoraConfig field that this list has not heard of must be looked at."""
    peft = pytest.importorskip("peft", reason="the fields are PEFT's")
    known = {*json.loads((saved / CONFIG_FILE).read_text()), *UNSUPPORTED, "peft_version", "runtime_config"}
    assert set(peft.LoraConfig(target_modules="q").to_dict()) <= known


@pytest.mark.numerics
def test_unknown_fields_at_rest_and_information_are_ignored(saved):
    edit_config(
        saved, tomorrow=None, later=False, task_type="CAUSAL_LM", peft_version="9", runtime_config={"x": 1}
    )
    assert_same_adapter(load_adapter(toy(), saved), trained())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["q"]}, "unexpected"),
        ({"r": 2}, "r=2"),
        ({"lora_alpha": 4}, "scaling=1.0"),
        ({"use_rslora": True}, "scaling=4.0"),
        ({"modules_to_save": ["head"]}, r"norm.*unexpected"),
    ],
)
def test_an_adapted_model_must_agree_with_the_file(change, message, saved):
    model = apply_lorafa(toy(), LoRAFAConfig(**vars(CONFIG) | change))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert snapshot(model) == before


def test_a_model_without_values_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="meta"):
        load_adapter(toy().to("meta"), saved)
    with pytest.raises(ValueError, match="meta"):
        save_adapter(trained().to("meta"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_merged_models_neither_save_nor_load(saved):
    model = merge_adapter(trained())
    before = contents(saved)
    for function in (save_adapter, load_adapter):
        with pytest.raises(RuntimeError, match="unmerge_adapter"):
            function(model, saved)
    assert contents(saved) == before
    save_adapter(unmerge_adapter(model), saved)
    assert contents(saved) == before


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA-FA layer"):
        save_adapter(toy(), tmp_path)
    with pytest.raises(ValueError, match="itself a LoRAFALinear"):
        save_adapter(LoRAFALinear(2, 2), tmp_path)
    model = trained()
    model.up.scaling *= 2
    with pytest.raises(ValueError, match=r"up has scaling=4\.0"):
        save_adapter(model, tmp_path)
    mixed = nn.Sequential(LoRAFALinear(2, 2), LoRAFALinear(2, 2, use_rslora=True))
    with pytest.raises(ValueError, match="use_rslora"):
        save_adapter(mixed, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        save_adapter(trained(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trained_parameters_that_the_file_does_not_hold_are_warned_about(tmp_path):
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    model.embed.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"embed\.weight"):
        save_adapter(model, tmp_path)


class Failing:
    """Stands in for a function and fails at its n-th call, as a full disk would."""

    def __init__(self, function, n):
        self.function, self.left = function, n

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return self.function(*args)


@pytest.mark.parametrize("existing", [True, False], ids=["over an older one", "first"])
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2)])
def test_a_failing_save_leaves_the_older_files(function, call, existing, saved, monkeypatch):
    if not existing:
        shutil.rmtree(saved)
    before = contents(saved) if existing else None
    # Another rank, so that both files change.
    model = trained(LoRAFAConfig(r=2, target_modules=["q", "up"]))
    monkeypatch.setattr(os, function, Failing(getattr(os, function), call))
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved)
    assert (contents(saved) if existing else saved.exists()) == (before or False)


def test_a_disk_that_fills_while_writing_leaves_the_older_files(saved):
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    before = contents(saved)
    code = (
        "import resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_checkpoint as t\n"
        "model = t.trained(t.LoRAFAConfig(r=64, target_modules=['q', 'up']))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "t.save_adapter(model, sys.argv[2])\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    run = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__), saved],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "File too large" in run.stderr
    assert contents(saved) == before


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_that_dies_while_saving_leaves_the_older_files(moment, saved):
    before = contents(saved)
    code = (
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_checkpoint as t\n"
        "model = t.trained(t.LoRAFAConfig(r=2, target_modules=['q', 'up']))\n"
        f"os.{moment} = lambda *args: os._exit(9)\n"
        "t.save_adapter(model, sys.argv[2])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), saved], check=False)
    assert run.returncode == 9
    after = contents(saved)
    assert {name: after[name] for name in before} == before
    assert_same_adapter(load_adapter(toy(), saved), trained())


@pytest.mark.numerics
def test_saving_again_with_the_same_config_is_one_rename(saved, monkeypatch):
    renamed = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (renamed.append(os.path.basename(new)), replace(old, new))
    )
    model = trained()
    integers(model, 5, only=lorafa_parameters(model))
    save_adapter(model, saved)
    assert renamed == [WEIGHTS_FILE]
    assert_same_adapter(load_adapter(toy(), saved), model)


@pytest.mark.numerics
def test_sharded_parameters_are_gathered_and_scattered(saved, tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = apply_lorafa(toy(), CONFIG)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        load_adapter(model, saved)
        assert hasattr(model.up.lora_B, "device_mesh")
        assert_same_adapter(model, trained())
        save_adapter(model, tmp_path / "other")
        assert contents(tmp_path / "other") == contents(saved)
        with pytest.raises(RuntimeError, match="sharded"), disable_adapter(model):
            pass
        assert_same_adapter(model, trained())
    finally:
        dist.destroy_process_group()
