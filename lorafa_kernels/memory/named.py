"""Well-known models by name: the class of their configuration in transformers, its sizes, and the class of
the model. Source: each model's published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Named(NamedTuple):
    """config: name of a config class; sizes: its arguments where they are not its defaults; model: name of
    the model's class.
    """

    config: str
    model: str
    sizes: Mapping[str, Any]


def _decoder(
    family: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **other
) -> Named:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **other,
    }
    kind = "Gemma3Text" if family == "Gemma3" else family
    return Named(f"{kind}Config", f"{family}ForCausalLM", MappingProxyType(sizes))


def _encoder(family: str, hidden: int, layers: int, heads: int, vocab: int, positions: int) -> Named:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }
    return Named(f"{family}Config", f"{family}ForSequenceClassification", MappingProxyType(sizes))


def _t5(model: int, ff: int, layers: int, heads: int) -> Named:
    sizes = {"d_model": model, "d_kv": 64, "d_ff": ff, "num_layers": layers, "num_heads": heads}
    return Named("T5Config", "T5ForConditionalGeneration", MappingProxyType({**sizes, "vocab_size": 32128}))


def _of(config: str, model: str, **sizes) -> Named:
    return Named(config, model, MappingProxyType(sizes))


NAMED: dict[str, Named] = {
    "Llama-3.2-1B": _decoder("Llama", 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, head_dim=64),
    "Llama-3-8B": _decoder("Llama", 4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": _decoder("Llama", 8192, 28672, 80, 64, 8, 128256),
    "LLaMA-7B": _decoder("Llama", 4096, 11008, 32, 32, 32, 32000),
    "Mistral-7B": _decoder("Mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
    "Mixtral-8x7B": _decoder("Mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8),
    "Qwen2-7B": _decoder("Qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen3-8B": _decoder("Qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "Gemma-7B": _decoder("Gemma", 3072, 24576, 28, 16, 16, 256000, head_dim=256, tie_word_embeddings=True),
    "Gemma-2-9B": _decoder("Gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, tie_word_embeddings=True),
    "Gemma-3-4B": _decoder("Gemma3", 2560, 10240, 34, 8, 4, 262208, head_dim=256, tie_word_embeddings=True),
    "Phi-3-mini": _decoder(
        "Phi3", 3072, 8192, 32, 32, 32, 32064, pad_token_id=None, bos_token_id=None, eos_token_id=None
    ),
    "BERT-base": _encoder("Bert", 768, 12, 12, 30522, 512),
    "MiniLM": _encoder("Bert", 384, 6, 12, 30522, 512),
    "RoBERTa-base": _encoder("Roberta", 768, 12, 12, 50265, 514),
    "RoBERTa-large": _encoder("Roberta", 1024, 24, 16, 50265, 514),
    "T5-base": _t5(768, 3072, 12, 12),
    "T5-large": _t5(1024, 4096, 24, 16),
    "GPT-2": _of("GPT2Config", "GPT2LMHeadModel"),
    "OPT-1.3B": _of(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=50272,
    ),
    "ViT-base": _of("ViTConfig", "ViTForImageClassification"),
    "Whisper-small": _of(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        vocab_size=51865,
    ),
}
