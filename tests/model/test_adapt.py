"""apply_lorafa adapts what PEFT would, touches nothing else, and all it does can be undone, bit for bit.

Weights and inputs of the toy models are small integers and scalings powers of two, so every product and sum
of an adapted layer is exact in fp32 and results are compared with torch.equal, whatever the order of
summation.
"""

import copy
import logging
import math

import pytest
import torch
from saved import copied, pickled
from torch import nn

from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.merge import disable_adapter, merge_adapter, unload_adapter, unmerge_adapter
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.model.saved import lorafa_parameters
from lorafa_kernels.nn.linear import LoRAFALinear


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.out = nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6)}) for _ in range(2))
        self.up = nn.Linear(4, 6)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), Experts()


class Names(nn.Module):
    """Names that the matching rules may trip over: nested indices, ends of names, lists at the root."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})
        self.decoder = nn.ModuleDict({"h": nn.ModuleList(Layer() for _ in range(2))})
        self.up = nn.Linear(4, 6)
        self.pre_classifier = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)
        self.first = self.second = nn.Linear(4, 4)


MATCHING = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "up"]},
    {"target_modules": {"k_proj", "proj"}},
    {"target_modules": ["attn.q_proj"]},
    {"target_modules": ["layers.1.attn.q_proj"]},
    {"target_modules": ["encoder.layers.1.attn.q_proj", "classifier"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["first"]},
    {"target_modules": ["first", "second"]},
    {"target_modules": ["q_proj", "absent"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"q_proj|up"},
    {"target_modules": r"encoder\.layers\.[02]\..*(q_proj|up)"},
    {"target_modules": r"(?!.*experts).*up"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-Linear", "exclude_modules": ["up"]},
    {
        "target_modules": "all-linear",
        "modules_to_save": ["classifier"],
        "exclude_modules": ["pre_classifier"],
    },
    {"target_modules": "all-linear", "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r"layers\.0\..*"},
    {"target_modules": ["q_proj", "up"], "modules_to_save": ["attn"]},
    {"target_modules": ["q_proj", "up"], "modules_to_save": ["mlp"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["up"], "layers_to_transform": [1]},
    {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "experts"},
    {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "[a-z]+"},
    {"target_modules": ["up", "layers.0.attn.q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
    {"target_modules": ["q_proj", "up"], "rank_pattern": {"up": 3}},
    {"target_modules": ["q_proj", "up"], "rank_pattern": {"^up": 3}, "alpha_pattern": {"^up": 5}},
    {"target_modules": ["q_proj", "up"], "rank_pattern": {r"layers.\d.attn.q_proj": 2, "q_proj": 5}},
    {"target_modules": ["q_proj", "up"], "rank_pattern": {"q_proj": 5, r"layers.\d.attn.q_proj": 2}},
    {"target_modules": ["q_proj", "up"], "rank_pattern": {r"^layers\..*": 2}, "alpha_pattern": {"p": 1}},
    {"target_modules": ["q_proj", "up"], "alpha_pattern": {"mlp.up|q_proj": 32}, "lora_alpha": 4},
    {"target_modules": ["q_proj"], "use_rslora": True, "r": 5, "lora_alpha": 3, "rank_pattern": {"h.0.*": 7}},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", MATCHING, ids=[str(i) for i in range(len(MATCHING))])
def test_matching_is_that_of_peft(fields):
    peft = pytest.importorskip("peft", reason="PEFT is the reference for matching rules")
    theirs = {
        name.removeprefix("base_model.model."): (
            layer.r["default"],
            layer.lora_alpha["default"],
            layer.scaling["default"],
        )
        for name, layer in peft.get_peft_model(Names(), peft.LoraConfig(**fields)).named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    model = apply_lorafa(Names(), LoRAFAConfig(**fields))
    ours = {n: (layer.r, layer.lora_alpha, layer.scaling) for n, layer in lorafa_layers(model).items()}
    assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_all_linear_is_that_of_peft_on_transformers_models(kind):
    peft = pytest.importorskip("peft", reason="PEFT is the reference for matching rules")
    transformers = pytest.importorskip("transformers", reason="the models are transformers'")
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    config = (
        transformers.BertConfig(**small) if kind.startswith("Bert") else transformers.LlamaConfig(**small)
    )
    peft_model = peft.get_peft_model(
        getattr(transformers, kind)(config), peft.LoraConfig(target_modules="all-linear")
    )
    theirs = {
        name.removeprefix("base_model.model.")
        for name, layer in peft_model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    model = apply_lorafa(getattr(transformers, kind)(config), LoRAFAConfig(target_modules="all-linear"))
    assert set(lorafa_layers(model)) == theirs


def test_defaults_are_those_of_peft():
    peft = pytest.importorskip("peft", reason="PEFT is the reference for defaults")
    theirs, ours = peft.LoraConfig(target_modules="q"), LoRAFAConfig(target_modules="q")
    for name in vars(ours).keys() - {"adapter_dtype", "gradient_correction", "init_seed"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    # What PEFT has not is off.
    assert ours.gradient_correction is False and ours.init_seed is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", 2.0),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", math.inf),
        ("lora_alpha", math.nan),
        ("lora_alpha", None),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", math.nan),
        ("use_rslora", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", 1),
        ("init_lora_weights", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", [3]),
        ("target_modules", "(q"),
        ("exclude_modules", "[q"),
        ("exclude_modules", {"q": 1}),
        ("modules_to_save", "head"),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [True]),
        ("layers_pattern", "layers"),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"(q": 1}),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": math.inf}),
    ],
)
def test_config_names_the_field_that_is_wrong(name, value):
    with pytest.raises(ValueError, match=name):
        LoRAFAConfig(**{"target_modules": ["q"], name: value})


@pytest.mark.parametrize("name", ["layers_to_transform", "layers_pattern"])
def test_config_refuses_layer_filters_beside_a_regular_expression(name):
    with pytest.raises(ValueError, match=name):
        LoRAFAConfig(target_modules="q", **{name: [1] if name == "layers_to_transform" else "h"})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.q(x))))


class Toy(nn.Module):
    """`twice` stands under two names, lm_head shares the embedding's weight, norm has buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.norm = nn.BatchNorm1d(6, momentum=None)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(self.again(self.twice(x))))


TOKENS = torch.arange(7)
CONFIG = LoRAFAConfig(r=2, lora_alpha=4, target_modules=["q", "up", "twice"])
SAVING = LoRAFAConfig(
    r=2, lora_alpha=4, target_modules=["q", "up", "twice"], modules_to_save=["lm_head", "norm"]
)


@torch.no_grad()
def integers(model, seed=0, low=-1, high=2, only=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters() if only is None else only:
        parameter.copy_(torch.randint(low, high, parameter.shape, generator=generator))
    return model


def toy():
    return integers(Toy()).eval()


def adapted(config=CONFIG, model=None):
    """A toy model with integer A and B, as if trained."""
    model = apply_lorafa(model or toy(), config)
    integers(model, 1, only=[layer.lora_A for layer in lorafa_layers(model).values()])
    integers(model, 2, only=lorafa_parameters(model))
    return model


def snapshot(model):
    """Everything that an error must leave as it was: modules, Parameter objects, flags, bits, attributes."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [
        (name, id(p), p.requires_grad, p.detach().numpy().tobytes())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters, sorted(vars(model)), [sorted(vars(m)) for m in model.modules()]


def frozen_bits(model):
    return {
        name: (layer.weight.detach().clone(), layer.lora_A.detach().clone())
        for name, layer in lorafa_layers(model).items()
    }


def assert_frozen(model, bits):
    layers = lorafa_layers(model)
    assert layers.keys() == bits.keys()
    for name, (weight, lora_A) in bits.items():
        layer = layers[name]
        assert (
            not layer.weight.requires_grad and not layer.lora_A.requires_grad and layer.lora_B.requires_grad
        )
        assert torch.equal(layer.weight, weight) and torch.equal(layer.lora_A, lora_A)


@pytest.mark.numerics
def test_only_lora_B_is_trained_and_the_base_is_shared():
    model = toy()
    before = dict(model.named_parameters())
    y = model(TOKENS)
    assert apply_lorafa(model, CONFIG) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.rsplit(".", 1)[-1] for name, p in after.items() if p.requires_grad} == {"lora_B"}
    assert torch.equal(model(TOKENS), y)


def test_a_shared_module_stays_shared():
    model = apply_lorafa(toy(), CONFIG)
    assert isinstance(model.twice, LoRAFALinear) and model.again is model.twice
    assert len(lorafa_parameters(model)) == 5
    unload_adapter(model)
    assert type(model.twice) is nn.Linear and model.again is model.twice


def test_report_says_what_was_adapted(caplog):
    with caplog.at_level(logging.INFO, logger="lorafa_kernels"):
        model = apply_lorafa(toy(), SAVING)
    report = model.lorafa_report
    assert [layer.name for layer in report.layers] == [
        "blocks.0.q",
        "blocks.0.up",
        "blocks.1.q",
        "blocks.1.up",
        "twice",
    ]
    assert {(layer.r, layer.scaling) for layer in report.layers} == {(2, 2.0)}
    assert report.modules_to_save == ("norm", "lm_head")
    assert report.trained_parameters == 2 * (3 * 6 + 2 * 8) + 7 * 6 + 2 * 6
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
    assert "2 x up: 6 -> 8, r=2, scaling=2" in str(report) and str(report) in caplog.text
    assert model.lorafa_config == SAVING


def untouchable(change):
    model = toy()
    change(model)
    return model


class OwnForward(nn.Linear):
    def forward(self, x):
        return x


def with_adapter(model):
    model.blocks[1].q = LoRAFALinear(6, 6)


REFUSED = {
    "not a Linear": (toy, {"target_modules": ["embed"]}, ValueError, "embed, a Embedding"),
    "container": (toy, {"target_modules": ["blocks.0"]}, ValueError, "blocks.0, a Block"),
    "no match": (toy, {"target_modules": ["qq"]}, ValueError, "Close names: q"),
    "no match for a regex": (toy, {"target_modules": "blocks.0.p"}, ValueError, "Close names: .*blocks.0.up"),
    "all excluded": (toy, {"target_modules": ["q"], "exclude_modules": ["q"]}, ValueError, "exclude_modules"),
    "nothing to save": (
        toy,
        {"target_modules": ["q"], "modules_to_save": ["x"]},
        ValueError,
        "modules_to_save",
    ),
    "saved list": (
        toy,
        {"target_modules": ["twice"], "modules_to_save": ["blocks"]},
        ValueError,
        "ModuleList",
    ),
    "one name of two": (toy, {"target_modules": ["q"], "modules_to_save": ["twice"]}, ValueError, "again"),
    "adapted already": (lambda: untouchable(with_adapter), {"target_modules": ["q"]}, ValueError, "already"),
    "root": (lambda: nn.Linear(2, 2), {"target_modules": "all-linear"}, ValueError, "from_linear"),
    "own forward": (
        lambda: untouchable(lambda m: setattr(m.blocks[1], "up", OwnForward(6, 8))),
        {"target_modules": ["q", "up"]},
        TypeError,
        "blocks.1.up",
    ),
    "attention": (
        lambda: untouchable(lambda m: setattr(m, "attention", nn.MultiheadAttention(6, 2))),
        {"target_modules": "all-linear"},
        ValueError,
        "attention.out_proj.*exclude_modules",
    ),
    "target within saved": (
        lambda: untouchable(lambda m: setattr(m, "subq", nn.Linear(2, 2))),
        {"target_modules": ["subq"], "modules_to_save": ["bq"]},
        ValueError,
        "subq",
    ),
    "integers to save": (
        lambda: untouchable(
            lambda m: m.norm.register_parameter("n", nn.Parameter(torch.zeros(1, dtype=torch.int8), False))
        ),
        {"target_modules": ["q"], "modules_to_save": ["norm"]},
        ValueError,
        "norm.n has dtype torch.int8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_leaves_the_model_untouched(case):
    build, fields, error, message = REFUSED[case]
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_lorafa(model, LoRAFAConfig(**fields))
    assert snapshot(model) == before


def test_a_conv1d_that_is_none_is_named():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'")
    model = nn.Sequential(nn.Linear(2, 2), utils.Conv1D(2, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="1: weight is a Parameter, expected a floating-point"):
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))


def test_a_failure_while_building_leaves_the_model_untouched(monkeypatch):
    model = toy()
    before = snapshot(model)
    build, calls = LoRAFALinear.from_linear.__func__, []

    def failing(cls, linear, **options):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no room")
        return build(cls, linear, **options)

    monkeypatch.setattr(LoRAFALinear, "from_linear", classmethod(failing))
    with pytest.raises(MemoryError):
        apply_lorafa(model, SAVING)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", ["q", "typo"]),
        ("exclude_modules", ["up", "typo"]),
        ("rank_pattern", {"typo": 2}),
        ("alpha_pattern", {"typo": 2}),
        ("modules_to_save", ["norm", "typo"]),
    ],
)
def test_an_entry_without_a_match_is_warned_about(name, value):
    with pytest.warns(UserWarning, match=f"{name}.*typo"):
        apply_lorafa(toy(), LoRAFAConfig(**{"target_modules": ["q"], name: value}))


def test_thawing_everything_is_an_error_that_names_the_tensor():
    model = adapted().train()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight|lora_A"):
        model(TOKENS)


def train(model, steps=2):
    optimizer = torch.optim.SGD(lorafa_parameters(model), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


def reloaded(model):
    other = apply_lorafa(Toy(), model.lorafa_config).train(model.training)
    other.load_state_dict(model.state_dict())
    return other


def disabled(model):
    with disable_adapter(model):
        return model.train(not model.training)


def merged_and_back(model):
    return unmerge_adapter(merge_adapter(model))


STEPS = [copied, pickled, reloaded, disabled, merged_and_back, nn.Module.train, nn.Module.eval]


@pytest.mark.numerics
@pytest.mark.parametrize("config", [CONFIG, SAVING], ids=["adapter", "modules_to_save"])
def test_frozen_tensors_stay_frozen_and_nothing_is_lost(config):
    model = adapted(config).train()
    bits = frozen_bits(model)
    train(model)
    model.eval()
    y = model(TOKENS)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for step in STEPS + STEPS[::-1]:
        model = step(model)
        assert_frozen(model, bits)
        after = model.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
        training = model.training
        assert torch.equal(model.eval()(TOKENS), y)
        model.train(training)
    train(model.train())
    assert_frozen(model, bits)
    assert not torch.equal(model.eval()(TOKENS), y)


@pytest.mark.numerics
@pytest.mark.parametrize("config", [CONFIG, SAVING], ids=["adapter", "modules_to_save"])
def test_disabled_the_model_is_its_base(config):
    y, model = toy()(TOKENS), adapted(config)
    trained = model(TOKENS)
    assert not torch.equal(trained, y)
    with disable_adapter(model):
        assert torch.equal(model(TOKENS), y)
    assert torch.equal(model(TOKENS), trained)


@pytest.mark.numerics
@pytest.mark.parametrize("config", [CONFIG, SAVING], ids=["adapter", "modules_to_save"])
def test_disable_restores_what_it_found_when_nested_and_after_an_error(config):
    y, model = toy()(TOKENS), adapted(config)
    trained = model(TOKENS)
    model.blocks[0].q.adapter_enabled = False
    mixed = model(TOKENS)
    assert not torch.equal(mixed, trained)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), disable_adapter(model), disable_adapter(model):
        with disable_adapter(model):
            pass
        assert torch.equal(model(TOKENS), y)
        raise KeyError
    assert [layer.adapter_enabled for layer in lorafa_layers(model).values()] == [False] + 4 * [True]
    assert torch.equal(model(TOKENS), mixed)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.numerics
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_disable_unmerges_a_merged_model_and_merges_it_again(keep):
    model = adapted().eval()
    before = model(TOKENS)
    with disable_adapter(model):
        base = model(TOKENS)
    merge_adapter(model, keep=keep)
    merged = model(TOKENS)
    with pytest.raises(KeyError), disable_adapter(model):
        assert not any(layer.merged for layer in lorafa_layers(model).values())
        assert torch.equal(model(TOKENS), base)
        raise KeyError
    assert all(layer.merged for layer in lorafa_layers(model).values())
    assert torch.equal(model(TOKENS), merged)
    unmerge_adapter(model)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.numerics
def test_merge_keeps_the_outputs_and_unmerge_the_objects():
    model = adapted()
    y, weights = model(TOKENS), [layer.weight for layer in lorafa_layers(model).values()]
    merge_adapter(merge_adapter(model))
    assert torch.equal(model(TOKENS), y)
    unmerge_adapter(unmerge_adapter(model))
    assert all(
        layer.weight is weight for layer, weight in zip(lorafa_layers(model).values(), weights, strict=True)
    )


def test_a_failing_merge_is_undone(monkeypatch):
    model = adapted()
    last = list(lorafa_layers(model).values())[-1]
    monkeypatch.setattr(last, "merge", lambda keep: (_ for _ in ()).throw(MemoryError("no room")))
    before = snapshot(model)
    with pytest.raises(MemoryError):
        merge_adapter(model)
    assert snapshot(model) == before and not any(layer.merged for layer in lorafa_layers(model).values())


@pytest.mark.numerics
@pytest.mark.parametrize("first", [lambda m: m, merge_adapter], ids=["unmerged", "merged"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("config", [CONFIG, SAVING], ids=["adapter", "modules_to_save"])
def test_unload_leaves_plain_linears(config, merge, first):
    model = toy()
    before = snapshot(model)
    base = dict(model.named_parameters(remove_duplicate=False))
    y = model(TOKENS)
    adapted(config, model)
    trained = model(TOKENS)
    assert unload_adapter(first(model), merge=merge) is model
    assert not lorafa_layers(model) and type(model.blocks[0].q) is nn.Linear
    assert snapshot(model)[2:] == before[2:]
    if merge:
        assert torch.equal(model(TOKENS), trained)
    else:
        after = dict(model.named_parameters(remove_duplicate=False))
        assert (
            all(after[name] is parameter for name, parameter in base.items()) and after.keys() == base.keys()
        )
        assert torch.equal(model(TOKENS), y)


@pytest.mark.numerics
@pytest.mark.parametrize("inside", [False, True], ids=["enabled", "while disabled"])
@pytest.mark.parametrize("merge", [True, False])
def test_unload_within_disable_is_final(merge, inside):
    model = adapted(SAVING)
    wanted = model(TOKENS) if merge else toy()(TOKENS)
    if inside and merge:
        # The merged weight would act although the adapter is off.
        with disable_adapter(model), pytest.raises(RuntimeError, match=r"blocks\.0\.q is disabled"):
            unload_adapter(model, merge=True)
    elif inside:
        with disable_adapter(model):
            unload_adapter(model, merge=False)
    else:
        unload_adapter(model, merge=merge)
    assert torch.equal(model(TOKENS), wanted)


def test_modules_to_save_are_clones_and_the_originals_are_out_of_sight():
    model = toy()
    embedding, head_keys = model.embed.weight, set(model.state_dict())
    apply_lorafa(model, SAVING)
    assert model.embed.weight is embedding and not embedding.requires_grad
    assert model.lm_head.weight is not embedding and model.lm_head.weight.requires_grad
    assert {key for key in model.state_dict() if "lora_" not in key} == head_keys
    trained = {id(parameter) for parameter in lorafa_parameters(model)}
    assert {id(model.lm_head.weight), id(model.norm.weight), id(model.norm.bias)} <= trained
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with disable_adapter(model):
        assert model.lm_head.weight is embedding
        assert trained == {id(parameter) for parameter in lorafa_parameters(model)}


def test_a_shared_module_to_save_is_trained_once():
    model = apply_lorafa(toy(), LoRAFAConfig(target_modules=["q"], modules_to_save=["twice", "again"]))
    assert model.again is model.twice
    own = [id(p) for p in lorafa_parameters(model) if p is model.twice.weight or p is model.twice.bias]
    assert own == [id(model.twice.weight), id(model.twice.bias)]


@pytest.mark.numerics
def test_buffers_of_modules_to_save_come_back():
    model = adapted(SAVING)
    model.train()(TOKENS)
    counted = model.norm.running_mean.clone()
    assert model.norm.num_batches_tracked == 1
    with disable_adapter(model):
        assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_mean, counted)
    unload_adapter(model, merge=False)
    assert torch.equal(model.norm.running_mean, torch.zeros(6))


@pytest.mark.numerics
@pytest.mark.parametrize("copying", [copied, pickled], ids=["deepcopy", "pickle"])
def test_originals_follow_copies_and_casts(copying):
    model = copying(adapted(SAVING))
    model.to(torch.float64)
    optimizer_view = model.lm_head.weight
    with disable_adapter(model):
        assert model.lm_head.weight is model.embed.weight
        assert torch.equal(model(TOKENS), toy().double()(TOKENS))
    assert model.lm_head.weight is optimizer_view and optimizer_view.dtype is torch.float64
    unload_adapter(model, merge=False)
    assert model.norm.weight.dtype is torch.float64 and model.lm_head.weight is model.embed.weight


@pytest.mark.numerics
def test_recurrent_modules_to_save_compute_with_what_is_in_place():
    model = nn.ModuleDict({"cell": nn.LSTM(3, 3), "out": nn.Linear(3, 3)})
    x = torch.ones(2, 1, 3)
    y = model["cell"](x)[0]
    apply_lorafa(model, LoRAFAConfig(target_modules=["out"], modules_to_save=["cell"]))
    integers(model, only=model["cell"].parameters())
    trained = model["cell"](x)[0]
    assert not torch.equal(trained, y)
    with disable_adapter(model):
        assert torch.equal(model["cell"](x)[0], y)
    assert torch.equal(model["cell"](x)[0], trained)


@pytest.mark.numerics
def test_layers_put_in_by_hand_work_alike():
    model = nn.Sequential(LoRAFALinear(4, 4, r=2), nn.ReLU(), nn.Linear(4, 2))
    assert lorafa_parameters(model) == [model[0].lora_B]
    integers(model)
    x = torch.ones(3, 4)
    y = model(x)
    assert torch.equal(merge_adapter(model.eval())(x), y)
    unmerge_adapter(model)
    with disable_adapter(model):
        base = model(x)
    assert torch.equal(unload_adapter(copy.deepcopy(model), merge=False)(x), base)
    assert torch.equal(unload_adapter(model)(x), y)


@pytest.mark.numerics
def test_a_layer_by_itself_is_unloaded_into_a_linear():
    layer = integers(LoRAFALinear(4, 4, r=2))
    y = layer(torch.ones(3, 4))
    assert torch.equal(unload_adapter(layer)(torch.ones(3, 4)), y)


@pytest.mark.parametrize("function", [lorafa_parameters, merge_adapter, unmerge_adapter, unload_adapter])
def test_a_model_without_adapter_is_refused(function):
    with pytest.raises(ValueError, match="no LoRA-FA layer"):
        function(toy())
    with pytest.raises(ValueError, match="no LoRA-FA layer"), disable_adapter(toy()):
        pass


def test_wrapped_models_keep_their_names():
    model = toy()
    apply_lorafa(nn.DataParallel(model), CONFIG)
    assert "blocks.0.q" in lorafa_layers(model) and model.lorafa_config is CONFIG
    other = torch.compile(toy(), backend="eager")
    apply_lorafa(other, LoRAFAConfig(target_modules=r"blocks\.0\.q"))
    assert list(lorafa_layers(other)) == ["blocks.0.q"]
