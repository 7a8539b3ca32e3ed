"""LoRAs added to weights: W + scale * alpha / rank * B A, when a model is exported or when an artifact's part is opened.

The method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685. Keys of
Diffusers, PEFT and Kohya are brought to one form by Diffusers' own converters; the result is what its `fuse_lora` gives.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..artifact import scratch
from ..errors import PickleError, SourceError, UsageError
from ..weights import as_bytes, read_tensor, sha256, write_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ..components.family import Family
    from ..weights import Entry
    from .source import Source

_METADATA = "lora_adapter_metadata"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class Adaptable(Protocol):
    """What a LoRA can be added to: a model, or an artifact."""

    @property
    def id(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def index(self) -> Mapping[str, Any]:
        """As in `model_index.json`."""

    @property
    def modules(self) -> tuple[str, ...]: ...
    def config(self, module: str) -> dict[str, Any]: ...
    def shapes(self, module: str) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of a module's weights, by their names in its checkpoint."""


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to one weight: `factor * up @ down`."""

    up: Tensor
    """(out, rank), or (out, rank, 1, 1) of a convolution."""
    down: Tensor
    """(rank, in), or (rank, in, height, width) of a convolution."""
    factor: float
    """The user's scale times alpha over rank."""

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Return the addition in float32, in the weight's shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.factor).reshape(tuple(shape))


@dataclass(frozen=True)
class Lora:
    """A LoRA file for a pipeline, at a scale."""

    file: Path
    scale: float
    deltas: Mapping[str, Mapping[str, Delta]]
    """Module -> name of the weight in its checkpoint -> what is added to it."""

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What decides the result: for keys and manifests."""
        return {"sha256": sha256(self.file), "scale": self.scale}

    @classmethod
    def open(cls, text: str, model: Adaptable) -> Lora:
        """Read `file.safetensors` or `file.safetensors:scale` for a pipeline.

        Raises:
            UsageError: there is no such file, or the scale is no number.
            PickleError: it is a pickle.
            SourceError: it isn't a LoRA, or one for another family.
        """
        file, scale = _parse(text)
        layers, alphas = _read(file, model)
        shapes = {module: model.shapes(module) for module in {layer.partition(".")[0] for layer in layers}}
        deltas: dict[str, dict[str, Delta]] = {}
        for layer in sorted({key.removesuffix(_DOWN).removesuffix(_UP) for key in layers}):
            module, _, path = layer.partition(".")
            up, down = layers.get(layer + _UP), layers.get(layer + _DOWN)
            if up is None or down is None:
                message = f"{file} lacks one half of {layer}: a LoRA has an up and a down for each layer"
                raise SourceError(message, fix="download or copy it again")
            name = _weight(shapes[module], path)
            if name is None:
                message = f"{file} is for another model: {model.id} has no {layer}"
                raise SourceError(message, fix="give a LoRA that was trained on this model's family")
            shape = shapes[module][name]
            if up.shape[0] != shape[0] or math.prod(down.shape[1:]) != math.prod(shape[1:]):
                message = (
                    f"{file} is for another model: {layer} is {up.shape[0]}×{math.prod(down.shape[1:])} in it, "
                    f"{shape[0]}×{math.prod(shape[1:])} in {model.id}"
                )
                raise SourceError(message, fix="give a LoRA that was trained on this model's family")
            factor = scale * alphas.get(layer, float(len(down))) / len(down)
            deltas.setdefault(module, {})[name] = Delta(up, down, factor)
        return cls(file, scale, deltas)


def deltas_of(loras: Iterable[Lora], module: str) -> dict[str, list[Delta]]:
    """Return what LoRAs add to the weights of a module, by their names."""
    deltas: dict[str, list[Delta]] = {}
    for lora in loras:
        for name, delta in lora.deltas.get(module, {}).items():
            deltas.setdefault(name, []).append(delta)
    return deltas


def added(weight: Tensor, deltas: Iterable[Delta]) -> Tensor:
    """Return a weight with LoRAs added in float32, in its own dtype; the same bytes whenever the same are added."""
    total = weight.float()
    for delta in deltas:
        total = total + delta.tensor(weight.shape).to(weight.device)
    return total.to(weight.dtype)


def changed_modules(loras: Iterable[Lora]) -> list[str]:
    """Name the modules that LoRAs change."""
    return sorted({module for lora in loras for module in lora.deltas})


@contextlib.contextmanager
def with_loras(
    source: Source, loras: Sequence[Lora], target: Path, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Source]:
    """Write the modules that LoRAs change, with these added, and yield the source that has them, for the while.

    Args:
        source: stays as it is; without LoRAs it is yielded itself.
        loras: what is added.
        target: an artifact's folder, beside which they are written.
        progress: called with a line for each module.
    """
    if not loras:
        yield source
        return
    with scratch(target) as work:
        written = {}
        for module in changed_modules(loras):
            progress(f"merging {' and '.join(lora.file.name for lora in loras)} into {module}")
            written[module] = work / module
            _merge(loras, source, module, written[module])
        yield replace(source, elsewhere={**source.elsewhere, **written})


def _merge(loras: Sequence[Lora], source: Source, module: str, folder: Path) -> None:
    """Write a module's config and checkpoint with the LoRAs added, in the files' own dtypes, into a new folder."""
    folder.mkdir(parents=True)
    shutil.copyfile(source.path(module) / "config.json", folder / "config.json")
    checkpoint, deltas = source.checkpoint(module), deltas_of(loras, module)

    def changed(entry: Entry) -> Iterator[memoryview] | None:
        return iter([as_bytes(added(read_tensor(entry), deltas[entry.name]))]) if entry.name in deltas else None

    write_entries(checkpoint.entries.values(), folder / checkpoint.single_file, changed=changed)


def _parse(text: str) -> tuple[Path, float]:
    name, separator, last = text.rpartition(":")
    scale = 1.0
    if separator and not Path(text).exists():
        try:
            scale = float(last)
        except ValueError as error:
            message = f"got the LoRA {text!r}, expected FILE or FILE:SCALE"
            raise UsageError(message, fix=f"--lora {name}:0.8") from error
        text = name
    file = Path(text).expanduser()
    if not math.isfinite(scale):
        message = f"got the LoRA scale {scale}, expected a finite number"
        raise UsageError(message)
    if not file.is_file():
        message = f"no LoRA file {file}"
        raise UsageError(message, fix="--lora FILE.safetensors:0.8")
    if file.suffix != ".safetensors":
        message = f"{file} is not safetensors: bakeoff opens no pickles, which can run code"
        raise PickleError(message, fix="get the .safetensors version of this LoRA, or convert it where you trust it")
    return file, scale


def _read(file: Path, model: Adaptable) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return halves of layers by `module.layer.lora_A.weight` or `…lora_B.weight`, and the layers' alphas."""
    import diffusers
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as stream:
            metadata = json.loads((stream.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        message = f"{file} can't be read as safetensors: {error}"
        raise SourceError(message, fix="download or copy it again") from error
    pipeline = model.family.pipeline_class("text-to-image")
    if not hasattr(pipeline, "lora_state_dict"):
        message = f"{model.family.name} takes no LoRA: {pipeline.__name__} loads none"
        raise UsageError(message, fix="leave it out, or merge it into the model yourself")
    configs = {
        f"{module}_config": diffusers.configuration_utils.FrozenDict(model.config(module)) for module in model.modules
    }
    try:
        converted = pipeline.lora_state_dict(tensors, return_alphas=True, **configs)
    except Exception as error:
        message = f"{file} isn't a LoRA for {model.family.name}: {error!r}"
        raise SourceError(message, fix="give a LoRA that was trained on this model's family") from error
    state, network_alphas = converted if isinstance(converted, tuple) else (converted, None)
    halves = _as_peft(state, model)
    foreign = sorted(key for key in state if key.partition(".")[0] not in model.modules)
    strange = foreign or sorted(key for key in halves if not key.endswith((_DOWN, _UP)))
    if strange or not halves:
        found = f"{strange[0]} and {len(strange) - 1} more" if strange else "no tensors"
        message = f"{file} holds {found}, which {model.family.name} has no place for"
        raise SourceError(message, fix="give a plain LoRA (no DoRA, LoKr or biases) that was trained on this family")
    named = {key.removesuffix(".alpha"): value for key, value in (network_alphas or {}).items()}
    alphas = {key.partition(".lora_")[0]: float(value) for key, value in _as_peft(named, model).items()}
    return halves, {**_alphas_of(metadata, halves), **alphas}


def _as_peft(found: Mapping[str, Any], model: Adaptable) -> dict[str, Any]:
    """Name layers and their halves as PEFT does, module by module; what belongs to none is left out."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    named: dict[str, Any] = {}
    for module in model.modules:
        own = {key: value for key, value in found.items() if key.startswith(f"{module}.")}
        if own and not any(".lora_A" in key for key in own):
            is_text = model.index[module][0] == "transformers"
            own = (convert_state_dict_to_peft if is_text else convert_unet_state_dict_to_peft)(own)
        named |= own
    return named


def _alphas_of(metadata: Mapping[str, Any], halves: Mapping[str, Tensor]) -> dict[str, float]:
    """Read alphas from PEFT's configs, one a module, that Diffusers stores beside the tensors."""
    alphas = {}
    for key in halves:
        layer = key.removesuffix(_DOWN).removesuffix(_UP)
        module, _, path = layer.partition(".")
        config = {name.partition(".")[2]: value for name, value in metadata.items() if name.startswith(f"{module}.")}
        if "lora_alpha" in config:
            pattern = config.get("alpha_pattern") or {}
            alpha = next((value for name, value in pattern.items() if path.endswith(name)), config["lora_alpha"])
            rank = len(halves[layer + _DOWN])
            alphas[layer] = float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    return alphas


def _weight(names: Iterable[str], path: str) -> str | None:
    """Find the weight that a layer's LoRA is for; CLIP's names come with and without `text_model.`."""
    plain = path.removeprefix("text_model.")
    return next((n for n in (f"{path}.weight", f"{plain}.weight", f"text_model.{plain}.weight") if n in names), None)
