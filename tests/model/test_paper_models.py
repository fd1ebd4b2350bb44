"""RoBERTa, T5 and LLaMA train here as in plain PyTorch and in PEFT, from the same lora_A: the paper's models.

Each method trains the same model on the same batches with AdamW, and its losses are compared step by step: in
fp32 each is within 1e-5 of that in fp64, in plain PyTorch and in PEFT, relative (on a CPU within 5e-7). A
learning rate of 1e-2 makes T5 chaotic, and its fp32 losses part by 5e-3, PEFT's from those in fp64, too. In
bf16 the losses of all steps are within the error budget. The tiny configurations run anywhere, those of the
paper on a GPU:

    python -m pytest -n0 -m gpu tests/model/test_paper_models.py
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafa_kernels import LoRAFAConfig, LoRAFALinear, apply_lorafa, lorafa_parameters
from lorafa_kernels.checks.budget import allowed_error, relative_error

transformers = pytest.importorskip("transformers", reason="the models are transformers'")
peft = pytest.importorskip("peft", reason="PEFT is what people train with")
pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]

STEPS, LEARNING_RATE = 50, 2e-3
NAMES = ("roberta", "t5", "llama")
ATTENTION = {
    "roberta": ["query", "key", "value", "attention.output.dense"],
    "t5": ["q", "k", "v", "o"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
CLASSES = {
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
}
NO_DROPOUT = {
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3},
    "t5": {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    "llama": {},
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
T5_SIZES = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size")
TINY = {
    "roberta": dict(zip(SIZES, (64, 96, 2, 4, 61), strict=True)),
    "t5": dict(zip(T5_SIZES, (64, 96, 2, 4, 61), strict=True), d_kv=16),
    "llama": dict(zip(SIZES, (64, 96, 2, 4, 61), strict=True), num_key_value_heads=2),
}
# Of the checkpoints roberta-base, roberta-large, t5-base, t5-large and huggyllama/llama-7b.
PAPER = {
    "roberta-base": dict(zip(SIZES, (768, 3072, 12, 12, 50265), strict=True), max_position_embeddings=514),
    "roberta-large": dict(zip(SIZES, (1024, 4096, 24, 16, 50265), strict=True), max_position_embeddings=514),
    "t5-base": dict(zip(T5_SIZES, (768, 3072, 12, 12, 32128), strict=True), d_kv=64),
    "t5-large": dict(zip(T5_SIZES, (1024, 4096, 24, 16, 32128), strict=True), d_kv=64),
    "llama-7b": dict(zip(SIZES, (4096, 11008, 32, 32, 32000), strict=True)),
}


def build(name: str, sizes: dict, dtype: torch.dtype, device: str) -> nn.Module:
    kind = getattr(transformers, CLASSES[name])
    torch.manual_seed(0)
    config = kind.config_class(**sizes, **NO_DROPOUT[name])
    # Drawn in fp32 for every dtype, rounded to bf16, which every dtype has: all methods start alike.
    with torch.device(device):
        model = kind(config)
    return model.to(torch.bfloat16).to(dtype).train()


def lorafa_config(name: str, targets: str, **options) -> LoRAFAConfig:
    modules = "all-linear" if targets == "all-linear" else ATTENTION[name]
    return LoRAFAConfig(r=8, lora_alpha=16, target_modules=modules, init_seed=11, **options)


class Plain(nn.Module):
    """LoRA-FA as one writes it in PyTorch."""

    def __init__(self, of: LoRAFALinear) -> None:
        super().__init__()
        self.weight, self.bias, self.lora_A = of.weight, of.bias, of.lora_A
        self.lora_B = nn.Parameter(of.lora_B.detach().clone())
        self.scaling = of.scaling

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scaling * low_rank

    def correct(self) -> None:
        wide = self.lora_B.dtype
        A = self.lora_A.to(wide)
        gram = A @ A.T + 1e-8 * torch.eye(len(A)).to(A)
        self.lora_B.grad = self.lora_B.grad @ torch.linalg.inv(gram) / self.scaling**2


def ours(model: nn.Module, config: LoRAFAConfig) -> list[nn.Parameter]:
    return lorafa_parameters(apply_lorafa(model, config))


def plain(model: nn.Module, config: LoRAFAConfig) -> list[nn.Parameter]:
    apply_lorafa(model, config, fuse=False, norm=False)
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, LoRAFALinear)]
    for path, layer in adapted:
        made = Plain(layer)
        if model.dtype == torch.float64:
            made.lora_B.data = made.lora_B.data.double()
        model.set_submodule(path, made)
    return [m.lora_B for m in model.modules() if isinstance(m, Plain)]


def pefts(model: nn.Module, config: LoRAFAConfig) -> list[nn.Parameter]:
    """Adapted by PEFT, with the lora_A that `ours` draws, frozen."""
    drawn = {
        n: m.lora_A
        for n, m in apply_lorafa(_copy(model), config).named_modules()
        if isinstance(m, LoRAFALinear)
    }
    fields = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert layers.keys() == drawn.keys(), f"adapted by one alone: {layers.keys() ^ drawn.keys()}"
    for path, layer in layers.items():
        lora_A = layer.lora_A["default"].weight
        with torch.no_grad():
            lora_A.copy_(drawn[path])
        lora_A.requires_grad_(False)
    return [p for p in adapted.parameters() if p.requires_grad]


def _copy(model: nn.Module) -> nn.Module:
    """The same modules around the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def batches(model: nn.Module, name: str, rows: int, length: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Two batches in turn, which can be learned by heart."""
    vocabulary = model.config.vocab_size
    for step in itertools.count():
        draw = torch.Generator().manual_seed(step % 2)
        ids = torch.randint(3, vocabulary, (rows, length), generator=draw)
        labels = torch.randint(0, 3, (rows,), generator=draw) if name == "roberta" else ids
        yield {
            "input_ids": ids.to(device),
            "labels": (labels.flip(-1) if name == "t5" else labels).to(device),
        }


def losses(
    adapt: Callable,
    name: str,
    targets: str,
    sizes: dict,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rows: int = 2,
    length: int = 12,
    **options,
) -> Tensor:
    """The loss before each step, fp64 (steps,)."""
    model = build(name, sizes, dtype, device)
    config = lorafa_config(name, targets, **options)
    trained = adapt(model, config)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    found = []
    for _, batch in zip(range(steps), batches(model, name, rows, length, device), strict=False):
        loss = model(**batch).loss
        found.append(loss.detach().double())
        loss.backward()
        if config.gradient_correction:
            for module in model.modules():
                if isinstance(module, Plain):
                    module.correct()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found).cpu()


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest difference of two losses of one step, relative."""
    return ((one - other).abs() / other.abs()).max().item()


def check_curves(run: Callable[..., Tensor], others: dict[str, Callable]) -> None:
    exact, mine = run(plain, dtype=torch.float64), run(ours)
    assert exact[-2:].mean() < exact[:2].mean(), "nothing was learned"
    check_near(mine, exact, "fp64")
    for what, adapt in others.items():
        check_near(mine, run(adapt), what)


def check_near(one: Tensor, other: Tensor, what: str) -> None:
    """What docs/design.md promises, for the losses of each step."""
    difference = furthest(one, other)
    assert difference < 1e-5, f"{difference:.2e} from {what}"


OTHERS = {"plain PyTorch": plain, "PEFT": pefts}


@pytest.mark.parametrize("name", NAMES)
def test_first_steps_equal_those_of_plain_pytorch(name):
    run = functools.partial(losses, name=name, targets="all-linear", sizes=TINY[name], steps=3)
    check_curves(run, {"plain PyTorch": plain})


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_curves_equal_those_of_plain_pytorch_and_peft(name, targets):
    run = functools.partial(losses, name=name, targets=targets, sizes=TINY[name])
    check_curves(run, OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_corrected_loss_curves_equal_those_of_the_formula(name):
    run = functools.partial(
        losses, name=name, targets="all-linear", sizes=TINY[name], gradient_correction=True
    )
    check_curves(run, {"plain PyTorch": plain})
    without = functools.partial(losses, name=name, targets="all-linear", sizes=TINY[name])
    with pytest.raises(AssertionError, match="from fp64"):
        check_near(without(ours), run(plain, dtype=torch.float64), "fp64")


def check_within_the_budget(run: Callable[..., Tensor], exact_dtype: torch.dtype) -> None:
    exact = run(plain, dtype=exact_dtype)
    mine, *others = (run(adapt, dtype=torch.bfloat16) for adapt in (ours, plain, pefts))
    largest = max(relative_error(theirs, exact) for theirs in others)
    assert relative_error(mine, exact) <= allowed_error(largest, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bf16_losses_are_within_the_budget(name):
    run = functools.partial(losses, name=name, targets="all-linear", sizes=TINY[name])
    check_within_the_budget(run, torch.float64)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("checkpoint", [name for name in PAPER if name != "llama-7b"])
def test_loss_curves_at_the_papers_sizes(checkpoint, targets):
    name = checkpoint.partition("-")[0]
    where = {"device": "cuda", "rows": 4, "length": 64}
    run = functools.partial(losses, name=name, targets=targets, sizes=PAPER[checkpoint], **where)
    check_curves(run, OTHERS)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_losses_of_llama_7b_are_within_the_budget(targets):
    where = {"device": "cuda", "rows": 1, "length": 256, "steps": 20}
    run = functools.partial(losses, name="llama", targets=targets, sizes=PAPER["llama-7b"], **where)
    check_within_the_budget(run, torch.float32)
