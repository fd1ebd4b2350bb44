"""Fields of PEFT 0.21's `LoraConfig` that choose no layer and no mathematics: kept, and written back. Those
that would change the mathematics may have their default alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from ..nn.linear import shown
from ..operands import FLOAT_DTYPES

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Fields of later or earlier versions of PEFT that say nothing about the computation; read, and not kept.
INFORMATIVE = frozenset({"peft_type", "peft_version", "runtime_config"})
# Not of PEFT, and of training alone: it is no part of a file.
OWN_FIELDS = frozenset({"adapter_dtype"})


@dataclass(frozen=True, kw_only=True)
class FurtherFields:
    """The fields of LoRAFAConfig beside those that say which layers are adapted, and how.

    Kept and written back: task_type, one of PEFT's; base_model_name_or_path, revision, auto_mapping,
    inference_mode; fan_in_fan_out, which the layers know themselves; the settings of initialisations, of
    quantisation and of Megatron that PEFT writes whether they are used or not.

    adapter_dtype: dtype of the trained lora_B, fp32 unless given; PEFT's `autocast_adapter_dtype`. Not saved.

    The rest is PEFT's and changes the mathematics: only the default is accepted.
    """

    task_type: str | None = None
    bias: str = "none"
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    fan_in_fan_out: bool = False
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = 16
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None

    adapter_dtype: torch.dtype = torch.float32

    use_dora: InitVar[bool] = False
    use_qalora: InitVar[bool] = False
    lora_bias: InitVar[bool] = False
    use_bdlora: InitVar[Any] = None
    megatron_config: InitVar[Any] = None
    trainable_token_indices: InitVar[Any] = None
    layer_replication: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    alora_invocation_tokens: InitVar[Any] = None
    velora_config: InitVar[Any] = None
    monteclora_config: InitVar[Any] = None
    arrow_config: InitVar[Any] = None
    kasa_config: InitVar[Any] = None
    ensure_weight_tying: InitVar[bool] = False

    def check_further(self, unsupported: Iterable[Any]) -> None:
        """Raise ValueError, naming it, for a field out of its range. unsupported: values of UNSUPPORTED."""
        for name, value in zip(UNSUPPORTED, unsupported, strict=True):
            if value is not None and value is not False and value != [] and value != {}:
                raise ValueError(
                    f"{name}={shown(value)} is not supported by lorafa_kernels: leave it out, or keep the "
                    "model in PEFT"
                )
        if self.bias != "none":
            raise ValueError(f'bias={shown(self.bias)} is not supported: LoRA-FA trains no bias, "none" only')
        # PEFT's is an enumeration of str.
        task = getattr(self.task_type, "value", self.task_type)
        if task is not None and task not in TASK_TYPES:
            raise ValueError(f"task_type must be None or one of {', '.join(TASK_TYPES)}, got {shown(task)}")
        object.__setattr__(self, "task_type", task)
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a str or None, got {shown(value)}")
        for name in ("inference_mode", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        if self.adapter_dtype not in FLOAT_DTYPES:
            names = ", ".join(map(str, FLOAT_DTYPES))
            raise ValueError(f"adapter_dtype must be one of {names}, got {shown(self.adapter_dtype)}")


UNSUPPORTED = tuple(
    name for name, kind in FurtherFields.__annotations__.items() if str(kind).startswith("InitVar")
)
