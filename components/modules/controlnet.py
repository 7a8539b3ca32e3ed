"""ControlNet for UNets: what a picture of edges, poses, depths… adds to each of the UNet's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import refuse
from . import unet_2d_condition
from .unet_2d_condition import RowwiseTimeIds, UNet2DCondition, added_ports, residual_ports, takes_text_and_time

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

_EXAMPLE_SCALE = 0.8
TINY: dict[str, Any] = {
    name: value for name, value in unet_2d_condition.TINY.items() if name not in {"sample_size", "up_block_types"}
} | {"conditioning_embedding_out_channels": (8, 8, 16, 16)}
"""A config of a tiny model for tests, for the tiny UNet."""


class ControlNet(Component):
    """`sample, timestep, encoder_hidden_states, controlnet_cond (batch, 3, 8*height, 8*width), conditioning_scale ()`.

    Gives `down_block_residual.0, …, mid_block_residual`, already scaled.
    """

    name = "controlnet"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        s = 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)
        channels = config.get("conditioning_channels", 3)
        return (
            Port("sample", "float32", ("batch", config.get("in_channels", 4), "height", "width")),
            Port("timestep", "float32", (), exact=True),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["cross_attention_dim"])),
            Port("controlnet_cond", "float32", ("batch", channels, f"{s}*height", f"{s}*width")),
            Port("conditioning_scale", "float32", (), exact=True),
            *(added_ports(config) if takes_text_and_time(config) else ()),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return residual_ports(config)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import ControlNetModel

        return load_diffusers(ControlNetModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatControlNet(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        tensors = UNet2DCondition().example({"in_channels": 4, **config}, sizes, seed)
        generator = torch.Generator().manual_seed(seed)
        ports = self.inputs(config)
        shape = next(port for port in ports if port.name == "controlnet_cond").shape(sizes.as_dict())
        tensors["controlnet_cond"] = torch.rand(shape, generator=generator)
        tensors["conditioning_scale"] = torch.tensor(_EXAMPLE_SCALE)
        return {port.name: tensors[port.name] for port in ports}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _controlnet_stand_in(next(iter(runners.values())), config)


class _FlatControlNet(nn.Module):
    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a ControlNetModel
        super().__init__()
        self.module = module
        if takes_text_and_time(module.config):
            module.add_time_proj = RowwiseTimeIds(module.add_time_proj)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        *added: Tensor,
    ) -> tuple[Tensor, ...]:
        conditions = {"text_embeds": added[0], "time_ids": added[1]} if added else None
        down, middle = self.module(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            conditioning_scale,
            added_cond_kwargs=conditions,
            return_dict=False,
        )
        return (*down, middle)


def _controlnet_stand_in(runner: Runner, config: Config) -> object:
    """Build a genuine ControlNetModel, as pipelines insist on, whose forward calls a runtime."""
    from accelerate import init_empty_weights
    from diffusers import ControlNetModel

    names = [port.name for port in residual_ports(config)]
    taken = {port.name for port in runner.inputs}

    class RuntimeControlNet(ControlNetModel):  # type: ignore[misc]
        dtype = torch.float32
        device = torch.device("cpu")

        def forward(
            self,
            sample: Tensor,
            timestep: Tensor | float,
            encoder_hidden_states: Tensor,
            controlnet_cond: Tensor,
            conditioning_scale: float = 1.0,
            added_cond_kwargs: Mapping[str, Tensor] | None = None,
            guess_mode: bool = False,  # noqa: FBT001, FBT002 - Diffusers' own signature
            return_dict: bool = True,  # noqa: FBT001, FBT002
            **options: Any,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            added = {name: value for name, value in (added_cond_kwargs or {}).items() if name in taken}
            refuse("ControlNet", {**options, "guess_mode": guess_mode})
            inputs = {
                "sample": sample,
                "timestep": torch.as_tensor(timestep).reshape(()),
                "encoder_hidden_states": encoder_hidden_states,
                "controlnet_cond": controlnet_cond,
                "conditioning_scale": torch.full((), float(conditioning_scale), device=sample.device),
                **added,
            }
            results = runner.run({name: tensor.float() for name, tensor in inputs.items()})
            residuals = [results[name] for name in names]
            if return_dict:
                message = "the exported ControlNet gives its residuals as a tuple: return_dict=False"
                raise InputError(message)
            return residuals[:-1], residuals[-1]

    with init_empty_weights():
        return RuntimeControlNet.from_config(dict(config))
