"""Qwen3 as a text encoder: token ids to the hidden states before its last layer."""

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
_OUTPUT = "penultimate_hidden_state"


class Qwen3Text(Component):
    """`input_ids, attention_mask (batch, sequence) int64 -> penultimate_hidden_state (batch, sequence, D)`."""

    name = "qwen3-text"
    operations = 15

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (
            Port("input_ids", "int64", ("batch", "sequence")),
            Port("attention_mask", "int64", ("batch", "sequence")),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port(_OUTPUT, "float32", ("batch", "sequence", config["hidden_size"])),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import Qwen3Model

        return load_transformers(Qwen3Model, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatQwen3Text(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Rows are of different lengths, padded on the right, as the tokenizer does."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config["vocab_size"], (sizes.batch, sizes.sequence), generator=generator)
        return {"input_ids": ids, "attention_mask": right_padded(sizes)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from transformers import Qwen3Config

        return _Qwen3TextStandIn(next(iter(runners.values())), Qwen3Config(**config))


class _FlatQwen3Text(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        output = self.module(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False
        )
        return (output.hidden_states[-2],)


class _Qwen3TextStandIn(StandIn):
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,  # noqa: FBT001, FBT002 - Transformers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return a model output whose `hidden_states[-2]` is there; the last layer isn't exported."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        options.pop("return_dict", None)
        refuse("text encoder", {"plain last hidden state": not output_hidden_states, **options})
        state = self._run(input_ids=input_ids.to(torch.int64), attention_mask=attention_mask.to(torch.int64))[_OUTPUT]
        return BaseModelOutputWithPast(hidden_states=(state, None))
