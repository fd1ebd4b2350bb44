"""Transformer models and single blocks with random weights, the ways to adapt all their linear layers, and
the check of each against fp64.

Every contender gets a model of its own from the same seed, so that base weights, lora_A and lora_B are the
same for all. A contender is checked on y, dx and every dB against an fp64 copy of the same model with the
plain formula as its adapters; the plain formula in the model's own dtype sets what is allowed (judge.py).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lorafa_kernels.checks.budget import relative_error

from .cases import DTYPES, unknown
from .contenders import SCOPES, Contender, EagerLoRA
from .judge import poisoned_memory, verdict

SEED = 0
SCALING = 2
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEARS = ("query", "key", "value", "dense")
PHI3_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
T5_LINEARS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
# An output of fewer elements would have to be pooled over many draws (lorafa_kernels/checks/budget.py).
LEAST_ELEMENTS = 256


@dataclass(frozen=True)
class Family:
    """config: its class in transformers; linears: names of the layers that get an adapter, all but the output
    embedding; products: weights (hidden, intermediate) of its MLP.
    """

    config: str
    linears: tuple[str, ...] = LLAMA_LINEARS
    products: int = 3
    attention: str = "sdpa"


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "mistral": Family("MistralConfig"),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config"),
    "gemma": Family("GemmaConfig"),
    # Its attention caps the scores, which SDPA cannot.
    "gemma2": Family("Gemma2Config", attention="eager"),
    "gemma3": Family("Gemma3TextConfig"),
    "phi3": Family("Phi3Config", PHI3_LINEARS),
    "bert": Family("BertConfig", BERT_LINEARS, 2),
    "roberta": Family("RobertaConfig", BERT_LINEARS, 2),
    "t5": Family("T5Config", T5_LINEARS),
}


@dataclass(frozen=True)
class Size:
    """A model's sizes, as in its published configuration; kind: a key of FAMILIES (the encoder of a T5).
    head_dim: hidden / heads if None.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 512
    tied: bool = False
    kind: str = "llama"
    head_dim: int | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers that get an adapter: all but the output embedding."""
        return FAMILIES[self.kind].linears

    def parameters(self) -> int:
        """Return the number of weights in the linear layers of all blocks and the output embedding."""
        head_dim = self.head_dim or self.hidden // self.heads
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * head_dim
        mlp = FAMILIES[self.kind].products * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.vocab * self.hidden

    def config(self):
        """Return the transformers config, with SDPA as attention where there is one, and no dropout."""
        import transformers

        family = FAMILIES[self.kind]
        sizes = {
            "vocab_size": self.vocab,
            "attn_implementation": family.attention,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }
        if self.kind == "t5":
            own = {"d_ff": sizes.pop("intermediate_size"), "feed_forward_proj": "gated-gelu"}
            own |= {"d_kv": self.head_dim or self.hidden // self.heads, "dropout_rate": 0.0}
        elif family.products == 2:
            own = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        else:
            own = {"num_key_value_heads": self.kv_heads, "max_position_embeddings": 8192}
            own |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
            own |= {"head_dim": self.head_dim} if self.head_dim else {}
            own |= {"tie_word_embeddings": self.tied}
        if self.kind == "llama":
            own["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
        return getattr(transformers, family.config)(**sizes, **own)


SIZES = {
    "tiny Llama": Size(128, 344, 2, 2, 2),
    "Llama-3.2-1B": Size(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Llama-3-8B": Size(4096, 14336, 32, 32, 8, 128256),
    # Blocks in the proportions of Llama-2-7B: intermediate / hidden 2.69, heads of 128.
    "Llama block, MHA 256": Size(256, 688, 1, 2, 2),
    "Llama block, MHA 512": Size(512, 1376, 1, 4, 4),
    "Llama block, MHA 1024": Size(1024, 2752, 1, 8, 8),
    "Llama block, GQA 512": Size(512, 1376, 1, 4, 1),
    # Two heads of k and v, which a mask makes attention repeat; heads of 64 as in Llama-3.2-1B.
    "Llama block, GQA 8:2 512": Size(512, 1376, 1, 8, 2),
    "MiniLM": Size(384, 1536, 6, 12, 12, 30522, kind="bert"),
    # Blocks in the proportions of Mistral-7B, Qwen2-7B, Qwen3-8B, Gemma-7B, Gemma-2-9B, Gemma-3-4B,
    # Phi-3-mini, BERT-base, RoBERTa-large and T5-v1.1-base, with their head sizes.
    "Mistral block": Size(512, 1792, 1, 4, 1, kind="mistral"),
    "Qwen2 block": Size(896, 4736, 1, 7, 1, kind="qwen2"),
    "Qwen3 block": Size(512, 1536, 1, 4, 1, kind="qwen3", head_dim=128),
    "Gemma block": Size(384, 3072, 1, 2, 2, kind="gemma", head_dim=256),
    "Gemma2 block": Size(512, 2048, 1, 2, 1, kind="gemma2", head_dim=256),
    "Gemma3 block": Size(640, 2560, 1, 2, 1, kind="gemma3", head_dim=256),
    "Phi-3 block": Size(384, 1024, 1, 4, 4, kind="phi3"),
    "BERT block": Size(384, 1536, 1, 6, 6, kind="bert"),
    "RoBERTa block": Size(512, 2048, 1, 8, 8, kind="roberta"),
    "T5 block": Size(384, 1024, 1, 6, 6, kind="t5"),
}


def size_of(name: str) -> Size:
    """Return the sizes of a model. Raises ValueError for an unknown name, listing the known ones."""
    if name not in SIZES:
        raise unknown("model", name, SIZES)
    return SIZES[name]


PIECES = {"qkv": "q, k and v projections", "mlp": "MLP", "layer": "whole layer"}


@dataclass(frozen=True)
class ModelCase:
    """A model of SIZES on `batch` sequences, adapters of rank `rank` on all its linear layers."""

    model: str
    batch: int
    sequence: int
    rank: int = 16
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        size_of(self.model)

    @property
    def size(self) -> Size:
        return size_of(self.model)

    @property
    def tokens(self) -> str:
        return f"{self.batch}x{self.sequence} tokens R={self.rank} {self.dtype}"

    @property
    def label(self) -> str:
        return f"{self.model}, {self.tokens}"

    def as_record(self) -> dict:
        """Return the case as JSON types, with its label."""
        own = {name: getattr(self, name) for name in ("model", "batch", "sequence", "rank", "dtype")}
        return {"label": self.label, **own}


@dataclass(frozen=True)
class BlockCase(ModelCase):
    """One layer of a model, or a piece of it (a key of PIECES; of Llama's kind), on x (batch, sequence,
    hidden).

    scope: of the contenders and the record: what it keeps ("block"; "family": for docs/memory.md), or its
    "time". padding: whether a mask of padding takes part. compiled: whether the torch.compile contenders do,
    which on a CPU take a minute. checkpointing: without, with.
    """

    piece: str = "layer"
    scope: str = "block"
    padding: bool = False
    compiled: bool = True
    checkpointing: tuple[bool, ...] = (False, True)

    @property
    def label(self) -> str:
        if self.scope == "time":
            return f"{self.model}, {PIECES[self.piece]}, {self.tokens}"
        return super().label + (", padding" if self.padding else "")

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers in the piece."""
        named = self.size.linears
        return {"qkv": named[:3], "mlp": named[4:], "layer": named}[self.piece]

    def unit_bytes(self) -> int:
        """Return the bytes of one hidden state."""
        return self.batch * self.sequence * self.size.hidden * DTYPES[self.dtype].itemsize

    def flops(self) -> int:
        """Return the FLOPs of the linear layers, forward and dx, without the adapters."""
        size = self.size
        head_dim = size.head_dim or size.hidden // size.heads
        weights = {
            "qkv": size.hidden * (size.heads + 2 * size.kv_heads) * head_dim,
            "mlp": FAMILIES[size.kind].products * size.hidden * size.intermediate,
            "layer": replace(size, layers=1, vocab=0).parameters(),
        }
        return 4 * self.batch * self.sequence * weights[self.piece]

    def as_record(self) -> dict:
        sizes = {name: getattr(self.size, name) for name in ("hidden", "intermediate", "heads", "kv_heads")}
        if self.scope == "time":
            return {**super().as_record(), **sizes, "piece": self.piece}
        attention = FAMILIES[self.size.kind].attention
        return {**super().as_record(), **sizes, "padding": self.padding, "attention": attention}


@contextlib.contextmanager
def _new_tensors(device: str, dtype: str) -> Iterator[None]:
    """Modules built inside are on the device in the dtype at once, with random weights from SEED."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    torch.manual_seed(SEED)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class _Reached(Exception):
    """Raised by the layer whose arguments are wanted."""


class Block(nn.Module):
    """One layer of a model: y (batch, sequence, hidden) from x of the same shape.

    It is called as its model calls it; shared: the tensors that all layers of the model are given beside x,
    such as the cosine and sine of the rotary embedding, a mask, or T5's position bias.
    """

    def __init__(self, size: Size, batch: int, sequence: int, padding: bool):
        from transformers import AutoModel, T5EncoderModel

        super().__init__()
        # Of two layers the second: in a T5 the first makes the position bias.
        config, dtype = replace(size, layers=2, vocab=512).config(), torch.get_default_dtype()
        encoder = size.kind == "t5"
        make = T5EncoderModel._from_config if encoder else AutoModel.from_config
        model = make(config, dtype=dtype)
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        self.layer = layers[1]
        self.dtype = dtype
        self.arguments: tuple[tuple, dict] = ((), {})

        def keep(module, arguments, keywords):
            keywords = {name: value for name, value in keywords.items() if name != "hidden_states"}
            self.arguments = arguments[1:], keywords
            raise _Reached

        hook = self.layer.register_forward_pre_hook(keep, with_kwargs=True)
        mask = {} if encoder else {"use_cache": False}
        if padding:
            mask["attention_mask"] = torch.ones(batch, sequence, dtype=torch.long)
            mask["attention_mask"][0, -sequence // 4 :] = 0
        with torch.no_grad(), contextlib.suppress(_Reached):
            model(inputs_embeds=torch.randn(batch, sequence, size.hidden), **mask)
        hook.remove()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.dim() == 1:
                    # A norm's weight of one, or a bias of zero, would hide an error.
                    parameter.add_(0.1 * torch.randn_like(parameter))
                    if size.kind == "t5":
                        # It does not scale its scores, and relies on small weights of q: with adapters of any
                        # values attention would be so sharp that it amplifies every rounding.
                        parameter.mul_((size.head_dim or size.hidden // size.heads) ** -0.25)

    @property
    def shared(self) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        tree_map_only(Tensor, found.append, self.arguments)
        return tuple(found)

    def forward(self, x: Tensor) -> Tensor:
        arguments, keywords = self.arguments
        # Where it is timed nothing is looked at.
        if x.dtype != self.dtype:
            arguments, keywords = tree_map_only(
                Tensor,
                lambda tensor: tensor.to(x.dtype) if tensor.is_floating_point() else tensor,
                self.arguments,
            )
        y = self.layer(x, *arguments, **keywords)
        return y[0] if isinstance(y, tuple) else y


class Projections(nn.Module):
    """q, k and v of one x: three separate tensors."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def build(case: BlockCase, device: str) -> nn.Module:
    """Build the layer or its piece with random weights, the same ones in every call. With padding the last
    quarter of the first sequence is.
    """
    with _new_tensors(device, case.dtype):
        block = Block(case.size, case.batch, case.sequence, case.padding)
    if case.piece == "qkv":
        return Projections(block.layer.self_attn)
    return block.layer.mlp if case.piece == "mlp" else block


def joined(module: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs side by side."""
    y = module(x)
    return torch.cat(y, -1) if isinstance(y, tuple) else y


def build_causal_lm(model: str, dtype: str, device: str) -> nn.Module:
    """Build a LlamaForCausalLM with random weights, directly in `dtype` on `device`."""
    from transformers import LlamaForCausalLM

    with _new_tensors(device, dtype):
        return LlamaForCausalLM(size_of(model).config())


def adapt_frozen(model: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    return model.requires_grad_(False)


def adapt_eager(model: nn.Module, linears: tuple[str, ...], rank: int, *, train_A: bool = False) -> nn.Module:
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in linears:
                shapes = (rank, child.in_features), (child.out_features, rank)
                factors = [child.weight.new_zeros(shape) for shape in shapes]
                setattr(parent, name, EagerLoRA(child, *factors, SCALING, train_A))
    return model


def adapt_liger(model: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    """Adapt as adapt_eager, with the gated product of the MLPs by Liger."""
    from liger_kernel.transformers.functional import liger_swiglu

    adapt_eager(model, linears, rank)
    for mlp in model.modules():
        if hasattr(mlp, "gate_proj"):
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(liger_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
    return model


def adapt_lorafa(model: nn.Module, linears: tuple[str, ...], rank: int, **options: bool) -> nn.Module:
    from lorafa_kernels import LoRAFAConfig, apply_lorafa

    config = LoRAFAConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(linears))
    return apply_lorafa(model, config, **options)


def adapt_peft(
    model: nn.Module, linears: tuple[str, ...], rank: int, *, train_A: bool, fp32: bool
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(linears))
    with warnings.catch_warnings():
        # It asks transformers in a way that transformers will give up.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    if not train_A:
        for lora_A, _ in adapters(model).values():
            lora_A.requires_grad_(False)
    return wrapped


def peft_lorafa_optimizer(adapted: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(adapted, r=rank, lora_alpha=SCALING * rank, lr=lr)


def _of_models(key: str, title: str, build: Callable, *needs: str, **rest) -> Contender:
    return Contender(key, title, build, ("transformers", *needs), **rest)


def _peft(key: str, title: str, train_A: bool, fp32: bool, **rest) -> Contender:
    return _of_models(key, title, partial(adapt_peft, train_A=train_A, fp32=fp32), "peft", **rest)


_NOT_TIMED = ("block", "family", "training")
_ONE_BLOCK = ("block", "family", "time")
_ALL = (
    _of_models("frozen", "frozen model", adapt_frozen, adapted=False),
    _of_models("lorafa", "lorafa_kernels", adapt_lorafa),
    _of_models(
        "lorafa-no-norm", "lorafa_kernels, norm=False", partial(adapt_lorafa, norm=False), scopes=("family",)
    ),
    _of_models(
        "lorafa-no-fuse", "lorafa_kernels, fuse=False", partial(adapt_lorafa, fuse=False), scopes=("family",)
    ),
    _of_models(
        "lorafa-layers",
        "lorafa_kernels, fuse=False, norm=False",
        partial(adapt_lorafa, fuse=False, norm=False),
        scopes=_ONE_BLOCK,
    ),
    _of_models("eager-lorafa", "eager LoRA-FA", adapt_eager, scopes=_ONE_BLOCK),
    _of_models("eager-lora", "eager LoRA", partial(adapt_eager, train_A=True), scopes=_ONE_BLOCK),
    _peft("peft-lora", "PEFT LoRA, fp32 adapters (default)", True, True),
    _peft("peft-lora-16bit", "PEFT LoRA, adapters in the model's dtype", True, False, scopes=_NOT_TIMED),
    _peft("peft-lorafa", "PEFT, A frozen, fp32 adapters", False, True),
    _peft(
        "peft-lorafa-16bit", "PEFT, A frozen, adapters in the model's dtype", False, False, scopes=_NOT_TIMED
    ),
    _peft(
        "peft-lorafa-optimizer",
        "PEFT's LoRA-FA optimizer, fp32 adapters",
        False,
        True,
        scopes=("training",),
        optimizer=peft_lorafa_optimizer,
    ),
    _of_models(
        "compiled-lorafa", "torch.compile of eager LoRA-FA", adapt_eager, compiled=True, scopes=_ONE_BLOCK
    ),
    _of_models(
        "compiled-lora",
        "torch.compile of eager LoRA",
        partial(adapt_eager, train_A=True),
        compiled=True,
        scopes=("block", "family"),
    ),
    _of_models(
        "liger",
        "eager LoRA-FA with Liger's SwiGLU",
        adapt_liger,
        "liger_kernel",
        needs_gpu=True,
        scopes=("block", "time"),
    ),
)
CONTENDERS = {contender.key: contender for contender in _ALL}
TITLES = {contender.key: contender.title for contender in _ALL}
BLOCK_KEYS, FAMILY_KEYS, TIME_KEYS, TRAINING_KEYS = (
    tuple(contender.key for contender in _ALL if scope in contender.scopes) for scope in SCOPES
)


def select(keys: Iterable[str], scope: str) -> list[Contender]:
    """Return the contenders of these keys, in their order.

    Raises ValueError for a key that is unknown in this scope, listing the known ones.
    """
    known = [key for key, contender in CONTENDERS.items() if scope in contender.scopes]
    found = []
    for key in keys:
        if key not in known:
            raise unknown(f"contender of a {scope}", key, known)
        found.append(CONTENDERS[key])
    return found


def adapters(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return lora_A (R, K) and lora_B (N, R) by the name of the linear layer that they belong to."""
    found = {}
    for name, module in model.named_modules():
        lora_A, lora_B = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(lora_A, nn.ModuleDict) and "default" in lora_A:
            lora_A, lora_B = lora_A["default"].weight, lora_B["default"].weight
        if isinstance(lora_A, nn.Parameter):
            found[name] = (lora_A, lora_B)
    return found


def ready(module: nn.Module, contender: Contender, dtype: str) -> Callable:
    """Fill an adapted module's adapters at random; return it as it is called, compiled for those who are."""
    fill_adapters(module, dtype, zero_B=False)
    if not contender.compiled:
        return module
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


@torch.no_grad()
def fill_adapters(model: nn.Module, dtype: str, *, zero_B: bool) -> None:
    """Give the adapters the values that all contenders have, rounded to `dtype`: lora_A as PEFT draws it,
    lora_B zero as at the start of training, or random, so that it matters in every result.
    """
    generator = torch.Generator().manual_seed(SEED)
    pairs = [pair for _, pair in sorted(adapters(model).items())]
    for lora_A, _ in pairs:
        values = (2 * torch.rand(lora_A.shape, generator=generator) - 1) * lora_A.shape[1] ** -0.5
        lora_A.copy_(values.to(DTYPES[dtype]))
    for _, lora_B in pairs:
        if zero_B:
            lora_B.zero_()
        else:
            values = torch.randn(lora_B.shape, generator=generator) * lora_B.shape[1] ** -0.5
            lora_B.copy_(values.to(DTYPES[dtype]))


class _WideRMSNorm(nn.Module):
    """A model's RMSNorm in the dtype of its input; transformers' own compute in fp32 whatever they are given.
    Gemma's weight is an offset from one.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        gemma = type(norm).__name__.startswith("Gemma")
        self.offset = 1.0 if gemma else 0.0
        self.eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        hat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * hat


def in_fp64(model: nn.Module) -> nn.Module:
    """Return a copy of a model with plain adapters that computes in fp64 throughout."""
    wide = copy.deepcopy(model).double()
    for parent in list(wide.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")):
                setattr(parent, name, _WideRMSNorm(child))
    return wide


Call = Callable[[nn.Module, Tensor], Tensor]


def results(model: nn.Module, call: Call, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return y, dx and every dB ("dB " and the layer's name)."""
    x = x.detach().requires_grad_()
    factors = {f"dB {name}": lora_B for name, (_, lora_B) in adapters(model).items()}
    y = call(model, x)
    dx, *dB = torch.autograd.grad(y, (x, *factors.values()), dy)
    return {"y": y.detach(), "dx": dx, **dict(zip(factors, dB, strict=True))}


class Reference:
    """fp64 results of a model with plain adapters (adapt_eager), and the error of its own dtype's.

    call(model, x) -> y; x and dy are in the model's dtype. What is kept waits on the CPU, so that it is not
    counted as memory of a contender. Raises ValueError if an output is too small to measure an error
    on.
    """

    def __init__(self, plain: nn.Module, dtype: str, call: Call, x: Tensor, dy: Tensor):
        self.device = x.device.type
        self.call, self.x, self.dy = call, x.cpu(), dy.cpu()
        self._known: dict[bool, tuple[dict[str, Tensor], dict[str, float]]] = {}
        fill_adapters(plain, dtype, zero_B=False)
        exact_model = in_fp64(plain)
        for adapted in (True, False):
            if not adapted:
                fill_adapters(plain, dtype, zero_B=True)
                fill_adapters(exact_model, dtype, zero_B=True)
            exact = results(exact_model, call, x.double(), dy.double())
            small = [name for name, tensor in exact.items() if tensor.numel() < LEAST_ELEMENTS]
            if small:
                raise ValueError(
                    f"an error is measured on {LEAST_ELEMENTS} elements or more, fewer: {', '.join(small)}"
                )
            if not adapted:
                exact = {name: exact[name] for name in ("y", "dx")}
            got = results(plain, call, x, dy)
            errors = pooled({name: relative_error(got[name], tensor) for name, tensor in exact.items()})
            self._known[adapted] = {name: tensor.cpu() for name, tensor in exact.items()}, errors

    def errors(self, contender: Contender, model: nn.Module, call: Call | None = None) -> dict[str, dict]:
        """Return the verdict on y, dx, and, as "dB", the worst of every dB. lora_B must hold the values of
        fill_adapters(zero_B=False).
        """
        exact, plain = self._known[contender.adapted]
        # The compiler would compile once more for poisoned memory.
        with contextlib.nullcontext() if contender.compiled else poisoned_memory():
            got = results(model, call or self.call, self.x.to(self.device), self.dy.to(self.device))
        if set(got) != set(exact):
            raise ValueError(f"adapts {len(got) - 2} linear layers, expected {len(exact) - 2}")
        found = {}
        for name, tensor in got.items():
            found |= verdict({name: tensor}, {name: exact[name].to(tensor.device)}, plain)

        def badness(name: str) -> float:
            error = found[name]["error"]
            return float("inf") if error is None else error / found[name]["allowed"]

        worst = max((name for name in found if name.startswith("dB ")), default=None, key=badness)
        shown = {name: found[name] for name in ("y", "dx")}
        return shown if worst is None else {**shown, "dB": found[worst]}


def reference(case: BlockCase, device: str) -> Reference:
    """Draw x (batch, sequence, hidden) and dy of a case and compute what its contenders are compared with."""
    plain = adapt_eager(build(case, device), case.size.linears, case.rank)
    generator = torch.Generator().manual_seed(SEED)

    def drawn(shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype])

    x = drawn((case.batch, case.sequence, case.size.hidden))
    with torch.no_grad():
        wide = joined(plain, x).shape
    return Reference(plain, case.dtype, joined, x, drawn(wide))


def pooled(errors: dict[str, float]) -> dict[str, float]:
    """Return the plain formula's errors, those of every dB at least the root mean square of all dB's.

    Roundings add up along a chain of layers, and the error of one gradient is a single draw: another order of
    the same products is outside twice a lucky one every now and then.
    """
    own = [error for name, error in errors.items() if name.startswith("dB ")]
    common = (sum(error * error for error in own) / len(own)) ** 0.5 if own else 0.0
    return {name: max(error, common) if name.startswith("dB ") else error for name, error in errors.items()}


@contextlib.contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """A causal model with only its first `count` layers, inside the context."""
    inner = model.model
    layers = inner.layers
    inner.layers = layers[:count]
    try:
        yield model
    finally:
        inner.layers = layers


def checkpoint_layers(model: nn.Module) -> None:
    """Switch a causal model's gradient checkpointing on."""
    # Renamed within transformers 5, which warns of the old name since.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def free() -> None:
    """Give back the GPU memory of what is no longer referenced."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
