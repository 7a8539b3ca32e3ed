"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import StandIn, full_config, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (1000.0, 500.0, 20.0)
TINY: dict[str, Any] = {
    "sample_size": 16,
    "pos_embed_max_size": 32,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "caption_projection_dim": 64,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "out_channels": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
"""A config of a tiny model for tests, with the QK norm and dual attention of 3.5 Medium."""


class SD3Transformer2D(Component):
    """`hidden_states (batch, C, height, width), encoder_hidden_states, pooled_projections, timestep (batch,)`.

    Height and width are multiples of the patch size; `pos_embed_max_size` bounds them.
    """

    name = "sd3-transformer-2d"
    operations = 10

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("hidden_states", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["joint_attention_dim"])),
            Port("pooled_projections", "float32", ("batch", config["pooled_projection_dim"])),
            Port("timestep", "float32", ("batch",), exact=True),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_hidden_states", "float32", ("batch", config["out_channels"], "height", "width")),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return load_diffusers(SD3Transformer2DModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["timestep"] = torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import SD3Transformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(SD3Transformer2DModel, config))


class _FlatTransformer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        return self.module(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False)


class _TransformerStandIn(StandIn):
    def __call__(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True, **options: Any) -> Any:  # noqa: ANN401, FBT001, FBT002 - Diffusers' own signature
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        inputs = {name: options.pop(name) for name in ("encoder_hidden_states", "pooled_projections")}
        refuse("transformer", options)
        predicted = self._run(hidden_states=hidden_states, timestep=timestep, **inputs)["out_hidden_states"]
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)
