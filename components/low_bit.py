"""Modules whose Linear layers hold codes of bitsandbytes, opened without a GPU and without their wide weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from ..weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

_KEY = "quantization_config"


def is_low_bit(folder: Path) -> bool:
    """Say whether a module folder's Linear layers are bitsandbytes' codes."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return (config.get(_KEY) or {}).get("quant_method") == "bitsandbytes"


def load_diffusers(model_class: Any, folder: Path) -> nn.Module:  # noqa: ANN401 - a Diffusers class
    """Open a Diffusers module from bitsandbytes' codes; all else has the dtype of the file.

    Diffusers' own way refuses without a GPU, though bitsandbytes doesn't.

    Raises:
        UnavailableError: bitsandbytes isn't installed.
    """
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in Checkpoint.open(folder).files:
        tensors |= load_file(file)
    config = dict(model_class.load_config(folder, local_files_only=True))
    settings = config.pop(_KEY)
    with torch.device("meta"):
        module: nn.Module = model_class.from_config(config)
    for path, layer in list(module.named_modules()):
        if f"{path}.SCB" in tensors or f"{path}.weight.absmax" in tensors:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, _coded(path, layer, tensors, settings))
    module.load_state_dict(tensors, assign=True, strict=False)
    keep_codes(module)
    return module


def require() -> Any:  # noqa: ANN401 - a module without types
    """Import bitsandbytes' layers.

    Raises:
        UnavailableError: it isn't installed.
    """
    try:
        from bitsandbytes import nn as layers
    except ImportError as error:
        message = "these weights are codes of bitsandbytes, which is not installed"
        raise UnavailableError(message, fix="pip install 'bakeoff[bitsandbytes]'") from error
    return layers


def keep_codes(module: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit codes anew at the first run: what it would save then is wrong."""
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _coded(path: str, layer: Any, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:  # noqa: ANN401 - nn.Linear
    """Return a layer with the codes of `path`, whose tensors are taken out."""
    import torch

    layers = require()
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight = tensors.pop(f"{path}.weight")
    with torch.device("meta"):
        made: Any = (
            layers.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
            if settings["load_in_8bit"]
            else layers.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        )
    if settings["load_in_8bit"]:
        tensors.pop(f"{path}.weight_format", None)
        scales = tensors.pop(f"{path}.SCB")
        made.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
    else:
        beside = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.weight.")}
        made.weight = layers.Params4bit.from_prequantized(
            weight, beside, requires_grad=False, device="cpu", module=made
        )
    if bias:
        made.bias = torch.nn.Parameter(tensors.pop(f"{path}.bias"), requires_grad=False)
    return made
