"""The three models of the study: what a snippet is to each, a batch, the loss, a fresh copy.

MiniLM: BERT with its published weights and a linear head; classifies a snippet by the sign of its score.
llama: predicts each byte of a piece. t5: predicts bytes that were left out of a piece (span corruption).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import sentiment

from . import texts
from .settings import LLAMA, SIZES, T5, T5_END, T5_FIRST_SENTINEL, T5_PAD, T5_SPAN, T5_SPANS, Task

IGNORED = -100


class Model(Protocol):
    """What training and testing need of a model."""

    def items(self, text: str) -> list:
        """The examples of a text, before the split."""

    def fresh(self, seed: int) -> nn.Module:
        """A copy with the weights before adaptation; the seed decides a new head."""

    def length(self, item: Any) -> int:
        """What items of a batch should have alike, so that little is padded."""

    def losses(self, model: nn.Module, items: Sequence) -> tuple[Tensor, Tensor]:
        """Return (nats, right): cross-entropy of every target, and whether the most likely one is right."""


class MiniLM:
    """Items: (token ids, label)."""

    def __init__(self) -> None:
        path = sentiment.minilm_path()
        self.tokenizer = sentiment.load_tokenizer(path)
        self.encoder = sentiment.load_minilm(path)

    def items(self, text: str) -> list[tuple[list[int], int]]:
        found = texts.snippets(text)
        ids = self.tokenizer(
            [snippet.text for snippet in found], truncation=True, max_length=SIZES["minilm"].length
        )["input_ids"]
        return [(row, snippet.label) for row, snippet in zip(ids, found, strict=True)]

    def fresh(self, seed: int) -> nn.Module:
        return sentiment.SentimentClassifier(copy.deepcopy(self.encoder), seed)

    def length(self, item: tuple[list[int], int]) -> int:
        return len(item[0])

    def losses(self, model: nn.Module, items: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        ids = _padded([row for row, _ in items], self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row, _ in items])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        labels = torch.tensor([label for _, label in items])
        logits = model(ids, mask)
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels


class ByteLlama:
    """Items: pieces of a text, bytes."""

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        self.weights = weights

    def items(self, text: str) -> list[bytes]:
        return texts.pieces(text, SIZES["llama"].length)

    def fresh(self, seed: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        return _with(LlamaForCausalLM(LlamaConfig(**LLAMA)), self.weights)

    def length(self, item: bytes) -> int:
        return len(item)

    def losses(self, model: nn.Module, items: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([list(item) for item in items])
        return _of_logits(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])


class ByteT5:
    """Items: (input, target) of pieces of a text: T5_SPANS spans of T5_SPAN bytes are left out of each."""

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        self.weights = weights

    def items(self, text: str) -> list[tuple[list[int], list[int]]]:
        found = texts.pieces(text, SIZES["t5"].length)
        return [corrupted(piece, random.Random(number)) for number, piece in enumerate(found)]

    def fresh(self, seed: int) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(seed)
        return _with(T5ForConditionalGeneration(T5Config(**T5)), self.weights)

    def length(self, item: tuple[list[int], list[int]]) -> int:
        return len(item[0])

    def losses(self, model: nn.Module, items: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        ids = _padded([source for source, _ in items], T5_PAD)
        labels = _padded([target for _, target in items], IGNORED)
        return _of_logits(model(input_ids=ids, labels=labels).logits, labels)


def corrupted(piece: bytes, drawn: random.Random) -> tuple[list[int], list[int]]:
    """Leave T5_SPANS spans out of a piece, one in each of as many equal parts; return input and target."""
    part = len(piece) // T5_SPANS
    source: list[int] = []
    target: list[int] = []
    for number in range(T5_SPANS):
        start = number * part
        end = len(piece) if number == T5_SPANS - 1 else start + part
        gap = start + drawn.randrange(part - T5_SPAN)
        source += [*piece[start:gap], T5_FIRST_SENTINEL + number, *piece[gap + T5_SPAN : end]]
        target += [T5_FIRST_SENTINEL + number, *piece[gap : gap + T5_SPAN]]
    return source, [*target, T5_END]


def _of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and rightness of every label that is a byte: sentinels and the end say nothing of the text."""
    counted = (labels >= 0) & (labels < 256)
    nats = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return nats, logits[counted].argmax(-1) == labels[counted]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)


def _with(model: nn.Module, weights: dict[str, Tensor] | None) -> nn.Module:
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def untrained(task: Task) -> Model:
    """Return the model of a task without weights of our own making."""
    return {"minilm": MiniLM, "llama": ByteLlama, "t5": ByteT5}[task.model]()
