"""The text as token ids, packed into rows of one length, and the order in which training sees the rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from examples import DemoError


@dataclass(frozen=True)
class PackedText:
    """Rows of token ids, (rows, sequence), to train on and to evaluate on."""

    train: Tensor
    held_out: Tensor
    vocabulary: int
    digest: str


def read(path: Path | None) -> str:
    """The text of a file, or the standard library's help on Python. Raises DemoError."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"--text {path} cannot be read: {error}") from error


def pack(text: str, tokenizer: Path | None, sequence: int, held_out: int) -> PackedText:
    """Cut `text` into rows of `sequence` tokens, a rest that fills no row dropped; the last `held_out` rows
    are for evaluation. Tokens are UTF-8's bytes, or those of the local folder `tokenizer`.

    Raises DemoError for a text without a row to train on, and a tokenizer that cannot be loaded.
    """
    if tokenizer is None:
        ids, vocabulary = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), 256
    else:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError) as error:
            raise DemoError(f"--tokenizer {tokenizer} cannot be loaded: {error}") from error
        # Without its warning that a text is longer than the model's context: rows are cut below.
        ids = torch.tensor(loaded(text, verbose=False)["input_ids"], dtype=torch.int32)
        vocabulary = len(loaded)
    count = len(ids) // sequence
    if count <= held_out:
        raise DemoError(
            f"the text fills {count} rows of {sequence} tokens, of which {held_out} are held out: none is "
            "left to train on"
        )
    rows = ids[: count * sequence].view(count, sequence)
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return PackedText(rows[: count - held_out], rows[count - held_out :], vocabulary, digest)


def rows_at(position: int, count: int, size: int, seed: int) -> list[int]:
    """The rows of a batch: `count` of them from `position` on in a sequence of epochs, each of which has all
    `size` rows in an order of its own.
    """
    return [_epoch(at // size, size, seed)[at % size] for at in range(position, position + count)]


@lru_cache(maxsize=2)
def _epoch(epoch: int, size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    return torch.randperm(size, generator=generator).tolist()
