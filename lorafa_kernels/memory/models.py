"""Which model a plan is for: from a config.json or its folder, a name, or a config class with sizes; built
without memory, with the inputs of a training step.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..command_line import MOST_SIZE, MOST_SIZE_TEXT
from ..files import read_json, shown
from .named import NAMED

MOST_CONFIG_BYTES = 2**20
# More layers, experts or the like are typing errors, and each is built.
MOST_MODULES = 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Subject:
    """A model that a plan is for.

    title: what it is, for a reader. build(dtype): returns it in training mode, on the meta device or another;
    it is copied, never run. inputs(model, batch, sequence): of a step, in a list, dict or tuple. step(model,
    inputs): runs forward and returns the loss. uses_sequence: whether the sequence changes a step.
    most_tokens: the longest sequence that the model takes, None without a limit. checkpoints: whether it has
    gradient checkpointing.
    """

    title: str
    build: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[nn.Module, int, int], Any]
    step: Callable[[nn.Module, Any], Tensor]
    uses_sequence: bool = True
    most_tokens: int | None = None
    checkpoints: bool = True


def resolve(text: str, *, padding: bool = False) -> Subject:
    """Return the model that `text` stands for: the path of a config.json or of its folder, a name of NAMED
    (in any case), a config class of transformers; the latter two also as NAME:size=number,size=number.

    padding: whether a step has an attention mask with padding in it.

    Raises ValueError, which lists close names, for what is none of these, and for sizes that no model has;
    OSError for a file that cannot be read; ImportError where transformers is not installed.
    """
    name, _, listed = text.partition(":")
    path = Path(text)
    if path.suffix == ".json" or path.exists() or path.is_symlink() or "/" in text:
        config, model = _config_of_file(path), None
    else:
        config, model = _config_by_name(name, _sizes(listed))
    _check_sizes(config)
    return _subject(config, model, padding)


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the memory planner needs transformers: pip install 'lorafa-kernels[memory]'"
        ) from error
    return transformers


def _config_of_file(path: Path):
    found = read_json(path / "config.json" if path.is_dir() else path, MOST_CONFIG_BYTES)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object, as in a config.json of transformers")
    kind = found.get("model_type")
    known = _transformers().models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"model_type is {shown(kind)}, expected one of transformers'{_close(kind, known)}")
    _check_sizes(found)
    return _made(_transformers().AutoConfig.for_model, found)


def _config_by_name(name: str, sizes: Mapping[str, Any]):
    by_lower = {known.lower(): named for known, named in NAMED.items()}
    named = by_lower.get(name.lower())
    if named is not None:
        kind, model, sizes = named.config, named.model, {**named.sizes, **sizes}
    elif name.endswith("Config") and name.isidentifier() and hasattr(_transformers(), name):
        kind, model = name, None
    else:
        close = _close(name, NAMED) or f": the names are {', '.join(NAMED)}"
        raise ValueError(f"{shown(name)} is no file, no known model and no config class{close}")
    _check_sizes(sizes)
    return _made(getattr(_transformers(), kind), sizes), model


def _made(make: Callable[..., Any], values: Mapping[str, Any]):
    """Return the config that transformers makes of the values. Raises ValueError for what it refuses."""
    with _quiet():
        try:
            return make(**values)
        except Exception as error:
            # What a config class checks, and how it fails unchecked, is its own: most raise no ValueError.
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"transformers makes no config of this: {said}") from error


def _sizes(listed: str) -> dict[str, Any]:
    """Read size=number,size=number."""
    found: dict[str, Any] = {}
    for entry in filter(None, listed.split(",")):
        key, _, value = entry.partition("=")
        if not key.isidentifier() or not value.isascii() or not value.isdigit() or len(value) > 20:
            raise ValueError(f"{shown(entry)}: expected size=number, as in hidden_size=4096")
        found[key] = int(value)
    return found


def _close(name: object, known: Mapping[str, Any]) -> str:
    lower = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(str(name)[:80].lower(), lower, n=5, cutoff=0.5)
    return f". Close names: {', '.join(lower[entry] for entry in near)}" if near else ""


def _check_sizes(config: Any) -> None:
    """Raise ValueError for sizes that no model has; some would never end to be built."""
    sizes = config if isinstance(config, Mapping) else config.to_dict()
    for name, value in sizes.items():
        if isinstance(value, dict) and name.endswith("_config"):
            _check_sizes(value)
        is_count = name.startswith(("num_", "n_")) or "layers" in name
        most = MOST_MODULES if ("layer" in name or "expert" in name or name == "n_layer") else MOST_SIZE
        is_size = is_count or name.endswith(("_size", "_dim", "_ff", "d_model", "d_kv"))
        if not is_size or value is None:
            continue
        if name in _OTHER or (isinstance(value, (list, tuple, dict, str)) and name not in _MAIN):
            continue
        if type(value) is not int or not (1 if name in _MAIN else 0) <= value <= most:
            text = MOST_SIZE_TEXT if most == MOST_SIZE else str(most)
            raise ValueError(f"{name} is {shown(value)}: expected a positive integer, at most {text}")


_MAIN = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "vocab_size", "d_model", "d_ff", "d_kv", "num_layers", "num_heads"),
    }
)
# They bear a name as of a size and are none.
_OTHER = frozenset(
    {
        *("num_return_sequences", "num_beams", "num_beam_groups"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    }
)

# In this order a config without `architectures` is taken for a model of one of these kinds.
_KINDS = (
    ("a sequence-to-sequence model", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("a sequence-to-sequence model", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    ("a classifier", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    ("a classifier", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ("the base model", "MODEL_MAPPING"),
)
_CAUSAL = ("a causal language model", "MODEL_FOR_CAUSAL_LM_MAPPING")


def _model_class(config, asked: str | None) -> tuple[type, str]:
    """Return the class of the model and how it was found, in words."""
    transformers = _transformers()
    listed = [asked] if asked else list(getattr(config, "architectures", None) or ())
    for name in listed:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind, "as its configuration says" if not asked else "by its name"
    mappings = transformers.models.auto.modeling_auto
    # An encoder with a decoder may be listed as a causal model, which is its decoder alone.
    order = _KINDS if getattr(config, "is_encoder_decoder", False) else (_CAUSAL, *_KINDS)
    for what, mapping in order:
        if type(config) in getattr(mappings, mapping):
            kind = getattr(mappings, mapping)[type(config)]
            kind = kind[0] if isinstance(kind, tuple) else kind
            return kind, f"taken as {what}: its config names no architecture"
    raise ValueError(f"transformers has no model for a {type(config).__name__}")


def _subject(config, asked: str | None, padding: bool) -> Subject:
    kind, how = _model_class(config, asked)

    def build(dtype: torch.dtype) -> nn.Module:
        with _quiet(), torch.device("meta"):
            model = kind._from_config(config, dtype=dtype)
        if hasattr(model, "set_experts_implementation"):
            # The loop over experts asks for values.
            with contextlib.suppress(Exception):
                model.set_experts_implementation("grouped_mm")
        return model.train()

    if getattr(config, "is_encoder_decoder", False):
        # From it and the labels the decoder's input is made; which token it is changes no size.
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, 0)
    main = kind.main_input_name
    text = main == "input_ids"
    decoder = getattr(config, "is_encoder_decoder", False)
    return Subject(
        f"{kind.__name__} ({how})",
        build,
        _Inputs(config, kind, padding),
        _run,
        uses_sequence=text or decoder,
        most_tokens=_most_tokens(config, build) if text or decoder else None,
        checkpoints=bool(getattr(kind, "supports_gradient_checkpointing", False)),
    )


def _most_tokens(config, build: Callable[[torch.dtype], nn.Module]) -> int | None:
    """The longest sequence that learned positions have a row for, None without such."""
    if (most := getattr(config, "max_target_positions", None)) is not None:
        return most
    positions = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    if not isinstance(positions, int) or rotary:
        return None
    # RoBERTa's rows begin after that of padding.
    return positions - 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else positions


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with _unpacked():
        output = model(**inputs)
    loss = getattr(output, "loss", None)
    # A base model has none.
    return output[0].float().mean() if loss is None else loss


_LABEL_EACH_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")
_LABEL_EACH_TOKEN += ("ForConditionalGeneration",)


@dataclass(frozen=True)
class _Inputs:
    """Makes the inputs of a step of a model of class `kind`."""

    config: Any
    kind: type
    padding: bool

    def __call__(self, model: nn.Module, batch: int, sequence: int) -> dict[str, Any]:
        config, name, main = self.config, self.kind.__name__, self.kind.main_input_name
        tokens = torch.ones(batch, sequence, dtype=torch.long)
        inputs: dict[str, Any] = {}
        if main == "input_ids":
            inputs["input_ids"] = tokens
            if self.padding:
                inputs["attention_mask"] = torch.ones(batch, sequence, dtype=torch.long)
        elif main == "pixel_values":
            size = config.image_size
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            inputs[main] = torch.zeros(batch, config.num_channels, height, width, dtype=model.dtype)
        elif main == "input_features" and hasattr(config, "num_mel_bins"):
            frames = 2 * config.max_source_positions
            inputs[main] = torch.zeros(batch, config.num_mel_bins, frames, dtype=model.dtype)
        else:
            raise ValueError(f"{name} takes {main}, which the planner cannot make: plan it from Python")
        if name.endswith(_LABEL_EACH_TOKEN):
            inputs["labels"] = tokens
        elif name.endswith(("ForSequenceClassification", "ForImageClassification")):
            inputs["labels"] = torch.zeros(batch, dtype=torch.long)
        elif name.endswith("ForQuestionAnswering"):
            zeros = torch.zeros(batch, dtype=torch.long)
            inputs |= {"start_positions": zeros, "end_positions": zeros.clone()}
        elif getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens.clone()
        if main != "pixel_values" and hasattr(config, "use_cache"):
            inputs["use_cache"] = False
        return inputs


@contextlib.contextmanager
def _unpacked():
    """Positions that stand for one sequence a row, as those that a model makes itself. transformers reads
    their values, and without values takes several sequences to be packed in a row, which needs a mask.
    """
    masks = _transformers().masking_utils
    known = getattr(masks, "find_packed_sequence_indices", None)
    if known is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = known


@contextlib.contextmanager
def _quiet():
    """Without transformers' remarks on what is configured."""
    logging = _transformers().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
