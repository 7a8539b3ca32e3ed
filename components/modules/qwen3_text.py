"""Qwen3 as a text encoder: token ids to the hidden states before its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..loading import load_transformers
from ..masked_text import MaskedText

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
"""A config of a tiny model for tests; its ids are those of the tiny Qwen tokenizer."""


class Qwen3Text(MaskedText):
    """`input_ids, attention_mask (batch, sequence) int64 -> penultimate_hidden_state (batch, sequence, D)`."""

    name = "qwen3-text"
    operations = 15
    config_class = "Qwen3Config"
    output = "penultimate_hidden_state"
    state = -2

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Qwen3Model

        return load_transformers(Qwen3Model, folder, dtype)
