"""Single-file checkpoints, as SD.Next and ComfyUI keep them, into the module folders that Diffusers has.

Diffusers' own converters say which tensor becomes which. They are given tensors that stay mapped, and what they return is
streamed to disk as it is, so that a conversion takes next to no memory and changes no value and no dtype. (The one
exception: plain fp8 is written as bf16, which holds each of its values.)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..artifact import staged
from ..errors import ArtifactError, PickleError, ResourceError, SourceError
from ..home import home, remembered_sha256
from ..weights import SAFETENSORS_DTYPES, Entry, as_bytes, read_header, write_entries

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    Tensors = dict[str, Tensor]

_VERSION = 1
"""Of what is written: a change makes conversions anew."""
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
_CLIP_L = "text_encoders.clip_l.transformer."
_TEXT_ENCODERS = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        _CLIP_L,
        "text_encoders.qwen3_4b.transformer.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "text_encoders.clip_g.transformer.",
        "text_encoders.t5xxl.transformer.",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}
"""Module -> what its tensors' names start with in one or another kind of file."""
_SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")
_FP8 = ("F8_E4M3", "F8_E5M2")


def check(file: Path) -> None:
    """Refuse what is no safetensors file, before anything of it is read.

    Raises:
        PickleError: it is a pickle.
        SourceError: it is something else.
    """
    if file.suffix in _PICKLES:
        message = f"{file} is a pickle, which can run code when it is opened: bakeoff never opens one"
        raise PickleError(
            message,
            fix="get the .safetensors version of this checkpoint, or, where you trust it, convert it: "
            f'python -c "import torch, safetensors.torch as s; '
            f"d = torch.load('{file.name}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
            "s.save_file({k: v.clone() for k, v in d.items() if torch.is_tensor(v)}, "
            f"'{file.stem}.safetensors')\"",
        )
    if file.suffix != ".safetensors":
        message = f"got the file {file}, expected a .safetensors checkpoint, a Diffusers folder or a hub id"
        raise SourceError(message, fix="get the .safetensors version of this checkpoint")


def likely_config(file: Path) -> str:
    """Return the hub id of the pipeline whose configs a checkpoint's keys ask for, as Diffusers infers it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(_mapped(file))["pretrained_model_name_or_path"])


def convert(file: Path, config: Path, index: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Path]:
    """Write each module that a checkpoint holds into a folder of its own, once; return these folders.

    Args:
        file: a .safetensors file with modules under the names that their authors gave them.
        config: a Diffusers folder, for the modules' configs.
        index: its `model_index.json`.
        modules: what the pipeline consists of.

    Raises:
        SourceError: it isn't a checkpoint for this config, or is quantized in a way that can't be read.
        ResourceError: there is too little room for it.
    """
    modules = tuple(modules)
    target = home() / "converted" / _key(file, config, modules)
    if not target.is_dir():
        _refuse_scaled(file)
        _refuse_other_prediction(file, config)
        _check_room(file, target)
        try:
            _convert_all(file, config, {module: index[module] for module in modules}, target)
        except ArtifactError:
            if not target.is_dir():  # else another process was quicker
                raise
    return {module: target / module for module in modules if (target / module).is_dir()}


def _convert_all(file: Path, config: Path, modules: Mapping[str, tuple[str, str]], target: Path) -> None:
    tensors = _mapped(file)
    with staged(target, replace_existing=False) as folder:
        for module, class_name in modules.items():
            _convert(tensors, file, config / module, class_name, folder / module)
        if not any(folder.iterdir()):
            message = f"{file} holds none of the modules of {config}: {', '.join(modules)}"
            raise SourceError(message, fix="give a whole checkpoint, or the --config of its own pipeline")


def _key(file: Path, config: Path, modules: Iterable[str]) -> str:
    """Hash what decides the result."""
    parts = [remembered_sha256(file), f"{_VERSION} {importlib.metadata.version('diffusers')}"]
    parts += [f"{module} {_hash(config / module / 'config.json')}" for module in modules]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _hash(file: Path) -> str:
    if not file.is_file():
        message = f"{file.parent.parent} has no {file.parent.name}/{file.name}, which its model_index.json asks for"
        raise SourceError(message, fix="give a Diffusers folder with all of a pipeline's configs, or its hub id")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _mapped(file: Path) -> Tensors:
    """Open all tensors without reading them."""
    from safetensors.torch import load_file

    read_header(file)  # says what is wrong with a broken file
    tensors: Tensors = load_file(file)
    return tensors


def _refuse_scaled(file: Path) -> None:
    entries = read_header(file)
    names = [entry.name for entry in entries if entry.name.endswith(_SCALED)]
    known = {*SAFETENSORS_DTYPES.values(), *_FP8}
    names += [entry.name for entry in entries if entry.dtype not in known and entry.name.endswith(".weight")]
    if names:
        message = f"{file} is quantized in a way that bakeoff doesn't read: it has {names[0]}"
        raise SourceError(message, fix="get its fp16, bf16 or plain fp8 version")


def _refuse_other_prediction(file: Path, config: Path) -> None:
    """Refuse a v-prediction model, which says so by a key, under a scheduler that would make noise of it."""
    scheduler = config / "scheduler" / "scheduler_config.json"
    if "v_pred" not in {entry.name for entry in read_header(file)} or not scheduler.is_file():
        return
    if json.loads(scheduler.read_text()).get("prediction_type") != "v_prediction":
        message = f"{file} predicts v (it has the key v_pred), the scheduler of {config} is set for another prediction"
        raise SourceError(message, fix=f'copy {config} and set "prediction_type": "v_prediction" in scheduler/')


def _check_room(file: Path, target: Path) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    needed = sum(entry.length * (2 if entry.dtype in _FP8 else 1) for entry in read_header(file))
    free = shutil.disk_usage(parent).free
    if needed > free:
        message = f"to convert {file} takes up to {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        raise ResourceError(message, fix=f"free some space on the disk of {parent}, or set BAKEOFF_HOME to another")


def _convert(tensors: Tensors, file: Path, config: Path, class_name: tuple[str, str], folder: Path) -> None:
    """Write one module, if the checkpoint holds it."""
    expected = _expected(config, *class_name)
    with _uncopied():
        found = _named(_diffusers_names(tensors, config, class_name[1], expected), expected)
    if not found:
        return
    lacking = sorted(set(expected) - set(found))
    if lacking:
        message = f"{file} lacks {len(lacking)} of the {len(expected)} tensors of {config}, such as {lacking[0]}"
        raise SourceError(message, fix="give the --config of the pipeline that this checkpoint was made from")
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            message = f"{file} has {name} of {tuple(tensor.shape)}, {config} expects {expected[name]}"
            raise SourceError(message, fix="give the --config of the pipeline that this checkpoint was made from")
    folder.mkdir()
    shutil.copyfile(config / "config.json", folder / "config.json")
    name = "model" if class_name[0] == "transformers" else "diffusion_pytorch_model"
    _write(found, folder / f"{name}.safetensors")


def _expected(config: Path, library: str, class_name: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a module has, by name; those that are tied under their first name."""
    import torch

    if library not in {"diffusers", "transformers"}:
        message = f"{config.parent} wants {config.name} from {library}, expected diffusers or transformers"
        raise SourceError(message)
    module_class = getattr(importlib.import_module(library), class_name)
    fields = json.loads((config / "config.json").read_text())
    with torch.device("meta"):
        if library == "transformers":
            module = module_class(module_class.config_class.from_dict(fields))
        else:
            module = module_class.from_config(fields)
    state = module.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tuple(tensor.shape) for name, tensor in state.items() if first[id(tensor)] == name}


def _diffusers_names(
    tensors: Tensors, config: Path, class_name: str, expected: Mapping[str, tuple[int, ...]]
) -> Tensors:
    """Rename, split and turn tensors into those of a module; nothing if they aren't there."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if config.name in _TEXT_ENCODERS:
        return _text_encoder(tensors, config, expected)
    if set(expected) <= set(tensors):
        return tensors
    mapping = SINGLE_FILE_LOADABLE_CLASSES.get(class_name)
    if mapping is None:
        return {}
    fields = json.loads((config / "config.json").read_text())
    try:
        converted: Tensors = mapping["checkpoint_mapping_fn"](config=fields, checkpoint=dict(tensors))
    except IndexError:  # it counts blocks, and there are none
        return {}
    except KeyError as error:
        message = f"the checkpoint lacks {error} of the {config.name} that its other keys speak of"
        raise SourceError(message, fix="download or copy it again") from error
    return converted


def _text_encoder(tensors: Tensors, config: Path, expected: Mapping[str, tuple[int, ...]]) -> Tensors:
    import torch
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    prefix = next((p for p in _TEXT_ENCODERS[config.name] if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        return {}
    if prefix in _OPEN_CLIP:
        width = json.loads((config / "config.json").read_text())["hidden_size"]
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
        converted: Tensors = convert_open_clip_checkpoint(model, tensors, prefix=prefix)
        return converted
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if prefix == _CLIP_L and "text_projection.weight" in expected:  # SD 3 takes it unprojected, whatever the file says
        width = expected["text_projection.weight"][0]
        found["text_projection.weight"] = torch.eye(width, dtype=next(iter(found.values())).dtype)
    return found


def _named(found: Tensors, expected: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return the expected tensors; Transformers' names come with and without their wrappers'."""
    named = {}
    for name in expected:
        plain = name.removeprefix("text_model.")
        for other in (name, plain, f"text_model.{plain}", f"model.{plain}"):
            if other in found:
                named[name] = found[other]
                break
    return named


@contextmanager
def _uncopied() -> Iterator[None]:
    """Let converters cut mapped tensors without copying the pieces."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Uncopied(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's
            if function is torch.Tensor.clone:
                return args[0]
            if function is torch.cat and len(args[0]) == 1:
                return args[0][0]
            return function(*args, **(kwargs or {}))

    with Uncopied():
        yield


def _write(tensors: Tensors, file: Path) -> None:
    """Stream tensors into a file as `save_pretrained` would write it, a tensor at a time."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    write_entries(
        [_entry(name, tensors[name], file) for name in names],
        file,
        changed=lambda entry: [as_bytes(_plain(tensors[entry.name]).contiguous())],
    )


def _entry(name: str, tensor: Tensor, file: Path) -> Entry:
    import torch

    dtype = torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype
    short = SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]
    return Entry(name, file, short, tuple(tensor.shape), 0, tensor.numel() * dtype.itemsize)


def _plain(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor
