"""The text half of Qwen2.5-VL as a text encoder: token ids to its last hidden states. What sees isn't run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..loading import load_transformers
from ..masked_text import MaskedText

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ..component import Config

TINY: dict[str, Any] = {
    "text_config": {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    },
}
"""A config of a tiny model for tests; its ids are those of the tiny Qwen tokenizer."""


class Qwen25VLText(MaskedText):
    """`input_ids, attention_mask (batch, sequence) int64 -> last_hidden_state (batch, sequence, D)`."""

    name = "qwen2.5-vl-text"
    operations = 9
    config_class = "Qwen2_5_VLConfig"

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return load_transformers(Qwen2_5_VLForConditionalGeneration, folder, dtype)

    def text_config(self, config: Config) -> Config:
        """Return the text model's own config, which older files hold beside the vision's."""
        found: Config = config.get("text_config") or config
        return found

    def text_model(self, module: Any) -> nn.Module:  # noqa: ANN401 - a Qwen2_5_VLForConditionalGeneration
        """Return the language model: without pictures its positions are plain ones, and nobody reads the logits."""
        found: nn.Module = module.model.language_model
        return found
