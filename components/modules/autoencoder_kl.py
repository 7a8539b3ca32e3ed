"""The two halves of AutoencoderKL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..component import Activations, Component, Port, Sizes
from ..loading import load_diffusers
from ..standin import is_there

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner


TINY: dict[str, Any] = {
    "block_out_channels": (16, 16, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}
"""A config of a tiny model for tests: 4 latents, 8 pixels each."""
TINY_16: dict[str, Any] = {
    **TINY,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}
"""The same with 16 latents, shifted and scaled, as SD 3's, FLUX's and Z-Image's."""


def scale_factor(config: Config) -> int:
    """Pixels a latent, along one side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


class _AutoencoderKLHalf(Component):
    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import AutoencoderKL

        return load_diffusers(AutoencoderKL, folder, dtype)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        (port,) = self.inputs(config)
        return {port.name: torch.randn(port.shape(sizes.as_dict()), generator=generator)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return _vae_stand_in(runners, config)

    def activations(self, config: Config, rows: int, height: int, width: int) -> Activations:
        """Take the widest level: upsampling leaves it the channels of the coarser one. The middle block attends."""
        channels = config["block_out_channels"]
        pixels = rows * height * width
        widest = [channels[min(level + 1, len(channels) - 1)] // 4**level for level in range(len(channels))]
        tokens = height * width // scale_factor(config) ** 2
        attends = config.get("mid_block_add_attention", True)
        return Activations(pixels * max(widest), rows * tokens**2 if attends else 0)


class VaeEncoder(_AutoencoderKLHalf):
    """`sample (batch, 3, s*height, s*width) in [-1, 1] -> latent_parameters (batch, 2*C, height, width)`.

    The parameters are mean and log-variance, before the scaling factor; s is the VAE's scale factor.
    """

    name = "vae-encoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config["in_channels"], f"{s}*height", f"{s}*width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent_parameters", "float32", ("batch", 2 * config["latent_channels"], "height", "width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return FlatHalf(module, "encoder", "quant_conv")


class VaeDecoder(_AutoencoderKLHalf):
    """`latent_sample (batch, C, height, width) -> sample (batch, 3, s*height, s*width)`.

    The latents are already divided by the scaling factor; s is the VAE's scale factor.
    """

    name = "vae-decoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent_sample", "float32", ("batch", config["latent_channels"], "height", "width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config["out_channels"], f"{s}*height", f"{s}*width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return FlatHalf(module, "post_quant_conv", "decoder")


class FlatHalf(nn.Module):
    """Runs some of an AutoencoderKL's modules in turn, each under its own name; it may lack the 1x1 convolutions."""

    def __init__(self, vae: Any, *names: str) -> None:  # noqa: ANN401 - an AutoencoderKL
        super().__init__()
        self._names = [name for name in names if isinstance(getattr(vae, name), nn.Module)]
        for name in self._names:
            self.add_module(name, getattr(vae, name))

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        for name in self._names:
            sample = getattr(self, name)(sample)
        return (sample,)


def _vae_stand_in(runners: Mapping[str, Runner], config: Config) -> object:
    """Build a genuine AutoencoderKL whose two halves call runtimes: tiling and slicing stay Diffusers' own."""
    from diffusers import AutoencoderKL

    vae = runtime_vae(AutoencoderKL, config)
    vae.encoder = RunnerModule(runners.get("vae_encoder"), "sample", "latent_parameters")
    vae.decoder = RunnerModule(runners.get("vae_decoder"), "latent_sample", "sample")
    vae.quant_conv = vae.post_quant_conv = None
    vae.register_to_config(use_quant_conv=False, use_post_quant_conv=False)
    return vae


def runtime_vae(plain: Any, config: Config) -> Any:  # noqa: ANN401 - a class of autoencoders, and one of it
    """Build an autoencoder without weights, whose halves are to be replaced, that refuses to be moved or saved."""
    from accelerate import init_empty_weights

    own = {"dtype": torch.float32, "device": torch.device("cpu"), "to": _to}
    names = ("half", "bfloat16", "cuda", "save_pretrained", "load_state_dict")
    guarded: Any = type(f"Runtime{plain.__name__}", (plain,), {**own, **dict.fromkeys(names, _refused)})
    with init_empty_weights():
        return guarded.from_config(dict(config))


def _to(vae: Any, *places: object, **named: object) -> nn.Module:  # noqa: ANN401 - Diffusers' own, whose `device` is ours
    """Accept where and what it is already, as SDXL's pipelines ask for before they encode a picture."""
    wanted = [value for value in (*places, *named.values()) if value not in (None, torch.float32)]
    if all(is_there(value, vae.device) for value in wanted):
        return vae
    return _refused()


def _refused(*_: object, **__: object) -> NoReturn:
    message = "the VAE is runtime-backed: it can't be moved, converted, saved or given other weights"
    raise InputError(
        message, fix="bakeoff.load(folder, device=…) places it; the recipe of an export sets its precision"
    )


class RunnerModule(nn.Module):
    """A half of an autoencoder: one tensor in, one tensor out, computed by a runtime."""

    def __init__(self, runner: Runner | None, takes: str, gives: str) -> None:
        super().__init__()
        self._runner, self._takes, self._gives = runner, takes, gives

    def forward(self, tensor: Tensor) -> Tensor:
        if self._runner is None:
            message = f"this artifact has no part that takes {self._takes!r}"
            raise InputError(message, fix="export it again with all parts")
        return self._runner.run({self._takes: tensor.float()})[self._gives]
