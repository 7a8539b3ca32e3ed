"""A genuine Diffusers pipeline whose parts are runtime-backed.

Tokenizer, scheduler, guidance, VAE scaling and the loop are Diffusers' own code; it computes where the pipeline's
tensors lie (`device`). What would silently do nothing on such parts (`to`, offload, LoRA…) raises and says what to use
instead.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, InputError
from ..sources.source import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..components.component import Runner
    from .opening import Baked

_LIBRARIES = ("diffusers", "transformers")
_GUARDED = re.compile(r"(enable|disable|load|fuse|unfuse|unload|save|set|delete|push|reset)_")
_WORKING = {
    "set_progress_bar_config",
    "load_config",
    "save_config",
}
_INSTEAD = {
    "lora": "engine.set_loras('FILE.safetensors:0.8') adds LoRAs; bakeoff export --lora bakes them in",
    "adapter": "engine.set_loras('FILE.safetensors:0.8') adds LoRAs; other adapters go into the model before it is exported",
    "textual_inversion": "add the embedding to the source model before you export it",
    "offload": "choose the device when you load: bakeoff.load(folder, device=…)",
    "save": "the artifact folder is already saved: copy it",
    "push": "upload the artifact folder",
}
_INSTEAD_OTHERWISE = "it acts on torch modules; use the original Diffusers pipeline for it"


def for_task(pipeline: Any, plain: Any) -> Any:  # noqa: ANN401 - some Diffusers pipelines
    """Build another Diffusers pipeline, given its class, of the same objects."""
    accepted = inspect.signature(plain.__init__).parameters
    arguments = {name: value for name, value in pipeline.components.items() if name in accepted}
    if "requires_safety_checker" in accepted:
        arguments["requires_safety_checker"] = False
    return _guarded(plain, pipeline.device)(**arguments)


def build_pipeline(baked: Baked, runners: Mapping[str, Runner], task: str = "text-to-image", home: str = "cpu") -> Any:  # noqa: ANN401 - some Diffusers pipeline
    """Build the family's pipeline for a task around runners, given by part name; its tensors lie on the device `home`."""
    import torch

    device = torch.device(home)
    plain = baked.family.pipeline_class(task)
    index = read_json(baked.folder / "model_index.json")
    accepted = dict(list(inspect.signature(plain.__init__).parameters.items())[1:])
    stand_ins = _stand_ins(baked, runners)
    for stand_in in stand_ins.values():
        stand_in.device = device
    optional = plain._optional_components  # noqa: SLF001 - Diffusers has no public name for it
    arguments = {
        name: _host_object(baked, name, index.get(name), needed=name not in optional)
        for name, parameter in accepted.items()
        if name not in stand_ins and (name in index or parameter.default is inspect.Parameter.empty)
    }
    if "requires_safety_checker" in accepted:
        arguments["requires_safety_checker"] = False
    return _guarded(plain, device)(**arguments, **stand_ins)


def _stand_ins(baked: Baked, runners: Mapping[str, Runner]) -> dict[str, Any]:
    by_module: dict[str, dict[str, Runner]] = {}
    components = {}
    for part in baked.family.parts:
        if part.name in runners:
            by_module.setdefault(part.module, {})[part.name] = runners[part.name]
            components[part.module] = part
    return {
        module: components[module].component.stand_in(of_module, baked.config(module))
        for module, of_module in by_module.items()
    }


def _host_object(baked: Baked, name: str, declared: object, *, needed: bool) -> object:
    """Load a scheduler or tokenizer by the class that the index names; only Diffusers' and Transformers' own.

    Modules aren't loaded: a safety checker is left out, like all that the pipeline doesn't need.
    """
    folder = baked.folder / name
    if not (isinstance(declared, list) and len(declared) == 2 and folder.is_dir()):  # noqa: PLR2004
        return declared if isinstance(declared, bool) else None
    library, class_name = declared
    if library not in _LIBRARIES:
        if not needed:
            return None
        message = (
            f"{baked.folder} wants {library}.{class_name} for its {name}; only {' and '.join(_LIBRARIES)} are loaded"
        )
        raise ArtifactError(message)
    import importlib

    import torch

    found = getattr(importlib.import_module(library), class_name, None)
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        if not needed:
            return None
        message = f"{baked.folder} has a {name} ({class_name}), which is no part of a {baked.family.name} pipeline here"
        raise ArtifactError(message)
    if found is None or not hasattr(found, "from_pretrained"):
        message = f"{library} has no {class_name}, which {baked.folder} wants for its {name}"
        raise ArtifactError(message, fix="install the version of Diffusers and Transformers that made it")
    return found.from_pretrained(folder, local_files_only=True)


def _guarded(plain: type, device: torch.device) -> type:
    """Subclass a pipeline, under its own name, so that what can't work on runtime-backed parts raises."""
    refused = {
        name: _refusing(name)
        for name in dir(plain)
        if _GUARDED.match(name) and name not in _WORKING and callable(getattr(plain, name))
    }
    return type(plain.__name__, (plain,), {**refused, "to": _to, "device": device, "__module__": plain.__module__})


def _refusing(name: str) -> Callable[..., None]:
    def refuse(self: object, *args: object, **options: object) -> None:  # noqa: ARG001
        message = f"{name}() does nothing on runtime-backed parts"
        fix = next((text for word, text in _INSTEAD.items() if word in name), _INSTEAD_OTHERWISE)
        raise InputError(message, fix=fix)

    refuse.__name__ = name
    return refuse


def _to(self: Any, *args: object, **options: object) -> object:  # noqa: ANN401 - some Diffusers pipeline
    """Accept the device on which the pipeline's tensors lie; refuse any other device or dtype."""
    from ..components.standin import is_there

    wanted = [*args, *options.values()]
    if wanted and all(value is None or isinstance(value, bool) or is_there(value, self.device) for value in wanted):
        return self
    message = f"to({', '.join(map(str, wanted))}) can't move or convert runtime-backed parts"
    raise InputError(
        message, fix="bakeoff.load(folder, device=…) places them; the recipe of an export sets their precision"
    )
