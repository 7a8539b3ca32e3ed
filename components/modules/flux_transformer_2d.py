"""The transformer of FLUX.1."""

from __future__ import annotations

import contextlib
import math
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

EXAMPLE_TIMESTEPS = (1.0, 0.5, 0.02)
_EXAMPLE_GUIDANCE = 3.5
_RESIDUAL, _SINGLE_RESIDUAL = "controlnet_block_sample", "controlnet_single_block_sample"
TINY: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
}
"""A config of a tiny model for tests."""


class FluxTransformer2D(Component):
    """`hidden_states (batch, tokens, C), …, img_ids (tokens, 3), txt_ids (sequence, 3) -> out_hidden_states`.

    Latents come packed, 2x2 of them a token; the ids are each token's place for the rotary embedding. The timestep
    goes from 1 to 0. `guidance (batch,)` is there where the model has an embedding for it (dev, not schnell).
    """

    name = "flux-transformer-2d"
    operations = 13

    def inputs(self, config: Config) -> tuple[Port, ...]:
        guidance = (Port("guidance", "float32", ("batch",), exact=True),)
        return (
            Port("hidden_states", "float32", ("batch", "tokens", config["in_channels"])),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["joint_attention_dim"])),
            Port("pooled_projections", "float32", ("batch", config["pooled_projection_dim"])),
            Port("timestep", "float32", ("batch",), exact=True),
            Port("img_ids", "float32", ("tokens", 3), exact=True),
            Port("txt_ids", "float32", ("sequence", 3), exact=True),
            *(guidance if config.get("guidance_embeds") else ()),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        channels = config.get("out_channels") or config["in_channels"]
        return (Port("out_hidden_states", "float32", ("batch", "tokens", channels)),)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        return load_diffusers(FluxTransformer2DModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["timestep"] = torch.full((sizes.batch,), EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        tensors["txt_ids"] = torch.zeros(sizes.sequence, 3)
        tensors["img_ids"] = _places(sizes.height // 2, sizes.width // 2)
        if "guidance" in tensors:
            tensors["guidance"] = torch.full((sizes.batch,), _EXAMPLE_GUIDANCE)
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import FluxTransformer2DModel

        return _TransformerStandIn(next(iter(runners.values())), full_config(FluxTransformer2DModel, config))


class FluxTransformer2DControlled(FluxTransformer2D):
    """Like `FluxTransformer2D`, with a residual for each of its layers: a ControlNet of fewer gives some of them again."""

    name = "flux-transformer-2d-controlled"
    operations = 13

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (*super().inputs(config), *residual_ports(config))

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatControlledTransformer(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        tensors = super().example(config, sizes, seed)
        return tensors | {port.name: 0.1 * tensors[port.name] for port in residual_ports(config)}


def residual_ports(config: Config) -> tuple[Port, ...]:
    """Return a port a layer of a transformer or a ControlNet, first of those with two streams, then of those with one."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    counts = {_RESIDUAL: config["num_layers"], _SINGLE_RESIDUAL: config["num_single_layers"]}
    names = [f"{name}.{i}" for name, count in counts.items() for i in range(count)]
    return tuple(Port(name, "float32", ("batch", "tokens", width)) for name in names)


def _places(height: int, width: int) -> Tensor:
    """Return (0, row, column) of each token, as FLUX's pipeline numbers them."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class _FlatTransformer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        *guidance: Tensor,
    ) -> tuple[Tensor]:
        return self.module(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            *guidance,
            return_dict=False,
        )


class _FlatControlledTransformer(_FlatTransformer):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor]:
        module: Any = self.module
        guidance = rest[:1] if module.config.guidance_embeds else ()
        residuals = rest[len(guidance) :]
        count = len(module.transformer_blocks)
        return module(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            *guidance,
            controlnet_block_samples=residuals[:count] or None,
            controlnet_single_block_samples=residuals[count:] or None,
            return_dict=False,
        )


class _TransformerStandIn(StandIn):
    def _residuals(self, tokens: Tensor, *given: list[Tensor] | None) -> dict[str, Tensor]:
        """Return a residual for each layer by port, of what a ControlNet gave for both kinds of layers; zeros for none."""
        ports = [port for port in self._runner.inputs if port.name.startswith((_RESIDUAL, _SINGLE_RESIDUAL))]
        if not ports:
            refuse("transformer", {"residuals of a ControlNet": given[0] or given[1]})
            return {}
        none = torch.zeros(*tokens.shape[:2], int(ports[0].dims[-1]), device=tokens.device)
        residuals = []
        for count, samples in zip((self.config.num_layers, self.config.num_single_layers), given, strict=True):
            interval = math.ceil(count / len(samples)) if samples else 1
            residuals += [samples[layer // interval] if samples else none for layer in range(count)]
        return dict(zip((port.name for port in ports), residuals, strict=True))

    def cache_context(self, name: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - Diffusers' own signature
        """Return a context that does nothing: an exported part has no caches to tell apart."""
        return contextlib.nullcontext()

    def __call__(self, hidden_states: Tensor, return_dict: bool = True, **options: Any) -> Any:  # noqa: ANN401, FBT001, FBT002 - Diffusers' own signature
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        names = ("encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
        inputs = {name: options.pop(name) for name in names}
        if self.config.guidance_embeds:
            inputs["guidance"] = options.pop("guidance")
        kinds = ("controlnet_block_samples", "controlnet_single_block_samples")
        inputs |= self._residuals(hidden_states, *(options.pop(kind, None) for kind in kinds))
        refuse("transformer", options)
        predicted = self._run(hidden_states=hidden_states, **inputs)["out_hidden_states"]
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)
