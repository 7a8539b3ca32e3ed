"""Prove an artifact: each part computes what its source computes, within what the noise floor justifies.

Floors, measured for the part on this machine: F0, eager fp32 against itself with another thread count and split
batches; F1, eager bf16 against eager fp32, with weights rounded where the recipe says so. Errors are relative
root mean squares, `|got - expected| / |expected|`, and as SQNR, `-20 log10` of that, in dB.
"""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .artifact import ACTIVATIONS, Artifact, staged
from .components.component import PROOF_SIZES, WRAPPER
from .errors import ParityError, SourceError, UnavailableError
from .memory import available_bytes, in_child
from .recipe import Placement
from .source import Source
from .weights import layer_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .components.component import Component
    from .components.family import Part
    from .runtimes.runtime import Runtime
    from .weights import Checkpoint

Tensors = dict[str, "Tensor"]

FP32_FLOORS = 32
"""An fp32 part may lie this many F0 from eager: other summation orders and other exponentials, no more."""
FP32_LEAST = 2e-5
"""F0 can be nearly nothing; 2e-5 (94 dB) is the least that an fp32 part is granted."""
LOW_PRECISION_FLOORS = 2.0
"""A part in less than fp32 may lie this many F1 from eager fp32."""


@dataclass(frozen=True)
class Measured:
    """One case of one part: its sizes, error and the two other views of it."""

    sizes: dict[str, int]
    error: float
    sqnr_db: float
    cosine: float
    worst: float
    """Largest absolute difference over the largest absolute value expected."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the relative root-mean-square error; infinite if `got` isn't finite or has another shape."""
    import torch

    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def measure(got: Tensors, expected: Tensors, sizes: dict[str, int]) -> Measured:
    """Compare a part's outputs with eager's, over all outputs that both have: the worst counts."""
    names = sorted(set(got) & set(expected))
    errors = {name: relative_error(got[name], expected[name]) for name in names}
    error = max(errors.values(), default=math.inf)
    if math.isinf(error):
        return Measured(sizes, math.inf, -math.inf, 0.0, math.inf)
    cosine = min(_cosine(got[name], expected[name]) for name in names)
    worst = max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30)) for n in names)
    return Measured(sizes, error, -20 * math.log10(max(error, 1e-15)), cosine, worst)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))


def tolerance(precision: str, f0: float, f1: float | None) -> float:
    """Return the relative error that a part in this precision may have."""
    if precision == "fp32" or f1 is None:
        return max(FP32_FLOORS * f0, FP32_LEAST)
    return LOW_PRECISION_FLOORS * f1


def prove(artifact: Artifact, source: Source | None) -> dict[str, Any]:
    """Prove an artifact in a child process; return what goes into the manifest, the proof's memory and time beside it.

    With a source, eager outputs are recorded into `proof/` first; without, those already there are used. Parts of
    the null backend compute nothing and aren't proved.

    Raises:
        ParityError: a part is farther from eager than its tolerance, or can't run at one of three shapes.
    """
    reason = obstacle(artifact, source)
    if reason:
        return {"status": "unproved", "reason": reason}
    started = time.perf_counter()
    arguments = {
        "folder": str(artifact.folder),
        "source": str(source.folder) if source else None,
        "elsewhere": {module: str(path) for module, path in source.elsewhere.items()} if source else {},
    }
    parts, peak = in_child("bakeoff.parity:prove_here", arguments)
    return {
        "status": "proved",
        "parts": parts,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_anon_bytes": peak.anon_bytes,
        "peak_rss_bytes": peak.rss_bytes,
    }


def prove_in_place(artifact: Artifact, source: Source | None) -> Artifact:
    """Prove an artifact again: a twin made of links takes its place once it is proved, else nothing changes on disk.

    Raises:
        ParityError: as `prove`.
        UnavailableError: it can't be proved here; the reason is in the message.
    """
    reason = obstacle(artifact, source)
    if reason:
        message = f"{artifact.folder} couldn't be proved: {reason}"
        raise UnavailableError(message, fix="give the model with --source, on a machine with the memory for it")
    with staged(artifact.folder, replace_existing=True) as folder:
        twin = artifact.twin(folder)
        twin.with_proof(prove(twin, source))
    return Artifact.open(artifact.folder)


def obstacle(artifact: Artifact, source: Source | None) -> str | None:
    """Say why an artifact can't be proved here, if it can't."""
    if all(part.backend == "null" for part in artifact.manifest.parts.values()):
        return "the null backend computes nothing"
    if source is None and not (artifact.folder / "proof").is_dir():
        return "nothing recorded to prove it against, and no source"
    needed, free = _needed_bytes(artifact, source), available_bytes()
    if needed > free:
        return f"running it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return None


def source_of(artifact: Artifact, model: str, config: str | None = None) -> Source:
    """Open the model that an artifact was made from.

    Raises:
        SourceError: it is another model, or LoRAs were added to it.
    """
    source = Source.open(model, config=config)
    for name, entry in artifact.manifest.parts.items():
        if "loras" in entry.key_fields:
            message = f"{artifact.folder} has LoRAs baked into its {name}, which {source.folder} doesn't have"
            raise SourceError(message, fix="leave out --source: what eager fp32 gave is in the artifact")
        if source.hashes(_family_part(artifact, name).module) != entry.key_fields["source"]:
            message = f"{source.folder} is not what {artifact.folder} was made from: its {name} has other bytes"
            raise SourceError(message, fix=f"give the model it was made from, {artifact.manifest.source['id']}")
    return source


def _needed_bytes(artifact: Artifact, source: Source | None) -> int:
    """Estimate the proof's memory: the interpreter, and for the largest part its packed weights and a margin."""
    weights = max(sum(part.weight_bytes.values()) for part in artifact.manifest.parts.values())
    return int(0.7e9 + (2.0 if source else 1.3) * weights)


def prove_here(folder: str, source: str | None, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Prove all parts in this process; runs in the child of `prove`."""
    artifact = Artifact.open(Path(folder))
    origin = None
    if source:
        found = {module: Path(path) for module, path in elsewhere.items()}
        origin = replace(Source.open(source), elsewhere=found)
    results = {}
    for name, entry in artifact.manifest.parts.items():
        if entry.backend == "null":
            continue
        part = _family_part(artifact, name)
        if origin is not None:
            _record(part, entry.precision, origin, artifact.folder / "proof")
        results[name] = _prove_part(artifact, part, entry.precision)
        gc.collect()
    return results


def _family_part(artifact: Artifact, name: str) -> Part:
    family = next(family for family in plugins.families() if family.name == artifact.manifest.family)
    return family.variant(artifact.manifest.variant).part(name)


def _record(part: Part, precision: str, source: Source, folder: Path) -> None:
    """Write inputs, eager fp32 outputs and the floors of one part at three shapes and three timesteps."""
    import torch
    from safetensors.torch import save_file

    config = source.config(part.module)
    flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
    tensors: Tensors = {}
    f0, f1 = 0.0, 0.0
    for index, sizes in enumerate(PROOF_SIZES):
        inputs = part.component.example(config, part.component.limit(config, sizes), seed=index)
        expected = _eager(part.component, flat, config, inputs)
        f0 = max(f0, measure(_split(part.component, flat, config, inputs), expected, {}).error)
        tensors |= {f"{index}.in.{name}": value for name, value in inputs.items()}
        tensors |= {f"{index}.out.{name}": value.contiguous() for name, value in expected.items()}
    floors = {"f0": f0}
    if precision != "fp32":
        weight_format = plugins.weight_format(precision)
        if weight_format:
            weight_format.round_module(
                flat, _calibrated(flat, source.checkpoint(part.module), folder.parent / part.name)
            )
        flat = flat.to(torch.bfloat16)
        for index in range(len(PROOF_SIZES)):
            inputs, expected = _case(tensors, index)
            f1 = max(f1, measure(_eager(part.component, flat, config, inputs, torch.bfloat16), expected, {}).error)
        floors["f1"] = f1
    folder.mkdir(exist_ok=True)
    file = folder / f"{part.name}.safetensors"
    file.unlink(missing_ok=True)  # it may be a link that shares its bytes
    save_file(tensors, file, metadata={k: repr(v) for k, v in floors.items()})


def _calibrated(flat: Any, checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[float, float]]:  # noqa: ANN401 - a torch module
    """Return path of a layer -> scales of its input and output, where the artifact has calibrated ones."""
    file = folder / ACTIVATIONS
    if not file.is_file():
        return {}
    scales = json.loads(file.read_text())
    paths = {path.removeprefix(WRAPPER): path for path, _ in flat.named_modules()}
    names = layer_names(paths, checkpoint)
    return {paths[own]: tuple(scales[name]) for own, name in names.items() if name in scales}


def _eager(component: Component, flat: Any, config: Mapping[str, Any], inputs: Tensors, dtype: Any = None) -> Tensors:  # noqa: ANN401 - modules and dtypes of torch, imported late
    import torch

    cast = []
    for port in component.inputs(config):
        tensor = inputs[port.name]
        cast.append(tensor.to(dtype) if dtype and tensor.is_floating_point() and not port.exact else tensor)
    with torch.no_grad():
        results = flat(*cast)
    return {port.name: result.float() for port, result in zip(component.outputs(config), results, strict=True)}


def _split(component: Component, flat: Any, config: Mapping[str, Any], inputs: Tensors) -> Tensors:  # noqa: ANN401
    """Run eager row by row on one thread: the same numbers in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batched = {port.name for port in component.inputs(config) if port.dims[:1] == ("batch",)}
    rows = max(len(inputs[name]) for name in batched)
    try:
        parts = [
            _eager(component, flat, config, {k: v[row : row + 1] if k in batched else v for k, v in inputs.items()})
            for row in range(rows)
        ]
    finally:
        torch.set_num_threads(threads)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _case(tensors: Tensors, index: int) -> tuple[Tensors, Tensors]:
    def pick(kind: str) -> Tensors:
        prefix = f"{index}.{kind}."
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return pick("in"), pick("out")


def _prove_part(artifact: Artifact, part: Part, precision: str) -> dict[str, Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    from .runtimes.opening import open_part

    file = artifact.folder / "proof" / f"{part.name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        floors = {name: float(value) for name, value in stream.metadata().items()}
    allowed = tolerance(precision, floors["f0"], floors.get("f1"))
    cases = []
    with open_part(
        artifact.folder / part.name, part, artifact.manifest.parts[part.name], Placement(device="cpu")
    ) as runtime:
        cases = [_prove_case(runtime, part.name, *_case(tensors, index), allowed) for index in range(len(PROOF_SIZES))]
    return {"tolerance": allowed, **floors, "cases": [asdict(case) for case in cases]}


def _prove_case(runtime: Runtime, name: str, inputs: Tensors, expected: Tensors, allowed: float) -> Measured:
    """Run one case and refuse what is beyond tolerance, naming the part and the shape."""
    shapes = {key: list(tensor.shape) for key, tensor in inputs.items()}
    fed = {port.name: _to_port(inputs[port.name], port) for port in runtime.inputs}
    try:
        got = runtime.run(fed)
    except Exception as error:
        message = f"{name} can't run at the shapes {shapes}: is one baked into its graph? {error}"
        raise ParityError(message) from error
    case = measure(got, expected, _axes(inputs))
    if not case.error <= allowed:
        message = f"{name} differs from eager fp32 by {case.error:.2e} (tolerance {allowed:.2e}) at the shapes {shapes}"
        raise ParityError(message, fix="report it with the output of: bakeoff doctor --json")
    return case


def _to_port(tensor: Tensor, port: Any) -> Tensor:  # noqa: ANN401
    import torch

    return tensor.to(getattr(torch, port.dtype)).reshape((1,) * port.rank) if tensor.ndim == 0 else tensor


def _axes(inputs: Tensors) -> dict[str, int]:
    """Return the size of each axis of each input, as `name.axis`."""
    return {f"{name}.{axis}": size for name, tensor in inputs.items() for axis, size in enumerate(tensor.shape)}


@dataclass(frozen=True)
class Recorded:
    """What a part is proved against: its cases, and what they may differ by."""

    cases: tuple[tuple[Tensors, Tensors], ...]
    """Inputs, and what eager float32 gave."""
    tolerance: float


def recorded(artifact: Artifact, name: str, source: Source) -> Recorded:
    """Read the cases of one part that were recorded with the artifact; record them elsewhere where they weren't."""
    from tempfile import TemporaryDirectory

    file = artifact.folder / "proof" / f"{name}.safetensors"
    precision = artifact.manifest.parts[name].precision
    if file.is_file():
        return _read_recorded(file, precision)
    with TemporaryDirectory() as folder:
        _record(_family_part(artifact, name), precision, source, Path(folder))
        return _read_recorded(Path(folder) / file.name, precision)


def _read_recorded(file: Path, precision: str) -> Recorded:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        floors = {key: float(value) for key, value in stream.metadata().items()}
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    cases = tuple(_case(tensors, index) for index in range(len(PROOF_SIZES)))
    return Recorded(cases, tolerance(precision, floors["f0"], floors.get("f1")))
