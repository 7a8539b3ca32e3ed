"""The transformer of Z-Image, written anew on whole batches.

Diffusers' own forward takes lists, splits them by their lengths and turns complex numbers, none of which can be
captured. This one computes the same with the same modules and weights: each row's image tokens, then its caption's,
each padded to a multiple of 32 with a learned token; a row's shorter caption is masked in the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ...errors import InputError
from ..component import Component, Port, Sizes
from ..examples import right_padded
from ..loading import load_diffusers
from ..rotary import rotate
from ..standin import StandIn, full_config, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (0.0, 0.5, 0.98)
_PATCH = 2
_MULTIPLE = 32
"""Tokens of an image and of a caption are padded to a multiple of it (`SEQ_MULTI_OF` in Diffusers)."""
TINY: dict[str, Any] = {
    "dim": 64,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 64,
    "axes_dims": (8, 12, 12),
    "axes_lens": (1024, 64, 64),
}
"""A config of a tiny model for tests."""


class ZImageTransformer2D(Component):
    """`hidden_states (batch, C, height, width), timestep (batch,), encoder_hidden_states, encoder_attention_mask`.

    The timestep goes from 0 to 1. The mask `(batch, sequence)` says how long each row's caption is; its ones come first.
    """

    name = "z-image-transformer-2d"
    operations = 17

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("hidden_states", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("timestep", "float32", ("batch",), exact=True),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["cap_feat_dim"])),
            Port("encoder_attention_mask", "int64", ("batch", "sequence")),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_hidden_states", "float32", ("batch", config["in_channels"], "height", "width")),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import ZImageTransformer2DModel

        return load_diffusers(ZImageTransformer2DModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _BatchedZImage(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Rows have captions of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        ports = {port.name: port for port in self.inputs(config)}
        return {
            "hidden_states": torch.randn(ports["hidden_states"].shape(sizes.as_dict()), generator=generator),
            "timestep": torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)]),
            "encoder_hidden_states": torch.randn(
                ports["encoder_hidden_states"].shape(sizes.as_dict()), generator=generator
            ),
            "encoder_attention_mask": right_padded(sizes),
        }

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import ZImageTransformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(ZImageTransformer2DModel, config))


class _BatchedZImage(nn.Module):
    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a ZImageTransformer2DModel
        super().__init__()
        self.module = module
        for block in (*module.noise_refiner, *module.context_refiner, *module.layers):
            block.attention.set_processor(_RealRotaryAttention())
        rope = module.rope_embedder
        tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
        host = torch.device("cpu")
        self._tables = {
            host: ([table.real.contiguous() for table in tables], [table.imag.contiguous() for table in tables])
        }
        """Cosines and sines of each axis, on each device that they were asked for on."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor]:
        module = self.module
        embedded_time = module.t_embedder(timestep * module.t_scale).type_as(hidden_states)
        lengths = encoder_attention_mask.sum(dim=1)
        padded_lengths = torch.div(lengths + _MULTIPLE - 1, _MULTIPLE, rounding_mode="floor") * _MULTIPLE

        image = self._pad(self._embed(hidden_states), module.x_pad_token)
        image_rotary = self._image_rotary(hidden_states, image.shape[1], padded_lengths)
        for layer in module.noise_refiner:
            image = layer(image, None, image_rotary, embedded_time)

        caption = self._pad(module.cap_embedder(encoder_hidden_states), module.cap_pad_token, lengths)
        places = torch.arange(caption.shape[1], device=caption.device)
        caption_rotary = self._rotary(places + 1, torch.zeros_like(places), torch.zeros_like(places))
        caption_mask = places[None] < padded_lengths[:, None]
        for layer in module.context_refiner:
            caption = layer(caption, caption_mask, caption_rotary)

        tokens = torch.cat([image, caption], dim=1)
        rotary = tuple(
            torch.cat([of_image, of_caption.expand(image.shape[0], -1, -1, -1)], dim=1)
            for of_image, of_caption in zip(image_rotary, caption_rotary, strict=True)
        )
        mask = torch.cat([torch.ones_like(image[:, :, 0], dtype=torch.bool), caption_mask], dim=1)
        for layer in module.layers:
            tokens = layer(tokens, mask, rotary, embedded_time)
        return (self._picture(module.all_final_layer[f"{_PATCH}-1"](tokens, c=embedded_time), hidden_states),)

    def _embed(self, latents: Tensor) -> Tensor:
        """Cut latents into patches of 2x2, row by row, and embed them."""
        batch, channels, height, width = latents.shape
        patches = latents.reshape(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
        tokens = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.module.all_x_embedder[f"{_PATCH}-1"](tokens)

    def _picture(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Put the image's tokens, which come first, together again."""
        batch, channels, height, width = latents.shape
        rows, columns = height // _PATCH, width // _PATCH
        patches = tokens[:, : rows * columns].reshape(batch, rows, columns, _PATCH, _PATCH, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)

    def _pad(self, tokens: Tensor, pad_token: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Pad tokens to a multiple of 32, and put the pad token behind each row's length. No branches: any size fits."""
        count = tokens.shape[1]
        index = torch.arange((count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE, device=tokens.device)
        gathered = tokens[:, index.clamp(max=count - 1)]
        own = (index < count)[None] if lengths is None else index[None] < lengths[:, None]
        return torch.where(own[:, :, None], gathered, pad_token.to(tokens.dtype))

    def _image_rotary(self, latents: Tensor, count: int, caption_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Place image tokens behind the row's padded caption on the first axis; padding is at (0, 0, 0)."""
        rows, columns = latents.shape[2] // _PATCH, latents.shape[3] // _PATCH
        device = latents.device
        row = torch.arange(rows, device=device)[:, None].expand(rows, columns).reshape(-1)
        column = torch.arange(columns, device=device)[None].expand(rows, columns).reshape(-1)
        index = torch.arange(count, device=device)
        own, kept = index < rows * columns, index.clamp(max=rows * columns - 1)
        first = torch.where(own[None], (caption_lengths + 1)[:, None], 0)
        return self._rotary(first, row[kept] * own, column[kept] * own)

    def _rotary(self, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of each token's angles, (rows, tokens, 1, half a head).

        Places are (tokens,); on the first axis they may be (rows, tokens).
        """
        places = [place if place.ndim > 1 else place[None] for place in (first, second, third)]
        rows = places[0].shape[0]

        def look_up(tables: list[Tensor]) -> Tensor:
            found = [table[place] for table, place in zip(tables, places, strict=True)]
            return torch.cat([each.expand(rows, -1, -1) for each in found], dim=-1).unsqueeze(2)

        cosines, sines = self._tables_on(first.device)
        return look_up(cosines), look_up(sines)

    def _tables_on(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Return cosines and sines on a device; they cross once. What torch compiles or exports has copies of its own."""
        if device in self._tables:
            return self._tables[device]
        cosines, sines = ([table.to(device) for table in tables] for tables in self._tables[torch.device("cpu")])
        if not torch.compiler.is_compiling():
            self._tables[device] = (cosines, sines)
        return cosines, sines


class _RealRotaryAttention:
    """Attention of one stream whose rotary embedding is spelled in real numbers: (a + ib)(c + is) as pairs."""

    def __call__(
        self,
        attn: Any,  # noqa: ANN401 - Diffusers' Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # noqa: ARG002 - Diffusers' own signature
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            query, key = rotate(query, *freqs_cis), rotate(key, *freqs_cis)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        output = attended.transpose(1, 2).flatten(2, 3).to(query.dtype)
        for layer in attn.to_out:
            output = layer(output)
        return output


class _TransformerStandIn(StandIn):
    @property
    def in_channels(self) -> int:
        channels: int = self.config.in_channels
        return channels

    def __call__(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Take and return lists of (C, 1, H, W), one a row, and captions of (length, D)."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if isinstance(x[0], list):
            message = "the exported transformer takes one picture a row"
            raise InputError(message, fix="use the original Diffusers pipeline for several")
        refuse("transformer", options)
        device = cap_feats[0].device
        lengths = torch.tensor([len(caption) for caption in cap_feats], device=device)
        captions = nn.utils.rnn.pad_sequence(cap_feats, batch_first=True)
        predicted = self._run(
            hidden_states=torch.stack(x)[:, :, 0],
            timestep=t,
            encoder_hidden_states=captions,
            encoder_attention_mask=(torch.arange(captions.shape[1], device=device)[None] < lengths[:, None]).to(
                torch.int64
            ),
        )["out_hidden_states"]
        rows = list(predicted.unsqueeze(2).unbind(0))
        return Transformer2DModelOutput(sample=rows) if return_dict else (rows,)
