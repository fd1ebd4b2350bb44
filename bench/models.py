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
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafa_kernels.accuracy import relative_error

from .cases import DTYPES, unknown
from .judge import poisoned_memory, verdict

SEED = 0
SCALING = 2
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEARS = ("query", "key", "value", "dense")
# An output of fewer elements would have to be pooled over many draws (lorafa_kernels/accuracy.py).
LEAST_ELEMENTS = 256


@dataclass(frozen=True)
class Size:
    """A model's sizes, as in its published configuration; kind "llama" (causal) or "bert" (encoder)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 512
    tied: bool = False
    kind: str = "llama"

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers that get an adapter: all but the output embedding."""
        return LLAMA_LINEARS if self.kind == "llama" else BERT_LINEARS

    def parameters(self) -> int:
        """Return the number of weights in the linear layers of all blocks and the output embedding."""
        narrow = self.hidden * self.kv_heads // self.heads
        attention = 2 * self.hidden * (self.hidden + narrow)
        mlp = (3 if self.kind == "llama" else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.vocab * self.hidden

    def config(self):
        """Return the transformers config, with SDPA as attention and no dropout."""
        common = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocab,
            "attn_implementation": "sdpa",
        }
        if self.kind == "bert":
            from transformers import BertConfig

            return BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        from transformers import LlamaConfig

        return LlamaConfig(
            **common,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
        )


SIZES = {
    "tiny Llama": Size(128, 344, 2, 2, 2),
    "Llama-3.2-1B": Size(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Llama-3-8B": Size(4096, 14336, 32, 32, 8, 128256),
    # Blocks in the proportions of Llama-2-7B: intermediate / hidden 2.69, heads of 128.
    "Llama block, MHA 256": Size(256, 688, 1, 2, 2),
    "Llama block, MHA 512": Size(512, 1376, 1, 4, 4),
    "Llama block, MHA 1024": Size(1024, 2752, 1, 8, 8),
    "Llama block, GQA 512": Size(512, 1376, 1, 4, 1),
    "MiniLM": Size(384, 1536, 6, 12, 12, 30522, kind="bert"),
}


def size_of(name: str) -> Size:
    """Return the sizes of a model. Raises ValueError for an unknown name, listing the known ones."""
    if name not in SIZES:
        raise unknown("model", name, SIZES)
    return SIZES[name]


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


class Block(nn.Module):
    """One layer of a model: y (batch, sequence, hidden) from x of the same shape, without a mask of padding.

    positions: cosine and sine of the rotary embedding, which all layers of a model share; none in a BERT.
    """

    def __init__(self, size: Size, sequence: int):
        super().__init__()
        config = size.config()
        self.positions: tuple[Tensor, ...] = ()
        if size.kind == "bert":
            from transformers.models.bert.modeling_bert import BertLayer

            self.layer = BertLayer(config)
        else:
            from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

            self.layer = LlamaDecoderLayer(config, 0)
            like = torch.empty(0)
            self.positions = LlamaRotaryEmbedding(config)(like, torch.arange(sequence)[None])

    def forward(self, x: Tensor) -> Tensor:
        positions = {}
        if self.positions:
            positions["position_embeddings"] = tuple(part.to(x.dtype) for part in self.positions)
        y = self.layer(x, **positions)
        return y[0] if isinstance(y, tuple) else y


def build_block(model: str, sequence: int, dtype: str, device: str) -> Block:
    """Build one layer of a model with random weights."""
    with _new_tensors(device, dtype):
        return Block(size_of(model), sequence)


def build_causal_lm(model: str, dtype: str, device: str) -> nn.Module:
    """Build a LlamaForCausalLM with random weights, directly in `dtype` on `device`."""
    from transformers import LlamaForCausalLM

    with _new_tensors(device, dtype):
        return LlamaForCausalLM(size_of(model).config())


class EagerLoRAFA(nn.Module):
    """The plain formula around an nn.Linear: what the accuracy of the others is measured against."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float):
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, **like), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapt_frozen(model: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    return model.requires_grad_(False)


def adapt_eager(model: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in linears:
                setattr(parent, name, EagerLoRAFA(child, rank, SCALING))
    return model


def adapt_lorafa(model: nn.Module, linears: tuple[str, ...], rank: int) -> nn.Module:
    from lorafa_kernels import LoRAFAConfig, apply_lorafa

    config = LoRAFAConfig(r=rank, lora_alpha=SCALING * rank, target_modules=list(linears))
    return apply_lorafa(model, config)


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


def adamw(adapted: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer | None:
    """Return AdamW on what is trained, or None if nothing is."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0) if trained else None


def peft_lorafa_optimizer(adapted: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(adapted, r=rank, lora_alpha=SCALING * rank, lr=lr)


@dataclass(frozen=True)
class Contender:
    """adapt(model, linears, rank) adapts the model in place and returns what optimizer(…, rank, lr) takes.

    needs: a package. compiled: torch.compile of the block. scopes: "block" and "training", where it has a
    row. adapted: whether there is an adapter at all.
    """

    key: str
    title: str
    adapt: Callable[[nn.Module, tuple[str, ...], int], nn.Module]
    needs: str | None = None
    compiled: bool = False
    adapted: bool = True
    scopes: tuple[str, ...] = ("block", "training")
    optimizer: Callable[[nn.Module, int, float], torch.optim.Optimizer | None] = adamw

    def obstacle(self, device: str) -> str | None:
        """Say what keeps it from running, or None if nothing does."""
        for package in ("transformers", self.needs):
            if package and importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if self.compiled:
            if not torch._dynamo.is_dynamo_supported():
                return "torch.compile does not support this Python"
            if device == "cpu" and not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
                return "torch.compile needs a C++ compiler on a CPU"
        return None


def _peft(key: str, title: str, train_A: bool, fp32: bool, **rest) -> Contender:
    return Contender(key, title, partial(adapt_peft, train_A=train_A, fp32=fp32), "peft", **rest)


_ALL = (
    Contender("frozen", "frozen model", adapt_frozen, adapted=False),
    Contender("lorafa", "lorafa_kernels", adapt_lorafa),
    _peft("peft-lora", "PEFT LoRA, fp32 adapters (default)", True, True),
    _peft("peft-lora-16bit", "PEFT LoRA, adapters in the model's dtype", True, False),
    _peft("peft-lorafa", "PEFT, A frozen, fp32 adapters", False, True),
    _peft("peft-lorafa-16bit", "PEFT, A frozen, adapters in the model's dtype", False, False),
    _peft(
        "peft-lorafa-optimizer",
        "PEFT's LoRA-FA optimizer, fp32 adapters",
        False,
        True,
        scopes=("training",),
        optimizer=peft_lorafa_optimizer,
    ),
    _peft(
        "compiled-lorafa",
        "torch.compile of PEFT, A frozen, adapters in the model's dtype",
        False,
        False,
        compiled=True,
        scopes=("block",),
    ),
    _peft(
        "compiled-lora",
        "torch.compile of PEFT LoRA, adapters in the model's dtype",
        True,
        False,
        compiled=True,
        scopes=("block",),
    ),
)
CONTENDERS = {contender.key: contender for contender in _ALL}
TITLES = {contender.key: contender.title for contender in _ALL}
BLOCK_KEYS = tuple(contender.key for contender in _ALL if "block" in contender.scopes)
TRAINING_KEYS = tuple(contender.key for contender in _ALL if "training" in contender.scopes)


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
    """Llama's RMSNorm in the dtype of its input; transformers' own computes in fp32 whatever it is given."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def in_fp64(model: nn.Module) -> nn.Module:
    """Return a copy of a model with plain adapters that computes in fp64 throughout."""
    wide = copy.deepcopy(model).double()
    for parent in list(wide.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
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
            errors = {name: relative_error(got[name], tensor) for name, tensor in exact.items()}
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
        worst = max((name for name in found if name.startswith("dB ")), default=None, key=_badness(found))
        shown = {name: found[name] for name in ("y", "dx")}
        return shown if worst is None else {**shown, "dB": found[worst]}


def _badness(errors: dict[str, dict]) -> Callable[[str], float]:
    def of(name: str) -> float:
        error = errors[name]["error"]
        return float("inf") if error is None else error / errors[name]["allowed"]

    return of


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
