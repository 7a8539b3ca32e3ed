"""The transformer of PixArt, Alpha and Sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..examples import right_padded
from ..loading import load_diffusers
from ..standin import StandIn, full_config, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (999.0, 500.0, 20.0)
_SIZE_CONDITIONS_AT = 128
_DISCARDED = -10000.0
"""What is added to the attention scores of padding, as in Diffusers."""
TINY: dict[str, Any] = {
    "sample_size": 32,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "cross_attention_dim": 48,
    "caption_channels": 128,
    "use_additional_conditions": False,
}
"""A config of a tiny model for tests, as Sigma's: without sizes as conditions."""
TINY_WITH_SIZES: dict[str, Any] = {**TINY, "sample_size": 128, "use_additional_conditions": True}
"""The same with them, as Alpha's of 1024 pixels."""


def _takes_sizes(config: Config) -> bool:
    said: bool | None = config.get("use_additional_conditions")
    return config["sample_size"] == _SIZE_CONDITIONS_AT if said is None else said


class PixArtTransformer2D(Component):
    """`hidden_states (batch, C, height, width), encoder_hidden_states, encoder_attention_mask, timestep (batch,)`.

    The mask `(batch, sequence)` has ones where a prompt has tokens. Alpha's model of 1024 pixels takes
    `resolution (batch, 2), aspect_ratio (batch, 1)` as well: height and width in pixels, and the one over the other.
    """

    name = "pixart-transformer-2d"
    operations = 8

    def inputs(self, config: Config) -> tuple[Port, ...]:
        sizes = (
            Port("resolution", "float32", ("batch", 2), exact=True),
            Port("aspect_ratio", "float32", ("batch", 1), exact=True),
        )
        return (
            Port("hidden_states", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["caption_channels"])),
            Port("encoder_attention_mask", "int64", ("batch", "sequence")),
            Port("timestep", "float32", ("batch",), exact=True),
            *(sizes if _takes_sizes(config) else ()),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_hidden_states", "float32", ("batch", config["out_channels"], "height", "width")),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        return load_diffusers(PixArtTransformer2DModel, folder, dtype, unused=["pos_embed.pos_embed"])

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Rows have prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["encoder_attention_mask"] = right_padded(sizes)
        tensors["timestep"] = torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        if "resolution" in tensors:
            height, width = 8.0 * sizes.height, 8.0 * sizes.width
            tensors["resolution"] = torch.tensor([height, width]).repeat(sizes.batch, 1)
            tensors["aspect_ratio"] = torch.tensor([height / width]).repeat(sizes.batch, 1)
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import PixArtTransformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(PixArtTransformer2DModel, config))


class _FlatTransformer(nn.Module):
    """Diffusers' own modules in their own order.

    Its forward drops a dimension that isn't there, which backends refuse, and has a table of positions for one size.
    """

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a PixArtTransformer2DModel
        super().__init__()
        self.module = module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        *sizes: Tensor,
    ) -> tuple[Tensor]:
        module, patch = self.module, self.module.config.patch_size
        batch, _, height, width = hidden_states.shape
        rows, columns = height // patch, width // patch
        tokens = embed_patches(module.pos_embed, hidden_states)
        conditions = dict(zip(("resolution", "aspect_ratio"), sizes, strict=True)) if sizes else None
        modulation, time = module.adaln_single(timestep, conditions, batch_size=batch, hidden_dtype=tokens.dtype)
        caption = module.caption_projection(encoder_hidden_states)
        bias = ((1 - encoder_attention_mask.to(tokens.dtype)) * _DISCARDED).unsqueeze(1)
        for block in module.transformer_blocks:
            tokens = _through(block, tokens, modulation.reshape(batch, 6, -1), caption, bias)
        shift, scale = (module.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
        patches = module.proj_out(module.norm_out(tokens) * (1 + scale) + shift)
        patches = patches.reshape(batch, rows, columns, patch, patch, module.out_channels)
        return (patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, module.out_channels, height, width),)


def embed_patches(embed: Any, latents: Tensor) -> Tensor:  # noqa: ANN401 - Diffusers' PatchEmbed
    """Return tokens (batch, rows * columns, D) of latents (batch, C, height, width), with their places added.

    Places are sines and cosines of the column, then of the row, computed for any size: Diffusers has a table for one,
    which isn't in the checkpoint.
    """
    tokens = embed.proj(latents)
    rows, columns = tokens.shape[2:]
    down = _sinusoids(embed, rows, latents.device)[:, None].expand(-1, columns, -1)
    across = _sinusoids(embed, columns, latents.device)[None].expand(rows, -1, -1)
    places = torch.cat([across, down], dim=-1).flatten(0, 1)[None]
    return (tokens.flatten(2).transpose(1, 2) + places).to(tokens.dtype)


def _sinusoids(embed: Any, count: int, device: torch.device) -> Tensor:  # noqa: ANN401
    """Return (count, D/2) float32, computed in float64 as Diffusers does; places are scaled to the trained size."""
    from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

    index = torch.arange(count, device=device, dtype=torch.float32)
    counted = index[-1:] + 1  # `count` as a tensor, which OpenVINO can divide
    places = index / (counted / embed.base_size) / embed.interpolation_scale
    return get_1d_sincos_pos_embed_from_grid(embed.proj.out_channels // 2, places, output_type="pt").float()


def _through(block: Any, tokens: Tensor, modulation: Tensor, caption: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401 - a BasicTransformerBlock
    """Run a block: attention to itself, to the caption, and the feed-forward, the first and last with shift and gate."""
    modulated = (block.scale_shift_table[None] + modulation).chunk(6, dim=1)
    shift, scale, gate, shift_forward, scale_forward, gate_forward = modulated
    tokens = gate * block.attn1(block.norm1(tokens) * (1 + scale) + shift) + tokens
    tokens = block.attn2(tokens, encoder_hidden_states=caption, attention_mask=bias) + tokens
    return gate_forward * block.ff(block.norm2(tokens) * (1 + scale_forward) + shift_forward) + tokens


class _TransformerStandIn(StandIn):
    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep: Tensor,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        refuse("transformer", options)
        sizes = dict(added_cond_kwargs or {}) if _takes_sizes(self.config) else {}
        predicted = self._run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask.to(torch.int64),
            timestep=timestep.float(),
            **sizes,
        )["out_hidden_states"]
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)
