"""A tiny Llama with random weights, rows of tokens that it can learn, and the options of the examples that
show trainers. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
ROWS, LENGTH = 40, 12


def tiny_llama() -> LlamaForCausalLM:
    """The same 69,952 weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def rows() -> list[dict[str, list[int]]]:
    """ROWS rows of LENGTH tokens: five different ones, so that a training of seconds learns something."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (5, LENGTH), generator=generator).repeat(ROWS // 5, 1)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in ids.tolist()]


def batch_of(items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch for the model, (items, LENGTH) int64 each."""
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


def options_of(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """--out (a folder), --steps, --resume."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args(argv)


def report(out: Path, losses: list[float]) -> None:
    """Write losses.json into `out` and say how it went; of several processes the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    if not losses:
        print(f"nothing left to do: {out} has all of these steps")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "losses.json").write_text(json.dumps(losses))
    print(f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; results in {out}")
