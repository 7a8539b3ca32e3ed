"""The text half of Qwen2.5-VL as a text encoder: token ids to its last hidden states. What sees isn't run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..examples import right_padded
from ..loading import load_transformers
from ..standin import StandIn, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

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
_OUTPUT = "last_hidden_state"


class Qwen25VLText(Component):
    """`input_ids, attention_mask (batch, sequence) int64 -> last_hidden_state (batch, sequence, D)`."""

    name = "qwen2.5-vl-text"
    operations = 9

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (
            Port("input_ids", "int64", ("batch", "sequence")),
            Port("attention_mask", "int64", ("batch", "sequence")),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port(_OUTPUT, "float32", ("batch", "sequence", _text_config(config)["hidden_size"])),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return load_transformers(Qwen2_5_VLForConditionalGeneration, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatText(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = _text_config(config)["vocab_size"]
        ids = torch.randint(words, (sizes.batch, sizes.sequence), generator=generator)
        return {"input_ids": ids, "attention_mask": right_padded(sizes)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from transformers import Qwen2_5_VLConfig

        return _TextStandIn(next(iter(runners.values())), Qwen2_5_VLConfig(**config))


def _text_config(config: Config) -> Config:
    """Return the text model's own config, which older files hold beside the vision's."""
    found: Config = config.get("text_config") or config
    return found


class _FlatText(nn.Module):
    """Runs the language model alone: without pictures its positions are plain ones, and nobody reads the logits."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a Qwen2_5_VLForConditionalGeneration
        super().__init__()
        self.module = module.model.language_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return (output.last_hidden_state,)


class _TextStandIn(StandIn):
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,  # noqa: FBT001, FBT002 - Transformers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return a model output whose `hidden_states[-1]` is there, and no logits."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        options.pop("return_dict", None)
        refuse("text encoder", {"logits (output_hidden_states=False)": not output_hidden_states, **options})
        inputs = {"input_ids": input_ids.to(torch.int64), "attention_mask": attention_mask.to(torch.int64)}
        return BaseModelOutputWithPast(hidden_states=(self._run(**inputs)[_OUTPUT],))
