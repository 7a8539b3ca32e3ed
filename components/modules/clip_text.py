"""CLIP's text encoder, with or without its projection: token ids to hidden states and a pooled embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..loading import load_transformers
from ..standin import StandIn, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

TINY: dict[str, Any] = {
    "vocab_size": 514,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""A config of a tiny model for tests; its ids are those of the tiny CLIP tokenizer."""


class ClipText(Component):
    """`input_ids (batch, sequence) int64 -> last_hidden_state (batch, sequence, D), pooler_output (batch, D)`."""

    name = "clip-text"

    def inputs(self, config: Config) -> tuple[Port, ...]:  # noqa: ARG002
        return (Port("input_ids", "int64", ("batch", "sequence")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        width = config["hidden_size"]
        return (
            Port("last_hidden_state", "float32", ("batch", "sequence", width)),
            Port("pooler_output", "float32", ("batch", width)),
        )

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import CLIPTextModel

        return load_transformers(CLIPTextModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatClipText(module, ("last_hidden_state", "pooler_output"))

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config["vocab_size"], (sizes.batch, sizes.sequence), generator=generator)
        ids[:, 0] = config.get("bos_token_id", 0)
        ids[:, sizes.sequence // 2 :] = config.get("eos_token_id", 1)
        return {"input_ids": ids}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _ClipTextStandIn(next(iter(runners.values())), config)

    def limit(self, config: Config, sizes: Sizes) -> Sizes:
        longest = config.get("max_position_embeddings", 77)
        return Sizes(sizes.batch, sizes.height, sizes.width, min(sizes.sequence, longest))


class ClipTextHidden(ClipText):
    """Like `ClipText`, with the hidden states as well: `hidden_states.0` (the embeddings) to the last layer's."""

    name = "clip-text-hidden"

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (*super().outputs(config), *_hidden_states(config))

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatClipText(module, ("last_hidden_state", "pooler_output"), hidden_states=True)


class ClipTextProjection(ClipText):
    """`input_ids -> text_embeds (batch, P), last_hidden_state (batch, sequence, D), hidden_states.0, …`."""

    name = "clip-text-projection"

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("text_embeds", "float32", ("batch", config["projection_dim"])),
            Port("last_hidden_state", "float32", ("batch", "sequence", config["hidden_size"])),
            *_hidden_states(config),
        )

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return load_transformers(CLIPTextModelWithProjection, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatClipText(module, ("text_embeds", "last_hidden_state"), hidden_states=True)

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _ClipTextProjectionStandIn(next(iter(runners.values())), config)


def _hidden_states(config: Config) -> tuple[Port, ...]:
    dims = ("batch", "sequence", config["hidden_size"])
    return tuple(Port(f"hidden_states.{i}", "float32", dims) for i in range(config["num_hidden_layers"] + 1))


class _FlatClipText(nn.Module):
    def __init__(self, module: nn.Module, names: tuple[str, ...], *, hidden_states: bool = False) -> None:
        super().__init__()
        self.module = module
        self._names = names
        self._hidden_states = hidden_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.module(input_ids, output_hidden_states=self._hidden_states)
        return (*(output[name] for name in self._names), *(output.hidden_states or ()))


class _ClipTextStandIn(StandIn):
    def __init__(self, runner: Runner, config: Config) -> None:
        from transformers import CLIPTextConfig

        super().__init__(runner, CLIPTextConfig(**config))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,  # noqa: FBT001, FBT002 - Transformers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        options.pop("return_dict", None)
        results = self._run(input_ids=input_ids.to(torch.int64))
        states = [results.pop(name) for name in sorted(results, key=_layer) if name.startswith("hidden_states.")]
        unknown_states = output_hidden_states and not states
        refuse("text encoder", {"attention_mask": attention_mask, "clip_skip": unknown_states, **options})
        return self._model_output()(**results, hidden_states=tuple(states) or None)

    def _model_output(self) -> Any:  # noqa: ANN401
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling


class _ClipTextProjectionStandIn(_ClipTextStandIn):
    def _model_output(self) -> Any:  # noqa: ANN401
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        return CLIPTextModelOutput


def _layer(name: str) -> int:
    return int(name.rpartition(".")[2]) if name.startswith("hidden_states.") else -1
