"""T5's encoder: token ids to hidden states."""

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
    "vocab_size": 256,
    "d_model": 128,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""A config of a tiny model for tests; its ids are those of the tiny T5 tokenizer."""


class T5Text(Component):
    """`input_ids (batch, sequence) int64 -> last_hidden_state (batch, sequence, D)`, padding attended as SD 3 and FLUX do."""

    name = "t5-text"
    operations = 11

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (Port("input_ids", "int64", ("batch", "sequence")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("last_hidden_state", "float32", ("batch", "sequence", config["d_model"])),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import T5EncoderModel

        return load_transformers(T5EncoderModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatT5Text(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, config["vocab_size"], (sizes.batch, sizes.sequence), generator=generator)
        ids[:, sizes.sequence // 2] = config.get("eos_token_id", 1)
        ids[:, sizes.sequence // 2 + 1 :] = config.get("pad_token_id", 0)
        return {"input_ids": ids}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from transformers import T5Config

        return _T5TextStandIn(next(iter(runners.values())), T5Config(**config))


class T5TextMasked(T5Text):
    """Like `T5Text`, with `attention_mask (batch, sequence) int64`: padding isn't attended, as PixArt wants it."""

    name = "t5-text-masked"
    operations = 11

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (*super().inputs(config), Port("attention_mask", "int64", ("batch", "sequence")))

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        return {**super().example(config, sizes, seed), "attention_mask": right_padded(sizes)}


class _FlatT5Text(nn.Module):
    """Captured with the products of attention spelled out.

    Fused attention leaves its result in an order in memory that Transformers then takes a view of; once ONNX's lowering
    takes that attention apart, the order is another one and the view is refused.
    """

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a T5EncoderModel
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, *attention_mask: Tensor) -> tuple[Tensor]:
        if torch.compiler.is_exporting():
            self.module.set_attn_implementation("eager")
        return (self.module(input_ids, *attention_mask).last_hidden_state,)


class _T5TextStandIn(StandIn):
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:  # noqa: ANN401 - Transformers' own signature
        from transformers.modeling_outputs import BaseModelOutput

        options.pop("return_dict", None)
        inputs = {"input_ids": input_ids.to(torch.int64)}
        if attention_mask is not None and any(port.name == "attention_mask" for port in self._runner.inputs):
            inputs["attention_mask"] = attention_mask.to(torch.int64)
            attention_mask = None
        refuse("text encoder", {"attention_mask": attention_mask, **options})
        return BaseModelOutput(**self._run(**inputs))
