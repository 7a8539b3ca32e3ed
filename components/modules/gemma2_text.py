"""Gemma 2 as a text encoder: token ids to its last hidden states."""

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
_OUTPUT = "last_hidden_state"


class Gemma2Text(Component):
    """`input_ids, attention_mask (batch, sequence) int64 -> last_hidden_state (batch, sequence, D)`."""

    name = "gemma2-text"
    operations = 22

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (
            Port("input_ids", "int64", ("batch", "sequence")),
            Port("attention_mask", "int64", ("batch", "sequence")),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port(_OUTPUT, "float32", ("batch", "sequence", config["hidden_size"])),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Gemma2Model

        return load_transformers(Gemma2Model, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatGemma2Text(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config["vocab_size"], (sizes.batch, sizes.sequence), generator=generator)
        return {"input_ids": ids, "attention_mask": right_padded(sizes)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from transformers import Gemma2Config

        return _Gemma2TextStandIn(next(iter(runners.values())), Gemma2Config(**config))


class _FlatGemma2Text(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.module(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state,)


class _Gemma2TextStandIn(StandIn):
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:  # noqa: ANN401 - Transformers' own signature
        from transformers.modeling_outputs import BaseModelOutputWithPast

        options.pop("return_dict", None)
        refuse("text encoder", options)
        inputs = {"input_ids": input_ids.to(torch.int64), "attention_mask": attention_mask.to(torch.int64)}
        return BaseModelOutputWithPast(**self._run(**inputs))
