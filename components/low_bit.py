"""Modules whose layers hold codes of bitsandbytes, torchao or our own, opened without a GPU or their wide weights."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from ..weights import Checkpoint
from . import torchao

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

_KEY = "quantization_config"
OWN = "bakeoff"
"""The method whose layers are `byte_layers`' own: no library has to be there."""
SCALE, STEP = ".weight_scale", ".input_scale"
"""What its files have beside a layer's codes (`.weight`, int8): a scale for each output channel, an activation's step."""


def method(folder: Path) -> str | None:
    """Return what runs a module folder's codes, bitsandbytes, torchao or `OWN`; None where its weights are none."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    found = (config.get(_KEY) or {}).get("quant_method")
    return found if found in {"bitsandbytes", "torchao", OWN} else None


def load_diffusers(model_class: Any, folder: Path) -> nn.Module:  # noqa: ANN401 - a Diffusers class
    """Open a Diffusers module from codes; all else has the dtype of the file.

    Diffusers' own way refuses bitsandbytes without a GPU, though that needs none, and rounds torchao's scales to bfloat16.

    Raises:
        UnavailableError: bitsandbytes or torchao isn't installed.
    """
    import torch
    from safetensors.torch import load_file

    from . import byte_layers

    tensors: dict[str, Tensor] = {}
    files = Checkpoint.open(folder).files
    for file in files:
        tensors |= load_file(file)
    config = dict(model_class.load_config(folder, local_files_only=True))
    settings = config.pop(_KEY)
    if settings["quant_method"] != OWN:
        require(settings["quant_method"])
    with torch.device("meta"):
        module: nn.Module = model_class.from_config(config)
    if settings["quant_method"] == "torchao":
        tensors = torchao.joined(files, tensors)
    elif settings["quant_method"] == OWN:
        byte_layers.put(module, tensors, Checkpoint.open(folder))
    else:
        _replace_layers(module, tensors, settings)
    module.load_state_dict(tensors, assign=True, strict=False)
    keep_codes(module)
    return module


def load_transformers(model_class: Any, folder: Path) -> nn.Module:  # noqa: ANN401 - a Transformers class
    """Open a Transformers module from our own codes.

    Transformers makes what isn't in the checkpoint, positions for one, only where it opens weights: it gets empty ones.
    """
    from safetensors.torch import load_file

    from . import byte_layers

    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.files:
        tensors |= load_file(file)
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    wide = byte_layers.widened(tensors)
    module: nn.Module = model_class.from_pretrained(None, config=config, state_dict=wide, dtype="bfloat16")
    byte_layers.put(module, tensors, checkpoint)
    return module


def _replace_layers(module: nn.Module, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    for path, layer in list(module.named_modules()):
        if f"{path}.SCB" in tensors or f"{path}.weight.absmax" in tensors:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, _coded(path, layer, tensors, settings))


def require(library: str) -> None:
    """Import bitsandbytes or torchao.

    Raises:
        UnavailableError: it isn't installed.
    """
    try:
        import_module(library)
    except ImportError as error:
        message = f"these weights are codes of {library}, which is not installed"
        raise UnavailableError(message, fix=f"pip install 'bakeoff[{library}]'") from error


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device with all that its codes need there; in place, it is returned.

    `Module.to` moves the codes of bitsandbytes' layers and leaves their scales behind, which these keep beside them.
    """
    layer: Any
    for layer in module.modules():
        weight = layer._parameters.get("weight")  # noqa: SLF001 - as named_parameters, with the layer that it is of
        if weight is not None and type(weight).__module__.startswith("bitsandbytes.") and weight.device != device:
            layer.weight = weight.to(device)
    return module.to(device)


def keep_codes(module: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit codes anew at the first run: what it would save then is wrong."""
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _coded(path: str, layer: Any, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:  # noqa: ANN401 - nn.Linear
    """Return a layer with the codes of `path`, whose tensors are taken out."""
    import torch

    layers: Any = import_module("bitsandbytes.nn")
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
