"""A small model of every family that apply_lorafa adapts: its configuration, and inputs with values."""

from __future__ import annotations

import torch

VOCABULARY = 512
_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BERT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 130,
    "architectures": ["{}ForSequenceClassification"],
}
FAMILIES: dict[str, dict] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 32},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "experts_implementation": "grouped_mm"},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 32},
    "gemma": {**_LLAMA, "head_dim": 32},
    "gemma2": {**_LLAMA, "head_dim": 32, "sliding_window": 16, "num_hidden_layers": 8},
    "gemma3_text": {**_LLAMA, "head_dim": 32, "sliding_window": 16, "num_hidden_layers": 9},
    "phi3": _LLAMA,
    "bert": {**_BERT, "architectures": ["BertForSequenceClassification"]},
    "roberta": {**_BERT, "architectures": ["RobertaForSequenceClassification"]},
    "t5": {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 352,
        "num_layers": 5,
        "num_decoder_layers": 6,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
    "gpt2": {"n_embd": 128, "n_layer": 5, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128},
    "opt": {
        "hidden_size": 128,
        "ffn_dim": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 128,
    },
    "vit": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "architectures": ["ViTForImageClassification"],
    },
    "whisper": {
        "d_model": 128,
        "encoder_layers": 5,
        "decoder_layers": 6,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 352,
        "decoder_ffn_dim": 352,
        "vocab_size": VOCABULARY,
        "max_source_positions": 64,
        "max_target_positions": 128,
        "num_mel_bins": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "architectures": ["WhisperForConditionalGeneration"],
    },
}
_MODELS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
}
_CAUSAL = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CAUSAL |= {"gemma": "Gemma", "gemma2": "Gemma2", "phi3": "Phi3", "opt": "OPT"}
_MODELS |= {kind: f"{name}ForCausalLM" for kind, name in _CAUSAL.items()}


def config_of(family: str) -> dict:
    """What its config.json says."""
    return {"model_type": family, **FAMILIES[family]}


def build(family: str, dtype: torch.dtype):
    """The model with values, in training mode."""
    import transformers

    config = transformers.AutoConfig.for_model(**config_of(family))
    model = getattr(transformers, _MODELS[family])._from_config(config, dtype=dtype)
    if family == "mixtral":
        model.set_experts_implementation("grouped_mm")
    return model.train()


def inputs_of(family: str, batch: int, sequence: int, dtype: torch.dtype, padding: bool) -> dict:
    """Inputs of a step, with values."""
    ids = torch.randint(5, VOCABULARY, (batch, sequence))
    sizes = FAMILIES[family]
    if family == "vit":
        images = torch.randn(batch, 3, sizes["image_size"], sizes["image_size"], dtype=dtype)
        return {"pixel_values": images, "labels": torch.zeros(batch, dtype=torch.long)}
    if family == "whisper":
        frames = 2 * sizes["max_source_positions"]
        features = torch.randn(batch, sizes["num_mel_bins"], frames, dtype=dtype)
        return {"input_features": features, "labels": ids, "use_cache": False}
    inputs = {"input_ids": ids, "labels": ids}
    if family in ("bert", "roberta"):
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
    if padding:
        mask = torch.ones(batch, sequence, dtype=torch.long)
        mask[0, : sequence // 2] = 0
        inputs["attention_mask"] = mask
    return {**inputs, "use_cache": False}
