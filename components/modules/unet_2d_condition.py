"""The UNet of Stable Diffusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import full_config, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

EXAMPLE_TIMESTEPS = (981.0, 501.0, 21.0)


class UNet2DCondition(Component):
    """`sample (batch, C, height, width), timestep (), encoder_hidden_states (batch, sequence, D) -> out_sample`.

    The timestep is a 0-d float32, so that schedulers with fractional timesteps lose nothing.
    """

    name = "unet-2d-condition"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("sample", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("timestep", "float32", ()),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["cross_attention_dim"])),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_sample", "float32", ("batch", config["out_channels"], "height", "width")),)

    def conventions(self, backend: str) -> Mapping[str, Port]:
        """Optimum Intel and OpenVINO GenAI feed OpenVINO's UNets an int64 timestep of rank 1."""
        return {"timestep": Port("timestep", "int64", ("steps",))} if backend == "openvino" else {}

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return load_diffusers(UNet2DConditionModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatUNet(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            port.name: torch.tensor(EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
            if port.rank == 0
            else torch.randn(port.shape(sizes.as_dict()), generator=generator)
            for port in self.inputs(config)
        }

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _UNetStandIn(next(iter(runners.values())), config)


class _FlatUNet(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module
        setattr(self.module, "get_time_embed", self._time_embed)  # noqa: B010 - an assignment would have to fit a type

    def _time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Embed the one timestep, then expand it to the batch: bit for bit what Diffusers gets the other way round.

        A backend in bfloat16 can keep the angles in float32 (981 isn't a bfloat16), but only while nothing between
        the timestep and its sine changes shapes. Sinusoids as in "Attention is all you need", section 3.5.
        """
        proj = self.module.time_proj
        half = proj.num_channels // 2
        exponent = (
            -math.log(10000)
            * torch.arange(0, half, dtype=torch.float32, device=timestep.device)
            / (half - proj.downscale_freq_shift)
        )
        angles = proj.scale * (timestep.float() * torch.exp(exponent))
        halves = (angles.cos(), angles.sin()) if proj.flip_sin_to_cos else (angles.sin(), angles.cos())
        embedding = torch.cat([*halves, angles.new_zeros(proj.num_channels % 2)])
        return embedding.to(sample.dtype)[None].expand(sample.shape[0], -1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        output: tuple[Tensor] = self.module(sample, timestep, encoder_hidden_states, return_dict=False)
        return output


class _UNetStandIn:
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, runner: Runner, config: Config) -> None:
        from diffusers import UNet2DConditionModel

        self.config = full_config(UNet2DConditionModel, config)
        self._runner = runner
        self._timestep = next(port for port in runner.inputs if port.name == "timestep")

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        refuse("UNet", options)
        inputs = {
            "sample": sample.float(),
            "timestep": _feed(timestep, self._timestep),
            "encoder_hidden_states": encoder_hidden_states.float(),
        }
        predicted = self._runner.run(inputs)["out_sample"]
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


def _feed(timestep: Tensor | float, port: Port) -> Tensor:
    """Bring a timestep into the port's dtype and rank; never truncate one."""
    value = torch.as_tensor(timestep).reshape(())
    if port.dtype == "int64" and value.is_floating_point() and value != value.round():
        message = (
            f"the scheduler gave the fractional timestep {value.item()}, but this UNet's timestep port is int64, "
            "which would truncate it"
        )
        raise InputError(
            message,
            fix="set the scheduler's timestep_spacing='leading' or 'trailing', or export with --timestep f32",
        )
    return value.to(getattr(torch, port.dtype)).reshape((1,) * port.rank)
