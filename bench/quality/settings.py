"""What the study trains, and how much: tasks, methods, sizes, learning rates. Data, no code that runs.

Sizes are such that the whole study takes less than six hours of one CPU core. Every number here is part of a
run's key: change one, and the runs that it concerns are made again.
"""

from __future__ import annotations

from dataclasses import dataclass

SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEEDS = (0, 1, 2)
# The learning rate is chosen on this seed's validation loss.
CHOOSING_SEED = 0
# A grid whose best rate is at its edge grows by one more on that side, at most so often.
EXTENSIONS = 2
RANK, SCALING, TARGETS, DROPOUT = 8, 2.0, "all-linear", 0.05
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Ranks that are also trained at a learning rate so many times lower than the one chosen for RANK.
HIGH_RANKS, SLOWER = (16, 32, 64), 4
SCALINGS = (0.5, 2.0, 8.0)
ATTENTION_ONLY = "attention q, v"
WARM_UP = 0.1
HEAD_LEARNING_RATE = 1e-2
# Snippets of each split; validation and test are the same for all seeds, training is drawn by the seed.
TRAIN, VALIDATION = 512, 200


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning. rates: the grid of learning rates that one is chosen from."""

    key: str
    title: str
    rates: tuple[float, ...]


METHODS = {
    method.key: method
    for method in (
        Method("full", "full fine-tuning", (1e-4, 3e-4, 1e-3)),
        Method("lora", "LoRA", (1e-3, 4e-3, 1.6e-2)),
        Method("lorafa", "LoRA-FA", (1e-3, 4e-3, 1.6e-2)),
        Method("lorafa-dropout", f"LoRA-FA, dropout {DROPOUT:g}", (1e-3, 4e-3, 1.6e-2)),
        Method("lorafa-corrected", "LoRA-FA corrected", (1e-3, 4e-3, 1.6e-2)),
    )
}


@dataclass(frozen=True)
class Task:
    """A model adapted to a text. before: the text that it was trained on first, of models of our own."""

    key: str
    model: str
    text: str
    title: str
    before: str | None = None


TASKS = {
    task.key: task
    for task in (
        Task("minilm-movies", "minilm", "movies", "MiniLM, sentiment of movie reviews"),
        Task("minilm-amazon", "minilm", "amazon", "MiniLM, sentiment of product reviews"),
        Task("minilm-nyt", "minilm", "nyt", "MiniLM, sentiment of newspaper editorials"),
        Task("minilm-tweets", "minilm", "tweets", "MiniLM, sentiment of tweets"),
        Task("llama-manual", "llama", "manual", "byte LLaMA, movie reviews to Python's manual", "movies"),
        Task("t5-tweets", "t5", "tweets", "byte T5, movie reviews to tweets", "movies"),
    )
}
SWEEP_TASK = "llama-manual"


@dataclass(frozen=True)
class Sizes:
    """How long a model is trained on a task, and before it. length: tokens or bytes of a snippet; test: how
    many snippets are tested on.
    """

    length: int
    batch: int
    steps: int
    test: int
    pretraining_batch: int = 0
    pretraining_steps: int = 0
    pretraining_rate: float = 0.0


OWN = Sizes(
    length=128,
    batch=8,
    steps=64,
    test=200,
    pretraining_batch=16,
    pretraining_steps=800,
    pretraining_rate=2e-3,
)
SIZES = {"minilm": Sizes(length=32, batch=16, steps=32, test=400), "llama": OWN, "t5": OWN}
LLAMA = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
# Above the 256 bytes: the end, padding, and the sentinels that stand for spans left out.
T5_END, T5_PAD, T5_FIRST_SENTINEL, T5_SPANS, T5_SPAN = 256, 257, 258, 6, 5
T5 = {
    "vocab_size": T5_FIRST_SENTINEL + T5_SPANS,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": T5_PAD,
    "eos_token_id": T5_END,
    "decoder_start_token_id": T5_PAD,
}
