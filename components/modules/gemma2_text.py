"""Gemma 2 as a text encoder: token ids to its last hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..loading import load_transformers
from ..masked_text import MaskedText

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

TINY: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
"""A config of a tiny model for tests; its ids are those of the tiny Gemma tokenizer."""


class Gemma2Text(MaskedText):
    """`input_ids, attention_mask (batch, sequence) int64 -> last_hidden_state (batch, sequence, D)`."""

    name = "gemma2-text"
    operations = 22
    config_class = "Gemma2Config"
    plain_state = True

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Gemma2Model

        return load_transformers(Gemma2Model, folder, dtype)
