"""The transformer of Sana, whose attention to itself is linear."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..component import Component, Port, Sizes
from ..examples import right_padded
from ..loading import load_diffusers
from ..standin import StandIn, full_config, refuse
from .pixart_transformer_2d import embed_patches

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (1000.0, 500.0, 20.0)
_EPSILON = 1e-15
"""Diffusers has it in the code of its attention."""
TINY: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "sample_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 64,
}
"""A config of a tiny model for tests."""


class SanaTransformer2D(Component):
    """`hidden_states (batch, C, height, width), encoder_hidden_states, encoder_attention_mask, timestep (batch,)`.

    The mask `(batch, sequence)` has ones where a prompt has tokens.
    """

    name = "sana-transformer-2d"
    operations = 8

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("hidden_states", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["caption_channels"])),
            Port("encoder_attention_mask", "int64", ("batch", "sequence")),
            Port("timestep", "float32", ("batch",), exact=True),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_hidden_states", "float32", ("batch", config["out_channels"], "height", "width")),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        return load_diffusers(SanaTransformer2DModel, folder, dtype, unused=["patch_embed.pos_embed"])

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Rows have prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["encoder_attention_mask"] = right_padded(sizes)
        tensors["timestep"] = torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import SanaTransformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(SanaTransformer2DModel, config))


class _FlatTransformer(nn.Module):
    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a SanaTransformer2DModel
        super().__init__()
        self.module = module
        for block in module.transformer_blocks:
            block.attn1.set_processor(_LinearAttention())
        if module.config.interpolation_scale is not None:
            module.patch_embed.forward = functools.partial(embed_patches, module.patch_embed)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        return self.module(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )


class _LinearAttention:
    """Attention of the image's tokens to themselves, as Diffusers' `SanaLinearAttnProcessor2_0`."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: None) -> Tensor:  # noqa: ANN401 - Diffusers' Attention
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        heads = [tensor.transpose(1, 2).unflatten(1, (attn.heads, -1)).float() for tensor in (query, key, value)]
        attended = linear_attention(heads[0], heads[1], heads[2], _EPSILON).flatten(1, 2).transpose(1, 2)
        output = attended.to(hidden_states.dtype)
        for layer in attn.to_out:
            output = layer(output)
        return output


def linear_attention(query: Tensor, key: Tensor, value: Tensor, epsilon: float) -> Tensor:
    """Attend with rectified queries and keys; all are (batch, heads, D, tokens) float32.

    The ε is a vector of one: ONNX's optimizer drops a scalar as small as this, and pads that see nothing divide 0 by 0.
    """
    counted = F.pad(value, (0, 0, 0, 1), value=1.0)
    attended = counted @ F.relu(key).transpose(-1, -2) @ F.relu(query)
    return attended[:, :, :-1] / (attended[:, :, -1:] + attended.new_full((1,), epsilon))


class _TransformerStandIn(StandIn):
    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        refuse("transformer", options)
        predicted = self._run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask.to(torch.int64),
            timestep=timestep.float(),
        )["out_hidden_states"]
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)
