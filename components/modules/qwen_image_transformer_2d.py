"""The transformer of Qwen-Image."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..component import Component, Port, Sizes
from ..examples import right_padded
from ..loading import load_diffusers
from ..rotary import rotate
from ..standin import StandIn, full_config, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (1.0, 0.5, 0.02)
TINY: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 6, 6),
}
"""A config of a tiny model for tests."""


class QwenImageTransformer2D(Component):
    """`hidden_states (batch, tokens, C), …, img_ids (tokens, 3), txt_ids (sequence, 3) -> out_hidden_states`.

    Latents come packed, 2x2 of them a token; the ids are each token's place for the rotary embedding: an image's count
    from its middle, a text's go on where the image's end. The timestep goes from 1 to 0. The mask `(batch, sequence)`
    has ones where a prompt has tokens.
    """

    name = "qwen-image-transformer-2d"
    operations = 15

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("hidden_states", "float32", ("batch", "tokens", config["in_channels"])),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["joint_attention_dim"])),
            Port("encoder_hidden_states_mask", "int64", ("batch", "sequence")),
            Port("timestep", "float32", ("batch",), exact=True),
            Port("img_ids", "float32", ("tokens", 3), exact=True),
            Port("txt_ids", "float32", ("sequence", 3), exact=True),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        channels = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
        return (Port("out_hidden_states", "float32", ("batch", "tokens", channels)),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        return load_diffusers(QwenImageTransformer2DModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Rows have prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["encoder_hidden_states_mask"] = right_padded(sizes)
        tensors["timestep"] = torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        tensors["img_ids"], tensors["txt_ids"] = _places(sizes.height // 2, sizes.width // 2, sizes.sequence)
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import QwenImageTransformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(QwenImageTransformer2DModel, config))


@lru_cache(4)
def _places_on(device: torch.device, rows: int, columns: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Return what `_places` does on a device: in each step of a picture the same tensors."""
    image, text = _places(rows, columns, sequence)
    return image.to(device), text.to(device)


def _places(rows: int, columns: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Return (rows * columns, 3) and (sequence, 3) float32: frame, row and column of each token."""
    down, across = torch.arange(rows) - (rows - rows // 2), torch.arange(columns) - (columns - columns // 2)
    row, column = torch.meshgrid(down, across, indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
    text = torch.arange(sequence) + max(rows // 2, columns // 2)
    return image.float(), text[:, None].expand(-1, 3).float().contiguous()


class _FlatTransformer(nn.Module):
    """Diffusers' own modules in their own order; its forward bakes lengths, and turns complex numbers."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a QwenImageTransformer2DModel
        super().__init__()
        self.module = module
        for block in module.transformer_blocks:
            block.attn.set_processor(_JointAttention())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> tuple[Tensor]:
        module = self.module
        image = module.img_in(hidden_states)
        text = module.txt_in(module.txt_norm(encoder_hidden_states))
        time = module.time_text_embed(timestep, image)
        rotary = (self._rotary(img_ids), self._rotary(txt_ids))
        mask = encoder_hidden_states_mask.bool()
        for block in module.transformer_blocks:
            text, image = block(image, text, mask, time, rotary)
        return (module.proj_out(module.norm_out(image, time)),)

    def _rotary(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of each token's angles, (1, tokens, 1, half a head)."""
        embed = self.module.pos_embed
        angles = []
        for axis, width in enumerate(embed.axes_dim):
            exponents = torch.arange(0, width, 2, device=ids.device, dtype=torch.float32) / width
            angles.append(ids[:, axis, None] * (1.0 / torch.pow(embed.theta, exponents)))
        whole = torch.cat(angles, dim=-1)[None, :, None]
        return whole.cos(), whole.sin()


class _JointAttention:
    """Attention of text and image to each other, as Diffusers' `QwenDoubleStreamAttnProcessor2_0`, in real numbers."""

    def __call__(
        self,
        attn: Any,  # noqa: ANN401 - Diffusers' Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        attention_mask: None = None,  # noqa: ARG002 - Diffusers' own signature
    ) -> tuple[Tensor, Tensor]:
        of_image, of_text = image_rotary_emb
        image = self._heads(attn, hidden_states, "to_q", "to_k", "to_v")
        text = self._heads(attn, encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj")
        image_query, image_key = rotate(attn.norm_q(image[0]), *of_image), rotate(attn.norm_k(image[1]), *of_image)
        text_query = rotate(attn.norm_added_q(text[0]), *of_text)
        text_key = rotate(attn.norm_added_k(text[1]), *of_text)
        seen = torch.cat([encoder_hidden_states_mask, torch.ones_like(hidden_states[:, :, 0], dtype=torch.bool)], dim=1)
        attended = F.scaled_dot_product_attention(
            torch.cat([text_query, image_query], dim=1).transpose(1, 2),
            torch.cat([text_key, image_key], dim=1).transpose(1, 2),
            torch.cat([text[2], image[2]], dim=1).transpose(1, 2),
            attn_mask=seen[:, None, None, :],
        )
        output = attended.transpose(1, 2).flatten(2, 3)
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](output[:, words:]), attn.to_add_out(output[:, :words])

    @staticmethod
    def _heads(attn: Any, tokens: Tensor, *layers: str) -> list[Tensor]:  # noqa: ANN401
        """Return query, key and value, each (batch, tokens, heads, D)."""
        return [getattr(attn, layer)(tokens).unflatten(-1, (attn.heads, -1)) for layer in layers]


class _TransformerStandIn(StandIn):
    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - Diffusers' own signature
        """Return a context that does nothing: an exported part has no caches to tell apart."""
        return contextlib.nullcontext()

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: list[list[tuple[int, int, int]]],
        encoder_hidden_states_mask: Tensor | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        (frames, rows, columns), *others = img_shapes[0]
        refuse("transformer", {"pictures beside the one that is made": bool(others) or frames > 1, **options})
        img_ids, txt_ids = _places_on(hidden_states.device, rows, columns, encoder_hidden_states.shape[1])
        mask = encoder_hidden_states_mask
        if mask is None:
            mask = torch.ones(encoder_hidden_states.shape[:2], device=hidden_states.device)
        predicted = self._run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=mask.to(torch.int64),
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
        )["out_hidden_states"]
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)
