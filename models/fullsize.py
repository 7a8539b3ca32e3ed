"""Pipelines of real models' sizes with random weights: they stand in for the checkpoints where only size matters.

Each is a family's tiny pipeline with the configs of `fullsize.json`. Weights are written shard by shard, a few MB in
memory at a time; or as holes of sparse files, where only the headers are to be read.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import staged
from ..errors import UsageError, unknown
from . import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

_SHARD_BYTES = 5_000_000_000
_CHUNK_ELEMENTS = 1 << 22
_DEPTHS = ("num_layers", "num_single_layers", "n_layers", "num_hidden_layers", "transformer_layers_per_block")
"""What configs call the number of layers that are alike; the last one has a number a block."""
_CHOSEN = "dual_attention_layers"
"""What SD 3.5's config calls the layers that have a second attention."""
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def models() -> dict[str, dict[str, Any]]:
    """Return name -> the family, and what its modules' configs have instead of the tiny ones'."""
    known: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return known


def config(
    model: str, module: str, *, small: bool = False, depth: int | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Return library, class and config of one module of a model; with `small` of the family's tiny one.

    `depth`: the most layers that are alike.

    Raises:
        UsageError: there is no such model.
    """
    known = models()
    if model not in known:
        raise UsageError(unknown("model", model, known))
    library, class_name, own = tiny.family_of(known[model]["family"]).tiny[module]
    found = {**own, **({} if small else known[model]["changes"].get(module, {}))}
    return library, class_name, found if depth is None else _shallow(found, depth)


def _shallow(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:  # noqa: ANN401 - a number, or one a block
        return [min(each, depth) for each in value] if isinstance(value, list) else min(value, depth)

    found = {**config, **{name: cut(config[name]) for name in _DEPTHS if name in config}}
    if _CHOSEN in config:  # some at the beginning; the last layer is another kind
        found[_CHOSEN] = [each for each in config[_CHOSEN] if each < depth - 2]
    return found


def build(
    model: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    hollow: bool = False,
    small: bool = False,
    depth: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a Diffusers folder of a model's size; return the folder.

    Args:
        model: its name in `fullsize.json`.
        folder: a new folder, which is there once it is whole.
        dtype: of the weights, as torch spells it.
        hollow: write headers and holes instead of values.
        small: in the family's tiny size, to try what is done with the model.
        depth: the most layers that are alike: what each compiles to is the whole model's.
        seed: of the weights.

    Raises:
        UsageError: there is no such model.
        ArtifactError: the folder is there already.
    """
    known = models()
    if model not in known:
        raise UsageError(unknown("model", model, known))
    with staged(folder, replace_existing=False) as partial:
        tiny.write_host(known[model]["family"], partial)
        for name in known[model]["changes"]:
            write_module(
                *config(model, name, small=small, depth=depth), partial / name, dtype=dtype, hollow=hollow, seed=seed
            )
    return folder


def write_module(
    library: str,
    class_name: str,
    config: Mapping[str, Any],
    folder: Path,
    *,
    dtype: str = "float32",
    hollow: bool = False,
    seed: int = 0,
) -> None:
    """Write `config.json` and random safetensors of a Diffusers or Transformers class, in shards of 5 GB."""
    import torch

    module = _construct(library, class_name, config, folder)
    target = getattr(torch, dtype)
    shards = _shards(_tensors(module), target)
    generator = torch.Generator().manual_seed(seed)
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        _write_shard(folder / f"{_STEMS[library]}{suffix}.safetensors", shard, target, None if hollow else generator)
    if len(shards) > 1:
        _write_index(folder, _STEMS[library], shards)


def _construct(library: str, class_name: str, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """Build the module on the meta device, and write its config."""
    import torch

    found: Any = getattr(importlib.import_module(library), class_name)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        if library == "transformers":
            module: Any = found(found.config_class(**config))
            module.config.architectures = [class_name]
            module.config.save_pretrained(folder)
        else:
            module = found(**config)
            module.save_config(folder)
    return module


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds: of tensors that are tied, one."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def _shards(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        width = tensor.numel() * dtype.itemsize
        if shards[-1] and size + width > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += width
    return shards


def _write_shard(
    file: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, generator: torch.Generator | None
) -> None:
    from ..weights import SAFETENSORS_DTYPES, as_bytes, safetensors_header

    short = SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]
    header, offsets = safetensors_header(
        (name, short, tensor.shape, tensor.numel() * dtype.itemsize) for name, tensor in tensors.items()
    )
    with file.open("wb") as stream:
        stream.write(header)
        if generator is None:
            stream.truncate(offsets[-1])
            return
        for name, tensor in tensors.items():
            stream.writelines(as_bytes(chunk.to(dtype)) for chunk in _values(name, tensor, generator))


def _values(name: str, tensor: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield values that keep activations near unit size, some millions at a time; those after the first repeat them."""
    import torch

    count = min(_CHUNK_ELEMENTS, tensor.numel())
    if tensor.ndim > 1:
        chunk = torch.randn(count, generator=generator) / math.sqrt(math.prod(tensor.shape[1:]))
    elif name.endswith("weight"):
        chunk = torch.ones(count)
    else:
        chunk = 0.02 * torch.randn(count, generator=generator)
    for start in range(0, tensor.numel(), count):
        yield chunk[: tensor.numel() - start]


def _write_index(folder: Path, stem: str, shards: list[dict[str, torch.Tensor]]) -> None:
    names = {
        name: f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        for number, shard in enumerate(shards, 1)
        for name in shard
    }
    index = {"metadata": {}, "weight_map": names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
