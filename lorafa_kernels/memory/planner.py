"""memory: how much a step of training keeps for backward, before there is a model.

For models of Llama's kind (RMS norms, attention with or without grouped heads, a gated MLP), all seven linear
layers of each of L layers adapted, SDPA, no mask of padding and no dropout. M tokens, b bytes a number:

    norms      2 · M·H·b + 2 · 4 M             their inputs and 1/rms; written with autograd 2 · (4 M·H + 4 M)
    attention  2 · M·D·b + 2 · M·D_kv·b + 4 M·heads    q, its output, k, v, logsumexp
    MLP        2 · M·I·b                       gate and up; written with autograd 3 · M·I·b
    z          7 · M·R·b
    inputs     of the adapted layers, where lora_A is trained and nothing else keeps them

and once for the model the last norm, the logits' log-softmax in fp32, the targets and the positions' cosine
and sine; the first norm's input needs no gradient. The tests hold this to the bytes that transformers' layers
and model keep.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..command_line import MOST_SIZE, USAGE_ERROR, brief, count, one_line
from ..files import read_json, shown

# Whose layers have nothing else that is kept.
MODEL_TYPES = ("llama", "mistral", "qwen2")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
METHODS = {
    "lorafa": "apply_lorafa",
    "lorafa-layers": "apply_lorafa(fuse=False, norm=False), or LoRA-FA in plain PyTorch",
    "lora": "LoRA",
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
            listed = ", ".join(f"{name} is {shown(found.get(name))}" for name in wrong)
            raise ValueError(f"{listed}: expected a positive integer, at most {MOST_SIZE}")
        if heads % found["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads is {heads}, no multiple of num_key_value_heads, which is "
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
    """A step of training: batch × sequence tokens, adapters of rank `rank`, the model's dtype a key of
    ITEMSIZE, with or without gradient checkpointing of every layer.
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
    """Return by name the bytes that one layer keeps for backward, with a method of METHODS. Its input counts
    where it is kept; it is the same storage as the layer's before.
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
        # q, k and v have one input, gate and up another; that of o is what attention returns.
        found["inputs"] = M * (2 * H + I) * b
    if method == "peft":
        found["z"] = LINEARS * M * step.rank * 4
        # A cast of it for each layer; to fp32 there is nothing to cast.
        casts = 5 * H + wide + I
        found["inputs"] = M * (casts if b < 4 else 2 * H + I) * 4
    return found


def _norm_bytes(sizes: ModelSizes, step: Step, fused: bool) -> int:
    return step.tokens * (sizes.hidden_size * (ITEMSIZE[step.dtype] if fused else 4) + 4)


def model_bytes(sizes: ModelSizes, step: Step, method: str) -> int:
    """Return the bytes that forward keeps for backward in a whole causal model with its loss."""
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
    """Return what is certainly allocated at the end of forward: what is kept and what is fixed, the logits,
    and the fp32 copy of them that the loss reads.
    """
    logits = step.tokens * sizes.vocab_size * (ITEMSIZE[step.dtype] + 4)
    return fixed_bytes(sizes, step, method) + model_bytes(sizes, step, method) + logits


def most_batch(sizes: ModelSizes, step: Step, method: str, memory: int) -> int:
    """Return the largest batch whose least_peak fits into `memory` bytes: no larger one can, and it may be
    less, by temporaries and fragments.
    """
    one, two = (least_peak(sizes, replace(step, batch=batch), method) for batch in (1, 2))
    # Every further sequence takes the same.
    return 0 if memory < one else 1 + (memory - one) // (two - one)


def add_command(subparsers) -> None:
    """Add the command `memory` to argparse's `subparsers`, and `plan`, which was its name until 0.1."""
    text = (
        "Print how many bytes of activations a step of training keeps for backward with LoRA and "
        "LoRA-FA on all linear layers, without and with gradient checkpointing, and what weights, adapters "
        f"and AdamW take. For models of Llama's kind: {', '.join(MODEL_TYPES)}. Needs no GPU and no weights."
    )
    parser = subparsers.add_parser(
        "memory", help="how much a step of training keeps for backward, for a config.json", description=text
    )
    _add_arguments(parser)
    parser.set_defaults(run=run)
    old = subparsers.add_parser("plan", description=f"{text} The same as `memory`, which is its name now.")
    _add_arguments(old)
    old.set_defaults(run=_run_by_old_name)


def _run_by_old_name(options: argparse.Namespace) -> int:
    print("plan is now called memory: the old name goes with the next release", file=sys.stderr)
    return run(options)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a model's config.json, or its folder")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="sequences a step (default: 1)")
    parser.add_argument(
        "--sequence", type=count, default=2048, metavar="N", help="tokens each (default: 2048)"
    )
    parser.add_argument("--rank", type=count, default=16, metavar="R", help="of the adapters (default: 16)")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="bf16", help="of the model (default: bf16)")
    parser.add_argument(
        "--memory", type=_gib, metavar="GIB", help="say which batch this much holds at most (default: none)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 0, or 2 where the configuration cannot be read."""
    path = options.config
    try:
        if path.is_dir():
            path = path / "config.json"
        config = read_json(path, MOST_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
        sizes = ModelSizes.from_config(config)
    except (OSError, ValueError) as error:
        # An OSError names the file itself, at the end.
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(one_line(f"memory: {path}: {text}"), file=sys.stderr)
        return USAGE_ERROR
    print("\n".join(lines_of(sizes, options)))
    return 0


def lines_of(sizes: ModelSizes, options: argparse.Namespace) -> list[str]:
    """Return the plan as lines of text."""
    step = Step(options.batch, options.sequence, options.rank, options.dtype)
    unit = step.tokens * sizes.hidden_size * ITEMSIZE[step.dtype]
    heads = f"{sizes.num_attention_heads} heads ({sizes.num_key_value_heads} of k and v)"
    lines = [
        f"{sizes.num_hidden_layers} layers of hidden {sizes.hidden_size}, intermediate "
        f"{sizes.intermediate_size}, {heads}, vocabulary {sizes.vocab_size}",
        f"{step.batch} x {step.sequence} tokens, R = {step.rank}, {step.dtype}; one hidden state: "
        f"{_gib_text(unit)}",
    ]
    for method, title in METHODS.items():
        fixed = _gib_text(fixed_bytes(sizes, step, method))
        lines += ["", title, f"  weights, adapters, AdamW: {fixed}"]
        for name, checkpointing in (("kept", False), ("kept with checkpointing", True)):
            own = replace(step, checkpointing=checkpointing)
            parts = layer_bytes(sizes, own, method)
            named = ", ".join(f"{part} {kept / unit:.4g}" for part, kept in parts.items())
            lines += [
                f"  {name}: {_gib_text(model_bytes(sizes, own, method))}",
                f"    a layer, in hidden states: {sum(parts.values()) / unit:.4g} ({named})",
            ]
            if options.memory:
                most = most_batch(sizes, own, method, options.memory)
                lines.append(
                    f"    batch: {f'at most {most}' if most else 'not even 1'} in {_gib_text(options.memory)}"
                )
    return [
        *lines,
        "",
        "A batch counts what is fixed and kept, the logits, and the loss's fp32 copy of them; temporaries",
        "and fragments come on top.",
    ]


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
