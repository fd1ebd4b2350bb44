"""Tiny models of families, adapted by PEFT, by PEFT on these kernels and by apply_lorafa, from the same
values.
"""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters, quantize_base
from lorafa_kernels.model.names import lorafa_layers

VOCABULARY = 61
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
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "llama": ("LlamaForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", DECODER),
    "bert": ("BertModel", {**COMMON, **NO_DROPOUT}),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_ff": 96,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def base(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model each time."""
    kind, fields = FAMILIES[family]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    return kind(kind.config_class(**fields)).to(dtype)


def save_llama(folder) -> None:
    """A LLaMA for load_quantised. bitsandbytes 0.50.2 takes wrong scales on a CPU with AVX-512 where K is a
    multiple of 16 and not of 64.
    """
    torch.manual_seed(0)
    fields = {**DECODER, "intermediate_size": 128}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)


def load_quantised(folder, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """kind: quantize_base's, or "bitsandbytes", "bitsandbytes nested"."""
    if not kind.startswith("bitsandbytes"):
        return quantize_base(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype), kind)
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant="nested" in kind,
        bnb_4bit_compute_dtype=dtype,
    )
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=options, dtype=dtype)


def config(**fields) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear"} | fields)


def draw(model: nn.Module) -> None:
    """Adapters that are not zero, the same each time, and exact in bf16."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) / 16
                parameter.copy_(values.bfloat16())


def with_peft(family: str, dtype: torch.dtype = torch.float32, *, made=config, **fields) -> nn.Module:
    """PEFT's model with lora_A frozen by hand; `made` makes the config."""
    model = get_peft_model(base(family, dtype), made(**fields))
    draw(model)
    freeze(model)
    return model.train()


def twin(model: nn.Module, base: nn.Module) -> nn.Module:
    """PEFT's model of `base` with the adapter of `model`, of apply_lorafa with r=4 and all-linear; lora_A
    frozen.
    """
    theirs = get_peft_model(base, config(lora_alpha=8))
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in lorafa_layers(model).items():
            for factor in ("lora_A", "lora_B"):
                own[f"base_model.model.{name}.{factor}.default.weight"].copy_(getattr(layer, factor))
    freeze(theirs)
    return theirs


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def with_lorafa(family: str, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    """The same adapters by apply_lorafa."""
    model = apply_lorafa(
        base(family, dtype), LoRAFAConfig(**{"r": 4, "target_modules": "all-linear"} | fields)
    )
    theirs = dict(with_peft(family, dtype, **fields).named_parameters())
    with torch.no_grad():
        for name, layer in lorafa_layers(model).items():
            for factor in ("lora_A", "lora_B"):
                value = theirs[f"base_model.model.{name}.{factor}.default.weight"]
                getattr(layer, factor).copy_(value)
    return model.train()


def tokens(model: nn.Module, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    )


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    """The output and the gradient of each trained parameter, by plain_name."""
    y = model(**tokens(model), use_cache=False)[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    model.zero_grad(set_to_none=True)
    y.backward(dy)
    grads = {plain_name(n): p.grad for n, p in sorted(model.named_parameters()) if p.grad is not None}
    return {"y": y.detach()} | grads


def kept_bytes(model: nn.Module) -> int:
    """Bytes of storage that a forward keeps for backward, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(**tokens(model), use_cache=False)[0]
    return sum(storage.nbytes() for storage in found.values()) if y.requires_grad else 0


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lorafa_count(model: nn.Module) -> int:
    return sum(p.numel() for p in lorafa_parameters(model))
