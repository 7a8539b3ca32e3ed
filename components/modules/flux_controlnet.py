"""ControlNet for FLUX.1: what a picture of edges, poses, depths… adds to each of the transformer's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InputError, SourceError
from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import refuse
from .flux_transformer_2d import TINY as TINY_TRANSFORMER
from .flux_transformer_2d import FluxTransformer2D, residual_ports

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

_EXAMPLE_SCALE = 0.8
TINY: dict[str, Any] = {**TINY_TRANSFORMER, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}
"""A config of a tiny model for tests, with half of the tiny transformer's layers."""


class FluxControlNet(Component):
    """The transformer's inputs, `controlnet_cond (batch, tokens, C), conditioning_scale ()` -> residuals, already scaled.

    The picture that is followed comes as packed latents, as the one that is made.
    """

    name = "flux-controlnet"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        _refuse_other_kinds(config)
        shared = {port.name: port for port in FluxTransformer2D().inputs(config)}
        guidance = [shared.pop("guidance")] if "guidance" in shared else []
        return (
            *shared.values(),
            Port("controlnet_cond", "float32", ("batch", "tokens", config["in_channels"])),
            Port("conditioning_scale", "float32", (), exact=True),
            *guidance,
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return residual_ports(config)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import FluxControlNetModel

        return load_diffusers(FluxControlNetModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatControlNet(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        tensors = FluxTransformer2D().example(config, sizes, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        tensors["controlnet_cond"] = torch.randn(tensors["hidden_states"].shape, generator=generator)
        tensors["conditioning_scale"] = torch.tensor(_EXAMPLE_SCALE)
        return {port.name: tensors[port.name] for port in self.inputs(config)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _controlnet_stand_in(next(iter(runners.values())), config)


def _refuse_other_kinds(config: Config) -> None:
    for field, kind in (("num_mode", "for several kinds of pictures"), ("conditioning_embedding_channels", "of XLabs")):
        if config.get(field) is not None:
            message = f"got a ControlNet {kind} ({field} = {config[field]}), which isn't carried"
            raise SourceError(message, fix="use one that takes latents of one kind of picture")


class _FlatControlNet(nn.Module):
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
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        *guidance: Tensor,
    ) -> tuple[Tensor, ...]:
        double, single = self.module(
            hidden_states,
            controlnet_cond,
            None,
            conditioning_scale,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            *guidance,
            return_dict=False,
        )
        return (*(double or ()), *(single or ()))


def _controlnet_stand_in(runner: Runner, config: Config) -> object:
    """Build a genuine FluxControlNetModel, as pipelines insist on, whose forward calls a runtime."""
    from accelerate import init_empty_weights
    from diffusers import FluxControlNetModel

    names = [port.name for port in residual_ports(config)]
    count = config["num_layers"]

    class RuntimeFluxControlNet(FluxControlNetModel):  # type: ignore[misc]
        dtype = torch.float32
        device = torch.device("cpu")

        def forward(
            self,
            conditioning_scale: float = 1.0,
            guidance: Tensor | None = None,
            return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
            **options: Any,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            taken = {port.name for port in runner.inputs}
            inputs = {name: options.pop(name) for name in taken & set(options)}
            device = inputs["hidden_states"].device
            inputs["conditioning_scale"] = torch.full((), float(conditioning_scale), device=device)
            if "guidance" in taken:
                inputs["guidance"] = guidance
            refuse("ControlNet", options)
            if return_dict:
                message = "the exported ControlNet gives its residuals as a tuple: return_dict=False"
                raise InputError(message)
            results = runner.run({name: tensor.float() for name, tensor in inputs.items()})
            residuals = [results[name] for name in names]
            return residuals[:count] or None, residuals[count:] or None

    with init_empty_weights():
        return RuntimeFluxControlNet.from_config(dict(config))
