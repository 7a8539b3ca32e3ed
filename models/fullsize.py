"""Full-size modules with random weights, built on the spot: they stand in for real checkpoints where only size matters."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

SD15_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""860 M parameters, 3.4 GB in float32."""

SD35_BLOCKS: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
"""Six of the 38 blocks of SD 3.5 Large, at its width."""
SD35_TWO: dict[str, Any] = {**SD35_BLOCKS, "num_layers": 2}
"""Two of them: 1.8 GB in float32."""

SD_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
"""The VAE of SD 1 and 2: 84 M parameters, of which the decoder has 49."""


def write_module(config: dict[str, Any], folder: Path, dtype: str = "float32", seed: int = 0) -> None:
    """Write `config.json` and random safetensors of a Diffusers class, one tensor in memory at a time."""
    import diffusers
    import torch
    from accelerate import init_empty_weights

    from ..weights import SAFETENSORS_DTYPES, as_bytes

    with init_empty_weights(include_buffers=False):
        module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)  # type: ignore[operator]
    target = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = module.state_dict()
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * target.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            stream.write(as_bytes(_values(name, tensor, generator).to(target)))


def _values(name: str, tensor: Any, generator: Any) -> Any:  # noqa: ANN401 - a meta tensor and torch's generator
    """Return values that keep activations near unit size."""
    import torch

    if tensor.device.type != "meta":
        return tensor.contiguous()
    if tensor.ndim > 1:
        fan_in = math.prod(tensor.shape[1:])
        return torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in)
    return (
        torch.ones(tensor.shape) if name.endswith("weight") else 0.02 * torch.randn(tensor.shape, generator=generator)
    )
