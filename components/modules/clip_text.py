"""CLIP's text encoder: token ids to hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..loading import load_transformers
from ..standin import refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner


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
        return _FlatClipText(module)

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


class _FlatClipText(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.module(input_ids)
        return output.last_hidden_state, output.pooler_output


class _ClipTextStandIn:
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, runner: Runner, config: Config) -> None:
        from transformers import CLIPTextConfig

        self.config = CLIPTextConfig(**config)
        self._runner = runner

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,  # noqa: FBT001, FBT002 - Transformers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        options.pop("return_dict", None)
        refuse("text encoder", {"attention_mask": attention_mask, "clip_skip": output_hidden_states, **options})
        return BaseModelOutputWithPooling(**self._runner.run({"input_ids": input_ids.to(torch.int64)}))
