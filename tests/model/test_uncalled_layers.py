"""A layer that its model does not call is not adapted in silence: refused where its weight is read and it is
never called, told where it is called in some places only, and named when the first steps leave it untrained.
"""

from __future__ import annotations

import copy
import functools
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters
from lorafa_kernels.nn.linear import LoRAFALinear

WIDTH = 6


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.other, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])


def product(x, layer):
    return x @ layer.weight.mT


def product_of(x, weight):
    return x @ weight.mT


def call(x, layer):
    return layer(x)


def read_all(module, x):
    return module.other(x) @ module.layer.weight


class Read(Pair):
    def forward(self, x):
        return F.linear(self.other(x), self.layer.weight, self.layer.bias)


class ReadThroughName(Pair):
    def forward(self, x):
        layer = self.layer
        return self.other(x) @ layer.weight.mT


class ReadThroughTuple(Pair):
    def forward(self, x):
        other, (layer, _) = self.other, (self.layer, 1)
        return other(x) @ layer.weight.mT


class ReadByGetattr(Pair):
    def forward(self, x):
        return self.other(x) @ getattr(self, "layer").weight.mT  # noqa: B009


class ReadInFunction(Pair):
    def forward(self, x):
        return product(self.other(x), self.layer)


class ReadInFunctionOfSelf(Pair):
    def forward(self, x):
        return read_all(self, x)


class ReadInMethod(Pair):
    def inner(self, x):
        return x @ self.layer.weight.mT

    def forward(self, x):
        return checkpoint(self.inner, self.other(x), use_reentrant=False)


class ReadInProperty(Pair):
    @property
    def matrix(self):
        return self.layer.weight

    def forward(self, x):
        return self.other(x) @ self.matrix


class ReadInSuper(Read):
    def forward(self, x):
        return super().forward(x) + 1


class ReadBelow(nn.Module):
    """Of a grandchild."""

    def __init__(self):
        super().__init__()
        self.pair = nn.ModuleDict({"other": nn.Linear(WIDTH, WIDTH), "layer": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x):
        return self.pair["other"](x) if x is None else product_of(x, self.pair.layer.weight)


class ReadInList(Pair):
    def forward(self, x):
        x = self.other(x)
        for one in self.layers:
            x = x @ one.weight.mT
        return x


class BothInList(Pair):
    def forward(self, x):
        return self.layers[0](self.other(x)) @ self.layers[1].weight.mT


NEVER_CALLED = {
    Read: ["layer"],
    ReadThroughName: ["layer"],
    ReadThroughTuple: ["layer"],
    ReadByGetattr: ["layer"],
    ReadInFunction: ["layer"],
    ReadInFunctionOfSelf: ["layer"],
    ReadInMethod: ["layer"],
    ReadInProperty: ["layer"],
    ReadInSuper: ["layer"],
    ReadInList: ["layers.0", "layers.1"],
    ReadBelow: ["pair.layer"],
    BothInList: ["layers.1"],
}


@pytest.mark.parametrize("kind", NEVER_CALLED, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_never_called_is_refused(kind):
    names = [f"0.{name}" for name in NEVER_CALLED[kind]]
    model = nn.Sequential(kind())
    with pytest.raises(ValueError, match=rf"^{', '.join(names)}: .* reads the weight and never calls"):
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))
    assert not any(isinstance(module, LoRAFALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    apply_lorafa(model, LoRAFAConfig(target_modules="all-linear", exclude_modules=names))
    assert model.lorafa_report.doubts == ()


class Both(Pair):
    def forward(self, x):
        x = self.other(x)
        return self.layer(x) if self.training else x @ self.layer.weight.mT + self.layer.bias


class BothInLoop(Pair):
    def forward(self, x):
        for place in range(2):
            x = self.layers[place](x)
        return x @ self.layers[1].weight.mT


class BothByName(Pair):
    def forward(self, x, names=("other", "layer")):
        for name in names:
            x = getattr(self, name)(x)
        return x @ self.layer.weight.mT


class HandedOn(Pair):
    """To something that may call it."""

    def forward(self, x):
        return checkpoint(self.layer, self.other(x), use_reentrant=False) + self.layer.weight.sum()


SOMETIMES = {
    Both: ["layer"],
    BothInLoop: ["layers.1"],
    BothByName: ["layer"],
    HandedOn: ["layer"],
}


@pytest.mark.parametrize("kind", SOMETIMES, ids=lambda kind: kind.__name__)
def test_a_layer_whose_weight_is_read_besides_is_told(kind):
    model, names = nn.Sequential(kind()), SOMETIMES[kind]
    with pytest.warns(UserWarning, match="reads the weight in one place") as caught:
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))
    told = [str(warning.message).split(":")[0] for warning in caught]
    assert told == [f"0.{name}" for name in names]
    assert [text.split(":")[0] for text in model.lorafa_report.doubts] == told
    assert f"may have no effect: {told[0]}" in str(model.lorafa_report)
    assert caught[0].filename == __file__


class Metadata(Pair):
    def forward(self, x):
        x = self.other(x).to(self.layer.weight.dtype)
        if isinstance(self.layer.weight, torch.Tensor) and self.layer.weight.shape[0] == WIDTH:
            x = self.layer(x)
        return x if self.layer.weight is None else x + self.layer.weight.device.index if False else x


class Norms(Pair):
    """Reads the weight of something else."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.layer(self.other(x)) * self.norm.weight


class Unread(Pair):
    """In a method that forward does not lead to."""

    def norm_of_weight(self):
        return self.layer.weight.norm()

    def forward(self, x):
        return self.layer(self.other(x))


class Called(Pair):
    def inner(self, layer, x):
        return layer.forward(x)

    def forward(self, x):
        for one in self.layers:
            x = one(x)
        return call(self.inner(self.other, x), self.layer)


@pytest.mark.parametrize("kind", [Metadata, Norms, Unread, Called], ids=lambda kind: kind.__name__)
def test_a_layer_that_is_called_is_not_told(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = apply_lorafa(nn.Sequential(kind()), LoRAFAConfig(target_modules="all-linear"))
    assert model.lorafa_report.doubts == ()


def test_layers_of_torchs_transformer_encoder():
    """In eval its fast path reads the weights of linear1 and linear2, and always that of out_proj."""
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
    with pytest.warns(UserWarning, match=r"(linear1|linear2): TransformerEncoderLayer.forward reads"):
        apply_lorafa(encoder, LoRAFAConfig(target_modules=["linear1", "linear2"]))
    assert len(encoder.lorafa_report.doubts) == 2

    class Renamed(nn.Linear):
        pass

    # out_proj is refused for what its attention does with it, whatever its class.
    attention = nn.Sequential(nn.MultiheadAttention(WIDTH, 2))
    attention[0].out_proj.__class__ = Renamed
    with pytest.raises(ValueError, match=r"out_proj: .*reads the weight and never calls"):
        apply_lorafa(attention, LoRAFAConfig(target_modules=["out_proj"]))


def test_layers_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the classes are transformers'")
    config = transformers.MambaConfig(
        vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1, intermediate_size=16
    )
    mamba = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match=r"dt_proj: MambaMixer.* reads the weight and never calls"):
        apply_lorafa(mamba, LoRAFAConfig(target_modules=["in_proj", "dt_proj"]))
    with pytest.warns(UserWarning, match=r"out_proj: MambaMixer.* reads the weight in one place"):
        apply_lorafa(mamba, LoRAFAConfig(target_modules=["in_proj", "out_proj"]))
    config = transformers.MobileBertConfig(
        vocab_size=11, hidden_size=8, embedding_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    bert = transformers.MobileBertForMaskedLM(config)
    (head,) = [name for name, module in bert.named_modules() if name.endswith("predictions.dense")]
    with pytest.raises(ValueError, match=f"{head}: .* reads the weight and never calls"):
        apply_lorafa(bert, LoRAFAConfig(target_modules=[head]))


def test_a_layer_that_was_compiled_by_itself_is_refused():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[1] = torch.compile(model[1], backend="eager")
    with pytest.raises(ValueError, match=r"^1 was compiled by itself"):
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))
    apply_lorafa(model, LoRAFAConfig(target_modules=["0"]))


@pytest.mark.numerics
def test_a_compiled_module_around_a_layer_computes_with_the_adapter():
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, WIDTH)
    model[0] = torch.compile(model[0], backend="eager")
    before = model(x)
    apply_lorafa(model, LoRAFAConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), model[0]._orig_mod[0](x))


def as_list(model):
    model.kept = [model[0]]


def as_method(model):
    model.kept = model[0].forward


def as_partial(model):
    model.kept = functools.partial(model[0])


@pytest.mark.parametrize("keep", [as_list, as_method, as_partial], ids=lambda function: function.__name__)
def test_a_layer_that_something_else_holds_is_told(keep):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    keep(model)
    with pytest.warns(UserWarning, match=r"^0 is also held by kept"):
        apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))


@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_whose_weight_is_computed_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises((ValueError, TypeError), match=r"^0: "):
        apply_lorafa(model, LoRAFAConfig(target_modules=["0"]))


@pytest.mark.parametrize("make", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_layer_is_refused(make):
    layer = nn.Linear(WIDTH, WIDTH)
    scripted = torch.jit.script(layer) if make == "script" else torch.jit.trace(layer, torch.ones(1, WIDTH))
    with pytest.raises(ValueError, match=r"only torch\.nn\.Linear and transformers' Conv1D can be adapted"):
        apply_lorafa(nn.Sequential(scripted), LoRAFAConfig(target_modules=["0"]))


class Hidden(Pair):
    """What it reads is not to be seen from the source."""

    def forward(self, x):
        layer = vars(self)["_modules"]["layer"]
        return self.other(x) + x @ layer.weight.mT


def steps(model, count, x=None):
    """The warnings of `count` training steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            model(torch.randn(2, WIDTH) if x is None else x).sum().backward()
            model.zero_grad(set_to_none=True)
    return [str(warning.message) for warning in caught]


def adapted(kind=Hidden):
    return apply_lorafa(nn.Sequential(kind()), LoRAFAConfig(target_modules=["other", "layer"], r=2))


def hooks(model):
    return [p for p in lorafa_parameters(model) if p._post_accumulate_grad_hooks]


def test_what_the_first_steps_leave_without_a_gradient_is_named_once():
    model = adapted()
    assert steps(model, 2) == []
    (message,) = steps(model, 4)
    assert message.startswith("the adapters of 0.layer got no gradient in the first 2 backward passes")
    assert hooks(model) == []


def test_nothing_is_told_where_all_are_trained():
    model = adapted(Unread)
    assert steps(model, 5) == [] and hooks(model) == []


def test_a_layer_that_is_reached_in_the_second_step_is_not_told():
    class Late(Pair):
        step = 0

        def forward(self, x):
            self.step += 1
            return self.layer(self.other(x)) if self.step > 1 else self.other(x)

    assert steps(adapted(Late), 5) == []


def disabled(model):
    model[0].layer.adapter_enabled = False


def frozen(model):
    model[0].layer.lora_B.requires_grad_(False)


@pytest.mark.parametrize("change", [disabled, frozen], ids=lambda function: function.__name__)
def test_an_adapter_that_is_not_to_be_trained_is_not_told(change):
    model = adapted()
    change(model)
    assert steps(model, 5) == []


def test_watching_leaves_copies_pickles_and_compilation_alone():
    model = adapted(Unread)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = torch.load(buffer, weights_only=False)
    assert hooks(other) == hooks(loaded) == []
    assert steps(other, 4) == steps(loaded, 4) == []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert [text for text in steps(compiled, 4) if "adapter" in text] == []
    assert hooks(model) == []


def test_a_layer_is_released_with_its_model():
    import gc
    import weakref

    model = adapted()
    reference = weakref.ref(model[0].layer)
    del model
    gc.collect()
    assert reference() is None


def test_layers_made_by_hand_are_not_watched():
    layer = LoRAFALinear(WIDTH, WIDTH, r=2)
    assert not layer.lora_B._post_accumulate_grad_hooks
