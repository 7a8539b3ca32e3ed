"""The UNet of Stable Diffusion, with or without SDXL's added conditions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import StandIn, full_config, refuse
from .autoencoder_kl import scale_factor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..component import Config, Runner
    from ..family import Configs

EXAMPLE_TIMESTEPS = (981.0, 501.0, 21.0)
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
}
"""A config of a tiny model for tests."""
_TIME_IDS = 6
_DOWN_RESIDUAL, _MID_RESIDUAL = "down_block_residual", "mid_block_residual"


def default_size(configs: Configs) -> tuple[int, int]:
    """Return the height and width in pixels that the UNet was trained for."""
    sample = configs["unet"]["sample_size"]
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    scale = scale_factor(configs["vae"])
    return height * scale, width * scale


def only_task(configs: Configs) -> str | None:
    """Return `inpainting` for a UNet that takes a mask and a masked picture beside the latents: 9 channels of 4."""
    return "inpainting" if configs["unet"]["in_channels"] > configs["vae"]["latent_channels"] else None


def size_multiple(configs: Configs) -> int:
    """Return what the pipeline (8), the VAE, and the UNet's down- and upsampling can divide without a remainder."""
    levels = len(configs["unet"]["block_out_channels"]) - 1
    return max(8, scale_factor(configs["vae"]) * 2**levels)


def takes_text_and_time(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"


class UNet2DCondition(Component):
    """`sample (batch, C, height, width), timestep (), encoder_hidden_states (batch, sequence, D) -> out_sample`.

    The timestep is a 0-d float32, so that schedulers with fractional timesteps lose nothing. SDXL's takes
    `text_embeds (batch, P), time_ids (batch, 6)` as well: the pooled prompt, and sizes and crop in pixels.
    """

    name = "unet-2d-condition"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (
            Port("sample", "float32", ("batch", config["in_channels"], "height", "width")),
            Port("timestep", "float32", (), exact=True),
            Port("encoder_hidden_states", "float32", ("batch", "sequence", config["cross_attention_dim"])),
            *(added_ports(config) if takes_text_and_time(config) else ()),
        )

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("out_sample", "float32", ("batch", config["out_channels"], "height", "width")),)

    def conventions(self, backend: str) -> Mapping[str, Port]:
        """Optimum Intel and OpenVINO GenAI feed OpenVINO's UNets an int64 timestep of rank 1."""
        return {"timestep": Port("timestep", "int64", ("steps",), exact=True)} if backend == "openvino" else {}

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return load_diffusers(UNet2DConditionModel, folder, dtype)

    def flat(self, module: nn.Module) -> nn.Module:
        return (_FlatUNetXL if takes_text_and_time(module.config) else _FlatUNet)(module)  # type: ignore[arg-type]  # a FrozenDict

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {p.name: torch.randn(p.shape(sizes.as_dict()), generator=generator) for p in self.inputs(config)}
        tensors["timestep"] = torch.tensor(EXAMPLE_TIMESTEPS[seed % len(EXAMPLE_TIMESTEPS)])
        if "time_ids" in tensors:
            height, width = 8.0 * sizes.height, 8.0 * sizes.width
            row = torch.tensor([height, width, 0.0, 0.0, height, width])
            tensors["time_ids"] = row.expand(sizes.batch, -1).clone()
        return tensors

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _UNetStandIn(next(iter(runners.values())), config)


class UNet2DConditionControlled(UNet2DCondition):
    """Like `UNet2DCondition`, with a ControlNet's residuals as inputs: `down_block_residual.0, …, mid_block_residual`."""

    name = "unet-2d-condition-controlled"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (*super().inputs(config), *residual_ports(config))

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatControlledUNet(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        tensors = super().example(config, sizes, seed)
        return tensors | {port.name: 0.1 * tensors[port.name] for port in residual_ports(config)}


def residual_ports(config: Config) -> tuple[Port, ...]:
    """Return what a ControlNet gives to a UNet of the same blocks: a tensor a layer of the way down, and the middle's.

    There is one after the first convolution, after each layer of a block, and after each downsampling.
    """
    channels = config["block_out_channels"]
    layers = config.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list | tuple) else [layers] * len(channels)
    levels = [(channels[0], 1)]
    for index, (width, count) in enumerate(zip(channels, counts, strict=True)):
        levels += [(width, 2**index)] * count
        if index < len(channels) - 1:
            levels.append((width, 2 ** (index + 1)))
    names = [*(f"{_DOWN_RESIDUAL}.{i}" for i in range(len(levels))), _MID_RESIDUAL]
    dims = [*levels, (channels[-1], 2 ** (len(channels) - 1))]
    return tuple(
        Port(name, "float32", ("batch", width, f"height/{over}", f"width/{over}"))
        for name, (width, over) in zip(names, dims, strict=True)
    )


def added_ports(config: Config) -> tuple[Port, ...]:
    pooled = config["projection_class_embeddings_input_dim"] - _TIME_IDS * config["addition_time_embed_dim"]
    return (
        Port("text_embeds", "float32", ("batch", pooled)),
        Port("time_ids", "float32", ("batch", _TIME_IDS), exact=True),
    )


def _sinusoids(proj: Any, values: Tensor) -> Tensor:  # noqa: ANN401 - Diffusers' Timesteps
    """Embed each value along a new last dimension, bit for bit as `Timesteps` does it with a vector of them.

    A single value isn't given one before its sine: see `_FlatUNet._time_embed`.
    """
    half = proj.num_channels // 2
    exponent = (
        -math.log(10000)
        * torch.arange(0, half, dtype=torch.float32, device=values.device)
        / (half - proj.downscale_freq_shift)
    )
    spread = values[..., None] if values.ndim else values
    angles = proj.scale * (spread.float() * torch.exp(exponent))
    halves = (angles.cos(), angles.sin()) if proj.flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat([*halves, angles.new_zeros(*angles.shape[:-1], proj.num_channels % 2)], dim=-1)


class RowwiseTimeIds(nn.Module):
    """Stands for `add_time_proj`: embeds the time ids of a row beside each other, so that a row's width is a constant.

    Diffusers embeds them one by one and folds them into rows afterwards; OpenVINO infers a width of 1 from that.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self._proj = proj

    def forward(self, values: Tensor) -> Tensor:
        return _sinusoids(self._proj, values.reshape(-1, _TIME_IDS)).flatten(1)


class _FlatUNet(nn.Module):
    def __init__(self, module: Any) -> None:  # noqa: ANN401 - a UNet2DConditionModel
        super().__init__()
        self.module = module
        module.get_time_embed = self._time_embed
        if takes_text_and_time(module.config):
            module.add_time_proj = RowwiseTimeIds(module.add_time_proj)

    def _time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Embed the one timestep, then expand it to the batch: bit for bit what Diffusers gets the other way round.

        A backend in bfloat16 can keep the angles in float32 (981 isn't a bfloat16), but only while nothing between
        the timestep and its sine changes shapes. Sinusoids as in "Attention is all you need", section 3.5.
        """
        embedding = _sinusoids(self.module.time_proj, timestep)
        return embedding.to(sample.dtype)[None].expand(sample.shape[0], -1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        output: tuple[Tensor] = self.module(sample, timestep, encoder_hidden_states, return_dict=False)
        return output


class _FlatUNetXL(_FlatUNet):
    def forward(  # type: ignore[override]  # the ports of another config
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> tuple[Tensor]:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: tuple[Tensor] = self.module(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )
        return output


class _FlatControlledUNet(_FlatUNet):
    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *others: Tensor
    ) -> tuple[Tensor]:
        """`others`: text embeddings and time ids where the UNet takes them, then the residuals."""
        added = None
        if takes_text_and_time(self.module.config):
            added = {"text_embeds": others[0], "time_ids": others[1]}
            others = others[2:]
        output: tuple[Tensor] = self.module(
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs=added,
            down_block_additional_residuals=others[:-1],
            mid_block_additional_residual=others[-1],
            return_dict=False,
        )
        return output


class _UNetStandIn(StandIn):
    def __init__(self, runner: Runner, config: Config) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__(runner, full_config(UNet2DConditionModel, config))
        self._timestep = next(port for port in runner.inputs if port.name == "timestep")
        self._residuals = [port for port in runner.inputs if port.name.startswith((_DOWN_RESIDUAL, _MID_RESIDUAL))]
        self._added = takes_text_and_time(config)
        if self._added:
            width = config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002 - Diffusers' own signature
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        added = added_cond_kwargs or {}
        residuals = self._residuals_of(sample, down_block_additional_residuals, mid_block_additional_residual)
        refuse("UNet", options if self._added else {**options, **added})
        predicted = self._run(
            sample=sample,
            timestep=_feed(timestep, self._timestep),
            encoder_hidden_states=encoder_hidden_states,
            **(added if self._added else {}),
            **residuals,
        )["out_sample"]
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def _residuals_of(self, sample: Tensor, down: Sequence[Tensor] | None, middle: Tensor | None) -> dict[str, Tensor]:
        """Return a ControlNet's residuals by port; zeros where a UNet that takes them got none."""
        if not self._residuals:
            refuse("UNet", {"residuals of a ControlNet": middle})
            return {}
        if middle is None:
            sizes = dict(zip(("batch", "height", "width"), (len(sample), *sample.shape[2:]), strict=True))
            return {port.name: torch.zeros(port.shape(sizes), device=sample.device) for port in self._residuals}
        return dict(zip((port.name for port in self._residuals), (*(down or ()), middle), strict=True))


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
