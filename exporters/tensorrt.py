"""Lower a captured part to a TensorRT engine: typed ONNX, then a plan for the GPU that is here."""

from __future__ import annotations

import importlib.metadata
import json
import time
from typing import TYPE_CHECKING, Any, ClassVar

from .. import nvinfer
from ..errors import RecipeError, UnavailableError
from ..quantize.fp8 import CAPABILITY
from .costs import BYTES_PER_S, graph_cost, stored_bytes
from .exporter import Cost, Lowered
from .layers import FILE as LAYERS
from .onnx import FILE as ONNX
from .onnx_memory import peak_bytes
from .onnx_typed import WEIGHTS, write_graph
from .tensorrt_build import BUILD_TIMES, Request, build, check_room
from .tensorrt_settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..hardware import Availability
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint
    from .exporter import Subject
    from .tensorrt_settings import Triple

PLAN, ABOUT = "model.plan", "engine.json"
SCHEMA = 1
_LOWERED_WITH = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
_LEAST_CAPABILITY = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0), "w8a8": (7, 5), "int4": (8, 0), "fp8": CAPABILITY}
"""Precision -> the compute capability from which GPUs have it; 7.5 is CUDA 13's least."""


class TensorRTExporter:
    """`model.plan`, and `engine.json`, which says what it is bound to and what each product is to compute in.

    Precision comes from the graph alone: TensorRT 11 has no other way. `model.onnx` stays beside the plan; its weights
    only where they can be exchanged (`refit`, `strip`).
    """

    version: ClassVar[int] = 4
    wide_norms: ClassVar[bool] = True
    """Whether norms take and give float32, whatever the part computes in."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "w8a8", "fp8", "int4")
    reasons: ClassVar[Mapping[str, str]] = {
        "int8": "of int8, TensorRT multiplies rounded weights by rounded activations alone; weight-only is int4",
        "nf4": "TensorRT has no codes of 16 uneven levels",
        "w8a8-dynamic": "TensorRT rounds activations as they come in blocks of 8-bit and 4-bit floats alone",
    }
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bf16": ("fp32", "bf16"),
        "fp16": ("fp32", "fp16"),
        "w8a8": ("fp32", "bf16", "fp16", "w8a8"),
        "fp8": ("fp32", "bf16", "fp16", "fp8"),
        "int4": ("fp32", "bf16", "fp16", "int4"),
    }
    options: ClassVar[Mapping[str, tuple[str, ...]]] = Settings.OPTIONS

    def probe(self) -> Availability:
        """Say whether engines can be built here."""
        return nvinfer.available()

    def check(self, precision: str, options: Mapping[str, str]) -> None:
        """Refuse options that can't be meant, and precisions that this GPU hasn't.

        Raises:
            RecipeError: an option's value means nothing.
            UnavailableError: the GPU is too old.
        """
        compute = Settings.read(precision, options).compute
        device = nvinfer.device()
        for each, fix in ((precision, "tensorrt:fp16"), (compute, f"tensorrt:{precision}+compute=fp16")):
            if not device.at_least(*_LEAST_CAPABILITY[each]):
                least = ".".join(map(str, _LEAST_CAPABILITY[each]))
                message = f"{device.name} has compute capability {device.capability}; {each} takes {least}"
                raise UnavailableError(message, fix=f"--recipe {fix}")

    def key_fields(self, precision: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Return what decides the plan besides the model and the recipe: all settings, the tools, the machine.

        What the ONNX is made of is in the key already (source, component, recipe, these tools); its hash is in the files.
        """
        return {
            "settings": Settings.read(precision, options).as_dict(),
            "lowered_with": {package: importlib.metadata.version(package) for package in _LOWERED_WITH},
            "bound": nvinfer.binding(),
        }

    def packages(self) -> tuple[str, ...]:
        return (*_LOWERED_WITH, nvinfer.PACKAGE)

    def cost(
        self,
        checkpoint: Checkpoint,
        mixture: Mixture,
        *,
        options: Mapping[str, str],  # noqa: ARG002 - the same for all
        operations: int,
        shared: bool,  # noqa: ARG002 - a plan has its own weights
    ) -> Cost:
        """Predict the graph's cost, and of the build its memory: the time that it takes isn't known."""
        weights = stored_bytes(checkpoint, mixture)
        total = sum(weights.values())
        graph = graph_cost(weights, total, operations, packs=bool(mixture.formats))
        return Cost(
            anon_bytes=graph.anon_bytes + int(BUILD_TIMES * total),
            disk_bytes=2 * total,
            seconds=graph.seconds + total / BYTES_PER_S,
            weight_bytes=weights,
        )

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        settings = Settings.read(subject.mixture.precision, subject.options)
        bound = nvinfer.binding()
        shapes = settings.shapes(subject.inputs, subject.limits)
        _refuse_other_floats(subject, settings.compute)
        graph = write_graph(subject, settings.compute, folder, wide_norms=self.wide_norms)
        weights = sum(graph.weight_bytes.values())
        if not settings.weight_streaming:
            check_room(subject.part, weights, nvinfer.free_bytes())
        activations = _activations(folder / ONNX, shapes)
        needed = None if activations is None else int(BUILD_TIMES * (weights + activations))
        nodes = [name for names in json.loads((folder / LAYERS).read_text()).values() for name in names]
        started = time.perf_counter()
        build(Request(subject.part, folder / ONNX, folder / PLAN, settings, shapes, [*nodes, *graph.products], needed))
        about = {
            "schema": SCHEMA,
            "onnx": graph.sha256,
            "bound": bound,
            "settings": settings.as_dict(),
            "shapes": [{name: [list(shape) for shape in each] for name, each in one.items()} for one in shapes],
            "products": dict(graph.products),
            "weights": {name: list(each) for name, each in graph.weights.items()},
            "predicted": {"activation_bytes": activations, "build_bytes": needed},
            "build_s": round(time.perf_counter() - started, 2),
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        if not settings.keeps_weights:
            (folder / WEIGHTS).unlink()
        return Lowered("written", graph.weight_bytes, graph.kept)


def _activations(file: Path, shapes: Sequence[Mapping[str, Triple]]) -> int | None:
    """Predict the activations of the largest shapes; None where they can't be told, for which no export fails."""
    try:
        return max(peak_bytes(file, {name: each[2] for name, each in one.items()}) for one in shapes)
    except Exception:  # noqa: BLE001 - whatever folding and inference raise
        return None


def _refuse_other_floats(subject: Subject, compute: str) -> None:
    """Raise if layers are to be in a float that is neither float32 nor what the part computes in.

    Raises:
        RecipeError: naming them.
    """
    precision, known = subject.mixture.precision, {"fp32", compute, subject.mixture.precision}
    others = sorted({*subject.mixture.layers.values()} - known)
    if others:
        message = (
            f"{subject.part}: layers are to be in {', '.join(others)}, where tensorrt:{precision} computes in {compute}"
        )
        raise RecipeError(message, fix=f"give these layers fp32 or {compute}, or the part +compute={others[0]}")
