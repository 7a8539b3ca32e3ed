"""Lower a captured part to ONNX whose weights stay in the checkpoint's own safetensors files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, ClassVar

from ..errors import LoweringError, RecipeError
from ..quantize.calibration import METHODS
from .costs import graph_cost, stored_bytes
from .exporter import Cost, Lowered
from .graphs import Shelf
from .hollow import lower_hollow
from .layers import write_layers
from .onnx_weights import Weights, bring, name_tensors, read_hollow, weight_bytes
from .packing import storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx_ir
    from torch.export import ExportedProgram

    from ..components.component import Port
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint
    from .exporter import Subject
    from .hollow import Hollow

FILE = "model.onnx"
_FOLD_ELEMENTS = 8192
_FOLDS = 2
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")
_KEPT_BYTES = 256_000_000
"""Graphs with more of their own constants aren't kept."""


class OnnxExporter:
    """`model.onnx`: a graph of a few MB; every tensor that equals one of the checkpoint points into its file.

    2-D weights keep their bytes too: Linear layers come as MatMul with Transpose(weight), which the runtimes
    fold when they load. bf16 and fp16 are what weights are stored in: the graph widens them and computes in float32, which
    every execution provider can; `fp16+compute=half` computes in float16, as GPUs do best. Low-bit weights are ONNX
    Runtime's MatMulNBits, MatMulBnb4 and GatherBlockQuantized; those of convolutions, for int8, are widened as they run.
    """

    version: ClassVar[int] = 10
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int4", "nf4", "w8a8", "w8a8-dynamic")
    reasons: ClassVar[Mapping[str, str]] = {
        "fp8": "ONNX's MatMul takes no 8-bit floats; widened ones keep 32 dB of a normal distribution, int8 40 dB in as many bytes",
    }
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(precisions, precisions)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activations": METHODS,
        "outputs": ("wide", "rounded"),
        "compute": ("float32", "half"),
    }

    def cost(
        self,
        checkpoint: Checkpoint,
        mixture: Mixture,
        *,
        options: Mapping[str, str],
        operations: int,
        shared: bool,
    ) -> Cost:
        weights = stored_bytes(checkpoint, mixture)
        linked = shared and mixture.is_plain and not _is_half(options) and checkpoint.is_in(storage(mixture.precision))
        written = 0 if linked else sum(weights.values())
        return graph_cost(weights, written, operations, packs=bool(mixture.formats))

    def packages(self) -> tuple[str, ...]:
        return _TOOLS

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        if _is_half(subject.options):
            return _lower_half(subject, folder)
        model, weights = hollow_graph(subject)
        brought = bring(model, weights, subject, folder)
        strip(model)
        write_layers(layers_of(model), subject.checkpoint, folder)
        save(model, folder)
        return Lowered(brought.how, weight_bytes(model, brought.labels), brought.kept)


def _is_half(options: Mapping[str, str]) -> bool:
    return options.get("compute") == "half"


def _lower_half(subject: Subject, folder: Path) -> Lowered:
    """Write a graph that computes in float16.

    Raises:
        RecipeError: the recipe is of another precision; on a CPU, which proves it, ONNX Runtime has no products of bfloat16.
    """
    from .onnx_typed import write_graph

    others = sorted({*subject.mixture.layers.values()} - {"fp16", "fp32"})
    if others:
        message = f"{subject.part}: with compute=half layers are in fp16 or fp32, the recipe has {', '.join(others)}"
        raise RecipeError(message, fix="leave out compute, or give these layers fp16 or fp32")
    if subject.mixture.precision != "fp16":
        message = f"{subject.part}: compute=half is for fp16, the recipe has {subject.mixture.precision}"
        raise RecipeError(message, fix="onnx:fp16+compute=half; or leave out compute")
    graph = write_graph(subject, "fp16", folder, turned=False)
    return Lowered("written", graph.weight_bytes, graph.kept)


def hollow_graph(subject: Subject) -> tuple[onnx_ir.Model, Weights]:
    """Return a part's graph in float32, whose large weights are stand-ins without values, and what they stand for."""
    import onnx_ir

    shelf = Shelf.of(subject, "onnx", _TOOLS)
    kept = shelf.found()
    if kept:
        return read_hollow(onnx_ir.load(kept / FILE), subject.checkpoint)

    def lowered(program: ExportedProgram, hollow: Hollow) -> tuple[tuple[onnx_ir.Model, Weights], set[str]]:
        model = translate(subject, program)
        optimize(model)
        weights = Weights.of(model, hollow)
        return (model, weights), {entry.name for entry in weights.found.values()}

    model, weights = lower_hollow(subject.part, subject.capture, lowered)
    name_dims(model, subject.inputs, subject.outputs)
    name_tensors(model, weights)
    if weights.made_bytes >= _KEPT_BYTES:
        return model, weights
    shelf.keep(lambda folder: save(model, folder))
    # As if it had been kept: names that nodes get from here on depend on those that were ever given.
    return read_hollow(onnx_ir.from_proto(onnx_ir.to_proto(model)), subject.checkpoint)


def translate(subject: Subject, captured: ExportedProgram) -> onnx_ir.Model:
    import torch

    try:
        with _quiet():
            program = torch.onnx.export(
                captured,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[port.name for port in subject.inputs],
                output_names=[port.name for port in subject.outputs],
            )
    except Exception as error:
        message = f"{subject.part} couldn't be lowered to ONNX: {error}"
        raise LoweringError(message) from error
    assert program is not None  # noqa: S101 - only the old exporter returns None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (steps, deprecations, that torchvision is missing) to itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def optimize(model: onnx_ir.Model) -> None:
    """Fold constants and drop what is unused or there twice, but never materialise a transposed weight.

    onnxscript's rewrite rules are left out: they take ten times as long as all of this, grow faster than the graph, and
    drop additions of less than 1e-8, which divisions rely on. Runtimes do the same when they load.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants_ir

    for _ in range(_FOLDS):
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLD_ELEMENTS,
            output_size_limit=_FOLD_ELEMENTS,
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )
        common.RemoveUnusedNodesPass()(model)
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def name_dims(model: onnx_ir.Model, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Give the dynamic dimensions of the interface the names that the ports have."""
    import onnx_ir

    for values, ports in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = onnx_ir.Shape(
                [dim if isinstance(dim, int) else dim.replace("*", "_").replace("/", "_over_") for dim in port.dims]
            )


def strip(model: onnx_ir.Model) -> None:
    """Drop stack traces: they hold paths of the machine that exported."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "bakeoff"
    for node in model.graph:
        kept = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if kept:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = kept
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def layers_of(model: onnx_ir.Model) -> Iterator[tuple[str, str]]:
    """Yield (module path, name) of each node that came from a module."""
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes and node.name:
            yield _module_path(scopes), node.name


def _module_path(scopes: str) -> str:
    """`['', 'module', 'module.conv_in', 'conv2d']` -> `module.conv_in`."""
    import ast

    names: list[str] = ast.literal_eval(scopes)
    return names[-2] if len(names) > 1 else ""


def save(model: onnx_ir.Model, folder: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, folder / FILE)
