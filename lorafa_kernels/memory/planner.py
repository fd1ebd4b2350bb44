"""memory: how many bytes a training step keeps for backward, from a model's config.json alone.

For models of Llama's kind (RMS norms, attention with or without grouped heads, a gated MLP). All seven linear
layers of each Transformer layer are adapted; SDPA, no padding mask, no dropout. M tokens, b bytes per number,
sizes H hidden, I intermediate, D and D_kv of all query and of all key heads. Kept by one Transformer layer:

    norms      2 · M·H·b + 2 · 4 M             their inputs and 1/rms; written with autograd 2 · (4 M·H + 4 M)
    attention  2 · M·D·b + 2 · M·D_kv·b + 4 M·heads    q, its output, k, v, logsumexp
    MLP        2 · M·I·b                       gate and up; written with autograd 3 · M·I·b
    z          7 · M·R·b
    inputs     of the adapted layers, where lora_A is trained and nothing else keeps them

Kept once per model: the last norm, the logits' log-softmax in fp32, the targets, the positions' cosine and
sine. The first norm keeps nothing: its input needs no gradient. The tests compare these formulas with the
bytes that transformers' layers and models keep.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..command_line import MOST_SIZE, MOST_SIZE_TEXT, USAGE_ERROR, brief, count, one_line
from ..files import read_json, shown

# Models whose layers keep nothing beside what the formulas above count.
MODEL_TYPES = ("llama", "mistral", "qwen2")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
METHODS = {
    "lorafa": "LoRA-FA by apply_lorafa (this library)",
    "lorafa-layers": "LoRA-FA by apply_lorafa(fuse=False, norm=False), or in plain PyTorch",
    "lora": "LoRA, adapters in the model's dtype",
    "peft": "LoRA, fp32 adapters (PEFT's default)",
}
LINEARS = 7
MOST_CONFIG_BYTES = 2**20
MOST_GIB = 1 << 30


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model of Llama's kind, named as in its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping) -> ModelSizes:
        """Read the sizes off a config.json of transformers.

        Raises ValueError for a model of another kind, and for a size that is missing, not positive or absurd.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type is {shown(kind)}, expected one of {', '.join(MODEL_TYPES)}")
        found = dict(config)
        heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
        if not found.get("num_key_value_heads"):
            found["num_key_value_heads"] = heads
        if not found.get("head_dim") and _positive(heads) and _positive(hidden):
            found["head_dim"] = hidden // heads
        names = [name for name in cls.__annotations__ if name != "tie_word_embeddings"]
        if wrong := [name for name in names if not _positive(found.get(name))]:
            # These two are optional: where they are left out they follow from sizes that are listed then.
            derived = {"num_key_value_heads", "head_dim"} - config.keys()
            listed = ", ".join(
                f"{name} is {shown(found[name])}" if name in found else f"{name} is missing"
                for name in [name for name in wrong if name not in derived] or wrong
            )
            raise ValueError(f"{listed}: expected a positive integer, at most {MOST_SIZE_TEXT}")
        if heads % found["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads, which is "
                f"{found['num_key_value_heads']}"
            )
        return cls(*(found[name] for name in names), bool(found.get("tie_word_embeddings")))

    def linears(self) -> list[tuple[int, int]]:
        """Return (out_features, in_features) of a layer's seven linear layers."""
        wide, narrow = (
            heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        H, I = self.hidden_size, self.intermediate_size  # noqa: E741
        return [(wide, H), (narrow, H), (narrow, H), (H, wide), (I, H), (I, H), (H, I)]


@dataclass(frozen=True)
class Step:
    """One training step: `batch` sequences of `sequence` tokens, adapters of rank `rank`, a model in `dtype`
    (a key of ITEMSIZE), with or without gradient checkpointing of every Transformer layer.
    """

    batch: int
    sequence: int
    rank: int = 16
    dtype: str = "bf16"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def layer_bytes(sizes: ModelSizes, step: Step, method: str) -> dict[str, int]:
    """Return {part: bytes} that one Transformer layer keeps for backward with a method of METHODS. The
    layer's input counts here, not as the output of the layer before: both are one storage.
    """
    M, b = step.tokens, ITEMSIZE[step.dtype]
    H, I = sizes.hidden_size, sizes.intermediate_size  # noqa: E741
    if step.checkpointing:
        return {"input": M * H * b}
    wide, narrow = (
        heads * sizes.head_dim for heads in (sizes.num_attention_heads, sizes.num_key_value_heads)
    )
    fused = method == "lorafa"
    found = {
        "norms": 2 * _norm_bytes(sizes, step, fused),
        "attention": 2 * M * (wide + narrow) * b + 4 * M * sizes.num_attention_heads,
        "MLP": (2 if fused else 3) * M * I * b,
        "z": LINEARS * M * step.rank * b,
    }
    if method == "lora":
        # q, k, v share one input, gate and up another; the input of o counts as attention's output.
        found["inputs"] = M * (2 * H + I) * b
    if method == "peft":
        found["z"] = LINEARS * M * step.rank * 4
        # PEFT casts the input to fp32 for each adapted layer; an fp32 input is not copied.
        casts = 5 * H + wide + I
        found["inputs"] = M * (casts if b < 4 else 2 * H + I) * 4
    return found


def _norm_bytes(sizes: ModelSizes, step: Step, fused: bool) -> int:
    return step.tokens * (sizes.hidden_size * (ITEMSIZE[step.dtype] if fused else 4) + 4)


def model_bytes(sizes: ModelSizes, step: Step, method: str) -> int:
    """Return the bytes that a causal model with its loss keeps for backward."""
    M, b = step.tokens, ITEMSIZE[step.dtype]
    layers = sizes.num_hidden_layers * sum(layer_bytes(sizes, step, method).values())
    fused = method == "lorafa"
    last_norm = _norm_bytes(sizes, step, fused)
    loss = M * sizes.vocab_size * 4 + M * 8 + 4
    positions = 2 * step.sequence * sizes.head_dim * b
    first_norm = 0 if step.checkpointing else last_norm
    return layers - first_norm + last_norm + loss + positions


def fixed_bytes(sizes: ModelSizes, step: Step, method: str) -> int:
    """Return the bytes of the weights, the adapters, their gradients and AdamW's two fp32 moments."""
    weights = sum(n * k for n, k in sizes.linears()) + 2 * sizes.hidden_size
    embeddings = (1 if sizes.tie_word_embeddings else 2) * sizes.vocab_size * sizes.hidden_size
    total = sizes.num_hidden_layers * weights + embeddings + sizes.hidden_size
    A = sizes.num_hidden_layers * step.rank * sum(k for _, k in sizes.linears())
    B = sizes.num_hidden_layers * step.rank * sum(n for n, _ in sizes.linears())
    b = ITEMSIZE[step.dtype]
    if method == "lora":
        adapters, itemsize = A + B, b
    elif method == "peft":
        adapters, itemsize = A + B, 4
    else:
        adapters, itemsize = B, 4
    frozen = total + (0 if method in ("lora", "peft") else A)
    # The moments have the adapters' dtype.
    return frozen * b + adapters * 4 * itemsize


def least_peak(sizes: ModelSizes, step: Step, method: str) -> int:
    """Return the bytes that are certainly allocated at the end of forward: fixed_bytes, model_bytes, the
    logits, and the fp32 copy of them that the loss reads.
    """
    logits = step.tokens * sizes.vocab_size * (ITEMSIZE[step.dtype] + 4)
    return fixed_bytes(sizes, step, method) + model_bytes(sizes, step, method) + logits


def most_batch(sizes: ModelSizes, step: Step, method: str, memory: int) -> int:
    """Return the largest batch whose least_peak fits into `memory` bytes. It is an upper bound: temporaries
    and fragmentation can make the real limit smaller.
    """
    one, two = (least_peak(sizes, replace(step, batch=batch), method) for batch in (1, 2))
    # least_peak is linear in the batch.
    return 0 if memory < one else 1 + (memory - one) // (two - one)


def add_command(subparsers) -> None:
    """Add the command `memory` to argparse's `subparsers`, and `plan`, which was its name until 0.1."""
    text = (
        "Compute the memory of a training step from a model's config.json, with LoRA and with LoRA-FA on all "
        "linear layers: the activations kept for backward, without and with gradient checkpointing, and the "
        f"weights, adapters, gradients and AdamW states. For model_type {', '.join(MODEL_TYPES)}. Needs no "
        "GPU and no weights."
    )
    parser = subparsers.add_parser(
        "memory", help="compute the memory of a training step from a model's config.json", description=text
    )
    _add_arguments(parser)
    parser.set_defaults(run=run)
    old = subparsers.add_parser("plan", description=f"{text} `plan` is the old name of `memory`.")
    _add_arguments(old)
    old.set_defaults(run=_run_by_old_name)


def _run_by_old_name(options: argparse.Namespace) -> int:
    print("plan is now called memory; the next release removes the old name", file=sys.stderr)
    return run(options)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a model's config.json, or its folder")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="sequences per step (default: 1)")
    parser.add_argument(
        "--sequence", type=count, default=2048, metavar="N", help="tokens per sequence (default: 2048)"
    )
    parser.add_argument(
        "--rank", type=count, default=16, metavar="R", help="rank of the adapters (default: 16)"
    )
    parser.add_argument(
        "--dtype", choices=ITEMSIZE, default="bf16", help="dtype of the model (default: bf16)"
    )
    parser.add_argument(
        "--memory",
        type=_gib,
        metavar="GIB",
        help="also print the largest batch that this much GPU memory can hold (default: do not)",
    )


def run(options: argparse.Namespace) -> int:
    """Print what the step takes; return 0, or 2 where the configuration cannot be read."""
    path = options.config
    try:
        if path.is_dir():
            path = path / "config.json"
        config = read_json(path, MOST_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object, as in a config.json of transformers")
        sizes = ModelSizes.from_config(config)
    except (OSError, ValueError) as error:
        # str() of an OSError would repeat the file's name.
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(one_line(f"memory: {path}: {text}"), file=sys.stderr)
        return USAGE_ERROR
    print("\n".join(lines_of(sizes, options)))
    return 0


def lines_of(sizes: ModelSizes, options: argparse.Namespace) -> list[str]:
    """Return what a step takes, as lines of text."""
    step = Step(options.batch, options.sequence, options.rank, options.dtype)
    unit = step.tokens * sizes.hidden_size * ITEMSIZE[step.dtype]
    heads = f"{sizes.num_attention_heads} heads ({sizes.num_key_value_heads} for k and v)"
    lines = [
        f"model: {sizes.num_hidden_layers} layers, hidden {sizes.hidden_size}, intermediate "
        f"{sizes.intermediate_size}, {heads}, vocabulary {sizes.vocab_size}",
        f"step: {step.batch} x {step.sequence} tokens, rank {step.rank}, {step.dtype}",
        f"unit: one hidden state (tokens x hidden numbers) is {_gib_text(unit)}",
    ]
    for method, title in METHODS.items():
        fixed = _gib_text(fixed_bytes(sizes, step, method))
        lines += ["", title, f"  weights, adapters, their gradients, AdamW: {fixed}"]
        for name, checkpointing in (("", False), (", with gradient checkpointing", True)):
            own = replace(step, checkpointing=checkpointing)
            parts = layer_bytes(sizes, own, method)
            named = ", ".join(f"{part} {kept / unit:.4g}" for part, kept in parts.items())
            lines += [
                f"  kept for backward{name}: {_gib_text(model_bytes(sizes, own, method))}",
                f"    each layer, in hidden states: {sum(parts.values()) / unit:.4g} ({named})",
            ]
            if options.memory:
                most = most_batch(sizes, own, method, options.memory)
                fits = f"at most {most} sequences fit" if most > 1 else "at most 1 sequence fits"
                fits = fits if most else "not even 1 sequence fits"
                lines.append(f"    batch: {fits} in {_gib_text(options.memory)}")
    if options.memory:
        lines += [
            "",
            "The batch is an upper bound. It counts all of the above, the logits and the loss's fp32 copy of",
            "them; temporaries and memory fragmentation are not counted.",
        ]
    return lines


def _gib_text(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_SIZE


def _gib(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_GIB:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number of GiB above 0, at most {MOST_GIB}")
    # Even where that is less than a byte it is an amount that was given.
    return max(1, round(value * 2**30))
